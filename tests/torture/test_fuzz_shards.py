"""Shards and weights with any bytes changed, and pickles made to do harm: refused, or read as they were written. Nothing in them runs."""

from __future__ import annotations

import collections
import io
import itertools
import json
import os
import pickle
import resource
import shutil
import struct
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch.distributed.checkpoint import filesystem, metadata

from stages.backends.neuron import archive
from stages.backends.neuron.archive import RowReader, StoredTensor, read_archive
from stages.backends.torch.consolidate import consolidate
from stages.backends.torch.metadata import METADATA_FILE, read_metadata
from stages.model.headers import read_headers
from stages.model.weights import INDEX_FILE, SINGLE_FILE
from stages.run.errors import StageFailure
from tests.saved_weights import assert_equal, written

pytestmark = [pytest.mark.torture("fuzz"), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

STATE = {
    "first": torch.arange(12.0).reshape(3, 4),
    "last": torch.arange(12.0, 24.0).reshape(3, 4),
    "half": torch.arange(6).bfloat16(),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
}
SHARD = "__0_0.distcp"
MEGABYTES_FOR_DAMAGE = 128
# A place, the byte put there, and how many of the bytes behind are kept (None: all).
CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "shards"
    dcp.save({"model": STATE, "optimizer": {"lr": 0.1}}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def shards(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage; what a pickle runs would leave a file in the working folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return shutil.copytree(checkpoint, tmp_path / "shards")


def changed(data: bytes, changes: list[tuple[float, int]], kept: float = 1) -> bytes:
    found = bytearray(data)
    for place, byte in changes:
        found[int(place * len(found))] = byte
    return bytes(found[: round(kept * len(found))])


def outcome(shards: Path) -> dict[str, torch.Tensor] | None:
    """The weights that are made of the shards; None where they are refused. Any other error is the test's failure."""
    output = shards.parent / "model"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    try:
        consolidate(shards, output, dtype=None, max_shard_size=10**9)
    except StageFailure:
        assert not list(output.iterdir())
        return None
    finally:
        assert not list(Path().iterdir())
    return written(output)


@same_folder
@given(changes=CHANGES, kept=st.sampled_from([1, 1, 1, 0.999, 0.5, 0]))
@example(changes=[(0.8146039820401624, 0)], kept=1)  # in the pickle of a transposed tensor
def test_any_changed_bytes_of_a_shard_are_harmless_or_refused(checkpoint: Path, shards: Path, changes: list, kept: float) -> None:
    (shards / SHARD).write_bytes(changed((checkpoint / SHARD).read_bytes(), changes, kept))
    found = outcome(shards)
    if found is not None:
        assert_equal(found, STATE)


@same_folder
@given(changes=CHANGES, kept=st.sampled_from([1, 1, 1, 0.9, 0]))
def test_any_changed_bytes_of_the_metadata_are_read_or_refused(checkpoint: Path, shards: Path, changes: list, kept: float) -> None:
    """Which shard belongs to which tensor has no checksum of its own: that it is as train wrote it, the stage sees by its digest."""
    (shards / METADATA_FILE).write_bytes(changed((checkpoint / METADATA_FILE).read_bytes(), changes, kept))
    outcome(shards)


# The instructions of a pickle that do more than to put down a value, and globals that a reader may and may not give.
GLOBALS = (
    *("os system", "posix system", "builtins eval", "builtins exec", "builtins getattr", "builtins __import__", "operator attrgetter"),
    *("torch Size", "torch float32", "torch load", "torch FloatStorage", "collections OrderedDict", "pathlib PosixPath"),
    *("torch._utils _rebuild_tensor_v2", "torch._tensor _rebuild_from_type_v2", "torch._utils _rebuild_parameter", "torch Tensor"),
    *("torch_xla.utils.serialization TensorReference", "torch.serialization _get_layout"),
    *(
        f"torch.distributed.checkpoint.metadata {name}"
        for name in ("Metadata", "MetadataIndex", "TensorProperties", "_MEM_FORMAT_ENCODING")
    ),
    "torch.distributed.checkpoint.filesystem _StorageInfo",
)
TEXTS = ("touch ran", "open('ran','w')", "__class__", "__reduce__", "__hash__", "__setstate__", "tid", "items", "append", "0", "storage")
VALUES = st.one_of(
    st.sampled_from(TEXTS).map(lambda text: pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()),
    st.integers(0, 255).map(lambda number: pickle.BININT1 + bytes([number])),
    st.sampled_from([pickle.NONE, pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.NEWTRUE, pickle.MARK]),
)
NAMES = st.sampled_from(GLOBALS).map(lambda name: b"c" + name.replace(" ", "\n").encode() + b"\n")
DEEDS = st.sampled_from(
    [
        *(pickle.REDUCE, pickle.BUILD, pickle.NEWOBJ, pickle.OBJ, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE, pickle.DICT),
        *(pickle.SETITEM, pickle.SETITEMS, pickle.APPEND, pickle.APPENDS, pickle.DUP, pickle.POP, pickle.BINPERSID, pickle.STACK_GLOBAL),
        *(pickle.MEMOIZE, pickle.BINGET + b"\0", pickle.BINGET + b"\1", pickle.FROZENSET, pickle.ADDITEMS, pickle.NEWOBJ_EX),
        *(pickle.LONG_BINPUT + b"\xff\xff\xff\x7f", pickle.BYTEARRAY8 + b"\xff" * 7 + b"\0", pickle.EXT1 + b"\1"),
    ]
)
PROGRAMS = st.lists(st.one_of(VALUES, NAMES, DEEDS, DEEDS), max_size=40).map(lambda parts: b"\x80\x04" + b"".join(parts) + b".")
CLASSES = (
    *(metadata.Metadata, metadata.MetadataIndex, metadata.TensorProperties, metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo),
    *(PosixPath, collections.OrderedDict, archive.TensorReference, StoredTensor, torch.Size, torch.Tensor),
)


def as_they_are() -> list[Any]:
    """What a pickle could change behind everybody's back: the attributes of classes, and the defaults of functions."""
    functions = [value for value in archive._NAMES.values() if isinstance(value, types.FunctionType)]
    return [*(dict(vars(each)) for each in CLASSES), *((each.__defaults__, each.__kwdefaults__, dict(vars(each))) for each in functions)]


@same_folder
@given(program=PROGRAMS)
def test_no_program_in_a_pickle_runs_or_changes_a_class_or_takes_the_memory(tmp_path: Path, monkeypatch, program: bytes) -> None:
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


def most_memory() -> float:
    """The most that this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


class Pickled:
    """Pickled as the call of a function."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


NEEDLESSLY_TRUSTED: dict[str, Any] = {
    "a command": Pickled(os.system, "touch ran"),
    "an expression": Pickled(eval, "open('ran', 'w')"),
    "an attribute": Pickled(getattr, "text", "__class__"),
    "an attribute of an allowed class": Pickled(getattr, torch.Size, "__mro__"),
    "a call in a call": Pickled(Pickled, Pickled(os.system, "touch ran")),
    "a module": Pickled(__import__, "antigravity"),
    "a file": Pickled(open, "ran", "w"),
}


@pytest.mark.parametrize("value", NEEDLESSLY_TRUSTED.values(), ids=NEEDLESSLY_TRUSTED)
@pytest.mark.parametrize("place", ["the metadata", "a shard"])
def test_a_pickle_that_asks_for_more_is_refused(shards: Path, place: str, value: Any) -> None:
    if place == "the metadata":
        (shards / METADATA_FILE).write_bytes(pickle.dumps(value))
    else:
        stored = io.BytesIO()
        torch.save(value, stored)
        at = placed(shards, "first")
        (shards / SHARD).write_bytes(stored.getvalue() + bytes(at.length))
        change(shards, "first", offset=0, length=len(stored.getvalue()))
    assert outcome(shards) is None


def opened(shards: Path) -> metadata.Metadata:
    return pickle.loads((shards / METADATA_FILE).read_bytes())


def placed(shards: Path, name: str) -> filesystem._StorageInfo:
    return next(place for index, place in opened(shards).storage_data.items() if index.fqn == f"model.{name}")


def change(shards: Path, name: str, **changes: Any) -> None:
    """Change where the metadata says that a tensor lies, or its shape."""
    found = opened(shards)
    place = next(place for index, place in found.storage_data.items() if index.fqn == f"model.{name}")
    tensor = found.state_dict_metadata[f"model.{name}"]
    for key, value in changes.items():
        if key == "shape":
            tensor.size = value
            tensor.chunks[0] = metadata.ChunkStorageMetadata(torch.Size([0] * len(value)), value)
            found.storage_data = {
                metadata.MetadataIndex(index.fqn, torch.Size([0] * len(value))) if index.fqn == f"model.{name}" else index: each
                for index, each in found.storage_data.items()
            }
        elif key == "chunks":
            tensor.chunks = value
        else:
            setattr(place, key, value)
    (shards / METADATA_FILE).write_bytes(pickle.dumps(found))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "folder/shard", "", ".", "..", "link", "pipe", "folder", 7, "no\0name"])
def test_metadata_names_no_file_but_the_checkpoints_own(shards: Path, name: Any) -> None:
    shutil.copy(shards / SHARD, shards.parent / "outside")
    (shards / "folder").mkdir()
    shutil.copy(shards / SHARD, shards / "folder" / "shard")
    (shards / "link").symlink_to("../outside")
    os.mkfifo(shards / "pipe")
    change(shards, "first", relative_path=name)
    assert outcome(shards) is None


WRONG_NUMBERS: dict[str, dict[str, Any]] = {
    "a terabyte": {"shape": torch.Size([2**40])},
    "more than there are numbers for": {"shape": torch.Size([2**40, 2**40])},
    "one wide row": {"shape": torch.Size([1, 2**40])},
    "nothing, but wide": {"shape": torch.Size([0, 2**62])},
    "a terabyte at a terabyte": {"shape": torch.Size([2**38]), "length": 2**40},
    "a size below zero": {"shape": (-3, -4)},
    "a size with a point": {"shape": (3.0, 4.0)},
    "a size in words": {"shape": "ab"},
    "a place below zero": {"offset": -1},
    "a place far away": {"offset": 2**70},
    "a place with a point": {"offset": 0.5},
    "no length": {"length": 0},
    "a length far too large": {"length": 2**70},
    "a length in words": {"length": "all"},
    "too many shards": {"chunks": [metadata.ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([3, 4]))] * 100_000},
}


