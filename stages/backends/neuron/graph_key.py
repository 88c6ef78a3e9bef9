"""What decides which graphs a training has: written down by precompile, compared by train before it starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.backends.neuron import cache
from stages.backends.neuron.arguments import (
    attention_implementation,
    cache_environment,
    training_arguments,
)
from stages.model.base import base_config
from stages.run.layout import PRECOMPILE_FILE
from stages.run.provenance import installed_version
from stages.run.settings import Settings

# Arguments that a graph is made of, by value; the learning rate and its like are numbers that a graph is given.
SHAPING_ARGUMENTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "disable_sequence_parallel",
    "zero_1",
    "gradient_checkpointing",
)
COMPILERS = (
    "neuronx-cc",
    "libneuronxla",
    "torch-neuronx",
    "neuronx-distributed",
    "optimum-neuron",
    "transformers",
    "torch",
)


def graph_key(settings: Settings) -> dict[str, str]:
    """What the training's graphs depend on, in words: equal keys have equal graphs."""
    arguments = training_arguments(settings, Path(), 1)
    config = base_config(settings).to_json_string().encode()
    lora = (
        f"rank {settings.lora_r} on {' '.join(sorted(settings.lora_target_modules.split()))}"
        if settings.lora_r
        else "none"
    )
    flags = [
        flag
        for flag in cache_environment(settings)["NEURON_CC_FLAGS"].split()
        if not flag.startswith("--cache_dir")
    ]
    return {
        **{name: version for name in COMPILERS if (version := installed_version(name))},
        "NEURON_CC_FLAGS": " ".join(flags),
        "model": hashlib.sha256(config).hexdigest()[:16],
        "processes": str(settings.nproc_per_node),
        "row": f"{settings.max_length} tokens",
        "attention": attention_implementation(settings.max_length),
        "LoRA": lora if not settings.lora_r or not settings.lora_dropout else f"{lora}, dropout",
        "weight decay": "on" if settings.weight_decay else "off",
        "gradient clipping": "on" if settings.max_grad_norm else "off",
        **{name: arguments[name] for name in SHAPING_ARGUMENTS},
    }


def recompilations(settings: Settings, precompiled: Path) -> Iterator[str]:
    """Why train would compile what precompile was run for, a line each; nothing where the cache will serve."""
    try:
        report: dict[str, Any] = json.loads((precompiled / PRECOMPILE_FILE).read_bytes())
        key_then, compiled = report["graph_key"], set(report["graph_names"])
    except (OSError, ValueError, KeyError):
        yield "precompile has not run: the first steps wait for the compiler, about 40 minutes for a 7B model."
        return
    key_now = graph_key(settings)
    names = [name for name in {**key_then, **key_now} if key_then.get(name) != key_now.get(name)]
    changed = [f"{name} {key_then.get(name)} -> {key_now.get(name)}" for name in names]
    if changed:
        yield (
            f"training compiles again, since precompile ran for other graphs: {'; '.join(changed)}. "
            f"Remove {precompiled} and run `make precompile`: it compiles side by side."
        )
    url = settings.neuron_compile_cache_url
    if cache.folder_of(url) and (gone := compiled - cache.names(url)):
        yield (
            f"training compiles again: {len(gone)} of precompile's {len(compiled)} graphs are not in {url} (any more). "
            f"Remove {precompiled} and run `make precompile`: it compiles side by side."
        )
