"""Consolidation of DCP shards, written by one process and by gloo processes with tensor parallelism and FSDP2 (write_shards.py)."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM

from stages.backends.torch import consolidate as subject
from stages.backends.torch.consolidate import consolidate
from stages.backends.torch.metadata import METADATA_FILE, read_metadata
from stages.model import weights
from stages.model.check import check_model_folder, tied_weights
from stages.model.weights import INDEX_FILE
from stages.run.errors import StageFailure
from stages.run.fingerprint import ROOT
from tests.conftest import torchrun
from tests.pickled import Call
from tests.saved_weights import assert_equal, written
from tests.tiny_llama import tiny_llama

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled"
)  # dcp.save in one process is meant

GIGABYTE = 10**9


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A folder with one checkpoint for each layout and, in plain.pt, the state dict that they hold."""
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
    dcp.save({"model": state, "optimizer": {"lr": 0.1}}, checkpoint_id=folder, no_dist=True)
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
    assert (
        sorted(
            shard.shape
            for shard in subject.sharded_tensors(sharded / layout, "model.")[name].shards
        )
        == shapes
    )


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


def test_tied_embeddings_are_written_once(tmp_path, output):
    model = tiny_llama(tie_word_embeddings=True)
    model.config.save_pretrained(output)
    tied = tied_weights(output)
    shards = save(tmp_path / "shards", model.state_dict())
    consolidate(shards, output, dtype=None, max_shard_size=GIGABYTE, tied=tied)
    assert "lm_head.weight" not in written(output)
    check_model_folder(output)
    assert_equal(AutoModelForCausalLM.from_pretrained(output).state_dict(), model.state_dict())


def test_embeddings_that_training_untied_are_refused(tmp_path, output):
    state = {"embed": torch.zeros(4, 4), "head": torch.ones(4, 4)}
    with pytest.raises(StageFailure, match="head and embed are one parameter"):
        consolidate(
            save(tmp_path / "shards", state),
            output,
            dtype=None,
            max_shard_size=GIGABYTE,
            tied={"head": "embed"},
        )


def test_scalars_empty_transposed_and_viewed_tensors_are_written(tmp_path, output):
    state = {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(6, 4).t(),
        "columns": torch.randn(6, 4)[:, 1:3],
        "ids": torch.arange(5),
        "half": torch.randn(3).bfloat16(),
        "cube": torch.randn(3, 4, 5),
    }
    consolidate(save(tmp_path / "shards", state), output, dtype=None, max_shard_size=GIGABYTE)
    assert_equal(written(output), state)


def test_only_entries_under_the_prefix_are_written(tmp_path, output):
    dcp.save(
        {"weights": {"w": torch.ones(2)}, "model": {"w": torch.zeros(2)}},
        checkpoint_id=tmp_path / "shards",
        no_dist=True,
    )
    consolidate(tmp_path / "shards", output, dtype=None, max_shard_size=GIGABYTE, prefix="weights.")
    assert_equal(written(output), {"w": torch.ones(2)})


def test_a_prefix_without_entries_is_refused(tmp_path, output):
    with pytest.raises(StageFailure, match=r"no entry that begins with 'net\.'"):
        consolidate(
            save(tmp_path / "shards", {"w": torch.ones(2)}),
            output,
            dtype=None,
            max_shard_size=GIGABYTE,
            prefix="net.",
        )


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


def test_a_missing_shard_is_named(one_process, output):
    (one_process / "__0_0.distcp").unlink()
    refuse(one_process, output, r"__0_0\.distcp is missing; last lies in it")


def test_a_shard_that_is_cut_short_is_named(one_process, output):
    path = one_process / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 1)
    refuse(one_process, output, r"__0_0\.distcp is cut short: .* last ends at byte")


@pytest.mark.parametrize("place", [0.2, 0.7])
def test_a_changed_byte_is_found(one_process, output, place):
    path = one_process / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)
    refuse(
        one_process,
        output,
        r"__0_0\.distcp: the shard of (first|last) at \[0, 0\] is damaged: its checksum",
    )


