"""What a stage's output was made from, and why it would be made from something else now.

A provenance has four parts: the settings that affect the stage (a local file by its content), a
digest of each file of code that it runs, the pinned versions of the libraries that shape its
output, and the content of its upstream stages' outputs. A stage is stale when the provenance in its
manifest differs from today's; the reason is the difference, as text. Nothing here writes. Standard
library only: make runs it at every start.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from stages.model.files import model_files
from stages.run import digests
from stages.run.backend import choose, find_backend
from stages.run.fingerprint import ROOT, code_of, raw_digest
from stages.run.layout import CONFIG_FILE, TOKENIZER_FILES
from stages.run.manifest import file_problems, manifest_of, manifest_problem
from stages.run.one_look import read_once
from stages.run.settings import Settings

# What is installed, by backend: files of pins, each of which may name another in a line `-r FILE`.
REQUIREMENTS = {"torch": "requirements.txt", "neuron": "docker/requirements.txt"}
# The pinned libraries that shape what a stage publishes.
LIBRARIES = {
    "data": ("datasets", "jinja2", "tokenizers", "transformers"),
    "precompile": ("torch", "transformers"),
    "train": ("torch", "transformers"),
    "consolidate": ("safetensors", "torch", "transformers"),
    "compile-inference": ("torch", "transformers"),
    "eval": ("jinja2", "tokenizers", "torch", "transformers"),
}
# Those that shape it besides on Neuron.
NEURON_LIBRARIES = {
    "precompile": ("neuronx-cc", "optimum-neuron"),
    "train": ("neuronx-distributed", "optimum-neuron"),
    "compile-inference": ("neuronx-cc", "optimum-neuron"),
    "eval": ("optimum-neuron",),
}
# The part of a model folder that a stage reads; the others read weights and configs. A manifest, a
# prompt and checkpoints in it change nothing: a model that is made again with the same content is
# the same model.
MODEL_FILES = {
    "data": TOKENIZER_FILES,
    "precompile": (CONFIG_FILE,),
}


def provenance_now(
    stage: str, settings: Settings, inputs: dict[str, Path], published: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `stage` would be made from now, and what was looked at to know it.

    `inputs` are the output folders of the upstream stages whose content counts. `published` is the
    stage's own manifest, if any: a file whose bytes (code) or signature (data) are unchanged is not
    analysed or read again. BACKEND=auto stays what it was: looking from another machine makes
    nothing stale.
    """
    seen_then = (published or {}).get("seen", {})
    provenance_then = accepted(published) if published else {}
    backend_then = (
        seen_then.get("backend")
        if seen_then.get("backend") in REQUIREMENTS
        else find_backend().name
    )
    named = settings.backend != "auto" or settings.device != "auto"
    backend = choose(settings).name if named else backend_then
    code, raw = _code(
        stage,
        backend,
        provenance_then.get("code", {}),
        seen_then.get("code", {}) if seen_then.get("backend") == backend else {},
    )
    values, signatures = _values(
        stage, settings, provenance_then.get("settings", {}), seen_then.get("files", {})
    )
    if "BACKEND" in values:
        values["BACKEND"] = backend  # found or named is the same
    upstream = {
        name: (manifest_of(folder) or {}).get("content", "nothing yet")
        for name, folder in inputs.items()
    }
    pins = {
        name: version
        for name, version in pinned_versions(backend).items()
        if name in libraries_of(stage, backend)
    }
    provenance = {"settings": values, "code": code, "versions": pins, "inputs": upstream}
    return provenance, {"backend": backend, "code": raw, "files": signatures}


def reasons(stage: str, settings: Settings, inputs: dict[str, Path], output: Path) -> list[str]:
    """Why `stage` has to run, as text; empty when it would publish what it published."""
    published = manifest_of(output)
    if published is None:
        return reasons_of(None, {}, output)
    return reasons_of(
        published,
        provenance_now(stage, settings, inputs, published)[0],
        output,
        verify=settings.verify,
    )


