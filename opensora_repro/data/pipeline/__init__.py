"""Behind data_tools.pipeline: a line of tools from one config, and what is done of it."""
