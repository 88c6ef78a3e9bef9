"""torchrun that leaves no folder in /tmp and reports a killed rank to the stage.

It prints nothing about an error that a worker has already reported.

python -m stages.backends.torch.torchrun [torchrun's options] -m stages.backends.torch.worker ...
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from stages.run.errors import StageFailure
from stages.run.launch import ERROR_FILE, report_error


def _killed(failure: ChildFailedError) -> StageFailure | None:
    """The rank that a signal ended; the other ranks' broken connections only follow from it."""
    signals = {
        rank: -failed.exitcode for rank, failed in failure.failures.items() if failed.exitcode < 0
    }
    # torchrun itself ends the remaining ranks by SIGTERM, so SIGTERM is the cause only when every
    # failed rank ended by it.
    causes = {rank: number for rank, number in signals.items() if number != signal.SIGTERM}
    if not causes and len(signals) == len(failure.failures):
        causes = signals
    if not causes:
        return None
    rank, number = min(causes.items())
    reason = ", most often because memory ran out" if number == signal.SIGKILL else ""
    return StageFailure(
        f"Rank {rank} was killed by {signal.Signals(number).name}{reason}. Nothing was published."
    )


def _report(failure: StageFailure) -> None:
    """Report the failure to the stage, if a stage started this process."""
    if ERROR_FILE in os.environ:
        report_error(failure, Path(os.environ[ERROR_FILE]))


if __name__ == "__main__":
    try:
        # Without --log-dir a folder of empty folders stays in /tmp. torchrun passes the signals
        # that it handles to the ranks and waits 30 seconds for ranks that outlive one: a rank that
        # is importing torch can swallow SIGINT, but never SIGTERM.
        main(["--log-dir", os.devnull, "--signals_to_handle", "SIGTERM", *sys.argv[1:]])
    except ChildFailedError as failure:
        if killed := _killed(failure):
            _report(killed)
        _, first = failure.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else 1)
    except (SignalException, KeyboardInterrupt) as failure:
        name = failure.sigval.name if isinstance(failure, SignalException) else "SIGINT"
        _report(StageFailure(f"The workers' launcher was ended by {name}. Nothing was published."))
        sys.exit(1)
