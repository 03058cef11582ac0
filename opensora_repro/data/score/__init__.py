"""Behind data_tools.score: what is measured on a clip's frames, and which clips look the same."""
