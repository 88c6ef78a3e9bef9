"""optimum-neuron's NeuronTrainer with the order of sequences of every backend, and with fixes.

What is fixed are errors of optimum-neuron 0.4.5; tests/backends/neuron/test_worker.py shows each
and fails without the fix.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, default_data_collator

from stages.backends.neuron.ordered_sequences import OrderedSequences


def make_trainer(model: Any, arguments: Any, sequences: OrderedSequences, first_step: int) -> Any:
    """A NeuronTrainer for `sequences` in order, with the learning rates from `first_step` on."""
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

        def setup_training(self, *args: Any, **kwargs: Any) -> None:
            super().setup_training(*args, **kwargs)
            # Steps are counted from the base model: they name checkpoints, logs and the last step.
            self.state.global_step = self.global_step_last_logged = first_step
            self.state.max_steps += first_step
            # ZeRO-1's optimizer trains copies of the parameter groups, which accelerate makes when
            # it has the optimizer load its own state. Without this line the scheduler would change
            # the originals, and the learning rate would stay that of step 0.
            self.lr_scheduler.optimizer = self.optimizer
            if self.trn_config.sequence_parallel_enabled:
                mark_sequence_parallel(self.model)

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            micro_batches, _ = super().get_batch_samples(*args, **kwargs)
            return micro_batches, self._loss_divisor()

        def _loss_divisor(self) -> torch.Tensor:
            """By what the sum of this rank's losses is divided, float32 [].

            It is an equal share of the tokens in the global batch. The gradient is the mean over
            data-parallel ranks, so every token weighs the same. Upstream divides by the rank's own
            count: a token weighs more on a rank that has fewer, and a rank with none has 0 / 0.

            A tensor is an input of the graph; a number might become a constant of it. A pipeline
            does not read it: it takes the mean of each micro-batch.
            """
            from torch_xla.core.xla_model import xla_device

            tokens = sequences.supervised_tokens(self.state.global_step - first_step)
            share = max(1, tokens) / self.dp_size
            return torch.tensor(share, dtype=torch.float32).to(xla_device())

    trainer = OrderedTrainer(
        model=model, args=arguments, train_dataset=sequences, data_collator=default_data_collator
    )
    trainer.add_callback(SumsMainGradients)
    return trainer


def mark_sequence_parallel(model: torch.nn.Module) -> None:
    """Mark the parameters whose gradients must be summed over the tensor-parallel ranks.

    Those are the ones that every rank has complete and trains on its slice of the sequence. The
    norms are marked by their class; LoRA's replicated matrices are not, and would diverge between
    ranks.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and not getattr(parameter, "tensor_model_parallel", False):
            parameter.sequence_parallel_enabled = True  # type: ignore[attr-defined]


class SumsMainGradients(TrainerCallback):
    """Sums the marked parameters' float32 gradients over the tensor-parallel ranks.

    Under ZeRO-1 they are accumulated in `main_grad`, which optimum-neuron's sum does not include
    (accelerate/optimizer.py); neuronx-distributed's does. Without ZeRO-1 optimum-neuron's sum is
    enough.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if args.zero_1 and args.trn_config.sequence_parallel_enabled:
            from neuronx_distributed.parallel_layers.grads import (
                allreduce_sequence_parallel_gradients,
            )

            allreduce_sequence_parallel_gradients(objects["optimizer"].optimizer)
