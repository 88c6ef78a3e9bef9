"""LM_EVAL before anything runs: its names, where the harness is, and which tasks it has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages import checks
from stages.run import harness as module
from stages.run.errors import InputError
from stages.run.harness import find_harness, harness_problems, named_in, require_harness
from stages.run.setting import STAGES
from stages.run.settings import Settings
from stages.run.task_names import task_names
from tests.fakes.neuron_machine import FakeMachine


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "lm_eval" / "tasks"
    (folder / "arc").mkdir(parents=True)
    (folder / "arc" / "arc_easy.yaml").write_text("tag:\n  - ai2_arc\ntask: arc_easy\n")
    (folder / "arc" / "_mmlu_yaml").write_text("group: 'mmlu' # all\ntask:\n- mmlu_law\n")
    return folder


@pytest.fixture(autouse=True)
def nothing_installed(
    fake_machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No harness of this machine is found, wherever it has one."""
    monkeypatch.setenv("PATH", str(fake_machine.bin))
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.delenv("VENV", raising=False)


@pytest.fixture
def installed(fake_machine: FakeMachine, tasks: Path) -> FakeMachine:
    """An environment of its own on the PATH, whose Python answers as one with the harness."""
    fake_machine.program("lm_eval", "exit 0")
    answer = json.dumps(["0.4.13", str(tasks.parent)])
    fake_machine.program("python", f"echo '{answer}'")
    return fake_machine


def test_names_are_separated_by_commas_or_spaces() -> None:
    assert task_names("arc_easy, hellaswag  gsm8k-cot") == ["arc_easy", "hellaswag", "gsm8k-cot"]
    assert task_names("") == []


@pytest.mark.parametrize("text", ["tasks/mine.yaml", "mine.yaml", "--model", "mmlu_*", "a,b,a"])
def test_what_is_no_name_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(InputError, match=r"LM_EVAL: .*(LM_EVAL_INCLUDE_PATH|Name it once)"):
        Settings.read({"LM_EVAL": text})


def test_a_folder_of_tasks_of_which_none_is_named_is_refused() -> None:
    with pytest.raises(InputError, match="LM_EVAL_INCLUDE_PATH=mine has tasks, and LM_EVAL names"):
        Settings.read({"LM_EVAL_INCLUDE_PATH": "mine"})


def test_only_eval_is_stale_when_they_change() -> None:
    names = {"LM_EVAL", "LM_EVAL_LIMIT", "LM_EVAL_INCLUDE_PATH"}
    shaped = {stage for stage in STAGES if names & Settings().affecting(stage).keys()}
    assert shaped == {"eval"} and names <= Settings().affecting("eval").keys()


def test_a_harness_that_is_missing_is_named_with_the_command_that_keeps_the_pins() -> None:
    [problem] = harness_problems(Settings(backend="torch", lm_eval="arc_easy"))
    assert "pip install -r requirements.txt 'lm_eval[hf]==0.4.13'" in problem
    with pytest.raises(InputError, match="not installed"):
        require_harness(Settings(backend="torch", lm_eval="arc_easy"))


def test_a_harness_without_its_packages_is_not_installed(fake_machine: FakeMachine) -> None:
    fake_machine.program("lm_eval", "exit 0")
    fake_machine.program("python", "echo false")
    assert find_harness() is None


def test_the_harness_is_found_in_the_projects_environment_too(
    installed: FakeMachine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_harness() is None
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(installed.bin)
    harness = find_harness()
    assert harness and harness.version == "0.4.13"
    monkeypatch.setenv("VENV", "")  # as in the container, which has no environment
    assert find_harness() is None


def test_a_script_without_a_python_beside_it_is_believed(fake_machine: FakeMachine) -> None:
    program = fake_machine.program("lm_eval", "exit 0")
    assert find_harness() == (str(program), "", None)
    assert harness_problems(Settings(lm_eval="whatever")) == []


def test_tasks_groups_and_tags_are_found_without_reading_yaml(tasks: Path) -> None:
    assert named_in(tasks) == {"ai2_arc", "arc_easy", "mmlu", "mmlu_law"}


def test_a_task_that_is_unknown_is_refused_with_the_nearest_name(
    installed: FakeMachine, tmp_path: Path
) -> None:
    assert harness_problems(Settings(lm_eval="arc_easy,ai2_arc,mmlu")) == []
    first, second = harness_problems(Settings(lm_eval="arc_eazy,zzz"))
    assert "arc_eazy is no task of lm-evaluation-harness. Did you mean arc_easy?" in first
    assert "`lm_eval ls tasks` lists them" in second
    own = tmp_path / "own"
    wanted = Settings(lm_eval="arc_easy,mine", lm_eval_include_path=str(own))
    missing, _ = harness_problems(wanted)
    assert missing.startswith(f"LM_EVAL_INCLUDE_PATH={own} is not a folder.")
    own.mkdir()
    (own / "mine.yaml").write_text("task: mine\n")
    assert harness_problems(wanted) == []


def test_the_list_of_checks_asks_for_it_where_eval_runs() -> None:
    settings = Settings(backend="torch", lm_eval="arc_easy")
    assert any("not installed" in one for one in checks.machine_problems(settings, STAGES))
    for stages, other in (({"train"}, settings), (STAGES, Settings(backend="torch"))):
        found = checks.machine_problems(other, stages)
        assert not any("lm-evaluation-harness" in one for one in found)
