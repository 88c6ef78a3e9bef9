"""Imported by accelerate; processes are started by torchrun alone."""
