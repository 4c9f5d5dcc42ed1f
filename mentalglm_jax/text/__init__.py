"""Tokenizer, chat format, tasks with their labels, and how an answer is read."""
