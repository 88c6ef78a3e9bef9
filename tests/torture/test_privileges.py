"""Files have the caller's owner and umask, nothing goes through a link of another user's, and
docker/run passes on values alone."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from stages.run.setting import STAGES
from tests.conftest import Project, clean_environment, copy_project
from tests.torture.canaries import UMASK
from tests.torture.plugin import Torture

pytestmark = pytest.mark.torture("privileges")

ANOTHER_USER = 12345


def wrong_modes(folder: Path, umask: int) -> dict[str, str]:
    """Files and folders below `folder` whose mode is not what `umask` gives a new one."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        mode = stat.S_IMODE(path.lstat().st_mode)
        if not path.is_symlink() and mode != (0o777 if path.is_dir() else 0o666) & ~umask:
            found[str(path)] = oct(mode)
    return found


# Files.


def test_every_file_and_folder_has_the_mode_that_the_umask_gives(
    built_once: Project, torture: Torture
) -> None:
    outputs = built_once.folder / "outputs"
    files = list(outputs.rglob("*"))
    assert {stage for stage in STAGES if outputs / "tiny" / stage / "manifest.json" in files}
    assert wrong_modes(outputs, UMASK) == {}
    assert {path.lstat().st_uid for path in files} == {os.getuid()}
    torture.count(len(files))


def test_nothing_of_torch_lies_where_another_user_could_have_put_it(built_once: Project) -> None:
    """Torch's folder in /tmp has a name that anyone can make first: what is compiled may not be
    read from there."""
    left = [path for path in (built_once.folder.parent / "tmp").rglob("*") if path.is_file()]
    assert left == []


# As ANOTHER_USER, who may read what root's Python needs wherever it lies, and write what is that
# user's alone.
AS_ANOTHER = (
    "setpriv",
    f"--reuid={ANOTHER_USER}",
    f"--regid={ANOTHER_USER}",
    "--clear-groups",
    "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
)


@pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("setpriv"),
    reason="only root can become another user, by setpriv",
)
@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_another_users_run_is_all_that_users(tmp_path: Path, umask: int, torture: Torture) -> None:
    project = copy_project(tmp_path / "project")
    (tmp_path / "tmp").mkdir()
    for folder in tmp_path.parents:
        if folder.is_relative_to(tempfile.gettempdir()) and folder != Path(tempfile.gettempdir()):
            folder.chmod(0o755)
    for path in [tmp_path, *tmp_path.rglob("*")]:
        os.chown(path, ANOTHER_USER, ANOTHER_USER, follow_symlinks=False)
    environment = clean_environment() | {
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path / "tmp"),
        "USER": "another",
    }
    words = [*AS_ANOTHER, "make", "data", "RECIPE=tiny"]
    done = subprocess.run(
        words, cwd=project.folder, env=environment, umask=umask, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = project.folder / "outputs"
    assert wrong_modes(outputs, umask) == {}
    files = list(outputs.rglob("*"))
    assert {path.lstat().st_uid for path in files} == {ANOTHER_USER}
    torture.count(len(files))


def test_all_six_stages_leave_a_groups_files_to_the_group(tmp_path: Path, torture: Torture) -> None:
    torture.require_long()
    project = copy_project(tmp_path / "project")
    words = ["make", "all", "RECIPE=tiny"]
    done = subprocess.run(
        words,
        cwd=project.folder,
        env=clean_environment(),
        umask=0o002,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert wrong_modes(project.folder / "outputs", 0o002) == {}


# Links and names.


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return copy_project(tmp_path_factory.mktemp("privileges") / "project")


def test_a_lock_that_is_a_link_empties_nothing(copy: Project) -> None:
    run, precious = copy.folder / "outputs" / "linked", copy.folder / "precious"
    run.mkdir(parents=True)
    precious.write_text("of another program")
    (run / ".lock").symlink_to(precious)
    done = copy.make("data", "RECIPE=tiny", "RUN=linked", check=False)
    assert (
        done.returncode == 2
        and "outputs/linked/.lock is a link" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert precious.read_text() == "of another program"


@pytest.mark.parametrize("name", ["../../outside", "/etc/outside", "a/../../../outside"])
def test_a_model_or_dataset_named_like_a_path_is_read_from_nowhere_else(
    copy: Project, name: str
) -> None:
    for setting in ("MODEL_ID", "DATASET"):
        done = copy.make("data", "RECIPE=tiny", "RUN=named", f"{setting}={name}", check=False)
        assert done.returncode == 2 and name in done.stderr and "Traceback" not in done.stderr


# docker/run.

HOSTILE = (
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned #",
    "| touch pwned",
    "' ; touch pwned ; '",
    '" ; touch pwned ; "',
    "&& touch pwned\ntouch pwned",
    "--privileged",
    "-v=/:/host",
    "a b  c\t",
    "\\",
    "*",
    "$HOME ${IFS}",
    "$(shell touch pwned)",
    "$(eval $(shell touch pwned))",
    "ünï\u202ecode",
)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A container engine that prints what it is given."""
    path = tmp_path_factory.mktemp("engine") / "engine"
    path.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], "
        "dict(os.environ)]))\n"
    )
    path.chmod(0o755)
    return path


def given_to(
    engine: Path, project: Project, *words: str, **more: str
) -> tuple[list[str], dict[str, str]]:
    environment = (
        clean_environment()
        | {"DOCKER": str(engine), "NEURON_COMPILE_CACHE_URL": "/tmp/trn-tune-test-cache"}
        | more
    )
    done = subprocess.run(
        ["docker/run", *words], cwd=project.folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("value", HOSTILE)
def test_a_value_is_one_argument_of_the_container_and_nothing_is_executed(
    recorder: Path, copy: Project, value: str, torture: Torture
) -> None:
    words = [
        f"{name}={value}"
        for name in ("PROMPT", "MODEL_ID", "DATASET", "PROMPTS", "RUN", "DATASET_CONFIG")
    ]
    arguments, _ = given_to(recorder, copy, "status", *words)
    assert arguments[-len(words) - 2 :] == ["trn-tune", "status", *words]
    arguments, environment = given_to(recorder, copy, "shell", *words)
    assert {word.partition("=")[0] for word in words} <= set(arguments)
    assert {name: environment[name] for name in ("PROMPT", "RUN")} == {
        "PROMPT": value,
        "RUN": value,
    }
    assert not [
        argument for argument in arguments if "pwned" in argument or "privileged" in argument
    ]
    assert not list(copy.folder.rglob("pwned*"))
    torture.count(2 * len(words))


def test_the_container_has_no_capabilities_and_gains_none(recorder: Path, copy: Project) -> None:
    arguments, _ = given_to(recorder, copy, "status")
    options = " ".join(arguments)
    assert "--cap-drop ALL" in options and "--security-opt no-new-privileges" in options
    assert not {"--privileged", "--cap-add"} & set(arguments)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can write into another user's project")
def test_root_in_another_users_project_keeps_the_capability_to_write_there(
    recorder: Path, copy: Project
) -> None:
    os.chown(copy.folder, ANOTHER_USER, ANOTHER_USER)
    try:
        arguments, _ = given_to(recorder, copy, "status")
    finally:
        os.chown(copy.folder, 0, 0)
    assert (
        arguments[arguments.index("--cap-add") + 1] == "DAC_OVERRIDE"
        and arguments.count("--cap-add") == 1
    )


@pytest.mark.parametrize("image", ["--privileged", "-v/:/host"])
def test_an_image_that_is_an_option_is_refused(recorder: Path, copy: Project, image: str) -> None:
    done = subprocess.run(
        ["docker/run", "status", f"IMAGE={image}", f"DOCKER={recorder}"],
        cwd=copy.folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "is an option, not an image" in done.stderr and not done.stdout
