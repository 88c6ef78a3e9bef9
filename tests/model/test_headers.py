"""Weights in safetensors with any bytes, headers and indexes: problems, or tensors that are
there."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from stages.model.headers import read_headers
from stages.model.weights import INDEX_FILE, SINGLE_FILE

pytestmark = pytest.mark.torture("fuzz")

STATE = {
    "first": torch.arange(12.0).reshape(3, 4),
    "half": torch.arange(6).bfloat16(),
    "last": torch.arange(12.0, 24.0).reshape(3, 4),
}
WEIGHTS = save(STATE, metadata={"format": "pt"})
# Places, as fractions of a file, and the bytes that are put there.
CHANGES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4
)
same_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
NUMBERS = st.one_of(
    st.integers(-2, 200), st.sampled_from([2**31, 2**63, 2**64, -(2**63), 1.5, None, "1", True])
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(
            ["F32", "F64", "BF16", "I8", "BOOL", "F8_E4M3", "f32", "", 7, None]
        ),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, max_size=3),
        "more": NUMBERS,
    },
)


def changed(data: bytes, changes: list[tuple[float, int]], kept: float) -> bytes:
    damaged = bytearray(data)
    for place, byte in changes:
        damaged[int(place * len(damaged))] = byte
    return bytes(damaged[: round(kept * len(damaged))])


def headers_of(folder: Path, weights: bytes) -> Iterator[tuple[str, torch.Tensor]]:
    """What the headers of the weights give, once read by safetensors itself; nothing where there
    are problems."""
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
def test_any_changed_bytes_of_safetensors_are_problems_or_tensors_that_are_there(
    tmp_path: Path, changes: list, kept: float
) -> None:
    list(headers_of(tmp_path, changed(WEIGHTS, changes, kept)))


@same_folder
@given(
    header=st.dictionaries(
        st.sampled_from(["first", "last", "__metadata__", "", "\0"]), ENTRIES, max_size=3
    ),
    data=st.integers(0, 64),
)
def test_any_header_of_safetensors_is_a_problem_or_tensors_that_are_there(
    tmp_path: Path, header: dict, data: int
) -> None:
    text = json.dumps(header).encode()
    list(headers_of(tmp_path, struct.pack("<Q", len(text)) + text + bytes(data)))


JSON = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
)


@same_folder
@given(
    index=st.one_of(
        JSON,
        st.fixed_dictionaries(
            {"weight_map": st.one_of(JSON, st.dictionaries(st.text(max_size=3), JSON, max_size=3))}
        ),
    )
)
def test_any_index_that_does_not_fit_the_files_is_a_problem(tmp_path: Path, index: Any) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(WEIGHTS)
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    assert read_headers(tmp_path).problems
