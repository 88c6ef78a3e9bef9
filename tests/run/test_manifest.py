"""What is read back from outputs/ may hold anything: no reader fails in a way that is not the
project's own, or believes it."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.backends.metrics import Metrics, last_line
from stages.make import stale
from stages.make.verify import damage_of
from stages.make.verify import main as verify
from stages.run import provenance
from stages.run.errors import StageFailure
from stages.run.layout import MANIFEST_FILE
from stages.run.lock import _described, _holder, locked
from stages.run.manifest import (
    PARTS,
    file_problems,
    manifest_of,
    manifest_problem,
    with_checksum,
)
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings
from tests.torture.plugin import examples

pytestmark = pytest.mark.torture("fuzz")

NAMES = st.sampled_from(
    [
        "weights",
        "shards/a",
        "../../../etc/passwd",
        "/dev/zero",
        "a/../../b",
        "",
        ".",
        "..",
        "a\0b",
        "\ud800",
        "é",
        "x" * 300,
        "a" * 5000,
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | NAMES
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=3)
    ),
)
DIGESTS = st.sampled_from(
    ["", "0" * 64, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]
)
ENTRIES = st.dictionaries(
    NAMES, st.fixed_dictionaries({"bytes": st.integers(0, 9), "sha256": DIGESTS}) | JSON, max_size=3
)
RECORDS = st.fixed_dictionaries(
    {part: st.dictionaries(NAMES | st.just("MAX_LENGTH"), JSON, max_size=3) for part in PARTS}
)
SEEN = st.fixed_dictionaries(
    {
        "backend": st.sampled_from(["torch", "neuron", "", "tpu"]) | JSON,
        "code": st.dictionaries(NAMES, JSON, max_size=2),
        "files": JSON,
    }
)
# Of the shape that a manifest has, as somebody could write one who wants a reader to go wrong.
SHAPED = st.fixed_dictionaries(
    {
        "provenance": RECORDS | JSON,
        "outputs": ENTRIES | JSON,
        "seen": SEEN | JSON,
        "content": DIGESTS | JSON,
    },
    optional={"removed": JSON, "metrics": JSON, "stage": JSON, "sha256": JSON},
)
BYTES = st.binary(max_size=60) | st.sampled_from(
    [b"[" * 100_000, b"{" * 100_000, b"9" * 10_000, b"NaN", b"\xef\xbb\xbf{}", b"\xff\xfe"]
)
CODE_OF = functools.cache(provenance.code_of)  # the code is analysed once, not for every example
GRAPH = ("data::", "train:data:", "eval:train:")


def text_of(value: Any) -> bytes:
    return json.dumps(value).encode()


def sealed_text(value: dict[str, Any]) -> bytes:
    try:
        return text_of(with_checksum(value))
    except UnicodeEncodeError:  # half a character, which no manifest can hold
        return text_of(value)


MANIFESTS = BYTES | JSON.map(text_of) | SHAPED.map(text_of) | SHAPED.map(sealed_text)


@contextmanager
def run_with(manifests: dict[str, bytes]) -> Iterator[Path]:
    """A run folder whose stages have these manifests, and a file that some of them list."""
    with tempfile.TemporaryDirectory() as folder:
        for stage, text in manifests.items():
            output = Path(folder) / stage
            output.mkdir()
            (output / MANIFEST_FILE).write_bytes(text)
            (output / "weights").write_bytes(b"")
        yield Path(folder)


@examples(100, 3_000)
@given(MANIFESTS)
def test_a_manifest_of_any_kind_is_one_or_is_none(text: bytes) -> None:
    with run_with({"data": text}) as folder:
        manifest, wrong = manifest_of(folder / "data"), manifest_problem(folder / "data")
        assert (manifest is None) == bool(wrong)
        if manifest is None:
            assert damage_of(folder / "data") == [wrong]
            return
        found = file_problems(manifest, folder / "data", read=True)
        assert set(file_problems(manifest, folder / "data")) <= set(found)
        assert len(found) >= sum(name != "weights" for name in manifest["outputs"]), (
            "nothing but weights is there"
        )
        assert provenance.reasons("data", Settings(), {}, folder / "data") != [], (
            "nobody published it"
        )


@examples(50, 500)
@given(
    st.fixed_dictionaries({stage: MANIFESTS for stage in ("data", "train", "eval")}), st.booleans()
)
def test_make_asks_what_is_stale_whatever_the_manifests_hold(
    manifests: dict[str, bytes], reads: bool
) -> None:
    with run_with(manifests) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERIFY", str(int(reads)))
        patch.setenv("MAX_LENGTH", "64")
        patch.setattr(provenance, "code_of", CODE_OF)
        printed = io.TextIOWrapper(
            io.BytesIO(), encoding="utf-8"
        )  # as strict as a terminal or make's pipe
        with (
            redirect_stdout(printed),
            redirect_stderr(
                io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
            ),
        ):
            stale.main(str(folder), *GRAPH, "--given", "", "--goals", "all")
            printed.flush()
            assert set(printed.buffer.getvalue().decode().split()) == {
                "stale-data",
                "stale-train",
                "stale-eval",
            }
            stale.main(str(folder), *GRAPH, "--given", "", "--goals", "all", "--show")
            stale.main(str(folder), *GRAPH, "--given", "", "--goals", "all", "--dry-run")
            assert verify(str(folder), "data", "train", "eval") in (0, 1)
            printed.flush()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def build(work: Path) -> StageResult:
        (work / "weights").write_bytes(b"bytes")
        return StageResult(metrics={"loss": 1.5, "text": "é"})

    output = tmp_path_factory.mktemp("published") / "data"
    publish("data", Settings(), {}, output, build)
    return output


@examples(100, 3_000)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 10**6), st.binary(max_size=4), st.integers(0, 4)),
        min_size=1,
        max_size=3,
    )
)
def test_what_was_edited_in_a_manifest_is_never_fresh(
    published: Path, edits: list[tuple[int, bytes, int]]
) -> None:
    whole = (published / MANIFEST_FILE).read_bytes()
    text = whole
    for place, put, gone in edits:
        start = place % (len(text) + 1)
        text = text[:start] + put + text[start + gone :]
    try:
        same = json.loads(text) == json.loads(whole)
    except (ValueError, RecursionError):
        same = False
    (published / MANIFEST_FILE).write_bytes(text)
    try:
        why = provenance.reasons("data", Settings(), {}, published)
    finally:
        (published / MANIFEST_FILE).write_bytes(whole)
    assert why or same


@examples(100, 1_000)
@given(
    BYTES
    | JSON.map(text_of)
    | st.fixed_dictionaries({"stage": JSON, "pid": JSON, "host": JSON, "since": JSON}).map(text_of)
)
def test_who_holds_a_run_is_said_whatever_its_lock_file_holds(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ".lock").write_bytes(text)
        said = _described(_holder(Path(folder)))
        assert said == "another make" or "process" in said
        with locked(Path(folder), "data"):
            assert json.loads((Path(folder) / ".lock").read_text())["stage"] == "data"


LINES = st.lists(
    BYTES.map(lambda text: text[:100])
    | JSON.map(text_of)
    | st.integers(0, 9).map(lambda step: text_of({"step": step}))
)


@examples(100, 1_000)
@given(LINES, st.booleans(), st.integers(0, 9))
def test_metrics_with_any_lines_are_gone_on_with_from_any_step(
    lines: list[bytes], ended: bool, first: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n" * ended)
        try:
            assert isinstance(last_line(path)["step"], int)
        except StageFailure as failure:
            assert str(path) in str(failure)
        metrics = Metrics(path, first, writes=True)
        metrics.write({"step": first + 1})
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps[-1] == first + 1 and all(step <= first for step in steps[:-1])
        assert last_line(path) == {"step": first + 1}
