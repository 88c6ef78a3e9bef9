"""Consolidation of shards that optimum-neuron's models wrote (nxd_shards.py): the original weights,
and what its reader gives."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.backends.neuron.consolidate import consolidate
from stages.backends.neuron.shards import sharded_tensor
from stages.backends.neuron.shards.torch_archive import read_archive
from stages.model import weights
from stages.model.check import check_model_folder, tied_weights
from stages.model.weights import INDEX_FILE
from stages.run.errors import StageFailure
from tests.fakes.nxd_shards import LAYOUTS
from tests.saved_weights import assert_equal, written

GIGABYTE = 10**9
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
WHOLE_MODELS = [name for name, layout in LAYOUTS.items() if not layout.targets]
PACKAGES = ("torch_xla", "neuronx_distributed", "torch_neuronx", "optimum", "peft")


@pytest.mark.parametrize("piece_bytes", [weights.PIECE_BYTES, 200])
@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_every_layout_gives_the_original_weights_and_what_the_library_reads(
    written_shards, output, name, piece_bytes, monkeypatch
):
    monkeypatch.setattr(sharded_tensor, "PIECE_BYTES", piece_bytes)
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)  # importing it is an error
    folder = written_shards / name
    report = consolidate(
        folder / "shards",
        output,
        dtype=None,
        max_shard_size=GIGABYTE,
        tied=TIED if LAYOUTS[name].config.get("tie_word_embeddings") else None,
    )
    original = written(folder / "original")
    assert_equal(written(output), original)
    assert_equal(torch.load(folder / "library.pt"), original)
    assert report["tensors"] == len(original)
    assert report["parameters"] == sum(tensor.numel() for tensor in original.values())
    assert report["bytes_read"] >= sum(tensor.nbytes for tensor in original.values())
    assert report["shards"] == {
        file: hashlib.sha256((folder / "shards" / file).read_bytes()).hexdigest()
        for file in report["shards"]
    }
    if LAYOUTS[name].config.get("tie_word_embeddings") or "plain" not in name:
        return
    ranks = {f"model/{path.name}" for path in (folder / "shards" / "model").glob("dp_rank_*.pt")}
    assert report["shards"].keys() == ranks  # so that the stage reads none of them again


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("one", ("q_proj.weight", "gate_up_proj.weight")),
        ("tp2", ("q_proj.weight", "gate_up_proj.weight")),
        ("tp2_fuse_qkv", ("qkv_proj.weight", "gate_up_proj.weight")),
        ("tp4_gqa", ("qkv_proj.weight_q", "qkv_proj.weight_k", "qkv_proj.weight_v")),
        ("tp4_gqa_fuse_qkv", ("qkv_proj.weight_qkv",)),
        (
            "lora_gqa_plain",
            ("qkv_proj.lora_B.default.weight_q", "gate_up_proj.lora_A.default.weight"),
        ),
    ],
)
def test_the_layouts_hold_the_parameters_that_they_are_named_for(written_shards, name, parameters):
    """Otherwise the test above would show less than it says."""
    metadata = json.loads(
        (written_shards / name / "shards" / "mp_metadata_pp_rank_0.json").read_text()
    )
    for parameter in parameters:
        assert any(found.endswith(parameter) for found in metadata["parameters"])


def test_a_model_of_many_files_keeps_every_tensor_where_the_librarys_writer_keeps_one(
    written_shards, output
):
    folder = written_shards / "tp2"
    report = consolidate(folder / "shards", output, dtype=None, max_shard_size=20_000)
    assert INDEX_FILE in report["files"] and len(report["files"]) > 2
    assert_equal(written(output), written(folder / "original"))
    assert json.loads((written_shards / "survivors.json").read_text()) == ["lm_head.weight"]


def test_weights_are_cast_and_the_folder_is_the_model_of_its_config(written_shards, output):
    folder = written_shards / "tp4_gqa"
    config = json.loads((folder / "original" / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    report = consolidate(
        folder / "shards",
        output,
        dtype="bfloat16",
        max_shard_size=GIGABYTE,
        tied=tied_weights(output),
    )
    assert check_model_folder(output)["parameters"] == report["parameters"]
    assert_equal(
        written(output),
        {name: tensor.bfloat16() for name, tensor in written(folder / "original").items()},
    )
    assert report["files"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in output.iterdir()
        if path.name != "config.json"
    }


@pytest.mark.parametrize("name", ["tied", "tied_plain"])
def test_tied_embeddings_that_differ_in_one_shard_are_refused(
    written_shards, output, tmp_path, name
):
    folder = shutil.copytree(written_shards / name / "shards", tmp_path / "shards")
    path = folder / "model" / "dp_rank_00_tp_rank_01_pp_rank_00.pt"
    if name == "tied":
        number = list(read_archive(path)).index("lm_head.weight")
        path = path.with_name(f"{path.name}.tensors") / f"tensor_{number}.pt"
        torch.save(torch.load(path) + 1, path)
    else:
        state = torch.load(path)
        state["lm_head.weight"] = state["lm_head.weight"] + 1
        torch.save(state, path)
    with pytest.raises(
        StageFailure,
        match=r"lm_head\.weight and model\.embed_tokens\.weight are one parameter in config\.json",
    ):
        consolidate(folder, output, dtype=None, max_shard_size=GIGABYTE, tied=TIED)
    assert not list(output.iterdir())


def test_parameters_that_are_tied_and_listed_apart_are_compared(written_shards, output):
    """As pipeline parallelism leaves them: each in its stage."""
    with pytest.raises(StageFailure, match="training untied them"):
        consolidate(
            written_shards / "tp2_pp2" / "shards",
            output,
            dtype=None,
            max_shard_size=GIGABYTE,
            tied=TIED,
        )


def test_a_value_that_is_not_finite_is_refused_with_the_tensors_name(
    written_shards, output, tmp_path
):
    folder = shutil.copytree(written_shards / "tp2_plain" / "shards", tmp_path / "shards")
    path = folder / "model" / "dp_rank_00_tp_rank_00_pp_rank_00.pt"
    state = torch.load(path)
    state["model.layers.1.mlp.gate_up_proj.weight"][-1, -1] = float("nan")
    torch.save(state, path)
    with pytest.raises(
        StageFailure,
        match=r"model\.layers\.1\.mlp\.up_proj\.weight: 1 of 1536 values are not finite",
    ):
        consolidate(folder, output, dtype="bfloat16", max_shard_size=GIGABYTE)
    assert not list(output.iterdir())


def test_shards_beside_which_a_stale_file_lies_are_read_without_it(
    written_shards, output, tmp_path
):
    """A save with fewer ranks into the folder of an earlier one leaves the files of the others."""
    folder = shutil.copytree(written_shards / "tp2" / "shards", tmp_path / "shards")
    torch.save(
        {"model.norm.weight": torch.ones(3)},
        folder / "model" / "dp_rank_00_tp_rank_02_pp_rank_00.pt",
    )
    save_file({"unrelated": torch.ones(1)}, folder / "model" / "note.safetensors")
    consolidate(folder, output, dtype=None, max_shard_size=GIGABYTE)
    assert_equal(written(output), written(written_shards / "tp2" / "original"))


def test_tied_ends_of_a_pipeline_are_one_parameter(written_shards, output):
    """Each stage's file holds the other's end too, as it was before training; that is not what is
    compared."""
    folder = written_shards / "tp2_pp2_same_ends"
    report = consolidate(folder / "shards", output, dtype=None, max_shard_size=GIGABYTE, tied=TIED)
    assert set(TIED) & set(load_file(output / "model.safetensors")) == set()
    assert report["tensors"] == len(load_file(folder / "original" / "model.safetensors")) - len(
        TIED
    )
