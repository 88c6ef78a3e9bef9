"""Push the packed sequences that the data stage published to S3 or to the Hugging Face Hub.

In S3 they are a folder that `datasets.load_from_disk` reads, on the Hub a private dataset that
`load_dataset` reads. The libraries find the credentials.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from stages.model.hub import from_hub
from stages.model.hub_write import PUBLIC, visibility
from stages.run.errors import InputError, StageFailure
from stages.run.lock import locked
from stages.run.progress import Progress
from stages.run.push_target import note_pushed, reason_to_push
from stages.text.remote_sources import s3_files, s3_remedy

SPLITS = ("train", "validation")
_CHUNK = 8 * 2**20


def push(target: str, data: Path) -> None:
    """Push what the folder `data` holds to `target` (s3://BUCKET/PREFIX or OWNER/NAME), unless it
    was pushed there last.

    Raises StageFailure with the remedy; `data` stays published.
    """
    with locked(data.parent, "data"):
        if not (reason := reason_to_push(target, data)):
            return
        print(f"data: {reason}", flush=True)
        splits = [split for split in SPLITS if (data / split).is_dir()]
        try:
            (_push_to_s3 if target.startswith("s3://") else _push_to_hub)(target, data, splits)
        except InputError as error:
            raise StageFailure(
                f"{error} The sequences stay published in {data}; `make data` pushes them again, "
                "without tokenising."
            ) from error
        note_pushed(target, data)
        print(f"data: pushed {', '.join(splits)} to {target}", flush=True)


def _push_to_s3(target: str, data: Path, splits: list[str]) -> None:
    """dataset_dict.json names no split until all are there: what was cut off is an empty dataset,
    not a mixture of two."""
    path = target.removeprefix("s3://").rstrip("/")
    names = [
        file.relative_to(data).as_posix()
        for split in splits
        for file in sorted((data / split).rglob("*"))
        if file.is_file()
    ]
    described = json.dumps({"splits": splits}).encode()
    total = sum((data / name).stat().st_size for name in names)
    try:
        files = s3_files(path.split("/")[0])
        with Progress(f"pushing to {target}", total, "bytes") as progress:
            _write(files, f"{path}/dataset_dict.json", io.BytesIO(b'{"splits": []}'))
            for name in names:
                with (data / name).open("rb") as file:
                    _write(files, f"{path}/{name}", file, progress)
            _write(files, f"{path}/dataset_dict.json", io.BytesIO(described))
    except OSError as error:
        remedy = s3_remedy(str(error), writing=True)
        raise InputError(f"PUSH_DATASET={target} cannot be written ({error}). {remedy}") from None


def _write(files: Any, key: str, source: BinaryIO, progress: Progress | None = None) -> None:
    with files.open_output_stream(key, compression=None) as stream:
        for chunk in _chunks(source):
            stream.write(chunk)
            if progress:
                progress.update(len(chunk))


def _chunks(source: BinaryIO) -> Iterator[bytes]:
    while chunk := source.read(_CHUNK):
        yield chunk


def _push_to_hub(target: str, data: Path, splits: list[str]) -> None:
    """As Parquet. A dataset that everyone may read is refused: the sequences are the user's
    texts."""
    from datasets import Dataset, DatasetDict
    from datasets.utils import logging

    sequences = DatasetDict({split: Dataset.load_from_disk(str(data / split)) for split in splits})
    logging.set_verbosity_error()  # it warns that it uses one process

    if visibility("push", target) == PUBLIC:
        raise InputError(
            f"PUSH_DATASET={target} is public on the Hub, and sequences hold the texts that they "
            "were made from. Make it private, or name another."
        )
    from_hub("push", target, "", lambda: sequences.push_to_hub(target, private=True))
