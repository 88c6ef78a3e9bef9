"""The torch backend: PyTorch itself, on CPUs or on CUDA GPUs."""
