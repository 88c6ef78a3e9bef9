"""An edit that changes what a stage publishes makes it stale; an edit of what it says does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from stages.run import fingerprint
from stages.run.setting import STAGES
from tests.conftest import ROOT

# file, what is edited, the edit, and the stages (torch backend) that publish something else.
CHANGES = [
    ("stages/run/sizes.py", '"GB": 10**9', '"GB": 2**20', {"consolidate"}),
    ("stages/run/layout.py", '"tokenizer.model",', "", {"data", "compile-inference"}),
    ("stages/run/layout.py", "IGNORED_LABEL = -100", "IGNORED_LABEL = -1", {"data", "train"}),
    ("stages/run/digests.py", 'startswith(".")', 'startswith("_")', {"compile-inference"}),
    ("stages/text/text_template.py", "### Answer\n", "### Response\n", {"data", "eval"}),
    ("stages/text/prompt.py", "text.isspace()", "False", {"data", "eval"}),
    ("stages/text/columns.py", '("context", "input")', '("context",)', {"data", "eval"}),
    ("stages/text/conversation.py", '"human", "prompter"', '"human"', {"data", "eval"}),
    ("stages/text/pieces.py", "piece.answer != texts[0].answer", "False", {"data", "eval"}),
    (
        "stages/text/chat_parts.py",
        "add_generation_prompt=ask",
        "add_generation_prompt=True",
        {"data", "eval"},
    ),
    ("stages/text/packing.py", 'kind="stable"', 'kind="quicksort"', {"data"}),
    ("stages/text/packing.py", "ends[-1]) // capacity", "ends[-1] - 1) // capacity", {"data"}),
    ("stages/text/documents.py", "digest_size=8", "digest_size=4", {"data"}),
    ("stages/text/sequences.py", 'loss_on == "response"', 'loss_on == "all"', {"data"}),
    (
        "stages/text/tokens.py",
        "encode_special_tokens = True",
        "encode_special_tokens = False",
        {"data", "eval"},
    ),
    ("stages/backends/schedule.py", "math.ceil", "math.floor", {"train", "precompile"}),
    ("stages/backends/batches.py", "[seed, epoch]", "[epoch, seed]", {"train"}),
    ("stages/backends/loss.py", "[:, 1:] == 0", "[:, 1:] == 1", {"train", "eval"}),
    ("stages/backends/torch/optimizer.py", "p.ndim >= 2", "p.ndim >= 1", {"train"}),
    ("stages/backends/torch/optimizer.py", "0.5 * (1.0", "0.4 * (1.0", {"train"}),
    ("stages/backends/torch/parallel.py", "torch.bfloat16", "torch.float16", {"train"}),
    (
        "stages/backends/torch/consolidate.py",
        "part.start[0] + part.shape[0]",
        "part.shape[0]",
        {"consolidate"},
    ),
    ("stages/model/weights.py", "len(_header([])) + 8", "len(_header([]))", {"consolidate"}),
    ("stages/model/base.py", "torch.manual_seed(settings.seed)", "torch.manual_seed(0)", {"train"}),
    (
        "stages/backends/torch/export.py",
        "is_causal=mask is None",
        "is_causal=False",
        {"compile-inference"},
    ),
    ("stages/backends/torch/int8.py", "LARGEST = 127", "LARGEST = 63", {"compile-inference"}),
    ("stages/backends/decoding.py", "before >= top_p", "before > top_p", {"eval"}),
    ("stages/eval.py", "math.exp(loss)", "math.exp2(loss)", {"eval"}),
]
WORDS = [
    ("stages/run/progress.py", " left", " to go"),
    ("stages/run/errors.py", '"\\n".join', '" ".join'),
    ("stages/run/disk.py", "the disk is full", "there is no space"),
    ("stages/run/publish.py", "up to date", "fresh"),
    ("stages/run/settings.py", "Peak learning rate", "Largest learning rate"),
    ("stages/run/setting.py", "is neither 1 nor 0", "is no switch"),
    ("stages/make/stale.py", "to run: ", "stale: "),
    ("stages/data.py", "a sample of", "one sample of"),
    ("stages/eval.py", "No document is held out", "Nothing is held out"),
]


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the code, which is what is fingerprinted."""
    shutil.copytree(ROOT / "stages", tmp_path / "stages")
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    return tmp_path


def stale(code: Path, file: str, old: str, new: str) -> set[str]:
    """The stages whose fingerprint an edit changes."""
    before = {stage: fingerprint.code_of(stage, "torch") for stage in STAGES}
    text = (code / file).read_text()
    assert old in text
    (code / file).write_text(text.replace(old, new, 1))
    return {stage for stage in STAGES if fingerprint.code_of(stage, "torch") != before[stage]}


@pytest.mark.parametrize(("file", "old", "new", "stages"), CHANGES)
def test_an_edit_that_changes_an_output_makes_its_stage_stale(
    code: Path, file: str, old: str, new: str, stages: set[str]
) -> None:
    assert stages <= stale(code, file, old, new)


@pytest.mark.parametrize(("file", "old", "new"), WORDS)
def test_an_edit_of_what_is_said_makes_nothing_stale(
    code: Path, file: str, old: str, new: str
) -> None:
    assert stale(code, file, old, new) == set()
