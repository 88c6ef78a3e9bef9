"""Files that something has damaged, and texts that nobody meant: read as documented, or refused by
an error of ours."""

from __future__ import annotations

import csv
import io
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.run.cache_url import check_cache_url
from stages.run.errors import InputError, StageFailure
from stages.run.layout import IGNORED_LABEL, SEQUENCE_COLUMNS
from stages.run.progress import printable
from stages.run.setting import variable
from stages.run.settings import Settings, unknown_names
from stages.run.sizes import parse_size
from stages.text.conversation import Message, read_conversation
from stages.text.dataset import Layout, build
from stages.text.documents import ANSWER, encode
from stages.text.examples import Example, open_examples
from stages.text.find_tokenizer import find_tokenizer
from stages.text.prompt import TextFormat, load_format
from stages.text.questions import read_questions
from stages.text.text_template import DOLLY, format_problems, read_template
from stages.text.tokens import TextTokenizer
from tests.text.conftest import KINDS, folders, tokenizers  # noqa: F401 (fixtures)
from tests.text.conversations import example, read, texts_of
from tests.torture.plugin import examples

pytestmark = pytest.mark.torture("fuzz")

ROWS = [
    {
        "instruction": f"why {number} é",
        "context": "c" if number % 3 else None,
        "response": "so, " * (number % 5 + 1),
    }
    for number in range(12)
]


