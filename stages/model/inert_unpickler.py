"""Pickles as data: an unpickler that can neither run code nor be made to take memory or change a class.

A pickle is a program. It can name any function for its reader to call, fill any object with attributes (a class too, which every
later user of it would see), and number its memo so high that Python's C unpickler, which keeps the memo in an array, takes all
memory. Checkpoints have to be read from pickles nevertheless, so here a reader names what may be built, and nothing else is.
"""

from __future__ import annotations

import pickle
from typing import Any, ClassVar


class InertUnpickler(
    pickle._Unpickler
):  # in Python, where the memo is a dict and every instruction can be looked at
    """Builds containers, numbers and text. What else there is stands in a subclass: its `find_class` and its `fill`.

    Raises pickle.UnpicklingError for what has no place there and, for damaged bytes, anything.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which has no place in a checkpoint"
        )

    def fill(self, instance: Any, state: Any) -> None:
        """Give `instance` the attributes in `state`, if it is something that has any."""
        raise pickle.UnpicklingError(
            f"it changes a {type(instance).__name__}, which has no place in a checkpoint"
        )

    def load_build(self) -> None:
        state = self.stack.pop()  # type: ignore[attr-defined]  # typeshed leaves the stack out
        self.fill(self.stack[-1], state)  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build
