"""The server on an NVIDIA GPU (vLLM) or a CPU (transformers)."""

from __future__ import annotations

from pathlib import Path

from stages.backends.neuron.serve import server as neuron_server
from stages.run.provenance import pinned_versions
from stages.run.server import Server
from stages.run.settings import Settings

# Its options were read for this version: https://docs.vllm.ai/en/v0.28.0/
VLLM = "0.28.0"
# What transformers[serving] installs.
SERVING = ("transformers", "torch", "fastapi", "uvicorn", "pydantic", "openai")


def server(settings: Settings, model: Path) -> Server:
    """vLLM on a GPU or on Trainium, `transformers serve` on a CPU."""
    from stages.backends.device import device_of

    of_device = {"cpu": _transformers, "cuda": _vllm, "neuron": neuron_server}
    return of_device[device_of(settings).name](settings, model)


def _vllm(settings: Settings, model: Path) -> Server:
    options = {
        "--host": settings.serve_host,
        "--port": settings.serve_port,
        "--served-model-name": model.parent.name,
        "--max-model-len": settings.inference_sequence_length,
        "--tensor-parallel-size": settings.inference_tensor_parallel_size,
    }
    words = [str(word) for option in options.items() for word in option]
    return Server(
        "vLLM",
        ["vllm", "serve", str(model), *words],
        modules=("vllm",),
        install="it pins its own PyTorch, so make an environment for it (python3 -m venv vllm; "
        f"vllm/bin/pip install vllm=={VLLM}) and put its bin first on the PATH.",
    )


def _transformers(settings: Settings, model: Path) -> Server:
    version = pinned_versions("torch")["transformers"]
    return Server(
        "transformers serve",
        # Without --force_model it would load any model of the Hub that a client names.
        [
            *("transformers", "serve", "--force_model", str(model)),
            *("--host", settings.serve_host, "--port", str(settings.serve_port)),
        ],
        modules=SERVING,
        install=f".venv/bin/python -m pip install 'transformers[serving]=={version}' adds it; or "
        "put the bin of another environment that has it first on the PATH.",
        note="it loads the model with the first question, and answers one at a time.",
    )
