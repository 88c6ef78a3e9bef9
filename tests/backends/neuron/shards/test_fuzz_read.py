"""Neuron's shards and their metadata with any bytes or values changed: read as they were written,
or refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from stages.backends.neuron.consolidate import consolidate
from stages.backends.neuron.shards.read import damaged
from stages.run.errors import StageFailure
from tests.backends.neuron.shards.test_read import METADATA, RANK
from tests.backends.neuron.test_consolidate import GIGABYTE
from tests.saved_weights import assert_equal, written

pytestmark = pytest.mark.torture("fuzz")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    place=st.floats(0, 1, exclude_max=True),
    byte=st.integers(0, 255),
    kept=st.sampled_from([1, 1, 1, 0.9, 0]),
)
def test_any_changed_byte_of_a_ranks_file_is_harmless_or_refused(
    written_shards, output, tmp_path, place, byte, kept
):
    intact = written_shards / "tp2_plain" / "shards"
    shards = shutil.copytree(intact, tmp_path / "shards", dirs_exist_ok=True)
    data = bytearray((intact / RANK).read_bytes())
    data[int(place * len(data))] = byte
    (shards / RANK).write_bytes(data[: round(kept * len(data))])
    if not damaged(shards) and consolidated(shards, output):
        assert_equal(
            written(output),
            load_file(written_shards / "tp2_plain" / "original" / "model.safetensors"),
        )


# What may are in the place of a value in the metadata, which is JSON.
NUMBERS = st.one_of(st.integers(-2, 70), st.sampled_from([10**9, 2**70, 1.5, math.inf, math.nan]))
ANYTHING = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.sampled_from(["", "evil", "lm_head.weight"]),
    st.lists(NUMBERS, max_size=3),
)
ANYTHING = st.one_of(
    ANYTHING,
    st.dictionaries(st.sampled_from(["a", "specs", "num_partitions"]), ANYTHING, max_size=2),
)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in JSON."""
    yield path
    for key in (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        yield from places(value[key], (*path, key))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(layout=st.sampled_from(["tp2_plain", "tp4_gqa_plain"]), data=st.data())
def test_metadata_with_any_values_in_it_is_followed_or_refused(
    written_shards, output, tmp_path, layout, data
):
    """Which rows belong where has no checksum of its own: that it is as train wrote it, the stage
    sees by its digest."""
    shards = shutil.copytree(
        written_shards / layout / "shards", tmp_path / layout, dirs_exist_ok=True
    )
    metadata = json.loads((written_shards / layout / "shards" / METADATA).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from([place for place in places(metadata) if place]))
        holder = metadata
        for key in path:
            holder = holder[key]
        holder[last] = data.draw(ANYTHING)
    (shards / METADATA).write_text(json.dumps(metadata))
    consolidated(shards, output)


def consolidated(shards: Path, output: Path) -> bool:
    """Whether the shards were joined in the emptied folder `output`; False where they were
    refused."""
    shutil.rmtree(output)
    output.mkdir()
    try:
        consolidate(shards, output, dtype=None, max_shard_size=GIGABYTE)
    except StageFailure:
        assert not list(output.iterdir())
        return False
    return True


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"parameters": ' + '{"a":' * 100_000, "\ufeff", "null", "[]", "7"]
)
def test_metadata_of_any_other_shape_is_refused(written_shards, output, tmp_path, text):
    shards = shutil.copytree(written_shards / "tp2_plain" / "shards", tmp_path / "shards")
    (shards / METADATA).write_text(text)
    assert not consolidated(shards, output)


@pytest.mark.parametrize(
    "name",
    ["mp_metadata_pp_rank_99999999999.json", "model/dp_rank_00_tp_rank_00_pp_rank_99999999999.pt"],
)
def test_a_file_of_the_hundred_billionth_stage_is_refused_at_once(
    written_shards, output, tmp_path, name
):
    shards = shutil.copytree(written_shards / "tp2_plain" / "shards", tmp_path / "shards")
    (shards / name).write_text("{}")
    assert not consolidated(shards, output)
