"""PyTorch itself, on a CPU or on CUDA GPUs."""
