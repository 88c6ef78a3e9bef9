"""Adapters that optimum-neuron's own classes wrote, merged: what its reader and peft's merge give,
bit by bit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.backends.neuron.consolidate import consolidate
from stages.backends.neuron.shards.read import read_shards
from stages.backends.neuron.shards.torch_archive import RowReader
from stages.run.errors import StageFailure
from stages.run.layout import ADAPTER_CONFIG
from tests.backends.neuron.test_consolidate import GIGABYTE, assert_equal, written
from tests.fakes.nxd_shards import LAYOUTS

ADAPTERS = [name for name, layout in LAYOUTS.items() if layout.targets]


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    return dict(PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict())


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapters_shards_are_the_adapter_and_what_the_library_reads(written_shards, name):
    reader = RowReader()
    found = {
        key: torch.cat(list(tensor.read(reader)))
        for key, tensor in read_shards(written_shards / name / "shards").tensors.items()
    }
    assert_equal(found, load_file(written_shards / name / "adapter" / "adapter_model.safetensors"))
    library = torch.load(written_shards / name / "library.pt")
    if (
        name == "lora_attention"
    ):  # the library wants the weights of fused layers that have no adapter
        assert library.startswith("KeyError")
    else:
        assert_equal(found, library)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merged_model_is_the_one_that_peft_merges(written_shards, output, name):
    folder = written_shards / name
    report = consolidate(
        folder / "shards",
        output,
        dtype="bfloat16",
        max_shard_size=GIGABYTE,
        base=folder / "original",
    )
    expected = merged_by_peft(folder / "original", folder / "adapter")
    assert_equal(written(output), expected)
    assert report["parameters"] == sum(tensor.numel() for tensor in expected.values())
    changed = sum(
        not torch.equal(tensor, expected[key])
        for key, tensor in written(folder / "original").items()
    )
    assert changed == 2 * len(LAYOUTS[name].targets)


def test_a_base_in_float32_is_cast_before_the_merge_and_a_table_that_is_no_weight_is_left_out(
    written_shards, output, tmp_path
):
    folder = written_shards / "lora"
    base = shutil.copytree(folder / "original", tmp_path / "base")
    torch.manual_seed(2)
    state = {
        name: tensor.float() + torch.rand(tensor.shape) / 1000
        for name, tensor in written(base).items()
    }
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    expected = merged_by_peft(base, folder / "adapter")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    consolidate(folder / "shards", output, dtype="bfloat16", max_shard_size=GIGABYTE, base=base)
    assert_equal(written(output), expected)


def test_rank_stabilised_scaling_is_followed(written_shards, output, tmp_path):
    folder = written_shards / "lora"
    adapter = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    shards = shutil.copytree(folder / "shards", tmp_path / "shards")
    for path in (adapter / ADAPTER_CONFIG, shards / ADAPTER_CONFIG):
        path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": True}))
    consolidate(shards, output, dtype="bfloat16", max_shard_size=GIGABYTE, base=folder / "original")
    assert_equal(written(output), merged_by_peft(folder / "original", adapter))
    assert 24 / math.sqrt(4) != 24 / 4  # else the two scalings would be one


def refuse(shards: Path, base: Path | None, output: Path, message: str) -> None:
    with pytest.raises(StageFailure, match=message):
        consolidate(shards, output, dtype="bfloat16", max_shard_size=GIGABYTE, base=base)
    assert not list(output.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft_type": "IA3"},
            r"adapter_config\.json: peft_type = 'IA3' is not known here, only 'LORA'",
        ),
        ({"bias": "all"}, "bias = 'all' is not known here"),
        ({"use_dora": True}, "use_dora = True is not known here"),
        ({"rank_pattern": {"q_proj": 8}}, r"rank_pattern = \{'q_proj': 8\} is not known here"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern = .* is not known here"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True is not known here"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not known here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not known here"),
        ({"target_modules": "all-linear"}, "target_modules is 'all-linear'"),
        ({"use_dora": True, "bias": "all"}, "(?s)use_dora = True .*bias = 'all'"),
        (
            {"r": 0},
            r"adapter_config\.json is not the configuration of a LoRA adapter: ZeroDivisionError",
        ),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            r"lm_head\.weight is to be adapted \(target_modules\) and the shards hold nothing for "
            r"it",
        ),
    ],
)
def test_an_adapter_of_another_kind_is_refused(written_shards, output, tmp_path, changes, message):
    folder = written_shards / "lora"
    shards = shutil.copytree(folder / "shards", tmp_path / "shards")
    path = shards / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refuse(shards, folder / "original", output, message)


def test_an_adapter_without_its_configuration_is_refused(written_shards, output, tmp_path):
    shards = shutil.copytree(written_shards / "lora" / "shards", tmp_path / "shards")
    (shards / ADAPTER_CONFIG).unlink()
    refuse(
        shards,
        written_shards / "lora" / "original",
        output,
        r"adapter_config\.json is missing, and the shards hold an adapter",
    )


def test_an_adapter_needs_the_model_that_it_was_trained_on(written_shards, output, tmp_path):
    shards = written_shards / "lora" / "shards"
    refuse(
        shards,
        None,
        output,
        "holds an adapter, which is merged into the model that it was trained on",
    )
    refuse(shards, tmp_path / "nowhere", output, "nowhere holds no weights")
    refuse(
        shards,
        written_shards / "tp8_gqa" / "original",
        output,
        r"q_proj\.weight: its shape is \[64, 64\] in .*, its adapter has A \[4, 32\] and B \[32, "
        r"4\]",
    )


def test_a_module_that_the_base_lacks_is_refused(written_shards, output, tmp_path):
    base = shutil.copytree(written_shards / "lora" / "original", tmp_path / "base")
    state = written(base)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, base / "model.safetensors")
    refuse(
        written_shards / "lora" / "shards",
        base,
        output,
        r"model\.layers\.1\.mlp\.up_proj\.weight has an adapter and is not in .*base",
    )


def test_a_damaged_base_is_refused(written_shards, output, tmp_path):
    base = shutil.copytree(written_shards / "lora" / "original", tmp_path / "base")
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuse(
        written_shards / "lora" / "shards",
        base,
        output,
        r"(?s)Fetch it again.*model\.safetensors is damaged",
    )
