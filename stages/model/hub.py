"""Asking the Hugging Face Hub: what it refuses becomes an InputError that says what to do.

What passes by itself (429, 5xx, a cut connection, a file that arrived wrong) is tried again. What
was fetched once is read from the Hub's cache without a network. The token is found by the library
itself (HF_TOKEN or `hf auth login`). Heavy libraries are imported by the caller's call.
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
LONGEST_SILENCE = (
    10.0  # seconds that a request waits for the next byte where the library would wait for ever
)
# Seconds after which a request that fails has been made six times by the library itself, with 23
# seconds between them.
LIBRARY_TRIED = 20.0


class Refusal(NamedTuple):
    """Why the Hub gave nothing. `passing`: trying again may help; `pause`: seconds that the Hub
    itself asks to wait, 0 if none."""

    brief: str
    words: str
    passing: bool = False
    pause: float = 0.0


class WrongContent(Exception):
    """A file of the Hub that has another digest than the Hub says."""


def download_files(model: str, revision: str, names: tuple[str, ...]) -> Path:
    """The folder in the Hub's cache that holds those of the files `names` that `model` has."""
    return from_hub("model", model, revision, lambda: _snapshot(model, revision or "main", names))


def from_hub(kind: str, name: str, revision: str, call: Callable[[], T]) -> T:
    """`call()`, again after a pause where that helps; raises InputError as text for the user of
    `name` (kind: dataset or model).

    Three tries, counted again after each that fetched something: a long download may be cut more
    often. What `call` fetches is read against its digest.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)  # it names a folder of the cache
    except HFValidationError as error:
        raise InputError(_refusal(kind, name, revision, error).words) from error
    _bound_requests()
    tries = 0
    while True:
        started, held = time.monotonic(), hub_cache.blobs(kind, name)
        try:
            try:
                return call()
            finally:
                wrong = hub_cache.remove_wrong(
                    kind, name, [path for path in hub_cache.blobs(kind, name) if path not in held]
                )
                if wrong:
                    raise WrongContent(wrong[0])
        except (
            Exception
        ) as error:  # the libraries below raise a dozen kinds, their own and those of HTTP clients
            refusal = _refusal(kind, name, revision, error)
            if "Consistency check failed" in str(error) or "(416)" in refusal.brief:
                hub_cache.remove_halves(kind, name)
            grown = sum(hub_cache.blobs(kind, name).values()) > sum(held.values())
            tries = 0 if grown else tries
            slow = time.monotonic() - started > LIBRARY_TRIED and not grown
            if not refusal.passing or slow or tries == len(PAUSES):
                raise InputError(refusal.words) from error
            pause = max(PAUSES[tries], refusal.pause)
            print(
                f"the Hub {refusal.brief}: trying again in {pause:g} s, {tries + 2} of "
                f"{len(PAUSES) + 1}",
                flush=True,
            )
            time.sleep(pause)
            tries += 1


def _snapshot(model: str, revision: str, names: tuple[str, ...]) -> Path:
    """The snapshot of `model` with all that it has of `names`: from the Hub, or whole from the
    cache when the Hub gives no listing."""
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
        if lost := hub_cache.missing("model", model, cached, names):
            raise FileNotFoundError(
                f"{len(lost)} of its files are not in the cache: {', '.join(lost[:3])}"
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
    if lost := hub_cache.missing(
        "model", model, folder, names
    ):  # the Hub was lost between the listing and the files
        raise ConnectionError(f"{len(lost)} files did not arrive: {', '.join(lost[:3])}")
    return folder


def _bound_requests() -> None:
    """Give the library's requests for listings, which have none, a time limit; those for files have
    theirs (HF_HUB_DOWNLOAD_TIMEOUT)."""
    from huggingface_hub import configure_http_backend
    from huggingface_hub.utils._http import _default_backend_factory

    def session() -> Any:
        made: Any = _default_backend_factory()
        ask = made.request
        made.request = lambda *given, **named: ask(
            *given, **{**named, "timeout": named.get("timeout") or LONGEST_SILENCE}
        )
        return made

    configure_http_backend(session)


def _refusal(kind: str, name: str, revision: str, error: BaseException) -> Refusal:
    """Read off the chain of exception_chain, by status and by class name: the classes moved between
    releases of the Hub's library."""
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
            + ": what is there is kept."
        )
        return Refusal(
            "cannot be reached",
            f"{it}: the cache holds a part of it only: {error}. {remedy}",
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
        asked = _asked_pause(headers)
        wait = f"Wait {asked:.0f} seconds" if asked else "Wait some minutes"
        words = (
            f"{it}: the Hub limits requests from here (429). {wait}; {sign_in}: the limit is "
            "higher then."
        )
        return Refusal("limits requests (429)", words, asked <= LONGEST_PAUSE, asked)
    if status >= 500:
        words = (
            f"{it}: the Hub is out of order ({status}). Try again later: what was fetched is kept."
        )
        return Refusal(
            f"is out of order ({status})", words, True, min(_asked_pause(headers), LONGEST_PAUSE)
        )
    if status == 416 or "WrongContent" in classes or "Consistency check failed" in str(error):
        words = (
            f"{it}: a file of it arrives with another content than the Hub says. Check the "
            "proxy between, or try again later."
        )
        return Refusal(f"sent a wrong file{' (416)' if status == 416 else ''}", words, True)
    if classes & {
        "EmptyDatasetError",
        "DataFilesNotFoundError",
    }:  # also when the Hub refuses the listing alone
        words = (
            f"{it}: the Hub shows no file of it that `datasets` reads (.parquet, .json, "
            f".jsonl, .csv ...). Check {page}."
        )
        return Refusal("shows no data file", words, True)
    if classes & {"InvalidJSONError", "FileMetadataError", "TooManyRedirects", "RecursionError"}:
        remedy = (
            "Check HF_ENDPOINT, the proxy, and whether this network wants a sign-in in a browser."
        )
        passing = not classes & {"TooManyRedirects", "RecursionError"}
        return Refusal(
            "gives no answer of a Hub",
            f"{it}: what answers at {page} is not the Hub ({error}). {remedy}",
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
        "refuses", f"{it} cannot be loaded from the Hub: {type(error).__name__}: {error}"
    )


def _evidence(error: BaseException) -> tuple[set[str], int, Mapping[str, str]]:
    """Names of the classes in the chain of exception_chain; status and headers of the answer in it,
    0 and none where there was no answer."""
    chain = list(exception_chain(error))
    classes = {cls.__name__ for link in chain for cls in type(link).__mro__}
    responses = [
        response for link in chain if (response := getattr(link, "response", None)) is not None
    ]
    status, headers = (responses[0].status_code, responses[0].headers) if responses else (0, {})
    return classes, status, headers


def _asked_pause(headers: Mapping[str, str]) -> float:
    """Seconds that a response asks to wait, 0 if it does not say: Retry-After, or the Hub's own
    `RateLimit: "api";r=0;t=SECONDS`."""
    retry_after = str(headers.get("Retry-After", ""))
    window = re.search(r"\bt=(\d+)", str(headers.get("RateLimit", "")))
    return float(retry_after) if retry_after.isdigit() else float(window[1]) if window else 0.0
