"""Shards that are not what they should be: each is refused by name, and none can run code."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stages.backends.neuron.consolidate import consolidate
from stages.backends.neuron.shards.read import (
    _rank_tensors,
    damaged,
    is_whole,
    problems,
    read_shards,
)
from stages.backends.neuron.shards.torch_archive import RowReader, StoredTensor
from stages.run.errors import StageFailure
from tests.backends.neuron.test_consolidate import GIGABYTE
from tests.fakes.nxd import TensorReference
from tests.pickled import Call

RANK = "model/dp_rank_00_tp_rank_01_pp_rank_00.pt"
TENSOR = f"{RANK}.tensors/tensor_7.pt"
METADATA = "mp_metadata_pp_rank_0.json"
Damage = Callable[[Path], None]
COMMAND = Call(os.mkdir, "run-by-a-pickle")


def remove(*names: str) -> Damage:
    def damage(shards: Path) -> None:
        for name in names:
            (shards / name).unlink()

    return damage


def cut_short(name: str) -> Damage:
    def damage(shards: Path) -> None:
        data = (shards / name).read_bytes()
        (shards / name).write_bytes(data[: len(data) // 2])

    return damage


def replace_by(name: str, value: object) -> Damage:
    return lambda shards: torch.save(value, shards / name)


def flip_in(name: str) -> Damage:
    """Flip a bit in the middle of the largest tensor's bytes."""

    def damage(shards: Path) -> None:
        with zipfile.ZipFile(shards / name) as archive:
            record = max(archive.infolist(), key=lambda info: info.file_size)
        data = bytearray((shards / name).read_bytes())
        data[record.header_offset + 200 + record.file_size // 2] ^= (
            4  # 200: above the record's own header
        )
        (shards / name).write_bytes(data)

    return damage


def change_metadata(change: Callable[[dict], object]) -> Damage:
    def damage(shards: Path) -> None:
        metadata = json.loads((shards / METADATA).read_text())
        change(metadata)
        (shards / METADATA).write_text(json.dumps(metadata))

    return damage


def first_fields(metadata: dict) -> dict:
    return next(
        entry["specs"][0][1]
        for entry in metadata["model_weight_transformation_specs"]
        if entry["specs"]
    )


def without_parameter(shards: Path) -> None:
    state = torch.load(shards / RANK)
    del state["model.norm.weight"]
    torch.save(state, shards / RANK)


