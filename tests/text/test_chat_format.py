"""Conversations in a model's own chat template: the laws, for templates that behave as those of
well-known models do, and for tokenizers of the kinds that models have."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from stages.run.errors import InputError
from stages.text import chat_format
from stages.text.answer import encode_questions
from stages.text.chat_format import ChatFormat, chat_template_of, set_chat_template
from stages.text.chat_parts import Renderer, _split_thinking
from stages.text.conversation import Conversation, Message, answers_of
from stages.text.documents import ANSWER, Encoded, encode
from stages.text.examples import Example
from stages.text.prompt import TextFormat, load_format
from stages.text.questions import Question
from stages.text.render import answer as rendered
from stages.text.text_template import DOLLY, PLAIN
from stages.text.tokens import TextTokenizer
from tests.text.chat_templates import (
    CHANNELS,
    CHATML,
    HEADERS,
    INSTRUCTIONS,
    PLAIN_INSTRUCTIONS,
    STRIPPING,
    TEMPLATES,
    THINKING,
    TOOLS,
    TURNS,
    ChatTemplate,
    conversations,
    write_chat_tokenizer,
)
from tests.text.conftest import KINDS
from tests.torture.plugin import examples

ASKED = (Message("user", "Why?"), Message("assistant", "So."))


class InThisProcess:
    """A RenderProcess without a process, which takes a second to start."""

    def __init__(self, template: str, tokens: dict[str, str]):
        self._renderer = Renderer(template, tokens)

    @property
    def dates(self) -> dict[str, str]:
        return self._renderer.dates

    def ask(self, conversations: list[Any], ask: bool, alone: bool) -> list[Any]:
        request = {"conversations": conversations, "ask": ask, "alone": alone}
        return json.loads(json.dumps([*rendered(self._renderer, request)]))


@pytest.fixture(scope="module", autouse=True)
def in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_format, "RenderProcess", InThisProcess)
        yield


@pytest.fixture(scope="module")
def folder_of(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    @lru_cache
    def folder(kind: str, template: ChatTemplate) -> Path:
        target = tmp_path_factory.mktemp("chat") / kind
        return write_chat_tokenizer(target, folders[kind], template)

    return folder


@pytest.fixture(scope="module")
def formats(folder_of):
    @lru_cache
    def load(kind: str, template: ChatTemplate) -> tuple[TextTokenizer, ChatFormat]:
        tokenizer = TextTokenizer.load(folder_of(kind, template))
        return tokenizer, ChatFormat(tokenizer)

    return load


@pytest.fixture
def changed(folder_of, tmp_path: Path):
    """The format of another text in place of a template's."""

    def format_of(text: str, template: ChatTemplate = CHATML) -> ChatFormat:
        tokenizer = TextTokenizer.load(folder_of("qwen", template))
        set_chat_template(tokenizer, text)
        return ChatFormat(tokenizer)

    return format_of


def objects(messages: Conversation) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": m.content, **(m.extra or {})} for m in messages]


class Auto:
    """What AutoTokenizer makes of messages."""

    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, messages: list[dict[str, Any]], ask: bool = False) -> list[int]:
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=ask, return_dict=False
        )

    def joins_prompt_and_answer(self, messages: list[dict[str, Any]]) -> bool:
        """Whether a token spans the two, so that its own prompt does not begin the document."""
        ids = self.ids(messages)
        prompts = [
            self.ids(messages[:number], ask=True)
            for number, message in enumerate(messages)
            if number and message["role"] == "assistant"
        ]
        return any(ids[: len(prompt)] != prompt for prompt in prompts)


def documents_of(encoded: Encoded) -> list[np.ndarray]:
    return np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])


def answers_in(ids: np.ndarray, end: int) -> list[list[int]]:
    """The ids of each answer, with what ends it."""
    answers: list[list[int]] = [[]]
    for id in ids:
        if id & ANSWER:
            answers[-1].append(int(id & ~ANSWER))
            if answers[-1][-1] == end:
                answers.append([])
        else:
            assert not answers[-1], "an answer stops before its end"
    assert not answers.pop()
    return answers


def assert_the_ids_are_autotokenizers(auto: Auto, ids: list[int], messages: Conversation) -> None:
    """An answer is encoded apart from its prompt; where AutoTokenizer joins them, only the text is
    the same."""
    ways = [objects(messages), _split_thinking(objects(messages))]
    if ids not in [auto.ids(way) for way in ways]:
        assert any(auto.joins_prompt_and_answer(way) for way in ways), auto.tokenizer.decode(ids)
        texts = [auto.tokenizer.decode(auto.ids(way)).replace(" ", "") for way in ways]
        assert auto.tokenizer.decode(ids).replace(" ", "") in texts


