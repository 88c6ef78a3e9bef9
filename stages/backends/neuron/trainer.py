"""optimum-neuron's NeuronTrainer, given the order of rows that every backend uses, with what of it does not hold mended."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, default_data_collator


def make_trainer(
    model: Any, arguments: Any, rows: torch.utils.data.Dataset[Any], first_step: int
) -> Any:
    """A NeuronTrainer for `rows` in their order, with the learning rates from step `first_step` on.

    What it mends was found in optimum-neuron 0.4.5 and shown by tests/backends/neuron/test_worker.py, which fails without.
    """
    from optimum.neuron import NeuronTrainer

    class OrderedTrainer(NeuronTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
            return torch.utils.data.SequentialSampler(
                train_dataset if train_dataset is not None else self.train_dataset
            )

        def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
            super().create_optimizer_and_scheduler(
                num_training_steps=first_step + num_training_steps
            )
            for _ in range(first_step):
                self.lr_scheduler.step()

        def setup_training(self, *given: Any, **named: Any) -> None:
            super().setup_training(*given, **named)
            # Steps are counted from the base model on: checkpoints, logs and the last step are named by it.
            self.state.global_step = self.global_step_last_logged = first_step
            self.state.max_steps += first_step
            # ZeRO-1's optimizer trains copies of the parameter groups: accelerate has it load its own state once. The scheduler
            # would go on changing the originals, and the learning rate would stay that of step 0.
            self.lr_scheduler.optimizer = self.optimizer
            if self.trn_config.sequence_parallel_enabled:
                mark_sequence_parallel(self.model)

    trainer = OrderedTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator
    )
    trainer.add_callback(SumsMainGradients)
    return trainer


def mark_sequence_parallel(model: torch.nn.Module) -> None:
    """Mark what every tensor-parallel rank holds whole and trains on its slice of the sequence: its gradients are to be summed.

    The norms are marked by their class; LoRA's replicated matrices are not, and would drift apart from rank to rank.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and not getattr(parameter, "tensor_model_parallel", False):
            parameter.sequence_parallel_enabled = True  # type: ignore[attr-defined]


class SumsMainGradients(TrainerCallback):
    """Sums the marked parameters' gradients over the tensor-parallel ranks where they are accumulated in float32.

    That is in `main_grad`, under ZeRO-1, where optimum-neuron's sum does not look (accelerate/optimizer.py); neuronx-distributed's
    does. Without ZeRO-1 the first is enough.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if args.zero_1 and args.trn_config.sequence_parallel_enabled:
            from neuronx_distributed.parallel_layers.grads import (
                allreduce_sequence_parallel_gradients,
            )

            allreduce_sequence_parallel_gradients(given["optimizer"].optimizer)