# Layout, what happens to its shards, and the words that say so.
SEEN_WITHOUT_READING: list[tuple[str, Damage, str]] = [
    (
        "tp2",
        remove("done"),
        r"done is missing\. It is written after all weights, so this save was never finished",
    ),
    ("tp2", remove(RANK), r"tp_rank_01_pp_rank_00\.pt is missing"),
    ("tp2", remove(METADATA), r"mp_metadata_pp_rank_0\.json is missing"),
    ("tp2_pp2", remove("mp_metadata_pp_rank_1.json"), r"mp_metadata_pp_rank_1\.json is missing"),
    (
        "tp2_pp2",
        remove(
            "model/dp_rank_00_tp_rank_00_pp_rank_01.pt", "model/dp_rank_00_tp_rank_01_pp_rank_01.pt"
        ),
        r"(?s)tp_rank_00_pp_rank_01\.pt is missing.*tp_rank_01_pp_rank_01\.pt is missing",
    ),
    (
        "tp2",
        remove(RANK, f"{RANK.replace('_01_', '_00_')}"),
        r"(?s)tp_rank_00_pp_rank_00\.pt is missing.*tp_rank_01_pp_rank_00\.pt is missing",
    ),
    (
        "tp2",
        remove(TENSOR),
        r"tp_rank_01_pp_rank_00\.pt\.tensors/tensor_7\.pt is missing\. It holds "
        r"model\.layers\.0\.\S+",
    ),
    ("tp2", cut_short(TENSOR), r"tensor_7\.pt is damaged"),
    ("tp2", cut_short(RANK), r"tp_rank_01_pp_rank_00\.pt is damaged"),
    ("tp2_plain", cut_short(RANK), r"tp_rank_01_pp_rank_00\.pt is damaged"),
    (
        "tp2",
        replace_by(TENSOR, torch.ones(3)),
        r"tensor_7\.pt holds float32 \(3,\), dp_rank_00_tp_rank_01_pp_rank_00\.pt\.info\.pt says "
        r"float32 \(32,\)",
    ),
    ("tp2", replace_by(TENSOR, [torch.ones(3)]), r"tensor_7\.pt holds no tensor"),
    ("tp2", replace_by(RANK, [1, 2]), r"tp_rank_01_pp_rank_00\.pt holds no state dict"),
    ("tp2", replace_by(f"{RANK}.info.pt", [1, 2]), r"info\.pt does not list tensors"),
    ("tp2", replace_by(RANK, {"note": "text"}), r"its entry note is not a tensor"),
    (
        "tp2",
        replace_by(RANK, COMMAND),
        r"tp_rank_01_pp_rank_00\.pt is damaged, or contains more than tensors, which is never "
        r"run: .*mkdir",
    ),
    (
        "tp2",
        replace_by(TENSOR, COMMAND),
        r"tensor_7\.pt is damaged, or contains more than tensors, which is never run: .*mkdir",
    ),
    (
        "tp2_plain",
        without_parameter,
        r"model\.norm\.weight is missing in dp_rank_00_tp_rank_01_pp_rank_00\.pt",
    ),
    (
        "tp2_plain",
        lambda shards: torch.save(
            {name: tensor.half() for name, tensor in torch.load(shards / RANK).items()},
            shards / RANK,
        ),
        r"the ranks' shards of model\.embed_tokens\.weight differ in dtype",
    ),
    (
        "tp2",
        lambda shards: (shards / METADATA).write_text("{"),
        r"mp_metadata_pp_rank_0\.json cannot be used",
    ),
    (
        "tp2",
        change_metadata(
            lambda metadata: metadata["parameters"]["lm_head.weight"].update(num_partitions=4)
        ),
        r"gives several tensor-parallel sizes: \[2, 4\]",
    ),
    (
        "tp2",
        change_metadata(
            lambda metadata: metadata["parameters"]["lm_head.weight"].update(partition_stride=2)
        ),
        r"lm_head\.weight: its shards are interleaved",
    ),
    (
        "tp2",
        change_metadata(lambda metadata: first_fields(metadata).update(original_dims=[40, 40])),
        r"gate_up_proj\.weight: the metadata means 2 matrices with 40 rows, the shards have "
        r"shapes \[\[48, 32\], \[48, 32\]\]",
    ),
    (
        "tp4_gqa",
        change_metadata(lambda metadata: first_fields(metadata).update(num_key_value_heads=3)),
        r"qkv_proj: heads, copies and ranks do not fit each other",
    ),
    (
        "tp2",
        change_metadata(
            lambda metadata: metadata["model_weight_transformation_specs"][0].update(
                specs=[["Transpose", {"peft_type": None}]]
            )
        ),
        r"the transformation Transpose of .* is not one of optimum-neuron 0\.4\.5",
    ),
]


@pytest.mark.parametrize(("layout", "damage", "message"), SEEN_WITHOUT_READING)
def test_what_can_be_seen_without_reading_weights_is_refused(
    written_shards, output, tmp_path, monkeypatch, layout, damage, message
):
    shards = shutil.copytree(written_shards / layout / "shards", tmp_path / "shards")
    damage(shards)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RowReader, "rows", None)
    with pytest.raises(StageFailure, match=message):
        consolidate(shards, output, dtype=None, max_shard_size=GIGABYTE)
    assert problems(shards)
    assert not list(output.iterdir())
    assert not Path("run-by-a-pickle").exists()


@pytest.mark.parametrize(
    ("layout", "damage"),
    [("tp2", flip_in(TENSOR.replace("_7", "_5"))), ("tp2_plain", flip_in(RANK))],
)
def test_a_flipped_bit_is_found_by_the_checksum(written_shards, tmp_path, layout, damage):
    shards = shutil.copytree(written_shards / layout / "shards", tmp_path / "shards")
    assert not damaged(shards)
    damage(shards)
    assert not problems(shards)
    assert re.search(
        r"tp_rank_01_pp_rank_00\.pt\S* is damaged: the checksum of \S+ does not match",
        damaged(shards),
    )


