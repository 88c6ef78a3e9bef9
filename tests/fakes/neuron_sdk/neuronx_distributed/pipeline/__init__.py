"""Pipeline parallelism is not here; its names are, because models are asked whether they are such a
model."""

from neuronx_distributed.pipeline import model, partition, trace
from neuronx_distributed.pipeline.model import NxDPPModel

__all__ = ["NxDPPModel", "model", "partition", "trace"]
