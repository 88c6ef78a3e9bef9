"""What a pickle can be made to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Call:
    """A pickle of it calls `function` when it is opened."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call
