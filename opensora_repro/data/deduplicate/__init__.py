"""Behind data_tools.deduplicate: which clips drop for which."""
