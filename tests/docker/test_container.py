"""The image, built and run: what it holds, whose the files are that it writes, and how it ends.

Skipped without an engine and a built image, since installing into one takes minutes and a network:

    make image DOCKER=podman BASE_IMAGE=python:3.11-slim REQUIREMENTS=requirements.txt
    TEST_IMAGE=trn-tune DOCKER=podman make test

The tests build on TEST_IMAGE, which has every dependency, with the network off.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import Project, clean_environment, copy_project
from tests.torture.canaries import CANARIES, forms, held

ENGINE = os.environ.get("DOCKER", "docker")
NAME = "trn-tune-test"
USER = os.getuid() or 12345  # root is too easy a caller
AS_USER = "" if os.getuid() else f"--user {USER}:{USER}"
CACHE = "/tmp/trn-tune-test-cache"


def missing() -> str:
    """Why nothing can be tested here; empty when it can."""
    if "TEST_IMAGE" not in os.environ:
        return (
            "TEST_IMAGE names no built image of the project (make image; TEST_IMAGE=trn-tune "
            "make test)"
        )
    if not shutil.which(ENGINE):
        return f"the container engine {ENGINE} is not installed (DOCKER names another)"
    found = subprocess.run(
        [ENGINE, "image", "inspect", os.environ["TEST_IMAGE"]], capture_output=True
    )
    return (
        ""
        if found.returncode == 0
        else f"{ENGINE} has no image TEST_IMAGE={os.environ['TEST_IMAGE']}"
    )


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


def engine(*words: str) -> str:
    done = subprocess.run(
        [ENGINE, *words], env={**os.environ, **CANARIES}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project that the image was built from: with secrets and outputs next to what belongs into
    it, and in the environment."""
    project = copy_project(tmp_path_factory.mktemp("image") / "project")
    for name in (
        ".env",
        "key.pem",
        "stages/.env",
        "recipes/key.pem",
        "data/private.jsonl",
        "outputs/run/weights",
        ".git/config",
    ):
        (project.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (project.folder / name).write_text("hf_planted")
    base = [
        "--build-arg",
        f"BASE_IMAGE={os.environ['TEST_IMAGE']}",
        "--build-arg",
        "REQUIREMENTS=requirements.txt",
    ]
    file = str(project.folder / "docker" / "Dockerfile")
    engine("build", "--network", "none", *base, "--file", file, "--tag", NAME, str(project.folder))
    shutil.rmtree(project.folder / "outputs")
    (project.folder / "outputs").mkdir()
    if os.getuid() == 0:
        os.chown(project.folder / "outputs", USER, USER)
    for folder in (project.folder, *project.folder.parents[:2]):
        folder.chmod(0o755)
    return project


def run(
    project: Project, *words: str, options: str = "", stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    surroundings = (
        clean_environment()
        | {"DOCKER": ENGINE, "IMAGE": NAME, "NEURON_COMPILE_CACHE_URL": CACHE}
        | environment
    )
    surroundings["DOCKER_OPTIONS"] = f"{AS_USER} {options}"
    return subprocess.run(
        ["docker/run", *words],
        cwd=project.folder,
        env=surroundings,
        input=stdin,
        capture_output=True,
        text=True,
    )


def test_the_image_holds_the_project_and_nothing_beside_it(image: Project) -> None:
    files = engine("run", "--rm", "--entrypoint", "find", NAME, "/trn-tune", "-type", "f").split()
    inside = {str(Path(file).relative_to("/trn-tune")) for file in files}
    assert {
        "Makefile",
        "stages/train.py",
        "recipes/demo.mk",
        "data/demo/demo.jsonl",
        "docker/requirements.txt",
    } <= inside
    assert not [
        file
        for file in inside
        if file.startswith(("outputs/", "data/private", ".git", "tests/"))
        or file.endswith((".env", ".pem"))
    ]


def test_the_stages_run_to_the_answers_as_another_user_on_a_readonly_system_without_a_network(
    image: Project,
) -> None:
    options = "--network none --read-only --tmpfs /tmp --device /dev/null:/dev/neuron0"
    done = run(image, "all", "RECIPE=tiny", "BACKEND=torch", options=options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (image.folder / "outputs" / "tiny" / "eval" / "answers.jsonl").is_file()
    assert {path.stat().st_uid for path in (image.folder / "outputs").rglob("*")} == {USER}
    assert (
        "Nothing to be done"
        in run(image, "all", "RECIPE=tiny", "BACKEND=torch", options="--network none").stdout
    )
    assert (
        image.stages_to_run("all", "RECIPE=tiny", "BACKEND=torch") == []
    )  # nor is anything stale outside


def test_a_value_reaches_make_in_the_container_as_typed(image: Project) -> None:
    prompt = 'It\'s "odd": $5, $(id), `id` #1'
    assert f"PROMPT={prompt}\n" in run(image, "help", f"PROMPT={prompt}").stdout
    assert f"PROMPT={prompt}\n" in run(image, "help", PROMPT=prompt).stdout


def test_a_token_is_in_the_container_and_in_no_log_or_layer(image: Project) -> None:
    done = run(image, "shell", stdin="env\n", HF_TOKEN="hf_exported")
    assert "HF_TOKEN=hf_exported" in done.stdout
    assert "hf_exported" not in done.stderr
    assert not [
        word
        for word in ("hf_exported", "hf_planted")
        if word in engine("history", "--no-trunc", NAME)
    ]


def test_no_layer_and_nothing_that_describes_the_image_holds_a_secret(image: Project) -> None:
    """Those of this build, and those that are in this environment, with which TEST_IMAGE may have
    been built."""
    assert not held(engine("history", "--no-trunc", NAME).encode()) and not held(
        engine("image", "inspect", NAME).encode()
    )
    own = {
        name: os.environ[name].encode() for name in CANARIES if len(os.environ.get(name, "")) > 8
    }
    sought = {form: name for name, canary in CANARIES.items() for form in forms(canary)} | {
        value: name for name, value in own.items()
    }
    sought[b"hf_planted"] = "a file beside the project's own"
    found, before, size = set(), b"", 0
    with subprocess.Popen(
        [ENGINE, "save", NAME], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        while block := process.stdout.read(2**24):
            found |= {name for form, name in sought.items() if form in before + block}
            before, size = block[-200:], size + len(block)
    assert process.returncode == 0 and size > 2**20
    assert found == set()


def test_the_container_has_no_capability_and_can_gain_none(image: Project) -> None:
    status = run(image, "shell", stdin="cat /proc/self/status\n").stdout
    facts = dict(
        line.split(":\t")
        for line in status.splitlines()
        if line.startswith(("CapEff", "CapPrm", "NoNewPrivs", "Uid"))
    )
    assert facts["NoNewPrivs"] == "1" and facts["Uid"].split()[1] == str(USER)
    assert int(facts["CapEff"], 16) == int(facts["CapPrm"], 16) == 0


def test_the_image_runs_as_a_user_who_is_not_root(image: Project) -> None:
    assert engine("image", "inspect", "--format", "{{.Config.User}}", NAME).strip() == "1000:1000"
    assert engine("run", "--rm", "--entrypoint", "id", NAME, "-u").strip() == "1000"


def test_the_exit_status_is_makes(image: Project) -> None:
    done = run(image, "data", "LEARNIG_RATE=1")
    assert done.returncode == 2
    assert "Did you mean LEARNING_RATE?" in done.stderr


def test_a_signal_ends_the_container_at_once(image: Project) -> None:
    environment = clean_environment() | {
        "DOCKER": ENGINE,
        "IMAGE": NAME,
        "NEURON_COMPILE_CACHE_URL": CACHE,
    }
    words = [
        "docker/run",
        "train",
        "RECIPE=tiny",
        "RUN=endless",
        "BACKEND=torch",
        "MAX_STEPS=1000000",
    ]
    environment["DOCKER_OPTIONS"] = f"{AS_USER} --network none --name trn-tune-endless"
    process = subprocess.Popen(
        words,
        cwd=image.folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    assert any(line.startswith("train: ") and "steps" in line for line in process.stdout)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) != 0
    assert time.monotonic() - start < 8  # the engine kills after 10 s what does not listen
    process.stdout.close()
    assert "trn-tune-endless" not in engine("ps", "--all", "--format", "{{.Names}}")
