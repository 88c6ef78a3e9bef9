"""Render conversations with a chat template, in a process of its own:
`python -m stages.text.render SECONDS BYTES`.

A chat template is a program that comes with a model. transformers runs it in Jinja's sandbox; here
it gets no more than SECONDS of a CPU for a conversation, and BYTES of memory.

Requests and answers are lines of JSON. The first request holds the template and the names of the
special tokens. Each further one holds conversations; each of them is answered by its documents as
parts (chat_parts), or by a text: the reason why there is none.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from typing import Any

from stages.text.chat_parts import Refused, Renderer


def _reason(error: BaseException) -> str:
    if isinstance(error, Refused):
        return f"the chat template {error}"
    if isinstance(error, (MemoryError, OverflowError)):
        return "the chat template needs too much memory"
    if isinstance(error, RecursionError):
        return "the chat template is nested too deeply"
    return f"the chat template refuses it: {str(error)[:300] or type(error).__name__}"


def answer(renderer: Renderer, request: dict[str, Any], seconds: int = 0) -> Iterator[Any]:
    """For each conversation of a request its documents; or the reason why there is none."""
    for messages, answers in request["conversations"]:
        if seconds:
            _limit_time(seconds)
        made: Any
        try:
            if request["ask"]:
                made = [renderer.prompt(messages)]
            else:
                made = renderer.documents(messages, answers, request["alone"])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a template raises anything
            made = _reason(error)
        yield made


def _limit_time(seconds: int) -> None:
    """A conversation that takes longer ends the process: SIGXCPU."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, resource.RLIM_INFINITY))


def _limit_memory(more: int) -> None:
    """Allow `more` bytes than are used now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + more
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(hard, most)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(seconds: int, most_bytes: int) -> None:
    lines = iter(sys.stdin.readline, "")
    if not (first := next(lines, "")):
        return
    _limit_memory(most_bytes)
    renderer = Renderer(**json.loads(first))
    for line in lines:
        answers = list(answer(renderer, json.loads(line), seconds))
        print(json.dumps({"conversations": answers, "dates": renderer.dates}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
