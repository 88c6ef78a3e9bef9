"""A disk of a few megabytes under a project's outputs/, to fill and to close: a tmpfs in a mount
namespace of its own.

The namespace lives as long as a process that keeps it, so that no mount is ever left. Root
needs nothing else; another user gets one where the system lets users have namespaces.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Project, clean_environment

MEGABYTE = 1 << 20
FILLER = "filler"


@dataclass(frozen=True)
class SmallDisk:
    """A project whose outputs/ is the disk. `keeper`: the process that holds the namespace."""

    project: Project
    keeper: int

    @property
    def outputs(self) -> Path:
        """The disk, as it is seen from outside the namespace."""
        return Path(f"/proc/{self.keeper}/root{self.project.folder / 'outputs'}")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command within, in the project's folder."""
        enter = [
            "nsenter",
            f"--target={self.keeper}",
            "--mount",
            *([] if os.getuid() == 0 else ["--user", "--preserve-credentials"]),
        ]
        command = (*enter, "env", f"--chdir={self.project.folder}", *command)
        return subprocess.run(command, env=clean_environment(), capture_output=True, text=True)

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("make", "RECIPE=tiny", *arguments)

    def restore(self, outputs: Path) -> None:
        """Put a copy of the folder `outputs` in the place of all that exists."""
        for path in self.outputs.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(outputs, self.outputs, dirs_exist_ok=True)

    def leave(self, room: int) -> None:
        """Fill the disk until `room` bytes are left of it, in whole pages of memory."""
        (self.outputs / FILLER).unlink(missing_ok=True)
        with (self.outputs / FILLER).open("wb") as file:
            os.posix_fallocate(
                file.fileno(), 0, max(1, shutil.disk_usage(self.outputs).free - room)
            )

    def free(self) -> None:
        (self.outputs / FILLER).unlink(missing_ok=True)


@contextmanager
def small_disk(project: Project, size: int = 64 * MEGABYTE) -> Iterator[SmallDisk]:
    """Mount a disk of `size` bytes on the project's outputs/; skips the test where this user may
    not."""
    missing = [tool for tool in ("unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"a small disk needs {', '.join(missing)} (util-linux)")
    (project.folder / "outputs").mkdir(exist_ok=True)
    namespace = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--user", "--map-root-user"])]
    script = 'mount -t tmpfs -o size="$1" none "$2" && echo mounted && exec cat'
    command = [*namespace, "sh", "-c", script, "sh", str(size), str(project.folder / "outputs")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as keeper:
        if keeper.stdout.readline() != "mounted\n":
            pytest.skip(f"no disk can be mounted here: {keeper.communicate()[1].strip()}")
        yield SmallDisk(
            project, keeper.pid
        )  # after it `with` closes stdin, which ends `cat`, and the namespace with it
