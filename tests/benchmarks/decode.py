"""Decoding with a compiled model against transformers' generate and the speed of memory.

    make compile-inference RECIPE=smollm2-135m
    PYTHONPATH=. .venv/bin/python tests/benchmarks/decode.py \\
        outputs/smollm2-135m/compiled outputs/smollm2-135m/model --tokens 64

Each method answers the same prompt in every slot, greedily and with no end of answer. Prints the
medians of --runs runs: tokens per second after the first, and seconds until the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from stages.backends.torch.generate import WEIGHTS, CompiledModel, load


def read_bandwidth() -> float:
    """GB/s of a sum over 512 MB of float32: the most that weights can be read at."""
    numbers = torch.ones(1 << 27)
    numbers.sum()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - started)
    return numbers.nbytes / min(seconds) / 1e9


def compiled_answer(model: CompiledModel, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Seconds of the first token and of the others, of an answer to `prompt` in every slot."""
    started = time.perf_counter()
    steps = model.generate(
        [prompt] * model.batch_size,
        max_new_tokens=tokens,
        do_sample=False,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        eos_token_id=-1,
    )
    next(steps)
    first = time.perf_counter()
    for _ in steps:
        pass
    return first - started, time.perf_counter() - first


def generated_answer(
    model: Any, slots: int, prompt: list[int], tokens: int, **options: Any
) -> tuple[float, float]:
    """The same with transformers' generate."""
    ids = torch.tensor([prompt] * slots)

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        return time.perf_counter() - started

    first = seconds(1)
    return first, seconds(tokens) - first


def report(name: str, slots: int, tokens: int, answer: Callable[[], Any], runs: int) -> None:
    answer()  # warms up
    times = [answer() for _ in range(runs)]
    first, rest = (median(column) for column in zip(*times, strict=True))
    click.echo(f"{name}: {slots * (tokens - 1) / rest:.1f} tokens/s, prompt {first:.2f} s")


@click.command()
@click.argument("compiled", type=click.Path(exists=True, path_type=Path))
@click.argument("model_dir", type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default=64, show_default=True, help="New tokens of each answer.")
@click.option("--prompt-tokens", default=64, show_default=True, help="Tokens of the prompt.")
@click.option("--runs", default=3, show_default=True, help="Runs of which the median is taken.")
def main(compiled: Path, model_dir: Path, tokens: int, prompt_tokens: int, runs: int) -> None:
    from transformers import AutoModelForCausalLM

    model, threads = load(compiled), torch.get_num_threads()
    slots, weights = model.batch_size, (compiled / WEIGHTS).stat().st_size
    bandwidth = read_bandwidth()
    click.echo(
        f"{threads} threads, batch {slots}, {weights / 1e6:.0f} MB of {model.dtype}; memory is "
        f"read at {bandwidth:.1f} GB/s, so at most {slots * bandwidth * 1e9 / weights:.0f} tokens/s"
    )
    prompt = [3 + 7 * n % (model.vocab_size - 3) for n in range(prompt_tokens)]
    report("compiled here", slots, tokens, lambda: compiled_answer(model, prompt, tokens), runs)
    eager = AutoModelForCausalLM.from_pretrained(model_dir, dtype=model.dtype).eval()
    eager.generation_config.eos_token_id = None
    static = {"cache_implementation": "static", "disable_compile": True}

    def generate(**options: Any) -> Callable[[], tuple[float, float]]:
        return lambda: generated_answer(eager, slots, prompt, tokens, **options)

    report("generate", slots, tokens, generate(), runs)
    report("generate, static cache", slots, tokens, generate(**static), runs)
    # generate compiles by itself on a GPU alone.
    eager.forward = torch.compile(eager.forward)
    report("generate, static cache, compiled", slots, tokens, generate(**static), runs)


if __name__ == "__main__":
    main()
