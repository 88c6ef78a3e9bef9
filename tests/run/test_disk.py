"""Room on the disk: what is asked for, and what is reported a disk that is full or closed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from stages.run.disk import disk_failure, disk_guard, free_space, require_space, require_writable
from stages.run.errors import StageFailure


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except type(error) as caught:
        return caught


TORCH = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    TORCH,
    CheckpointException("RuntimeError: unexpected pos 704 vs 598", {1: (TORCH, None)}),
    raised(ValueError("no kernel"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    RuntimeError(
        "C++ compile error: /tmp/a.s: Fatal error: can't write 3887 bytes to section .debug_str: "
        "'No space left on device'"
    ),
]


@pytest.mark.parametrize(
    "error", FULL, ids=lambda error: f"{type(error).__name__}: {str(error)[:30]}"
)
def test_every_voice_of_a_full_disk_is_told_alike(error: Exception, tmp_path: Path) -> None:
    (tmp_path / "half").write_bytes(b"x")
    told = str(disk_failure(error, tmp_path, "12 kB are needed for the weights"))
    assert told.startswith(
        f"{tmp_path / 'half'}, or what comes after it: the disk is full. {tmp_path} has "
    )
    assert " left" in told
    assert ", and 12 kB are needed for the weights. Make room, or" in told


def test_the_file_that_an_error_names_is_the_one_that_is_told(tmp_path: Path) -> None:
    assert str(disk_failure(OSError(errno.ENOSPC, "", "the/file"), tmp_path)).startswith(
        "the/file: the disk is full."
    )
    assert str(disk_failure(OSError(errno.EROFS, "", "the/file"), tmp_path)).startswith(
        "the/file is on a disk that is mounted read-only."
    )
    assert str(disk_failure(OSError(errno.EACCES, "", "the/file"), tmp_path)).startswith(
        f"the/file: user {os.getuid()} may not read or write"
    )


@pytest.mark.parametrize(
    "error",
    [
        ValueError("wrong"),
        FileNotFoundError(errno.ENOENT, "not there", "x"),
        StageFailure("No space left on device"),
    ],
)
def test_other_errors_and_what_is_told_already_stay_what_they_are(
    error: Exception, tmp_path: Path
) -> None:
    assert disk_failure(error, tmp_path) is None
    with pytest.raises(type(error)), disk_guard("it", tmp_path):
        raise error


def test_what_does_not_fit_is_refused_with_both_sizes(tmp_path: Path) -> None:
    require_space("nothing", tmp_path / "not" / "yet", 0)
    with pytest.raises(
        StageFailure, match=r"has room for .*B, and \d+ TB are needed for the weights\. Make room"
    ):
        require_space("the weights", tmp_path / "not" / "yet", free_space(tmp_path) + 10**15)


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    require_writable(tmp_path / "not" / "yet")
    with pytest.raises(StageFailure, match=r"file is a file\. Remove it, or make outputs/ a link"):
        require_writable(tmp_path / "file" / "below")
