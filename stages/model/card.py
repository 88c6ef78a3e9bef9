"""The model card of a published model: what the manifests tell of it, and how to ask it.

What was not recorded or not measured is said to be so, and nothing is guessed. A local dataset or
base model is private: neither its path nor its name is on the card.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from stages.model.card_answers import fenced, how_to_ask, read_answers, shown_answers
from stages.model.lineage import NOT_MEASURED, NOT_RECORDED, Lineage
from stages.run.progress import duration
from stages.run.setting import as_text, variable
from stages.run.settings import Settings

# Settings that the card tells elsewhere, or that would tell what is private.
_ELSEWHERE = ("MODEL_ID", "MODEL_REVISION", "BACKEND", "INIT_WEIGHTS")


def model_card(
    target: str, made: Lineage, published: Mapping[str, Path], licence: Mapping[str, str]
) -> str:
    """README.md of the repository `target` (OWNER/NAME): metadata that the Hub reads, and text.

    `published`: the folders of data, train, consolidate and eval. `licence`: the base model's.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name = target.split("/")[1]
    lora = bool(made.setting("LORA_R"))
    data = ModelCardData(
        base_model=made.base if made.base and not _is_random(made) else None,
        datasets=[made.dataset] if made.dataset else None,
        eval_results=_eval_results(made) or None,
        library_name="transformers",
        model_name=name,
        pipeline_tag="text-generation",
        tags=["trn-tune", *(["lora"] if lora else [])],
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
    )
    answers = read_answers(published["eval"], made.eval) if made.eval else []
    sections = [
        f"# {name}",
        _origin(made, licence),
        "## How to ask it",
        how_to_ask(target, published["consolidate"], answers, lora),
        "## Losses",
        _losses(made),
        *_tasks(made),
        "## Answers",
        shown_answers(made, answers),
        "## Data",
        _bullets(_data_facts(made)),
        "## Training",
        _training(made),
        "## Time, cost and versions",
        _stages_table(made),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _is_random(made: Lineage) -> bool:
    return made.setting("INIT_WEIGHTS") == "random"


def _eval_results(made: Lineage) -> list[Any]:
    """The fine-tuned model's losses as the Hub's metadata; empty where they were not measured."""
    from huggingface_hub import EvalResult

    measured = made.eval.get("metrics", {}).get("fine_tuned", {})
    names = {"loss": "Loss (nats per token)", "perplexity": "Perplexity"}
    dataset = made.dataset if made.held_out else ""  # EVAL_SET is a file
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset or "local-dataset",
            dataset_name=dataset or "a local dataset",
            dataset_split="held out by VALIDATION_FRACTION" if made.held_out else "EVAL_SET",
            metric_type=metric,
            metric_name=name,
            metric_value=round(measured[metric], 4),
        )
        for metric, name in names.items()
        if _is_finite(measured.get(metric))
    ]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _origin(made: Lineage, licence: Mapping[str, str]) -> str:
    revision = made.setting("MODEL_REVISION")
    if made.base:
        base = f"[{made.base}](https://huggingface.co/{made.base}), revision `{revision}`"
    else:
        base = (
            "a local model" if made.setting("MODEL_ID") else f"a base model that is {NOT_RECORDED}"
        )
    if _is_random(made):
        what = f"Trained from random weights, with the architecture and tokenizer of {base}."
    elif made.setting("LORA_R"):
        what = f"Fine-tuned with LoRA from {base}; the adapter is merged into these weights."
    else:
        what = f"Fine-tuned from {base}."
    if licence:
        stated = licence.get("license_name", licence["license"])
        if "license_link" in licence:
            stated = f"[{stated}]({licence['license_link']})"
        terms = f"The base model's licence, by its model card: {stated}."
    else:
        terms = "Licence: none is stated here, because no model card of the base model states one."
    metrics = made.consolidate.get("metrics", {})
    size = f"{metrics['parameters']:,} parameters in {metrics['dtype']}. " if metrics else ""
    return f"{what} {size}{terms}\n\nMade with trn-tune; this card was filled from its records."


def _losses(made: Lineage) -> str:
    metrics = made.eval.get("metrics", {})
    if not metrics.get("fine_tuned"):
        return f"On held-out sequences: {NOT_MEASURED}."
    name = "Held-out sequences" if made.held_out else "Sequences of a test set (EVAL_SET)"
    rows = [f"| {name} | Base model | This model |", "|---|---|---|"]
    for name, label in (("loss", "Loss (nats per token)"), ("perplexity", "Perplexity")):
        before = metrics.get("base", {}).get(name) if made.measured_base else None
        after = metrics["fine_tuned"].get(name)
        rows.append(f"| {label} | {_figure(before)} | {_figure(after)} |")
    dtype = metrics.get("loss_dtype", NOT_RECORDED)
    return "\n".join(rows) + f"\n\nComputed in {dtype}, over the tokens that training counts."


