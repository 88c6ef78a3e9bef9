"""torchrun, which leaves no folder behind, tells the stage of a rank that was killed, and is quiet about what a worker has explained.

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
    """The rank that a signal ended, in words; the other ranks' broken connections only follow from it."""
    signals = {
        rank: -failed.exitcode for rank, failed in failure.failures.items() if failed.exitcode < 0
    }
    # torchrun itself ends by SIGTERM what is left of the others: this is the cause only where there is no other.
    exception_chain = {rank: number for rank, number in signals.items() if number != signal.SIGTERM}
    if not exception_chain and len(signals) == len(failure.failures):
        exception_chain = signals
    if not exception_chain:
        return None
    rank, number = min(exception_chain.items())
    why = ", most often because memory ran out" if number == signal.SIGKILL else ""
    return StageFailure(
        f"Rank {rank} was killed by {signal.Signals(number).name}{why}. Nothing was published."
    )


def _tell(failure: StageFailure) -> None:
    """To the stage, if one has started this."""
    if ERROR_FILE in os.environ:
        report_error(failure, Path(os.environ[ERROR_FILE]))


if __name__ == "__main__":
    try:
        # Without --log-dir a folder of empty folders stays in /tmp. torchrun hands the signals that it handles on, and waits 30 seconds
        # for ranks that outlive one: a rank that is importing torch can swallow SIGINT, none does SIGTERM.
        main(["--log-dir", os.devnull, "--signals_to_handle", "SIGTERM", *sys.argv[1:]])
    except ChildFailedError as failure:
        if killed := _killed(failure):
            _tell(killed)
        _, first = failure.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else 1)
    except (SignalException, KeyboardInterrupt) as failure:
        name = failure.sigval.name if isinstance(failure, SignalException) else "SIGINT"
        _tell(StageFailure(f"The workers' launcher was ended by {name}. Nothing was published."))
        sys.exit(1)
