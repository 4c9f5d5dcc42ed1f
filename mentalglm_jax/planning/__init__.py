"""Does a recipe fit a chip, and what does it cost? Compiled ahead of time, without the chip."""
