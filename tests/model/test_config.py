"""config.json has one meaning, whichever version of transformers wrote it, and nothing in it is
dropped without a word."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GraniteConfig, LlamaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stages.model import base
from stages.model.base import base_config, base_model_folder, config_notes
from stages.model.check import pretrained_config
from stages.model.config import GENERATION_KEYS, translated
from stages.run.errors import InputError, StageFailure
from stages.run.settings import Settings

THETAS = st.sampled_from([10000.0, 500000.0, 1e6, 5e5])
SCALINGS = st.one_of(
    st.just({"rope_type": "default"}),
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": st.floats(1, 32)}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": st.floats(1, 32),
            "low_freq_factor": st.just(1.0),
            "high_freq_factor": st.just(4.0),
            "original_max_position_embeddings": st.sampled_from([256, 512]),
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "factor": st.floats(2, 32),
            "original_max_position_embeddings": st.sampled_from([256, 512]),
        }
    ),
)


def version_4(folder: Path, **changes: Any) -> dict[str, Any]:
    """The tiny Llama's config.json with other values."""
    return {**json.loads((folder / "config.json").read_text()), **changes}


def version_5(theta: float, scaling: dict[str, Any], **config: Any) -> dict[str, Any]:
    """As transformers 5 writes it: RoPE in a key of its own."""
    former = ("rope_theta", "rope_scaling")
    kept = {name: value for name, value in config.items() if name not in former}
    return {**kept, "rope_parameters": {"rope_theta": theta, **scaling}}


def write(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def frequencies(config: Any) -> torch.Tensor:
    kind = (config.rope_scaling or {}).get("rope_type", "default")
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]


@settings(deadline=None)
@given(theta=THETAS, scaling=SCALINGS)
def test_rope_of_version_5_has_the_frequencies_that_version_4_would_be_told(
    theta: float, scaling: dict[str, Any]
) -> None:
    sizes = {"max_position_embeddings": 2048, "hidden_size": 64, "num_attention_heads": 4}
    told = LlamaConfig(**sizes, rope_theta=theta, rope_scaling=dict(scaling))
    read = LlamaConfig(**translated(version_5(theta, scaling, **sizes))[0])
    assert torch.equal(frequencies(read), frequencies(told))
    assert not hasattr(read, "rope_parameters")


@given(theta=THETAS, scaling=SCALINGS)
def test_a_translated_config_is_translated_to_itself(theta: float, scaling: dict) -> None:
    values, lines = translated(version_5(theta, scaling, model_type="llama"))
    assert translated(values) == (values, []) and len(lines) == 1


@pytest.mark.parametrize("kind", [LlamaConfig, GraniteConfig, Qwen3Config])
def test_what_version_4_writes_itself_is_read_without_a_word(tmp_path: Path, kind: Any) -> None:
    kind(rope_theta=5e5).save_pretrained(tmp_path)
    assert config_notes(tmp_path) == []


def test_every_reader_gets_the_translated_config_beside_the_same_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(base, "MADE_MODELS", tmp_path / "made")
    write(folder, version_5(500000.0, {"rope_type": "default"}, **version_4(folder)))
    chosen = replace(Settings(), model_id=str(folder))
    made = base_model_folder(chosen)
    assert "rope_theta 500000.0" in capsys.readouterr().out
    assert AutoConfig.from_pretrained(made).rope_theta == 500000.0
    assert "rope_parameters" not in json.loads((made / "config.json").read_text())
    assert (made / "model.safetensors").samefile(folder / "model.safetensors")
    assert base_model_folder(chosen) == made


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 5e5}},
            r"rope_theta is 10000\.0, and rope_parameters says 500000\.0\. Remove the one",
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            r"rope_scaling is .*2\.0.*rope_parameters says .*4\.0",
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default"},
            },
            r"rope_scaling is .*rope_parameters says null",
        ),
        (
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}},
            r"full_attention, sliding_attention a RoPE each.*Choose a model",
        ),
    ],
)
def test_two_truths_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(StageFailure, match=message):
        translated(config)


def test_one_truth_in_two_spellings_is_read() -> None:
    rope = {"type": "linear", "factor": 2.0}
    both = {
        "rope_theta": 5e5,
        "rope_scaling": rope,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
    }
    values, _ = translated(both)
    assert values["rope_theta"] == 5e5 and values["rope_scaling"]["factor"] == 2.0
    assert "rope_parameters" not in values
    inside, _ = translated({"rope_scaling": {**rope, "rope_theta": 5e5}})
    assert inside == {"rope_scaling": rope, "rope_theta": 5e5}


