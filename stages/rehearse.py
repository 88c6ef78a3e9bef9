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
from typing import TYPE_CHECKING, Any

from stages.backends.schedule import sequences_per_step
from stages.run.backend import choose
from stages.run.cli import stage_command
from stages.run.cost import cost_of
from stages.run.errors import InputError, StageFailure, refuse
from stages.run.json_file import write_json
from stages.run.layout import RECORD_FILE, REHEARSAL_FOLDER, REHEARSAL_REPORT
from stages.run.lock import locked
from stages.run.settings import Settings

if TYPE_CHECKING:
    from stages.backends.band import Deviation

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
    folder, started = data.parent / REHEARSAL_FOLDER, time.monotonic()
    with locked(folder, "rehearse"):
        run = in_small(settings, folder)
        _require_all(run)
        # Of another device or machine it would be up to date too, and is what is rehearsed here.
        shutil.rmtree(folder / "run", ignore_errors=True)
        (folder / REHEARSAL_REPORT).unlink(missing_ok=True)
        reference, facts, deviations = _compare(settings, run, data, folder)
        if not deviations:
            published = _consolidate(run, folder / "run")
            deviations = _compare_published(run, facts, reference, published)
        cost = cost_of(time.monotonic() - started, settings)
        out = [one._asdict() for one in deviations]
        write_json(folder / REHEARSAL_REPORT, {**facts, "out_of_band": out, **cost})
        if deviations:
            from stages.backends.band import told

            lines = ["The rehearsal is out of band. Nothing was trained.", *told(deviations)]
            raise StageFailure("\n".join(lines))
        print(
            f"\nrehearsal: {facts['steps']} steps as on a CPU, {facts['tensors']} tensors compared",
            flush=True,
        )
        _to_the_end(run, data, folder / "run")


def _compare(
    settings: Settings, run: Settings, data: Path, folder: Path
) -> tuple[Path, dict[str, Any], list[Deviation]]:
    """Train the references and the run in `folder`. Gives the folder of the reference in float32,
    what was compared, and what is out of band in the first step that has anything."""
    from stages.backends.band import out_of_band, read_record
    from stages.backends.record import RECORDS, TOGETHER

    alone = replace(run, **ALONE, gradient_accumulation_steps=sequences_per_step(run))
    together = choose(run).name == "neuron"  # optimum-neuron lets documents see each other
    names = [f"{dtype}{'-together' * together}" for dtype in ("float32", "bfloat16")]
    seconds = 60 * settings.rehearsal_minutes / 2
    records = []
    for name, bf16 in zip(names, (False, True), strict=True):
        if _has_more_time(folder / name / "train" / RECORD_FILE, run.max_steps, seconds):
            shutil.rmtree(folder / name)
        more = {RECORDS: str(seconds), **({TOGETHER: "1"} if together else {})}
        _train(name, replace(alone, bf16=bf16), data, folder / name, more)
        records.append(read_record(folder / name / "train" / RECORD_FILE))
    _train("run", run, data, folder / "run", {RECORDS: str(math.inf)})
    records.append(read_record(folder / "run" / "train" / RECORD_FILE))
    steps = min(map(len, records)) - 1
    if steps < settings.rehearsal_steps:
        print(f"rehearsal: {steps} steps in REHEARSAL_MINUTES={settings.rehearsal_minutes:g}")
    # Of the device's tensors, some may have no counterpart by name (optimum-neuron).
    compared = records[0][1]["gradients"].keys() & records[-1][1]["gradients"].keys()
    facts = {"steps": steps, "tensors": len(compared)}
    return folder / names[0], facts, out_of_band(*records)


def _train(name: str, one: Settings, data: Path, folder: Path, more: Mapping[str, str]) -> None:
    print(f"\nrehearsal: {name}, {_described(one)}", flush=True)
    _stage("train", one, folder, {"data": data, "precompile": folder}, more)


def _consolidate(one: Settings, folder: Path) -> Path:
    """The folder of the model that was trained in `folder`."""
    _stage("consolidate", one, folder, {"train": folder / "train"})
    return folder / "consolidate"


def _compare_published(
    run: Settings, facts: Mapping[str, Any], reference: Path, published: Path
) -> list[Deviation]:
    """The consolidated weights in `published` that are not those of the `reference`, where that was
    trained for as many steps."""
    from stages.backends.band import published_out_of_band
    from stages.backends.record import digests_of

    if facts["steps"] < run.max_steps:
        print("rehearsal: the published weights have more steps than the CPU's: not compared")
        return []
    alone = replace(run, **ALONE, bf16=False)
    expected = _consolidate(alone, reference)
    return published_out_of_band(facts["steps"], digests_of(expected), digests_of(published))


def _require_all(run: Settings) -> None:
    """Raise InputError with what a stage of the rehearsal would refuse, before the CPU's hours."""
    from stages.backends.torch.train import device_problems
    from stages.checks import local_config, machine_problems, problems

    stages, asked = ("train", "consolidate", "compile-inference", "eval"), _asked(run)
    refuse(
        [
            *problems(replace(asked, rehearse=True), local_config(run.model_id), stages),
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
        budget=0.0,  # its own time is the run's, and counted there
        deadline="",
    )


def _described(one: Settings) -> str:
    layout = f"{one.nproc_per_node} process{'es' if one.nproc_per_node > 1 else ''}"
    if one.tensor_parallel_size > 1:
        layout += f", tensor parallel {one.tensor_parallel_size}"
    return f"{layout}, BF16={int(one.bf16)}"


def _to_the_end(run: Settings, data: Path, folder: Path) -> None:
    """Compile and ask the model that was consolidated in `folder`."""
    made = {name: folder / name for name in ("consolidate", "compile-inference")}
    _stage("compile-inference", run, folder, {"consolidate": made["consolidate"]})
    _stage("eval", _asked(run), folder, {"data": data, **made})
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
