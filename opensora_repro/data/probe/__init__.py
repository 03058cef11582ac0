"""Behind data_tools.probe: what video files are, and manifests of those that can be read."""
