"""ZeRO-1: in torch_xla the optimizer's state is split over data-parallel ranks; here each has all
of it, which computes the same.

What a caller can see is as there: master weights of `optimizer_dtype`, gradients that a hook adds
up in `main_grad` and takes away from `grad` (use_grad_acc_hook), groups that become this object's
own when a state is loaded, `_grad_norm` set where gradients are clipped.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from libneuronxla.graphs import compile_graph, take_trace
from torch_xla.core import xla_model as xm

from neuronx_distributed.parallel_layers import grads, parallel_state


class NeuronZero1Optimizer(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        optimizer_class: type[torch.optim.Optimizer],
        optimizer_dtype: torch.dtype = torch.float32,
        grad_clipping: bool = True,
        max_norm: float | None = None,
        sharding_groups: Any = None,
        use_grad_acc_hook: bool = False,
        **given: Any,
    ):
        super().__init__(params, {})
        self._optimizer_class, self._dtype, self._groups = (
            optimizer_class,
            optimizer_dtype,
            sharding_groups,
        )
        self.grad_clipping, self.max_norm, self._hooked = (
            grad_clipping,
            max_norm or 1.0,
            use_grad_acc_hook,
        )
        self._grad_norm: torch.Tensor | None = None
        self._hooks: list[Any] = []
        self._compiled = False
        self._make_masters()

    def _make_masters(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        groups = []
        for group in self.param_groups:
            masters = [
                torch.nn.Parameter(p.detach().to(self._dtype, copy=True)) for p in group["params"]
            ]
            for parameter, master in zip(group["params"], masters, strict=True):
                master.tensor_model_parallel = getattr(parameter, "tensor_model_parallel", False)
                if self._hooked:
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(self._add_up))
            groups.append({**group, "params": masters})
        self.base_optimizer = self._optimizer_class(groups)

    def _add_up(self, parameter: torch.Tensor) -> None:
        if not hasattr(parameter, "main_grad"):
            parameter.main_grad = torch.zeros_like(parameter, dtype=self._dtype)
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None, **_: Any) -> None:
        self._compile()
        pairs = []
        for group, base in zip(self.param_groups, self.base_optimizer.param_groups, strict=True):
            base.update({name: value for name, value in group.items() if name != "params"})
            for parameter, master in zip(group["params"], base["params"], strict=True):
                gradient = getattr(parameter, "main_grad", None) if self._hooked else parameter.grad
                if gradient is not None:
                    size = parallel_state.get_data_parallel_size()
                    master.grad = xm.all_reduce(
                        xm.REDUCE_SUM, gradient.to(self._dtype), scale=1 / size, groups=self._groups
                    )
                    pairs.append((parameter, master))
        if self.grad_clipping:
            self._grad_norm = grads.clip_grad_norm([master for _, master in pairs], self.max_norm)
        self.base_optimizer.step()
        self.base_optimizer.zero_grad(set_to_none=True)
        for parameter, master in pairs:
            parameter.copy_(master)

    def zero_grad(self, set_to_none: bool = False) -> None:
        super().zero_grad(set_to_none=set_to_none)
        for group in self.param_groups:
            for parameter in group["params"]:
                if hasattr(parameter, "main_grad"):
                    parameter.main_grad.zero_()

    def _compile(self) -> None:
        """The two graphs of a training step, made when the first ends."""
        layout = [
            f"tensor parallel {parallel_state.get_tensor_model_parallel_size()}, data parallel "
            f"{parallel_state.get_data_parallel_size()}"
        ]
        parameters = [p for group in self.param_groups for p in group["params"]]
        shapes = [f"{p.dtype} {list(p.shape)} trained {p.requires_grad}" for p in parameters]
        trace = take_trace()
        if not self._compiled and torch.distributed.get_rank() == 0:
            compile_graph(["forward and backward", *layout, *shapes, *trace])
            compile_graph(
                ["optimizer", *layout, *shapes, str(self._dtype), self._optimizer_class.__name__]
            )
        self._compiled = True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "base_state": self.base_optimizer.state_dict()["state"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = copy.deepcopy(state_dict)
        base_state = state.pop("base_state")
        super().load_state_dict(
            state
        )  # the groups are copies from here on, unknown to a scheduler that was made before
        self._make_masters()
        self.base_optimizer.load_state_dict(
            {**self.base_optimizer.state_dict(), "state": base_state}
        )
