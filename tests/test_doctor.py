"""The doctor: what it says of a machine on which everything runs, and of each thing that is
missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stages import doctor
from stages.backends.torch import doctor as torch
from stages.run import cost
from stages.run.backend import Choice
from stages.run.check_result import CheckResult, folder_result
from stages.run.fingerprint import ROOT
from stages.run.settings import Settings
from tests.conftest import Project, clean_environment
from tests.fakes.hub import FOR_EVER, Hub
from tests.fakes.neuron_machine import FakeMachine


def only(findings: object) -> CheckResult:
    (finding,) = findings  # type: ignore[misc]
    return finding


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
    )
    assert done.returncode == 1
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert failed[:3] == ["MODEL_ID", "DATASET", "PROMPTS"]
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

    monkeypatch.setattr(doctor, "CHECKS", [broken, doctor.make_version])
    monkeypatch.setattr(torch, "CHECKS", [])
    findings = doctor.examine(Settings(backend="torch"))
    assert [(finding.about, finding.state) for finding in findings] == [
        ("broken", "FAIL"),
        ("make", "OK"),
    ]
    assert "libnrt.so is missing" in findings[0].text


@pytest.mark.parametrize(
    ("version", "backend", "state"),
    [
        ((3, 9), "torch", "FAIL"),
        ((3, 10), "torch", "OK"),
        ((3, 12), "torch", "OK"),
        ((3, 12), "neuron", "FAIL"),
        ((3, 11), "neuron", "OK"),
    ],
)
def test_a_python_that_the_pins_do_not_know_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], backend: str, state: str
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    assert only(doctor.python_version(Settings(backend=backend))).state == state


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("GNU Make 4.3", "OK"),
        ("GNU Make 4.2.1", "OK"),
        ("GNU Make 3.81", "FAIL"),
        ("bmake", "FAIL"),
    ],
)
def test_a_make_without_what_the_makefile_uses_is_refused(
    fake_machine: FakeMachine, said: str, state: str
) -> None:
    fake_machine.program("make", f"echo '{said}'")
    assert only(doctor.make_version(Settings())).state == state


def test_without_make_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = only(doctor.make_version(Settings()))
    assert (finding.state, "apt install make" in finding.text) == ("FAIL", True)


@pytest.mark.parametrize(
    ("pins", "states"),
    [
        ({"click": "0.0.1"}, ["FAIL"]),
        ({"no-such-package": "1.0"}, ["FAIL"]),
        ({}, ["OK"]),
    ],
)
def test_a_package_of_another_version_than_pinned_is_named(
    monkeypatch: pytest.MonkeyPatch, pins: dict[str, str], states: list[str]
) -> None:
    monkeypatch.setattr(doctor, "pinned_versions", lambda backend: pins)
    findings = list(doctor.packages(Settings(backend="torch")))
    assert [finding.state for finding in findings] == states
    assert all(name in [finding.about for finding in findings] for name in pins)


def test_what_a_build_adds_to_a_version_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "pinned_versions", lambda backend: {"torch": "2.13.0", "other": "1.0+cu12"}
    )
    installed = {"torch": "2.13.0+cpu", "other": "1.0+cu11"}
    monkeypatch.setattr("importlib.metadata.version", installed.__getitem__)
    assert [finding.about for finding in doctor.packages(Settings(backend="torch"))] == ["other"]


def test_a_folder_that_is_a_file_or_has_one_above_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert folder_result("cache", tmp_path / "file" / "below", "HF_HOME").state == "FAIL"
    assert folder_result("cache", tmp_path / "not" / "yet").state == "OK"
    assert not (tmp_path / "not").exists()


def as_an_ordinary_user(check: Callable[[], bool]) -> bool:
    """What `check` returns in a process without root's right to everything."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            status = 0 if check() else 1
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 1)
    return status == 0


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert as_an_ordinary_user(lambda: folder_result("cache", tmp_path / "below").state == "FAIL")


def llama_7b(folder: Path) -> Settings:
    (folder / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": '
        '11008, "num_hidden_layers": 32,'
        ' "num_attention_heads": 32}'
    )
    return Settings(model_id=str(folder), backend="neuron")


def test_the_disk_must_hold_what_the_stages_write_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = llama_7b(tmp_path)
    usage = doctor.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage._replace(free=100 * 10**9))
    enough = only(doctor.disk(settings))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage._replace(free=50 * 10**9))
    short = only(doctor.disk(settings))
    assert (enough.state, short.state) == ("OK", "FAIL")
    assert "6,738,415,616 parameters" in short.text  # as Llama 2 7B's own card counts them
    assert "train 13.5 GB + consolidate 13.5 GB" in short.text


@pytest.mark.parametrize(
    ("kilobytes", "limit", "state"),
    [(64_000_000, "max", "OK"), (16_000_000, "max", "note"), (64_000_000, "8000000000", "note")],
)
def test_memory_that_cannot_hold_the_model_is_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kilobytes: int, limit: str, state: str
) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal:       {kilobytes} kB\nMemFree: 1 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(doctor, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(doctor, "CONTAINER_LIMIT", tmp_path / "memory.max")
    assert only(doctor.memory(llama_7b(tmp_path))).state == state


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


def test_the_price_of_the_machine_is_said(
    monkeypatch: pytest.MonkeyPatch, fake_machine: FakeMachine
) -> None:
    fake_machine.is_a("trn1.32xlarge")
    monkeypatch.setattr(
        doctor, "choose", lambda settings: Choice("neuron", "16 Neuron devices in /dev")
    )
    assert "trn1.32xlarge, 21.5 USD/h" in only(doctor.backend_choice(Settings())).text
    monkeypatch.setattr(cost, "DMI", fake_machine.dev)
    assert "not an EC2 instance" in only(doctor.backend_choice(Settings())).text


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
