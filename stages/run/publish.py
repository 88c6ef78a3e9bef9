"""Publish a stage's output completely or not at all.

A stage works in a folder next to its output, keyed by its provenance. When everything is written,
the manifest is added and one rename replaces the output. A stage that is killed before that leaves
the former output as it was; a training's work folder survives, and the same command resumes it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.forecast.planned import compared, planned
from stages.model.location import own_output_problems
from stages.run import provenance
from stages.run.backend import choose
from stages.run.cost import cost_of
from stages.run.digests import combine, file_digest
from stages.run.disk import disk_guard, require_writable
from stages.run.errors import InputError
from stages.run.fsync import flush, fsync_tree, make_durable_folder
from stages.run.host import peak_resident
from stages.run.json_file import write_json
from stages.run.layout import HISTORY_FOLDER, MANIFEST_FILE
from stages.run.lock import locked
from stages.run.manifest import file_problems, manifest_of, with_checksum
from stages.run.progress import duration
from stages.run.settings import Settings

_RENAME_EXCHANGE = 2  # linux/fs.h; renameat2(2)
_AT_FDCWD = -100


@dataclass
class StageResult:
    """What a stage reports for its manifest, besides the files it wrote.

    `digests`: SHA-256 of files that were hashed while they were written. `unkeyed`: files that
    differ from run to run although the result is the same (timings); they make no stage stale.
    `earlier_seconds`: what former starts of the same work took.
    """

    device: str = "cpu"
    tokens: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    unkeyed: tuple[str, ...] = ()
    earlier_seconds: float = 0.0


def publish(
    stage: str,
    settings: Settings,
    inputs: dict[str, Path],
    output: Path,
    build: Callable[[Path], StageResult],
    resumable: bool = False,
    needed: Callable[[], str] = lambda: "",
) -> bool:
    """Run `build(work_folder)` and publish the folder as `output`, unless that is up to date.

    `needed` gives a reason to build again although nothing changed; empty for none.

    `inputs` are the upstream outputs whose content counts. Returns whether anything was built. The
    provenance is taken before the work starts: an edit during a long training is not recorded.
    """
    run_folder = output.parent
    if "MODEL_ID" in settings.affecting(stage) and (
        problems := own_output_problems(settings.model_id, run_folder)
    ):
        raise InputError(problems)
    require_writable(run_folder)
    with locked(run_folder, stage):
        _put_back(output)
        published = manifest_of(output)
        made_from, seen = provenance.provenance_now(stage, settings, inputs, published)
        why = provenance.reasons_of(published, made_from, output, verify=settings.verify)
        why += [reason] if not why and (reason := needed()) else []
        if not why:
            print(f"{stage}: up to date ({output})", flush=True)
            return False
        print(f"{stage}: {'; '.join(why)}", flush=True)
        if seen["backend"] != choose(settings).name:  # it was published by another machine's
            made_from, seen = provenance.provenance_now(stage, settings, inputs, None)
        if "BACKEND" in settings.affecting(stage):
            print("backend: {0.name} ({0.reason})".format(choose(settings)), flush=True)
        work = _work_folder(run_folder, stage, made_from, resumable)
        plan = planned(stage, settings, run_folder)
        started = time.monotonic()
        try:
            with disk_guard(f"{stage}'s output", work):
                facts = build(work)
                seconds = time.monotonic() - started + facts.earlier_seconds
                cost = cost_of(seconds, settings)
                _write_manifest(stage, work, made_from, seen, facts, cost, plan)
                _replace(output, work)
        except BaseException:
            if not resumable:
                _remove_work(work)
            raise
        _say_published(stage, output, cost)
        return True


def _say_published(stage: str, output: Path, cost: dict[str, Any]) -> None:
    dollars = "" if cost["usd"] is None else f", {cost['usd']:.2f} USD"
    print(f"{stage}: published {output} in {duration(cost['seconds'])}{dollars}", flush=True)


def work_folder(run_folder: Path, stage: str, made_from: dict[str, Any]) -> Path:
    """Where `stage` works on what is made from `made_from`; a training's survives a kill."""
    return run_folder / ".work" / f"{stage}-{_key(made_from)}"


def _work_folder(run_folder: Path, stage: str, made_from: dict[str, Any], resumable: bool) -> Path:
    works = run_folder / ".work"
    work = work_folder(run_folder, stage, made_from)
    for left in works.glob(f"{stage}-*"):  # of a run that was killed
        if not resumable or left.suffix == ".former" or _was_replaced(left):
            shutil.rmtree(left)
    make_durable_folder(work)  # so that what a training leaves in it can be found again
    return work