def assert_laws(
    messages: Conversation,
    format: ChatFormat,
    tokenizer: TextTokenizer,
    auto: Auto | None,
) -> None:
    encoded = encode([Example("row 1", messages)], tokenizer, format)
    documents, asked = documents_of(encoded), [at for at in answers_of(messages) if at]
    whole = len(documents) == 1
    assert whole or len(documents) == len(asked)
    assert len(set(encoded.digests.tolist())) == 1
    assert encoded.roles.sum() == encoded.lengths.sum()
    for number, ids in enumerate(documents):
        here = asked if whole else [asked[number]]
        plain = (ids & ~ANSWER).tolist()
        if auto:
            known = messages if whole else messages[: here[0] + 1]
            assert_the_ids_are_autotokenizers(auto, plain, known)
        answers = answers_in(ids, format.end)
        assert len(answers) == len(here)
        questions = [Question(messages[:at]) for at in here]
        for at, prompt, answer in zip(
            here, encode_questions(questions, tokenizer, format, 10**9), answers, strict=True
        ):
            assert plain[: len(prompt)] == prompt
            assert plain[len(prompt) : len(prompt) + len(answer)] == answer
            if auto and len(here) == 1:
                ways = [objects(messages[:at]), _split_thinking(objects(messages[:at]))]
                if not any(auto.joins_prompt_and_answer(way) for way in ways):
                    assert prompt in [auto.ids(way, ask=True) for way in ways]
            text = tokenizer.decode_answer(answer[:-1])
            if auto:
                said = messages[at].content.split("</think>")[-1].strip()
                assert unicodedata.normalize("NFC", said) in text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_is_what_is_asked_and_what_autotokenizer_writes(
    folder_of, name: str, kind: str
) -> None:
    template = TEMPLATES[name]
    folder = folder_of(kind, template)
    tokenizer = TextTokenizer.load(folder)
    format = ChatFormat(tokenizer)
    assert tokenizer.spelling(format.end) == template.ends
    # A vocabulary of words has no place for all signs, and joins words by spaces.
    reversible = kind != "unigram"
    auto = Auto(folder) if reversible else None
    assert format.lead.strip() == template.lead.strip() or not reversible
    for messages in conversations(template, 8, seed=1):
        assert_laws(messages, format, tokenizer, auto)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "template", [DOLLY, "  Q: '{instruction}'\\ {context}\n\n{{%}A:{response}"]
)
def test_a_text_templates_chat_template_writes_what_is_trained(
    folders: dict[str, Path], tmp_path: Path, kind: str, template: str
) -> None:
    tokenizer = TextTokenizer.load(folders[kind])
    format = TextFormat(tokenizer, template)
    set_chat_template(tokenizer, format.chat_template())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.settings}
    tokenizer.files["tokenizer_config.json"] = json.dumps(config).encode()
    tokenizer.save(tmp_path)
    auto = Auto(tmp_path)
    for messages in conversations(CHATML, 12, seed=2):
        [ids] = documents_of(encode([Example("row 1", messages)], tokenizer, format))
        plain = (ids & ~ANSWER).tolist()
        if kind != "unigram":
            assert_the_ids_are_autotokenizers(auto, plain, messages)
        for at in answers_of(messages):
            question = Question(messages[:at])
            [prompt] = encode_questions([question], tokenizer, format, 10**9)
            assert plain[: len(prompt)] == prompt


