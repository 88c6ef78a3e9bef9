"""Consolidation of shards, written by one process and by gloo processes with tensor parallelism and
FSDP2 (write_shards.py)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from transformers import AutoModelForCausalLM

from stages.backends.torch import checkpoint
from stages.backends.torch import consolidate as subject
from stages.backends.torch.consolidate import consolidate
from stages.model import weights
from stages.model.check import check_model_folder, tied_weights
from stages.model.weights import INDEX_FILE
from stages.run.errors import StageFailure
from stages.run.fingerprint import ROOT
from tests.conftest import torchrun
from tests.saved_weights import assert_equal, written
from tests.tiny_llama import tiny_llama

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled"
)  # dcp.save in one process is meant

GIGABYTE = 10**9
SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A folder with the shards of each layout and, in plain.pt, the state dict that they hold."""
    folder = tmp_path_factory.mktemp("sharded")
    subprocess.run(
        [*torchrun(4, "tests.backends.torch.write_shards"), str(folder)],
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=180,
    )
    return folder


@pytest.fixture
def output(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def save(folder: Path, state: dict) -> Path:
    dcp.save(
        state,
        storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        no_dist=True,
    )
    return folder


@pytest.mark.parametrize("piece_bytes", [weights.PIECE_BYTES, 200])
@pytest.mark.parametrize("layout", ["tp", "fsdp", "tp_fsdp"])
def test_shards_of_every_layout_give_the_plain_state_dict_bit_by_bit(
    sharded, output, layout, piece_bytes, monkeypatch
):
    monkeypatch.setattr(subject, "PIECE_BYTES", piece_bytes)
    report = consolidate(sharded / layout, output, dtype=None, max_shard_size=GIGABYTE)
    expected = torch.load(sharded / "plain.pt", weights_only=True)
    assert_equal(written(output), expected)
    assert report["tensors"] == len(expected)
    assert report["parameters"] == sum(tensor.numel() for tensor in expected.values())
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (sharded / layout).iterdir()
    }
    assert report["shards"] == files and len(files) == 4


@pytest.mark.parametrize("layout", ["tp", "fsdp", "tp_fsdp"])
def test_dcps_own_join_gives_the_same_tensors(sharded, output, layout):
    """Its module is private: when this import or call fails, compare with what torch offers in its
    place."""
    names = torch.load(sharded / "plain.pt", weights_only=True)
    consolidate_safetensors_files(str(sharded / layout), str(output), dict.fromkeys(names, 1))
    theirs = written(output)
    for path in output.iterdir():
        path.unlink()
    consolidate(sharded / layout, output, dtype=None, max_shard_size=GIGABYTE)
    assert_equal(written(output), theirs)


@pytest.mark.parametrize(
    ("layout", "name", "shapes"),
    [
        ("tp", "model.layers.0.mlp.down_proj.weight", [(32, 12)] * 4),
        ("fsdp", "model.embed_tokens.weight", [(16, 32), (17, 32), (17, 32), (17, 32)]),
        ("tp_fsdp", "model.layers.0.mlp.up_proj.weight", [(12, 32)] * 4),
        ("tp_fsdp", "model.layers.0.mlp.down_proj.weight", [(16, 24)] * 4),
    ],
)
def test_the_layouts_are_sharded_by_rows_and_by_columns_and_unevenly(sharded, layout, name, shapes):
    """Otherwise the test above would show less than it says."""
    found = []
    for path in (sharded / layout).iterdir():
        with safe_open(path, framework="pt") as file:
            found.append(tuple(file.get_slice(name).get_shape()))
    assert sorted(found) == shapes


def test_one_process_checkpoint_becomes_a_sharded_folder_that_transformers_loads(tmp_path, output):
    model = tiny_llama().bfloat16()
    shards = save(tmp_path / "shards", tiny_llama().state_dict())
    model.config.dtype = "bfloat16"
    model.config.save_pretrained(output)
    report = consolidate(shards, output, dtype="bfloat16", max_shard_size=20_000)
    assert INDEX_FILE in report["files"] and len(report["files"]) > 2
    assert check_model_folder(output)["parameters"] == report["parameters"]
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert_equal(loaded.state_dict(), model.state_dict())


