"""A file that is read in any order has the bytes and the digest that it has on the disk."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.backends import hashed_file
from stages.backends.hashed_file import HashedFile
from stages.run.errors import StageFailure


@settings(deadline=None)
@given(
    st.binary(max_size=40),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))),
    st.integers(1, 9),
)
def test_what_is_read_in_any_order_and_the_digest_are_those_of_the_file(content, places, block):
    with tempfile.NamedTemporaryFile() as written, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashed_file, "BLOCK_BYTES", block)
        path = Path(written.name)
        path.write_bytes(content)
        file = HashedFile(path)
        for start, size in places:
            if start + size <= len(content):
                assert file.read(size, start) == content[start : start + size]
            elif size:
                with pytest.raises(StageFailure, match="is cut short"):
                    file.read(size, start)
        assert file.sha256() == hashlib.sha256(content).hexdigest()


def bytes_read_by_this_process() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_each_byte_is_read_once_where_parts_are_wanted_in_order(tmp_path):
    path = tmp_path / "shard"
    path.write_bytes(bytes(10**6))
    file, before = HashedFile(path), bytes_read_by_this_process()
    for start in range(0, 900_000, 1000):
        file.read(500, start)
    file.sha256()
    assert 10**6 <= bytes_read_by_this_process() - before < 1.1 * 10**6
