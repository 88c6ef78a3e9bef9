"""NEURON_COMPILE_CACHE_URL: the values that every reader of it understands.

Standard library only.
"""

from __future__ import annotations

import re

from stages.run.errors import InputError

# What optimum-neuron reads after --cache_dir= in NEURON_CC_FLAGS (utils/cache_utils.py,
# get_neuron_cache_path). It cuts a path off at a dot or a space, and training would then look for
# its graphs in another folder than precompile filled.
_PATH = re.compile(r"/[\w/-]+", re.ASCII)
_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w./-]*)?", re.ASCII)


def check_cache_url(text: str) -> None:
    """Raise InputError unless `text` is an absolute path of letters, digits, `_`, `-` and `/`, or
    s3://BUCKET[/PREFIX]."""
    if not _PATH.fullmatch(text) and not _BUCKET.fullmatch(text):
        raise InputError(
            f"{text[:60]!r} cannot hold compiled graphs. Write an absolute path of letters, "
            "digits, _ and - (optimum-neuron cuts it off at a dot or a space), or "
            "s3://BUCKET/PREFIX."
        )
