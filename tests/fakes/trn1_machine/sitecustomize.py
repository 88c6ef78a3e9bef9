"""On PYTHONPATH, this makes every Python process one on a machine with a trn1 device, as far as
optimum-neuron asks.

optimum-neuron reads /proc/devices, /sys and the EC2 type; its modules get other answers right after
they are imported, before those that import names from them. The SDK's programs are those on the
caller's PATH, where the fakes are; otherwise this Python's own would come first.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ANSWERS: dict[str, dict[str, Any]] = {
    "optimum.neuron.utils.system": {
        "get_neuron_major": lambda: 245,
        "get_instance_name": lambda: "trn1.2xlarge\n",
        "get_neuron_devices_count": lambda: 1,
    },
    "optimum.neuron.utils.neuron_device_memory": {
        "get_neuron_device_memory": lambda: "unknown"
    },  # for a line in the log
    "stages.backends.neuron.arguments": {"own_path": lambda: os.environ["PATH"]},
}


class AnswersAfterImport(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in ANSWERS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_answer(module: ModuleType) -> None:
            execute(module)
            vars(module).update(ANSWERS[name])

        spec.loader.exec_module = execute_and_answer  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, AnswersAfterImport())