@pytest.mark.parametrize("changes", WRONG_NUMBERS.values(), ids=WRONG_NUMBERS)
def test_numbers_that_no_checkpoint_has_are_refused_and_take_no_memory(shards: Path, changes: dict[str, Any]) -> None:
    memory = most_memory()
    change(shards, "first", **changes)
    assert outcome(shards) in (None, {}) or changes["shape"][0] == 0
    assert most_memory() - memory < MEGABYTES_FOR_DAMAGE


def rewritten(data: bytes, change: Callable[[zipfile.ZipInfo, bytes], tuple[zipfile.ZipInfo, bytes]], times: int = 1) -> bytes:
    """An archive whose records went through `change`, each written `times` times."""
    found = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(found, "w") as new:
        for info in old.infolist():
            changed_info, content = change(info, old.read(info))
            for _ in range(times):
                new.writestr(changed_info, content, compress_type=changed_info.compress_type)
    return found.getvalue()


def compressed(record: str) -> Callable[[bytes], bytes]:
    def change(info: zipfile.ZipInfo, content: bytes) -> tuple[zipfile.ZipInfo, bytes]:
        info.compress_type = zipfile.ZIP_DEFLATED if info.filename.endswith(record) else zipfile.ZIP_STORED
        return info, content

    return lambda data: rewritten(data, change)


