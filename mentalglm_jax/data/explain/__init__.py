"""The C-IMHI builder: a teacher model explains expert labels, checks and people judge what it wrote."""
