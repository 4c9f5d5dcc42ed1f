"""Which places of the post an explanation cites."""
