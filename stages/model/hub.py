"""Ask the Hugging Face Hub; a refusal becomes an InputError with a remedy.

Temporary failures (429, 5xx, a cut connection, a corrupt file) are tried again. Without a network,
files come from the Hub's cache. The library finds the token (HF_TOKEN or `hf auth login`). The
caller's function imports the heavy libraries.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from stages.model import hub_cache
from stages.run.errors import InputError, exception_chain

T = TypeVar("T")
PAUSES = (1.0, 4.0)  # seconds before the second and the third try
LONGEST_PAUSE = 300.0  # seconds: the Hub counts requests by windows of five minutes
# Seconds that a request waits for the next byte; the library would wait for ever.
LONGEST_SILENCE = 10.0
# A request that takes longer than this many seconds to fail was tried six times by the library,
# which waits 23 seconds in all.
LIBRARY_TRIED = 20.0


class Refusal(NamedTuple):
    """Why the Hub gave nothing. `passing`: trying again may help; `pause`: seconds that the Hub
    asks to wait, 0 if none."""

    reason: str
    message: str
    passing: bool = False
    pause: float = 0.0


class WrongContent(Exception):
    """A fetched file does not have the digest that the Hub gives for it."""


def download_files(model: str, revision: str, names: tuple[str, ...]) -> Path:
    """The folder in the Hub's cache with the files of `model` that match `names`."""
    return from_hub("model", model, revision, lambda: _snapshot(model, revision or "main", names))


