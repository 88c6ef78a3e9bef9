"""Compare what a server answers with what eval answered: the hand-off of a model to serving.

The commonest silent fault is a chat template that is not the trained one, so prompts are compared
too, as far as the server shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.run.errors import StageFailure
from stages.run.progress import Progress, printable
from stages.text.answer import encode_questions
from stages.text.chat_client import ChatClient, Reply
from stages.text.prompt import PromptFormat
from stages.text.questions import Question
from stages.text.tokens import TextTokenizer

SHOWN = 5  # differences in the table
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # of a character that a cut went through


@dataclass(frozen=True)
class Comparison:
    """One question: eval's answer and the server's, without what begins each answer. `at`: the
    first character in which they differ, None where they are the same. `prompt`: how the prompt's
    tokens differ, "" where they are the same or the server does not show them. `tie`: the logits of
    both next tokens, where rounding decides between them."""

    place: str
    ids: list[int]  # of our prompt
    expected: str
    got: str
    at: int | None
    prompt: str = ""
    other_tokens: bool = False
    spelt_otherwise: bool = False
    tie: str = ""


class Comparer:
    """Asks a server the questions that eval answered."""

    def __init__(self, client: ChatClient, tokenizer: TextTokenizer, format: PromptFormat):
        self.client, self.tokenizer, self.format = client, tokenizer, format
        self.shows_prompts = False

    def compare(
        self,
        questions: list[Question],
        answers: list[dict[str, Any]],
        max_new_tokens: int,
        sequence_length: int,
    ) -> list[Comparison]:
        """One Comparison per question. An answer that eval's limit cut is asked with as many
        tokens; others with eval's limits."""
        prompts = encode_questions(questions, self.tokenizer, self.format, 10**9)
        found = []
        with Progress("serve-check", len(questions), "answers") as progress:
            for question, prompt, answer in zip(questions, prompts, answers, strict=True):
                room = min(max_new_tokens, sequence_length - len(prompt))
                most = max(room, answer["tokens"] + 1) if answer["ended"] else answer["tokens"]
                reply = self.client.ask(self.format.messages(question.messages), most)
                found.append(self._compared(question.place, prompt, answer, reply))
                progress.update(1)
        return found

    def _compared(
        self, place: str, prompt: list[int], answer: dict[str, Any], reply: Reply
    ) -> Comparison:
        given = reply.prompt_tokens if reply.prompt_ids is None else reply.prompt_ids
        self.shows_prompts = self.shows_prompts or given is not None
        expected, got = answer["answer"], reply.text.removeprefix(self.format.lead)
        at = first_difference(expected, got, not answer["ended"], reply.cut)
        other_tokens = spelt_otherwise = False
        if reply.ids is not None:
            ids = reply.ids[:-1] if reply.ids[-1:] == [self.format.end] else reply.ids
            other_tokens = at is None and len(ids) != answer["tokens"] and not reply.cut
            text = self.tokenizer.decode_answer(ids).removeprefix(self.format.lead)
            spelt_otherwise = at is not None and text == expected
        return Comparison(
            place,
            prompt,
            expected,
            got,
            None if spelt_otherwise else at,
            prompt_difference(prompt, reply, self.tokenizer.decode),
            other_tokens,
            spelt_otherwise,
        )

    def with_ties(
        self, found: list[Comparison], near_tie: Callable[[list[int], int, int], str]
    ) -> list[Comparison]:
        """`found` with the ties at which answers part, after the prompts of training; up to the
        first answer that no tie explains."""
        made = list(found)
        for number, one in enumerate(found):
            if one.at is None:
                continue
            texts = [self.format.lead + text for text in (one.expected, one.got)]
            encoded = self.tokenizer.encode_after(["\n", "\n"], texts)
            ours, theirs = ([*(text.ids or []), self.format.end] for text in encoded)
            at = _same(ours, theirs)
            if at == min(len(ours), len(theirs)):
                break
            tie = near_tie([*one.ids, *ours[:at]], ours[at], theirs[at])
            if not tie:
                break
            made[number] = replace(one, tie=tie)
        return made

    def report(self, found: list[Comparison], served: str) -> None:
        """Print what was found. Raises StageFailure where the server answers otherwise, or reads
        other prompts; `served` names the folder that it should serve."""
        for line in table(found):
            print(printable(line), flush=True)
        for kind, text in (
            ("other_tokens", "have the same text in another number of tokens"),
            ("spelt_otherwise", "have the same tokens, which the server writes otherwise"),
        ):
            if count := sum(getattr(one, kind) for one in found):
                print(f"note: {count} answers {text}", flush=True)
        for one in found:
            if one.tie:
                print(printable(f"note: {one.place}: a tie ({one.tie}) decides"), flush=True)
        total, other = len(found), sum(one.at is not None for one in found)
        if prompts := [one for one in found if one.prompt]:
            first = prompts[0]
            raise StageFailure(
                printable(
                    f"{len(prompts)} of {total} prompts have other tokens at the server than the "
                    f"model was trained with ({first.place}: {first.prompt}), and {other} answers "
                    "differ. The likely reason is the chat template: serve the one in "
                    f"{served}/chat_template.jinja."
                )
            )
        tied = sum(bool(one.tie) for one in found)
        # Where prompts cannot be compared, many ties may also be those of another template.
        if tied < other or (not self.shows_prompts and 2 * tied > total):
            raise StageFailure(f"{other} of {total} answers differ. {self._reason(served)}")
        shown = (
            "the prompts have as many tokens"
            if self.shows_prompts
            else "the server does not show the prompts' tokens"
        )
        ties = f", {tied} more up to a tie" if tied else ""
        print(f"serve-check: {total - other} of {total} answers are eval's{ties}; {shown}")

    def _reason(self, served: str) -> str:
        if not self.shows_prompts:
            return (
                "The server does not show the prompts' tokens. The likeliest reason is another "
                f"chat template than {served}/chat_template.jinja; else another model or dtype."
            )
        return (
            "The prompts have as many tokens as in training, so the likely reason is another "
            f"model than {served}, or another dtype or kernels."
        )


