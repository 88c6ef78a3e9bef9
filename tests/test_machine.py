"""The doctor's checks of the machine: versions, packages, price, disk and memory."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stages import machine
from stages.run import cost, host
from stages.run.backend import Choice
from stages.run.settings import Settings
from tests.doctor_checks import llama_7b, only
from tests.fakes.neuron_machine import FakeMachine


@pytest.mark.parametrize(
    ("version", "backend", "state"),
    [
        ((3, 9), "torch", "FAIL"),
        ((3, 10), "torch", "OK"),
        ((3, 12), "torch", "OK"),
        ((3, 12), "neuron", "FAIL"),
        ((3, 11), "native", "FAIL"),
        ((3, 12), "native", "OK"),
        ((3, 11), "neuron", "OK"),
    ],
)
def test_a_python_that_the_pins_do_not_know_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], backend: str, state: str
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    settings = Settings(device="neuron") if backend == "native" else Settings(backend=backend)
    assert only(machine.python_version(settings)).state == state


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
    assert only(machine.make_version(Settings())).state == state


def test_without_make_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = only(machine.make_version(Settings()))
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
    monkeypatch.setattr(machine, "pinned_versions", lambda backend: pins)
    findings = list(machine.packages(Settings(backend="torch")))
    assert [finding.state for finding in findings] == states
    assert all(name in [finding.about for finding in findings] for name in pins)


def test_what_a_build_adds_to_a_version_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        machine, "pinned_versions", lambda backend: {"torch": "2.13.0", "other": "1.0+cu12"}
    )
    installed = {"torch": "2.13.0+cpu", "other": "1.0+cu11"}
    monkeypatch.setattr("importlib.metadata.version", installed.__getitem__)
    assert [finding.about for finding in machine.packages(Settings(backend="torch"))] == ["other"]


def test_the_disk_must_hold_what_the_stages_write_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = llama_7b(tmp_path)
    usage = machine.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        machine.shutil, "disk_usage", lambda place: usage._replace(free=100 * 10**9)
    )
    enough = only(machine.disk(settings))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: usage._replace(free=50 * 10**9))
    short = only(machine.disk(settings))
    assert (enough.state, short.state) == ("OK", "FAIL")
    assert "6,738,415,616 parameters" in short.text  # as Llama 2 7B's own card counts them
    assert "train 13.5 GB + consolidate 13.5 GB" in short.text


def test_the_speed_of_the_disk_is_measured_and_said_for_this_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    text = only(machine.disk_speed(llama_7b(tmp_path / "model"))).text
    assert re.match(r"about [\d.]+ [kMG]B/s are written: at least .+ for 80.9 GB", text)
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("backend", "speed", "state"),
    [("neuron", 125e6, "note"), ("neuron", 1e9, "OK"), ("torch", 125e6, "OK")],
)
def test_a_slow_disk_is_advice_where_devices_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, speed: float, state: str
) -> None:
    monkeypatch.setattr(machine, "write_speed", lambda folder: speed)
    settings = replace(llama_7b(tmp_path), backend=backend, instance_price=21.5)
    finding = only(machine.disk_speed(settings))
    assert (finding.state, "gp3 volume with 1,000 MB/s" in finding.text) == (state, state == "note")
    if state == "note":
        assert "about 125 MB/s are written: at least 10 min 47 s, 3.86 USD," in finding.text


def test_no_speed_is_measured_where_room_is_scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_space", lambda folder: 10**8)
    monkeypatch.setattr(machine, "write_speed", lambda folder: pytest.fail("it wrote"))
    assert "not measured: 100 MB free" in only(machine.disk_speed(Settings())).text


def test_a_disk_that_cannot_be_written_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> float:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(machine, "write_speed", refuse)
    finding = only(machine.disk_speed(Settings()))
    assert (finding.state, "Disk quota exceeded" in finding.text) == ("note", True)


@pytest.mark.parametrize(
    ("kilobytes", "limit", "state"),
    [(64_000_000, "max", "OK"), (16_000_000, "max", "note"), (64_000_000, "8000000000", "note")],
)
def test_memory_that_cannot_hold_the_model_is_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kilobytes: int, limit: str, state: str
) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal:       {kilobytes} kB\nMemFree: 1 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(host, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host, "CONTAINER_LIMIT", tmp_path / "memory.max")
    assert only(machine.memory(llama_7b(tmp_path))).state == state


def test_the_price_of_the_machine_is_said(
    monkeypatch: pytest.MonkeyPatch, fake_machine: FakeMachine
) -> None:
    fake_machine.is_a("trn1.32xlarge")
    monkeypatch.setattr(
        machine, "choose", lambda settings: Choice("neuron", "16 Neuron devices in /dev")
    )
    assert "trn1.32xlarge, 21.5 USD/h" in only(machine.backend_choice(Settings())).text
    monkeypatch.setattr(cost, "DMI", fake_machine.dev)
    assert "not an EC2 instance" in only(machine.backend_choice(Settings())).text


def test_a_training_that_does_not_fit_is_a_note_with_the_smallest_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(llama_7b(tmp_path), backend="torch", device="cpu")
    monkeypatch.setattr("stages.forecast.machine.host_memory", lambda: 2**40)
    assert only(machine.training_memory(settings)).state == "OK"
    monkeypatch.setattr("stages.forecast.machine.host_memory", lambda: 40 * 10**9)
    found = only(machine.training_memory(settings))
    assert found.state == "note" and "The smallest change: " in found.text
    assert list(machine.training_memory(Settings(model_id="someone/nothing-here"))) == []
