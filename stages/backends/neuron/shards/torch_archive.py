"""The files that torch.save wrote for NeuronTrainer, opened without the Neuron packages, and rows
of their tensors.

torch maps a file into memory, so opening one reads only its description. Mapped pages count as this
process's memory once they are read: a RowReader therefore closes the files now and then, and opens
them again.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.model.from_pickles import load_pickle
from stages.run.errors import StageFailure

if TYPE_CHECKING:
    import torch

# Bytes that a RowReader reads before it closes the files: mapped memory, and with it the peak,
# stays about this large.
MAPPED_BYTES = 128 << 20


class TensorReference:
    """What torch_xla has under this name: the tensor is in a file of its own, whose number is
    `tid`."""

    tid: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in `file`: the entry `name` of a dict, or, where that is None, all that the file
    holds."""

    file: Path
    name: str | None
    dtype: str
    shape: tuple[int, ...]


def read_archive(path: Path) -> Any:
    """What torch.save wrote to `path`. Raises StageFailure when it is damaged or asks for more than
    a checkpoint needs."""
    return load_pickle(
        path, known=[(TensorReference, "torch_xla.utils.serialization.TensorReference")]
    )


def damage(path: Path) -> str:
    """Why the file, all of which is read, does not match the checksums in it; empty where it
    does."""
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except Exception as error:  # from damaged bytes, zipfile raises anything
        return f"{path} is damaged: {error}."
    return f"{path} is damaged: the checksum of {record} does not match." if record else ""


class RowReader:
    """Reads rows of stored tensors, and counts the bytes."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self._open: dict[Path, Any] = {}
        self._mapped = 0

    def rows(self, stored: StoredTensor, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (of the first dimension) of a tensor that has one at least."""
        if self._mapped > MAPPED_BYTES:
            self._open.clear()
            self._mapped = 0
        if stored.file not in self._open:
            self._open[stored.file] = read_archive(stored.file)
        content = self._open[stored.file]
        rows: torch.Tensor = (
            (content if stored.name is None else content[stored.name])[first:last].detach().clone()
        )
        if len(rows) != last - first:
            raise StageFailure(f"{stored.file} changed while it was read.")
        self._mapped += rows.nbytes
        self.bytes_read += rows.nbytes
        return rows
