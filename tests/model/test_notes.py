"""What the data stage says about a model before anything is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.model.notes import model_notes
from stages.run.settings import Settings
from stages.text.tokens import TextTokenizer
from tests.text.tokenizer_kinds import llama


def notes(folder: Path, config: Any, generation: Any = None, **tokenizer: Any) -> list[str]:
    llama(folder)
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**saved, **tokenizer}))
    published = TextTokenizer.load(folder)
    return model_notes(replace(Settings(), model_id=str(folder)), published, published.eos)


@pytest.mark.parametrize(
    "config, generation, said",
    [
        (
            1,
            None,
            "config.json ends an answer at 1 ('<s>'). The model is trained to end one at 2",
        ),
        (
            2,
            1,
            "generation_config.json ends an answer at 1 ('<s>'). The model is trained to end one",
        ),
        ([2, 1], None, "config.json ends an answer at 2 ('</s>'), 1 ('<s>'). The model is"),
        (
            None,
            None,
            "config.json ends an answer at no token. The model is trained to end one",
        ),
        ("x", None, "config.json ends an answer at x (None). The model is trained to end one"),
        (10**30, None, "(None). The model is trained to end one at 2"),
    ],
)
def test_the_ends_of_an_answer_are_compared(
    tmp_path: Path, config: Any, generation: Any, said: str
) -> None:
    generation = None if generation is None else {"eos_token_id": generation}
    [note] = notes(tmp_path, {"eos_token_id": config}, generation)
    assert said in note and note.startswith(f"note: MODEL_ID={tmp_path}: ")


def test_where_all_agree_nothing_is_said(tmp_path: Path) -> None:
    assert notes(tmp_path, {"eos_token_id": 2}, {"eos_token_id": [2]}) == []


def test_the_end_that_a_chat_template_writes_is_compared_in_place_of_eos(tmp_path: Path) -> None:
    notes(tmp_path, {"eos_token_id": 1})
    tokenizer = TextTokenizer.load(tmp_path)
    assert model_notes(replace(Settings(), model_id=str(tmp_path)), tokenizer, 1) == []


@pytest.mark.parametrize("content", ["", "[]", "[[1]]"])
def test_a_config_that_cannot_be_read_is_left_to_the_stage_that_needs_it(
    tmp_path: Path, content: str
) -> None:
    notes(tmp_path, {})
    (tmp_path / "config.json").write_text(content)
    chosen = replace(Settings(), model_id=str(tmp_path))
    tokenizer = TextTokenizer.load(tmp_path)
    assert len(model_notes(chosen, tokenizer, tokenizer.eos)) <= 1