def first_difference(expected: str, got: str, cut: bool, server_cut: bool) -> int | None:
    """The first character in which two answers differ; None where they are the same, up to the end
    of one that was cut: eval's (`cut`), or the server's."""
    one = expected.rstrip(_INCOMPLETE) if cut else expected
    other = got.rstrip(_INCOMPLETE) if cut or server_cut else got
    if one == other or (cut and other.startswith(one)):
        return None
    if server_cut and other and one.startswith(other):
        return None
    return _same(one, other)


def _same(one: Sequence[object], other: Sequence[object]) -> int:
    """How many of the first items of two sequences are the same."""
    shortest = min(len(one), len(other))
    return next((n for n in range(shortest) if one[n] != other[n]), shortest)


def prompt_difference(prompt: list[int], reply: Reply, decode: Callable[[list[int]], str]) -> str:
    """How the server's prompt differs from `prompt`; "" where it does not, as far as is known."""
    theirs = reply.prompt_ids
    if theirs is not None and theirs != prompt:
        at = _same(theirs, prompt)
        return (
            f"{len(theirs)} tokens, trained with {len(prompt)}; from token {at + 1} on "
            f"{decode(theirs[at:])[:40]!r} for {decode(prompt[at:])[:40]!r}"
        )
    count = len(prompt) if reply.prompt_tokens is None else reply.prompt_tokens
    return "" if count == len(prompt) else f"{count} tokens, trained with {len(prompt)}"


def table(found: list[Comparison]) -> list[str]:
    """The first answers that differ, from just before the first other character on."""
    differing = [one for one in found if one.at is not None]
    if not differing:
        return []
    rows: list[tuple[str, ...]] = [("question", "character", "eval", "server")]
    for one in differing[:SHOWN]:
        at = one.at or 0
        start = max(at - 10, 0)
        rows.append(
            (
                one.place,
                f"{at + 1:,}",
                *(repr(text[start : at + 25]) for text in (one.expected, one.got)),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    more = len(differing) - SHOWN
    return [*lines, f"... and {more} more"] if more > 0 else lines