def reasons_of(
    published: dict[str, Any] | None, now: dict[str, Any], output: Path, verify: bool = False
) -> list[str]:
    """`reasons`, from the published manifest and today's provenance; `verify` reads every file."""
    if published is None:
        return [manifest_problem(output)]
    return differences(accepted(published), now) + file_problems(published, output, read=verify)


def accepted(published: dict[str, Any]) -> dict[str, Any]:
    """The provenance with which a published output is up to date: its own, or the last that `make
    adopt` took for as good."""
    adopted = published.get("adopted")
    last: dict[str, Any] = (adopted[-1] if adopted else published)["provenance"]
    return last


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Each difference of two provenances as a phrase: `LEARNING_RATE 5e-05 -> 0.0001`."""
    found = []
    for part in ("settings", "versions", "code", "inputs"):
        before, after = then.get(part, {}), now[part]
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                found.append(_difference(part, name, before.get(name), after.get(name)))
    return found


def libraries_of(stage: str, backend: str) -> tuple[str, ...]:
    """The libraries that shape what `stage` publishes on `backend`."""
    return LIBRARIES[stage] + (NEURON_LIBRARIES.get(stage, ()) if backend == "neuron" else ())


@read_once
def pinned_versions(backend: str) -> dict[str, str]:
    """Library -> version that the backend's requirements pin, or the files that they include."""
    pins: dict[str, str] = {}
    files = [ROOT / REQUIREMENTS[backend]]
    for file in files:
        text = file.read_text(encoding="utf-8")
        for name, version, marker in re.findall(
            r"^([\w.-]+)(?:\[[\w,]+\])?==([\w.+-]+)[ ]*(?:;(.*))?", text, re.MULTILINE
        ):
            if _holds(marker):
                pins.setdefault(name.lower().replace("_", "-"), version)
        files += [file.parent / name for name in re.findall(r"^-r (\S+)", text, re.MULTILINE)]
    return pins


def installed_version(library: str) -> str | None:
    """The version of `library` that is installed here; None where it is not."""
    import importlib.metadata  # 24 ms that an answer, and make, need not wait for

    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _holds(marker: str) -> bool:
    """Whether a pin's condition holds for this Python; only conditions on its version are used."""
    match = re.search(r'python_version (<|>=) "3\.(\d+)"', marker)
    return match is None or (sys.version_info.minor < int(match[2])) == (match[1] == "<")


def _difference(part: str, name: str, before: Any, after: Any) -> str:
    if part == "code":
        return (
            f"{name} {'is new' if before is None else 'is gone' if after is None else 'was edited'}"
        )
    if part == "inputs":
        return f"{name} has other content"
    if (
        isinstance(before, str)
        and before.startswith("sha256:")
        and str(after).startswith("sha256:")
    ):
        return f"{name} has other content"
    return f"{name} {before} -> {after}"


def _code(
    stage: str, backend: str, meaning_then: dict[str, Any], raw_then: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    raw = {path: raw_digest(path) for path in raw_then}
    if raw and raw == raw_then:
        return meaning_then, raw
    meaning = code_of(stage, backend)
    return meaning, {path: raw_digest(path) for path in meaning}


def _values(
    stage: str, settings: Settings, values_then: dict[str, Any], signatures_then: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    values, signatures = settings.affecting(stage), {}
    for name in settings.path_settings():
        # Only the content of DATASET=folder/rows.jsonl counts, not where the file is or its name.
        path = Path(str(values.get(name)))
        if not values.get(name) or not path.exists():
            continue
        files = _model_files(stage, path) if name == "MODEL_ID" else None
        signatures[name] = digests.signature(path, files)
        if signatures[name] == signatures_then.get(name) and name in values_then:
            values[name] = values_then[name]
        else:
            values[name] = f"sha256:{digests.content_digest(path, files)}"
    return values, signatures


def _model_files(stage: str, folder: Path) -> list[Path]:
    """The files of a model's folder that shape what `stage` publishes."""
    if stage not in MODEL_FILES:
        return model_files(folder)
    return [folder / name for name in MODEL_FILES[stage] if (folder / name).is_file()]
