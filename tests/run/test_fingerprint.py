"""The code a stage runs, told apart from how it is written."""

from __future__ import annotations

import ast

import pytest

from stages.run.fingerprint import _meaning, code_of

BEFORE = '''
"""A module."""
def f(a, b):
    """Adds."""
    return a + b  # the sum
'''
SAME = """
def f(
    a,
    b,
):
    'Other words.'

    # another comment
    return (a +
            b)
"""


def meaning(text: str) -> str:
    return _meaning(ast.parse(text))


def test_comments_docstrings_and_formatting_mean_nothing() -> None:
    assert meaning(BEFORE) == meaning(SAME)


@pytest.mark.parametrize(
    "edit", [("a + b", "a - b"), ("a, b", "b, a"), ("def f", "def g"), ("a + b", "a + 'b'")]
)
def test_another_expression_means_something_else(edit: tuple[str, str]) -> None:
    assert meaning(BEFORE) != meaning(BEFORE.replace(*edit))


def test_a_stage_runs_its_script_what_it_imports_and_its_backend() -> None:
    train = code_of("train", "torch")
    assert {
        "stages/train.py",
        "stages/backends/torch/worker.py",
        "stages/backends/loss.py",
        "stages/model/base.py",
    } <= train.keys()
    assert "stages/backends/evaluate.py" not in train
    assert "stages/text/packing.py" not in train


def test_data_knows_no_backend() -> None:
    data = code_of("data", "torch")
    assert {
        "stages/text/prompt.py",
        "stages/text/packing.py",
        "stages/text/examples.py",
        "stages/text/tokens.py",
    } <= data.keys()
    assert not [path for path in data if "backends" in path]


def test_what_decides_when_a_stage_runs_is_not_what_it_runs() -> None:
    assert not [
        path
        for stage in ("data", "train", "eval")
        for path in code_of(stage, "torch")
        if path.startswith("stages/run")
    ]
