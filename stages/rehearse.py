"""Rehearse a training: its first steps on a model cut in depth, compared with a CPU's, and every
later stage on what comes out.

The reference is computed twice by one process on this machine's CPU, in float32 and in bfloat16.
Then the same steps run as the settings say: their backend, device, processes and precision. Ends
with status 1 at the first step that deviates by more than bfloat16 explains.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stages.backends.schedule import sequences_per_step
from stages.run.backend import choose
from stages.run.cli import stage_command
from stages.run.cost import cost_of
from stages.run.errors import InputError, StageFailure, refuse
from stages.run.json_file import write_json
from stages.run.layout import RECORD_FILE
from stages.run.lock import locked
from stages.run.settings import Settings

FOLDER = "rehearsal"  # in outputs/RUN
QUESTION = "What is a rehearsal?"
# What the reference has, whatever the run's layout.
ALONE: dict[str, Any] = {
    "backend": "torch",
    "device": "cpu",
    "nproc_per_node": 1,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "per_device_train_batch_size": 1,
    "torch_compile": False,
    "zero_1": True,
}


@stage_command(
    "rehearse",
    *("REHEARSAL_STEPS", "REHEARSAL_LAYERS", "REHEARSAL_MINUTES"),
    publishes=False,
    data="Folder that data published.",
)
def main(settings: Settings, data: Path) -> None:
    rehearse(settings, data)


def rehearse(settings: Settings, data: Path) -> None:
    """Rehearse the run whose data stage published `data`, in the folder `rehearsal` beside it.

    Raises StageFailure at the first step that is out of band, InputError where a stage refuses.
    """
    from stages.backends.neuron.check import NOT_A_CPUS

    if choose(settings).name == "neuron":
        raise InputError(f"{NOT_A_CPUS} Rehearse with BACKEND=torch.")
    folder = data.parent / FOLDER
    with locked(folder, "rehearse"):
        run = in_small(settings, folder)
        _require_all(run)
        # Of another device or machine it would be up to date too, and is what is rehearsed here.
        shutil.rmtree(folder / "run", ignore_errors=True)
        _compare(settings, run, data, folder)
        _to_the_end(run, data, folder / "run")


def _compare(settings: Settings, run: Settings, data: Path, folder: Path) -> None:
    """Train the references and the run in `folder`; raises StageFailure where they differ."""
    from stages.backends.band import out_of_band, read_record, told
    from stages.backends.torch.record import RECORDS

    report_file, started = folder / "report.json", time.monotonic()
    report_file.unlink(missing_ok=True)
    alone = replace(run, **ALONE, gradient_accumulation_steps=sequences_per_step(run))
    trainings = {
        "float32": replace(alone, bf16=False),
        "bfloat16": replace(alone, bf16=True),
        "run": run,
    }
    records = {}
    for name, one in trainings.items():
        print(f"\nrehearsal: {name}, {_described(one)}", flush=True)
        seconds = 60 * settings.rehearsal_minutes / 2 if one is not run else math.inf
        if _has_more_time(folder / name / "train" / RECORD_FILE, run.max_steps, seconds):
            shutil.rmtree(folder / name)
        inputs = {"data": data, "precompile": folder / name}
        _stage("train", one, folder / name, inputs, {RECORDS: str(seconds)})
        records[name] = read_record(folder / name / "train" / RECORD_FILE)
    deviations = out_of_band(records["float32"], records["bfloat16"], records["run"])
    steps = min(map(len, records.values())) - 1
    if steps < settings.rehearsal_steps:
        print(f"rehearsal: {steps} steps in REHEARSAL_MINUTES={settings.rehearsal_minutes:g}")
    report = {
        "steps": steps,
        "tensors": len(records["run"][0]["weights"]),
        "out_of_band": [one._asdict() for one in deviations],
        **cost_of(time.monotonic() - started, settings),
    }
    write_json(report_file, report)
    if deviations:
        raise StageFailure(
            "\n".join(["The rehearsal is out of band. Nothing was trained.", *told(deviations)])
        )
    print(
        f"\nrehearsal: {steps} steps as on a CPU, {report['tensors']} tensors compared", flush=True
    )


def _require_all(run: Settings) -> None:
    """Raise InputError with what a stage of the rehearsal would refuse, before the CPU's hours."""
    from stages.backends.torch.train import device_problems
    from stages.checks import local_config, machine_problems, problems

    stages, asked = ("train", "consolidate", "compile-inference", "eval"), _asked(run)
    refuse(
        [
            *problems(asked, local_config(run.model_id), stages),
            *(machine_problems(asked, stages) or device_problems(asked)),
        ]
    )


