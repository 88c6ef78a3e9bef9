"""What a rehearsal compares of a training on Neuron: the figures of metrics.jsonl, and the
gradients of the parameters that every rank has whole.

The others are divided, joined and padded in ways of neuronx-distributed's own. What tells of them
are the loss, the norm of all gradients, and the weights that consolidate publishes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from stages.backends.record import digest
from stages.run.layout import METRICS_FILE, RECORD_FILE

LARGEST = 2**20  # elements of a parameter that is recorded; norms have fewer
FOLDER = "recorded"  # in the work folder, a file for each step and rank


class RecordCallback(TrainerCallback):
    """Saves this rank's whole parameters and their gradients, before each step of the optimizer.

    Reading them ends the graph of the backward pass there, so on the device this training compiles
    other graphs than one that is not recorded.
    """

    def __init__(self, work: Path, model: torch.nn.Module, rank: int):
        self._folder, self._rank = work / FOLDER, rank
        self._whole = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
            and not getattr(parameter, "tensor_model_parallel", False)
            and parameter.numel() <= LARGEST
        }
        self._folder.mkdir(exist_ok=True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        tensors = {}
        for name, parameter in self._whole.items():
            # ZeRO-1 accumulates in float32, beside the parameter.
            gradient = getattr(parameter, "main_grad", None)
            gradient = parameter.grad if gradient is None else gradient
            if gradient is not None:
                tensors[f"gradient {name}"] = _on_host(gradient)
            tensors[f"weight {name}"] = _on_host(parameter)
        save_file(tensors, _file(self._folder, state.global_step + 1, self._rank))


def write_record(work: Path, ranks: int, tensor_parallel_size: int) -> None:
    """Write record.jsonl from metrics.jsonl and what `ranks` ranks saved, which is removed."""
    lines: list[dict[str, Any]] = [{"weights": {}, "whole": False}]
    for text in (work / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        figures = json.loads(text)
        saved = [load_file(_file(work / FOLDER, figures["step"], rank)) for rank in range(ranks)]
        names = [name for name in saved[0] if name.startswith("gradient ")]
        lines.append(
            {
                **{name: figures[name] for name in ("step", "loss", "grad_norm", "learning_rate")},
                "apart": _apart(saved, tensor_parallel_size),
                # The data-parallel ranks' gradients are averaged in the optimizer's step, and the
                # tensor-parallel ranks' are copies.
                "gradients": {
                    name.removeprefix("gradient "): digest(
                        name.removeprefix("gradient "),
                        torch.stack([tensors[name] for tensors in saved]).mean(0),
                    )
                    for name in names
                },
            }
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (work / RECORD_FILE).write_text(text, encoding="utf-8")
    shutil.rmtree(work / FOLDER)


def _apart(saved: list[dict[str, torch.Tensor]], tensor_parallel_size: int) -> float:
    """The largest difference between two ranks' copies of a tensor, as a fraction of its norm: of
    weights between all ranks, of gradients between tensor-parallel ones."""
    largest = 0.0
    for rank, tensors in enumerate(saved):
        for name, tensor in tensors.items():
            first = 0 if name.startswith("weight ") else rank - rank % tensor_parallel_size
            other = saved[first][name]
            largest = max(largest, float((tensor - other).norm() / other.norm().clamp(min=1e-12)))
    return largest


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32).clone()


def _file(folder: Path, step: int, rank: int) -> Path:
    return folder / f"{step}-{rank}.safetensors"