def _tasks(made: Lineage) -> Iterator[str]:
    """What lm-evaluation-harness measured, as a section; none where it measured nothing. Tasks of a
    local folder are private."""
    measured = made.eval.get("metrics", {}).get("lm_eval", {})
    tasks = {name: facts for name, facts in measured.get("tasks", {}).items() if not facts["local"]}
    if not tasks:
        return
    rows = ["| Task | Version | Examples | Metric | Base model | This model |"]
    rows.append("|---|---|---|---|---|---|")
    for task, facts in tasks.items():
        for metric, figures in facts["metrics"].items():
            before = _with_error(figures, "base") if made.measured_base else NOT_MEASURED
            rows.append(
                f"| {task} | {facts['version']} | {_count(facts['examples'])} | {metric} | "
                f"{before} | {_with_error(figures, 'fine_tuned')} |"
            )
    limit = measured["limit"]
    part = f", on at most the first {limit:,} examples of each task" if limit else ""
    yield "## Tasks"
    yield "\n".join(rows) + (
        f"\n\nMeasured with lm-evaluation-harness {measured['version']} in {measured['dtype']}, "
        f"without a chat template{part}. ± is the standard error."
    )


def _with_error(figures: Mapping[str, Any], model: str) -> str:
    error = figures[f"{model}_stderr"]
    return _figure(figures[model]) + (f" ± {error:,.4f}" if error is not None else "")


def _figure(value: object) -> str:
    return f"{value:,.4f}" if isinstance(value, int | float) else NOT_MEASURED


def _data_facts(made: Lineage) -> Iterator[tuple[str, str]]:
    if made.dataset:
        where = f"[{made.dataset}](https://huggingface.co/datasets/{made.dataset})"
        revision, split = made.setting("DATASET_REVISION"), made.setting("DATASET_SPLIT")
        yield "Dataset", f"{where}, revision `{revision}`, split `{split}`"
    else:
        yield "Dataset", "a local dataset" if made.data else NOT_RECORDED
    if not made.data:
        return
    metrics = made.data.get("metrics", {})
    yield "Columns", str(metrics.get("columns", NOT_RECORDED))
    yield "Prompt format", str(metrics.get("prompt_format", NOT_RECORDED))
    yield "Examples", _count(metrics.get("rows_in"))
    yield "Tokens", _count(metrics.get("tokens_in"))
    for split in ("train", "validation"):
        if facts := metrics.get(split):
            yield (
                f"{'Trained on' if split == 'train' else 'Held out'}",
                f"{_count(facts.get('documents'))} documents in {_count(facts.get('rows'))} "
                f"sequences of {_count(metrics.get('max_length'))} tokens, "
                f"{_count(facts.get('supervised'))} tokens in the loss",
            )


def _training(made: Lineage) -> str:
    if not made.train:
        return f"Settings: {NOT_RECORDED}."
    settings = made.train["provenance"]["settings"]
    facts = []
    if settings.get("LORA_R"):
        facts.append(("LoRA", f"rank {settings['LORA_R']}, alpha {settings.get('LORA_ALPHA')}"))
    metrics = made.train.get("metrics", {})
    for name, label in (("step", "Optimizer steps"), ("epoch", "Epochs"), ("loss", "Last loss")):
        facts.append((label, f"{metrics[name]:,.6g}" if name in metrics else NOT_RECORDED))
    tokens = made.train.get("tokens")
    facts.append(("Tokens seen", _count(tokens)))
    changed = _changed_settings({**made.data.get("provenance", {}).get("settings", {}), **settings})
    return (
        f"{_bullets(facts)}\n\nSettings that differ from trn-tune's defaults:\n\n"
        f"{fenced(chr(10).join(changed) or 'none')}"
    )


def _changed_settings(recorded: Mapping[str, Any]) -> list[str]:
    """NAME=value of those that are not the default; LoRA's only with LoRA. A file has no value
    that may be shown."""
    return [
        f"{variable(f)}={as_text(recorded[variable(f)])}"
        for f in fields(Settings)
        if variable(f) in recorded
        and not f.metadata["path"]
        and variable(f) not in _ELSEWHERE
        and not variable(f).startswith("DATASET")
        and recorded[variable(f)] != f.default
        and (recorded.get("LORA_R") or not variable(f).startswith("LORA_"))
    ]


def _stages_table(made: Lineage) -> str:
    rows = ["| Stage | Time | USD | Device | Versions |", "|---|---|---|---|---|"]
    for stage in ("data", "train", "consolidate", "eval"):
        manifest = getattr(made, stage)
        if not manifest:
            rows.append(f"| {stage} | {NOT_RECORDED} | | | |")
            continue
        usd, versions = manifest.get("usd"), manifest.get("versions", {})
        device = manifest.get("instance") or manifest.get("device") or NOT_RECORDED
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        price = "not known" if usd is None else f"{usd:,.2f}"
        time = duration(manifest["seconds"]) if "seconds" in manifest else NOT_RECORDED
        rows.append(f"| {stage} | {time} | {price} | {device} | {shown} |")
    return "\n".join(rows)


def _bullets(facts: Any) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in facts)


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else NOT_RECORDED
