"""Decoding, generation and label probabilities."""
