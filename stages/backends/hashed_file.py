"""A shard that is read where its parts are wanted and hashed on the way, each byte once.

SHA-256 takes a file's bytes in their order. Consolidation wants them nearly so: the header first,
then tensor by tensor. What is skipped is hashed when something beyond it is read, and the rest at
the end; only what is wanted out of order is read twice. No file stays open between two reads: a
model on many ranks has more shards than a process may open.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from stages.run.errors import StageFailure

BLOCK_BYTES = 1 << 20


class HashedFile:
    """The file at `path`. Not for several threads at once."""

    def __init__(self, path: Path):
        self.path = path
        self._digest = hashlib.sha256()
        self._hashed = 0  # bytes, from the start of the file

    def read_into(self, data: memoryview, start: int) -> None:
        """Fill `data` with the bytes from `start` on. Raises StageFailure where the file ends
        before."""
        with self.path.open("rb", buffering=0) as file:
            self._hash_until(start)
            file.seek(start)
            filled = 0
            while filled < len(data):
                count = file.readinto(data[filled:])
                if not count:
                    raise StageFailure(f"{self.path} is cut short.")
                filled += count
        end = start + len(data)
        if end > self._hashed:
            self._digest.update(data[self._hashed - start :])
            self._hashed = end

    def read(self, size: int, start: int) -> bytes:
        """`size` bytes from `start` on."""
        data = bytearray(size)
        self.read_into(memoryview(data), start)
        return bytes(data)

    def sha256(self) -> str:
        """The digest of the whole file in hexadecimal; reads what was not read yet."""
        self._hash_until(None)
        return self._digest.hexdigest()

    def _hash_until(self, end: int | None) -> None:
        if end is not None and end <= self._hashed:
            return
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._hashed)
            while end is None or self._hashed < end:
                left = BLOCK_BYTES if end is None else min(BLOCK_BYTES, end - self._hashed)
                if not (block := file.read(left)):
                    return  # `read_into` says that the file ends
                self._digest.update(block)
                self._hashed += len(block)
