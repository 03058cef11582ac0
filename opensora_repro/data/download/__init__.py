"""Behind data_tools.download: files and videos of pages from the web, within limits and continued where they were."""