def _was_replaced(work: Path) -> bool:
    """Whether a work folder holds a former output, left by a kill right after the exchange.

    A folder with a manifest is finished. It waits to be published only if it is undamaged and its
    provenance is the one in its name.
    """
    manifest = manifest_of(work)
    return manifest is not None and (
        _key(manifest["provenance"]) not in work.name or bool(file_problems(manifest, work))
    )


def _key(made_from: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]


def _write_manifest(
    stage: str,
    work: Path,
    made_from: dict[str, Any],
    seen: dict[str, Any],
    facts: StageResult,
    cost: dict[str, Any],
    plan: dict[str, float | None],
) -> None:
    (work / MANIFEST_FILE).unlink(
        missing_ok=True
    )  # of a former call that finished this work and was killed
    files = sorted(path for path in work.rglob("*") if path.is_file())
    names = [path.relative_to(work).as_posix() for path in files]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter's lock
        digests = pool.map(lambda name: facts.digests.get(name) or file_digest(work / name), names)
        outputs: dict[str, dict[str, Any]] = {
            name: {"bytes": path.stat().st_size, "sha256": digest}
            for name, path, digest in zip(names, files, digests, strict=True)
        }
    keyed = {name: entry["sha256"] for name, entry in outputs.items() if name not in facts.unkeyed}
    manifest = {
        "stage": stage,
        "content": combine(keyed),
        "metrics": facts.metrics,
        "tokens": facts.tokens,
        "tokens_per_second": round(facts.tokens / cost["seconds"], 1)
        if facts.tokens and cost["seconds"]
        else None,
        **cost,
        "forecast": compared(
            plan,
            {
                "seconds": cost["seconds"],
                "peak_memory_bytes": facts.metrics.get("peak_memory_bytes") or _peak_memory(),
                "bytes": sum(entry["bytes"] for entry in outputs.values()),
            },
        ),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": facts.device,
        "versions": _installed(stage, seen["backend"]),
        "provenance": made_from,
        "outputs": outputs,
        "seen": seen,
    }
    write_json(work / MANIFEST_FILE, with_checksum(manifest))
    fsync_tree(work)


def _peak_memory() -> int:
    """Bytes of the largest of this process and those that it waited for."""
    of_children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return max(peak_resident() or 0, of_children)


def remove_published(output: Path, part: str, because: str) -> None:
    """Remove the folder `part` of a published output; its manifest says so first."""
    with locked(output.parent, output.name):
        manifest = manifest_of(output)
        if manifest is None or not (output / part).is_dir():
            return
        manifest["removed"] = because
        manifest["outputs"] = {
            name: facts
            for name, facts in manifest["outputs"].items()
            if not name.startswith(f"{part}/")
        }
        rewrite_manifest(output, manifest)
        shutil.rmtree(output / part)


def rewrite_manifest(output: Path, manifest: dict[str, Any]) -> None:
    """Put another manifest in the place of a published one, in one step that a power cut does not
    undo."""
    beside = output / ".manifest.json"
    write_json(beside, with_checksum(manifest))
    flush(beside)
    beside.replace(output / MANIFEST_FILE)
    flush(output)


def _installed(stage: str, backend: str) -> dict[str, str]:
    versions = {
        name: provenance.installed_version(name) or "not installed"
        for name in provenance.libraries_of(stage, backend)
    }
    return {"python": platform.python_version(), **versions}


def _replace(output: Path, work: Path) -> None:
    """Put `work` in the place of `output` by one rename, then remove the former output."""
    former = work.with_name(f"{work.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    _keep_history(output)
    if not output.exists():
        work.rename(output)
    elif _exchange(work, output):
        work.rename(former)
    else:  # a file system without exchange (NFS, macOS): two renames, a moment without an output
        output.rename(former)
        work.rename(output)
    flush(output.parent)
    _remove_work(former)


def _keep_history(output: Path) -> None:
    """Keep the manifest of what is about to be replaced, for `make history`."""
    manifest = manifest_of(output)
    if manifest is not None:
        kept = output.parent / HISTORY_FOLDER / output.name
        kept.mkdir(parents=True, exist_ok=True)
        beside = kept / ".writing"
        write_json(beside, manifest)
        beside.replace(kept / f"{manifest['sha256'][:16]}.json")


def _put_back(output: Path) -> None:
    """Restore the name of a former output that a kill between `_replace`'s two renames took."""
    for former in output.parent.glob(f".work/{output.name}-*.former"):
        if not output.exists():
            former.rename(output)
            flush(output.parent)


def _remove_work(work: Path) -> None:
    """Remove a work folder, and the folder of work folders when it was the last."""
    shutil.rmtree(work, ignore_errors=True)
    if not any(work.parent.iterdir()):
        work.parent.rmdir()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths atomically; False where this system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return (
        renameat2 is not None
        and renameat2(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE) == 0
    )