@settings(deadline=None, max_examples=30)
@given(
    names=st.sets(
        st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12).filter(
            lambda name: not hasattr(LlamaConfig(), name)
        ),
        min_size=1,
    )
)
def test_every_key_that_the_architecture_does_not_use_is_named(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("model")
    write(folder, {"model_type": "llama", **dict.fromkeys(sorted(names), 1)})
    [note] = config_notes(folder)
    assert note == f"config.json, {', '.join(sorted(names))}: not used by a llama."


def test_rope_for_a_part_of_each_head_is_refused_where_the_architecture_has_none(
    folder: Path,
) -> None:
    rope = {"rope_type": "default", "partial_rotary_factor": 0.5}
    write(folder, version_5(1e4, rope, **version_4(folder)))
    with pytest.raises(StageFailure, match=r"partial_rotary_factor is 0\.5, and a llama"):
        pretrained_config(folder)
    write(folder, version_5(1e4, {**rope, "partial_rotary_factor": 1.0}, **version_4(folder)))
    assert len(config_notes(folder)) <= 1


def test_the_keys_of_generation_are_those_of_transformers() -> None:
    assert set(GENERATION_KEYS) == set(LlamaConfig()._get_global_generation_defaults())


ODD: dict[str, tuple[dict[str, Any], str, tuple[str, Any]]] = {
    "no padding token": (
        {"pad_token_id": -1},
        "pad_token_id -1: read as none",
        ("pad_token_id", None),
    ),
    "a number as text": (
        {"rope_theta": "20000.0"},
        'rope_theta is the text "20000.0"',
        ("rope_theta", 20000.0),
    ),
    "a size as text": (
        {"num_hidden_layers": "2"},
        "read as the number 2",
        ("num_hidden_layers", 2),
    ),
    "settings of generation": (
        {"temperature": 0.9, "top_p": 0.6, "max_length": 4096},
        "max_length, temperature, top_p: settings of generation",
        ("temperature", 1.0),
    ),
}


@pytest.mark.parametrize("weights", ["random", "pretrained"])
@pytest.mark.parametrize(("changes", "said", "read"), ODD.values(), ids=ODD)
def test_what_old_configs_hold_is_read_and_said(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    weights: str,
    changes: dict[str, Any],
    said: str,
    read: tuple[str, Any],
) -> None:
    monkeypatch.setattr(base, "MADE_MODELS", tmp_path / "made")
    (folder / "generation_config.json").unlink()
    write(folder, version_4(folder, **changes))
    chosen = replace(Settings(), model_id=str(folder), init_weights=weights)
    made = base_model_folder(chosen)
    assert said in capsys.readouterr().out
    assert getattr(pretrained_config(made), read[0]) == read[1]
    AutoModelForCausalLM.from_pretrained(made).save_pretrained(tmp_path / "again")


def test_settings_of_generation_move_to_their_own_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "MADE_MODELS", tmp_path / "made")
    (folder / "generation_config.json").unlink()
    write(folder, version_4(folder, temperature=0.9, max_length=4096))
    made = base_model_folder(replace(Settings(), model_id=str(folder)))
    generation = json.loads((made / "generation_config.json").read_text())
    assert generation == {"max_length": 4096, "temperature": 0.9, "do_sample": True}


def test_a_generation_config_that_cannot_be_published_is_refused_before_training(
    folder: Path,
) -> None:
    (folder / "generation_config.json").write_text("[")
    with pytest.raises(InputError, match=r"generation_config\.json cannot be used"):
        base_model_folder(replace(Settings(), model_id=str(folder)))


def test_the_caller_keeps_what_it_gave() -> None:
    given = {"rope_parameters": {"rope_theta": "5e5", "factor": "2", "rope_type": "linear"}}
    values, lines = translated(given)
    assert given == {"rope_parameters": {"rope_theta": "5e5", "factor": "2", "rope_type": "linear"}}
    assert values["rope_theta"] == 5e5 and values["rope_scaling"]["factor"] == 2
    assert len(lines) == 3


def test_doctor_and_training_read_the_same(folder: Path) -> None:
    write(folder, version_5(5e5, {"rope_type": "default"}, **version_4(folder)))
    assert base_config(replace(Settings(), model_id=str(folder))).rope_theta == 5e5
