"""Conversations in the words of a text template: Dolly's, or that of PROMPT_TEMPLATE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.run.errors import InputError
from stages.run.settings import Settings
from stages.text.answer import encode_questions
from stages.text.chat_format import set_chat_template
from stages.text.conversation import Message
from stages.text.prompt import TextFormat, load_format
from stages.text.questions import Question
from stages.text.text_template import DOLLY, PLAIN, format_problems, read_template
from stages.text.tokens import TextTokenizer
from tests.text.conversations import dolly
from tests.text.tokenizer_kinds import REAL
from tests.torture.plugin import examples

USER, ANSWER = Message("user", "Why?"), Message("assistant", "Because.")


@pytest.fixture(scope="module")
def tokenizer(tokenizers: dict[str, TextTokenizer]) -> TextTokenizer:
    return tokenizers["llama"]  # puts <s> first


def text(
    tokenizer: TextTokenizer, *messages: Message, template: str = DOLLY, asks: bool = False
) -> str:
    """A document or (`asks`) a prompt, with the spellings of its control tokens."""
    format = TextFormat(tokenizer, template)
    [written] = format.prompts([messages]) if asks else format.documents([messages])
    if isinstance(written, str):
        return written
    [pieces] = [written] if asks else written
    return "".join(piece.text for piece in pieces)


@pytest.mark.torture("fuzz")
@examples(100, 1_000)
@given(st.text(), st.text(), st.text())
def test_a_document_is_formatted_as_in_the_tutorial(tokenizers, instruction, context, response):
    asked, answer = Message("user", instruction, context), Message("assistant", response)
    written = text(tokenizers["llama"], asked, answer)
    assert written == f"<s>{dolly(instruction, context, response)}</s>"


@pytest.mark.torture("fuzz")
@examples(100, 1_000)
@given(st.text(), st.text(), st.text())
def test_a_prompt_is_what_stands_before_the_response(tokenizers, instruction, context, response):
    asked, answer = Message("user", instruction, context), Message("assistant", response)
    prompt = text(tokenizers["llama"], asked, asks=True)
    assert text(tokenizers["llama"], asked, answer) == f"{prompt}{response}</s>"


@pytest.mark.parametrize("context", ["", " ", "\n\t"])
def test_a_blank_context_is_left_out(tokenizer, context):
    prompt = text(tokenizer, Message("user", "Why?", context), asks=True)
    assert prompt == "<s>### Instruction\nWhy?\n\n### Answer\n"


def test_a_system_message_is_the_context_of_the_users_message_after_it(tokenizer):
    said = Message("system", "Be brief.")
    asked = Message("user", "Why?", "It rains.")
    assert text(tokenizer, said, asked, ANSWER) == (
        f"<s>{dolly('Why?', 'Be brief.' + chr(10) * 2 + 'It rains.', 'Because.')}</s>"
    )


def test_each_question_of_a_conversation_begins_the_template_again(tokenizer):
    one = f"{dolly('Why?', '', 'Because.')}</s>"
    assert text(tokenizer, USER, ANSWER, USER, ANSWER) == f"<s>{one}{one}"


def test_an_answer_that_is_not_to_be_learned_is_written_but_marked_as_none(tokenizer):
    messages = (USER, ANSWER._replace(learn=False), USER, ANSWER)
    [[pieces]] = TextFormat(tokenizer).documents([messages])
    assert [piece.answer for piece in pieces if piece.text in ("Because.", "</s>")] == [
        *(False, False),
        *(True, True),
    ]


NO_PLACE = [
    ((USER, USER, ANSWER), "message 2 is the user's, as the one before"),
    ((ANSWER, USER, ANSWER), "message 1 answers nothing"),
    ((USER, ANSWER, ANSWER), "message 3 answers nothing"),
    ((Message("system", "a"), ANSWER), "message 2 answers nothing after the system message"),
    ((USER, Message("system", "a"), ANSWER), "message 3 answers nothing after the system message"),
    ((USER, ANSWER, Message("system", "a")), "its last system message has no message of the user"),
    ((USER, Message("tool", "4"), ANSWER), "message 2 is a tool's"),
    ((USER, ANSWER._replace(extra={"tool_calls": [{}]})), "message 2 has tool_calls"),
]


@pytest.mark.parametrize("messages, told", NO_PLACE, ids=[told for _, told in NO_PLACE])
def test_a_conversation_without_a_place_in_a_text_template_says_which_message(
    tokenizer, messages, told
):
    assert text(tokenizer, *messages).startswith(told)
    assert "PROMPT_FORMAT=chat" in text(tokenizer, *messages)


@pytest.mark.parametrize("template", [PLAIN, "Q: {instruction}\nA: {response}"])
def test_a_context_for_which_the_template_has_no_place_is_refused(tokenizer, template):
    told = "has a context or system message. The text template has no place for it"
    asked, said = Message("user", "Why?", "It rains."), Message("system", "Be brief.")
    assert told in text(tokenizer, asked, ANSWER, template=template)
    assert told in text(tokenizer, said, USER, asks=True, template=template)
    blank = Message("user", "Why?", " \n")
    assert text(tokenizer, blank, template=template, asks=True).startswith("<s>")


def test_a_prompt_ends_with_what_the_user_asks(tokenizer):
    assert text(tokenizer, USER, ANSWER, asks=True).startswith("its last message is not the user's")


@pytest.mark.parametrize("template", [DOLLY, "Frage: {instruction}\n{context}\nAntwort:{response}"])
def test_a_saved_format_is_read_back_from_its_folder(tmp_path: Path, tokenizer, template: str):
    TextFormat(tokenizer, template).save(tmp_path)
    saved = load_format(tmp_path, tokenizer)
    assert isinstance(saved, TextFormat) and saved.template == template
    assert saved.end == tokenizer.eos


@pytest.mark.parametrize(
    "content",
    [
        *(None, "", "[]", "{}", "[" * 100_000, '{"format": "text"}', '{"format": "other"}'),
        *('{"format": "text", "template": 1}', '{"format": "chat", "end": 10000000}'),
        *('{"format": "chat", "end": "x", "lead": ""}', '{"format": "chat", "end": 2, "lead": 1}'),
        '{"instruction": "", "context": "", "response": "", "separator": ""}',
    ],
)
def test_a_file_that_is_no_format_is_refused_by_name(tmp_path: Path, tokenizer, content):
    if content is not None:
        (tmp_path / "prompt.json").write_text(content)
    with pytest.raises(InputError, match=r"prompt\.json.*Run the data stage again"):
        load_format(tmp_path, tokenizer)


# PROMPT_TEMPLATE.


@pytest.mark.parametrize(
    "template, context, written",
    [
        ("Q: {instruction}\nA: {response}", "", "Q: Why?\nA: "),
        ("Q: {instruction}\nA: {response}\r\n\n", "", "Q: Why?\nA: "),  # the editor's line ends
        ("\ufeff{instruction}\r\n\r\n{context}\r\n\r\n{response}", "", "Why?\n\n"),  # Windows'
        ("[{context}] {instruction}{response}", "c", "[c] Why?"),
        ("{context}\n\n{instruction}\n\n{response}", "", "Why?\n\n"),
        ("In {context}: {instruction}\n\n{response}", "", "In : Why?\n\n"),
        ('{"q": "{instruction}", {}} {0} {response}', "", '{"q": "Why?", {}} {0} '),
    ],
)
def test_a_template_of_ones_own_is_written_with_its_parts(
    tmp_path: Path, tokenizer, template: str, context: str, written: str
) -> None:
    (tmp_path / "t.txt").write_text(template, newline="")
    read = read_template(str(tmp_path / "t.txt"))
    asked = Message("user", "Why?", context)
    assert text(tokenizer, asked, template=read, asks=True) == f"<s>{written}"


def test_the_name_of_a_part_in_a_message_stays_as_it_is(tokenizer):
    asked = Message("user", "{context} {response}", "{instruction}")
    assert text(tokenizer, asked, asks=True) == (
        "<s>" + dolly("{context} {response}", "{instruction}", "")
    )


@pytest.mark.parametrize(
    "template, told",
    [
        ("", "it names {instruction} 0 times"),
        ("{instruction}", "it names {response} 0 times"),
        ("{instruction} {instruction} {response}", "it names {instruction} 2 times"),
        ("{instrution} {response}", "Did you mean {instruction}?"),
        ("{instruction} {response} end", "text follows {response}"),
        (b"\xff", "is not UTF-8"),
        (b"x" * (2**20 + 1), "has more than 1,048,576 bytes"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_template_is_refused_before_anything_runs(
    tmp_path: Path, template: str | bytes | None, told: str
) -> None:
    file = tmp_path / "t.txt"
    if template is not None:
        file.write_bytes(template.encode() if isinstance(template, str) else template)
    problems = format_problems(Settings(prompt_template=str(file)))
    assert any(told in problem and str(file) in problem for problem in problems), problems


def test_a_template_that_spells_bos_or_eos_is_refused(tokenizer):
    with pytest.raises(InputError, match="spells BOS or EOS"):
        TextFormat(tokenizer, "<s>{instruction}{response}")


# The chat template that is published.


@pytest.mark.parametrize(
    "template", [DOLLY, "it's \\ {instruction}\n\n<{context}>\n\n🦆 {response}"]
)
@pytest.mark.parametrize("make", REAL, ids=lambda make: make.__name__)
def test_the_published_chat_template_asks_as_eval_does(
    tmp_path: Path, make: Callable[[Path], Path], template: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = TextTokenizer.load(make(tmp_path / "model"))
    format = TextFormat(tokenizer, template)
    set_chat_template(tokenizer, format.chat_template())
    tokenizer.save(tmp_path / "saved")
    published = AutoTokenizer.from_pretrained(tmp_path / "saved")
    conversations = [
        (Message("user", "the cat {sat}"),),
        (Message("system", "Be brief."), USER, ANSWER, Message("user", "And 'then'?")),
        (
            Message("system", "a"),
            Message("system", "b"),
            USER,
            ANSWER,
            Message("system", "c"),
            USER,
        ),
        (Message("system", " "), Message("user", "naïve 🦆\n")),
    ]
    for messages in conversations:
        [ids] = encode_questions([Question(messages)], tokenizer, format, 2**20)
        asked = [{"role": one.role, "content": one.content} for one in messages]
        theirs = published.apply_chat_template(asked, add_generation_prompt=True)
        assert theirs == ids, (published.decode(theirs), published.decode(ids))
