"""From maps and citations to checks, gates and a verdict."""