def written(kind: str) -> bytes:
    """ROWS as a valid file."""
    out = io.BytesIO()
    table = pa.Table.from_pylist(ROWS)
    if kind == "d.jsonl":
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    if kind == "d.json":
        return json.dumps(ROWS).encode()
    if kind == "d.csv":
        lines = io.StringIO()
        writer = csv.DictWriter(lines, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
        return lines.getvalue().encode()
    if kind == "d.parquet":
        pq.write_table(table, out)
    else:
        with pa.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table, max_chunksize=5)
    return out.getvalue()


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A valid file after one to four damages: cut off, a bit flipped, a part doubled, bytes put in,
    a number made another."""
    content = whole
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        damage = draw(st.sampled_from(["cut", "flip", "double", "insert", "number", "nest"]))
        if damage == "cut":
            content = content[:at]
        elif damage == "flip":
            content = (
                content[:at]
                + bytes([(content[at : at + 1] or b"\0")[0] ^ 1 << draw(st.integers(0, 7))])
                + content[at + 1 :]
            )
        elif damage == "double":
            content = content[:at] + content[at : at + draw(st.integers(1, 200))] + content[at:]
        elif damage == "insert":
            content = content[:at] + draw(st.binary(min_size=1, max_size=16)) + content[at:]
        elif damage == "number":
            content = (
                content[:at]
                + draw(st.sampled_from([0, 1, 2**20, 2**31 - 1, 2**32 - 1])).to_bytes(4, "little")
                + content[at + 4 :]
            )
        else:
            content = (
                content[:at]
                + draw(st.sampled_from([b"[", b'{"a":', b'"', b"'"]))
                * draw(st.sampled_from([1, 50_000]))
                + content[at:]
            )
    return content


@pytest.mark.parametrize("kind", ["d.jsonl", "d.json", "d.csv", "d.parquet", "saved"])
@examples(80, 1_500)
@given(data=st.data())
def test_a_damaged_dataset_is_read_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    file = tmp_path_factory.getbasetemp() / kind
    content = data.draw(damaged(written(kind)))
    if kind == "saved":
        file.mkdir(exist_ok=True)
        (file / "state.json").write_text('{"_data_files": [{"filename": "d.arrow"}]}')
        (file / "d.arrow").write_bytes(content)
    else:
        file.write_bytes(content)
    try:
        for row in read(file):
            assert all(text.encode() or text == "" for text in texts_of(row))
    except InputError as refused:
        assert all(
            str(file) in problem or "examples have problems" in problem
            for problem in refused.problems
        )
        assert len(refused.problems) <= 11 and len(str(refused)) < 20_000


@examples(100, 2_000)
@given(content=damaged(written("d.jsonl")))
def test_damaged_prompts_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "prompts.jsonl"
    file.write_bytes(content)
    try:
        assert all(
            question.messages[0].content.encode()
            for question in read_questions(Settings(prompts=str(file))).questions
        )
    except InputError as refused:
        assert all(
            str(file) in problem or "prompts have problems" in problem
            for problem in refused.problems
        )


@examples(100, 1_500)
@given(content=damaged(b'{"format": "text", "template": "Q: {instruction}\\n{response}"}'))
def test_a_damaged_format_is_read_or_refused(
    tokenizers: dict[str, TextTokenizer],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
    content: bytes,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "prompt.json").write_bytes(content)
    try:
        [prompt] = load_format(folder, tokenizers["llama"]).prompts([(Message("user", "x"),)])
        assert prompt
    except InputError as refused:
        assert "prompt.json" in str(refused) or "spells BOS or EOS" in str(refused)


@examples(100, 1_500)
@given(
    content=damaged(DOLLY.encode())
    | st.binary(max_size=60)
    | st.lists(
        st.sampled_from(
            ["{instruction}", "{context}", "{response}", "{x}", "{", "}", "{{", "\n\n", "</s>", "é"]
        ),
        max_size=8,
    ).map(lambda parts: "".join(parts).encode())
)
def test_a_template_of_rubbish_is_used_or_refused_before_anything_runs(
    tokenizers: dict[str, TextTokenizer],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
    content: bytes,
) -> None:
    file = tmp_path_factory.getbasetemp() / "template.txt"
    file.write_bytes(content)
    problems = format_problems(Settings(prompt_template=str(file)))
    assert all(str(file) in problem and len(problem) < 500 for problem in problems)
    if problems:
        return
    tokenizer = tokenizers["llama"]
    try:
        format = TextFormat(tokenizer, read_template(str(file)))
    except InputError as refused:
        assert "spells BOS or EOS" in str(refused)
        return
    context = "c" if b"{context}" in content else ""  # which it has no place for otherwise
    row = example("row 1", "why, ", context, "so")
    ids = (encode([row], tokenizer, format).ids & ~ANSWER).tolist()
    assert ids[0] == tokenizer.bos[0] and ids[-1] == tokenizer.eos
    assert "why, " in tokenizer.decode(ids) and tokenizer.decode(ids).endswith("so")


# Conversations.

rubbish = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.sampled_from(["user", "assistant", "system", "tool", "gpt", "text", "\ud83d", "[]", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("role", "content", "from", "value", "weight", "tool_calls", "name"),
                    *("reasoning_content", "type", "text", "x"),
                ]
            )
            | st.text(st.characters(), max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
like_messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | rubbish},
        optional={
            "content": st.text(st.characters(), max_size=5) | rubbish,
            "weight": st.sampled_from([0, 1]) | rubbish,
            "tool_calls": rubbish,
        },
    )
    | rubbish,
    max_size=4,
)
cells = like_messages | like_messages.map(json.dumps) | rubbish


@examples(200, 3_000)
@given(rows=st.lists(cells, min_size=1, max_size=3))
def test_rubbish_in_messages_is_read_or_refused_by_place_and_column(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    file = tmp_path_factory.getbasetemp() / "messages.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    try:
        dataset = open_examples(str(file))
        for row in chain.from_iterable(dataset.batches):
            assert row.place.startswith(str(file))
            for message in row.messages:
                assert message.role in ("user", "assistant", "system", "tool")
                assert json.dumps([message.content, message.extra], ensure_ascii=False).encode()
        assert all(note.isprintable() for note in map(printable, dataset.notes()))
    except InputError as refused:
        assert all(
            problem.startswith(f"{file}, line ") and "column 'messages' " in problem
            for problem in refused.problems
            if "examples have problems" not in problem
        )
        assert len(str(refused)) < 2_000
    try:
        assert read_questions(Settings(prompts=str(file))).questions
    except InputError as refused:
        assert str(file) in str(refused)


@examples(100, 2_000)
@given(rows=st.lists(cells, min_size=1, max_size=3))
def test_conversations_become_documents_or_are_refused_by_place(
    tokenizers: dict[str, TextTokenizer],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Any],
) -> None:
    messages = [
        made
        for made in (read_conversation(row, set()) for row in rows)
        if not isinstance(made, str)
    ]
    tokenizer = tokenizers["byte_level"]
    batch = [Example(f"row {number}", made) for number, made in enumerate(messages, 1)]
    output = tmp_path_factory.mktemp("conversations")
    try:
        account = build(
            [batch], tokenizer, TextFormat(tokenizer), output=output, layout=Layout(400)
        )
        assert account.roles["assistant"] >= account.train.documents
    except InputError as refused:
        assert "row " in str(refused) or "None of the" in str(refused)


# Settings.

like_numbers = st.from_regex(
    r"[-+ ]?[0-9_]{0,400}(\.[0-9]{0,20})?(e[-+]?[0-9]{1,5})?", fullmatch=True
)
awkward = st.sampled_from(
    ["", "-", "nan", "-inf", "1e400", "9" * 5000, "0x1", "\udcff", "a\0b", "x" * 10_000]
)
anything = st.one_of(st.text(), st.integers().map(str), st.floats().map(str), like_numbers, awkward)


@examples(100, 1_500)
@given(
    st.dictionaries(
        st.sampled_from([variable(f) for f in Settings.__dataclass_fields__.values()]),
        anything,
        max_size=6,
    )
)
def test_settings_are_read_or_refused_and_what_was_read_is_read_back(
    given_settings: dict[str, str],
) -> None:
    try:
        settings = Settings.read(given_settings)
    except InputError as refused:
        assert refused.problems and len(str(refused)) < 1000 * len(refused.problems)
        return
    again = settings.environment()
    assert Settings.read(again) == settings
    assert not any("\0" in value for value in again.values())


@given(st.lists(st.text(max_size=200), max_size=5))
def test_a_name_that_is_no_setting_is_told_in_one_plain_line(names: list[str]) -> None:
    for problem in unknown_names(names):
        assert problem.isprintable() and len(problem) < 1000


@given(st.one_of(st.text(), st.from_regex(r"\s?[0-9.]{0,30}\s?[KMGTkmgt]?i?[bB]?", fullmatch=True)))
def test_a_size_is_at_least_a_byte_or_refused(text: str) -> None:
    try:
        assert parse_size(text) >= 1
    except InputError as refused:
        assert len(str(refused)) < 300


@given(st.one_of(st.text(), st.from_regex(r"(/|s3://)[\w./ -]*", fullmatch=True)))
def test_a_place_for_compiled_graphs_is_one_that_no_flag_can_cut_off(url: str) -> None:
    try:
        check_cache_url(url)
    except InputError as refused:
        assert len(str(refused)) < 500
    else:
        assert (
            url.isascii()
            and not any(character.isspace() for character in url)
            and url.startswith(("/", "s3://"))
        )


# Packed rows.

short_texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
some_rows = st.lists(st.tuples(short_texts, short_texts, short_texts), min_size=1, max_size=12)


def reference(
    rows: list[Example], tokenizer: TextTokenizer, layout: Layout
) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each document that is packed, by the plainest means."""
    found = []
    for row in rows:
        instruction, _, response = texts_of(row)
        if not instruction.strip() or not response.strip():
            continue
        encoded = encode([row], tokenizer, TextFormat(tokenizer))
        ids, prompt = (encoded.ids & ~ANSWER).tolist(), int(encoded.prompt_lengths[0])
        labels = [IGNORED_LABEL] * prompt + ids[prompt:] if layout.loss_on == "response" else ids
        if len(ids) > layout.max_length and layout.packing == "best_fit":
            if layout.overlong == "drop" or (
                layout.loss_on == "response" and prompt >= layout.max_length
            ):
                continue
            ids, labels = ids[: layout.max_length], labels[: layout.max_length]
        found.append((ids, labels))
    return found


