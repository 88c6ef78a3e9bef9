"""In one look a file is read once; outside, as often as it is asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.make.stale import stale_stages
from stages.run import manifest
from stages.run.one_look import one_look, read_once
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings

GRAPH = {"data": [], "train": ["data"]}


def test_a_file_that_changes_is_read_again_but_for_one_look(tmp_path: Path) -> None:
    file = tmp_path / "file"
    read = read_once(Path.read_text)
    file.write_text("before")
    assert read(file) == "before"
    with one_look():
        assert read(file) == "before"
        file.write_text("after")
        assert read(file) == "before"
    assert read(file) == "after"
    with one_look():
        assert read(file) == "after"


def test_what_is_stale_is_known_after_reading_each_manifest_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage, inputs in GRAPH.items():
        folders = {name: tmp_path / name for name in inputs}
        publish(stage, Settings(), folders, tmp_path / stage, lambda work: StageResult())
    reads, read = Counter[Path](), manifest._read
    monkeypatch.setattr(manifest, "_read", lambda file: (reads.update([file]), read(file))[1])
    assert stale_stages(GRAPH, tmp_path, Settings()) == {}
    assert max(reads.values()) > 1
    reads.clear()
    with one_look():
        assert stale_stages(GRAPH, tmp_path, Settings()) == {}
    assert [*reads.values()] == [1, 1]


@given(st.text(st.sampled_from("./a\0"), max_size=9))
def test_a_name_is_inside_where_its_path_is(name: str) -> None:
    path = PurePosixPath(name)
    inside = path.parts and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    assert manifest._is_inside(name) == bool(inside)
