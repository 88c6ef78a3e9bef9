"""The processes that compile, each with a copy of the model.

They are forked from a server that imports torch, transformers and inductor while the stage reads
the model. Imports are a third of what compiling a small model takes, and so they happen once and
beside other work. The server itself holds no tensor, no device and no threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from itertools import cycle
from multiprocessing import active_children, forkserver, get_context
from pathlib import Path
from typing import Any

from stages.backends.device import Device
from stages.backends.torch.inductor import scratch_space
from stages.run.errors import StageFailure

IMPORTED = ["torch._inductor.compile_fx", "transformers.models.auto.modeling_auto"]


@contextmanager
def compilers(folder: Path, device: Device) -> Iterator[None]:
    """Start the server; inside this context `run_compilers` forks from it. What they write besides
    packages is in a temporary folder inside `folder`."""
    if device.compile_processes:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(device.compile_processes))
    with scratch_space(folder):
        get_context("forkserver").set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()
        yield


def run_compilers(
    compile_one: Callable[..., int], jobs: Sequence[tuple[Any, ...]], at_once: int
) -> list[int]:
    """What `compile_one` returns for each of `jobs`' arguments, called in `at_once` processes.

    Raises what the first call that fails raises, and StageFailure where a process is killed; the
    others then end at once.
    """
    with ExitStack() as stack:
        # One pool per process: in a pool of two, CPython may notice that one process has died only
        # when the other is done.
        pools = [
            stack.enter_context(
                ProcessPoolExecutor(
                    1, get_context("forkserver"), _take_environment, (dict(os.environ),)
                )
            )
            for _ in range(at_once)
        ]
        try:
            started = [pool.submit(compile_one, *job) for job, pool in zip(jobs, cycle(pools))]
            return [job.result() for job in as_completed(started)]
        except BaseException as error:
            # Leaving the pools would otherwise wait until the other process has compiled.
            for process in active_children():
                process.kill()
            # EOFError is the server's, killed while it forks.
            if not isinstance(error, BrokenProcessPool | EOFError):
                raise
            raise StageFailure(
                "A compiling process was killed before it was ready, most often because memory "
                "ran out. Free some, or lower INFERENCE_BATCH_SIZE or INFERENCE_SEQUENCE_LENGTH."
            ) from error


def _take_environment(variables: dict[str, str]) -> None:
    """The server, and what is forked from it, has the environment of when it was started."""
    os.environ.update(variables)
