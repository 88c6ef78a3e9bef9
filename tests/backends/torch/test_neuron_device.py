"""DEVICE=neuron, which is Trainium 2 and 3 natively: all six stages over a stand-in, which computes
on the CPU and refuses what AWS's documents say is refused (tests/fakes/trn2_machine)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from stages.backends import device
from stages.backends.torch import doctor
from stages.backends.torch.check import machine_problems, native_problem
from stages.backends.torch.static import prefill_lengths
from stages.run import backend
from stages.run.errors import InputError
from stages.run.setting import STAGES
from stages.run.settings import Settings
from tests.conftest import Project, copy_project
from tests.fakes.neuron_machine import FakeMachine

FAKES = Path(__file__).parents[2] / "fakes"
RUN = ("RECIPE=tiny", "BACKEND=torch", "DEVICE=neuron", "INFERENCE_SEQUENCE_LENGTH=400")


@pytest.fixture(scope="module")
def on_neuron(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """All six stages."""
    project = copy_project(tmp_path_factory.mktemp("native") / "project")
    done = project.make("all", *RUN, **machine(project))
    (project.folder / "printed").write_text(done.stdout)
    return project


def machine(project: Project) -> dict[str, str]:
    return {
        "PATH": f"{FAKES / 'commands'}:{os.environ['PATH']}",
        "PYTHONPATH": str(FAKES / "trn2_machine"),
        "NEURON_COMPILE_CACHE_URL": str(project.folder / "graphs"),
        "OMP_NUM_THREADS": "1",
    }


def test_all_six_stages_publish_on_it(on_neuron: Project) -> None:
    assert {stage for stage in STAGES if on_neuron.manifest(stage)} == set(STAGES)
    assert on_neuron.manifest("compile-inference")["metrics"]["device"] == "neuron"
    assert on_neuron.manifest("eval")["metrics"]["answers"] > 0
    on_neuron.make("all", *RUN, **machine(on_neuron))
    assert on_neuron.stages_to_run("all", *RUN, **machine(on_neuron)) == []


def test_it_trains_as_a_cpu_does(on_neuron: Project, built_once: Project) -> None:
    """Every layer compiled for one shape, AdamW without the fused kernel, sums on the CPU."""
    neuron, cpu = (
        [
            json.loads(line)
            for line in (project.folder / "outputs/tiny/train/metrics.jsonl")
            .read_text()
            .splitlines()
        ]
        for project in (on_neuron, built_once)
    )
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [step[name] for step in neuron] == pytest.approx(
            [step[name] for step in cpu], rel=1e-6
        )
    assert neuron[-1]["validation_loss"] == pytest.approx(cpu[-1]["validation_loss"], rel=1e-6)


def test_one_graph_serves_all_layers_and_precompile_makes_it(on_neuron: Project) -> None:
    report = on_neuron.manifest("precompile")["metrics"]
    # One with gradients; the other is of the validation's losses, which train adds.
    assert report["compile_cache_files"] == report["compile_cache_files_new"] == 1


def test_prompts_have_graphs_of_a_few_lengths(on_neuron: Project) -> None:
    assert prefill_lengths(400) == [128, 256, 399]
    assert prefill_lengths(64) == [63] and prefill_lengths(129) == [128]
    assert (
        "compiling decode and prefill of 128, 256, 399 tokens"
        in (on_neuron.folder / "printed").read_text()
    )


@pytest.mark.parametrize(
    ("instance", "name", "native"),
    [
        ("trn1.32xlarge", "neuron", False),
        ("inf2.xlarge", "neuron", False),
        ("trn2.3xlarge", "torch", True),
        ("trn2.48xlarge", "torch", True),
    ],
)
def test_the_instance_decides_which_path_is_taken(
    fake_machine: FakeMachine,
    monkeypatch: pytest.MonkeyPatch,
    instance: str,
    name: str,
    native: bool,
) -> None:
    monkeypatch.setattr(backend, "DEVICE_NODES", fake_machine.dev)
    fake_machine.is_a(instance)
    chosen = backend.choose(Settings())
    assert (chosen.name, chosen.on_neuron) == (name, native)
    assert backend.choose(Settings(device="cpu")).name == "torch"
    # The native path, named or found, is refused where its package is not installed.
    for settings in (Settings(device="neuron"), *[Settings()] * native):
        with pytest.raises(InputError, match=r"torch-neuronx 2\.13\.3\.\*"):
            device.device_of(settings)


def test_a_rank_has_a_logical_core_and_its_memory(fake_machine: FakeMachine) -> None:
    """24 GiB of a Trainium 2's 96 GiB for each of its 4 logical cores."""
    fake_machine.is_a("trn2.48xlarge")
    native = device.Neuron(Settings())
    assert native.ranks() == 64 and native.memory() == 24 * 2**30
    assert native.describe() == "trn2.48xlarge, 64 NeuronCores"


def test_the_doctor_says_what_a_trainium_2_has(
    fake_machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_machine.is_a("trn2.48xlarge")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.3.0")
    settings = Settings(device="neuron", nproc_per_node=65)
    said = [f"{one.state} {one.text}" for check in doctor.CHECKS for one in check(settings)]
    assert any("25.8 GB for each process; 64 processes can train" in line for line in said), said
    assert any(line.startswith("FAIL NPROC_PER_NODE=65 is above the 64") for line in said)
    assert any("16 devices x 4 cores" in line for line in said), said


def test_a_device_that_is_not_here_is_refused_before_anything_runs(
    fake_machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    [problem] = machine_problems(Settings(device="neuron"), {"train"})
    assert "there is no Neuron device here" in problem
    # Also where its package is not installed, which would not help.
    with pytest.raises(InputError, match="there is no Neuron device here"):
        device.device_of(Settings(device="neuron"))
    assert list(machine_problems(Settings(device="neuron"), {"data"})) == []
    fake_machine.is_a("trn2.3xlarge")
    settings = Settings(device="neuron", neuron_compile_cache_url="s3://bucket/cache")
    [problem] = machine_problems(settings, {"train"})
    assert "keeps its graphs in a folder" in problem
    monkeypatch.setattr("stages.backends.torch.check.NVIDIA_DEVICES", ("/dev/none",))
    [problem] = machine_problems(Settings(device="cuda"), {"eval"})
    assert "no NVIDIA GPU" in problem
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="PyTorch sees no NVIDIA GPU"):
        device.device_of(Settings(device="cuda"))


def test_the_xla_package_of_the_same_name_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.8.0.2.10.16998")
    assert "torch-neuronx 2.8.0.2.10.16998 is installed" in native_problem()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.3.0")
    assert native_problem() == ""


def test_optimum_neuron_has_no_choice_of_device() -> None:
    with pytest.raises(InputError, match="DEVICE=cpu is for the torch backend"):
        Settings.read({"BACKEND": "neuron", "DEVICE": "cpu"})
