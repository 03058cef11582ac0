"""Behind data_tools.plan: what tools take of a core, as it was measured, and what follows for hours of footage."""
