"""Convert weights that exist only as pickles (pytorch_model.bin, or its parts and an index) to
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

from stages.model.files import PICKLE_INDEX, weight_map
from stages.model.weights import DTYPES, TensorSpec, write_safetensors
from stages.run.digests import combine, file_digest
from stages.run.errors import StageFailure
from stages.run.layout import PICKLED_WEIGHTS

if TYPE_CHECKING:
    import torch

MAX_SHARD_SIZE = 5 * 10**9


def content_of(files: list[Path]) -> str:
    """One digest of the files' names and contents."""
    return combine({path.name: file_digest(path) for path in files})


def pickled_files(folder: Path) -> list[Path]:
    """The pickles of the model: all files that an index names, or pytorch_model.bin. Raises
    StageFailure where one is missing."""
    pickles = sorted(folder.glob(PICKLED_WEIGHTS))
    if (folder / PICKLE_INDEX).is_file():
        try:
            named = {folder / name for name in weight_map(folder / PICKLE_INDEX).values()}
        except ValueError as error:
            raise StageFailure(str(error)) from None
        if missing := sorted(path.name for path in named - set(pickles)):
            raise StageFailure(
                f"{folder / PICKLE_INDEX} names {missing[0]}, and {folder} has no such "
                f"{PICKLED_WEIGHTS}."
            )
        return sorted(named)
    if [path.name for path in pickles] != ["pytorch_model.bin"]:
        contents = (
            ", ".join(path.name for path in pickles)
            or "no weights, neither .safetensors nor pytorch_model.bin,"
        )
        raise StageFailure(f"{folder} holds {contents} and no {PICKLE_INDEX}.")
    return pickles


def convert(files: list[Path], tied: dict[str, str], output: Path) -> None:
    """Write the weights in `files` to `output` as safetensors. Raises StageFailure for files that
    are damaged or hold anything but tensors, and for values that are not finite.

    Only the tensor that is being written is in memory, if the file is an archive, as torch writes
    them since 2020.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        for name, tensor in _tensors(path).items():
            if name in tensors:
                raise StageFailure(f"{path}: {name} is in another file too.")
            tensors[name] = tensor
    # A tied name is replaced by the one that loaders look for.
    kept = {tied[name]: tensor for name, tensor in tensors.items() if name in tied}
    kept |= {name: tensor for name, tensor in tensors.items() if name not in tied}
    sources = [(_spec(name, tensor), partial(_read, tensor)) for name, tensor in kept.items()]
    write_safetensors(sources, output, max_shard_size=MAX_SHARD_SIZE)


def load_pickle(path: Path, known: Sequence[tuple[type, str]] = ()) -> Any:
    """What torch.save wrote to `path`, its tensors mapped from the file.

    `known` are classes with the names that the file uses for them. Raises StageFailure for a file
    that is damaged or needs anything but tensors and plain containers. No code in it runs.
    """
    import torch

    try:
        with torch.serialization.safe_globals(list(known)):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # from damaged bytes, torch and pickle raise anything
        # The rest of torch's message advises to run the code.
        message = str(error.__context__ or error).partition("\n")[0].partition(". ")[0]
        reason = message or repr(error)
        raise StageFailure(
            f"{path} is damaged, or contains more than tensors, which is never run: {reason}."
        ) from error


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    state = load_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise StageFailure(f"{path} holds no state dict (tensors by name).")
    unsupported = [name for name, value in state.items() if not _is_plain(value)]
    if unsupported:
        raise StageFailure(
            f"{path}: {unsupported[0]} and {len(unsupported) - 1} more of {len(state)} entries "
            "are not tensors of a known dtype."
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
    # With stride 0, one number can claim to be a tensor of any size.
    return (
        str(value.dtype).removeprefix("torch.") in DTYPES
        and value.untyped_storage().nbytes() >= value.nbytes
    )


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _read(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    return (tensor,)
