"""Everything that a dataset's file can be: read as documented, or refused by file, row and
column."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.run.errors import InputError
from stages.text import formats
from stages.text.columns import Columns
from stages.text.examples import BATCH_EXAMPLES, open_examples
from tests.text.conversations import read, texts_of
from tests.torture.plugin import examples

GOOD = {"instruction": "Why?", "context": "", "response": "Because."}
LINE = json.dumps(GOOD).encode()
HEADER = b"instruction,context,response\n"


def texts(dataset: Path | str, **options) -> list[tuple[str, str, str]]:
    return [texts_of(row) for row in read(dataset, **options)]


def message(dataset: Path | str, **options) -> str:
    with pytest.raises(InputError) as refused:
        texts(dataset, **options)
    return str(refused.value)


def line(**changed: object) -> bytes:
    return json.dumps({**GOOD, **changed}).encode()


REFUSED = {
    # name: (file, content, what the message must hold)
    "empty JSON lines": ("d.jsonl", b"", ["d.jsonl has no examples"]),
    "blank lines only": ("d.jsonl", b"\n \n\r\n", ["d.jsonl has no examples"]),
    "BOM only": ("d.jsonl", b"\xef\xbb\xbf", ["has no examples"]),
    "empty array": ("d.json", b"[]", ["d.json has no examples"]),
    "empty CSV": ("d.csv", b"", ["no column for the instruction", "it has no columns"]),
    "CSV of a header only": ("d.csv", HEADER, ["d.csv has no examples"]),
    "empty Parquet": ("d.parquet", b"", ["d.parquet", "not a Parquet file"]),
    "not JSON": ("d.jsonl", LINE + b"\nnonsense\n", ["d.jsonl, line 2", "not JSON"]),
    "JSON cut off": ("d.jsonl", LINE + b"\n" + LINE[:-5], ["line 2", "not JSON"]),
    "two objects on a line": ("d.jsonl", LINE + LINE, ["line 1", "Extra data"]),
    "objects over many lines, cut off": (
        "d.json",
        (json.dumps(GOOD, indent=2) * 2)[:-2].encode(),
        ["row 2", "not JSON"],
    ),
    "a table by columns, as pandas writes it": (
        "d.json",
        b'{"instruction": {"0": "Why?"}, "context": {"0": ""}, "response": {"0": "Because."}}',
        ["table by columns", 'orient="records", lines=True'],
    ),
    "a number for a row": ("d.jsonl", b"3\n", ["line 1", "not a JSON object but a int"]),
    "a list for a row": ("d.jsonl", LINE + b"\n[1]\n", ["line 2", "but a list"]),
    "nested without end": ("d.jsonl", b'{"instruction":' + b"[" * 100_000, ["line 1", "not JSON"]),
    "a number with too many digits": (
        "d.jsonl",
        line(response="@").replace(b'"@"', b"1" * 5000),
        ["line 1", "d.jsonl"],
    ),
    "invalid UTF-8": (
        "d.jsonl",
        LINE + b'\n{"instruction": "\xff"}',
        ["line 2", "not UTF-8", "byte 18", "0xff"],
    ),
    "UTF-16 cut off": ("d.jsonl", LINE.decode().encode("utf-16")[:-1], ["not UTF-16 throughout"]),
    "Windows-1252": ("d.csv", HEADER + "a,é,c\n".encode("cp1252"), ["line 2", "'é' in Windows"]),
    "half a surrogate pair": (
        "d.jsonl",
        line(response="a\ud83d"),
        ["line 1, column 'response'", "character 2 is U+D83D"],
    ),
    "misspelt column": (
        "d.jsonl",
        LINE.replace(b"response", b"respones"),
        ["Did you mean 'respones'", "Set RESPONSE_COLUMN"],
    ),
    "column missing later": (
        "d.jsonl",
        LINE + b'\n{"instruction": "x"}',
        ["line 2, column 'response' is missing"],
    ),
    "null instruction": (
        "d.jsonl",
        line(instruction=None),
        ["line 1, column 'instruction' is null"],
    ),
    "null response": ("d.jsonl", line(response=None), ["line 1, column 'response' is null"]),
    "number for text": (
        "d.jsonl",
        LINE + b"\n\n" + line(response=3),
        ["line 3, column 'response' is 3, of type int"],
    ),
    "list for a context": (
        "d.jsonl",
        line(context=["a"]),
        ["line 1, column 'context'", "of type list"],
    ),
    "line without end": (
        "d.jsonl",
        b" " * (formats.MAX_EXAMPLE_BYTES + 5) + LINE,
        ["line 1", "more than 16 MiB"],
    ),
    "array cut off": ("d.json", b"[" + LINE + b",\n" + LINE, ["row 2", "not closed"]),
    "array cut off within a row": ("d.json", b"[" + LINE + b"," + LINE[:-9], ["row 2", "not JSON"]),
    "array without commas": ("d.json", b"[" + LINE + LINE + b"]", ["row 1", "a comma"]),
    "text after an array": ("d.json", b"[" + LINE + b"]]", ["row 1", "after the array's end"]),
    "strings in an array": ("d.json", b'["a"]', ["row 1", "but a str"]),
    "invalid UTF-8 in an array": (
        "d.json",
        b"[" + LINE + b',{"instruction": "\xff"}]',
        ["not UTF-8"],
    ),
    "row too long in an array": (
        "d.json",
        b"[" + line(response="x" * (formats.MAX_EXAMPLE_BYTES + 1)) + b"]",
        ["row 1", "more than 16 MiB"],
    ),
    "CSV without a column": (
        "d.csv",
        b"topic,reply\nx,y\n",
        ["no column for the instruction", "no column for the response", "it has 'topic', 'reply'"],
    ),
    "CSV with a field too few": (
        "d.csv",
        HEADER + b"a,b,c\nx,y\n",
        ["line 3", "2 fields where the header has 3"],
    ),
    "CSV with a field too many": (
        "d.csv",
        HEADER + b'"a\nb",b,c\nx,y,z,w\n',
        ["line 4", "4 fields"],
    ),
    "CSV with an open quote": ("d.csv", HEADER + b'a,"b,c\n', ["line 2", "not CSV"]),
    "CSV not in UTF-8": ("d.csv", HEADER + b"a,b,c\na,b,\xe9\n", ["line 3", "not UTF-8"]),
    "CSV header not in UTF-8": ("d.csv", b"\xff\n", ["d.csv", "line 1", "not UTF-8"]),
    "not Parquet": ("d.parquet", LINE, ["d.parquet", "not a Parquet file"]),
    "gzip of two bytes": ("d.jsonl.gz", b"\x1f\x8b", ["d.jsonl.gz", "cut off or damaged"]),
    "gzip cut off": ("d.jsonl.gz", gzip.compress(LINE * 9)[:-12], ["cut off or damaged"]),
    "gzip with another checksum": (
        "d.jsonl.gz",
        gzip.compress(LINE)[:-8] + bytes(8),
        ["d.jsonl.gz cannot be read", "cut off or damaged"],
    ),
    "zip": ("d.jsonl.zip", b"PK\3\4", ["d.jsonl.zip", "Unpack it first"]),
    "zip, under another name": ("d.csv", b"PK\3\4", ["d.csv", "zip archive or an Excel workbook"]),
    "Parquet, under another name": ("d.jsonl", b"PAR1", ["d.jsonl", "a Parquet file"]),
    "an Excel workbook": ("d.xlsx", b"PK\3\4", ["d.xlsx", "Save it as CSV"]),
    "another format": ("d.txt", b"x", ["d.txt", ".jsonl, .ndjson, .json, .csv, .tsv (each also"]),
    "NUL in a CSV": ("d.csv", HEADER + b"a\0,b,c\n", ["line 2 holds a NUL character"]),
    "packed sequences": (
        "d.jsonl",
        b'{"input_ids": [1], "labels": [1], "attention_mask": [1], "position_ids": [0]}',
        ["holds packed sequences", "Set DATASET to what it was made from"],
    ),
    "NUL bytes": ("d.jsonl", LINE + b"\n" + bytes(40), ["line 2", "not JSON"]),
    "NUL within a text": (
        "d.jsonl",
        LINE.replace(b"Why", b"W\0y"),
        ["line 1", "not JSON (Invalid control character"],
    ),
    "true for text": (
        "d.jsonl",
        line(instruction=True),
        ["line 1, column 'instruction' is True, of type bool"],
    ),
    "an object for text": (
        "d.jsonl",
        line(response={"text": "x"}),
        ["line 1, column 'response'", "of type dict"],
    ),
    "not a number of JSON's": (
        "d.jsonl",
        line(instruction=float("nan")),
        ["line 1, column 'instruction' is nan, of type float"],
    ),
    "a row without columns": (
        "d.jsonl",
        b"{}",
        ["line 1", "no column for the instruction", "it has no columns"],
    ),
    "columns called alike": (
        "d.csv",
        b"instruction,context,response,response\na,b,c,d\n",
        ["2 columns are called 'response'"],
    ),
    "CSV row too long, over lines": (
        "d.csv",
        HEADER + (b'"' + (b"x" * 2**20 + b"\n") * 6 + b'",') * 3,
        ["more than 16 MiB in one example"],
    ),
}


@pytest.mark.torture("data")
@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_by_place_and_reason(tmp_path, name):
    file, content, parts = REFUSED[name]
    (tmp_path / file).write_bytes(content)
    told = message(tmp_path / file)
    assert all(part in told for part in parts), told
    assert len(told) < 2500


READ = {
    # name: (file, content, rows)
    "lines": ("d.jsonl", LINE + b"\n" + LINE + b"\n", 2),
    "no line end at the end": ("d.jsonl", LINE + b"\n" + LINE, 2),
    "one row": ("d.jsonl", LINE, 1),
    "upper case ending": ("D.JSONL", LINE, 1),
    "CRLF": ("d.jsonl", LINE + b"\r\n" + LINE + b"\r\n", 2),
    "BOM": ("d.jsonl", b"\xef\xbb\xbf" + LINE, 1),
    "blank lines between": ("d.jsonl", b"\n" + LINE + b"\n\n  \n" + LINE, 2),
    "lines in a .json": ("d.json", LINE + b"\n" + LINE, 2),
    "array": ("d.json", b"[" + LINE + b"," + LINE + b"]", 2),
    "array over many lines": ("d.json", json.dumps([GOOD, GOOD], indent=2).encode(), 2),
    "array with BOM": ("d.json", b"\xef\xbb\xbf [\n" + LINE + b"\n]\n", 1),
    "array in a .jsonl": ("d.jsonl", b"[" + LINE + b"]", 1),
    "extra columns": ("d.jsonl", line(category="qa", score=3), 1),
    "null context": ("d.jsonl", line(context=None), 1),
    "context in some rows": (
        "d.jsonl",
        b'{"instruction": "Why?", "response": "Because."}\n' + LINE,
        2,
    ),
    "an object over many lines": ("d.json", json.dumps(GOOD, indent=2).encode(), 1),
    "objects over many lines": ("d.json", (json.dumps(GOOD, indent=2) + "\n").encode() * 2, 2),
    "array under a key": ("d.json", b'{"version": {"a": 1}, "data": [' + LINE + b'], "n": 1}', 1),
    "array under a key, over many lines": (
        "d.json",
        json.dumps({"n": [1], "rows": [GOOD, GOOD]}, indent=1).encode(),
        2,
    ),
    "ndjson": ("d.ndjson", LINE, 1),
    "gzip": ("d.jsonl.gz", gzip.compress(LINE + b"\n") * 2, 2),
    "gzip of CSV": ("d.csv.gz", gzip.compress(HEADER + b"Why?,,Because.\n"), 1),
    "gzip, under another name": ("d.json", gzip.compress(b"[" + LINE + b"]"), 1),
    "UTF-16": ("d.jsonl", LINE.decode().encode("utf-16"), 1),
    "UTF-16 without a mark": ("d.jsonl", LINE.decode().encode("utf-16-le"), 1),
    "UTF-16 of CSV": ("d.csv", (HEADER.decode() + "Why?,,Because.\r\n").encode("utf-16"), 1),
    "line ends of old Macs": ("d.csv", HEADER.replace(b"\n", b"\r") + b"Why?,,Because.\r", 1),
    "CSV": ("d.csv", HEADER + b"Why?,,Because.\n", 1),
    "CSV with semicolons": ("d.csv", b"instruction;context;response\nWhy?;;Because.\n", 1),
    "CSV with tabs": ("d.csv", b"instruction\tcontext\tresponse\nWhy?\t\tBecause.\n", 1),
    "TSV": ("d.tsv", b"instruction\tcontext\tresponse\nWhy?\t\tBecause.\n", 1),
    "TSV with commas": ("d.tsv", HEADER + b"Why?,,Because.\n", 1),
    "CSV that names its separator": ("d.csv", b"sep=,\r\n" + HEADER + b"Why?,,Because.\n", 1),
    "CSV that names a semicolon": (
        "d.csv",
        b"\xef\xbb\xbfsep=;\r\ninstruction;context;response\r\nWhy?;;Because.\r\n",
        1,
    ),
    "CSV that ends its lines with a comma": (
        "d.csv",
        b"instruction,context,response,\nWhy?,,Because.,\n",
        1,
    ),
    "CSV, CRLF, BOM, blank lines": (
        "d.csv",
        b"\xef\xbb\xbf" + HEADER[:-1] + b"\r\nWhy?,,Because.\r\n\r\nWhy?,,Because.\r\n",
        2,
    ),
    "CSV in another order": ("d.csv", b"response,extra,context,instruction\nBecause.,1,,Why?\n", 1),
}


@pytest.mark.torture("data")
@pytest.mark.parametrize("name", READ)
def test_a_good_file_is_read_whatever_its_dialect(tmp_path, name):
    file, content, rows = READ[name]
    (tmp_path / file).write_bytes(content)
    assert texts(tmp_path / file) == [("Why?", "", "Because.")] * rows


@pytest.mark.torture("fuzz")
@examples(100, 600)
@given(st.lists(st.fixed_dictionaries({name: st.text() for name in GOOD}), min_size=1, max_size=8))
def test_texts_come_out_as_they_went_in(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("same")
    expected = [(row["instruction"], row["context"], row["response"]) for row in rows]
    (folder / "lines.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline=""
    )
    (folder / "array.json").write_text(json.dumps(rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")
    assert all(
        texts(folder / name) == expected for name in ("lines.jsonl", "array.json", "table.parquet")
    )


def test_control_characters_within_a_text_are_kept(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(line(response="a\0b\x1b</s>\u2028c"))
    assert texts(tmp_path / "d.jsonl") == [("Why?", "", "a\0b\x1b</s>\u2028c")]


def test_a_csv_text_may_hold_quotes_separators_and_line_ends(tmp_path):
    (tmp_path / "d.csv").write_bytes(HEADER + b'"a, ""b""\nc",,d\n')
    assert texts(tmp_path / "d.csv") == [('a, "b"\nc', "", "d")]


def test_an_array_longer_than_the_reading_window_is_read_whole(tmp_path):
    rows = [{**GOOD, "response": f"{number} " + "ü" * 997} for number in range(3_000)]
    (tmp_path / "d.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [row[2] for row in texts(tmp_path / "d.json")] == [row["response"] for row in rows]


def test_the_first_ten_bad_rows_are_named_and_all_are_counted(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"\n".join([LINE] * 5 + [b"nonsense"] * 23 + [LINE]))
    problems = message(tmp_path / "d.jsonl").splitlines()
    assert [int(problem.split("line ")[1].split()[0]) for problem in problems[:10]] == list(
        range(6, 16)
    )
    assert problems[10:] == ["23 of 29 examples have problems; above are the first 10."]


def test_rows_come_in_bounded_batches_with_their_places(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"\n".join([LINE] * (2 * BATCH_EXAMPLES + 1)))
    batches = list(open_examples(str(tmp_path / "d.jsonl")).batches)
    assert [len(batch) for batch in batches] == [BATCH_EXAMPLES, BATCH_EXAMPLES, 1]
    assert batches[2][0].place == f"{tmp_path / 'd.jsonl'}, line {2 * BATCH_EXAMPLES + 1}"


def test_a_batch_of_long_rows_ends_before_it_fills_the_memory(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"\n".join([line(response="x" * 3 * 2**20)] * 4))
    batches = open_examples(str(tmp_path / "d.jsonl")).batches
    assert [len(batch) for batch in batches] == [2, 2]


@pytest.mark.torture("data")
@pytest.mark.parametrize(
    "name, start",
    [
        ("d.jsonl", b""),
        ("d.json", b"["),
        ("d.json", b'[{"instruction": "'),
        ("d.csv", HEADER + b'"'),
    ],
)
def test_a_row_of_100_mb_is_refused_in_little_memory(tmp_path, name, start):
    with (tmp_path / name).open("wb") as file:  # NUL bytes that take no room on the disk
        file.write(start)
        file.truncate(100_000_000)
    tracemalloc.start()
    told = message(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "more than 16 MiB in one example" in told
    assert peak < 100_000_000


@pytest.mark.torture("data")
def test_a_parquet_row_of_100_mb_is_refused(tmp_path):
    table = pa.table(
        {**{name: [text] for name, text in GOOD.items()}, "response": ["x" * 100_000_000]}
    )
    pq.write_table(table, tmp_path / "d.parquet", use_dictionary=False, write_statistics=False)
    assert "row 1 holds more than 16 MiB" in message(tmp_path / "d.parquet")


@pytest.mark.torture("data")
def test_blanks_between_rows_are_passed_over_however_many(tmp_path):
    (tmp_path / "d.json").write_bytes(b"[" + b" " * 30_000_000 + LINE + b"\n" * 30_000_000 + b"]")
    assert texts(tmp_path / "d.json") == [("Why?", "", "Because.")]


def test_columns_may_have_other_names_and_a_dataset_no_context(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"q": "Why?", "a": "Because."}')
    assert texts(tmp_path / "d.jsonl", columns=Columns("q", "", "a")) == [("Why?", "", "Because.")]


@pytest.mark.torture("data")
@pytest.mark.parametrize(
    "columns, told",
    [
        ({"instruction": [1]}, "row 1, column 'instruction' is 1"),
        ({}, "no column for the instruction"),
    ],
)
def test_a_parquet_file_of_another_shape_is_refused(tmp_path, columns, told):
    pq.write_table(
        pa.table({"context": ["a"], "response": ["b"], **columns}), tmp_path / "d.parquet"
    )
    assert told in message(tmp_path / "d.parquet")


@pytest.mark.torture("data")
def test_what_is_no_file_is_refused(tmp_path):
    os.symlink(tmp_path / "loop.jsonl", tmp_path / "loop.jsonl")
    os.symlink(tmp_path / "gone.jsonl", tmp_path / "dangling.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder").mkdir()
    assert "cannot be read" in message(tmp_path / "loop.jsonl")
    assert "No such file" in message(tmp_path / "dangling.jsonl")
    assert "neither a file nor a folder" in message(tmp_path / "pipe.jsonl")
    assert "no state.json" in message(tmp_path / "folder")
    (tmp_path / "folder.jsonl").mkdir()
    assert "holds no file of a dataset" in message(tmp_path / "folder.jsonl")


@pytest.mark.torture("data")
@pytest.mark.parametrize(
    "name",
    [
        "nowhere.jsonl",
        "./nowhere",
        "/nowhere/at/all",
        "a/b/c",
        "",
        "two words",
        "-x",
        "../up/there",
    ],
)
def test_a_name_that_is_neither_a_path_nor_a_hub_id_is_refused_without_a_request(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert "does not exist. Name a file" in message(name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_refused(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(LINE)
    (tmp_path / "d.jsonl").chmod(0)
    assert "Permission denied" in message(tmp_path / "d.jsonl")
