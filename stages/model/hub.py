"""Ask the Hugging Face Hub; a refusal becomes an InputError with a remedy.

Temporary failures (429, 5xx, a cut connection, a corrupt file) are tried again. Without a network,
files come from the Hub's cache. The library finds the token (HF_TOKEN or `hf auth login`). The
caller's function imports the heavy libraries.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from stages.model import hub_cache
from stages.model.hub_errors import WrongContent, refusal_of
from stages.run.errors import InputError

T = TypeVar("T")
PAUSES = (1.0, 4.0)  # seconds before the second and the third try
# Seconds that a request waits for the next byte; the library would wait for ever.
LONGEST_SILENCE = 10.0
LONGEST_COMMIT = 120.0  # the same while the Hub takes files in
# A request that takes longer than this many seconds to fail was tried six times by the library,
# which waits 23 seconds in all.
LIBRARY_TRIED = 20.0


def download_files(model: str, revision: str, names: tuple[str, ...]) -> Path:
    """The folder in the Hub's cache with the files of `model` that match `names`."""
    return from_hub("model", model, revision, lambda: _snapshot(model, revision or "main", names))


def from_hub(kind: str, name: str, revision: str, call: Callable[[], T]) -> T:
    """`call()`, tried again after a pause where that helps; raises InputError with a message about
    `name` (kind: dataset or model; to write one: push or push model).

    Three tries. The count restarts after a try that fetched something, because a long download may
    be cut more often. The files that `call` fetches are checked against their digests.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)  # it names a folder of the cache
    except HFValidationError as error:
        raise InputError(refusal_of(kind, name, revision, error).message) from error
    _bound_requests(kind)
    tries = 0
    while True:
        started, cached = time.monotonic(), hub_cache.blobs(kind, name)
        try:
            try:
                return call()
            finally:
                fetched = [path for path in hub_cache.blobs(kind, name) if path not in cached]
                if corrupt := hub_cache.remove_corrupt(kind, name, fetched):
                    raise WrongContent(corrupt[0])
        except InputError:
            raise
        # The libraries raise a dozen exceptions of several HTTP clients.
        except Exception as error:
            refusal = refusal_of(kind, name, revision, error)
            if "Consistency check failed" in str(error) or "(416)" in refusal.reason:
                hub_cache.remove_incomplete(kind, name)
            grown = sum(hub_cache.blobs(kind, name).values()) > sum(cached.values())
            tries = 0 if grown else tries
            slow = time.monotonic() - started > LIBRARY_TRIED and not grown
            if not refusal.passing or slow or tries == len(PAUSES):
                raise InputError(refusal.message) from error
            pause = max(PAUSES[tries], refusal.pause)
            print(
                f"the Hub {refusal.reason}: trying again in {pause:g} s, {tries + 2} of "
                f"{len(PAUSES) + 1}",
                flush=True,
            )
            time.sleep(pause)
            tries += 1


def _snapshot(model: str, revision: str, names: tuple[str, ...]) -> Path:
    """The snapshot of `model` with its files that match `names`: from the Hub, or from the cache if
    that is complete and the Hub gives no listing."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        info = HfApi().model_info(model, revision=revision)
    except RevisionNotFoundError:
        raise
    except Exception as error:
        commit = hub_cache.commit_of("model", model, revision)
        cached = hub_cache.folder_of("model", model) / "snapshots" / commit
        if not cached.is_dir():
            raise
        if missing := hub_cache.missing("model", model, cached, names):
            raise FileNotFoundError(
                f"{len(missing)} of its files are not in the cache: {', '.join(missing[:3])}"
            ) from error
        print(
            f"MODEL_ID={model}: taken from the cache, commit {commit[:8]}, without asking the Hub",
            flush=True,
        )
        return cached
    hub_cache.note_listing(
        "model", model, info.sha or revision, [file.rfilename for file in info.siblings or []]
    )
    folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(names)))
    # The connection may break between the listing and the files.
    if missing := hub_cache.missing("model", model, folder, names):
        raise ConnectionError(f"{len(missing)} files did not arrive: {', '.join(missing[:3])}")
    return folder


def _bound_requests(kind: str) -> None:
    """Set a time limit for the library's requests for listings, which have none. Requests for files
    have one (HF_HUB_DOWNLOAD_TIMEOUT)."""
    from huggingface_hub import configure_http_backend
    from huggingface_hub.utils._http import _default_backend_factory

    silence = LONGEST_COMMIT if kind.startswith("push") else LONGEST_SILENCE

    def session() -> Any:
        new: Any = _default_backend_factory()
        request = new.request
        new.request = lambda *arguments, **options: request(
            *arguments, **{**options, "timeout": options.get("timeout") or silence}
        )
        return new

    configure_http_backend(session)
