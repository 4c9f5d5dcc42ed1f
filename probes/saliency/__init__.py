"""Saliency maps: gradients, erasure, Shapley values."""
