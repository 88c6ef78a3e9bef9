"""Generation from a model compiled for NeuronCores: `load` refuses what this runtime cannot run, `generate` streams ids.

optimum-neuron's own `generate` has no step iterator, ignores `streamer`, and ends every row of a batch with the longest. Its
`forward` is what both it and its vLLM plugin drive, and what is driven here, by the loop that all backends share: each row keeps
its own positions, so that prompts of different lengths stand beside each other, and a consumer that stops asking stops the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stages.backends.decoding import Decoder, right_padded, with_empty_rows
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

    Compiled to return logits (export.py), so that a token is chosen on the host as on every backend: SEED gives the same answers
    again, and TOP_K=0 leaves all ids in. Chosen on the device they would come from a generator that no seed reaches, among 256 ids.
    """

    device = "cpu"

    def __init__(self, model: Any):
        self.batch_size: int = model.neuron_config.batch_size
        self.sequence_length: int = model.neuron_config.sequence_length
        self.vocab_size: int = model.config.vocab_size
        self._model = model
        self._cache: object = None

    def new_cache(self) -> object:
        """A claim on the one KV cache, which lies on the device: only the last to prefill may decode."""
        return object()

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]], cache: object) -> tuple[torch.Tensor, torch.Tensor]:
        self._cache = cache
        ids, lengths = right_padded(
            prompts, rows=self.batch_size, length=self._model.neuron_config.max_context_length
        )
        # The graph takes the logits behind the largest position, and writes keys and values by column. Position 0 for padding
        # leaves the prompt's last token the largest; what is written behind it is overwritten before a mask lets it be seen.
        columns = torch.arange(ids.shape[1]).expand_as(ids)
        positions = columns.masked_fill(columns >= lengths[:, None], 0)
        logits = self._forward(ids[: len(prompts)], positions[: len(prompts)])
        return with_empty_rows(logits, self.batch_size), lengths

    @torch.inference_mode()
    def decode_one_token(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: object
    ) -> torch.Tensor:
        if cache is not self._cache:
            raise StageFailure(
                "Two answers were asked of one compiled model at the same time: it has one KV cache. Finish the first."
            )
        return self._forward(ids[:, None], positions[:, None])

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocab] behind the last of the ids [rows, tokens]."""
        rows = len(ids)
        # Sampling parameters are an input of every graph; one that returns logits does not read them.
        logits = self._model.forward(
            input_ids=ids,
            position_ids=positions,
            seq_ids=torch.arange(rows),
            sampling_params=torch.ones(rows, 3),
        )
        return logits[:, -1].float()


def load(compiled: Path) -> CompiledModel:
    """Load what compile_inference wrote onto this runtime's NeuronCores.

    Raises InputError, with everything that is wrong, when `compiled` is no whole compiled model, when it was compiled by another
    optimum-neuron or neuronx-cc or for another target, and when this runtime lacks packages, devices or cores for it.
    """
    description = read_description(compiled)
    refused = f"The compiled model in {compiled} cannot run here"
    if missing := missing_packages():
        raise InputError(
            f"{refused}: not installed: {', '.join(missing)}. Run eval in the Neuron container, on a runtime with devices."
        )
    problems = list(problems_on(this_runtime(), description))
    if lost := missing_files(compiled, description["tp_degree"]):
        problems.append(
            f"it lacks {', '.join(lost[:3])}"
            + (f" and {len(lost) - 3} more files" if len(lost) > 3 else "")
        )
    if description["on_device_sampling"]:
        problems.append(
            "it returns ids, not logits: it was not compiled by `make compile-inference`"
        )
    if problems:
        remedy = (
            f"Remove {compiled} and run `make compile-inference` here: it compiles again from the consolidated model, for "
            "INSTANCE_TYPE and INFERENCE_TENSOR_PARALLEL_SIZE."
        )
        raise InputError([f"{refused}: {problem}." for problem in problems] + [remedy])
    from optimum.neuron import NeuronModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # optimum-neuron uses names that transformers calls deprecated
    return CompiledModel(
        NeuronModelForCausalLM.from_pretrained(str(compiled.absolute()), trust_remote_code=False)
    )
