"""Save packed sequences as a folder that `datasets.load_from_disk` reads.

The folder is written with pyarrow and two small JSON files: `datasets` would add a second of
import, a random fingerprint and 64-bit labels. The same sequences give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa

from stages.run.layout import IGNORED_LABEL, SEQUENCE_COLUMNS
from stages.text.accounting import SplitAccount
from stages.text.documents import ANSWER, Documents
from stages.text.packing import Packing

_DATA_FILE = "data-00000-of-00001.arrow"
_BATCH_TOKENS = 2**19  # tokens of a column that are written at once


def save_sequences(
    folder: Path,
    split: str,
    packing: Packing,
    documents: Documents,
    chosen: np.ndarray,
    max_length: int,
    pad: int,
    loss_on: str,
) -> SplitAccount:
    """Write the sequences of `packing`, whose document d is `chosen[d]` of `documents`, and count
    what was written.

    Columns, each a fixed-size list of int32 [max_length]: `input_ids`, filled up with `pad`;
    `labels`, IGNORED_LABEL on padding and, for the loss on the response, on all but answers;
    `position_ids`, from 0 for each segment and for the padding, so that zeros mark the borders.
    """
    folder.mkdir(parents=True)
    column = pa.list_(pa.int32(), max_length)
    schema = pa.schema([(name, column) for name in SEQUENCE_COLUMNS])
    account, content = SplitAccount(rows=len(packing)), blake2b(digest_size=8)
    with (
        pa.OSFile(str(folder / _DATA_FILE), "wb") as file,
        pa.ipc.new_stream(file, schema) as stream,
        ThreadPoolExecutor(1) as pool,
    ):

        def write(cells: np.ndarray) -> None:
            content.update(cells.data)
            lists = [
                pa.FixedSizeListArray.from_arrays(_int32(values), type=column) for values in cells
            ]
            stream.write_batch(pa.record_batch(lists, schema=schema))

        writing: Future[None] | None = None  # the batch before, while the next is filled
        for cells in _filled(packing, documents, chosen, max_length, pad, loss_on, account):
            if writing is not None:
                writing.result()
            writing = pool.submit(write, cells)
        if writing is not None:
            writing.result()
    _describe(folder, split, max_length, content.hexdigest())
    return account


def _int32(values: np.ndarray) -> pa.Array:
    """The values as they are; pa.array would import pandas first."""
    return pa.Array.from_buffers(pa.int32(), values.size, [None, pa.py_buffer(values)])


def bytes_of(packing: Packing, max_length: int) -> int:
    """Bytes that the sequences of `packing` take on the disk."""
    return len(packing) * max_length * 4 * len(SEQUENCE_COLUMNS)


def _filled(
    packing: Packing,
    documents: Documents,
    chosen: np.ndarray,
    max_length: int,
    pad: int,
    loss_on: str,
    account: SplitAccount,
) -> Iterator[np.ndarray]:
    """Batches of sequences, int32 [columns, sequences, max_length]; counts them in `account`."""
    positions = np.arange(max_length, dtype=np.int32)
    batch_size = max(1, _BATCH_TOKENS // max_length)
    for begin in range(0, len(packing), batch_size):
        sequences = list(packing.sequences(begin, min(begin + batch_size, len(packing))))
        cells = np.empty((len(SEQUENCE_COLUMNS), len(sequences), max_length), dtype=np.int32)
        ids, labels, position = cells
        used = np.empty(len(sequences), np.int64)
        for row, (segments, places) in enumerate(zip(sequences, position, strict=True)):
            at = 0
            for document, start, length in segments:
                end = at + length
                documents.read_into(ids[row, at:end], chosen[document], start)
                places[at:end] = positions[:length]
                at = end
            places[at:], used[row] = positions[: max_length - at], at
        padding = positions >= used[:, None]
        # The mark of answers is a bit of the ids.
        unsupervised = padding | (ids < ANSWER) if loss_on == "response" else padding
        ids &= ~ANSWER
        labels[:] = np.where(unsupervised, IGNORED_LABEL, ids)
        ids[padding] = pad
        account.packed += int(used.sum())
        account.padded += int(padding.sum())
        account.supervised += int(np.count_nonzero(cells[1] != IGNORED_LABEL))
        yield cells


def _describe(folder: Path, split: str, max_length: int, fingerprint: str) -> None:
    """Write the two JSON files next to the data. `datasets` names its caches after the fingerprint,
    which is the digest of the content."""
    value = {"dtype": "int32", "_type": "Value"}
    # Every release of datasets reads "Sequence"; since 4.0 it means "List".
    features = {
        name: {"feature": value, "length": max_length, "_type": "Sequence"}
        for name in SEQUENCE_COLUMNS
    }
    state: dict[str, object] = {
        "_data_files": [{"filename": _DATA_FILE}],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    for name, content in (("dataset_info.json", {"features": features}), ("state.json", state)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
