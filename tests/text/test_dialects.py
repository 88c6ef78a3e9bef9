"""Files as people have them: what their beginning shows is found, said, and read right."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.text.columns import Columns
from stages.text.conversation import Message
from stages.text.examples import open_examples
from tests.text.conversations import read
from tests.text.test_examples import GOOD, HEADER, LINE, line, message, texts

SAID = {
    # name: (file, content, what the line says)
    "semicolons": ("d.csv", b"instruction;context;response\na;b;c\n", "separated by a semicolon"),
    "backslashes": ("d.csv", HEADER + b'"a \\"b\\" c",b,c\n', "a backslash escapes the next"),
    "UTF-16": ("d.jsonl", LINE.decode().encode("utf-16"), "its encoding is UTF-16"),
    "line ends": ("d.csv", HEADER.replace(b"\n", b"\r") + b"a,b,c\r", "on old Macs"),
    "a key": ("d.json", b'{"data": [' + LINE + b"]}", "read the array of its key 'data'"),
    "nothing": ("d.csv", HEADER + b'"a ""b"" \\ c",b,c\n', ""),
}


@pytest.mark.parametrize("name", SAID)
def test_what_a_files_beginning_shows_is_said(tmp_path, name):
    file, content, told = SAID[name]
    (tmp_path / file).write_bytes(content)
    *said, columns = open_examples(str(tmp_path / file)).read_as
    assert "instruction in 'instruction'" in columns
    assert [told in line and file in line for line in said] == ([True] if told else [])


def test_what_a_dataset_does_not_have_is_said(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(LINE)
    dataset = open_examples(str(tmp_path / "d.jsonl"), split="test", config="en")
    assert sum(map(len, dataset.batches)) == 1
    said = "\n".join(dataset.read_as)
    assert "DATASET_CONFIG=en: not read" in said
    assert "has no splits, so all of it is read, whatever DATASET_SPLIT=test chooses" in said


def test_an_array_under_a_key_is_found_after_long_values(tmp_path):
    content = {"description": "é" * 100_000, "data": [{**GOOD, "response": "x" * 50_000}] * 30}
    (tmp_path / "d.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8-sig")
    assert len(texts(tmp_path / "d.json")) == 30


def test_a_backslash_in_a_csv_stays_where_quotes_are_doubled(tmp_path):
    (tmp_path / "d.csv").write_bytes(HEADER + b'"C:\\","a ""b"" \\n",c\n')
    assert texts(tmp_path / "d.csv") == [("C:\\", 'a "b" \\n', "c")]
    (tmp_path / "d.csv").write_bytes(HEADER + b'"a \\"b\\" c",,"d, e"\n')
    assert texts(tmp_path / "d.csv") == [('a "b" c', "", "d, e")]


def test_line_numbers_count_the_line_that_names_the_separator(tmp_path):
    (tmp_path / "d.csv").write_bytes(b"sep=;\n" + HEADER.replace(b",", b";") + b"a;b;c\nx;y\n")
    assert "line 4 has 2 fields" in message(tmp_path / "d.csv")


def test_a_separator_is_found_without_the_columns_names_too(tmp_path):
    (tmp_path / "d.csv").write_bytes(b"topic;reply\na;b\n")
    assert "it has 'topic', 'reply'" in message(tmp_path / "d.csv")


def test_lines_whose_rows_hold_lists_of_objects_are_lines(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(line(history=[GOOD]) + b"\n" + LINE)
    assert len(texts(tmp_path / "d.jsonl")) == 2
    (tmp_path / "d.jsonl").write_bytes(b'{"messages": [{"role": "user", "content": "a"}]}\n' * 2)
    [row, _] = read(tmp_path / "d.jsonl")
    assert row.messages == (Message("user", "a"),)


@pytest.mark.torture("data")
@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.csv.gz"])
def test_what_unpacks_to_gigabytes_is_read_as_a_stream(tmp_path, name):
    start = HEADER if "csv" in name else b""
    (tmp_path / name).write_bytes(gzip.compress(start) + gzip.compress(bytes(100_000_000)) * 3)
    tracemalloc.start()
    told = message(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "more than 16 MiB in one example" in told
    assert peak < 100_000_000


def test_binary_columns_of_parquet_are_read_as_utf_8(tmp_path):
    table = pa.Table.from_pylist([GOOD, {**GOOD, "context": None}])
    as_bytes = pa.schema([(name, pa.binary()) for name in GOOD])
    pq.write_table(table.cast(as_bytes), tmp_path / "d.parquet")
    assert texts(tmp_path / "d.parquet") == [("Why?", "", "Because.")] * 2
    rows = [GOOD, {**GOOD, "context": b"\xff"}]
    pq.write_table(pa.Table.from_pylist(rows, as_bytes), tmp_path / "d.parquet")
    assert "row 2 has bytes in column 'context' that are not UTF-8" in message(
        tmp_path / "d.parquet"
    )


def test_columns_of_parquet_may_have_dots_in_their_names(tmp_path):
    names = {"data.instruction": ["a"], "data.response": ["b"], "data.response.x": ["c"]}
    pq.write_table(pa.table(names), tmp_path / "d.parquet")
    columns = Columns("data.instruction", "", "data.response")
    assert texts(tmp_path / "d.parquet", columns=columns) == [("a", "", "b")]