@pytest.mark.parametrize("kind", ["metaspace", "mistral", "llama", "gemma"])
def test_a_text_that_begins_with_a_space_gets_no_second_one(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    tokenizer = TextTokenizer.load(folders[kind])
    format = TextFormat(tokenizer, PLAIN)
    set_chat_template(tokenizer, format.chat_template())
    config = {**tokenizer.settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer.files["tokenizer_config.json"] = json.dumps(config).encode()
    tokenizer.save(tmp_path)
    for text in ("Why?", " Why?", "  Why?"):
        [prompt] = encode_questions([Question((Message("user", text),))], tokenizer, format, 10**9)
        assert prompt == Auto(tmp_path).ids([{"role": "user", "content": text}], ask=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_message_that_spells_control_tokens_is_text(folder_of, name: str, kind: str) -> None:
    template = TEMPLATES[name]
    tokenizer = TextTokenizer.load(folder_of(kind, template))
    format = ChatFormat(tokenizer)
    spelled = "".join([template.eos, *template.controls, template.bos or ""])

    def controls(text: str) -> list[int]:
        messages = (Message("user", f"a{text}b"), Message("assistant", f"c{text}d"))
        [ids] = documents_of(encode([Example("row 1", messages)], tokenizer, format))
        return [id for id in (ids & ~ANSWER).tolist() if id in tokenizer.controls]

    assert controls(spelled) == controls("")


def test_white_space_that_a_control_token_takes_is_gone_of_messages_too(folder_of) -> None:
    folder = folder_of("llama", STRIPPING)
    tokenizer = TextTokenizer.load(folder)
    messages = (Message("user", "\n\tWhy?"), Message("assistant", "  So."))
    assert_laws(messages, ChatFormat(tokenizer), tokenizer, Auto(folder))


def test_thinking_gives_one_document_per_answer_that_stay_together(folder_of) -> None:
    tokenizer = TextTokenizer.load(folder_of("qwen", THINKING))
    thought = {"reasoning_content": "hm"}
    messages = (*ASKED, ASKED[0], Message("assistant", "So!", "", thought))
    messages = (ASKED[0], Message("assistant", "<think>\nah\n</think>\n\nSo."), *messages[2:])
    encoded = encode([Example("row 1", messages)], tokenizer, ChatFormat(tokenizer))
    assert encoded.per_answer == 1
    assert len(set(encoded.digests.tolist())) == 1
    first, second = map(tokenizer.decode, (one & ~ANSWER for one in documents_of(encoded)))
    assert "ah" in first and "So!" not in first
    assert "ah" not in second and "hm" in second


def test_an_answer_that_ends_otherwise_in_the_middle_has_a_document_of_its_own(folder_of) -> None:
    tokenizer = TextTokenizer.load(folder_of("qwen", CHANNELS))
    encoded = encode([Example("row 1", (*ASKED, *ASKED))], tokenizer, ChatFormat(tokenizer))
    assert encoded.per_answer == 1
    assert all((ids[-1] & ~ANSWER) == tokenizer.eos for ids in documents_of(encoded))


def test_what_is_not_to_be_learned_is_not_marked_but_cut_alike(folder_of) -> None:
    tokenizer = TextTokenizer.load(folder_of("qwen", CHATML))
    format = ChatFormat(tokenizer)
    ignored = (ASKED[0], Message("assistant", "\n\nNo.", learn=False))
    [ids] = documents_of(encode([Example("row 1", (*ignored, *ASKED))], tokenizer, format))
    [[*said, _]] = answers_in(ids, format.end)
    assert tokenizer.decode_answer(said) == "So."
    [prompt] = encode_questions([Question((*ignored, ASKED[0]))], tokenizer, format, 10**9)
    assert (ids & ~ANSWER)[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CHATML.text.replace("assistant\n", "assistant\n<think>\n"), "before message 2 in other"),
        (CHATML.text.replace("messages %}<", "messages[1:] %}<"), "leaves out message 1 .user."),
        (CHATML.text.replace("m.content", "m.content | upper"), "changes the text of message 1"),
        (CHATML.text.replace("m.content", "m.content | length"), "than for other texts"),
        (CHATML.text.replace("<|im_end|>", "<end>"), "ends an answer with no control token"),
        ("{{ raise_exception('Never.') }}", "refuses it: Never."),
        ("{% for %}", "refuses it: "),
        ("{{ '\\ud800' }}" + CHATML.text, "half of a surrogate pair"),
    ],
)
def test_a_template_that_breaks_a_law_is_refused_with_the_reason(
    changed, text: str, reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as refused:
        changed(text)
    assert "CHAT_TEMPLATE" in str(refused.value) and "PROMPT_FORMAT=dolly" in str(refused.value)


def test_bos_twice_is_refused(changed) -> None:
    with pytest.raises(InputError, match="begins with <s> twice"):
        changed("{{ bos_token }}" + HEADERS.text, HEADERS)


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (TURNS, (Message("system", "s"), *ASKED), "refuses it: No system message"),
        (INSTRUCTIONS, (Message("system", "s"), *ASKED), "refuses it: Only users"),
        (PLAIN_INSTRUCTIONS, (*ASKED, *ASKED[:1], *ASKED[:0]), ""),
        (HEADERS, (*ASKED, Message("system", "\n"), *ASKED), ""),
        (CHATML, (Message("assistant", "Hello."), Message("user", "a")), "no answer follows"),
        (
            CHATML,
            (ASKED[0], Message("assistant", "So.", "", {"reasoning_content": "hm"})),
            "leaves out the thinking of message 2",
        ),
        (
            CHATML,
            (ASKED[0], Message("assistant", "", "", {"tool_calls": [{"function": "f"}]})),
            "leaves out the tool calls of message 2",
        ),
        (
            TOOLS,
            (ASKED[0], Message("assistant", "", "", {"tool_calls": [{"function": "<|im_end|>"}]})),
            "message 2 spells a control token in tool_calls",
        ),
    ],
)
def test_a_conversation_without_a_place_is_refused_with_its_message(
    folder_of, template: ChatTemplate, messages: Conversation, reason: str
) -> None:
    tokenizer = TextTokenizer.load(folder_of("qwen", template))
    [made] = ChatFormat(tokenizer).documents([messages])
    assert isinstance(made, str) == bool(reason) and reason in str(made)
    if reason:
        with pytest.raises(InputError, match=r"row 7: (the chat template|message|no answer)"):
            encode([Example("row 7", messages)], tokenizer, ChatFormat(tokenizer))