def _has_more_time(record: Path, steps: int, seconds: float) -> bool:
    """Whether the reference that `record` is of ended early, and may now take longer."""
    from stages.backends.band import read_record

    if not record.is_file():
        return False
    before, *done = read_record(record)
    return len(done) < steps and before["seconds"] < seconds


def _asked(run: Settings) -> Settings:
    return replace(run, prompt=QUESTION, max_new_tokens=min(8, run.max_new_tokens))


def in_small(settings: Settings, folder: Path) -> Settings:
    """The settings of the run's first steps on its cut model, which is written to `folder`."""
    from stages.model.base import base_model_folder
    from stages.model.cut import cut_model

    model = folder / "model"
    whole = cut_model(base_model_folder(settings), settings.rehearsal_layers, model)
    dropout = ", without dropout" if settings.lora_r and settings.lora_dropout else ""
    print(
        f"rehearsal: {min(whole, settings.rehearsal_layers)} of {whole} layers, "
        f"{settings.rehearsal_steps} steps{dropout}",
        flush=True,
    )
    return replace(
        settings,
        model_id=str(model),
        init_weights="pretrained",
        max_steps=settings.rehearsal_steps,
        # Else a short rehearsal would end before the rate is worth comparing.
        warmup_steps=min(settings.warmup_steps, settings.rehearsal_steps // 2),
        gradient_accumulation_steps=1,
        lora_dropout=0.0,  # one process and many draw other numbers
        logging_steps=1,
        eval_steps=0,
        save_steps=0,
        rehearse=False,
        tracker="none",
        keep_shards=True,
    )


def _described(one: Settings) -> str:
    layout = f"{one.nproc_per_node} process{'es' if one.nproc_per_node > 1 else ''}"
    if one.tensor_parallel_size > 1:
        layout += f", tensor parallel {one.tensor_parallel_size}"
    return f"{layout}, BF16={int(one.bf16)}"


def _to_the_end(run: Settings, data: Path, folder: Path) -> None:
    """Consolidate, compile and ask the model that was trained in `folder`."""
    made = {name: folder / name for name in ("train", "consolidate", "compile-inference")}
    _stage("consolidate", run, folder, {"train": made["train"]})
    _stage("compile-inference", run, folder, {"consolidate": made["consolidate"]})
    inputs = {"data": data, **{name: made[name] for name in ("consolidate", "compile-inference")}}
    _stage("eval", _asked(run), folder, inputs)
    print("rehearsal: consolidated, compiled and asked", flush=True)


def _stage(
    stage: str,
    settings: Settings,
    folder: Path,
    inputs: dict[str, Path],
    more: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run a stage's script, which publishes below `folder` unless it is up to date there."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"stages.{stage.replace('-', '_')}"]
    for name, path in inputs.items():
        command += [f"--{name}", str(path)]
    ended = subprocess.run(
        [*command, "--output", str(folder / stage)],
        env={**os.environ, **settings.environment(), **more},
    )
    if ended.returncode == InputError.exit_status:
        raise InputError(
            f"The rehearsal's {stage} refuses its settings or this machine, see above."
        )
    if ended.returncode:
        raise StageFailure(f"The rehearsal's {stage} failed, see above.")


if __name__ == "__main__":
    main()
