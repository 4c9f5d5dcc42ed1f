"""What the program runs on: accelerators, several hosts, ``mentalglm doctor``."""