def segments(folder: Path) -> list[list[tuple[int, int]]]:
    """(id, label) of each segment in the order of the rows, cut where positions begin again;
    padding is left in."""
    with pa.memory_map(str(folder / "data-00000-of-00001.arrow")) as file:
        rows = pa.ipc.open_stream(file).read_all().to_pylist()
    found: list[list[tuple[int, int]]] = []
    for row in rows:
        last = -1
        for id, label, position in zip(*(row[name] for name in SEQUENCE_COLUMNS), strict=True):
            assert position in (0, last + 1)
            if position == 0:
                found.append([])
            found[-1].append((id, label))
            last = position
    return found


@examples(60, 1_500)
@given(
    texts=some_rows,
    layout=st.builds(
        Layout,
        st.integers(16, 200),
        packing=st.sampled_from(["best_fit", "concat"]),
        overlong=st.sampled_from(["truncate", "drop"]),
        loss_on=st.sampled_from(["all", "response"]),
    ),
)
def test_packed_rows_hold_every_token_once_in_order_with_its_label(
    tokenizers: dict[str, TextTokenizer],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[tuple[str, str, str]],
    layout: Layout,
) -> None:
    tokenizer, output = tokenizers["byte_level"], tmp_path_factory.mktemp("rows")
    rows = [example(f"row {number}", *text) for number, text in enumerate(texts, 1)]
    expected = reference(rows, tokenizer, layout)
    try:
        account = build([rows], tokenizer, TextFormat(tokenizer), output=output, layout=layout)
    except InputError:
        assert not expected or sum(len(ids) for ids, _ in expected) < layout.max_length
        return
    found = segments(output / "train")
    padding = [segment for segment in found if segment[0] == (tokenizer.pad, IGNORED_LABEL)]
    assert all(cell == (tokenizer.pad, IGNORED_LABEL) for segment in padding for cell in segment)
    real = [segment for segment in found if segment not in padding]
    if (
        layout.packing == "concat"
    ):  # end to end, cut at rows' ends; the rest that fills no row is left over
        whole = [cell for ids, labels in expected for cell in zip(ids, labels, strict=True)]
        kept = len(whole) // layout.max_length * layout.max_length
        assert (
            list(chain.from_iterable(real)) == whole[:kept]
            and account.train.left_over == len(whole) - kept
        )
    else:
        assert sorted(real) == sorted(
            list(zip(ids, labels, strict=True)) for ids, labels in expected
        )


