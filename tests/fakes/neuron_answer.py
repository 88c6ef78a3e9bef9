"""Run by test_generate.py in a process of its own, with the fakes of neuron_inference/: a machine
with one trn1 device.

`neuron_answer.py FOLDER` loads the compiled model and makes the calls of `generate` that stand as
JSON in standard input. Prints a list with the steps of each, or the message with which it, or the
load, was refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from optimum.neuron.models.inference.backend import pretrained_model
from optimum.neuron.utils import instance, system

from stages.backends.neuron import generate
from stages.run.errors import InputError, StageFailure


def become_a_trn1() -> None:
    for module in (system, instance):
        module.get_neuron_major = lambda: 245  # type: ignore[attr-defined]
        module.get_instance_name = lambda: "trn1.2xlarge\n"  # type: ignore[attr-defined]
    system.get_neuron_devices_count = lambda: 1
    pretrained_model.get_neuron_device_memory = lambda: (
        "unknown"
    )  # read from the driver's sysfs, for a line in the log


def answered(model: generate.CompiledModel, call: dict[str, Any]) -> Any:
    """The steps; of calls that are not for `generate`, what they ask for."""
    if prompt := call.pop(
        "upstream", None
    ):  # by optimum-neuron's own loop, over the logits of the same graphs
        return model._model.generate(
            torch.tensor([prompt]), do_sample=False, pad_token_id=0, **call
        )[0, len(prompt) :].tolist()
    if prompts := call.pop("side_by_side", None):
        one, other = (model.generate(mine, **call) for mine in prompts)
        return [next(one), next(other), next(one)]
    if steps := call.pop("steps_taken", None):
        asked = model.generate(**call)
        return [next(asked) for _ in range(steps)]
    return list(model.generate(**call))


def main(folder: Path) -> None:
    become_a_trn1()
    results: list[Any] = []
    try:
        model = generate.load(folder)
        for call in json.load(sys.stdin):
            try:
                results.append(answered(model, call))
            except (InputError, StageFailure) as error:
                results.append(str(error))
    except InputError as error:
        results.append(str(error))
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
