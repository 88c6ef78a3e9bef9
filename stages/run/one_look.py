"""What make looks at in one moment, for all stages: the same file is read once.

A stage that runs for hours reads files again, since they may have changed. Standard library only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_looks: list[dict[tuple[object, ...], Any]] = []  # what was seen, in the look that goes on


@contextmanager
def one_look() -> Iterator[None]:
    """Inside, functions that are `read_once` look at each thing at most once."""
    _looks.append({})
    try:
        yield
    finally:
        _looks.pop()


def read_once(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose arguments are hashable. Nobody may change what it returns in a look."""

    @functools.wraps(function)
    def read(*arguments: P.args, **named: P.kwargs) -> R:
        if not _looks or named:
            return function(*arguments, **named)
        seen, key = _looks[-1], (function, *arguments)
        if key not in seen:
            seen[key] = function(*arguments, **named)
        result: R = seen[key]
        return result

    return read
