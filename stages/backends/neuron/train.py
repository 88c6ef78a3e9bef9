"""Training on Neuron: the checks before it starts, its processes, and what they write.

A training cannot resume here, because NeuronTrainer refuses; resume.py says what can be kept of one
that was killed.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

from stages.backends.metrics import last_line
from stages.backends.neuron import cache
from stages.backends.neuron.arguments import attention_implementation, environment, training_command
from stages.backends.neuron.check import training_problems
from stages.backends.neuron.graph_key import recompilations
from stages.backends.neuron.hardware import device_name
from stages.backends.neuron.record import write_record
from stages.backends.neuron.resume import (
    INTERRUPTED,
    RESUMED,
    choose_start,
    finished,
    saved_shards,
)
from stages.backends.neuron.shards.read import is_whole
from stages.backends.record import RECORDS
from stages.backends.schedule import derivation, sequences_per_step, total_steps
from stages.model.base import base_config, base_model_folder, copy_config
from stages.model.size import training_bytes
from stages.run.disk import disk_guard
from stages.run.errors import StageFailure, refuse
from stages.run.fsync import flush, fsync_tree
from stages.run.json_file import write_json
from stages.run.launch import launch
from stages.run.layout import (
    ADAPTER_CONFIG,
    CHECKPOINTS_FOLDER,
    MANIFEST_FILE,
    METRICS_FILE,
    SHARDS_FOLDER,
)
from stages.run.limits import stopped
from stages.run.publish import StageResult
from stages.run.settings import Settings

# The step at which the training began: above 0 after RESUME=weights.
START = "start.json"


def train(settings: Settings, data: Path, precompiled: Path, work: Path) -> StageResult:
    """Train on the sequences in `data`.

    Writes shards, metrics.jsonl, config, tokenizer and prompt to `work`. `precompiled` is what
    precompile published; where it no longer fits the training, a note says so before it starts.
    """
    steps = total_steps(settings, prepare(settings, data))
    compiled_before = cache.names(settings.neuron_compile_cache_url)
    if not finished(work):
        start = choose_start(settings, work, steps)
        (work / START).write_text(json.dumps({"step": start.step}) + "\n", encoding="utf-8")
        flush(work / START)
        flush(work)
        if RECORDS not in os.environ:  # a rehearsal compiles its own, of a cut model
            for line in recompilations(settings, precompiled):
                print(f"note: {line}", flush=True)
        command = training_command(
            settings, start.base, data, work, steps=steps, first_step=start.step
        )
        needed = training_bytes(settings, "neuron", steps - start.step)
        with (
            disk_guard("the training's checkpoints and shards", work, needed),
            cache.in_use(settings.neuron_compile_cache_url),
        ):
            # No step can be agreed on there, so the last checkpoint is what stays.
            until = partial(_stopped, work)
            launch(command, environment(settings), work / "error", until=until)
        if RECORDS in os.environ:
            write_record(work, settings.nproc_per_node, settings.tensor_parallel_size)
    if not is_whole(work / SHARDS_FOLDER):
        _keep_shards(settings, work)
    for name in (CHECKPOINTS_FOLDER, INTERRUPTED, RESUMED, "saved"):
        shutil.rmtree(work / name, ignore_errors=True)
    copy_config(base_model_folder(settings), data, work)
    first = json.loads((work / START).read_text(encoding="utf-8"))["step"]
    url = settings.neuron_compile_cache_url
    # None for a cache in S3, whose entries are not read.
    compiled = len(cache.names(url) - compiled_before) if cache.folder_of(url) else None
    metrics = {
        **last_line(work / METRICS_FILE),
        "first_step": first,
        "graphs_compiled": compiled,
    }
    # Of all starts, as the seconds that publish counts.
    tokens = steps * settings.max_length * sequences_per_step(settings)
    return StageResult(
        device=device_name(), tokens=tokens, metrics=metrics, unkeyed=(METRICS_FILE,)
    )


def _stopped(work: Path) -> StageFailure | None:
    error = stopped(work)
    return error and type(error)(
        f"{error} With optimum-neuron that needs RESUME=weights, from the last checkpoint of "
        "SAVE_STEPS."
    )


def prepare(settings: Settings, data: Path) -> int:
    """Check that the training can run, and print what follows from the settings.

    Returns the number of sequences to train on.
    """
    metrics = json.loads((data / MANIFEST_FILE).read_bytes())["metrics"]
    config = base_config(settings)
    refuse(training_problems(settings, config, metrics["vocabulary"]))
    sequences = metrics["train"]["rows"]
    lines = [
        f"device           {device_name()}",
        *derivation(settings, sequences),
        f"attention        {attention_implementation(settings.max_length)}; documents in a "
        "sequence attend to each other (no mask but the causal one)",
    ]
    if settings.pipeline_parallel_size > 1 and settings.loss_on == "response":
        lines.append(
            "LOSS_ON=response in a pipeline every micro-batch weighs the same, however many tokens "
            "of responses it has; one without any ends the training (NaN)"
        )
    if not settings.zero_1:
        lines.append(
            "ZERO_1=0         optimum-neuron then keeps neither weights nor accumulated gradients "
            "in float32"
        )
    if settings.lora_r:
        lines.append(
            f"LoRA             rank {settings.lora_r}, alpha {settings.lora_alpha}, on "
            f"{settings.lora_target_modules}"
        )
    print("\n".join(lines), flush=True)
    return sequences


def _keep_shards(settings: Settings, work: Path) -> None:
    """Move the shards out of what the trainer saved.

    With LoRA those are the adapters' shards and their config, else the model's.
    """
    shards = saved_shards(work / "saved")
    if not is_whole(shards):
        raise StageFailure(
            f"The training ended, but {shards} is not complete: its last save was cut off. Run the "
            "same command again."
        )
    if settings.lora_r:
        config = json.loads((shards.parent / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        # Otherwise a path of this machine and a set, whose order changes from run to run: the same
        # training must publish the same content.
        config |= {
            "base_model_name_or_path": None,
            "target_modules": sorted(config["target_modules"]),
        }
        write_json(shards / ADAPTER_CONFIG, config)
    shutil.rmtree(work / SHARDS_FOLDER, ignore_errors=True)
    fsync_tree(shards)
    shards.rename(work / SHARDS_FOLDER)
