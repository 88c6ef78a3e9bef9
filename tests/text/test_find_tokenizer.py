"""The tokenizer of MODEL_ID: converted where it must be, refused with the reason and a remedy."""

from __future__ import annotations

import json

import pytest

from stages.run.errors import InputError
from stages.text.find_tokenizer import find_tokenizer
from tests.text.conversations import text_ids
from tests.text.tokenizer_kinds import llama3


def test_a_model_without_tokenizer_json_is_converted(folders, tmp_path):
    """vocab.json and merges.txt alone, as old GPT-2 folders have them."""
    model = json.loads((folders["byte_level"] / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(
        json.dumps({**model["vocab"], "<|endoftext|>": len(model["vocab"])})
    )
    (tmp_path / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]) + "\n"
    )
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = find_tokenizer(str(tmp_path))
    assert tokenizer.decode(text_ids(tokenizer, "the cat sat")) == "the cat sat"


def test_a_tokenizer_that_transformers_5_saved_is_published_so_that_version_4_loads_it(
    tmp_path, capsys
):
    from transformers import AutoTokenizer

    llama3(tmp_path / "model")
    config = tmp_path / "model" / "tokenizer_config.json"
    of_5 = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|end_of_text|>"]}
    config.write_text(json.dumps({**json.loads(config.read_text()), **of_5}))
    tokenizer = find_tokenizer(str(tmp_path / "model"))
    assert "transformers 5 wrote" in capsys.readouterr().out
    tokenizer.save(tmp_path / "saved")
    published = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert published.eos_token_id == tokenizer.eos
    assert published("Why?").input_ids == text_ids(tokenizer, "Why?")
    assert published.additional_special_tokens == ["<|end_of_text|>"]


def test_a_tokenizer_model_alone_is_refused_with_the_reason_and_a_remedy(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"only a tokenizer\.model.*sentencepiece.*convert it"):
        find_tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"no tokenizer\.json, and nothing to make one of"):
        find_tokenizer(str(tmp_path))


def test_why_files_give_no_tokenizer_is_never_left_empty(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("\n()")

    (tmp_path / "vocab.json").write_text("{}")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(InputError, match=r"give no tokenizer \(ValueError\)\. Name a model"):
        find_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "settings_of, message",
    [
        ({}, "no end-of-sequence token"),
        ({"eos_token": None}, "no end-of-sequence token"),
        ({"eos_token": "<|nowhere|>"}, "not in its vocabulary"),
    ],
)
def test_a_tokenizer_without_eos_is_refused_with_a_remedy(folders, tmp_path, settings_of, message):
    (tmp_path / "tokenizer.json").write_bytes(
        (folders["byte_level"] / "tokenizer.json").read_bytes()
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_of))
    with pytest.raises(InputError, match=message):
        find_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff\xfe"])
def test_a_damaged_tokenizer_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        find_tokenizer(str(tmp_path))


def test_a_model_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"does not exist\. Name a folder"):
        find_tokenizer(str(tmp_path / "nowhere"))


def test_what_only_autotokenizer_does_is_switched_off_and_said(tmp_path, capsys):
    config = llama3(tmp_path) / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "add_eos_token": True}))
    published = json.loads(find_tokenizer(str(tmp_path)).files["tokenizer_config.json"])
    assert published["clean_up_tokenization_spaces"] is published["add_eos_token"] is False
    said = capsys.readouterr().out
    assert "published with clean_up_tokenization_spaces false, add_eos_token false" in said


def test_a_tokenizer_of_no_models_own_class_gives_generate_only_what_models_take(
    folders, tmp_path, capsys
):
    (tmp_path / "tokenizer.json").write_bytes((folders["gpt2"] / "tokenizer.json").read_bytes())
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    files = find_tokenizer(str(tmp_path)).files
    published = json.loads(files["tokenizer_config.json"])
    assert published["model_input_names"] == ["input_ids", "attention_mask"]
    assert "published with model_input_names" in capsys.readouterr().out
    (tmp_path / "tokenizer_config.json").write_bytes(files["tokenizer_config.json"])
    find_tokenizer(str(tmp_path))
    assert not capsys.readouterr().out
