"""The prompt format that the settings, the dataset's columns and the tokenizer give."""

from __future__ import annotations

from stages.run.errors import InputError
from stages.run.settings import Settings
from stages.text.chat_format import ChatFormat, chat_template_of, set_chat_template
from stages.text.columns import Columns
from stages.text.prompt import PromptFormat, TextFormat
from stages.text.text_template import DOLLY, PLAIN, read_chat_template, read_template
from stages.text.tokens import TextTokenizer


def choose_format(settings: Settings, columns: Columns, tokenizer: TextTokenizer) -> PromptFormat:
    """The format for examples of `columns`. CHAT_TEMPLATE replaces the template among the
    tokenizer's files.

    Raises InputError where the dataset has no prompts to write, or the model no chat template.
    """
    s, kind = settings, settings.prompt_format
    if not columns.messages and not columns.instruction:
        if kind != "auto" or s.prompt_template or s.chat_template:
            raise InputError(
                f"DATASET={s.dataset} has {columns.describe()}, which no prompt format writes. "
                "Leave PROMPT_FORMAT, PROMPT_TEMPLATE and CHAT_TEMPLATE out, or set "
                "INSTRUCTION_COLUMN."
            )
        return TextFormat(tokenizer, PLAIN)
    if kind == "auto":
        has_template = s.chat_template or (columns.messages and chat_template_of(tokenizer))
        kind = "file" if s.prompt_template else "chat" if has_template else "dolly"
    if kind == "file":
        return TextFormat(tokenizer, read_template(s.prompt_template))
    if kind == "dolly":
        return TextFormat(tokenizer, DOLLY)
    if s.chat_template:
        set_chat_template(tokenizer, read_chat_template(s.chat_template))
    elif not chat_template_of(tokenizer):
        raise InputError(
            f"PROMPT_FORMAT=chat: MODEL_ID={s.model_id} has no chat template. Name a file with one "
            "in CHAT_TEMPLATE, or set PROMPT_FORMAT=dolly."
        )
    try:
        return ChatFormat(tokenizer)
    except InputError as error:
        source = f"CHAT_TEMPLATE={s.chat_template}" if s.chat_template else f"MODEL_ID={s.model_id}"
        raise InputError(f"{source}: {problem}" for problem in error.problems) from None
