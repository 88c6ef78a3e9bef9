"""Tensor-parallel layers, the groups of ranks, and the exchanges between them."""

from neuronx_distributed.parallel_layers import parallel_state

__all__ = ["parallel_state"]
