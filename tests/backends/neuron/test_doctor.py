"""The doctor on Neuron: devices, driver, tools, compile cache and cores."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from stages.backends.neuron import doctor as neuron
from stages.backends.neuron import hardware
from stages.run.settings import Settings
from tests.doctor_checks import as_an_ordinary_user, only
from tests.fakes.neuron_machine import FakeMachine


def test_all_devices_of_the_instance_in_a_row_are_fine(fake_machine: FakeMachine) -> None:
    fake_machine.is_a("trn1.32xlarge")
    finding = only(neuron.devices(Settings()))
    assert (finding.state, "neuron0 to neuron15 of 32 GiB" in finding.text) == ("OK", True)


def test_no_device_is_what_keeps_training_from_running(fake_machine: FakeMachine) -> None:
    finding = only(neuron.devices(Settings()))
    assert (finding.state, "--device=/dev/neuron0" in finding.text) == ("FAIL", True)


def test_a_gap_between_the_devices_is_named(fake_machine: FakeMachine) -> None:
    fake_machine.is_a("trn1.32xlarge")
    for number in (0, 3):
        (fake_machine.dev / f"neuron{number}").unlink()
    assert any(
        "neuron{0,3} missing" in finding.text and finding.state == "FAIL"
        for finding in neuron.devices(Settings())
    )


def test_fewer_devices_than_the_instance_has_are_advice(fake_machine: FakeMachine) -> None:
    fake_machine.is_a("trn1.32xlarge", devices=4)
    finding = only(neuron.devices(Settings()))
    assert (finding.state, "4 of the 16" in finding.text) == ("note", True)


def test_devices_that_this_user_may_not_use_are_named(
    fake_machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_machine.is_a("trn1.2xlarge", devices=0)
    with tempfile.TemporaryDirectory() as folder:  # pytest's own may not be entered by others
        Path(folder).chmod(0o755)
        (Path(folder) / "neuron0").touch()
        (Path(folder) / "neuron0").chmod(0o600 if os.getuid() == 0 else 0o000)
        monkeypatch.setattr(hardware, "DEVICE_NODES", Path(folder))
        assert as_an_ordinary_user(
            lambda: "may not read and write" in only(neuron.devices(Settings())).text
        )


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("2.24.7.0", "OK"),
        ("2.28.0.0", "OK"),
        ("2.29.0.0", "FAIL"),
        ("2.31.1.0", "FAIL"),
        ("3.0", "FAIL"),
        ("2.19.64.0", "note"),
        ("", "note"),
    ],
)
def test_a_driver_that_the_image_cannot_work_with_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, state: str
) -> None:
    (tmp_path / "version").write_text(f"{version}\n")
    monkeypatch.setattr(neuron, "DRIVER_FILES", (tmp_path / "none", tmp_path / "version"))
    assert only(neuron.driver(Settings())).state == state


def test_the_driver_of_a_trn2_is_not_to_be_downgraded(
    fake_machine: FakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version").write_text("2.31.0\n")
    monkeypatch.setattr(neuron, "DRIVER_FILES", (tmp_path / "version",))
    said = {}
    for instance in ("trn1.32xlarge", "trn2.48xlarge"):
        fake_machine.is_a(instance)
        finding = only(neuron.driver(Settings()))
        assert finding.state == "FAIL"
        said[instance] = finding.text
    assert "Install" in said["trn1.32xlarge"] and "Install" not in said["trn2.48xlarge"]
    assert "Keep the driver" in said["trn2.48xlarge"]


def test_the_tools_must_be_there_and_be_this_pythons(
    tmp_path: Path, fake_machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    monkeypatch.setattr(sys, "executable", str(ours / "python"))
    monkeypatch.setenv("PATH", str(fake_machine.bin))
    for folder in (ours, fake_machine.bin):
        (folder / "neuronx-cc").write_text(f"#!{folder}/python\n")
        (folder / "neuronx-cc").chmod(0o755)
    fake_machine.program("torchrun", "").write_text("#!/opt/conda/bin/python3.11\n")
    assert [(finding.about, finding.state) for finding in neuron.tools(Settings())] == [
        ("torchrun", "note"),  # it starts this Python all the same
        ("neuron_parallel_compile", "FAIL"),
        ("neuronx-cc", "OK"),  # though another is first on the caller's PATH
    ]


def test_the_compiler_of_another_python_is_refused(
    tmp_path: Path, fake_machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(fake_machine.bin))
    for name in neuron.TOOLS:
        fake_machine.program(name, "").write_text("#!/opt/ami/bin/python3.10\n")
    found = {finding.about: finding for finding in neuron.tools(Settings())}
    assert [found[name].state for name in neuron.TOOLS] == ["note", "FAIL", "FAIL"]
    assert "neuronx-cc is not in" in found["neuronx-cc"].text


def test_poisoned_graphs_in_the_cache_are_shown_with_their_remedy(tmp_path: Path) -> None:
    module = tmp_path / "neuronxcc-2.21+82" / "MODULE_1+aa"
    module.mkdir(parents=True)
    (module / "model.neff").write_text("compiled")
    settings = Settings(neuron_compile_cache_url=str(tmp_path))
    assert [finding.state for finding in neuron.compile_cache(settings)] == ["OK", "OK"]
    (module / "model.neff").write_text("")
    writable, poisoned = neuron.compile_cache(settings)
    assert (writable.state, poisoned.state) == ("OK", "note")
    assert f"rm -r '{module}'" in poisoned.text


def test_on_neuron_the_cores_are_counted_against_the_processes(fake_machine: FakeMachine) -> None:
    fake_machine.is_a("trn1.32xlarge")
    text = only(neuron.cores(Settings(nproc_per_node=32))).text
    assert text.startswith("32 for NPROC_PER_NODE=32")
