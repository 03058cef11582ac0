"""Behind data_tools.caption: captions from lists, from models and from an endpoint, matched, cleaned and flagged."""
