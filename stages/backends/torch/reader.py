"""How a checkpoint is read to resume from. DCP itself opens its metadata, and what in it is no tensor, as pickles that may run code."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from stages.backends.torch.metadata import METADATA_FILE, file_in, read_metadata
from stages.run.errors import StageFailure


def load_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Fill `state` from the DCP folder; StageFailure for what cannot be read or asks for more than tensors and plain values."""
    try:
        dcp.load(state, storage_reader=CheckpointReader(folder), planner=WeightsOnlyPlanner())
    except dcp.CheckpointException as error:  # no Exception: nothing above would catch it
        reasons = sorted(
            {str(failure).partition("\n")[0] for failure, _ in error.failures.values()}
        )
        raise StageFailure(
            f"{folder} cannot be resumed from: {'; '.join(reasons)}. Remove it and give the same command again."
        ) from error


class CheckpointReader(FileSystemReader):
    """Reads a DCP folder by metadata that can build DCP's own classes alone, and name the folder's own files alone."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        folder = Path(self.path)
        metadata = read_metadata(folder / METADATA_FILE)
        for place in metadata.storage_data.values():
            file_in(folder, place.relative_path)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class WeightsOnlyPlanner(DefaultLoadPlanner):
    """Takes numbers and plain containers beside the tensors, nothing else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        again = (
            io.BytesIO()
        )  # DCP opens it without weights_only: it is given what is left when that is over
        torch.save(torch.load(value, weights_only=True), again)
        again.seek(0)
        super().load_bytes(read_item, again)