def test_a_template_is_read_from_either_file_and_the_default_of_several(folder_of) -> None:
    tokenizer = TextTokenizer.load(folder_of("qwen", CHATML))
    assert chat_template_of(tokenizer) == CHATML.text
    del tokenizer.files["chat_template.jinja"]
    assert chat_template_of(tokenizer) == ""
    for template, found in (
        ("one", "one"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], ""),
        ([1, None], ""),
        ({"default": "d"}, ""),
    ):
        tokenizer.settings["chat_template"] = template
        assert chat_template_of(tokenizer) == found


def test_another_template_replaces_that_of_both_files(folder_of, tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(folder_of("qwen", CHATML))
    tokenizer.files["tokenizer_config.json"] = json.dumps(
        {**tokenizer.settings, "chat_template": "old"}
    ).encode()
    set_chat_template(tokenizer, "new")
    tokenizer.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "new"
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("begins", ["", "\n", "  {% if true %}{% endif %}", " a\n"])
def test_the_date_is_published_as_it_was_trained_and_named(
    folder_of, tmp_path: Path, begins: str
) -> None:
    tokenizer = TextTokenizer.load(folder_of("qwen", HEADERS))
    set_chat_template(tokenizer, begins + HEADERS.text)
    format = ChatFormat(tokenizer)
    [note] = [note for note in format.notes() if "date" in note]
    [date] = format._process.dates.values()
    assert date in note
    set_chat_template(tokenizer, format.chat_template())
    tokenizer.save(tmp_path)
    auto = Auto(tmp_path)
    # On any other day, the same words.
    auto.tokenizer.chat_template = auto.tokenizer.chat_template.replace(date, "1 Jan 1990")
    assert "1 Jan 1990" in auto.tokenizer.decode(auto.ids(objects(ASKED)))
    assert_laws(ASKED, format, tokenizer, Auto(tmp_path))


def test_a_saved_format_is_read_back_without_an_example(folder_of, tmp_path: Path) -> None:
    folder = folder_of("qwen", THINKING)
    format = ChatFormat(TextTokenizer.load(folder))
    format.save(tmp_path)
    loaded = load_format(tmp_path, TextTokenizer.load(folder))
    assert (loaded.end, loaded.lead) == (format.end, format.lead)
    assert loaded.prompts([ASKED[:1]]) == format.prompts([ASKED[:1]])


ROLES = st.sampled_from(["system", "user", "assistant", "user", "assistant", "tool"])
MESSAGE = st.tuples(ROLES, st.text(min_size=1, max_size=12), st.booleans()).map(
    lambda one: Message(*one[:2], learn=one[2])
)


@pytest.mark.torture("fuzz")
@pytest.mark.parametrize("kind", ["llama", "qwen"])
@pytest.mark.parametrize("name", TEMPLATES)
@examples(15, 500)
@given(messages=st.lists(MESSAGE, min_size=1, max_size=6).map(tuple))
def test_any_conversation_holds_the_laws_or_is_refused_by_its_place(
    formats, name: str, kind: str, messages: Conversation
) -> None:
    tokenizer, format = formats(kind, TEMPLATES[name])
    try:
        assert_laws(messages, format, tokenizer, None)
    except InputError as refused:
        assert all(problem.startswith("row 1: ") for problem in refused.problems)
