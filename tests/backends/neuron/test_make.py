"""`make all BACKEND=neuron` on a CPU: the real Makefile, optimum-neuron and its trainer, over
fakes for the SDK's programs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from stages.run.setting import STAGES
from tests.conftest import Project, clean_environment, copy_project

pytest.importorskip("optimum.neuron", reason="optimum-neuron has no release for this Python")

FAKES = Path(__file__).parents[2] / "fakes"
RUN = (
    "RECIPE=tiny",
    "BACKEND=neuron",
    "BF16=1",
    "NPROC_PER_NODE=2",
    "TENSOR_PARALLEL_SIZE=2",
    "MAX_STEPS=4",
    "INSTANCE_PRICE=1.34",
)


def machine(project: Project, **more: str) -> dict[str, str]:
    """The environment of a machine with one Neuron device and the SDK: its programs on the PATH,
    its wheels for the export."""
    return {
        "PATH": f"{FAKES / 'commands'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{FAKES / 'trn1_machine'}:{FAKES / 'neuron_inference'}",
        "FAKE_LOG": str(project.folder / "called.jsonl"),
        "NEURON_COMPILE_CACHE_URL": str(project.folder.parent / "graphs"),
        "OMP_NUM_THREADS": "1",
        **more,
    }


def calls(project: Project, program: str) -> list[dict]:
    lines = (project.folder / "called.jsonl").read_text().splitlines()
    return [call for call in map(json.loads, lines) if call["program"] == program]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """All six stages on Neuron's backend."""
    project = copy_project(tmp_path_factory.mktemp("neuron") / "project")
    (project.folder / "outputs").mkdir()
    done = project.make("all", *RUN, **machine(project))
    (project.folder / "printed").write_text(done.stdout + done.stderr)
    return project


def test_all_six_stages_publish_on_neuron(built: Project) -> None:
    assert {stage for stage in STAGES if built.manifest(stage)} == set(STAGES)
    assert built.manifest("train")["device"] == "trn1, 2 NeuronCores"
    assert built.manifest("train")["metrics"]["step"] == 4
    losses = built.manifest("eval")["metrics"]
    assert (
        losses["answers"] == 2 and losses["base"]["loss"] > 0 and losses["fine_tuned"]["loss"] > 0
    )


def test_nothing_runs_again(built: Project) -> None:
    assert built.make("-q", "all", *RUN, **machine(built)).returncode == 0


def test_a_stage_is_not_stale_for_being_looked_at_on_a_machine_without_devices(
    built: Project,
) -> None:
    shown = built.make("status", *RUN).stdout
    assert shown.count("up to date") == len(STAGES), shown


def test_the_consolidated_model_loads_in_plain_transformers(built: Project) -> None:
    from transformers import AutoModelForCausalLM

    folder = built.folder / "outputs/tiny/consolidate"
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_train_ran_what_precompile_compiled(built: Project) -> None:
    compiler, (collected, trained) = (
        calls(built, "neuron_parallel_compile")[0],
        calls(built, "torchrun")[:2],
    )
    assert (
        compiler["arguments"][0] == "--parallel_compile_workdir"
        and compiler["arguments"][2] == "torchrun"
    )
    assert compiler["arguments"][3:] == collected["arguments"]
    pairs = zip(
        ["", *collected["arguments"]], collected["arguments"], trained["arguments"], strict=False
    )
    assert {flag for flag, before, after in pairs if before != after} == {
        "--work",
        "--output_dir",
        "--max_steps",
        "--save_strategy",
        "--save_steps",
    }
    assert built.manifest("train")["metrics"]["graphs_compiled"] == 0
    assert built.manifest("precompile")["metrics"]["compile_cache_misses"] > 0


def test_the_workers_get_what_upstreams_launcher_sets(built: Project) -> None:
    for call in calls(built, "torchrun"):
        environment = call["environment"]
        assert environment["MALLOC_ARENA_MAX"] == "64" and environment["NEURON_FUSE_SOFTMAX"] == "1"
        assert (
            f"--cache_dir={environment['NEURON_COMPILE_CACHE_URL']}"
            in environment["NEURON_CC_FLAGS"]
        )


def test_every_stage_says_what_it_cost(built: Project) -> None:
    for stage in STAGES:
        manifest = built.manifest(stage)
        assert manifest["usd"] == pytest.approx(manifest["seconds"] / 3600 * 1.34, abs=1e-4)


def test_nothing_of_the_machine_is_published(built: Project) -> None:
    for path in (built.folder / "outputs/tiny").rglob("*.json*"):
        assert str(built.folder) not in path.read_text(), path


def test_nothing_is_left_beside_the_outputs(built: Project) -> None:
    assert {path.name for path in (built.folder / "outputs/tiny").iterdir()} == {*STAGES, ".lock"}


def test_one_question_is_answered_by_the_compiled_model(built: Project) -> None:
    question = json.loads((built.folder / "data/tiny/prompts.jsonl").read_text().splitlines()[0])[
        "instruction"
    ]
    answers = [
        json.loads(line)
        for line in (built.folder / "outputs/tiny/eval/answers.jsonl").read_text().splitlines()
    ]
    done = built.make("eval", *RUN, f"PROMPT={question}", **machine(built))
    assert done.stdout == f"{answers[0]['answer']}\n"


def test_a_graph_that_does_not_compile_fails_precompile_by_name(
    built: Project, tmp_path: Path
) -> None:
    cache = tmp_path / "graphs"
    done = built.make(
        "precompile",
        *RUN,
        "RUN=another",
        check=False,
        **machine(built, NEURON_COMPILE_CACHE_URL=str(cache), FAKE_FAILS="0"),
    )
    assert (
        done.returncode == 2
        and "graphs did not compile" in done.stderr
        and "MODULE_" in done.stderr
    )
    assert not (built.folder / "outputs/another/precompile").exists()
    assert not list((built.folder / "outputs/another").glob(".work/*"))


def test_without_devices_training_is_refused_before_it_starts(built: Project) -> None:
    environment = {name: value for name, value in machine(built).items() if name != "PATH"}
    done = built.make("train", *RUN, "RUN=nowhere", check=False, **environment)
    assert (
        done.returncode == 2
        and "No NeuronCores here" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_the_settings_of_other_backends_are_refused_together(built: Project) -> None:
    done = built.make(
        "train", *RUN, "RUN=nowhere", "BF16=0", "TORCH_COMPILE=1", check=False, **machine(built)
    )
    assert done.returncode == 2 and "BF16=0" in done.stderr and "TORCH_COMPILE=1" in done.stderr


def test_other_settings_do_not_leak_in() -> None:
    assert "BACKEND" not in clean_environment()


def test_a_rehearsal_is_in_the_band_of_a_cpu_and_changes_nothing(built: Project) -> None:
    done = built.make("rehearse", *RUN, "REHEARSAL_STEPS=2", **machine(built))
    assert "rehearsal: 2 steps as on a CPU" in done.stdout
    report = json.loads((built.folder / "outputs/tiny/rehearsal/report.json").read_text())
    assert report["steps"] == 2 and report["out_of_band"] == []
