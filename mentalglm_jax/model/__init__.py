"""GLM-4 in Flax NNX: layers, attention, LoRA, quantised kernels, mesh axes."""
