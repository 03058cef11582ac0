"""Behind data_tools.filter: rules over columns, and what lies close to their thresholds."""
