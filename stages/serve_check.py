"""Ask a running server the questions of PROMPTS and compare its answers with eval's.

0: all are the same. 1: an answer or a prompt differs, or the server fails. 2: there is no server,
or nothing to compare with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.run.cli import stage_command
from stages.run.digests import file_digest
from stages.run.errors import InputError, StageFailure
from stages.run.layout import ANSWERS_FILE, PROMPT_FILE, TOKENIZER_FILES
from stages.run.manifest import manifest_of, manifest_problem
from stages.run.settings import Settings
from stages.text.chat_client import ChatClient
from stages.text.prompt import load_format
from stages.text.questions import Question, read_questions
from stages.text.served_answers import Comparer
from stages.text.tokens import TextTokenizer

AGAIN = "Run `make eval` again."


@stage_command(
    "serve-check",
    *("PROMPTS", "SERVE_URL", "SERVE_PORT"),
    publishes=False,
    consolidate="Folder that consolidate published.",
    answers="Folder that eval published.",
)
def main(settings: Settings, consolidate: Path, answers: Path) -> None:
    check(settings, consolidate, answers)


def check(settings: Settings, consolidate: Path, answers: Path) -> None:
    """Compare a server's answers with those in `answers`; raises InputError or StageFailure."""
    facts = eval_settings(consolidate, answers)
    refuse_changed(consolidate)
    questions = read_questions(settings).questions
    expected = read_answers(answers, questions)
    tokenizer = TextTokenizer.load(consolidate)
    prompt_format = load_format(consolidate, tokenizer)
    prompt_format.start()
    url = settings.serve_url or f"http://127.0.0.1:{settings.serve_port}"
    comparer = Comparer(ChatClient(url, consolidate.parent.name), tokenizer, prompt_format)
    found = comparer.compare(
        questions, expected, facts["MAX_NEW_TOKENS"], settings.inference_sequence_length
    )
    if any(one.at is not None for one in found) and not any(one.prompt for one in found):
        from stages.backends.next_token import near_tie

        found = comparer.with_ties(found, near_tie(consolidate))
    comparer.report(found, str(consolidate))


def eval_settings(consolidate: Path, answers: Path) -> dict[str, Any]:
    """The settings that eval answered with. Raises InputError where its answers cannot be
    compared: none, sampled, or those of another model."""
    manifest, model = manifest_of(answers), manifest_of(consolidate)
    if manifest is None or model is None:
        folder = answers if manifest is None else consolidate
        raise InputError(f"{folder}: {manifest_problem(folder)}. {AGAIN}")
    facts = manifest["provenance"]["settings"]
    if facts.get("DO_SAMPLE"):
        raise InputError(
            "eval sampled its answers (DO_SAMPLE=1), and no server would draw the same. Run `make "
            "eval DO_SAMPLE=0`."
        )
    if manifest["provenance"]["inputs"].get("consolidate") != model["content"]:
        raise InputError(f"eval's answers are those of another model than {consolidate}. {AGAIN}")
    return facts


def refuse_changed(consolidate: Path) -> None:
    """Raise StageFailure where the tokenizer, its template or the prompt's format are not as they
    were published: a server would read the same wrong ones."""
    outputs = (manifest_of(consolidate) or {})["outputs"]
    for name in (*TOKENIZER_FILES, PROMPT_FILE):
        path = consolidate / name
        digest = file_digest(path) if path.is_file() else None
        if digest != outputs.get(name, {}).get("sha256"):
            raise StageFailure(
                f"{path} is not as it was published, and a server of this folder reads it. Run "
                "`make consolidate VERIFY=1` to publish it again."
            )


def read_answers(folder: Path, questions: list[Question]) -> list[dict[str, Any]]:
    """The lines of answers.jsonl; raises InputError where they answer other questions."""
    path = folder / ANSWERS_FILE
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        whole = all(
            isinstance(line[name], kind) for line in lines for name, kind in _ANSWERED.items()
        )
        asked = [question.as_object() for question in questions]
        answered = [
            {name: line.get(name) for name in one} for one, line in zip(asked, lines, strict=False)
        ]
    except (OSError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}). {AGAIN}") from None
    if not whole or len(lines) != len(asked) or answered != asked:
        raise InputError(f"{path} does not answer the questions of PROMPTS. {AGAIN}")
    return lines


_ANSWERED: dict[str, Any] = {
    "answer": str,
    "tokens": int,
    "ended": bool,
    "expected": (str, type(None)),
}


if __name__ == "__main__":
    main()
