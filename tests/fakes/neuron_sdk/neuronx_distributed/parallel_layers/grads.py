"""The gradients of all ranks: their mean over data-parallel ranks, and their norm."""

from __future__ import annotations

import torch
import torch.distributed as dist

from neuronx_distributed.parallel_layers import mappings, parallel_state


def bucket_allreduce_gradients(
    grads_list: list[torch.Tensor], reduce_over_ep_group: bool = False
) -> None:
    for gradient in grads_list:
        gradient.div_(parallel_state.get_data_parallel_size())
        dist.all_reduce(gradient, group=parallel_state.get_data_parallel_group())


def allreduce_sequence_parallel_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Add up what tensor-parallel ranks have of the gradients of parameters that each applied to
    its part of the sequence."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if getattr(parameter, "sequence_parallel_enabled", False):
                gradient = (
                    parameter.grad
                    if parameter.grad is not None
                    else getattr(parameter, "main_grad", None)
                )
                if gradient is not None:
                    mappings.reduce_from_tensor_model_parallel_region(gradient)


def grad_norm(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Of the vector of all gradients: those of split parameters from all tensor-parallel ranks,
    those of the others once."""
    total = torch.zeros(1)
    for parameter in parameters:
        if parameter.grad is not None:
            square = parameter.grad.detach().float().pow(2).sum()
            split = getattr(parameter, "tensor_model_parallel", False)
            total += square if split else square / parallel_state.get_tensor_model_parallel_size()
    dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return total.sqrt()


@torch.no_grad()
def clip_grad_norm(
    parameters: list[torch.Tensor], max_norm: float, norm_type: float = 2
) -> torch.Tensor:
    norm = grad_norm(parameters)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0).to(parameter.grad.dtype))
    return norm
