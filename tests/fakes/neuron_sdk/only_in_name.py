"""Names of the Neuron SDK that optimum-neuron imports and training never uses: those of inference.

A module of theirs that is not a file here is made on import, and every name in it is a class that
can be named, derived from, indexed and used as a decorator, and does nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

PACKAGES = ("neuronx_distributed", "neuronxcc", "torch_neuronx", "nki", "torch_xla")


class _Nothing(type):
    def __getattr__(cls, name: str) -> Any:
        return placeholder(name)

    def __call__(cls, *_: Any, **__: Any) -> Any:
        return cls

    def __getitem__(cls, _: Any) -> Any:
        return cls


def placeholder(name: str) -> Any:
    """For a module's `__getattr__`: the name's fake, except for those of Python itself."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _Nothing(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, dot, _ = fullname.partition(".")
        return (
            importlib.machinery.ModuleSpec(fullname, self, is_package=True)
            if dot and package in PACKAGES
            else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = placeholder  # type: ignore[method-assign]


sys.meta_path.append(_Finder())  # after those that find files
