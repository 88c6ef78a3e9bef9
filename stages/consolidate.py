"""Join train's shards into a model folder that plain transformers loads: safetensors, config, tokenizer, prompt."""

from __future__ import annotations

import shutil
from pathlib import Path

from stages.run.backend import backend_module
from stages.run.cli import stage_command
from stages.run.errors import StageFailure
from stages.run.layout import GENERATION_CONFIG_FILE, PROMPT_FILE, SHARDS_FOLDER, TOKENIZER_FOLDER
from stages.run.manifest import file_problems, manifest_of, manifest_problem
from stages.run.progress import show_size
from stages.run.publish import StageResult, publish, remove_published
from stages.run.settings import Settings
from stages.run.sizes import parse_size


@stage_command(
    "consolidate",
    "MODEL_ID",
    "MODEL_REVISION",
    "INIT_WEIGHTS",
    "SEED",
    "LORA_R",
    train="Folder that train published.",
)
def main(settings: Settings, train: Path, output: Path) -> None:
    publish(
        "consolidate", settings, {"train": train}, output, lambda work: join(settings, train, work)
    )
    if not settings.keep_shards:
        remove_published(train, "shards", because="KEEP_SHARDS=0 removed its shards")


def join(settings: Settings, train: Path, work: Path) -> StageResult:
    """Write the whole model to `work` and hold it against its config.json; nothing is published that differs."""
    from stages.model.base import base_model_folder
    from stages.model.check import check_model_folder, pretrained_config, tied_weights

    require_published_shards(train)
    backend = backend_module("consolidate", settings)
    shutil.copytree(train / TOKENIZER_FOLDER, work, dirs_exist_ok=True)
    for name in (PROMPT_FILE, GENERATION_CONFIG_FILE):
        if (train / name).is_file():
            shutil.copyfile(train / name, work / name)
    config = pretrained_config(train)
    config.dtype = "bfloat16" if settings.bf16 else "float32"
    config.save_pretrained(work)
    found = backend.consolidate(
        train / SHARDS_FOLDER,
        work,
        dtype=config.dtype,
        max_shard_size=parse_size(settings.max_shard_size),
        tied=tied_weights(work),
        base=base_model_folder(settings)
        if settings.lora_r
        else None,  # adapters are merged into it
    )
    checked = check_model_folder(work)
    print(
        f"{checked['parameters']:,} parameters in {checked['dtype']}, {show_size(checked['bytes'])}: as config.json says",
        flush=True,
    )
    return StageResult(
        metrics={**checked, "bytes_read": found["bytes_read"]}, digests=found["files"]
    )


def require_published_shards(train: Path) -> None:
    """Raise StageFailure unless the shards are those that train published, byte by byte.

    A shard's own checksum finds a byte that was changed. It does not find shards of equal shape that were exchanged, nor a changed
    number in what says where each belongs.
    """
    manifest = manifest_of(train)
    if manifest is None:
        raise StageFailure(f"{train}: {manifest_problem(train)}. Run `make train` again.")
    shards = {
        name: facts for name, facts in manifest["outputs"].items() if name.startswith("shards/")
    }
    found = [
        line
        for line in file_problems({**manifest, "outputs": shards}, train, read=True)
        if line.startswith("shards/")
    ]
    if found:
        raise StageFailure(
            "\n".join(
                [
                    f"{train} is not what was published. Run `make train VERIFY=1`, which makes it again.",
                    *found[:5],
                ]
            )
        )


if __name__ == "__main__":
    main()
