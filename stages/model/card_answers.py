"""What a model card shows of a model's talk: how to ask it, and answers that eval got of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.model.lineage import NOT_MEASURED, Lineage, Manifest
from stages.run.layout import ADAPTER_FOLDER, ANSWERS_FILE
from stages.text.conversation import Message
from stages.text.prompt import PLAIN, TextFormat, load_format
from stages.text.tokens import TextTokenizer

ANSWERS_SHOWN = 5
LONGEST_TEXT = 1_000  # characters of a question or an answer
QUESTION = "What is a shard?"  # of the example, where eval answered none


def how_to_ask(target: str, model: Path, answers: list[dict[str, Any]], lora: bool) -> str:
    """Code that asks the repository `target`, with the first question that eval asked, and the text
    that the `model`'s template makes of it."""
    tokenizer = TextTokenizer.load(model)
    prompt_format = load_format(model, tokenizer)
    is_text = isinstance(prompt_format, TextFormat)
    plain = isinstance(prompt_format, TextFormat) and prompt_format.template == PLAIN
    example = answers[0] if answers else {"instruction": QUESTION, "context": ""}
    messages = _messages_of(example, context_first=is_text)
    asked = messages[-1]["content"] if plain else messages
    code = [
        "from transformers import pipeline",
        "",
        f'model = pipeline("text-generation", "{target}")',
        f"model({json.dumps(asked, ensure_ascii=False)}, max_new_tokens=256)",
    ]
    parts = [fenced("\n".join(code), "python")]
    [written] = prompt_format.prompts([tuple(Message(m["role"], m["content"]) for m in messages)])
    if plain:
        parts.append("It continues a text: it was trained on texts without prompts.")
    elif not isinstance(written, str):
        parts += [
            "Its chat template writes a conversation as in training "
            f"({prompt_format.description()}). The messages above become this text:",
            fenced("".join(piece.text for piece in written) + prompt_format.lead),
        ]
    if lora:
        parts.append(
            f"The folder `{ADAPTER_FOLDER}` has the LoRA adapter for peft: "
            f'`PeftModel.from_pretrained(base, "{target}", subfolder="{ADAPTER_FOLDER}")`.'
        )
    return "\n\n".join(parts)


def shown_answers(made: Lineage, answers: list[dict[str, Any]]) -> str:
    """The first answers with their questions, and how many equal what was expected."""
    if not answers:
        return f"Answers to prompts: {NOT_MEASURED}."
    metrics = made.eval.get("metrics", {})
    parts = []
    if "judged" in metrics:
        parts.append(
            f"{metrics['exact_matches']:,} of {metrics['judged']:,} answers equal the expected "
            "text to the letter."
        )
    settings = made.eval["provenance"]["settings"]
    how = "sampled" if settings.get("DO_SAMPLE") else "the likeliest token each time"
    parts.append(f"The first {len(answers[:ANSWERS_SHOWN])} of {len(answers):,} ({how}):")
    for answer in answers[:ANSWERS_SHOWN]:
        question = _messages_of(answer, context_first=False)[-1]["content"]
        end = "" if answer.get("ended", True) else " [cut]"
        parts.append(fenced(f"Q: {_cut(question)}\nA: {_cut(answer['answer'])}{end}"))
    return "\n\n".join(parts)


def read_answers(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The lines of answers.jsonl; none where it is missing or not as eval published it."""
    try:
        content = (folder / ANSWERS_FILE).read_bytes()
    except OSError:
        return []
    if hashlib.sha256(content).hexdigest() != manifest["outputs"][ANSWERS_FILE]["sha256"]:
        return []
    return [json.loads(line) for line in content.decode().split("\n") if line]


def _messages_of(answer: Mapping[str, Any], context_first: bool) -> list[dict[str, str]]:
    """What an answer was asked, as messages. A context is the system message before the question
    (`context_first`: text templates), or follows it."""
    if "messages" in answer:
        return [{"role": m["role"], "content": m["content"]} for m in answer["messages"]]
    question, context = answer["instruction"], answer.get("context") or ""
    if context and not context_first:
        question, context = f"{question}\n\n{context}", ""
    system = [{"role": "system", "content": context}] if context else []
    return [*system, {"role": "user", "content": question}]


def _cut(text: str) -> str:
    return (
        text
        if len(text) <= LONGEST_TEXT
        else f"{text[:LONGEST_TEXT]} [... {len(text):,} characters]"
    )


def fenced(text: str, language: str = "text") -> str:
    """A block of code in Markdown; its fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
