"""libneuronxla without a compiler: graphs that are descriptions, and their cache."""

__version__ = "2.2.12677.0"