def test_tied_embeddings_are_published_and_written_once(tmp_path, output, one_rank):
    model = tiny_llama(tie_word_embeddings=True)
    model.config.save_pretrained(output)
    tied = tied_weights(output)
    checkpoint.save_shards(tmp_path / "shards", model, tied)
    consolidate(tmp_path / "shards", output, dtype=None, max_shard_size=GIGABYTE, tied=tied)
    assert "lm_head.weight" not in written(output)
    check_model_folder(output)
    assert_equal(AutoModelForCausalLM.from_pretrained(output).state_dict(), model.state_dict())


def test_weights_above_the_size_of_a_file_are_published_in_several(
    tmp_path,
    output,
    one_rank,
    monkeypatch,
):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 20_000)
    model = tiny_llama()
    checkpoint.save_shards(tmp_path / "shards", model, {})
    assert len(list((tmp_path / "shards").iterdir())) > 2
    consolidate(tmp_path / "shards", output, dtype=None, max_shard_size=GIGABYTE)
    assert_equal(written(output), model.state_dict())


def test_embeddings_that_training_untied_are_refused(tmp_path, output, one_rank):
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Linear(4, 4, bias=False), "head": torch.nn.Linear(4, 4, bias=False)}
    )
    tied = {"head.weight": "embed.weight"}
    checkpoint.save_shards(tmp_path / "shards", model, tied)
    with pytest.raises(StageFailure, match=r"head\.weight and embed\.weight are one parameter"):
        consolidate(tmp_path / "shards", output, dtype=None, max_shard_size=GIGABYTE, tied=tied)
    assert not list(output.iterdir())


def test_tensors_of_any_number_of_dimensions_are_written(tmp_path, output):
    state = {
        "transposed": torch.randn(6, 4).t().contiguous(),
        "vector": torch.randn(3),
        "cube": torch.randn(3, 4, 5),
    }
    consolidate(save(tmp_path / "shards", state), output, dtype=None, max_shard_size=GIGABYTE)
    assert_equal(written(output), state)


def test_nan_is_refused_with_the_tensors_name(tmp_path, output):
    state = {"fine": torch.ones(4), "layers.0": torch.tensor([1.0, float("nan")])}
    with pytest.raises(StageFailure, match=r"layers\.0: 1 of 2 values are not finite"):
        consolidate(
            save(tmp_path / "shards", state), output, dtype="bfloat16", max_shard_size=GIGABYTE
        )
    assert not list(output.iterdir())


@pytest.fixture
def one_process(tmp_path) -> Path:
    return save(tmp_path / "shards", {"first": torch.randn(64, 64), "last": torch.randn(64, 64)})


def refuse(shards: Path, output: Path, message: str) -> None:
    with pytest.raises(StageFailure, match=message):
        consolidate(shards, output, dtype=None, max_shard_size=GIGABYTE)
    assert not list(output.iterdir())


def test_shards_that_leave_a_hole_are_refused(sharded, output, tmp_path):
    shards = shutil.copytree(sharded / "tp", tmp_path / "copy")
    (shards / SHARD.replace("shard-00001", "shard-00002")).unlink()
    refuse(
        shards,
        output,
        r"model\.layers\.0\.mlp\.up_proj\.weight: its shards \(1152 values\) do not cover its "
        r"shape \[48, 32\]",
    )


def test_a_folder_without_shards_is_refused(output, tmp_path):
    refuse(tmp_path, output, "are not a whole model")


@pytest.mark.parametrize(
    ("kept", "message"),
    [(0.0, "is damaged"), (0.001, "is damaged"), (0.5, "is cut short"), (0.999, "is cut short")],
)
def test_a_shard_that_is_cut_short_is_named(one_process, output, kept, message):
    path = one_process / SHARD
    os.truncate(path, int(path.stat().st_size * kept))
    refuse(one_process, output, rf"{SHARD}.* {message}")


def test_a_changed_byte_changes_the_digest_that_is_returned(one_process, output):
    path = one_process / SHARD
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    found = consolidate(one_process, output, dtype=None, max_shard_size=GIGABYTE)["shards"][SHARD]
    assert found == hashlib.sha256(data).hexdigest() != before


def test_digests_are_those_of_the_files(one_process, output):
    report = consolidate(one_process, output, dtype=None, max_shard_size=20_000)
    assert report["files"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.iterdir()
    }
    assert json.loads((output / INDEX_FILE).read_text())["weight_map"].keys() == {"first", "last"}