def bomb(record: str) -> Callable[[bytes], bytes]:
    """256 MB of zeros behind a record's content, compressed to a quarter of a megabyte."""

    def change(info: zipfile.ZipInfo, content: bytes) -> tuple[zipfile.ZipInfo, bytes]:
        if not info.filename.endswith(record):
            return info, content
        info.compress_type = zipfile.ZIP_DEFLATED
        return info, content + bytes(1 << 28)

    return lambda data: rewritten(data, change)


def sizes_that_lie(size: int) -> Callable[[bytes], bytes]:
    """The directory at the end says that every record has this many bytes."""

    def change(data: bytes) -> bytes:
        found = bytearray(data)
        at = found.find(b"PK\1\2")
        while at >= 0:
            found[at + 20 : at + 28] = struct.pack("<II", size, size)
            at = found.find(b"PK\1\2", at + 4)
        return bytes(found)

    return change


ARCHIVES: dict[str, Callable[[bytes], bytes]] = {
    "a compressed tensor": compressed("data/0"),
    "a compressed pickle": compressed("data.pkl"),
    "a pickle that swells": bomb("data.pkl"),
    "a tensor that swells": bomb("data/0"),
    "records twice": lambda data: rewritten(data, lambda info, content: (info, content), times=2),
    "no records": lambda data: b"PK\5\6" + bytes(18),
    "sizes of nothing": sizes_that_lie(0),
    "sizes of gigabytes": sizes_that_lie(2**32 - 2),
    "sizes of one byte": sizes_that_lie(1),
    "nothing": lambda data: b"",
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("change_archive", ARCHIVES.values(), ids=ARCHIVES)
def test_archives_that_lie_are_refused_and_take_no_memory(shards: Path, change_archive: Callable[[bytes], bytes]) -> None:
    place = placed(shards, "first")
    stored = change_archive((shards / SHARD).read_bytes()[place.offset : place.offset + place.length])
    memory = most_memory()
    (shards.parent / "shard.pt").write_bytes(stored)
    with pytest.raises(StageFailure):
        read_archive(shards.parent / "shard.pt")
    (shards / SHARD).write_bytes((shards / SHARD).read_bytes() + stored)
    change(shards, "first", offset=(shards / SHARD).stat().st_size - len(stored), length=len(stored))
    assert outcome(shards) is None
    assert most_memory() - memory < MEGABYTES_FOR_DAMAGE


@same_folder
@given(program=st.data())
def test_a_tensor_in_an_archive_never_reaches_beyond_its_memory(tmp_path: Path, program: st.DataObject) -> None:
    """A pickle that describes eight numbers by any shape, strides and offset."""
    numbers = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**62, 2**64, 8.0, True, None, "8"]))
    shape, strides = (tuple(program.draw(st.lists(numbers, max_size=3))) for _ in range(2))
    strides = program.draw(st.one_of(st.just(strides), st.just(tuple(itertools.accumulate([1, *shape[:0:-1]], lambda a, b: a)))))
    offset = program.draw(numbers)
    torch.save(torch.arange(8.0), tmp_path / "whole.pt")

    class Rebuilt:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (torch.arange(8.0).storage(), offset, shape, strides, False, collections.OrderedDict())

    torch.save(Rebuilt(), tmp_path / "crafted.pt")
    try:
        stored = read_archive(tmp_path / "crafted.pt")
        rows = RowReader().rows(stored, 0, stored.shape[0]) if stored.shape else None
    except StageFailure:
        return
    if rows is not None:
        assert torch.equal(rows.flatten(), torch.arange(8.0)[offset : offset + rows.numel()])


