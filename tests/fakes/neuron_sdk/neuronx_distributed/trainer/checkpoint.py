"""The files of a sharded checkpoint.

TAG/checkpoint                                      when it was begun
TAG/model/dp_rank_00_tp_rank_TT_pp_rank_PP.pt       a rank's names, each with its tensor or a
reference to it ....pt.tensors/tensor_K.pt, ....pt.info.pt          use_xser: the tensors, each in a
file, and their shapes TAG/done                                            when all ranks have
written
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch_xla.core import xla_model as xm
from torch_xla.utils import serialization as xser

from neuronx_distributed.parallel_layers import parallel_state
from neuronx_distributed.parallel_layers.utils import move_all_tensor_to_cpu

g_iostate = None


def save_checkpoint(
    checkpoint_dir_str: str,
    tag: str,
    model: Any = None,
    optimizer: Any = None,
    num_workers: int = 8,
    use_xser: bool = False,
    async_save: bool = False,
    **_: Any,
) -> None:
    if async_save or optimizer is not None:
        raise NotImplementedError("the fakes save no optimizer, and nothing in the background")
    folder = Path(checkpoint_dir_str) / tag
    if dist.get_rank() == 0:
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint").write_text("1")
    xm.rendezvous("folders made")
    state = dict(model if isinstance(model, dict) else model.state_dict())
    name = f"dp_rank_00_tp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}_pp_rank_00.pt"
    if parallel_state.get_data_parallel_rank() == 0:
        _save(state, str(folder / "model" / name), use_xser)
    xm.rendezvous("saved")
    if dist.get_rank() == 0:
        (folder / "done").write_text("1")
    xm.rendezvous("done")


def _save(state: dict[str, torch.Tensor], path: str, use_xser: bool) -> None:
    if not use_xser:
        torch.save(move_all_tensor_to_cpu(state), path)
        return
    Path(xser._get_tensors_folder(path)).mkdir(exist_ok=True)
    references, facts = {}, {}
    for index, (name, tensor) in enumerate(state.items()):
        torch.save(
            tensor.detach().cpu(), xser._get_tensor_file(xser._get_tensors_folder(path), index)
        )
        facts[index] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "expert_model_parallel": False,
        }
        references[name] = xser.TensorReference(index)
    torch.save(references, path)
    torch.save(facts, path + ".info.pt")
