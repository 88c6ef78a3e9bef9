"""Tokens per second of the data stage, beside `datasets.map` and the tokenizer by itself.

    python tests/benchmarks/data_rates.py DATASET.jsonl MODEL_FOLDER [--copies 5] [--rounds 3]

DATASET has Dolly's columns. It is taken `--copies` times over, with the copy's number after each
instruction. "stage" is all of it: reading, checking, tokenising, comparing, packing, writing. "map"
formats and tokenises the same texts by `datasets.map` in as many processes as there are cores, and
writes the ids. "tokenizer" is encode_batch_fast on the texts, a thousand at a time, and nothing
else: what no stage can exceed. Each runs in a fresh process, in turn; seconds are of the work,
without imports; the table shows medians. Memory is that of the largest process.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
BATCH = 1000


def text_of(row: dict[str, str]) -> str:
    """Dolly's prompt and response."""
    context = f"\n\n### Context\n{row['context']}" if row["context"] else ""
    return f"### Instruction\n{row['instruction']}{context}\n\n### Answer\n{row['response']}"


def stage(dataset: str, model: str, output: Path) -> tuple[float, int]:
    from dataclasses import replace

    from stages.data import pack
    from stages.run.settings import Settings

    settings = replace(Settings(), model_id=model, dataset=dataset, max_length=2048)
    output.mkdir()
    started = time.perf_counter()
    tokens = pack(settings, output).tokens
    assert tokens
    return time.perf_counter() - started, tokens


def mapped(dataset: str, model: str, output: Path) -> tuple[float, int]:
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)
    started = time.perf_counter()
    rows = load_dataset("json", data_files=dataset, split="train", cache_dir=str(output))
    tokens = rows.map(
        lambda batch: tokenizer(
            [
                text_of(dict(zip(batch, row, strict=True))) + tokenizer.eos_token
                for row in zip(*batch.values(), strict=True)
            ]
        ),
        batched=True,
        num_proc=os.cpu_count(),
        remove_columns=rows.column_names,
    )
    seconds = time.perf_counter() - started
    return seconds, sum(len(ids) for ids in tokens.with_format("numpy")["input_ids"])


def tokenizer_alone(dataset: str, model: str, output: Path) -> tuple[float, int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model, "tokenizer.json")))
    seconds, tokens, texts = 0.0, 0, list[str]()
    with open(dataset, encoding="utf-8") as lines:
        for line in lines:
            texts.append(text_of(json.loads(line)))
            if len(texts) == BATCH:
                started = time.perf_counter()
                encoded = tokenizer.encode_batch_fast(texts)
                seconds += time.perf_counter() - started
                tokens += sum(len(one) for one in encoded)
                texts = []
    return seconds, tokens


RECIPES = {"stage": stage, "map": mapped, "tokenizer": tokenizer_alone}


def measured(recipe: str, dataset: str, model: str, output: Path) -> dict[str, float]:
    """Seconds, tokens and megabytes of a fresh process."""
    command = [sys.executable, __file__, dataset, model, "--only", recipe, "--output", str(output)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true" if recipe != "map" else "false"}
    ended = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, check=True, cwd=ROOT, text=True
    )
    figures: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return figures


def write_copies(dataset: str, copies: int, file: Path) -> None:
    rows = [json.loads(line) for line in Path(dataset).read_text("utf-8").splitlines() if line]
    with file.open("w", encoding="utf-8") as out:
        for copy in range(copies):
            for row in rows:
                changed = {**row, "instruction": f"{row['instruction']} ({copy})"}
                out.write(json.dumps(changed, ensure_ascii=False) + "\n")


@click.command()
@click.argument("dataset", type=click.Path(exists=True, resolve_path=True))
@click.argument("model", type=click.Path(exists=True, resolve_path=True))
@click.option("--copies", default=5, show_default=True, help="Times that DATASET is taken over.")
@click.option("--rounds", default=3, show_default=True, help="Runs of each.")
@click.option("--recipes", default=" ".join(RECIPES), show_default=True, help="Which to run.")
@click.option("--only", type=click.Choice(list(RECIPES)), hidden=True)
@click.option("--output", type=Path, hidden=True)
def main(
    dataset: str, model: str, copies: int, rounds: int, recipes: str, only: str, output: Path
) -> None:
    if only:
        seconds, tokens = RECIPES[only](dataset, model, output)
        most = max(
            resource.getrusage(who).ru_maxrss
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        print(json.dumps({"seconds": seconds, "tokens": tokens, "megabytes": most / 1000}))
        return
    runs: dict[str, list[dict[str, float]]] = {recipe: [] for recipe in recipes.split()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        write_copies(dataset, copies, file)
        for number in range(rounds):
            for recipe, figures in runs.items():
                output = Path(folder, f"{recipe}-{number}")
                figures.append(measured(recipe, str(file), model, output))
    print(f"{'':12}{'tokens':>14}{'seconds':>9}{'tokens/s':>12}{'MB':>7}   each, seconds")
    for recipe, figures in runs.items():
        seconds = median(one["seconds"] for one in figures)
        tokens, most = figures[0]["tokens"], max(one["megabytes"] for one in figures)
        each = " ".join(f"{one['seconds']:.1f}" for one in figures)
        print(
            f"{recipe:12}{tokens:14,.0f}{seconds:9.1f}{tokens / seconds:12,.0f}{most:7.0f}   {each}"
        )


if __name__ == "__main__":
    main()
