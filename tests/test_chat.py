"""`make chat`: a conversation with its history; neither Ctrl-C nor a long message ends it."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.chat import talk
from stages.run.contract import Generation
from stages.run.settings import Settings
from stages.text.answer import Answerer
from stages.text.prompt import TextFormat
from stages.text.tokens import TextTokenizer
from tests.conftest import ROOT, clean_environment


class Repeats:
    """A model that answers with how many tokens it was asked, and keeps what it was asked."""

    batch_size = 1

    def __init__(self, tokenizer: TextTokenizer, length: int, interrupted: bool = False):
        self.sequence_length, self.tokenizer = length, tokenizer
        self.interrupted = interrupted
        self.asked: list[str] = []

    def generate(self, prompts: list[list[int]], **_: object) -> Generation:
        return Generation(self._steps(prompts), [0.0])

    def _steps(self, prompts: list[list[int]]) -> Iterator[list[int | None]]:
        self.asked.append(self.tokenizer.decode(prompts[0]))
        [answer] = self.tokenizer.encode_after(["\n"], [f"answer {len(self.asked)}"])
        for id in answer.ids or []:
            yield [id]
        if self.interrupted:
            raise KeyboardInterrupt


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = TextTokenizer.load(ROOT / "data/demo/model")
    tokenizer.save(tmp_path)
    TextFormat(tokenizer).save(tmp_path)
    return tmp_path


def conversation(
    folder: Path,
    typed: str,
    monkeypatch: pytest.MonkeyPatch,
    length: int = 512,
    interrupted: bool = False,
) -> Repeats:
    model = Repeats(TextTokenizer.load(folder), length, interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    talk(Answerer(folder, lambda _: model, Settings(max_new_tokens=64)))
    return model


def test_a_later_message_is_asked_with_those_before_it(folder, monkeypatch, capsys) -> None:
    model = conversation(folder, "Hello\n\nAnd now?\n", monkeypatch)
    assert capsys.readouterr().out.splitlines()[:2] == ["answer 1", "answer 2"]
    assert model.asked[1] == (
        "### Instruction\nHello\n\n### Answer\nanswer 1### Instruction\nAnd now?\n\n### Answer\n"
    )


def test_new_and_system_begin_another_conversation(folder, monkeypatch) -> None:
    model = conversation(folder, "Hello\n/new\nAgain\n/system Be brief.\nNow\n", monkeypatch)
    assert model.asked[1:] == [
        "### Instruction\nAgain\n\n### Answer\n",
        "### Instruction\nNow\n\n### Context\nBe brief.\n\n### Answer\n",
    ]


def test_the_oldest_messages_are_left_out_where_all_do_not_fit(folder, monkeypatch, capsys) -> None:
    model = conversation(folder, "One\nTwo\nThree\n", monkeypatch, length=64)
    assert "no longer fit and are left out" in capsys.readouterr().out
    assert "One" not in model.asked[2] and "Three" in model.asked[2]


def test_a_message_that_is_too_long_is_said_and_forgotten(folder, monkeypatch, capsys) -> None:
    model = conversation(folder, "word " * 100 + "\nTwo\n", monkeypatch, length=64)
    assert "The message has" in capsys.readouterr().out
    assert model.asked == ["### Instruction\nTwo\n\n### Answer\n"]


def test_an_interrupted_answer_is_kept_as_far_as_it_was_said(folder, monkeypatch, capsys) -> None:
    model = conversation(folder, "Hello\nAnd now?\n", monkeypatch, interrupted=True)
    assert "answer 1 [stopped]" in capsys.readouterr().out
    assert "answer 1### Instruction\nAnd now?" in model.asked[1]


def test_help_starts_without_the_heavy_libraries() -> None:
    code = """
import sys
from stages.chat import main
try:
    main(["--help"])
finally:
    assert not {"torch", "transformers", "datasets"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--compile-inference" in done.stdout, done.stderr
