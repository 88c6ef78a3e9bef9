"""The doctor: what it says of a machine on which everything runs, and of each thing that is
missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stages import doctor
from stages.backends.torch import doctor as torch
from stages.machine import make_version
from stages.run.check_result import CheckResult, folder_result
from stages.run.fingerprint import ROOT
from stages.run.settings import Settings
from tests.conftest import Project, clean_environment
from tests.doctor_checks import as_an_ordinary_user, llama_7b, only
from tests.fakes.hub import FOR_EVER, Hub


def examined(folder: Path, **given: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "stages.doctor"]
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT), **given}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)


def test_where_all_is_well_every_line_is_ok(project: Project) -> None:
    tiny = {
        "MODEL_ID": "data/tiny",
        "INIT_WEIGHTS": "random",
        "DATASET": "data/tiny/rows.jsonl",
        "PROMPTS": "data/tiny/prompts.jsonl",
    }
    before = project.snapshot()
    done = examined(
        project.folder, BACKEND="torch", MAX_LENGTH="64", INFERENCE_SEQUENCE_LENGTH="64", **tiny
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == "every stage can run here"
    assert {line.split()[0] for line in lines} == {"OK"}
    assert project.snapshot() == before  # it looks, and changes nothing


def test_everything_that_is_wrong_is_said_at_once_and_the_exit_status_is_1(tmp_path: Path) -> None:
    done = examined(
        tmp_path,
        BACKEND="torch",
        MODEL_ID="./no-model",
        DATASET="./rows.jsonl",
        PROMPTS="prompts.jsonl",
        EVAL_SET="test.jsonl",
    )
    assert done.returncode == 1
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert failed[:4] == ["MODEL_ID", "DATASET", "PROMPTS", "EVAL_SET"]
    assert "Traceback" not in done.stdout + done.stderr


def test_settings_that_cannot_be_read_are_what_it_says(tmp_path: Path) -> None:
    done = examined(tmp_path, LEARNING_RATE="fast", TOP_P="2")
    assert done.returncode == 1
    assert [line.split()[:3] for line in done.stdout.splitlines()[:2]] == [
        ["FAIL", "settings", "LEARNING_RATE='fast'"],
        ["FAIL", "settings", "TOP_P=2"],
    ]


def test_a_check_that_breaks_does_not_keep_the_others_from_looking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(settings: Settings) -> list[CheckResult]:
        raise RuntimeError("libnrt.so is missing")

    monkeypatch.setattr(doctor, "CHECKS", [broken, make_version])
    monkeypatch.setattr(torch, "CHECKS", [])
    findings = doctor.examine(Settings(backend="torch"))
    assert [(finding.about, finding.state) for finding in findings] == [
        ("broken", "FAIL"),
        ("make", "OK"),
    ]
    assert "libnrt.so is missing" in findings[0].text


def test_a_folder_that_is_a_file_or_has_one_above_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert folder_result("cache", tmp_path / "file" / "below", "HF_HOME").state == "FAIL"
    assert folder_result("cache", tmp_path / "not" / "yet").state == "OK"
    assert not (tmp_path / "not").exists()


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert as_an_ordinary_user(lambda: folder_result("cache", tmp_path / "below").state == "FAIL")


def test_a_model_folder_lacks_what_it_lacks(tmp_path: Path) -> None:
    assert "config.json" in only(doctor.model_source(Settings(model_id=str(tmp_path)))).text
    settings = llama_7b(tmp_path)
    assert "safetensors" in only(doctor.model_source(settings)).text
    (tmp_path / "model.safetensors").touch()
    assert only(doctor.model_source(settings)).state == "OK"


@pytest.mark.parametrize("dataset", ["/nowhere/rows.csv", "./rows", "rows.jsonl", "a/b/c"])
def test_a_dataset_that_can_only_be_a_file_is_not_looked_for_on_the_hub(dataset: str) -> None:
    finding = only(doctor.dataset_source(Settings(dataset=dataset)))
    assert (finding.state, "does not exist" in finding.text) == ("FAIL", True)


def test_offline_what_is_on_the_hub_is_said_to_be_unasked(tmp_path: Path) -> None:
    done = examined(
        tmp_path,
        BACKEND="torch",
        MODEL_ID="me/model",
        DATASET="me/rows",
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "empty"),
    )
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if len(line.split()) > 1}
    assert lines["DATASET"].startswith("note")
    assert lines["MODEL_ID"].startswith("FAIL")
    assert "the Hub cannot be reached and the cache does not hold it" in lines["MODEL_ID"]


def test_a_gated_model_and_a_dataset_that_is_not_there_are_refused_with_what_to_do(
    tmp_path: Path,
) -> None:
    hub = Hub(tmp_path)
    hub.misbehave("gated/model", "gated", FOR_EVER)
    asked = {
        "MODEL_ID": "gated/model",
        "DATASET": "unknown/rows",
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
    }
    done = examined(tmp_path, BACKEND="torch", **asked)
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("FAIL")}
    assert "gated/model is gated. Accept its licence" in lines["MODEL_ID"]
    assert "unknown/rows: the Hub shows no such dataset" in lines["DATASET"]


# The torch backend.


def test_without_a_compiler_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = only(doctor.fit(Settings(inference_sequence_length=512, max_length=512)))
    assert (finding.state, "no-such-compiler is not on the PATH" in finding.text) == ("FAIL", True)


def test_what_train_would_refuse_is_refused_here(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    settings = Settings(
        model_id="data/tiny", tensor_parallel_size=3, nproc_per_node=3, max_length=66
    )
    assert any(
        "TENSOR_PARALLEL_SIZE=3" in finding.text and finding.state == "FAIL"
        for finding in doctor.fit(settings)
    )
