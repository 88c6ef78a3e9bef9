"""What an interrupted training on Neuron left, and where the next one begins.

NeuronTrainer writes checkpoints (`checkpoint-N/`) and cannot resume from one:
resume_from_checkpoint raises. Weights alone can be taken from the last whole checkpoint, in
bfloat16; the optimizer's moments and its float32 weights are gone. RESUME=weights does that,
RESUME=restart starts again, and either way the checkpoint that came farthest stays until the
training has ended.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from stages.backends.neuron.shards.read import damaged, is_whole
from stages.model.base import base_model_folder
from stages.run.errors import InputError
from stages.run.fsync import written_whole
from stages.run.layout import CHECKPOINTS_FOLDER, CONFIG_FILE, SHARDS_FOLDER
from stages.run.settings import Settings
from stages.run.sizes import parse_size

# Folders in train's work folder.
INTERRUPTED, RESUMED = "interrupted", "resumed"


@dataclass(frozen=True)
class Start:
    """Where a training begins: from the weights in `base` (Hugging Face layout), at step `step` (0
    = the base model's)."""

    base: Path
    step: int


def saved_shards(saved: Path) -> Path:
    """Where, in a folder that NeuronTrainer saved a model to, its shards lie: the adapter's where
    LoRA trained one."""
    adapter = saved / "adapter_default" / "adapter_shards"
    return adapter if adapter.is_dir() else saved / SHARDS_FOLDER


def last_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Step and shards of the last whole checkpoint in `folder`; None where there is none."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), saved_shards(path))
        for path in folder.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    whole = [(step, shards) for step, shards in found if is_whole(shards)]
    return max(whole, default=None)


def choose_start(settings: Settings, work: Path, total: int) -> Start:
    """Where to begin a training of `total` steps in `work`; says what an interrupted one left, and
    clears the way for new checkpoints.

    Raises InputError when RESUME=weights asks for weights that do not exist or cannot be taken.
    """
    newest, kept = last_checkpoint(work / CHECKPOINTS_FOLDER), last_checkpoint(work / INTERRUPTED)
    if newest and (
        not kept or newest[0] >= kept[0]
    ):  # a run that began again and came less far takes nothing away
        shutil.rmtree(work / INTERRUPTED, ignore_errors=True)
        (work / CHECKPOINTS_FOLDER).rename(work / INTERRUPTED)
    shutil.rmtree(work / CHECKPOINTS_FOLDER, ignore_errors=True)
    last = last_checkpoint(work / INTERRUPTED)
    if settings.resume == "restart":
        if last:
            print(
                f"an interrupted training left the weights of step {last[0]:,} of {total:,}. This "
                "one starts again; RESUME=weights would continue from them. The optimizer's "
                "moments and the float32 weights are lost (NeuronTrainer cannot resume).",
                flush=True,
            )
        return Start(base_model_folder(settings), 0)
    last = _last_undamaged(work)
    if last is None:
        raise InputError(
            "RESUME=weights: no interrupted training with these settings has left a whole "
            "checkpoint. Set RESUME=restart."
        )
    print(
        f"continuing from the weights of step {last[0]:,} of {total:,}, in bfloat16; the "
        "optimizer's moments start again",
        flush=True,
    )
    return Start(_as_model_folder(settings, last[1], _resumed(work, last[0])), last[0])


def _resumed(work: Path, step: int) -> Path:
    return work / RESUMED / f"step-{step}"


def _last_undamaged(work: Path) -> tuple[int, Path] | None:
    """`last_checkpoint` of the interrupted ones whose weights can be read to the last byte. Damaged
    ones are named and removed."""
    while (last := last_checkpoint(work / INTERRUPTED)) and not _resumed(work, last[0]).is_dir():
        reason = damaged(last[1])
        if not reason:
            break
        print(f"the checkpoint of step {last[0]:,} is damaged and removed: {reason}", flush=True)
        shutil.rmtree(work / INTERRUPTED / f"checkpoint-{last[0]}")
    return last


def finished(work: Path) -> bool:
    """Whether a former call trained to the end in `work`, and was killed before it published. What
    a power cut damaged is removed."""
    for folder, shards in (
        (work / SHARDS_FOLDER, work / SHARDS_FOLDER),
        (work / "saved", saved_shards(work / "saved")),
    ):
        if is_whole(shards) and not damaged(shards):  # NeuronTrainer does not flush what it saves
            return True
        shutil.rmtree(folder, ignore_errors=True)
    return False


def _as_model_folder(settings: Settings, shards: Path, folder: Path) -> Path:
    """The checkpoint's weights in the layout that a training can start from."""
    from stages.backends.neuron.consolidate import consolidate
    from stages.model.check import tied_weights

    if not folder.is_dir():
        shutil.rmtree(folder.parent, ignore_errors=True)  # of another step
        with written_whole(folder) as writing:
            shutil.copyfile(base_model_folder(settings) / CONFIG_FILE, writing / CONFIG_FILE)
            consolidate(
                shards,
                writing,
                dtype=None,
                max_shard_size=parse_size(settings.max_shard_size),
                tied=tied_weights(writing),
            )
    return folder
