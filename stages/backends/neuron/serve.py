"""The server on Trainium 2 and 3 (vLLM with its Neuron plugin), or Trainium 1 and Inferentia 2
(optimum-neuron, which drives vLLM 0.11).

Written from their documents, and not run: see docs/serve.md for the versions.
"""

from __future__ import annotations

from pathlib import Path

from stages.backends.neuron.hardware import find_hardware
from stages.run.cost import instance_type
from stages.run.provenance import pinned_versions
from stages.run.server import Server
from stages.run.settings import Settings

# https://awsdocs-neuron.readthedocs-hosted.com/en/v2.33.0/vllm-neuron/, Neuron SDK 2.33
IMAGE = (
    "public.ecr.aws/neuron/pytorch-inference-vllm-neuronx:"
    "0.29.0.1.2.0-neuronx-py314-sdk2.33.0-ubuntu26.04"
)
# Seconds, as in its quickstart: compiling takes longer than its default of 600.
_PATIENCE = {
    "VLLM_NEURON_COMPILATION_TIMEOUT": "1200",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "1200",
}


def server(settings: Settings, model: Path) -> Server:
    """vLLM's Neuron plugin, or optimum-neuron where the plugin does not run."""
    newer = (instance_type() or "").startswith(("trn2", "trn3"))
    if newer or find_hardware().target == "trn2":
        return _plugin(settings, model)
    return _optimum(settings, model)


def _plugin(settings: Settings, model: Path) -> Server:
    options = {
        "--host": settings.serve_host,
        "--port": settings.serve_port,
        "--served-model-name": model.parent.name,
        "--tensor-parallel-size": settings.inference_tensor_parallel_size,
        "--max-model-len": settings.inference_sequence_length,
        "--max-num-seqs": settings.inference_batch_size,
    }
    return Server(
        "vLLM's Neuron plugin",
        ["vllm", "serve", str(model), *(str(word) for pair in options.items() for word in pair)],
        modules=("vllm", "vllm_neuron"),
        install=f"run the command above in AWS's image {IMAGE}.",
        environment=_PATIENCE,
        note="it compiles the model at its first start.",
    )


def _optimum(settings: Settings, model: Path) -> Server:
    version = pinned_versions("neuron")["optimum-neuron"]
    options = {
        "--model": model,
        "--served_model_name": model.parent.name,
        "--tensor_parallel_size": settings.inference_tensor_parallel_size,
        "--batch_size": settings.inference_batch_size,
        "--sequence_length": settings.inference_sequence_length,
        "--port": settings.serve_port,
    }
    return Server(
        "optimum-neuron's server",
        [
            *("optimum-cli", "neuron", "serve"),
            *(str(word) for pair in options.items() for word in pair),
            # No public cache has the graphs of a model that was trained here.
            "--allow_non_cached_model",
            f"--host={settings.serve_host}",  # not its own option: it passes it on to vLLM
        ],
        modules=("optimum.neuron", "vllm"),
        install="make an environment for it (python3.11 -m venv serve; serve/bin/pip install "
        "--extra-index-url https://pip.repos.neuron.amazonaws.com "
        f"'optimum-neuron[neuronx,vllm]=={version}') and put its bin first on the PATH.",
        note="it compiles the model again, as compile-inference did.",
    )