def from_hub(kind: str, name: str, revision: str, call: Callable[[], T]) -> T:
    """`call()`, tried again after a pause where that helps; raises InputError with a message about
    `name` (kind: dataset or model).

    Three tries. The count restarts after a try that fetched something, because a long download may
    be cut more often. The files that `call` fetches are checked against their digests.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)  # it names a folder of the cache
    except HFValidationError as error:
        raise InputError(_refusal(kind, name, revision, error).message) from error
    _bound_requests()
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
        # The libraries raise a dozen exceptions of several HTTP clients.
        except Exception as error:
            refusal = _refusal(kind, name, revision, error)
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


def _bound_requests() -> None:
    """Set a time limit for the library's requests for listings, which have none. Requests for files
    have one (HF_HUB_DOWNLOAD_TIMEOUT)."""
    from huggingface_hub import configure_http_backend
    from huggingface_hub.utils._http import _default_backend_factory

    def session() -> Any:
        new: Any = _default_backend_factory()
        request = new.request
        new.request = lambda *arguments, **options: request(
            *arguments, **{**options, "timeout": options.get("timeout") or LONGEST_SILENCE}
        )
        return new

    configure_http_backend(session)


def _refusal(kind: str, name: str, revision: str, error: BaseException) -> Refusal:
    """Classify `error` by the status and the class names in its exception_chain: the classes moved
    between releases of the Hub's library."""
    classes, status, headers = _evidence(error)
    offline = "OfflineModeIsEnabled" in classes
    setting = "DATASET" if kind == "dataset" else "MODEL_ID"
    which = f"{setting.removesuffix('_ID')}_REVISION"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    page = f"{endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
    sign_in = "`hf auth login`, or set HF_TOKEN"
    it = f"{setting}={name}"
    if isinstance(error, FileNotFoundError) and "not in the cache" in str(error):
        remedy = (
            "Run it once with the Hub in reach"
            + (" (HF_HUB_OFFLINE is set)" if offline else "")
            + ". What is in the cache is kept."
        )
        return Refusal(
            "cannot be reached",
            f"{it}: the cache holds a part of it: {error}. {remedy}",
            not offline,
        )
    if "GatedRepoError" in classes or "is a gated" in str(error):
        remedy = (
            f"Accept its licence at {page}, then {sign_in} to a token of the account that "
            "accepted it."
        )
        return Refusal("refuses", f"{it} is gated. {remedy}")
    if "RevisionNotFoundError" in classes:
        return Refusal(
            "refuses", f"{it} has no revision {revision!r}. Set {which} to one that {page} lists."
        )
    if status == 401 and "Invalid" in str(headers.get("X-Error-Message", "")):
        return Refusal(
            "refuses", f"{it}: the Hub does not know the token (401). Renew it: {sign_in}."
        )
    if status == 403:
        return Refusal(
            "refuses",
            f"{it}: the Hub refuses access (403). Ask for it at {page}, then {sign_in} to a token "
            "that may read it.",
        )
    if status in (401, 404) or classes & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        remedy = f"Check the name (OWNER/NAME) at {page}; if it is private, {sign_in}."
        return Refusal("refuses", f"{it}: the Hub shows no such {kind}. {remedy}")
    if status == 429:
        pause = _requested_pause(headers)
        wait = f"Wait {pause:.0f} seconds" if pause else "Wait some minutes"
        message = (
            f"{it}: the Hub limits requests from this machine (429). {wait}, or raise the limit "
            f"with an account: {sign_in}."
        )
        return Refusal("limits requests (429)", message, pause <= LONGEST_PAUSE, pause)
    if status >= 500:
        message = (
            f"{it}: the Hub is out of order ({status}). Try again later: what was fetched is kept."
        )
        return Refusal(
            f"is out of order ({status})",
            message,
            True,
            min(_requested_pause(headers), LONGEST_PAUSE),
        )
    if status == 416 or "WrongContent" in classes or "Consistency check failed" in str(error):
        message = (
            f"{it}: one of its files arrives with other content than the Hub says. Check the "
            "proxy, or try again later."
        )
        return Refusal(f"sent a wrong file{' (416)' if status == 416 else ''}", message, True)
    # Also raised when the Hub refuses only the listing.
    if classes & {"EmptyDatasetError", "DataFilesNotFoundError"}:
        message = (
            f"{it}: the Hub shows no file that `datasets` reads (.parquet, .json, "
            f".jsonl, .csv ...). Check {page}."
        )
        return Refusal("shows no data file", message, True)
    if classes & {"InvalidJSONError", "FileMetadataError", "TooManyRedirects", "RecursionError"}:
        remedy = (
            "Check HF_ENDPOINT, the proxy, and whether this network wants a sign-in in a browser."
        )
        passing = not classes & {"TooManyRedirects", "RecursionError"}
        return Refusal(
            "gives no valid answer",
            f"{it}: the server at {page} is not the Hub ({error}). {remedy}",
            passing,
        )
    if classes & {
        "ConnectionError",
        "Timeout",
        "TimeoutException",
        "TransportError",
        "ChunkedEncodingError",
        "LocalEntryNotFoundError",
    }:
        remedy = (
            "Check the network and HF_ENDPOINT, or name a local path: once fetched, it is "
            "read from the cache without a network."
        )
        return Refusal(
            "cannot be reached",
            f"{it}: the Hub cannot be reached and the cache does not hold it. {remedy}",
            not offline,
        )
    return Refusal(
        "refuses", f"{it} cannot be loaded from the Hub: {type(error).__name__}: {error}."
    )


def _evidence(error: BaseException) -> tuple[set[str], int, Mapping[str, str]]:
    """Names of the classes in the error's exception_chain; status and headers of the first response
    in it, 0 and none without a response."""
    chain = list(exception_chain(error))
    classes = {cls.__name__ for link in chain for cls in type(link).__mro__}
    responses = [
        response for link in chain if (response := getattr(link, "response", None)) is not None
    ]
    status, headers = (responses[0].status_code, responses[0].headers) if responses else (0, {})
    return classes, status, headers


def _requested_pause(headers: Mapping[str, str]) -> float:
    """Seconds that a response asks to wait, 0 if none: Retry-After, or the Hub's
    `RateLimit: "api";r=0;t=SECONDS`."""
    retry_after = str(headers.get("Retry-After", ""))
    window = re.search(r"\bt=(\d+)", str(headers.get("RateLimit", "")))
    return float(retry_after) if retry_after.isdigit() else float(window[1]) if window else 0.0