@pytest.mark.parametrize("number", ["../../../../secret", [1], None])
def test_a_reference_leads_nowhere_but_to_a_numbered_file(
    written_shards, output, tmp_path, monkeypatch, number
):
    for name in ("torch_xla", "torch_xla.utils", "torch_xla.utils.serialization"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["torch_xla.utils.serialization"].TensorReference = TensorReference
    shards = shutil.copytree(written_shards / "tp2" / "shards", tmp_path / "shards")
    replace_by(RANK, {"model.norm.weight": TensorReference(number)})(shards)
    with pytest.raises(
        StageFailure,
        match=rf"refers to a tensor {re.escape(repr(number))}, and not by a number\. It holds "
        r"model\.norm\.weight",
    ):
        consolidate(shards, output, dtype=None, max_shard_size=GIGABYTE)


def test_problems_are_reported_together(written_shards, output, tmp_path):
    shards = shutil.copytree(written_shards / "tp2" / "shards", tmp_path / "shards")
    remove(*(f"{RANK}.tensors/tensor_{number}.pt" for number in range(7)))(shards)
    with pytest.raises(
        StageFailure,
        match=r"(?s)cannot be joined; use an earlier "
        r"checkpoint.*tensor_0\.pt.*tensor_4\.pt.*\.\.\. and 2 more",
    ):
        consolidate(shards, output, dtype=None, max_shard_size=GIGABYTE)
    assert len(problems(shards)) == 7


@pytest.mark.parametrize(
    ("damage", "whole"),
    [(None, True), (remove("done"), False), (remove(RANK), False), (remove(METADATA), False)],
)
def test_whether_a_save_was_finished_is_seen_without_opening_a_shard(
    written_shards, tmp_path, damage, whole
):
    shards = shutil.copytree(written_shards / "tp2" / "shards", tmp_path / "shards")
    if damage:
        damage(shards)
    for path in (shards / "model").rglob("*.pt"):
        if path.is_file():
            path.write_bytes(b"")
    assert is_whole(shards) == whole
    assert not is_whole(tmp_path / "nowhere")


def test_shards_of_an_older_version_that_wrote_no_information_are_read(written_shards, tmp_path):
    shards = shutil.copytree(written_shards / "tp2" / "shards", tmp_path / "shards")
    for path in (shards / "model").glob("*.info.pt"):
        path.unlink()
    assert not problems(shards)
    assert len(read_shards(shards).tensors) == 21


def tensors_of(file: Path) -> dict[str, StoredTensor]:
    problems: list[str] = []
    tensors = _rank_tensors(file, problems)
    assert not problems
    return tensors


@pytest.mark.parametrize("tensor", [torch.rand(4, 6).t(), torch.rand(4, 6)[:, 1:3]])
def test_rows_of_a_view_are_read_in_order(tmp_path, tensor):
    torch.save({"view": tensor}, tmp_path / "state.pt")
    stored = tensors_of(tmp_path / "state.pt")["view"]
    assert stored.offset is None
    assert torch.equal(RowReader().rows(stored, 1, 3), tensor[1:3])


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int8,
        torch.bool,
    ],
)
def test_rows_of_parameters_and_views_of_every_dtype_are_read_where_they_lie(tmp_path, dtype):
    whole = torch.arange(24).view(6, 4).to(dtype)
    view = whole[2:5]
    view.tensor_model_parallel = True  # an attribute makes torch.save write it in another way
    torch.save(
        {"view": view, "whole": whole, "parameter": torch.nn.Parameter(whole, requires_grad=False)},
        tmp_path / "state.pt",
    )
    reader, stored = RowReader(), tensors_of(tmp_path / "state.pt")
    assert all(tensor.offset is not None for tensor in stored.values())

    def rows(name, first, last):
        return reader.rows(stored[name], first, last)

    assert torch.equal(rows("view", 1, 3), view[1:3])
    assert torch.equal(rows("whole", 0, 6), whole)
    assert torch.equal(rows("parameter", 4, 5), whole[4:5])
    assert reader.bytes_read == 9 * 4 * dtype.itemsize
    digest = hashlib.sha256((tmp_path / "state.pt").read_bytes()).hexdigest()
    assert reader.digests(tmp_path) == {"state.pt": digest}


def test_rows_of_a_file_of_torch_before_it_wrote_archives_are_read(tmp_path):
    whole = torch.rand(6, 4)
    torch.save({"whole": whole}, tmp_path / "state.pt", _use_new_zipfile_serialization=False)
    stored = tensors_of(tmp_path / "state.pt")["whole"]
    assert torch.equal(RowReader().rows(stored, 1, 3), whole[1:3])
