"""docker/run: what it asks of the container engine, with device folders made here and an engine
that only records."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from stages.run.errors import InputError
from tests.conftest import Project, clean_environment, copy_project

# An engine that writes down what it was given and ends with a status of its own.
RECORDER = """\
#!{python}
import json, os, sys
with open({record!r}, "w") as file:
    json.dump([sys.argv[1:], dict(os.environ)], file)
sys.exit(7)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return copy_project(tmp_path_factory.mktemp("docker") / "my project")


@pytest.fixture(scope="module")
def run(project: Project) -> ModuleType:
    """docker/run of the project as a module."""
    loader = SourceFileLoader("docker_run", str(project.folder / "docker" / "run"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = sys.modules[loader.name] = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """The /dev of a trn1.32xlarge with two network adapters."""
    folder = tmp_path / "dev"
    (folder / "infiniband").mkdir(parents=True)
    for name in (
        *(f"neuron{n}" for n in range(16)),
        "infiniband/uverbs0",
        "infiniband/uverbs1",
        "neuron_monitor",
    ):
        (folder / name).touch()
    return folder


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "engine"
    path.write_text(RECORDER.format(python=sys.executable, record=str(tmp_path / "record.json")))
    path.chmod(0o755)
    return path


def command(run: ModuleType, dev: Path, *words: str, **environment: str) -> list[str]:
    """The command for `words` in an environment that holds nothing but `environment`, PATH and
    HOME."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/home/me"} | environment
    return run.docker_command(
        run.read_request(words, environment), environment, dev=dev, terminal=False
    )[0]


def following(words: list[str], option: str) -> list[str]:
    return [value for name, value in pairwise(words) if name == option]


def recorded(
    engine: Path, project: Project, *words: str, **environment: str
) -> tuple[list[str], dict[str, str], str]:
    """What an engine is really given by `words` (argv and environment), and what docker/run
    printed."""
    (engine.parent / "home").mkdir(exist_ok=True)
    cache = str(engine.parent / "cache").replace(".", "_")
    surroundings = (
        clean_environment()
        | {"HOME": str(engine.parent / "home"), "NEURON_COMPILE_CACHE_URL": cache}
        | environment
    )
    surroundings.pop("HF_HOME", None)
    done = subprocess.run(
        words,
        cwd=project.folder,
        env=surroundings | {"DOCKER": str(engine)},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (2, 7), done.stderr  # make ends with 2 whatever its recipe ended with
    arguments, given = json.loads((engine.parent / "record.json").read_text())
    return arguments, given, done.stdout + done.stderr


# Devices.


def test_a_training_gets_every_neuron_device_in_order(run: ModuleType, dev: Path) -> None:
    words = command(run, dev, "train", "RECIPE=tiny")
    assert following(words, "--device") == [f"/dev/neuron{n}" for n in range(16)]
    assert following(words, "--ulimit") == ["memlock=-1", "nofile=65535"]


@pytest.mark.parametrize("goal", ["data", "status", "help", "clean"])
def test_what_computes_on_no_device_gets_none(run: ModuleType, dev: Path, goal: str) -> None:
    assert following(command(run, dev, goal, "RECIPE=tiny"), "--device") == []


def test_a_stage_without_devices_gets_them_when_a_training_has_to_run_before_it(
    run: ModuleType, dev: Path
) -> None:
    assert len(following(command(run, dev, "consolidate", "RECIPE=tiny"), "--device")) == 16


def test_a_stage_without_devices_runs_on_the_backend_of_those_that_have_them(
    run: ModuleType, dev: Path
) -> None:
    assert "BACKEND=neuron" in following(command(run, dev, "data", "RECIPE=tiny"), "--env")
    assert "BACKEND=neuron" not in command(run, dev, "data", "RECIPE=tiny", "BACKEND=torch")


def test_pytorch_on_a_neuron_host_gets_no_devices(run: ModuleType, dev: Path) -> None:
    assert following(command(run, dev, "train", "RECIPE=tiny", BACKEND="torch"), "--device") == []


def test_a_host_without_devices_gives_none(run: ModuleType, tmp_path: Path) -> None:
    assert not [
        word
        for word in command(run, tmp_path, "all", "RECIPE=tiny")
        if word == "--device" or word.startswith("BACKEND=")
    ]


def test_a_missing_device_is_named_before_anything_starts(run: ModuleType, dev: Path) -> None:
    for name in ("neuron3", "neuron11"):
        (dev / name).unlink()
    with pytest.raises(
        InputError, match=r"/dev/neuron3, /dev/neuron11: missing, although there is /dev/neuron15"
    ):
        command(run, dev, "train", "RECIPE=tiny")


def test_network_adapters_come_only_when_asked_for(
    run: ModuleType, dev: Path, tmp_path: Path
) -> None:
    assert not any("uverbs" in word for word in command(run, dev, "train", "RECIPE=tiny"))
    words = command(run, dev, "train", "RECIPE=tiny", "EFA=1")
    assert following(words, "--device")[-2:] == [
        "/dev/infiniband/uverbs0",
        "/dev/infiniband/uverbs1",
    ]
    assert following(words, "--network") == ["host"]
    assert "EFA=1" not in words
    shutil.rmtree(dev / "infiniband")
    with pytest.raises(InputError, match="no /dev/infiniband/uverbs0"):
        command(run, dev, "train", "RECIPE=tiny", EFA="1")


# What crosses the border, and how.


def test_secrets_cross_by_name_and_stand_in_no_command_or_log(
    engine: Path, project: Project
) -> None:
    secrets = {"HF_TOKEN": "hf_1", "AWS_SECRET_ACCESS_KEY": "aws_1", "WANDB_API_KEY": "wandb_1"}
    secrets |= {"MLFLOW_TRACKING_PASSWORD": "mlflow_1"}
    arguments, environment, printed = recorded(engine, project, "docker/run", "status", **secrets)
    assert set(secrets) <= set(following(arguments, "--env"))
    assert {name: environment[name] for name in secrets} == secrets
    assert not any(value in word for value in secrets.values() for word in [*arguments, printed])


def test_what_tunes_the_processes_crosses_and_what_nothing_reads_does_not(
    run: ModuleType, dev: Path
) -> None:
    tuning = ("XLA_FLAGS", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "LOGLEVEL", "NEURON_CC_FLAGS")
    words = command(run, dev, "train", **dict.fromkeys((*tuning, "EDITOR"), "1"))
    crossing = set(following(words, "--env"))
    assert set(tuning) <= crossing and "EDITOR" not in crossing


def test_a_secret_on_the_command_line_is_refused(run: ModuleType, dev: Path) -> None:
    with pytest.raises(
        InputError, match="HF_TOKEN on a command line is seen by everyone"
    ) as refusal:
        command(run, dev, "train", "HF_TOKEN=hf_1")
    assert "hf_1" not in str(refusal.value)


@pytest.mark.parametrize(
    "prompt", ['It\'s "odd"', "costs $5 and $(id) and `id`", "two\nlines, a \\ and a #", "ünï=code"]
)
def test_a_prompt_arrives_as_typed(engine: Path, project: Project, prompt: str) -> None:
    arguments, _, _ = recorded(
        engine, project, "docker/run", "eval", "RECIPE=tiny", f"PROMPT={prompt}", "BACKEND=torch"
    )
    assert arguments[-5:] == [
        "trn-tune",
        "eval",
        "RECIPE=tiny",
        f"PROMPT={prompt}",
        "BACKEND=torch",
    ]


def test_a_setting_of_the_environment_arrives_as_it_stands_there(
    engine: Path, project: Project
) -> None:
    arguments, environment, _ = recorded(
        engine, project, "docker/run", "status", PROMPT="two\nlines", RECIPE="tiny", UNRELATED="x"
    )
    assert {"PROMPT", "RECIPE"} <= set(following(arguments, "--env"))
    assert "UNRELATED" not in arguments
    assert environment["PROMPT"] == "two\nlines"


def test_the_container_runs_as_the_caller_with_a_home(run: ModuleType, dev: Path) -> None:
    words = command(run, dev, "status", USER="me")
    assert following(words, "--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert {"HOME=/home/trn-tune", "USER=me", "HF_HOME=/home/me/.cache/huggingface"} <= set(
        following(words, "--env")
    )
    assert {"--rm", "--init", "--shm-size"} <= set(words)


def test_a_terminal_is_asked_for_only_where_there_is_one(run: ModuleType, dev: Path) -> None:
    request = run.read_request(["status"], {})
    for terminal in (True, False):
        words = run.docker_command(request, {}, dev=dev, terminal=terminal)[0]
        assert ("-t" in words) is terminal


def test_rootless_podman_keeps_the_callers_id(
    run: ModuleType, dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert following(command(run, dev, "status", DOCKER="/usr/bin/podman"), "--userns") == [
        "keep-id"
    ]
    assert following(command(run, dev, "status"), "--userns") == []


def test_podman_gets_an_init_only_where_it_has_one(
    run: ModuleType, dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catatonit = tmp_path / "catatonit"
    monkeypatch.setattr(run, "PODMAN_INIT", (catatonit,))
    assert "--init" not in command(run, dev, "status", DOCKER="podman")
    assert "--init" in command(run, dev, "status")
    catatonit.touch()
    assert "--init" in command(run, dev, "status", DOCKER="podman")


# Folders, files, and how it runs.


def mounts(words: list[str]) -> dict[str, str]:
    """Target -> source (and `,readonly`) of the command's mounts."""
    found = {}
    for option in following(words, "--mount"):
        kind, source, target, *rest = option.split(",")
        assert kind == "type=bind"
        found[target.removeprefix("target=")] = ",".join([source.removeprefix("source="), *rest])
    return found


def test_folders_of_the_project_and_caches_are_mounted(
    run: ModuleType, dev: Path, project: Project
) -> None:
    found = mounts(command(run, dev, "status", NEURON_COMPILE_CACHE_URL="/mnt/graphs"))
    assert found["/trn-tune/outputs"] == str(project.folder / "outputs")
    assert found["/trn-tune/recipes"] == f"{project.folder / 'recipes'},readonly"
    assert found["/trn-tune/data"] == str(project.folder / "data")
    assert found["/home/me/.cache/huggingface"] == "/home/me/.cache/huggingface"
    assert found["/mnt/graphs"] == "/mnt/graphs"


def test_a_dataset_elsewhere_is_mounted_readonly_at_its_own_path(
    run: ModuleType, dev: Path, tmp_path: Path
) -> None:
    (rows := tmp_path / "my rows.jsonl").touch()
    assert mounts(command(run, dev, "data", f"DATASET={rows}"))[str(rows)] == f"{rows},readonly"
    assert mounts(command(run, dev, "data", DATASET=str(rows)))[str(rows)] == f"{rows},readonly"


def test_a_recipes_dataset_elsewhere_is_mounted_too(
    run: ModuleType, dev: Path, tmp_path: Path, project: Project
) -> None:
    (project.folder / "recipes" / "mine.mk").write_text(f"DATASET ?= {tmp_path}\n")
    assert str(tmp_path) in mounts(command(run, dev, "data", "RECIPE=mine"))


def test_a_file_in_the_project_beside_the_mounted_folders_is_mounted(
    run: ModuleType, dev: Path, project: Project
) -> None:
    (project.folder / "questions.jsonl").touch()
    assert mounts(command(run, dev, "eval", "PROMPTS=questions.jsonl"))[
        "/trn-tune/questions.jsonl"
    ].endswith("questions.jsonl,readonly")


def test_a_hub_id_a_bucket_and_a_path_in_data_are_no_mounts(run: ModuleType, dev: Path) -> None:
    words = [
        "DATASET=databricks/databricks-dolly-15k",
        "MODEL_ID=data/tiny",
        "NEURON_COMPILE_CACHE_URL=s3://bucket/graphs",
    ]
    usual = mounts(command(run, dev, "status"))
    del usual["/var/tmp/neuron-compile-cache"]
    assert mounts(command(run, dev, "status", *words)) == usual


def test_a_path_that_the_container_cannot_have_is_refused(
    run: ModuleType, dev: Path, project: Project, tmp_path: Path
) -> None:
    (project.folder.parent / "rows.jsonl").touch()
    (project.folder / "data" / "link").symlink_to(tmp_path)
    (tmp_path / "a,b").mkdir()
    refused = {
        "../rows.jsonl": "leads out of the project.*Give the absolute path",
        "data/link": "is a link to .*Set DATASET=",
        "/tmp": "would hide the container's own /tmp",
        f"{tmp_path}/a,b": "holds a comma",
    }
    try:
        for path, message in refused.items():
            with pytest.raises(InputError, match=message):
                command(run, dev, "data", f"DATASET={path}")
    finally:
        (project.folder / "data" / "link").unlink()


def test_a_file_that_a_variable_names_comes_along(
    run: ModuleType, dev: Path, tmp_path: Path
) -> None:
    (credentials := tmp_path / "credentials").touch()
    found = mounts(
        command(
            run, dev, "data", AWS_SHARED_CREDENTIALS_FILE=str(credentials), AWS_REGION="us-east-1"
        )
    )
    assert found[str(credentials)] == f"{credentials},readonly"


def test_the_exit_status_and_the_folders_are_the_engines_and_the_callers(
    engine: Path, project: Project
) -> None:
    shutil.rmtree(project.folder / "outputs", ignore_errors=True)
    environment = clean_environment() | {
        "DOCKER": str(engine),
        "NEURON_COMPILE_CACHE_URL": "/tmp/trn-tune-test-cache",
    }
    assert (
        subprocess.run(
            ["docker/run", "status"], cwd=project.folder, env=environment, capture_output=True
        ).returncode
        == 7
    )
    assert (project.folder / "outputs").stat().st_uid == os.getuid()


def test_a_missing_engine_is_an_error_that_names_another(project: Project) -> None:
    done = subprocess.run(
        ["docker/run", "status", "DOCKER=no-such-engine"],
        cwd=project.folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: no-such-engine is not on the PATH. Install it, or name another engine: "
        "DOCKER=podman.\n"
    )


def test_a_signal_reaches_the_engine(project: Project, tmp_path: Path) -> None:
    (engine := tmp_path / "engine").write_text(
        "#!/bin/sh\ntrap 'exit 9' TERM\necho ready\nwhile :; do sleep 0.1; done\n"
    )
    engine.chmod(0o755)
    process = subprocess.Popen(
        ["docker/run", "status", f"DOCKER={engine}"],
        cwd=project.folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 9
    process.stdout.close()


def test_make_shell_hands_on_what_was_typed_and_not_the_recipe(
    engine: Path, project: Project
) -> None:
    arguments, environment, _ = recorded(
        engine, project, "make", "shell", "RECIPE=tiny", "LEARNING_RATE=0.5"
    )
    assert arguments[-3:] == ["--entrypoint", "/bin/bash", "trn-tune"]
    assert {"LEARNING_RATE", "RECIPE"} <= set(following(arguments, "--env"))
    assert environment["LEARNING_RATE"] == "0.5"
    assert "MAX_STEPS" not in following(
        arguments, "--env"
    )  # tiny.mk sets it; another recipe may be run in the shell


def test_make_image_hands_on_the_base_that_was_typed(engine: Path, project: Project) -> None:
    arguments, environment, _ = recorded(
        engine, project, "make", "image", "BASE_IMAGE=python:3.11-slim", "IMAGE=mine"
    )
    assert arguments[0] == "build" and arguments[-1] == "."
    assert (
        "BASE_IMAGE" in following(arguments, "--build-arg")
        and environment["BASE_IMAGE"] == "python:3.11-slim"
    )
    assert following(arguments, "--tag") == ["mine"]


def test_a_secret_in_dockers_options_is_refused(run: ModuleType, dev: Path) -> None:
    with pytest.raises(InputError, match="HF_TOKEN in DOCKER_OPTIONS"):
        command(run, dev, "train", "DOCKER_OPTIONS=--gpus all -e HF_TOKEN=canary")


def test_jupyter_is_not_given_the_hosts_network(run: ModuleType, dev: Path) -> None:
    with pytest.raises(InputError, match="Jupyter would then listen"):
        command(run, dev, "notebook", "EFA=1")


def test_jupyter_is_published_on_this_host_alone(run: ModuleType, dev: Path) -> None:
    words = command(run, dev, "notebook")
    assert following(words, "--publish") == ["127.0.0.1:8080:8080"]
    assert words[-1] == "trn-tune-notebook"
    assert "/trn-tune/docker" in mounts(words)
