"""The compile cache: the state of each graph, from its files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from stages.backends.neuron import cache
from stages.backends.neuron.compile_report import CompileReport
from stages.backends.neuron.precompile import require_all_done
from stages.run.errors import StageFailure
from stages.run.lock import shared
from tests.doctor_checks import as_an_ordinary_user
from tests.fakes.neuron_cache import COMPILER, graph


def test_each_graph_has_the_state_that_its_files_tell(filled: Path) -> None:
    found = {entry.name.rpartition("_")[2]: entry.state for entry in cache.entries(filled)}
    assert found == {"1+aa": "done", "2+aa": "poisoned", "3+aa": "locked", "4+aa": "unfinished"}


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({"model_neff": ""}, "poisoned"),
        ({"model_neff": "", "model_done": ""}, "poisoned"),
        ({"model_neff": "", "model_log": "killed"}, "poisoned"),
        ({"model_neff": "compiled", "model_done": "", "model_log": "warnings"}, "done"),
        ({"model_neff": "compiled", "model_done": "", "model_hlo_module_pb_lock": ""}, "done"),
        ({"model_neff": "cut off"}, "unfinished"),
        ({"model_log": "failed", "model_hlo_module_pb_lock": ""}, "locked"),
    ],
)
def test_where_files_contradict_each_other_what_the_compiler_would_do_counts(
    tmp_path: Path, files: dict[str, str], state: str
) -> None:
    graph(tmp_path, "1+aa", **files)
    assert [entry.state for entry in cache.entries(tmp_path)] == [state]


def test_what_a_run_compiled_is_the_difference_of_the_names(filled: Path) -> None:
    before = cache.names(filled)
    new = graph(filled, "9+bb", model_neff="compiled", model_done="")
    graph(filled, "8+bb", model_log="failed")
    assert cache.names(filled) - before == {new}
    assert cache.names(filled, "poisoned") == {f"{COMPILER}/MODULE_2+aa", f"{COMPILER}/MODULE_8+bb"}


def test_graphs_are_counted_by_the_compiler_that_made_them(filled: Path) -> None:
    graph(
        filled, "1+aa", compiler="neuronxcc-2.15.128.0+56dc5a86", model_neff="older", model_done=""
    )
    counts = cache.summary(cache.entries(filled))
    assert (
        counts[COMPILER]["done"]
        == counts[COMPILER]["poisoned"]
        == counts[COMPILER]["locked"]
        == counts[COMPILER]["unfinished"]
        == 1
    )
    assert counts["neuronxcc-2.15.128.0+56dc5a86"] == {
        "done": 1,
        "poisoned": 0,
        "locked": 0,
        "unfinished": 0,
        "bytes": len("graph" + "older"),
    }


def test_a_lock_is_as_old_as_its_file(tmp_path: Path) -> None:
    name = graph(tmp_path, "1+aa", model_hlo_module_pb_lock="")
    lock = tmp_path / name / "model.hlo_module.pb.lock"
    os.utime(lock, (lock.stat().st_mtime - 7200,) * 2)
    (entry,) = cache.entries(tmp_path)
    assert entry.lock_seconds == pytest.approx(7200, abs=60)
    assert "for 2 h 00 min" in "\n".join(cache.blocked([entry], tmp_path))


@pytest.mark.parametrize("url", ["s3://bucket/cache", "/nowhere/neuron-compile-cache"])
def test_a_cache_that_is_in_s3_or_not_there_yet_has_no_graphs(url: str) -> None:
    assert cache.entries(url) == []
    assert cache.names(url) == set()


def test_locks_are_removed_only_where_no_stage_compiles(
    filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with cache.in_use(filled):
        assert "1 graph locked for up to" in capsys.readouterr().out
        assert not cache.names(filled, "locked")
        lock = filled / COMPILER / "MODULE_3+aa" / "model.hlo_module.pb.lock"
        lock.touch()
        with cache.in_use(filled):
            assert lock.exists()
    said = capsys.readouterr().out
    assert "left alone (another stage" in said and "--command clear-locks" in said
    with cache.in_use("s3://bucket/graphs"):
        pass


def test_a_cache_that_cannot_be_held_keeps_its_locks_and_says_so(
    filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (filled / cache.LOCK_FILE).mkdir()
    with cache.in_use(filled):
        assert cache.names(filled, "locked")
    said = capsys.readouterr().out
    assert "are left alone" in said and "clear-locks" in said


def test_a_graph_that_nothing_reports_is_missed(filled: Path) -> None:
    graphs = cache.entries(filled)
    named = CompileReport(0, 0, 0, extracted={f"{COMPILER}/MODULE_3+aa"})
    with pytest.raises(StageFailure, match=r"1 of .*\n  neuronxcc\S+MODULE_3\+aa \(locked\)"):
        require_all_done(named, graphs, graphs, str(filled))
    with pytest.raises(StageFailure, match=r"3 of this training's graphs"):
        require_all_done(CompileReport(0, 0, 0), [], graphs, str(filled))
    require_all_done(CompileReport(0, 0, 0), graphs, graphs, str(filled))  # another run's


def test_in_s3_a_graph_that_the_report_leaves_out_is_missed() -> None:
    url, one, other = "s3://bucket/graphs", "neuronxcc-2.21/MODULE_1", "neuronxcc-2.21/MODULE_2"
    passed_over = CompileReport(1, 1, 0, extracted={one, other}, compiled={one})
    with pytest.raises(StageFailure, match=r"1 of .*\n  \S+MODULE_2 \(not in the report\)") as told:
        require_all_done(passed_over, [], [], url)
    assert f"NEURON_COMPILE_CACHE_URL='{url}'" in str(told.value)
    require_all_done(CompileReport(2, 2, 0, extracted={one, other}), [], [], url)
    # One rank left it to be compiled, another had it from the cache a moment later.
    require_all_done(CompileReport(0, 0, 0, extracted={one}, hits={one}), [], [], url)


def test_a_cache_whose_lock_file_is_another_users_is_held_all_the_same() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own may not be entered by others
        Path(folder).chmod(0o755)
        lock = Path(folder) / cache.LOCK_FILE
        lock.touch(mode=0o644)
        alone: list[bool] = []
        with shared(lock, lambda: alone.append(True)):

            def held_by_another() -> bool:
                with shared(lock, lambda: alone.append(False)):
                    return alone == [True]

            assert as_an_ordinary_user(held_by_another)
