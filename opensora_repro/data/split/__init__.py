"""Behind data_tools.split: where a video's shots end, and clips cut there."""
