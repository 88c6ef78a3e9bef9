"""Shards with any bytes changed, and any pickles in their place: refused, or read as they were written. Nothing in them runs."""

from __future__ import annotations

import collections
import itertools
import pickle
import types
import zipfile
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from stages.backends.neuron.shards.read.read.torch_archive import (
    RowReader,
    StoredTensor,
    read_archive,
)
from torch.distributed.checkpoint import filesystem, metadata

from stages.backends.neuron.shards.read import torch_archive
from stages.backends.torch.metadata import METADATA_FILE, read_metadata
from stages.run.errors import StageFailure
from tests.pickled import Call
from tests.saved_weights import assert_equal
from tests.torture.shard_damage import (
    CHANGES,
    MEGABYTES_FOR_DAMAGE,
    SHARD,
    STATE,
    changed,
    most_memory,
    outcome,
    same_folder,
)

pytestmark = [
    pytest.mark.torture("fuzz"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


@same_folder
@given(changes=CHANGES, kept=st.sampled_from([1, 1, 1, 0.999, 0.5, 0]))
@example(changes=[(0.8146039820401624, 0)], kept=1)  # in the pickle of a transposed tensor
def test_any_changed_bytes_of_a_shard_are_harmless_or_refused(
    checkpoint: Path, shards: Path, changes: list, kept: float
) -> None:
    (shards / SHARD).write_bytes(changed((checkpoint / SHARD).read_bytes(), changes, kept))
    found = outcome(shards)
    if found is not None:
        assert_equal(found, STATE)


@same_folder
@given(changes=CHANGES, kept=st.sampled_from([1, 1, 1, 0.9, 0]))
def test_any_changed_bytes_of_the_metadata_are_read_or_refused(
    checkpoint: Path, shards: Path, changes: list, kept: float
) -> None:
    """Which shard belongs to which tensor has no checksum of its own: that it is as train wrote it, the stage sees by its digest."""
    (shards / METADATA_FILE).write_bytes(
        changed((checkpoint / METADATA_FILE).read_bytes(), changes, kept)
    )
    outcome(shards)


# The instructions of a pickle that do more than to put down a value, and globals that a reader may and may not give.
GLOBALS = (
    *(
        "os system",
        "posix system",
        "builtins eval",
        "builtins exec",
        "builtins getattr",
        "builtins __import__",
        "operator attrgetter",
    ),
    *(
        "torch Size",
        "torch float32",
        "torch load",
        "torch FloatStorage",
        "collections OrderedDict",
        "pathlib PosixPath",
    ),
    *(
        "torch._utils _rebuild_tensor_v2",
        "torch._tensor _rebuild_from_type_v2",
        "torch._utils _rebuild_parameter",
        "torch Tensor",
    ),
    *("torch_xla.utils.serialization TensorReference", "torch.serialization _get_layout"),
    *(
        f"torch.distributed.checkpoint.metadata {name}"
        for name in ("Metadata", "MetadataIndex", "TensorProperties", "_MEM_FORMAT_ENCODING")
    ),
    "torch.distributed.checkpoint.filesystem _StorageInfo",
)
TEXTS = (
    "touch ran",
    "open('ran','w')",
    "__class__",
    "__reduce__",
    "__hash__",
    "__setstate__",
    "tid",
    "items",
    "append",
    "0",
    "storage",
)
VALUES = st.one_of(
    st.sampled_from(TEXTS).map(
        lambda text: pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()
    ),
    st.integers(0, 255).map(lambda number: pickle.BININT1 + bytes([number])),
    st.sampled_from(
        [
            pickle.NONE,
            pickle.EMPTY_DICT,
            pickle.EMPTY_LIST,
            pickle.EMPTY_TUPLE,
            pickle.NEWTRUE,
            pickle.MARK,
        ]
    ),
)
NAMES = st.sampled_from(GLOBALS).map(lambda name: b"c" + name.replace(" ", "\n").encode() + b"\n")
DEEDS = st.sampled_from(
    [
        *(
            pickle.REDUCE,
            pickle.BUILD,
            pickle.NEWOBJ,
            pickle.OBJ,
            pickle.TUPLE1,
            pickle.TUPLE2,
            pickle.TUPLE3,
            pickle.TUPLE,
            pickle.DICT,
        ),
        *(
            pickle.SETITEM,
            pickle.SETITEMS,
            pickle.APPEND,
            pickle.APPENDS,
            pickle.DUP,
            pickle.POP,
            pickle.BINPERSID,
            pickle.STACK_GLOBAL,
        ),
        *(
            pickle.MEMOIZE,
            pickle.BINGET + b"\0",
            pickle.BINGET + b"\1",
            pickle.FROZENSET,
            pickle.ADDITEMS,
            pickle.NEWOBJ_EX,
        ),
        *(
            pickle.LONG_BINPUT + b"\xff\xff\xff\x7f",
            pickle.BYTEARRAY8 + b"\xff" * 7 + b"\0",
            pickle.EXT1 + b"\1",
        ),
    ]
)
PROGRAMS = st.lists(st.one_of(VALUES, NAMES, DEEDS, DEEDS), max_size=40).map(
    lambda parts: b"\x80\x04" + b"".join(parts) + b"."
)
CLASSES = (
    *(
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.TensorProperties,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
    ),
    *(
        PosixPath,
        collections.OrderedDict,
        torch_archive.TensorReference,
        StoredTensor,
        torch.Size,
        torch.Tensor,
    ),
)


def as_they_are() -> list[Any]:
    """What a pickle could change behind everybody's back: the attributes of classes, and the defaults of functions."""
    functions = [
        value for value in torch_archive._NAMES.values() if isinstance(value, types.FunctionType)
    ]
    return [
        *(dict(vars(each)) for each in CLASSES),
        *((each.__defaults__, each.__kwdefaults__, dict(vars(each))) for each in functions),
    ]


@same_folder
@given(program=PROGRAMS)
def test_no_program_in_a_pickle_runs_or_changes_a_class_or_takes_the_memory(
    tmp_path: Path, monkeypatch, program: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    before, memory = as_they_are(), most_memory()
    (tmp_path / METADATA_FILE).write_bytes(program)
    with zipfile.ZipFile(tmp_path / "shard.pt", "w") as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/data/0", bytes(4))
    for read, name in ((read_metadata, METADATA_FILE), (read_archive, "shard.pt")):
        try:
            read(tmp_path / name)
        except StageFailure:
            pass
        except Exception:
            assert read is read_metadata  # whose caller makes a StageFailure of all
    assert sorted(path.name for path in tmp_path.iterdir()) == [METADATA_FILE, "shard.pt"]
    assert as_they_are() == before
    assert most_memory() - memory < MEGABYTES_FOR_DAMAGE


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@same_folder
@given(program=st.data())
def test_a_tensor_in_an_archive_never_reaches_beyond_its_memory(
    tmp_path: Path, program: st.DataObject
) -> None:
    """A pickle that describes eight numbers by any shape, strides and offset."""
    numbers = st.one_of(
        st.integers(-2, 9), st.sampled_from([2**31, 2**62, 2**64, 8.0, True, None, "8"])
    )
    shape, strides = (tuple(program.draw(st.lists(numbers, max_size=3))) for _ in range(2))
    strides = program.draw(
        st.one_of(
            st.just(strides),
            st.just(tuple(itertools.accumulate([1, *shape[:0:-1]], lambda a, b: a))),
        )
    )
    offset = program.draw(numbers)
    arguments = (
        torch.arange(8.0).storage(),
        offset,
        shape,
        strides,
        False,
        collections.OrderedDict(),
    )
    torch.save(Call(torch._utils._rebuild_tensor_v2, *arguments), tmp_path / "crafted.pt")
    try:
        stored = read_archive(tmp_path / "crafted.pt")
        rows = RowReader().rows(stored, 0, stored.shape[0]) if stored.shape else None
    except StageFailure:
        return
    if rows is not None:
        assert torch.equal(rows.flatten(), torch.arange(8.0)[offset : offset + rows.numel()])
