"""Talk to the compiled model, in the format that it was trained in.

Type a message and press Enter. Ctrl-C stops an answer, Ctrl-D (or Ctrl-C before an answer) leaves.
/new forgets the conversation, /system TEXT begins a new one with a system message.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from stages.run.backend import backend_module
from stages.run.cli import stage_command
from stages.run.errors import InputError
from stages.run.progress import printable
from stages.run.settings import Settings
from stages.text.answer import Answerer
from stages.text.conversation import Message
from stages.text.questions import Question

SAMPLING = ("SEED", "MAX_NEW_TOKENS", "DO_SAMPLE", "TEMPERATURE", "TOP_K", "TOP_P")


@stage_command(
    "chat",
    "BACKEND",
    *SAMPLING,
    publishes=False,
    compile_inference="Folder that compile-inference published.",
)
def main(settings: Settings, compile_inference: Path) -> None:
    talk(Answerer(compile_inference, backend_module("generate", settings).load, settings))


def talk(answerer: Answerer) -> None:
    """Read messages from the terminal, or lines from a pipe, until they end."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  editing and history of what is typed

        print("Ctrl-C stops an answer, Ctrl-D leaves. /new, /system TEXT start over.", flush=True)
    messages: list[Message] = []
    while (text := _typed()) is not None:
        command, _, rest = text.strip().partition(" ")
        if command in ("/new", "/system"):
            messages = [Message("system", rest)] if rest.strip() and command == "/system" else []
        elif command:
            messages.append(Message("user", text))
            try:
                messages = _answered(answerer, messages)
            except InputError as error:  # the message is too long, say
                print("\n".join(f"error: {problem}" for problem in error.problems), flush=True)
                messages.pop()


def _typed() -> str | None:
    """The next message; None where there is no more."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0)  # guard.py need not repeat it
        print(flush=True)
        return None


def _answered(answerer: Answerer, messages: list[Message]) -> list[Message]:
    """Stream the answer to the last message; return the conversation with it, without the oldest
    messages if they do not fit. An interrupted answer is kept as far as it was said."""
    messages = _fitting(answerer, messages)
    said = ""
    try:
        for piece in answerer.stream(Question(tuple(messages), place="The message")):
            print(printable(piece), end="", flush=True)
            said += piece
        print("" if answerer.ended else " [cut]", flush=True)
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(" [stopped]", flush=True)
    return [*messages, Message("assistant", said)] if said.strip() else messages[:-1]


def _fitting(answerer: Answerer, messages: list[Message]) -> list[Message]:
    """The conversation without its oldest exchanges, where it leaves too little room for the
    answer: MAX_NEW_TOKENS, or half of what the model is compiled for."""
    length = answerer.model.sequence_length
    most = length - min(answerer.settings.max_new_tokens, length // 2)
    kept = list(messages)
    while True:
        exchanges = [n for n, message in enumerate(kept) if message.role == "user"]
        prompt = Question(tuple(kept), place="The message")
        if len(exchanges) == 1 or len(answerer.encode([prompt], length=10**9)[0]) <= most:
            break
        del kept[exchanges[0] : exchanges[1]]
    if dropped := len(messages) - len(kept):
        print(f"(the oldest {dropped} messages no longer fit and are left out)", flush=True)
    return kept


if __name__ == "__main__":
    main()
