"""The safetensors writer: what is read back equals what was given, and nothing bad is left on the
disk."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from stages.model import weights
from stages.model.weights import INDEX_FILE, SINGLE_FILE, TensorSpec, write_safetensors
from stages.run.errors import StageFailure

MEGABYTE = 10**6


def source(name: str, tensor: torch.Tensor, pieces: int = 1):
    spec = TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    return spec, lambda: tensor.reshape(-1).tensor_split(pieces)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@st.composite
def named_tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(
        st.lists(
            st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
            unique=True,
            max_size=8,
        )
    )
    tensors = {}
    for number, name in enumerate(names):
        shape = draw(st.lists(st.integers(0, 6), max_size=3))
        dtype = getattr(torch, draw(st.sampled_from(sorted(weights.DTYPES))))
        tensors[name] = (
            torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 9
        ).to(dtype)
    return tensors


@settings(deadline=None, max_examples=60)
@given(named_tensors(), st.integers(1, 3000), st.integers(1, 4), st.integers(1, 64))
def test_any_tensors_are_read_back_equal_and_a_file_is_too_large_only_for_a_single_tensor(
    tensors, max_shard_size, pieces, piece_bytes
):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "PIECE_BYTES", piece_bytes)
        folder = Path(name)
        digests = write_safetensors(
            [source(*item, pieces) for item in tensors.items()],
            folder,
            max_shard_size=max_shard_size,
        )
        seen = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                assert file.metadata() == {"format": "pt"}
                held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            assert path.stat().st_size <= max_shard_size or len(held) <= 1
            seen |= held
        assert {key: (t.shape, t.dtype, bits(t)) for key, t in seen.items()} == {
            key: (t.shape, t.dtype, bits(t)) for key, t in tensors.items()
        }
        assert digests == {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
        }


def test_one_file_has_no_index(tmp_path):
    write_safetensors([source("a", torch.ones(3))], tmp_path, max_shard_size=MEGABYTE)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE_FILE]


def test_the_index_names_the_file_of_every_tensor_and_the_total_size(tmp_path):
    tensors = {f"layer.{number}": torch.full((100,), float(number)) for number in range(3)}
    write_safetensors([source(*item) for item in tensors.items()], tmp_path, max_shard_size=1100)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 1200
    assert sorted(set(index["weight_map"].values())) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_every_tensor_starts_at_a_multiple_of_its_elements_size(tmp_path):
    given_order = {
        "flag": torch.ones(3, dtype=torch.bool),
        "half": torch.ones(5).half(),
        "wide": torch.ones(2).double(),
    }
    write_safetensors(
        [source(*item) for item in given_order.items()], tmp_path, max_shard_size=MEGABYTE
    )
    data = (tmp_path / SINGLE_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 8 == 0
    for name, tensor in given_order.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_floating_tensors_are_cast_and_others_are_not(tmp_path):
    exact = torch.randn(1000)
    write_safetensors(
        [source("w", exact, 3), source("ids", torch.arange(4))],
        tmp_path,
        max_shard_size=MEGABYTE,
        dtype="bfloat16",
    )
    found = read_back(tmp_path)
    assert torch.equal(found["w"], exact.bfloat16())
    assert found["ids"].dtype == torch.int64


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_values_that_are_not_finite_are_counted_and_nothing_is_left(
    tmp_path, monkeypatch, bad, dtype
):
    monkeypatch.setattr(weights, "PIECE_BYTES", 64)
    tensor = torch.ones(10, 10)
    tensor[0, 3] = tensor[9, 9] = bad
    good = [source(f"good.{number}", torch.ones(100)) for number in range(3)]
    with pytest.raises(StageFailure, match=r"layers\.1: 2 of 100 values are not finite"):
        write_safetensors(
            [*good, source("layers.1", tensor)], tmp_path, max_shard_size=1000, dtype=dtype
        )
    assert not list(tmp_path.iterdir())


def test_a_value_that_the_target_dtype_cannot_hold_is_refused(tmp_path):
    with pytest.raises(
        StageFailure, match=r"w: 1 of 2 values are beyond 6.55e\+04, the largest number in float16"
    ):
        write_safetensors(
            [source("w", torch.tensor([1.0, 1e6]))],
            tmp_path,
            max_shard_size=MEGABYTE,
            dtype="float16",
        )


def test_a_reader_that_yields_too_few_values_is_refused(tmp_path):
    spec = TensorSpec("w", (4, 4), "float32")
    with pytest.raises(StageFailure, match=r"w: 12 values were read, its shape \[4, 4\] has 16"):
        write_safetensors([(spec, lambda: [torch.ones(3, 4)])], tmp_path, max_shard_size=MEGABYTE)
    assert not list(tmp_path.iterdir())


def test_a_readers_failure_passes_through_and_nothing_is_left(tmp_path):
    def broken():
        yield torch.ones(8)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_safetensors(
            [(TensorSpec("w", (16,), "float32"), broken)], tmp_path, max_shard_size=MEGABYTE
        )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path):
    spec = TensorSpec("w", (10**9, 10**9), "float32")
    with pytest.raises(StageFailure, match=r"has room for .* are needed for the weights"):
        write_safetensors([(spec, list)], tmp_path, max_shard_size=MEGABYTE)
    assert not list(tmp_path.iterdir())


def test_two_tensors_of_one_name_are_refused(tmp_path):
    with pytest.raises(StageFailure, match="Two tensors have the name 'w'"):
        write_safetensors(
            [source("w", torch.ones(1)), source("w", torch.ones(2))],
            tmp_path,
            max_shard_size=MEGABYTE,
        )


def test_one_tensor_that_is_larger_than_a_piece_is_in_memory_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "PIECE_BYTES", 64)
    alive, most = set(), 0

    def read():
        nonlocal most
        values = np.ones(64, dtype=np.float32)
        alive.add(id(values))
        weakref.finalize(values, alive.discard, id(values))
        most = max(most, len(alive))
        yield torch.from_numpy(values)  # the tensor's storage keeps the array alive

    write_safetensors(
        [(TensorSpec(f"w{number}", (64,), "float32"), read) for number in range(20)],
        tmp_path,
        max_shard_size=MEGABYTE,
    )
    assert most == 1


def test_importing_the_module_does_not_import_torch():
    command = (
        "import sys, stages.model.weights; sys.exit('torch' in sys.modules or 'numpy' in "
        "sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", command], cwd=Path(__file__).parents[2], check=False
        ).returncode
        == 0
    )
