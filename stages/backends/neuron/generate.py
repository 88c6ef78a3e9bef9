"""Generation with a model compiled for NeuronCores.

`load` refuses what this runtime cannot run; `CompiledModel.generate` (decoding.py) streams ids.

optimum-neuron's `generate` cannot be iterated step by step, ignores `streamer`, and ends every
prompt of a batch with the longest answer. Its `forward`, which its `generate` and its vLLM plugin
call, is called here from the loop that all backends share. Each slot has its own positions, so one
batch takes prompts of different lengths, and a consumer that stops iterating stops the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stages.backends.decoding import Decoder, right_padded, with_empty_slots
from stages.backends.neuron.compiled import (
    missing_files,
    missing_packages,
    problems_on,
    read_description,
    this_runtime,
)
from stages.run.errors import InputError, StageFailure


class CompiledModel(Decoder):
    """optimum-neuron's model of a decoder, its weights on the NeuronCores.

    It is compiled to return logits (export.py), so that the host chooses each token, as on every
    backend: the same SEED gives the same answers, and TOP_K=0 keeps all ids. On the device a token
    would be drawn from 256 ids, by a generator that takes no seed.
    """

    device = "cpu"

    def __init__(self, model: Any):
        self.batch_size: int = model.neuron_config.batch_size
        self.sequence_length: int = model.neuron_config.sequence_length
        self.vocab_size: int = model.config.vocab_size
        self._model = model
        self._cache: object = None

    def new_cache(self) -> object:
        """A claim on the one KV cache, which is on the device: the last to prefill may decode."""
        return object()

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]], cache: object) -> tuple[torch.Tensor, torch.Tensor]:
        self._cache = cache
        ids, lengths = right_padded(
            prompts, slots=self.batch_size, length=self._model.neuron_config.max_context_length
        )
        # The graph returns the logits after the largest position, and writes keys and values by
        # column. With position 0 for the padding, the prompt's last token has the largest position.
        # What the padding writes after it is overwritten before a mask includes it.
        columns = torch.arange(ids.shape[1]).expand_as(ids)
        positions = columns.masked_fill(columns >= lengths[:, None], 0)
        logits = self._forward(ids[: len(prompts)], positions[: len(prompts)])
        return with_empty_slots(logits, self.batch_size), lengths

    @torch.inference_mode()
    def decode_one_token(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: object
    ) -> torch.Tensor:
        if cache is not self._cache:
            raise StageFailure(
                "Two answers were asked of one compiled model at the same time: it has one KV "
                "cache. Finish the first."
            )
        return self._forward(ids[:, None], positions[:, None])

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [slots, vocab] after the last of the ids [slots, tokens]."""
        slots = len(ids)
        # Every graph has sampling parameters as an input; one that returns logits ignores them.
        logits = self._model.forward(
            input_ids=ids,
            position_ids=positions,
            seq_ids=torch.arange(slots),
            sampling_params=torch.ones(slots, 3),
        )
        return logits[:, -1].float()


def load(compiled: Path) -> CompiledModel:
    """Load what compile_inference wrote onto this runtime's NeuronCores.

    Raises InputError with all problems: `compiled` is not a complete compiled model; it was
    compiled by another optimum-neuron or neuronx-cc, or for another target; this runtime lacks
    packages, devices or cores.
    """
    description = read_description(compiled)
    refusal = f"The compiled model in {compiled} cannot run here"
    if missing := missing_packages():
        raise InputError(
            f"{refusal}: not installed: {', '.join(missing)}. Run eval in the Neuron container, on "
            "a machine with devices."
        )
    problems = list(problems_on(this_runtime(), description))
    if files := missing_files(compiled, description["tp_degree"]):
        more = f" and {len(files) - 3} more files" if len(files) > 3 else ""
        problems.append(f"it lacks {', '.join(files[:3])}{more}")
    if description["on_device_sampling"]:
        problems.append(
            "it returns ids, not logits: it was not compiled by `make compile-inference`"
        )
    if problems:
        remedy = (
            f"Remove {compiled} and run `make compile-inference` here: it compiles again from the "
            "consolidated model, for INSTANCE_TYPE and INFERENCE_TENSOR_PARALLEL_SIZE."
        )
        raise InputError([f"{refusal}: {problem}." for problem in problems] + [remedy])
    from optimum.neuron import NeuronModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # optimum-neuron uses names that transformers calls deprecated
    return CompiledModel(
        NeuronModelForCausalLM.from_pretrained(str(compiled.absolute()), trust_remote_code=False)
    )
