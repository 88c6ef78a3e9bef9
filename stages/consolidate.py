"""Join train's shards into a model folder that transformers loads: safetensors, config, tokenizer,
prompt."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.run.backend import backend_module
from stages.run.cli import stage_command
from stages.run.errors import StageFailure
from stages.run.json_file import write_json
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
    # Else torch's threads spin between two pieces, on the cores that read and hash.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    publish(
        "consolidate", settings, {"train": train}, output, lambda work: join(settings, train, work)
    )
    if not settings.keep_shards:
        remove_published(train, "shards", because="KEEP_SHARDS=0 removed its shards")


def join(settings: Settings, train: Path, work: Path) -> StageResult:
    """Write the complete model to `work` and check it against its config.json. A model that differs
    is not published."""
    from stages.model.base import base_model_folder
    from stages.model.check import check_model_folder, pretrained_config, tied_weights
    from stages.model.config import published_generation_config
    from stages.model.notes import published_notes, tokenizer_notes
    from stages.text.prompt import load_format
    from stages.text.tokens import TextTokenizer

    shards = published_shards(train)
    backend = backend_module("consolidate", settings)
    shutil.copytree(train / TOKENIZER_FOLDER, work, dirs_exist_ok=True)
    shutil.copyfile(train / PROMPT_FILE, work / PROMPT_FILE)
    config = pretrained_config(train)
    config.dtype = "bfloat16" if settings.bf16 else "float32"
    tokenizer = TextTokenizer.load(train / TOKENIZER_FOLDER)
    # What ended the answers in training: generation stops where eval stops.
    end = load_format(work, tokenizer).end
    config.eos_token_id = end
    config.save_pretrained(work)
    if (train / GENERATION_CONFIG_FILE).is_file():
        write_json(work / GENERATION_CONFIG_FILE, published_generation_config(train, end))
    for line in published_notes(train, tokenizer, end):
        print(f"note: {line}", flush=True)
    try:
        joined = backend.consolidate(
            train / SHARDS_FOLDER,
            work,
            dtype=config.dtype,
            max_shard_size=parse_size(settings.max_shard_size),
            tied=tied_weights(work),
            base=base_model_folder(settings) if settings.lora_r else None,  # LoRA merges into it
        )
    except Exception:  # damaged shards can raise anything
        require_undamaged(shards, train)
        raise
    require_undamaged(shards, train, joined["shards"])
    checked = check_model_folder(work)
    for line in tokenizer_notes(work, tokenizer):
        print(f"note: {line}", flush=True)
    print(
        f"{checked['parameters']:,} parameters in {checked['dtype']}, "
        f"{show_size(checked['bytes'])}: as config.json says",
        flush=True,
    )
    return StageResult(
        metrics={**checked, "bytes_read": joined["bytes_read"]}, digests=joined["files"]
    )


def published_shards(train: Path) -> dict[str, Any]:
    """Train's manifest with only the shards as outputs. Raises StageFailure unless all exist with
    the right sizes."""
    manifest = manifest_of(train)
    if manifest is None:
        raise StageFailure(f"{train}: {manifest_problem(train)}. Run `make train` again.")
    shards = {
        name: entry for name, entry in manifest["outputs"].items() if name.startswith("shards/")
    }
    manifest = {**manifest, "outputs": shards}
    _require_none(file_problems(manifest, train), train)
    return manifest


def require_undamaged(
    shards: dict[str, Any], train: Path, digests: Mapping[str, str] | None = None
) -> None:
    """Raise StageFailure unless the shards have the digests that train published, and there are no
    others.

    `digests` (name -> SHA-256) are those that the join computed while it read the shards; other
    files are read again. The check comes after the join, so that the join need not wait for it, and
    nothing is published until it passes.
    """
    known = {f"shards/{name}": digest for name, digest in (digests or {}).items()}
    _require_none(
        [
            line
            for line in file_problems(shards, train, read=True, digests=known)
            if line.startswith("shards/")
        ],
        train,
    )


def _require_none(problems: list[str], train: Path) -> None:
    if problems:
        raise StageFailure(
            "\n".join(
                [
                    f"{train} is not what was published. Run `make train VERIFY=1`, which builds "
                    "it again.",
                    *problems[:5],
                ]
            )
        )


if __name__ == "__main__":
    main()
