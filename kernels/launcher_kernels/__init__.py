"""Kernels of the training step's hot path. Each has a PyTorch path that runs anywhere. Never imports `launcher`."""
