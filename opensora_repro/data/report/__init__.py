"""Behind data_tools.report: what the tools left behind, counted and shown on one page."""
