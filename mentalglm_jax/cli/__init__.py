"""The ``mentalglm`` command."""
