"""Conversations as ids: each answer after what eval asks, marked, and counted by role."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.run.errors import InputError
from stages.text.answer import encode_questions
from stages.text.conversation import Conversation, Message
from stages.text.dataset import Layout, build
from stages.text.documents import ANSWER, encode
from stages.text.examples import Example
from stages.text.pieces import ROLES
from stages.text.prompt import TextFormat
from stages.text.questions import Question
from stages.text.text_template import DOLLY, PLAIN
from stages.text.tokens import TextTokenizer
from tests.text.conftest import KINDS
from tests.text.conversations import example, text_ids
from tests.text.test_tokens import texts
from tests.torture.plugin import examples

TEMPLATES = [
    DOLLY,
    "Q: {instruction}\nC: {context}\nA: {response}",
    "{instruction} {context} {response}",
    "{context}{instruction}{response}",
]
turns = st.lists(
    st.tuples(st.just("") | texts, texts, texts, st.booleans()), min_size=1, max_size=3
)


def conversation(turns: list[tuple[str, str, str, bool]]) -> Conversation:
    messages: list[Message] = []
    for system, user, answer, learn in turns:
        messages += [Message("system", system)] * bool(system)
        messages += [Message("user", user), Message("assistant", answer, learn=learn)]
    return tuple(messages)


def documents(
    rows: list[Conversation], tokenizer: TextTokenizer, format: TextFormat
) -> Iterator[list[int]]:
    """The ids of each document, those of answers with ANSWER."""
    batch = [Example(f"row {number}", row) for number, row in enumerate(rows, 1)]
    encoded = encode(batch, tokenizer, format)
    ids = iter(encoded.ids.tolist())
    for length in encoded.lengths.tolist():
        yield [next(ids) for _ in range(length)]


@pytest.mark.torture("fuzz")
@pytest.mark.parametrize("kind", KINDS)
@examples(25, 300)
@given(rows=st.lists(turns, min_size=1, max_size=2), template=st.sampled_from(TEMPLATES))
def test_each_answer_of_a_conversation_follows_what_eval_asks_and_is_marked(
    tokenizers, kind, rows, template
):
    tokenizer = tokenizers[kind]
    format = TextFormat(tokenizer, template)
    conversations = [conversation(row) for row in rows]
    for messages, document in zip(
        conversations, documents(conversations, tokenizer, format), strict=True
    ):
        ids = [id & ~int(ANSWER) for id in document]
        marked = [id >= ANSWER for id in document]
        ends = [at for at, id in enumerate(ids) if id == tokenizer.eos]
        answers = [at for at, one in enumerate(messages) if one.role == "assistant"]
        ends = ends[-len(answers) :]  # BOS is EOS in some
        assert ends[-1] == len(ids) - 1
        expected = [False] * len(ids)
        for at, end in zip(answers, ends, strict=True):
            asked = [Question(tuple(one._replace(learn=True) for one in messages[:at]))]
            [prompt] = encode_questions(asked, tokenizer, format, 2**20)
            assert ids[: len(prompt)] == prompt
            expected[len(prompt) : end + 1] = [messages[at].learn] * (end + 1 - len(prompt))
        assert marked == expected


def test_the_loss_on_responses_counts_every_learned_answer_and_what_ends_it(tokenizers, tmp_path):
    from tests.text.test_dataset import read

    tokenizer = tokenizers["byte_level"]
    row = conversation(
        [("Be brief.", "the cat", "sat", True), ("", "and", "then", False), ("", "a", "dog", True)]
    )
    layout = Layout(200, loss_on="response")
    build(
        [[Example("row 1", row)]],
        tokenizer,
        TextFormat(tokenizer),
        output=tmp_path,
        layout=layout,
    )
    [written] = read(tmp_path / "train")
    learned = [label for label in written["labels"] if label != -100]
    assert "".join(map(tokenizer.spelling, learned)).split("<|end|>") == ["sat", "dog", ""]


def test_tokens_are_counted_by_the_role_of_their_message(tokenizers: dict, tmp_path: Path) -> None:
    tokenizer = tokenizers["llama"]
    row = conversation([("Be brief.", "the cat", "sat", True), ("", "and", "they", True)])
    later = (Message("user", "And?"), Message("user", "Well?"))
    account = build(
        [[Example("row 1", row + later), example("row 2", "Why?", "", "")]],
        tokenizer,
        TextFormat(tokenizer),
        output=tmp_path,
        layout=Layout(200),
    )
    assert list(account.roles) == list(ROLES)
    assert sum(account.roles.values()) == account.tokens_in
    answers = sum(len(text_ids(tokenizer, text)) - 2 for text in ("sat", "they"))  # BOS and a mark
    assert account.roles["assistant"] >= answers + 2  # each with its EOS
    assert account.roles["tool"] == account.roles["system"] == 0  # a system message is a context
    assert (account.rows_in, account.empty, account.unanswered) == (2, 1, 2)
    table = account.table()
    assert "of assistant" in table and "of tool" not in table
    assert "messages after the last answer" in table


def test_texts_without_a_prompt_are_learned_whole(tokenizers: dict) -> None:
    tokenizer = tokenizers["llama"]
    format = TextFormat(tokenizer, PLAIN)
    [ids] = documents([(Message("assistant", "the cat sat"),)], tokenizer, format)
    whole = [*text_ids(tokenizer, "the cat sat"), tokenizer.eos]
    assert ids == [whole[0], *(id | int(ANSWER) for id in whole[1:])]
    [asked] = encode_questions([Question((Message("user", "the cat"),))], tokenizer, format, 99)
    assert asked == text_ids(tokenizer, "the cat")


def test_examples_that_a_format_cannot_write_are_named_ten_of_a_batch(tokenizers: dict) -> None:
    tokenizer = tokenizers["llama"]
    bad = (Message("user", "a"), Message("tool", "4"), Message("assistant", "b"))
    rows = [Example(f"row {number}", bad) for number in range(1, 16)]
    with pytest.raises(InputError) as refused:
        encode(rows, tokenizer, TextFormat(tokenizer))
    *named, rest = refused.value.problems
    assert [problem.split(":")[0] for problem in named] == [f"row {n}" for n in range(1, 11)]
    assert rest == "... and 5 more of this batch"
