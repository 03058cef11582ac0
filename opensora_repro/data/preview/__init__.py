"""Behind data_tools.preview: what training will read of a manifest, on one page."""
