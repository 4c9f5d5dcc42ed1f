"""The run directory, the data set in numbers, tables for other programs."""
