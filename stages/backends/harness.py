"""Figures of lm-evaluation-harness for the base and the fine-tuned model.

The harness runs as a process of its own, once for each model, and its JSON results are read. It
gets a folder with links to a model's configs and weights: nothing else of a base model's folder is
opened. Both models have the tokenizer that was trained with, and no chat template.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from stages.backends.device import device_of
from stages.backends.evaluate import loss_dtype
from stages.model.base import base_model_folder
from stages.model.files import model_files
from stages.run.errors import StageFailure
from stages.run.harness import Harness, named_in
from stages.run.launch import launch
from stages.run.layout import GENERATION_CONFIG_FILE, TOKENIZER_FILES
from stages.run.settings import Settings
from stages.run.task_names import task_names

MODELS = {"base": "the base model", "fine_tuned": "the fine-tuned model"}
# Where no terminal redraws its progress, a line every 30 s. tqdm reads these; stages have turned
# its bars off.
PROGRESS_LINES = {"TQDM_DISABLE": "", "TQDM_MININTERVAL": "30"}
Figures = dict[str, Any]


def measure_tasks(
    harness: Harness | None, settings: Settings, tuned: Path, work: Path
) -> dict[str, Figures]:
    """{"lm_eval": figures} of the base model and of the one in `tuned`; empty without `harness`.

    Raises StageFailure where the harness fails.
    """
    if harness is None:
        return {}
    device = device_of(settings).eager_device()
    dtype = str(loss_dtype(settings, device)[0]).removeprefix("torch.")
    print(f"\nlm_eval {harness.version} on {device.type} in {dtype}", flush=True)
    if note := limit_note(settings.lm_eval_limit, device):
        print(note, flush=True)
    folder, results = work / "lm_eval", {}
    try:
        for name, source in (("base", base_model_folder(settings)), ("fine_tuned", tuned)):
            link_model(source, tuned, folder / name)
            output = folder / f"{name}.json"
            command = harness_command(harness, settings, folder / name, output, dtype, device)
            launch(command, _environment(), folder / "error", who=f"lm_eval on {MODELS[name]}")
            results[name] = _results(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    own = settings.lm_eval_include_path
    tasks = compared(results["base"], results["fine_tuned"], named_in(Path(own)) if own else set())
    version = str(results["fine_tuned"].get("lm_eval_version") or harness.version)
    for line in table(tasks, version):
        print(line, flush=True)
    facts = {"version": version, "dtype": dtype, "limit": settings.lm_eval_limit}
    return {"lm_eval": {**facts, "tasks": tasks}}


def limit_note(limit: int, device: torch.device) -> str:
    """What LM_EVAL_LIMIT means here, as a line; empty where it is 0 on a GPU."""
    if limit:
        return (
            f"note: LM_EVAL_LIMIT={limit}: at most the first {limit:,} examples of each task. "
            "Compare the two models, not with figures that others publish."
        )
    if device.type == "cpu":
        return (
            "note: LM_EVAL_LIMIT=0: every example of each task, for two models, on a CPU, which "
            "may take hours. The progress below tells the time left; LM_EVAL_LIMIT=100 takes the "
            "first 100 of each."
        )
    return ""


def link_model(source: Path, tokenizer: Path, folder: Path) -> None:
    """Make `folder` with links to the model in `source` and the tokenizer in `tokenizer`.

    generation_config.json is left out: a task says how it decodes, and a base model's file may
    name code.
    """
    folder.mkdir(parents=True)
    files = [path for path in model_files(source) if path.name != GENERATION_CONFIG_FILE]
    files += [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    for path in files:
        (folder / path.name).symlink_to(path.resolve())


def harness_command(
    harness: Harness,
    settings: Settings,
    model: Path,
    output: Path,
    dtype: str,
    device: torch.device,
) -> list[str]:
    """The command that measures the model in the folder `model`. As JSON, a path may hold commas
    and quotes."""
    arguments = {"pretrained": str(model.absolute()), "dtype": dtype, "trust_remote_code": False}
    command = [harness.program, "--model", "hf", "--model_args", json.dumps(arguments)]
    command += ["--tasks", ",".join(task_names(settings.lm_eval)), "--device", device.type]
    # "auto" tries how much fits the GPU.
    command += ["--batch_size", "auto" if device.type == "cuda" else "1"]
    command += ["--output_path", str(output.absolute())]
    if settings.lm_eval_limit:
        command += ["--limit", str(settings.lm_eval_limit)]
    if settings.lm_eval_include_path:
        command += ["--include_path", str(Path(settings.lm_eval_include_path).absolute())]
    return command


def _environment() -> dict[str, str]:
    progress = {} if sys.stderr.isatty() else PROGRESS_LINES
    return {"HF_DATASETS_TRUST_REMOTE_CODE": "0", **progress}


def _results(output: Path) -> Figures:
    """The JSON that the harness wrote: it adds the time to the name of `output`."""
    files = list(output.parent.glob(f"{output.stem}_*.json"))
    try:
        [file] = files
        results = json.loads(file.read_bytes())
        return {**results, "results": dict(results["results"])}
    except (ValueError, KeyError, TypeError) as error:
        raise StageFailure(
            f"lm_eval ended without an error, but wrote {len(files)} files of results that can be "
            f"read ({type(error).__name__}). Its output is above."
        ) from error


def compared(base: Figures, tuned: Figures, local: set[str]) -> dict[str, Figures]:
    """Task or group -> its version, number of examples and of examples in the prompt, whether it is
    in `local`, and metric -> value and stderr of each model.

    A metric has its filter in its name (`exact_match,strict-match`) unless that is "none". A figure
    that is not a finite number is None.
    """
    tasks = {}
    for task, row in tuned["results"].items():
        base_row = base["results"].get(task, {})
        metrics = {
            metric: {
                "base": _number(base_row.get(key)),
                "base_stderr": _number(base_row.get(error)),
                "fine_tuned": _number(row.get(key)),
                "fine_tuned_stderr": _number(row.get(error)),
            }
            for metric, key, error in _metrics(row)
        }
        if metrics:
            tasks[task] = {
                "version": str(tuned.get("versions", {}).get(task, "")),
                "examples": _examples(tuned, task),
                "num_fewshot": tuned.get("n-shot", {}).get(task),
                "local": task in local,
                "metrics": metrics,
            }
    return tasks


def _metrics(row: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The name of each metric in a row of results, its key, and that of its stderr."""
    for key in row:
        metric, comma, method = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield key.removesuffix(",none"), key, f"{metric}_stderr,{method}"


def _examples(results: Figures, task: str) -> int | None:
    counts = results.get("n-samples", {}).get(task, {})
    return counts.get("effective", results["results"][task].get("sample_len"))


def _number(value: object) -> float | None:
    """`value` where it is a finite number; the harness writes "N/A" for a stderr it lacks."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def table(tasks: Mapping[str, Figures], version: str) -> list[str]:
    """The figures as lines of a table."""
    heading = f"lm_eval {version}"
    lines = ["", f"{heading:<36} {'base':>18} {'fine-tuned':>18}"]
    for task, facts in tasks.items():
        size = f"{facts['examples']:,} examples" if facts["examples"] else "number not known"
        lines.append(f"  {task} (version {facts['version']}, {size})")
        for metric, figure in facts["metrics"].items():
            cells = (
                _cell(figure[name], figure[f"{name}_stderr"]) for name in ("base", "fine_tuned")
            )
            lines.append("    {:<32} {:>18} {:>18}".format(metric, *cells))
    return lines


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
