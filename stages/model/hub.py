"""Asking the Hugging Face Hub: what it refuses becomes an InputError that says what to do.

What passes by itself (429, 5xx, a cut connection) is tried again. What was fetched once is read from the Hub's cache without a
network. The token is found by the library itself (HF_TOKEN or `hf auth login`). Heavy libraries are imported by the caller's call.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from stages.run.errors import InputError

T = TypeVar("T")
PAUSES = (1.0, 4.0)  # seconds before the second and the third try


def download_files(model: str, revision: str, names: tuple[str, ...]) -> Path:
    """The folder in the Hub's cache that holds those of the files `names` that `model` has."""
    from huggingface_hub import snapshot_download

    return Path(from_hub("model", model, revision, lambda: snapshot_download(model, revision=revision or None, allow_patterns=list(names))))


def from_hub(kind: str, name: str, revision: str, call: Callable[[], T]) -> T:
    """`call()`, again after a pause where that helps; raises InputError in words for the user of `name` (kind: dataset or model)."""
    for pause in (*PAUSES, None):
        try:
            return call()
        except Exception as error:  # the libraries below raise a dozen kinds, their own and those of HTTP clients
            passing, words = _refusal(kind, name, revision, error)
            if pause is None or not passing:
                raise InputError(words) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _refusal(kind: str, name: str, revision: str, error: BaseException) -> tuple[bool, str]:
    """Whether the error may pass by itself, and the message for it. Read off the chain of causes, by status and by class name:
    the classes moved between releases of the Hub's library."""
    chain = [error]
    while following := chain[-1].__cause__ or chain[-1].__context__:
        if following in chain:
            break
        chain.append(following)
    classes = {cls.__name__ for link in chain for cls in type(link).__mro__}
    statuses = [code for link in chain if isinstance(code := getattr(getattr(link, "response", None), "status_code", None), int)]
    status = statuses[0] if statuses else 0
    # `datasets` has made six requests within 23 seconds before it gives up; off-line nothing changes by waiting.
    again = kind == "model" and os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0")
    setting = "DATASET" if kind == "dataset" else "MODEL_ID"
    page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{'datasets/' if kind == 'dataset' else ''}{name}"
    sign_in = "`hf auth login`, or set HF_TOKEN"
    if "GatedRepoError" in classes or "is a gated" in str(error):
        return False, f"{setting}={name} is gated. Accept its licence at {page}, then {sign_in} to a token of the account that accepted it."
    if "RevisionNotFoundError" in classes:
        return False, f"{setting}={name} has no revision {revision!r}. Set {setting.removesuffix('_ID')}_REVISION to one that {page} lists."
    if status == 403:
        return False, f"{setting}={name}: the Hub refuses access (403). Ask for it at {page}, then {sign_in} to a token that may read it."
    if status in (401, 404) or classes & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return False, f"{setting}={name}: the Hub shows no such {kind}. Check the name (OWNER/NAME) at {page}; if it is private, {sign_in}."
    if status == 429:
        return True, f"{setting}={name}: the Hub limits requests from here (429). Wait some minutes; {sign_in}: the limit is higher then."
    if status >= 500:
        return again, f"{setting}={name}: the Hub is out of order ({status}). Try again later: what was fetched is kept."
    if classes & {"ConnectionError", "Timeout", "TimeoutException", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError"}:
        remedy = "Check the network and HF_ENDPOINT, or name a local path: once fetched, it is read from the cache without a network."
        return again, f"{setting}={name}: the Hub cannot be reached and the cache does not hold it. {remedy}"
    return False, f"{setting}={name} cannot be loaded from the Hub: {type(error).__name__}: {error}"
