"""neuronx_distributed on a CPU: layers that are split over processes, and the files that hold
them."""

import only_in_name  # noqa: F401

from neuronx_distributed import parallel_layers, pipeline, trainer

__all__ = ["parallel_layers", "pipeline", "trainer"]