WEIGHTS = save({"first": STATE["first"], "half": STATE["half"], "last": STATE["last"]}, metadata={"format": "pt"})
NUMBERS = st.one_of(st.integers(-2, 200), st.sampled_from([2**31, 2**63, 2**64, -(2**63), 1.5, None, "1", True]))
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F64", "BF16", "I8", "BOOL", "F8_E4M3", "f32", "", 7, None]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, max_size=3),
        "more": NUMBERS,
    },
)


def headers_of(folder: Path, weights: bytes) -> Iterator[tuple[str, torch.Tensor]]:
    """What the headers of the weights give, once read by safetensors itself; nothing where there are problems."""
    (folder / SINGLE_FILE).write_bytes(weights)
    found = read_headers(folder)
    if found.problems:
        return
    with safe_open(folder / SINGLE_FILE, framework="pt") as file:
        for name, spec in found.tensors.items():
            tensor = file.get_tensor(name)
            assert (tuple(tensor.shape), str(tensor.dtype)) == (spec.shape, f"torch.{spec.dtype}")
            assert spec.nbytes <= len(weights)
            yield name, tensor


@same_folder
@given(changes=CHANGES, kept=st.sampled_from([1, 1, 0.99, 0.5, 0.01]))
def test_any_changed_bytes_of_safetensors_are_problems_or_tensors_that_are_there(tmp_path: Path, changes: list, kept: float) -> None:
    list(headers_of(tmp_path, changed(WEIGHTS, changes, kept)))


@same_folder
@given(header=st.dictionaries(st.sampled_from(["first", "last", "__metadata__", "", "\0"]), ENTRIES, max_size=3), data=st.integers(0, 64))
def test_any_header_of_safetensors_is_a_problem_or_tensors_that_are_there(tmp_path: Path, header: dict, data: int) -> None:
    text = json.dumps(header).encode()
    list(headers_of(tmp_path, struct.pack("<Q", len(text)) + text + bytes(data)))


JSON = st.recursive(NUMBERS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)))


@same_folder
@given(
    index=st.one_of(JSON, st.fixed_dictionaries({"weight_map": st.one_of(JSON, st.dictionaries(st.text(max_size=3), JSON, max_size=3))}))
)
def test_any_index_that_does_not_fit_the_files_is_a_problem(tmp_path: Path, index: Any) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(WEIGHTS)
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    assert read_headers(tmp_path).problems
