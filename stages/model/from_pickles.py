"""Weights that a model has as pickles alone (pytorch_model.bin, or parts of it and an index), as
safetensors.

torch's weights_only reader builds tensors and plain containers and refuses all else, so that no
code in a file runs. Each model is converted once, into a folder named after the content of its
files.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.model.headers import weight_map
from stages.model.weights import DTYPES, TensorSpec, write_safetensors
from stages.run.digests import combine, file_digest
from stages.run.errors import StageFailure
from stages.run.layout import PICKLED_WEIGHTS

if TYPE_CHECKING:
    import torch

PICKLE_INDEX = "pytorch_model.bin.index.json"
MAX_SHARD_SIZE = 5 * 10**9


def content_of(files: list[Path]) -> str:
    """One digest of the files' names and contents."""
    return combine({path.name: file_digest(path) for path in files})


def pickled_files(folder: Path) -> list[Path]:
    """The pickles that make up the model: all that an index names, or the one that there is.
    StageFailure where one is missing."""
    found = sorted(folder.glob(PICKLED_WEIGHTS))
    if (folder / PICKLE_INDEX).is_file():
        try:
            named = {folder / name for name in weight_map(folder / PICKLE_INDEX).values()}
        except ValueError as error:
            raise StageFailure(str(error)) from None
        if missing := sorted(path.name for path in named - set(found)):
            raise StageFailure(
                f"{folder / PICKLE_INDEX} names {missing[0]}, and {folder} has no such "
                f"{PICKLED_WEIGHTS}."
            )
        return sorted(named)
    if [path.name for path in found] != ["pytorch_model.bin"]:
        there = (
            ", ".join(path.name for path in found)
            or "no weights, neither .safetensors nor pytorch_model.bin,"
        )
        raise StageFailure(f"{folder} holds {there} and no {PICKLE_INDEX}.")
    return found


def convert(files: list[Path], tied: dict[str, str], output: Path) -> None:
    """Write the weights in `files` to `output` as safetensors. Raises StageFailure for files that
    are damaged or hold something else than tensors, and for values that are not finite.

    A tensor is read from its file at its turn: of files of 2020 and later, which are archives,
    nothing else is in memory.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        for name, tensor in _tensors(path).items():
            if name in tensors:
                raise StageFailure(f"{path}: {name} is in another file too.")
            tensors[name] = tensor
    # A name that is tied is kept as the one that loaders look for.
    kept = {tied[name]: tensor for name, tensor in tensors.items() if name in tied}
    kept |= {name: tensor for name, tensor in tensors.items() if name not in tied}
    sources = [(_spec(name, tensor), partial(_read, tensor)) for name, tensor in kept.items()]
    write_safetensors(sources, output, max_shard_size=MAX_SHARD_SIZE)


def load_pickle(path: Path, known: Sequence[tuple[type, str]] = ()) -> Any:
    """What torch.save wrote to `path`, its tensors mapped from the file.

    `known` gives classes, and the names under which the file asks for them. Raises StageFailure for
    a file that is damaged or asks for anything else than tensors and plain containers: nothing in
    it runs.
    """
    import torch

    try:
        with torch.serialization.safe_globals(list(known)):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # from damaged bytes, torch and pickle raise anything
        reason = str(error.__context__ or error).partition("\n")[0].partition(". ")[0] or repr(
            error
        )  # torch's own advises to run it
        raise StageFailure(
            f"{path} is damaged, or asks for more than tensors, and that is never run: {reason}"
        ) from error


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    state = load_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise StageFailure(f"{path} holds no state dict (tensors by name).")
    strange = [name for name, value in state.items() if not _is_plain(value)]
    if strange:
        raise StageFailure(
            f"{path}: {strange[0]} and {len(strange) - 1} more of {len(state)} entries are no "
            "tensors of a known dtype."
        )
    return state


def _is_plain(value: Any) -> bool:
    import torch

    if (
        not isinstance(value, torch.Tensor)
        or value.layout != torch.strided
        or value.is_quantized
        or value.is_meta
    ):
        return False
    # One number can be announced as a tensor of any size (stride 0).
    return (
        str(value.dtype).removeprefix("torch.") in DTYPES
        and value.untyped_storage().nbytes() >= value.nbytes
    )


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _read(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    return (tensor,)
