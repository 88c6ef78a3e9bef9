"""A LoRA adapter: its folder as peft has it, and the merge into its base model, tensor by tensor:
W + scale * B @ A, in the arithmetic of peft 0.17.0.

peft loads an adapter in float32, multiplies in float32, and adds to the weight in place, which
rounds once, to the weight's dtype (peft/tuners/lora/layer.py, Linear.merge). The same operations on
whole matrices give the same bits here.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.model.check import NOT_A_WEIGHT
from stages.model.headers import read_headers
from stages.model.weights import FLOATING, ReadTensor, TensorSpec
from stages.run.errors import StageFailure, refusal
from stages.run.layout import ADAPTER_CONFIG, ADAPTER_FOLDER

if TYPE_CHECKING:
    import torch

# The names of a model's tensors inside a peft model.
PEFT_PREFIX = "base_model.model."
# Settings of peft under which the merge would be another one; each is left at its default.
UNSUPPORTED = (
    *(
        "alpha_pattern",
        "alora_invocation_tokens",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "layer_replication",
    ),
    *(
        "layers_pattern",
        "layers_to_transform",
        "lora_bias",
        "megatron_config",
        "modules_to_save",
        "rank_pattern",
        "target_parameters",
    ),
    *("trainable_token_indices", "use_dora", "use_qalora"),
)
# Others than these initial weights change the base's weights too.
KNOWN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
}
Matrices = tuple["torch.Tensor", "torch.Tensor"]


def merged_tensors(
    adapter: Mapping[str, torch.Tensor],
    shards: Path,
    base: Path | None,
    dtype: str | None,
    tied: Mapping[str, str],
) -> tuple[list[tuple[TensorSpec, ReadTensor]], int]:
    """The base model's tensors with `adapter` merged into them, and the bytes of the base that are
    read for them.

    `adapter` holds lora_A [rank, in] and lora_B [out, rank] of each layer, under peft's names; the
    folder `shards` that it comes from has its adapter_config.json. The base's weights are cast to
    `dtype` before the merge, as a model is that peft merges into. Raises StageFailure when the
    adapter is of a kind that is not merged here, or does not fit the base.
    """
    if base is None:
        raise StageFailure(
            f"{shards} holds an adapter, which is merged into the model that it was trained on. "
            "Name that model."
        )
    scale, targets, problems = _configuration(shards / ADAPTER_CONFIG)
    tensors = {
        name: place
        for name, place in _base_tensors(base).items()
        if name not in tied and not name.endswith(NOT_A_WEIGHT)
    }
    matrices, found = _matrices(adapter)
    problems += [*found, *_misfits(base, tensors, matrices, targets)]
    if problems:
        raise refusal(f"The adapter in {shards} cannot be merged into {base}.", problems)
    sources: list[tuple[TensorSpec, ReadTensor]] = []
    for name, (spec, file) in tensors.items():
        if name in matrices:
            sources.append((spec, partial(_merged, spec, file, matrices[name], scale, dtype)))
        else:
            sources.append((spec, partial(_base_tensor, spec, file)))
    return sources, sum(spec.nbytes for spec, _ in tensors.values())


def write_adapter(adapter: Mapping[str, torch.Tensor], shards: Path, output: Path) -> None:
    """Write the folder `output`/adapter, which peft loads onto the base model."""
    from safetensors.torch import save_file

    folder = output / ADAPTER_FOLDER
    folder.mkdir()
    shutil.copyfile(shards / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
    weights = folder / "adapter_model.safetensors"
    save_file(
        {PEFT_PREFIX + name.removeprefix(PEFT_PREFIX): value for name, value in adapter.items()},
        weights,
        metadata={"format": "pt"},
    )
    shutil.copymode(folder / ADAPTER_CONFIG, weights)  # safetensors lets only the owner read it


def _merged(
    spec: TensorSpec, file: Path, matrices: Matrices, scale: float, dtype: str | None
) -> Iterator[torch.Tensor]:
    import torch

    first, second = (matrix.float() for matrix in matrices)
    weight = next(_base_tensor(spec, file)).to(getattr(torch, dtype or spec.dtype), copy=True)
    weight += (second @ first) * scale
    yield weight


def _base_tensor(spec: TensorSpec, file: Path) -> Iterator[torch.Tensor]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        yield tensors.get_tensor(spec.name)


def _base_tensors(base: Path) -> dict[str, tuple[TensorSpec, Path]]:
    headers = read_headers(base)
    if headers.problems:
        raise refusal(f"The base model {base} cannot be read. Fetch it again.", headers.problems)
    return {name: (spec, base / headers.files[name]) for name, spec in headers.tensors.items()}


def _configuration(path: Path) -> tuple[float, list[str], list[str]]:
    """Scale and target modules that peft's adapter_config.json gives, and what in it is not merged
    here."""
    try:
        config = json.loads(path.read_text())
        rank, alpha, targets = config["r"], config["lora_alpha"], config["target_modules"]
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise StageFailure(
            f"{path} is not the configuration of a LoRA adapter: {error!r}."
        ) from error
    problems = [
        f"{path}: {name} = {config[name]!r} is not known here."
        for name in UNSUPPORTED
        if config.get(name)
    ]
    for name, known in KNOWN.items():
        if config.get(name, known[0]) not in known:
            problems.append(
                f"{path}: {name} = {config[name]!r} is not known here, only "
                f"{', '.join(map(repr, known))}."
            )
    if not isinstance(targets, list):
        problems.append(f"{path}: target_modules is {targets!r}. List the modules' names.")
        targets = []
    return scale, targets, problems


def _matrices(adapter: Mapping[str, torch.Tensor]) -> tuple[dict[str, Matrices], list[str]]:
    """Weight of the base model -> its A and B, and the tensors of the adapter that are neither."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    problems = []
    for name, tensor in adapter.items():
        module, half, rest = name.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if half and rest in ("A.weight", "B.weight"):
            halves.setdefault(f"{module}.weight", {})[rest[0]] = tensor
        else:
            problems.append(f"{name} is not lora_A or lora_B of a linear layer.")
    problems += [
        f"{name}: lora_{'B' if 'A' in found else 'A'} is missing."
        for name, found in halves.items()
        if len(found) < 2
    ]
    return {
        name: (found["A"], found["B"]) for name, found in halves.items() if len(found) == 2
    }, problems


def _misfits(
    base: Path, tensors: Mapping[str, Any], matrices: Mapping[str, Matrices], targets: list[str]
) -> Iterator[str]:
    """Adapted weights that the base lacks or has in another shape, and modules of the base that the
    adapter should adapt and does not."""
    for name, (first, second) in matrices.items():
        if name not in tensors:
            yield (
                f"{name} has an adapter and is not in {base}: it was trained on another model, "
                "or the two are tied."
            )
            continue
        spec = tensors[name][0]
        shapes = [list(matrix.shape) for matrix in (first, second)]
        fits = all(len(shape) == 2 for shape in shapes) and shapes[0][0] == shapes[1][1]
        if not fits or (shapes[1][0], shapes[0][1]) != spec.shape or spec.dtype not in FLOATING:
            yield (
                f"{name}: its shape is {list(spec.shape)} in {base}, its adapter has A "
                f"{shapes[0]} and B {shapes[1]}."
            )
    for name in tensors:
        module = name.removesuffix(".weight")
        if name not in matrices and any(
            module == target or module.endswith(f".{target}") for target in targets
        ):
            yield f"{name} is to be adapted (target_modules) and the shards hold nothing for it."
