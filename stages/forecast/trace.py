"""One training step of one rank under FakeTensorMode: its operators and its memory, no numbers.

    python -m stages.forecast.trace MODEL_FOLDER [NAME=VALUE ...]

prints as JSON the operators of the step, those whose output's shape depends on values, and the peak
bytes by kind. The model, loss, backward pass, clipping and optimizer are the torch worker's, in
full size; tensors are fake, so they take no memory, the process group sends nothing, and weights
are not read; AdamW has its moments from the start. Run as a process of its own: for DEVICE=neuron
it makes a device that computes nothing. Any other device is traced as a CPU.
"""

from __future__ import annotations

import contextlib
import json
import sys
import types
from dataclasses import replace
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
from stages.backends.torch import lora, optimizer, parallel
from stages.run.settings import Settings


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


def make_neuron(ranks: int) -> None:
    """Give torch a device `neuron` that computes nothing."""
    module: Any = types.ModuleType("torch.neuron")
    module.is_initialized = module.is_available = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count, module.current_device = lambda: ranks, lambda: 0
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

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.add(str(function))
        if torch.Tag.dynamic_output_shape in function.tags and not _indexed_by_numbers(args):
            self.of_values.add(str(function))
        return function(*args, **(kwargs or {}))


def _indexed_by_numbers(args: Any) -> bool:
    """Whether an operator such as index has no mask among its indices."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else [None]
    return all(index is None or index.dtype != torch.bool for index in indices)


def step(
    model: torch.nn.Module, adamw: torch.optim.Optimizer, settings: Settings, device: torch.device
) -> None:
    """What worker.train_step does. Of more micro-batches than two, two: a third adds no memory."""
    batches = min(2, settings.gradient_accumulation_steps)
    for index in range(batches):
        shape = (settings.per_device_train_batch_size, settings.max_length)
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
        parallel.exchange(model, last=index == batches - 1)
        with loss_parallel():
            batch = {"input_ids": ids, "labels": ids, "position_ids": ids}
            # The most that a batch can take: all of its tokens supervised.
            loss = loss_sum(model, batch, only_supervised=False)
            (loss * 0.5).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adamw.step()
    adamw.zero_grad()


def trace(base: Path, settings: Settings) -> dict[str, Any]:
    """The operators and peak bytes of a step of the model in `base`, on rank 0 of the settings'."""
    on_neuron = settings.device == "neuron"
    kind: devices.Device = devices.Neuron(settings) if on_neuron else devices.Device(settings)
    if on_neuron:
        make_neuron(settings.nproc_per_node)
        kind.always_compiles = False  # the graphs of layers are traced as they are
    ranks = settings.nproc_per_node
    groups = f"cpu:fake,{kind.name}:fake" if on_neuron else "fake"
    dist.init_process_group(groups, store=FakeStore(), rank=0, world_size=ranks)
    for module in (parallel, optimizer):
        module.device_of = lambda _: kind  # type: ignore[attr-defined]
    parallel._read_weights = lambda *_: None
    lora.initialise = lambda *_: None
    _fsdp_init._move_states_to_device = lambda *_: None  # parallel._allocate moves them
    device = torch.device(kind.name)
    mesh = parallel.mesh_of(settings, device)
    keep_meshes_real()
    operators, memory = Operators(), MemTracker()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = parallel.build_model(base, settings, mesh, device)
        adamw = optimizer.adamw(model, settings)
        step(model, adamw, settings, device)  # AdamW makes its moments
        memory.track_external(model, adamw)
        with memory, operators:
            step(model, adamw, settings, device)
    peaks = memory.get_tracker_snapshot("peak")
    peak = next(bytes for where, bytes in peaks.items() if where.type == kind.name)
    return {
        "operators": sorted(operators.names),
        "of_values": sorted(operators.of_values),
        "bytes": {str(kind): count for kind, count in peak.items()},
    }


if __name__ == "__main__":
    folder, *given = sys.argv[1:]
    settings = replace(
        Settings.read(dict(word.split("=", 1) for word in given)), torch_compile=False
    )
    print(json.dumps(trace(Path(folder), settings)))
