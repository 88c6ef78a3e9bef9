"""torchrun, which ends with its stage, leaves no folder behind, and is quiet about a failure that its worker has explained.

python -m stages.backends.torch.torchrun [torchrun's options] -m stages.backends.torch.worker ...
"""

from __future__ import annotations

import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from stages.run.launch import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    try:
        main(["--log-dir", os.devnull, *sys.argv[1:]])  # else a folder of empty folders stays in /tmp
    except ChildFailedError as failure:
        _, first = failure.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else 1)
    except SignalException:  # the stage was interrupted and ends its launcher
        sys.exit(1)