# Tokenizers.

JUNK = [
    None,
    True,
    0,
    -1,
    2**31,
    2**64,
    1.5,
    "",
    "x",
    "\ud800",
    "</s>",
    {},
    [],
    [None],
    {"a": 1},
    ["a", "b"],
    {"type": "x"},
]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where something is in a JSON value; of long lists and objects the first thirty."""
    inside = (
        list(value)[:30]
        if isinstance(value, dict)
        else range(min(len(value), 10))
        if isinstance(value, list)
        else ()
    )
    return [path, *chain.from_iterable(places(value[key], (*path, key)) for key in inside)]


@st.composite
def altered(draw: st.DrawFn, text: str) -> bytes:
    """JSON text with one or two of its values gone or replaced by something else, or damaged as
    bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(text.encode()))
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from(places(value)[1:]))
        holder = value
        for key in path:
            holder = holder[key]
        junk = draw(st.sampled_from([json.dumps(junk) for junk in JUNK] + ["gone"]))
        if junk == "gone":
            del holder[last]
        else:
            holder[last] = json.loads(junk)
        if len(places(value)) < 2:
            break
    return json.dumps(value).encode()


@pytest.mark.parametrize("kind", KINDS)
@examples(60, 600)
@given(data=st.data())
def test_a_tokenizer_with_rubbish_in_it_works_or_is_refused(
    folders: dict[str, Path],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "tokenizer"
    folder.mkdir(exist_ok=True)
    changed = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        whole = (folders[kind] / name).read_text(encoding="utf-8")
        (folder / name).write_bytes(
            data.draw(altered(whole)) if name == changed else whole.encode()
        )
    try:
        tokenizer = find_tokenizer(str(folder))
        assert tokenizer.vocab_size > tokenizer.eos
        encoded = encode(
            [example("row 1", "the </s> cat", "", "[INST] é🦆 \n sat")],
            tokenizer,
            TextFormat(tokenizer),
        )
        assert isinstance(tokenizer.decode((encoded.ids & ~ANSWER).tolist()), str)
    except (InputError, StageFailure) as refused:
        assert str(refused)
