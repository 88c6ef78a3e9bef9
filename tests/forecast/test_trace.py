"""The arithmetic of activations and logits against a traced step of the real worker."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stages.forecast import traced
from stages.forecast.machine import place_of
from stages.forecast.memory import training_memory
from stages.forecast.parameters import shape_of
from stages.forecast.traced import traced_bytes
from stages.model.fit import raw_config
from stages.run.settings import Settings
from tests.conftest import ROOT, clean_environment

MODEL = {
    "model_type": "llama",
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def test_a_trace_is_made_once_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(traced, "TRACES", tmp_path / "traces")
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    run = Settings(device="cpu", max_length=512, per_device_train_batch_size=2)
    place = place_of(run)
    assert traced_bytes(run, tmp_path, place) is None
    found = traced_bytes(run, tmp_path, place, make=True)
    shape = shape_of(raw_config(MODEL))
    assert shape is not None and found is not None
    parts = {part.name: part.bytes for part in training_memory(shape, run, "cpu").parts}
    assert found == pytest.approx(parts["activations"] + parts["logits"], rel=0.05)
    need = training_memory(shape, run, "cpu", found)
    assert found in [part.bytes for part in need.parts]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("traced again"))
    assert traced_bytes(run, tmp_path, place, make=True) == found
    assert traced_bytes(replace(run, max_length=1024), tmp_path, place) is None
    assert traced_bytes(replace(run, lora_r=4), tmp_path, place, make=True) is None


@pytest.mark.parametrize("bf16", ["1", "0"], ids=["bfloat16", "float32"])
def test_activations_and_logits_are_those_of_a_traced_step(tmp_path: Path, bf16: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    given = {"MAX_LENGTH": "1024", "PER_DEVICE_TRAIN_BATCH_SIZE": "2", "BF16": bf16}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "stages.forecast.trace", str(tmp_path)),
            *(f"{name}={value}" for name, value in given.items()),
        ],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak = {
        name.removeprefix("_MemRefType."): count
        for name, count in json.loads(done.stdout.splitlines()[-1])["bytes"].items()
    }
    shape = shape_of(raw_config(MODEL))
    assert shape is not None
    need = training_memory(shape, Settings.read(given), "cpu")
    assert need.moment == "when the backward pass begins" and not peak["GRAD"]
    parts = {part.name: part.bytes for part in need.parts}
    assert parts["master weights"] + parts["weights"] == pytest.approx(peak["PARAM"], rel=0.001)
    assert parts["optimizer"] == pytest.approx(peak["OPT"], rel=0.001)
    kept = peak["ACT"] + peak["TEMP"]
    assert parts["activations"] + parts["logits"] == pytest.approx(kept, rel=0.05)
