"""One training step of one of 64 pretended ranks on a pretended `neuron` device: shapes, operators
and bytes, no numbers. The model, loss, backward pass, clipping and optimizer are the worker's.

    python -m tests.backends.torch.trace_step MODEL_FOLDER [NAME=VALUE ...]

prints as JSON the operators of the step, those whose output's shape depends on values, and the peak
bytes by kind. Tensors are fake (FakeTensorMode), the process group sends nothing, weights are not
read; AdamW has its moments from the start. Run as a process of its own: it makes a device.
"""

from __future__ import annotations

import contextlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard import _fsdp_init
from torch.distributed.tensor.parallel import loss_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from stages.backends import device as devices
from stages.backends.loss import loss_sum
from stages.backends.torch import optimizer, parallel
from stages.run.settings import Settings

RANKS = 64


class Nothing:
    """A stream, or an event: nothing waits for it."""

    def __init__(self, *_: object, **__: object):
        pass

    def __getattr__(self, _: str) -> Any:
        return lambda *_: None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def make_device() -> None:
    """Give torch a device `neuron` that computes nothing."""
    module: Any = types.ModuleType("torch.neuron")
    module.is_initialized = module.is_available = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count, module.current_device = lambda: RANKS, lambda: 0
    module.set_device = module.synchronize = module.manual_seed_all = lambda *_: None
    module.memory_stats = lambda *_: {}
    module.Stream = module.Event = Nothing
    module.current_stream = module.default_stream = lambda *_: Nothing()
    module.stream = lambda _: contextlib.nullcontext()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    _setup_privateuseone_for_python_backend("neuron", module)


def keep_meshes_real() -> None:
    """A mesh computes with its ranks' numbers, so its tensors must not be fake."""
    for name in ("__init__", "_concatenate", "__getitem__"):
        raw = DeviceMesh.__dict__[name]
        function = getattr(raw, "__func__", raw)

        def real(*args: Any, function: Any = function, **more: Any) -> Any:
            with unset_fake_temporarily():
                return function(*args, **more)

        setattr(DeviceMesh, name, real if raw is function else type(raw)(real))


class Operators(TorchDispatchMode):
    """Notes the name of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.of_values: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.names.add(str(function))
        if torch.Tag.dynamic_output_shape in function.tags and not _indexed_by_numbers(args):
            self.of_values.add(str(function))
        return function(*args, **(kwargs or {}))


def _indexed_by_numbers(args: Any) -> bool:
    """Whether an operator such as index has no mask among its indices."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else [None]
    return all(index is None or index.dtype != torch.bool for index in indices)


def step(model: torch.nn.Module, adamw: torch.optim.Optimizer, length: int) -> None:
    """What worker.train_step does with one micro-batch."""
    ids = torch.zeros(1, length, dtype=torch.int64, device="neuron")
    with loss_parallel():
        loss = loss_sum(model, {"input_ids": ids, "labels": ids, "position_ids": ids})
        (loss * 0.5).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adamw.step()
    adamw.zero_grad()


def main(base: Path, settings: Settings) -> None:
    make_device()
    dist.init_process_group("cpu:fake,neuron:fake", store=FakeStore(), rank=0, world_size=RANKS)
    neuron = devices.Neuron(settings)
    neuron.always_compiles = False  # the graphs of layers are traced as they are
    for module in (parallel, optimizer):
        module.device_of = lambda _: neuron
    parallel._read_weights = lambda *_: None
    _fsdp_init._move_states_to_device = lambda *_: None  # parallel._allocate moves them
    device = torch.device("neuron")
    mesh = parallel.mesh_of(settings, device)
    keep_meshes_real()
    operators, memory = Operators(), MemTracker()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = parallel.build_model(base, settings, mesh, device)
        adamw = optimizer.adamw(model, settings)
        step(model, adamw, settings.max_length)  # AdamW makes its moments
        memory.track_external(model, adamw)
        with memory, operators:
            step(model, adamw, settings.max_length)
    peak = memory.get_tracker_snapshot("peak")[torch.device("neuron", 0)]
    report = {
        "operators": sorted(operators.names),
        "of_values": sorted(operators.of_values),
        "bytes": {str(kind): count for kind, count in peak.items()},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    folder, *given = sys.argv[1:]
    main(Path(folder), Settings.read(dict(word.split("=", 1) for word in given)))
