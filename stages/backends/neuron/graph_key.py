"""The key of a training's graphs: everything that decides which graphs the training has.

precompile writes it, and train compares it before it starts.
"""

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

# The arguments whose values are part of a graph. The learning rate and the like are inputs of it.
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
    """What the training's graphs depend on, as text: equal keys mean equal graphs."""
    arguments = training_arguments(settings, Path(), 1)
    config = base_config(settings).to_json_string().encode()
    lora = (
        f"rank {settings.lora_r} on {' '.join(sorted(settings.lora_target_modules.split()))}"
        if settings.lora_r
        else "none"
    )
    if settings.lora_r and settings.lora_dropout:
        lora += ", dropout"
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
        "LoRA": lora,
        # A warm-up starts at the rate 0, which torch_xla makes a constant of the first graph.
        "warm-up": "on" if settings.warmup_steps else "off",
        "weight decay": "on" if settings.weight_decay else "off",
        "gradient clipping": "on" if settings.max_grad_norm else "off",
        **{name: arguments[name] for name in SHAPING_ARGUMENTS},
    }


def recompilations(settings: Settings, precompiled: Path) -> Iterator[str]:
    """The reasons why train would compile again, one line each; none if it would not."""
    try:
        report: dict[str, Any] = json.loads((precompiled / PRECOMPILE_FILE).read_bytes())
        old_key, compiled = report["graph_key"], set(report["graph_names"])
    except (OSError, ValueError, KeyError):
        yield (
            "precompile has not run: the first steps wait for the compiler, about 40 minutes for a "
            "7B model. Run `make precompile` first."
        )
        return
    new_key = graph_key(settings)
    changed = [
        f"{name} {old_key.get(name)} -> {new_key.get(name)}"
        for name in {**old_key, **new_key}
        if old_key.get(name) != new_key.get(name)
    ]
    if changed:
        yield (
            "training compiles again, because precompile ran for other graphs: "
            f"{'; '.join(changed)}. Remove {precompiled} and run `make precompile`, which compiles "
            "graphs in parallel."
        )
    url = settings.neuron_compile_cache_url
    if cache.folder_of(url) and (missing := compiled - cache.names(url)):
        yield (
            f"training compiles again: {len(missing)} of precompile's {len(compiled)} graphs are "
            f"not in {url} any more. Remove {precompiled} and run `make precompile`, which "
            "compiles graphs in parallel."
        )
