"""Ask an OpenAI-compatible server for greedy answers to conversations (/v1/chat/completions).

Standard library only. A server is not trusted: it may be down, slow, another program, or wrong;
each is said in a sentence.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from stages.run.errors import InputError, StageFailure
from stages.run.server_address import is_loopback

LIMIT = 600.0  # seconds for an answer: a server may load the model with its first question
MOST_BYTES = 2**24
# Only vLLM knows it; others ignore it, or refuse the request (transformers serve).
_IDS = {"return_token_ids": True}
_KEY = "VLLM_API_KEY"


@dataclass(frozen=True)
class Reply:
    """An answer. None stands for what the server does not give. `cut`: it says that a limit ended
    the answer. `prompt_ids`, `ids`: of the prompt and of the answer."""

    text: str
    cut: bool = False
    prompt_tokens: int | None = None
    prompt_ids: list[int] | None = None
    ids: list[int] | None = None


class ChatClient:
    """A server by its URL, with or without /v1, and the name of its model."""

    def __init__(self, url: str, model: str, limit: float = LIMIT):
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model, self.limit = model, limit
        self._more: dict[str, Any] = dict(_IDS)
        # A proxy for the network would look for 127.0.0.1 on its own machine.
        local = is_loopback(urlsplit(self.url).hostname)
        self._open = build_opener(*([ProxyHandler({})] if local else [])).open

    def ask(self, messages: list[dict[str, Any]], max_tokens: int) -> Reply:
        """The likeliest answer of at most `max_tokens`. Raises InputError where no server is or it
        does not let us in, StageFailure for any other answer than a chat completion."""
        asked = {"model": self.model, "messages": messages, "max_tokens": max_tokens}
        while True:
            body = {**asked, "temperature": 0, "stream": False, **self._more}
            try:
                return self._read(json.dumps(body).encode())
            except HTTPError as error:
                refused = error.code in (400, 422) and self._more
                self._more = {}
                if not refused:
                    raise self._refusal(error) from None
            except TimeoutError:
                raise self._late() from None
            except URLError as error:
                if isinstance(error.reason, TimeoutError):
                    raise self._late() from None
                reason = getattr(error.reason, "strerror", None) or error.reason
                raise InputError(
                    f"No server answers at {self.url} ({reason}). Start one with `make "
                    "serve`, wait until it is ready, or set SERVE_URL."
                ) from None
            except (http.client.HTTPException, OSError) as error:
                raise StageFailure(
                    f"The server at {self.url} broke off its answer ({error!r}). What it printed "
                    "says why."
                ) from None

    def _read(self, body: bytes) -> Reply:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(_KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(f"{self.url}/v1/chat/completions", body, headers)
        deadline = time.monotonic() + self.limit
        content = b""
        with self._open(request, timeout=self.limit) as response:
            while part := response.read1(2**16):
                content += part
                if time.monotonic() > deadline:
                    raise TimeoutError
                if len(content) > MOST_BYTES:
                    raise self._unreadable(content)
            stream = response.headers.get_content_type() == "text/event-stream"
        try:
            return (_of_stream if stream else _of_object)(content)
        # Whatever another program answers.
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise self._unreadable(content) from None

    def _unreadable(self, content: bytes) -> StageFailure:
        return StageFailure(
            f"What {self.url} answers is no chat completion: {_start(content)}. Is SERVE_URL an "
            "OpenAI-compatible server?"
        )

    def _late(self) -> StageFailure:
        return StageFailure(
            f"The server at {self.url} has not answered within {self.limit:g} s. What it printed "
            "may say why."
        )

    def _refusal(self, error: HTTPError) -> InputError | StageFailure:
        with error:
            try:
                text = _start(error.read(2**16))
            except (http.client.HTTPException, OSError):
                text = error.reason
        said = f"The server at {self.url} answers HTTP {error.code}: {text}."
        if error.code in (401, 403):
            return InputError(f"{said} Export its key as {_KEY}.")
        if error.code == 404:
            return InputError(
                f"{said} Name SERVE_URL without /chat/completions, and serve the model as "
                f"{self.model} (vllm serve --served-model-name {self.model})."
            )
        return StageFailure(f"{said} What it printed says more.")


def _of_object(content: bytes) -> Reply:
    """The reply that one JSON object holds."""
    whole = json.loads(content)
    [choice] = whole["choices"]
    text = choice["message"]["content"] or ""
    usage = whole.get("usage") or {}
    prompt_tokens = usage.get("prompt_tokens")
    return Reply(
        _text(text),
        choice.get("finish_reason") == "length",
        prompt_tokens if type(prompt_tokens) is int else None,
        _ids(whole.get("prompt_token_ids")),
        _ids(choice.get("token_ids")),
    )


def _of_stream(content: bytes) -> Reply:
    """The reply in server-sent events: transformers 4 streams, whatever it is asked."""
    pieces, cut, tokens, ended = list[str](), False, None, False
    for line in content.decode().splitlines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        event = json.loads(data)
        for choice in event["choices"]:
            pieces.append(_text((choice.get("delta") or {}).get("content") or ""))
            cut = cut or choice.get("finish_reason") == "length"
            ended = ended or choice.get("finish_reason") is not None
        usage = event.get("usage") or {}
        tokens = usage.get("prompt_tokens", tokens)
    if not ended:
        raise ValueError  # it broke off
    return Reply("".join(pieces), cut, tokens if type(tokens) is int else None)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _ids(value: object) -> list[int] | None:
    return value if isinstance(value, list) and all(type(id) is int for id in value) else None


def _start(content: bytes) -> str:
    """The beginning of an answer, for a message."""
    text = " ".join(content[:2000].decode(errors="replace").split())
    return repr(text[-300:] if text.startswith("data:") else text[:300])
