"""Behind data_tools.convert: the readers and writers of other datasets' formats."""
