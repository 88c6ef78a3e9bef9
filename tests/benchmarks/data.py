"""The data stage against the Dolly tutorial's recipe: the same file to the same rows, timed.

    python tests/benchmarks/data.py DATASET.jsonl MODEL_FOLDER [--rounds 5]

Each round runs both in fresh processes with empty caches, one after the other; medians are
compared. "work" is from the dataset's file to the saved rows, "process" adds start and imports.
Ends with status 1 if the ids differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_LENGTH = 2048


def tutorial(dataset: str, model: str, output: Path) -> float:
    """Hugging Face's "Fine-tune Llama on AWS Trainium", its data part: format, tokenise and chunk
    by `map`. Seconds of work."""
    from itertools import chain

    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)
    remainder: dict[str, list[int]] = {"input_ids": [], "attention_mask": []}

    def formatted(row: dict[str, str]) -> dict[str, str]:
        parts = [f"### Instruction\n{row['instruction']}"]
        if len(row["context"]) > 0:
            parts.append(f"### Context\n{row['context']}")
        parts.append(f"### Answer\n{row['response']}")
        return {"text": "\n\n".join(parts) + tokenizer.eos_token}

    def chunked(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        nonlocal remainder
        joined = {name: remainder[name] + list(chain(*lists)) for name, lists in batch.items()}
        end = len(joined["input_ids"]) // MAX_LENGTH * MAX_LENGTH
        chunks = {
            name: [ids[at : at + MAX_LENGTH] for at in range(0, end, MAX_LENGTH)]
            for name, ids in joined.items()
        }
        remainder = {name: ids[end:] for name, ids in joined.items()}
        return {**chunks, "labels": [list(ids) for ids in chunks["input_ids"]]}

    started = time.perf_counter()
    rows = load_dataset("json", data_files=dataset, split="train")
    texts = rows.map(formatted, remove_columns=rows.column_names)
    tokens = texts.map(
        lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=["text"]
    )
    tokens.map(chunked, batched=True).save_to_disk(output / "train")
    return time.perf_counter() - started


def stage(dataset: str, model: str, output: Path) -> float:
    """The data stage with the tutorial's packing. Seconds of work."""
    from stages.text.dataset import Layout, build
    from stages.text.examples import open_examples
    from stages.text.find_tokenizer import find_tokenizer
    from stages.text.prompt import TextFormat

    tokenizer = find_tokenizer(model)
    started = time.perf_counter()
    build(
        open_examples(dataset).batches,
        tokenizer,
        TextFormat(tokenizer),
        output=output,
        layout=Layout(MAX_LENGTH, packing="concat"),
    )
    return time.perf_counter() - started


RECIPES = {"tutorial": tutorial, "stage": stage}


def timed(recipe: str, dataset: str, model: str, folder: Path) -> tuple[float, float]:
    """Seconds of work and of the whole process, in a fresh one."""
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [
        sys.executable,
        __file__,
        dataset,
        model,
        "--only",
        recipe,
        "--output",
        str(folder / "rows"),
    ]
    started = time.perf_counter()
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(ended.stdout.splitlines()[-1]), time.perf_counter() - started


def ids_of(folder: Path) -> list[list[int]]:
    from datasets import load_from_disk

    return load_from_disk(folder / "rows" / "train")["input_ids"][:]


@click.command()
@click.argument("dataset", type=click.Path(exists=True, resolve_path=True))
@click.argument("model", type=click.Path(exists=True, resolve_path=True))
@click.option("--rounds", default=5, show_default=True, help="Runs of each recipe.")
@click.option("--only", type=click.Choice(list(RECIPES)), hidden=True)
@click.option("--output", type=Path, hidden=True)
def main(dataset: str, model: str, rounds: int, only: str | None, output: Path) -> None:
    if only:
        print(json.dumps(RECIPES[only](dataset, model, output)))
        return
    seconds: dict[str, list[tuple[float, float]]] = {recipe: [] for recipe in RECIPES}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            folders = {recipe: Path(scratch, recipe) for recipe in RECIPES}
            for recipe, folder in folders.items():
                seconds[recipe].append(timed(recipe, dataset, model, folder))
            if number == 0 and ids_of(folders["tutorial"]) != ids_of(folders["stage"]):
                sys.exit("The two do not give the same ids.")
    print(f"{'':10}{'work':>10}{'process':>10}   (seconds, medians of {rounds} rounds; same ids)")
    work, process = (
        {recipe: median(both[part] for both in runs) for recipe, runs in seconds.items()}
        for part in (0, 1)
    )
    for recipe in RECIPES:
        print(f"{recipe:10}{work[recipe]:10.2f}{process[recipe]:10.2f}")
    print(
        f"{'ratio':10}{work['tutorial'] / work['stage']:9.2f}x"
        f"{process['tutorial'] / process['stage']:9.2f}x"
    )


if __name__ == "__main__":
    main()
