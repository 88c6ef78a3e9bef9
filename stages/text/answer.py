"""Ask a compiled model: the prompt as in training, the answer as a stream or in batches.

Independent of the backend: the caller passes a loaded model (`generate` and its fixed sizes). The
module imports neither transformers nor datasets, so that the first answer comes soon.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.run.errors import InputError
from stages.run.settings import Settings
from stages.text.prompt import PromptTemplate
from stages.text.tokens import TextTokenizer

if TYPE_CHECKING:
    from stages.run.contract import LoadedModel
    from stages.text.formats import Record


@dataclass(frozen=True)
class Question:
    """One line of a file of prompts. `expected` is the line's response, None if it has none."""

    instruction: str
    context: str = ""
    expected: str | None = None


@dataclass(frozen=True)
class Answer:
    """One line of answers.jsonl. `ended`: the model gave EOS; False when MAX_NEW_TOKENS or the
    compiled length cut the answer off."""

    instruction: str
    context: str
    answer: str
    tokens: int
    ended: bool
    expected: str | None = None


class Answerer:
    """A compiled model with the tokenizer and the prompt template in its folder."""

    def __init__(self, compiled: Path, model: LoadedModel, settings: Settings):
        self.model = model
        self.settings = settings
        self.template = PromptTemplate.load(compiled)
        self.tokenizer = TextTokenizer.load(compiled)

    def stream(self, question: Question) -> Iterator[str]:
        """The answer to one question, piece by piece; each piece ends with a complete
        character."""
        ids: list[int] = []
        shown = ""
        for (new,) in self._generate([self._prompt_ids(question)]):
            if new is None:
                break
            ids.append(new)
            text = self.tokenizer.decode_answer(ids)
            # A character of several bytes that is incomplete decodes as the replacement character.
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(shown) :]
                shown = text
        yield self.tokenizer.decode_answer(ids)[len(shown) :]

    def answers(self, questions: list[Question]) -> Iterator[Answer]:
        """The answers in order, INFERENCE_BATCH_SIZE questions at a time."""
        for start in range(0, len(questions), self.model.batch_size):
            group = questions[start : start + self.model.batch_size]
            prompts = [self._prompt_ids(question) for question in group]
            ids: list[list[int]] = [[] for _ in group]
            for step in self._generate(prompts):
                for answer_ids, new in zip(ids, step, strict=True):
                    if new is not None:
                        answer_ids.append(new)
            for question, prompt, answer_ids in zip(group, prompts, ids, strict=True):
                room = min(self.settings.max_new_tokens, self.model.sequence_length - len(prompt))
                text = self.tokenizer.decode_answer(answer_ids)
                yield Answer(
                    question.instruction,
                    question.context,
                    text,
                    len(answer_ids),
                    len(answer_ids) < room,
                    question.expected,
                )

    def _prompt_ids(self, question: Question) -> list[int]:
        return self.tokenizer.encode_prompt(
            self.template.prompt(question.instruction, question.context)
        )

    def _generate(self, prompts: list[list[int]]) -> Iterator[list[int | None]]:
        s = self.settings
        return self.model.generate(
            prompts,
            max_new_tokens=s.max_new_tokens,
            do_sample=s.do_sample,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            seed=s.seed,
            eos_token_id=self.tokenizer.eos,
        )


def read_questions(path: Path, settings: Settings) -> list[Question]:
    """The questions of a JSON lines file, in DATASET's columns; only the instruction is required.

    Raises InputError for lines that are not questions: names the first ten and counts all.
    """
    if not path.is_file():
        raise InputError(
            f"PROMPTS={path} is not a file. Name a file of JSON lines with "
            f"{settings.instruction_column!r} in each."
        )
    from stages.text.examples import PROBLEMS_SHOWN
    from stages.text.formats import json_lines

    questions, problems = [], []
    with path.open("rb") as file:
        for number, record in json_lines(file):
            question = _question(record, settings)
            if isinstance(question, Question):
                questions.append(question)
            else:
                problems.append(f"{path}, line {number}{question}")
    if not questions and not problems:
        problems.append(
            f"{path} holds no prompt. Write one JSON object per line, with "
            f"{settings.instruction_column!r} in each."
        )
    if len(problems) > PROBLEMS_SHOWN:
        problems[PROBLEMS_SHOWN:] = [
            f"{len(problems):,} lines have problems; above are the first {PROBLEMS_SHOWN}."
        ]
    if problems:
        raise InputError(problems)
    return questions


def _question(record: Record, settings: Settings) -> Question | str:
    """The record as a question, or its problem, which follows the line's number."""
    from stages.text.examples import fault
    from stages.text.formats import Problem

    if isinstance(record, Problem):
        return f" {record}"
    names = (settings.instruction_column, settings.context_column, settings.response_column)
    instruction: Any
    instruction, context, expected = (record.get(name) for name in names)
    for name, text, required in zip(
        names, (instruction, context, expected), (True, False, False), strict=True
    ):
        if problem := fault(text, name in record) if required or text is not None else "":
            return f", column {name!r} {problem}"
    if not instruction.strip():
        return f", column {names[0]!r} is empty."
    return Question(instruction, context or "", expected)


def write_answers(path: Path, answers: list[Answer]) -> None:
    """answers.jsonl: one JSON object per answer."""
    path.write_text(
        "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers),
        encoding="utf-8",
    )
