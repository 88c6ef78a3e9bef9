"""What an exception of the Hub's libraries means: the reason, the remedy, and whether to try again.

Exceptions are told apart by status and class name, because the classes moved between releases of
huggingface_hub, and `datasets` and the HTTP clients wrap them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from stages.run.errors import exception_chain

LONGEST_PAUSE = 300.0  # seconds: the Hub counts requests by windows of five minutes
_SIGN_IN = "`hf auth login`, or set HF_TOKEN"
_NO_DATA_FILE = {"EmptyDatasetError", "DataFilesNotFoundError"}
_NOT_THE_HUB = {"InvalidJSONError", "FileMetadataError", "TooManyRedirects", "RecursionError"}
_UNREACHABLE = {
    *("ConnectionError", "Timeout", "TimeoutException", "TransportError"),
    *("ChunkedEncodingError", "LocalEntryNotFoundError"),
}


class WrongContent(Exception):
    """A fetched file does not have the digest that the Hub gives for it."""


class Refusal(NamedTuple):
    """Why the Hub gave nothing. `passing`: trying again may help; `pause`: seconds that the Hub
    asks to wait, 0 if none."""

    reason: str
    message: str
    passing: bool = False
    pause: float = 0.0


@dataclass(frozen=True)
class _Request:
    """What was asked for, as messages name it."""

    kind: str  # dataset or model; to write: push (a dataset), push model
    name: str
    revision: str

    @property
    def setting(self) -> str:
        settings = {"dataset": "DATASET", "model": "MODEL_ID"}
        settings |= {"push": "PUSH_DATASET", "push model": "HUB_REPO"}
        return f"{settings[self.kind]}={self.name}"

    @property
    def writes(self) -> bool:
        return self.kind.startswith("push")

    @property
    def revision_setting(self) -> str:
        return f"{'DATASET' if self.kind == 'dataset' else 'MODEL'}_REVISION"

    @property
    def page(self) -> str:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        return f"{endpoint}/{'' if 'model' in self.kind else 'datasets/'}{self.name}"


def refusal_of(kind: str, name: str, revision: str, error: BaseException) -> Refusal:
    """What `error`, raised while the Hub was asked for `name` (kind: dataset or model) or to take
    it (push, push model), means."""
    asked = _Request(kind, name, revision)
    chain = list(exception_chain(error))
    classes = {cls.__name__ for link in chain for cls in type(link).__mro__}
    responses = [
        response for link in chain if (response := getattr(link, "response", None)) is not None
    ]
    status, headers = (responses[0].status_code, responses[0].headers) if responses else (0, {})
    return (
        _incomplete_cache(asked, error, classes)
        or _no_access(asked, error, classes, status, headers)
        or _busy(asked, status, headers)
        or _wrong_answer(asked, error, classes, status)
        or _no_network(asked, classes)
        or Refusal(
            "refuses",
            f"{asked.setting} cannot be {'pushed to' if asked.writes else 'loaded from'} "
            f"the Hub: {type(error).__name__}: {error}.",
        )
    )


def _incomplete_cache(asked: _Request, error: BaseException, classes: set[str]) -> Refusal | None:
    if not (isinstance(error, FileNotFoundError) and "not in the cache" in str(error)):
        return None
    offline = "OfflineModeIsEnabled" in classes
    remedy = (
        f"Run it once with the Hub in reach{' (HF_HUB_OFFLINE is set)' if offline else ''}. What "
        "is in the cache is kept."
    )
    message = f"{asked.setting}: the cache holds a part of it: {error}. {remedy}"
    return Refusal("cannot be reached", message, not offline)


def _no_access(
    asked: _Request,
    error: BaseException,
    classes: set[str],
    status: int,
    headers: Mapping[str, str],
) -> Refusal | None:
    """The Hub knows who asks, and says no; or it knows nothing of that name."""
    it = asked.setting
    if "GatedRepoError" in classes or "is a gated" in str(error):
        message = (
            f"{it} is gated. Accept its licence at {asked.page}, then {_SIGN_IN} to a token of "
            "the account that accepted it."
        )
    elif "RevisionNotFoundError" in classes:
        message = (
            f"{it} has no revision {asked.revision!r}. Set {asked.revision_setting} to one that "
            f"{asked.page} lists."
        )
    elif status == 401 and "Invalid" in str(headers.get("X-Error-Message", "")):
        message = f"{it}: the Hub does not know the token (401). Renew it: {_SIGN_IN}."
    elif asked.writes and status in (401, 403, 404):
        words = str(headers.get("X-Error-Message", ""))  # that a quota is used up, say
        message = (
            f"{it}: the Hub does not let this account write there ({status}{words and ': '}{words})"
            f". Check the owner's name, then {_SIGN_IN} to a token with the right to write."
        )
    elif status == 403:
        message = (
            f"{it}: the Hub refuses access (403). Ask for it at {asked.page}, then {_SIGN_IN} to "
            "a token that may read it."
        )
    elif status in (401, 404) or classes & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        message = (
            f"{it}: the Hub shows no such {asked.kind}. Check the name (OWNER/NAME) at "
            f"{asked.page}; if it is private, {_SIGN_IN}."
        )
    else:
        return None
    return Refusal("refuses", message)


def _busy(asked: _Request, status: int, headers: Mapping[str, str]) -> Refusal | None:
    pause = _requested_pause(headers)
    if status == 429:
        wait = f"Wait {pause:.0f} seconds" if pause else "Wait some minutes"
        message = (
            f"{asked.setting}: the Hub limits requests from this machine (429). {wait}, or raise "
            f"the limit with an account: {_SIGN_IN}."
        )
        return Refusal("limits requests (429)", message, pause <= LONGEST_PAUSE, pause)
    if status >= 500:
        message = (
            f"{asked.setting}: the Hub is out of order ({status}). Try again later"
            f"{'.' if asked.writes else ': what was fetched is kept.'}"
        )
        return Refusal(f"is out of order ({status})", message, True, min(pause, LONGEST_PAUSE))
    return None


def _wrong_answer(
    asked: _Request, error: BaseException, classes: set[str], status: int
) -> Refusal | None:
    """Something answered, but not with what was asked for."""
    it = asked.setting
    if status == 416 or "WrongContent" in classes or "Consistency check failed" in str(error):
        message = (
            f"{it}: one of its files arrives with other content than the Hub says. Check the "
            "proxy, or try again later."
        )
        return Refusal(f"sent a wrong file{' (416)' if status == 416 else ''}", message, True)
    if classes & _NO_DATA_FILE:  # also raised when the Hub refuses only the listing
        message = (
            f"{it}: the Hub shows no file that `datasets` reads (.parquet, .json, .jsonl, .csv "
            f"...). Check {asked.page}."
        )
        return Refusal("shows no data file", message, True)
    if classes & _NOT_THE_HUB:
        message = (
            f"{it}: the server at {asked.page} is not the Hub ({error}). Check HF_ENDPOINT, the "
            "proxy, and whether this network wants a sign-in in a browser."
        )
        passing = not classes & {"TooManyRedirects", "RecursionError"}
        return Refusal("gives no valid answer", message, passing)
    return None


def _no_network(asked: _Request, classes: set[str]) -> Refusal | None:
    if not classes & _UNREACHABLE:
        return None
    if asked.writes:
        offline = " HF_HUB_OFFLINE is set." if "OfflineModeIsEnabled" in classes else ""
        message = (
            f"{asked.setting}: the Hub cannot be reached.{offline} Check the network and "
            "HF_ENDPOINT."
        )
        return Refusal("cannot be reached", message, not offline)
    message = (
        f"{asked.setting}: the Hub cannot be reached and the cache does not hold it. Check the "
        "network and HF_ENDPOINT, or name a local path: once fetched, it is read from the cache "
        "without a network."
    )
    return Refusal("cannot be reached", message, "OfflineModeIsEnabled" not in classes)


def _requested_pause(headers: Mapping[str, str]) -> float:
    """Seconds that a response asks to wait, 0 if none: Retry-After, or the Hub's
    `RateLimit: "api";r=0;t=SECONDS`."""
    retry_after = str(headers.get("Retry-After", ""))
    window = re.search(r"\bt=(\d+)", str(headers.get("RateLimit", "")))
    return float(retry_after) if retry_after.isdigit() else float(window[1]) if window else 0.0
