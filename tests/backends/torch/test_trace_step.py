"""A step of Llama 3.1 8B and Qwen3 8B, in full width, on one of 64 pretended ranks of a
trn2.48xlarge (stages/forecast/trace.py): what a compiler with fixed shapes is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, clean_environment
from tests.run.test_recipes import KEYS, MODELS

LAYERS = 2  # of 32 and 36: a layer more asks for nothing new
OPERATORS = Path(__file__).with_name("operators.txt")


def traced(folder: Path, recipe: str, *settings: str, layers: int = LAYERS) -> dict[str, Any]:
    config = dict(zip(KEYS, MODELS[recipe][0], strict=True)) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(
        json.dumps({**config, "rms_norm_eps": 1e-5, "hidden_act": "silu"})
    )
    command = [sys.executable, "-m", "stages.forecast.trace", str(folder)]
    given = ("BACKEND=torch", "DEVICE=neuron", "NPROC_PER_NODE=64", "MAX_LENGTH=2048")
    done = subprocess.run(
        [*command, *given, *settings],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("recipe", "parallel"), [("llama3.1-8b", "8"), ("qwen3-8b", "4")], ids=["llama", "qwen3"]
)
def test_a_step_has_fixed_shapes_and_the_operators_that_are_known(
    tmp_path: Path, recipe: str, parallel: str
) -> None:
    """A new operator may be one that the compiler lacks: look it up, then add it to the list."""
    step = traced(tmp_path, recipe, f"TENSOR_PARALLEL_SIZE={parallel}")
    assert step["operators"] == OPERATORS.read_text().split("\n")[:-1]
    assert step["of_values"] == []
