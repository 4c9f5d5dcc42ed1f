"""A table that somebody made becomes records: reading it as it is, its rows, its task, what is written."""
