"""Checks whether a model can be trained with these numbers of processes, before they load it.

What the Neuron libraries refuse is an assertion in every rank, minutes into a run; what they do not
refuse is a hang, or weights that are dropped. Both are reported here, with the nearest numbers that
work. `Settings` already checks that NPROC_PER_NODE and MAX_LENGTH are multiples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

from stages.backends.neuron.hardware import Hardware, find_hardware
from stages.model.fit import (
    LORA_LAYERS,
    architecture_problems,
    lora_layer_problems,
    not_divisible,
    window_problems,
)
from stages.run.settings import Settings

# What optimum-neuron 0.4.5 trains without pipeline parallelism (its model classes).
WITHOUT_PIPELINE = ("granite",)
# Numbers of processes that Trainium connects, besides multiples of 32; and those that AWS trains
# with on one node of Trainium2.
TRAINIUM_COUNTS = (1, 2, 8)
TRAINIUM2_COUNTS = (1, 4, 64)
# Of the layers that LoRA can adapt, those of a group are one layer in the training model
# (transformations_utils.py).
ATTENTION, MLP = LORA_LAYERS[:3], LORA_LAYERS[4:6]


@dataclass(frozen=True)
class Sizes:
    """The numbers of processes, by the names of their settings.

    All processes, those that share a layer, and those of a pipeline.
    """

    nproc_per_node: int
    tensor_parallel_size: int
    pipeline_parallel_size: int

    @staticmethod
    def of(settings: Settings) -> Sizes:
        return Sizes(
            settings.nproc_per_node, settings.tensor_parallel_size, settings.pipeline_parallel_size
        )

    def changed_to(self, other: Sizes) -> str:
        """The settings that turn these sizes into `other`.

        `NPROC_PER_NODE=32 TENSOR_PARALLEL_SIZE=8`
        """
        pairs = [
            (name, getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__
        ]
        return " ".join(
            f"{name.upper()}={after}" for name, before, after in pairs if before != after
        )


def topology_problems(settings: Settings, config: Any) -> list[str]:
    """Everything that keeps the model of `config` from being trained with these settings here.

    Reads the machine (`find_hardware`); raises InputError where NEURON_RT_* names no cores. Each
    entry is the problem, the numbers and a remedy. Remedies that change numbers of processes are
    the same in all entries and work together.
    """
    machine = find_hardware()
    problems = []
    if unknown := list(architecture_problems(settings, config, "neuron")):
        return unknown
    sizes = Sizes.of(settings)
    if unfit := list(size_problems(sizes, machine, config)):
        remedy = sizes.changed_to(nearest(settings, machine, config))
        problems += [f"{problem} Set {remedy}." for problem in unfit]
    return [*problems, *model_problems(settings, config), *lora_problems(settings, config)]


def size_problems(sizes: Sizes, machine: Hardware, config: Any) -> Iterator[str]:
    """What is wrong with the numbers of processes, without the remedy.

    On a machine without cores all is checked but the number of cores.
    """
    count, tp, pp = sizes.nproc_per_node, sizes.tensor_parallel_size, sizes.pipeline_parallel_size
    if machine.cores and count > machine.cores:
        yield (
            f"NPROC_PER_NODE={count} is above the {machine.cores} cores here ({machine.source}); "
            "each process takes one."
        )
    # The sizes for which Trainium's devices are connected. optimum-neuron has the list
    # (is_topology_supported in training_utils.py) but never uses it; a run then fails in its first
    # collective, or waits for it. For Trainium2 no such list is known.
    if machine.target == "trn1" and count not in TRAINIUM_COUNTS and count % 32:
        yield (
            f"NPROC_PER_NODE={count} is a number of processes that Trainium does not connect: it "
            "connects 1, 2, 8 and multiples of 32."
        )
    yield from _division_problems(tp, config)
    # NxD orders the ranks of a node so that the four of a group are neighbours, which leaves no
    # groups for a pipeline (initialize_model_parallel: a reshape to 0).
    if machine.target == "trn1" and tp == 4 and pp > 1:
        yield (
            f"TENSOR_PARALLEL_SIZE=4 with PIPELINE_PARALLEL_SIZE={pp} cannot be laid out on one "
            "node of Trainium."
        )
    # get_logic_chosen in parallel_state.py: groups of 8 and 32 are documented as not connected, and
    # optimum-neuron does not pass that cores are paired (lnc_size), so that 32 gets the wrong
    # groups and 64 an assertion.
    if machine.target == "trn2" and count == 64 and tp in (8, 32, 64):
        yield (
            f"TENSOR_PARALLEL_SIZE={tp} of 64 processes gives groups that Trainium2 does not "
            "connect."
        )
    if pp > 1 and config.model_type in WITHOUT_PIPELINE:
        yield f"PIPELINE_PARALLEL_SIZE={pp}: {config.model_type} is trained without a pipeline."
    elif pp > config.num_hidden_layers:
        yield (
            f"PIPELINE_PARALLEL_SIZE={pp} is above the model's {config.num_hidden_layers} layers; "
            "each pipeline rank needs one."
        )


def _division_problems(tp: int, config: Any) -> Iterator[str]:
    counts = not_divisible(tp, config)
    # In a Granite every process has the whole embedding and head.
    if config.model_type != "granite" and config.vocab_size % tp:
        counts.append(f"{config.vocab_size} vocabulary entries")
    if counts:
        yield f"TENSOR_PARALLEL_SIZE={tp} does not divide the model's {', '.join(counts)}."
    kv_heads = kv_heads_of(config)
    # Either each process has complete heads, or each head is in equally many processes.
    if kv_heads % tp and tp % kv_heads:
        yield (
            f"TENSOR_PARALLEL_SIZE={tp} is neither a divisor nor a multiple of the model's "
            f"{kv_heads} KV heads."
        )


def kv_heads_of(config: Any) -> int:
    """Heads of keys and values; without that entry a config has one for each attention head."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def nearest(settings: Settings, machine: Hardware, config: Any) -> Sizes:
    """The working numbers of processes that change the fewest settings, by the smallest factors.

    1, 1, 1 always works.
    """
    current = Sizes.of(settings)
    largest = machine.cores or max(64, current.nproc_per_node)
    best, best_distance = Sizes(1, 1, 1), _distance(current, Sizes(1, 1, 1))
    counts = (
        TRAINIUM2_COUNTS
        if machine.target == "trn2"
        else (*TRAINIUM_COUNTS, *range(32, largest + 1, 32))
    )
    for count in [count for count in {*counts, current.nproc_per_node} if count <= largest]:
        for tp in _divisors(math.gcd(count, settings.max_length)):
            for pp in _divisors(count // tp):
                sizes = Sizes(count, tp, pp)
                distance = _distance(current, sizes)
                if distance < best_distance and not any(size_problems(sizes, machine, config)):
                    best, best_distance = sizes, distance
    return best


def _distance(current: Sizes, other: Sizes) -> tuple[float, ...]:
    pairs = list(zip(astuple(current), astuple(other), strict=True))
    factors = sum(abs(math.log2(before / after)) for before, after in pairs)
    # Of two that are equally near, the larger: more of the machine, more memory for each layer.
    return (
        sum(before != after for before, after in pairs),
        round(factors, 6),
        -other.nproc_per_node,
        -other.tensor_parallel_size,
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def model_problems(settings: Settings, config: Any) -> Iterator[str]:
    """What optimum-neuron's training model does not support, whatever the numbers of processes."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hidden % heads:
        yield (
            f"MODEL_ID={settings.model_id}: its hidden size {hidden} is not a multiple of its "
            f"{heads} attention heads. Choose another model."
        )
    biased = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if biased:
        yield (
            f"MODEL_ID={settings.model_id} has biases ({', '.join(biased)} in its config.json); "
            "the training model has none and would drop them without a message. Choose a model "
            "without biases."
        )
    yield from window_problems("MAX_LENGTH", settings.max_length, config)


def lora_problems(settings: Settings, config: Any) -> Iterator[str]:
    """What is wrong with LORA_TARGET_MODULES: unknown layers, or parts of a fused layer."""
    if not settings.lora_r:
        return
    yield from lora_layer_problems(settings, LORA_LAYERS)
    names = settings.lora_target_modules.split()
    tp, kv_heads = settings.tensor_parallel_size, kv_heads_of(config)
    fused: dict[tuple[str, ...], str] = {MLP: "one layer in training"}
    # Where a process has no complete KV heads, NxD keeps the three projections in one layer.
    if kv_heads % tp:
        fused[ATTENTION] = (
            f"one layer in training with {kv_heads} KV heads on TENSOR_PARALLEL_SIZE={tp}"
        )
    for group, description in fused.items():
        missing = [name for name in group if name not in names]
        if missing and len(missing) < len(group):
            present = ", ".join(name for name in group if name in names)
            yield (
                f"LORA_TARGET_MODULES has {present} without {', '.join(missing)}; they are "
                f"{description}. Name all of them, or none."
            )
