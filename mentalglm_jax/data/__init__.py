"""Records: where posts, labels and explanations come from."""
