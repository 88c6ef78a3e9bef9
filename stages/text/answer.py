"""Ask a compiled model: the prompt as in training, the answer as a stream or in batches.

Independent of the backend: the caller passes what loads a model (`generate` and its fixed sizes).
The module imports neither transformers nor datasets, so that the first answer comes soon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.run.errors import InputError, refuse
from stages.run.json_file import write_json_lines
from stages.run.settings import Settings
from stages.text.pieces import encode_pieces
from stages.text.prompt import PromptFormat, load_format
from stages.text.questions import Question, first_problems
from stages.text.tokens import TextTokenizer

if TYPE_CHECKING:
    from stages.run.contract import Generation, LoadedModel


@dataclass(frozen=True)
class Answer:
    """`ended`: the model ended it; False when MAX_NEW_TOKENS or the compiled length cut it off.
    `log_probability`: what the model gives to the answer, its end included, in nats."""

    question: Question
    answer: str
    tokens: int
    ended: bool
    log_probability: float

    def figures(self) -> dict[str, Any]:
        """What is said of the answer wherever it is published; null for what is not finite."""
        nats = round(self.log_probability, 4)
        return {
            "answer": self.answer,
            "tokens": self.tokens,
            "ended": self.ended,
            "log_probability": nats if math.isfinite(nats) else None,
        }

    def as_object(self) -> dict[str, Any]:
        """One line of answers.jsonl."""
        return {
            **self.question.as_object(),
            **self.figures(),
            "expected": self.question.expected,
        }


class Answerer:
    """A compiled model with the tokenizer and the prompt's format in its folder."""

    def __init__(self, compiled: Path, load: Callable[[Path], LoadedModel], settings: Settings):
        """`load` is the backend's; it reads the model in `compiled`."""
        self.settings = settings
        self.tokenizer = TextTokenizer.load(compiled)
        self.format = load_format(compiled, self.tokenizer)
        self.format.start()  # while the model is loaded
        self.model = load(compiled)
        self.ended = False  # whether the model ended the last answer of `stream`

    def stream(self, question: Question) -> Iterator[str]:
        """The answer to one question, piece by piece; each piece ends with a complete
        character."""
        ids: list[int] = []
        shown = ""
        [prompt] = self.encode([question])
        for (new,) in self._generate([prompt], 0):
            if new is None:
                break
            ids.append(new)
            text = self._text(ids)
            # A character of several bytes that is incomplete decodes as the replacement character.
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(shown) :]
                shown = text
        self.ended = self._has_ended(prompt, ids)
        yield self._text(ids, whole=True)[len(shown) :]

    def answers(
        self, questions: list[Question], settings: Settings | None = None
    ) -> Iterator[Answer]:
        """The answers in order, INFERENCE_BATCH_SIZE questions at a time; `settings`: others than
        the answerer's. Raises InputError, before the first, for all questions that the compiled
        model cannot take."""
        encoded = self.encode(questions)
        for start in range(0, len(questions), self.model.batch_size):
            group = questions[start : start + self.model.batch_size]
            prompts = encoded[start : start + self.model.batch_size]
            ids: list[list[int]] = [[] for _ in group]
            generated = self._generate(prompts, start, settings)
            for step in generated:
                for answer_ids, new in zip(ids, step, strict=True):
                    if new is not None:
                        answer_ids.append(new)
            for one in zip(group, prompts, ids, generated.log_probabilities, strict=True):
                yield self.answer(*one)

    def answer(
        self, question: Question, prompt: list[int], ids: list[int], log_probability: float
    ) -> Answer:
        """The answer that `ids` are, whichever model gave them."""
        text, ended = self._text(ids, whole=True), self._has_ended(prompt, ids)
        return Answer(question, text, len(ids), ended, log_probability)

    def fitting(self, questions: list[Question]) -> tuple[list[Question], list[list[int]]]:
        """The questions that the compiled model can take, and their prompts' ids."""
        pairs = []
        for question in questions:
            try:
                pairs.append((question, self.encode([question])[0]))
            except InputError:
                continue
        return [question for question, _ in pairs], [prompt for _, prompt in pairs]

    def encode(self, questions: list[Question], length: int | None = None) -> list[list[int]]:
        """The prompts' ids; see `encode_questions`. `length`: the room for prompt and answer, by
        default what the model is compiled for."""
        return encode_questions(
            questions, self.tokenizer, self.format, length or self.model.sequence_length
        )

    def _has_ended(self, prompt: list[int], answer: list[int]) -> bool:
        room = min(self.settings.max_new_tokens, self.model.sequence_length - len(prompt))
        return len(answer) < room

    def _text(self, ids: list[int], whole: bool = False) -> str:
        """The answer that ids are; until it is `whole`, nothing of what may be the words with which
        the template begins an answer."""
        text, lead = self.tokenizer.decode_answer(ids), self.format.lead
        if text.startswith(lead):
            return text[len(lead) :]
        return "" if lead.startswith(text) and not whole else text

    def _generate(
        self, prompts: list[list[int]], number: int, settings: Settings | None = None
    ) -> Generation:
        s = settings or self.settings
        return self.model.generate(
            prompts,
            max_new_tokens=s.max_new_tokens,
            do_sample=s.do_sample,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            seed=s.seed,
            eos_token_id=self.format.end,
            number=number,
        )


def encode_questions(
    questions: list[Question],
    tokenizer: TextTokenizer,
    format: PromptFormat,
    sequence_length: int,
) -> list[list[int]]:
    """The ids of each question's prompt, for a model that is compiled for `sequence_length` tokens,
    prompt and answer together.

    Raises InputError with the place of each question that is too long or cannot be written; names
    the first ten and counts all.
    """
    written = format.prompts([question.messages for question in questions])
    prompts = [one for one in written if not isinstance(one, str)]
    encoded = iter(encode_pieces(prompts, tokenizer, format.starts_text))
    found, problems = [], []
    for question, prompt in zip(questions, written, strict=True):
        runs = None if isinstance(prompt, str) else next(encoded)
        ids = [id for run in runs or () for id in run.ids]
        if isinstance(prompt, str):
            problems.append(f"{question.place}: {prompt}")
        elif runs is None:
            problems.append(
                f"{question.place} contains the spelling of a control token, which this tokenizer "
                "cannot encode as text. Remove it."
            )
        elif len(ids) >= sequence_length:
            problems.append(
                f"{question.place} has {len(ids):,} tokens with the prompt's template; prompt and "
                f"answer together have room for {sequence_length:,}. Shorten it, or raise "
                "INFERENCE_SEQUENCE_LENGTH."
            )
        else:
            found.append(ids)
    refuse(first_problems(problems))
    return found


def write_answers(path: Path, answers: list[Answer]) -> None:
    """answers.jsonl: one JSON object per answer."""
    write_json_lines(path, (answer.as_object() for answer in answers))
