"""A written folder against its config.json, on real two-layer Llama models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config
from transformers.models.gpt2 import GPT2LMHeadModel

from stages.model.check import check_model_folder, tied_weights
from stages.model.weights import INDEX_FILE, SINGLE_FILE
from stages.run.errors import StageFailure
from tests.tiny_llama import tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "4KB"])
def test_what_save_pretrained_writes_is_accepted(tmp_path, tied, dtype, max_shard_size):
    model = tiny_llama(tie_word_embeddings=tied).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    count = model.num_parameters()
    assert check_model_folder(tmp_path) == {
        "parameters": count,
        "bytes": count * model.dtype.itemsize,
        "dtype": dtype,
    }


def test_tied_weights_are_those_that_save_pretrained_leaves_out(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert tied_weights(tmp_path) == {"lm_head.weight": "model.embed_tokens.weight"}
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path)
    assert tied_weights(tmp_path) == {}


def test_another_architecture_with_buffers_and_tied_weights_is_accepted(tmp_path):
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    )
    model.save_pretrained(tmp_path)
    assert check_model_folder(tmp_path)["parameters"] == model.num_parameters()
    assert tied_weights(tmp_path) == {"lm_head.weight": "transformer.wte.weight"}


def test_missing_and_unexpected_names_are_listed_together(folder):
    edit(folder, lambda tensors: tensors.update({"renamed": tensors.pop("model.norm.weight")}))
    with pytest.raises(
        StageFailure, match=r"missing \(1\): model.norm.weight\nunexpected \(1\): renamed"
    ):
        check_model_folder(folder)


def test_many_problems_are_counted_and_the_first_are_named(folder):
    def drop_first_layer(tensors):
        for name in [name for name in tensors if ".layers.0." in name]:
            del tensors[name]

    edit(folder, drop_first_layer)
    with pytest.raises(StageFailure, match=r"missing \(9\): model\.layers\.0\..*, and 4 more"):
        check_model_folder(folder)


def test_a_wrong_shape_is_shown_beside_the_right_one(folder):
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(
        StageFailure, match=r"wrong shape \(1\): model.norm.weight \[31\], not \[32\]"
    ):
        check_model_folder(folder)


def test_a_wrong_dtype_is_shown_beside_the_right_one(folder):
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).half()}))
    with pytest.raises(
        StageFailure, match=r"wrong dtype \(1\): model.norm.weight float16, not float32"
    ):
        check_model_folder(folder)


def test_a_tied_weight_that_was_written_twice_is_unexpected(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    edit(
        tmp_path,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        ),
    )
    with pytest.raises(StageFailure, match=r"unexpected \(1\): lm_head.weight"):
        check_model_folder(tmp_path)


def test_a_file_that_is_cut_short_is_named(folder):
    path = folder / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StageFailure, match=r"model\.safetensors is damaged"):
        check_model_folder(folder)


def test_an_index_that_points_to_the_wrong_file_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00099.safetensors"
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(StageFailure, match=r"misplaced \(1\): model.norm.weight"):
        check_model_folder(tmp_path)


def test_an_index_with_another_total_size_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    index["metadata"]["total_size"] += 1
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(StageFailure, match="total_size is"):
        check_model_folder(tmp_path)


def test_several_files_without_an_index_are_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="4KB")
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(StageFailure, match=f"no {INDEX_FILE}"):
        check_model_folder(tmp_path)


def test_a_stray_file_with_the_same_tensor_is_refused(folder):
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(
        StageFailure,
        match=r"model\.norm\.weight is in model-00001-of-00002\.safetensors and in "
        r"model\.safetensors",
    ):
        check_model_folder(folder)


def test_a_folder_without_weights_or_config_is_refused(tmp_path):
    with pytest.raises(StageFailure, match="no weights"):
        check_model_folder(tmp_path)
    save_file({"w": torch.ones(1)}, tmp_path / SINGLE_FILE)
    with pytest.raises(StageFailure, match=r"has no config\.json"):
        check_model_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(StageFailure, match="does not describe a causal language model"):
        check_model_folder(tmp_path)