def test_a_changed_byte_in_a_transposed_tensor_is_found(tmp_path, output):
    shards = save(tmp_path / "shards", {"w": torch.randn(64, 48).t()})
    data = bytearray((shards / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (shards / "__0_0.distcp").write_bytes(data)
    refuse(shards, output, "the shard of w .* checksum")


def test_a_shard_full_of_zeros_is_found(one_process, output):
    path = one_process / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    refuse(one_process, output, r"__0_0\.distcp: the shard of first at \[0, 0\] is damaged")


def test_a_checkpoint_without_metadata_was_never_finished(one_process, output):
    (one_process / METADATA_FILE).unlink()
    refuse(one_process, output, r"\.metadata is missing")


def change_metadata(shards: Path, change) -> None:
    metadata = pickle.loads((shards / METADATA_FILE).read_bytes())
    change(metadata)
    (shards / METADATA_FILE).write_bytes(pickle.dumps(metadata))


def test_shards_that_leave_a_hole_are_refused(sharded, output, tmp_path):
    shards = shutil.copytree(sharded / "tp", tmp_path / "copy")
    change_metadata(
        shards,
        lambda metadata: metadata.state_dict_metadata[
            "model.model.layers.1.mlp.up_proj.weight"
        ].chunks.pop(),
    )
    refuse(
        shards,
        output,
        r"model\.layers\.1\.mlp\.up_proj\.weight: its shards \(1152 values\) do not cover its shape \[48, 32\]",
    )


def test_shards_that_overlap_are_refused(sharded, output, tmp_path):
    shards = shutil.copytree(sharded / "tp", tmp_path / "copy")

    def twice(metadata):
        chunks = metadata.state_dict_metadata["model.model.layers.1.mlp.up_proj.weight"].chunks
        chunks[1] = chunks[0]

    change_metadata(shards, twice)
    refuse(shards, output, "do not cover its shape")


def test_metadata_that_does_not_say_where_a_shard_lies_is_refused(one_process, output):
    change_metadata(one_process, lambda metadata: metadata.storage_data.clear())
    refuse(one_process, output, r"does not say where the shard of model\.first at \[0, 0\] lies")


def test_metadata_that_is_cut_short_is_refused(one_process, output):
    path = one_process / METADATA_FILE
    path.write_bytes(path.read_bytes()[:-9])
    refuse(one_process, output, r"\.metadata cannot be read")


def test_an_entry_that_is_not_a_tensor_is_refused(tmp_path, output):
    refuse(
        save(tmp_path / "shards", {"w": torch.ones(2), "note": "text"}),
        output,
        r"the entry model\.note is not a tensor",
    )


def test_metadata_that_calls_a_function_is_refused_and_nothing_is_called(
    one_process, output, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (one_process / METADATA_FILE).write_bytes(pickle.dumps(Call(os.mkdir, "run-by-a-pickle")))
    refuse(one_process, output, r"\.mkdir has no place in a checkpoint's metadata")
    assert not Path("run-by-a-pickle").exists()


def test_digests_are_those_of_the_files(one_process, output):
    report = consolidate(one_process, output, dtype=None, max_shard_size=20_000)
    assert report["files"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.iterdir()
    }
    assert json.loads((output / INDEX_FILE).read_text())["weight_map"].keys() == {"first", "last"}


def test_an_enum_that_an_older_python_pickled_is_read(tmp_path: Path) -> None:
    """Python 3.11.0 to 3.11.3 pickle the members of an Enum as calls of getattr."""
    kind = type(next(iter(torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING)))
    (tmp_path / METADATA_FILE).write_bytes(pickle.dumps(Call(getattr, kind, next(iter(kind)).name)))
    assert read_metadata(tmp_path / METADATA_FILE) is next(iter(kind))


def test_nothing_but_an_enum_is_looked_up(tmp_path: Path) -> None:
    (tmp_path / METADATA_FILE).write_bytes(pickle.dumps(Call(getattr, torch.Size, "mro")))
    with pytest.raises(pickle.UnpicklingError, match="no Enum"):
        read_metadata(tmp_path / METADATA_FILE)
