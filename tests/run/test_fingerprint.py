"""The code a stage runs, told apart from how it is written."""

from __future__ import annotations

import ast

import pytest

from stages.run.fingerprint import CANNOT_SHAPE_OUTPUT, ROOT, _meaning, code_of
from stages.run.provenance import REQUIREMENTS as BACKENDS
from stages.run.setting import STAGES

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


def test_what_decides_when_a_stage_runs_does_not_make_it_stale() -> None:
    code = {path for stage in STAGES for path in code_of(stage, "torch")}
    assert "stages/run/sizes.py" in code  # consolidate divides its files by it
    assert "stages/run/layout.py" in code
    assert not code & {"stages/run/publish.py", "stages/run/provenance.py", "stages/run/cli.py"}


def test_every_module_is_fingerprinted_or_listed_as_unable_to_shape_an_output() -> None:
    """A new module is fingerprinted where a stage imports it; one that none does must be listed."""
    code = {path for stage in STAGES for name in BACKENDS for path in code_of(stage, name)}
    modules = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "stages").rglob("*.py")
        if ast.parse(path.read_text()).body[1:]  # else a docstring only: a package's __init__
    }
    listed = {name.replace(".", "/") + ".py" for name in CANNOT_SHAPE_OUTPUT}
    assert listed <= modules
    assert not code & listed
    assert modules - code - listed == set()


@pytest.mark.parametrize(
    "edit",
    [
        ('print("done")', 'print("ready", flush=True)'),
        ('raise InputError("bad")', 'raise InputError(f"bad {a}. Set it.")'),
        ('"""Adds."""', ""),
    ],
)
def test_what_is_only_said_to_the_user_means_nothing(edit: tuple[str, str]) -> None:
    text = (
        'def f(a):\n    """Adds."""\n    print("done")\n    if a:\n        raise '
        'InputError("bad")\n'
    )
    assert edit[0] in text
    assert meaning(text) == meaning(text.replace(*edit))


def test_another_error_means_something_else() -> None:
    assert meaning('raise InputError("x")') != meaning('raise StageFailure("x")')
