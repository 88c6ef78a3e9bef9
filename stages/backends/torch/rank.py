"""Runs the work of one rank: its device, its process group, its errors and its exit status."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from stages.backends.device import device_of
from stages.run.disk import disk_failure
from stages.run.errors import InputError, StageFailure
from stages.run.guard import die_with_parent
from stages.run.launch import report_error
from stages.run.settings import Settings


def run_rank(work: Callable[[torch.device], None], error_file: Path) -> NoReturn:
    """Call `work` with this rank's device, in the process group of torchrun's ranks, then exit.

    The exit status is 0, or that of an InputError or StageFailure (reported to the stage through
    `error_file`), or 1 with a traceback.
    """
    die_with_parent()
    status = 0
    try:
        work(device_of(Settings.read()).join_group())
        dist.destroy_process_group()
    except (InputError, StageFailure) as error:
        report_error(error, error_file)
        status = error.exit_status
    except Exception as error:
        status = 1
        if full := disk_failure(error, error_file.parent):
            report_error(full, error_file)
        else:
            traceback.print_exc()
    # Not sys.exit: gloo's threads outlive the group while a mesh or a module refers to it. A thread
    # that drops its last tensor while the interpreter shuts down asks for the GIL, is unwound by
    # CPython, and std::terminate aborts the rank.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
