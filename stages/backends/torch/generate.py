"""Generation with a compiled model: two AOTInductor packages that share one set of weights.

Imports only torch and safetensors: a fresh process answers in about a second, because neither
transformers nor torch's compiler is imported. `load` refuses what this machine cannot run;
`CompiledModel.generate` (decoding.py) streams ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from stages.backends.decoding import Decoder, right_padded
from stages.backends.device import DEVICES, Device
from stages.run.digests import file_digest
from stages.run.errors import InputError
from stages.run.manifest import manifest_of
from stages.run.settings import Settings

COMPILED_INFO, WEIGHTS = "compiled.json", "weights.safetensors"
StepName = Literal["prefill", "decode"]
STEPS: tuple[StepName, ...] = ("prefill", "decode")

# step(ids, lengths or positions, cache) -> logits [batch, vocab]
Step = Callable[[torch.Tensor, torch.Tensor, list[torch.Tensor]], torch.Tensor]


class CompiledModel(Decoder):
    """The two packages as one model.

    `bos_token_id`, `eos_token_id` (an id, or a list of them) and `pad_token_id` are the model's;
    `dtype` is that of the weights and of the cache.
    """

    def __init__(
        self,
        description: dict[str, Any],
        device: Device,
        weights: dict[str, torch.Tensor],
        prefill: Step,
        decode: Step,
        lengths: Sequence[int],
    ):
        """`lengths`: those of the prompts that `prefill` takes, ascending."""
        self.batch_size: int = description["batch_size"]
        self.sequence_length: int = description["sequence_length"]
        self.vocab_size: int = description["vocab_size"]
        self.bos_token_id: int | None = description["bos_token_id"]
        self.eos_token_id: int | list[int] | None = description["eos_token_id"]
        self.pad_token_id: int | None = description["pad_token_id"]
        self.device, self._compute = device.random, device.torch_device()
        self.dtype: torch.dtype = getattr(torch, description["dtype"])
        self._layers: int = description["layers"]
        self._cache_shape: tuple[int, ...] = tuple(description["cache_shape"])
        # Kept alive here: the packages have only pointers into these tensors.
        self._weights = weights
        self._prefill, self._decode, self._lengths = prefill, decode, lengths

    def prefill(
        self, prompts: list[list[int]], cache: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length = next(one for one in self._lengths if one >= max(map(len, prompts)))
        ids, lengths = right_padded(prompts, slots=self.batch_size, length=length)
        lengths = lengths.to(self._compute)
        logits = self._prefill(ids.to(self._compute), lengths, cache)
        return logits.to(self.device), lengths.to(self.device)

    def decode_one_token(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: list[torch.Tensor]
    ) -> torch.Tensor:
        logits = self._decode(ids.to(self._compute), positions.to(self._compute), cache)
        return logits.to(self.device)

    def new_cache(self) -> list[torch.Tensor]:
        return empty_cache(
            layers=self._layers, shape=self._cache_shape, dtype=self.dtype, device=self._compute
        )


def empty_cache(
    *, layers: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> list[torch.Tensor]:
    """Keys and values of each layer in turn.

    `shape` is [batch, kv heads, sequence length, head dim]. Zeros, not uninitialised
    memory: a masked position has weight 0, and 0 times a stray NaN is NaN.
    """
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * layers)]


def load(compiled: Path) -> CompiledModel:
    """Load what compile_inference wrote.

    Raises InputError when `compiled` has no compiled model; when it was compiled for another
    device, instruction set or torch; when a package is not the one that was published; or when a
    weight differs in name, dtype or shape from what the packages were compiled for. The packages
    do not check the bytes they get and would answer with nonsense.
    """
    if not (compiled / COMPILED_INFO).is_file():
        raise InputError(
            f"{compiled} has no compiled model: {COMPILED_INFO} is missing. "
            "Run `make compile-inference` first."
        )
    description = json.loads((compiled / COMPILED_INFO).read_text(encoding="utf-8"))
    device = DEVICES[description["device"]](Settings.read())
    _refuse_other_machine(compiled, description, device)
    _refuse_other_code(compiled)
    weights = _read_weights(compiled, description, device)
    if device.has_inductor:
        # 2 is the shortest length that the graph takes.
        steps = {step: _load_step(compiled / f"{step}.pt2", weights) for step in STEPS}
        lengths: Sequence[int] = range(2, description["sequence_length"])
    else:
        from stages.backends.torch.static import prefill_lengths, static_steps

        steps = static_steps(compiled, description, weights, device)
        lengths = prefill_lengths(description["sequence_length"])
    return CompiledModel(description, device, weights, steps["prefill"], steps["decode"], lengths)


def _refuse_other_code(compiled: Path) -> None:
    """Refuse a package that is not as it was published: it is machine code for this process."""
    # None while the stage itself checks what it has just compiled.
    manifest = manifest_of(compiled)
    for name, entry in (manifest or {"outputs": {}})["outputs"].items():
        if name.endswith(".pt2") and file_digest(compiled / name) != entry["sha256"]:
            raise InputError(
                f"{compiled / name} is not what was published. Remove {compiled} and run "
                "`make compile-inference`: it compiles again from the consolidated model."
            )


def _refuse_other_machine(compiled: Path, description: dict[str, Any], device: Device) -> None:
    if problem := device.problem():
        problems = [f"it was compiled for {device.name}, and {problem}"]
    else:
        problems = device.instructions().problems_with(description["instruction_set"])
    if description["torch"] != torch.__version__:
        problems.append(
            f"it was compiled with torch {description['torch']}, this is torch {torch.__version__}"
        )
    if problems:
        remedy = (
            f"Remove {compiled} and run `make compile-inference` on this machine: it compiles "
            "again from the consolidated model."
        )
        raise InputError(
            [
                f"The compiled model in {compiled} cannot run here: {problem}."
                for problem in problems
            ]
            + [remedy]
        )


def _read_weights(
    compiled: Path, description: dict[str, Any], device: Device
) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    weights = {
        name: tensor.to(device.torch_device())
        for name, tensor in load_file(compiled / WEIGHTS).items()
    }
    expected = description["constants"]
    actual = {name: constant_type(tensor) for name, tensor in weights.items()}
    names = expected.keys() | actual.keys()
    different = sorted(name for name in names if expected.get(name) != actual.get(name))
    if different:
        problems = [
            f"{compiled / WEIGHTS} is not what was compiled: {len(different)} of {len(names)} "
            "tensors differ."
        ]
        problems += [
            f"  {name}: compiled {expected.get(name, 'nothing')}, "
            f"the file has {actual.get(name, 'nothing')}"
            for name in different[:5]
        ]
        problems += [f"  and {len(different) - 5} more"] if len(different) > 5 else []
        raise InputError([*problems, f"Remove {compiled} and run `make compile-inference` again."])
    return weights


def constant_type(tensor: torch.Tensor) -> str:
    """Dtype and shape as text that can be compared: `float32 [2048, 256]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _load_step(package: Path, weights: dict[str, torch.Tensor]) -> Step:
    """Open one package and point its constants at `weights`, without a copy."""
    try:
        # What aoti_load_package wraps. The public function imports the compiler first, which takes
        # 2 s; this takes 2 ms.
        loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)
    except (AttributeError, TypeError):  # private, so a later torch may move or change it
        return _load_step_publicly(package, weights)
    constants = _constants_of(package, loader.get_constant_fqns(), weights)
    # use_inactive=False, check_full_update=True, user_managed=True
    loader.load_constants(constants, False, True, True)
    return lambda ids, counts, cache: loader.run([ids, counts, *cache])[0]


def _load_step_publicly(package: Path, weights: dict[str, torch.Tensor]) -> Step:
    from torch._inductor import aoti_load_package

    model = aoti_load_package(str(package))
    constants = _constants_of(package, model.get_constant_fqns(), weights)
    model.load_constants(constants, check_full_update=True, user_managed=True)
    return model


def _constants_of(
    package: Path, names: list[str], weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights that a package asks for.

    That is all but vectors of up to 8 numbers, which inductor writes into the code.
    """
    if missing := sorted(set(names) - set(weights)):
        raise InputError(
            f"{package} and {WEIGHTS} do not belong together: the weights lack "
            f"{', '.join(missing[:5])}. Remove {package.parent} and run `make compile-inference` "
            "again."
        )
    return {name: weights[name] for name in names}
