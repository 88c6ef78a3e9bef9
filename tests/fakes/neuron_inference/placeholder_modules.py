"""Modules and names that optimum-neuron imports and these tests never use: each attribute is an
empty class."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

STOOD_IN_FOR = ("libneuronxla", "neuronx_distributed", "neuronxcc", "torch_neuronx", "torch_xla")


class _Anything(type):
    """A class whose attributes are such classes too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return placeholder(name)


def placeholder(name: str) -> Any:
    """A class that takes any arguments."""
    return _Anything(name, (), {"__init__": lambda self, *arguments, **named: None})


class PlaceholderModules(MetaPathFinder, Loader):
    """Asked last: for a module of the packages above that has no file here."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return (
            ModuleSpec(fullname, self, is_package=True)
            if fullname.split(".")[0] in STOOD_IN_FOR
            else None
        )

    def exec_module(self, module: ModuleType) -> None:
        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return placeholder(name)

        vars(module)["__getattr__"] = attribute


def install() -> None:
    """Idempotent: each of the packages calls it."""
    if not any(isinstance(finder, PlaceholderModules) for finder in sys.meta_path):
        sys.meta_path.append(PlaceholderModules())
