"""A tiny Llama compiled by optimum-neuron's own export over fakes for AWS's wheels
(neuron_inference/README.md)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from stages.run.fingerprint import ROOT
from tests.tiny_llama import tiny_llama

FAKES = Path(__file__).parent / "neuron_inference"
LENGTH, VOCAB = 48, 128


def llama() -> LlamaForCausalLM:
    """Its weights are wide enough that greedy answers are not one id repeated."""
    return tiny_llama(vocab_size=VOCAB, hidden_size=64, initializer_range=0.2)


def save_llama(folder: Path, dtype: torch.dtype) -> Path:
    llama().to(dtype).save_pretrained(folder)
    return folder


def python_with_fakes(
    *arguments: str, standard_input: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run this Python from the project's folder with the fakes to import; AssertionError with
    its output when it fails."""
    paths = {"PYTHONPATH": os.pathsep.join([str(FAKES), str(ROOT)]), "HF_HUB_OFFLINE": "1"}
    command, given = [sys.executable, *arguments], {**os.environ, **paths, **environment}
    done = subprocess.run(
        command, cwd=ROOT, env=given, input=standard_input, capture_output=True, text=True
    )
    if done.returncode:
        raise AssertionError(
            f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return done


def compile_on_cpu(model: Path, output: Path, batch_size: int) -> Path:
    """The process that compile-inference starts, for one trn1 core; here in float32 too, to compare
    with transformers exactly."""
    sizes = [
        "--instance-type",
        "trn1",
        "--batch-size",
        str(batch_size),
        "--sequence-length",
        str(LENGTH),
        "--tensor-parallel-size",
        "1",
    ]
    command = [
        "-m",
        "stages.backends.neuron.export",
        "--model",
        str(model),
        "--output",
        str(output),
        *sizes,
    ]
    command += ["--error-file", str(output.with_name("error"))]
    scratch = f"{output.with_name('graphs')}/"
    python_with_fakes(
        *command, NEURON_PLATFORM_TARGET_OVERRIDE="trn1", BASE_COMPILE_WORK_DIR=scratch
    )
    return output
