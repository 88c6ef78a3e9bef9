"""What a stage's manifest says of its result, for people: one line, without opening another file.

Standard library only, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stages.run.layout import MANIFEST_FILE
from stages.run.manifest import manifest_of
from stages.run.progress import duration, show_size
from stages.run.provenance import accepted


def outcome(manifest: dict[str, Any]) -> str:
    """The main number of what a stage published; empty where its manifest has none."""
    metrics = manifest.get("metrics")
    try:
        return _OUTCOMES[manifest["stage"]](metrics) if isinstance(metrics, dict) else ""
    except (KeyError, TypeError, ValueError):  # of another version of the project
        return ""


def facts(manifest: dict[str, Any]) -> str:
    """When it was published, how long that took, what it cost and what came of it, as a line."""
    parts = [finished(manifest), took(manifest), dollars(manifest), outcome(manifest)]
    if manifest.get("adopted"):
        parts.append("adopted")
    return ", ".join(part for part in parts if part)


def finished(manifest: dict[str, Any]) -> str:
    """`2026-11-28 16:02`, in UTC."""
    return str(manifest.get("finished", ""))[:16].replace("T", " ")


def took(manifest: dict[str, Any]) -> str:
    seconds = manifest.get("seconds")
    return duration(seconds) if isinstance(seconds, int | float) else ""


def dollars(manifest: dict[str, Any]) -> str:
    usd = manifest.get("usd")
    return f"{usd:.2f} USD" if isinstance(usd, int | float) else ""


def published(run: Path, stages: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The manifests of a run by stage."""
    found = {stage: manifest_of(run / stage) for stage in stages}
    return {stage: manifest for stage, manifest in found.items() if manifest is not None}


def of_other_inputs(
    manifests: dict[str, dict[str, Any]],
) -> Iterator[tuple[str, str, str, str]]:
    """Stage, input, and the input's content then and now, of each stage that was made from another
    output than its input has now, and was not adopted since."""
    for stage, manifest in manifests.items():
        for name, content in accepted(manifest)["inputs"].items():
            now = manifests.get(name, {}).get("content")
            if now and now != content:
                yield stage, name, content, now


def runs_of(outputs: Path, stages: Iterable[str]) -> list[Path]:
    """The folders below outputs/ in which any stage has a manifest, by name."""
    names = list(stages)
    return sorted(
        folder
        for folder in (outputs.iterdir() if outputs.is_dir() else ())
        if not folder.name.startswith(".")
        and any((folder / name / MANIFEST_FILE).is_file() for name in names)
    )


def _of_data(metrics: dict[str, Any]) -> str:
    train = metrics["train"]
    return (
        f"{train['documents']:,} documents, {train['rows']:,} sequences of "
        f"{metrics['max_length']:,} tokens"
    )


def _of_precompile(metrics: dict[str, Any]) -> str:
    if (seconds := metrics.get("seconds_per_step")) is not None:
        return f"{seconds:.3g} s a step"
    return f"{metrics['graphs']:,} graphs"


def _of_train(metrics: dict[str, Any]) -> str:
    loss = f"step {metrics['step']:,}, loss {metrics['loss']:.4g}"
    held_out = metrics.get("validation_loss")
    return loss if held_out is None else f"{loss}, held out {held_out:.4g}"


def _of_consolidate(metrics: dict[str, Any]) -> str:
    return f"{metrics['parameters']:,} parameters, {show_size(metrics['bytes'])}"


def _of_compile_inference(metrics: dict[str, Any]) -> str:
    return f"{metrics['sequence_length']:,} tokens, batch {metrics['batch_size']}"


def _of_eval(metrics: dict[str, Any]) -> str:
    parts = []
    if "fine_tuned" in metrics:
        base, tuned = metrics["base"]["loss"], metrics["fine_tuned"]["loss"]
        parts.append(f"loss {base:.4f} -> {tuned:.4f}")
    if "quantized" in metrics:
        parts.append(f"quantised {metrics['quantized']['loss']:.4f}")
    if metrics.get("judged"):
        parts.append(f"{metrics['exact_matches']} of {metrics['judged']} to the letter")
    return ", ".join(parts) or f"{metrics['answers']} answers"


_OUTCOMES = {
    "data": _of_data,
    "precompile": _of_precompile,
    "train": _of_train,
    "consolidate": _of_consolidate,
    "compile-inference": _of_compile_inference,
    "eval": _of_eval,
}
