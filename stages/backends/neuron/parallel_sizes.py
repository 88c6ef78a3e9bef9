"""Whether a model can be trained with these numbers of processes on this machine, before 32 of them have loaded it.

What the Neuron libraries refuse comes as an assertion in every rank, minutes into a run; what they do not refuse comes
as a hang or as weights that were dropped. Both are said here, with the nearest numbers that work. That NPROC_PER_NODE and
MAX_LENGTH are multiples is refused by `Settings` already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

from stages.backends.neuron.hardware import Hardware, device_name, find_hardware, neuron_cores
from stages.model.fit import not_divisible
from stages.run.settings import Settings

__all__ = ["device_name", "neuron_cores", "topology_problems"]

# Model types that optimum-neuron 0.4.5 trains -> whether in pipeline stages too (models/training/auto_models.py and the classes).
ARCHITECTURES = {"llama": True, "qwen3": True, "granite": False}
# Numbers of processes, besides multiples of 32, that Trainium connects; and those that AWS trains with on one node of Trainium2.
TRAINIUM_COUNTS = (1, 2, 8)
TRAINIUM2_COUNTS = (1, 4, 64)
# Linear layers that LoRA can adapt; those of a group are one layer in the training model (transformations_utils.py).
LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION, MLP = LORA_LAYERS[:3], LORA_LAYERS[4:6]


@dataclass(frozen=True)
class Sizes:
    """The numbers of processes, as the settings are called: all, those that share a layer, those that follow each other."""

    nproc_per_node: int
    tensor_parallel_size: int
    pipeline_parallel_size: int

    @staticmethod
    def of(settings: Settings) -> Sizes:
        return Sizes(
            settings.nproc_per_node, settings.tensor_parallel_size, settings.pipeline_parallel_size
        )

    def changed_to(self, other: Sizes) -> str:
        """`NPROC_PER_NODE=32 TENSOR_PARALLEL_SIZE=8`: what is to be set to get `other`."""
        pairs = [
            (name, getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__
        ]
        return " ".join(
            f"{name.upper()}={after}" for name, before, after in pairs if before != after
        )


def topology_problems(settings: Settings, config: Any) -> list[str]:
    """Everything that keeps the model of `config` from being trained with these settings here; empty when nothing does.

    Reads the machine (`find_hardware`); raises InputError where NEURON_RT_* is no list of cores. Each entry is the
    problem, the numbers and a remedy; remedies that change numbers of processes are the same in all entries and work together.
    """
    machine = find_hardware()
    problems = [] if machine.cores else [
        f"No NeuronCores here: {machine.source}. Run on a trn1 or trn2 instance, or set BACKEND=torch to rehearse on this machine."
    ]  # fmt: skip
    if config.model_type not in ARCHITECTURES:
        trained = ", ".join(ARCHITECTURES)
        return [
            *problems,
            f"MODEL_ID={settings.model_id} is a {config.model_type}; on Neuron {trained} are trained. Name such a model.",
        ]
    found = list(size_problems(Sizes.of(settings), machine, config))
    if found:
        remedy = Sizes.of(settings).changed_to(nearest(settings, machine, config))
        problems += [f"{problem} Set {remedy}." for problem in found]
    return [*problems, *model_problems(settings, config), *lora_problems(settings, config)]


def size_problems(sizes: Sizes, machine: Hardware, config: Any) -> Iterator[str]:
    """What is wrong with the numbers of processes, without the remedy. With no cores present, that alone is left out."""
    count, tp, pp = sizes.nproc_per_node, sizes.tensor_parallel_size, sizes.pipeline_parallel_size
    if machine.cores and count > machine.cores:
        yield f"NPROC_PER_NODE={count} is above the {machine.cores} cores here ({machine.source}); each process takes one."
    # The sizes for which Trainium's devices are wired. optimum-neuron has the list (is_topology_supported in training_utils.py)
    # and asks it nowhere; a run then fails in its first collective, or waits for it. Of Trainium2 no such list is known.
    if machine.target == "trn1" and count not in TRAINIUM_COUNTS and count % 32:
        yield f"NPROC_PER_NODE={count} is a number of processes that Trainium does not connect: 1, 2, 8 and multiples of 32 are."
    yield from _indivisible(tp, config)
    # NxD deals the ranks of a node out so that the four of a group are neighbours, and has no groups left for a pipeline
    # (initialize_model_parallel: a reshape to 0).
    if machine.target == "trn1" and tp == 4 and pp > 1:
        yield f"TENSOR_PARALLEL_SIZE=4 with PIPELINE_PARALLEL_SIZE={pp} cannot be laid out on one node of Trainium."
    # get_logic_chosen in parallel_state.py: groups of 8 and 32 are documented as not connected, and optimum-neuron does not say
    # that cores are paired (lnc_size), so that 32 gets the wrong groups and 64 an assertion.
    if machine.target == "trn2" and count == 64 and tp in (8, 32, 64):
        yield f"TENSOR_PARALLEL_SIZE={tp} of 64 processes gives groups that Trainium2 does not connect."
    if pp > 1 and not ARCHITECTURES[config.model_type]:
        yield f"PIPELINE_PARALLEL_SIZE={pp}: {config.model_type} is trained without a pipeline."
    elif pp > config.num_hidden_layers:
        yield f"PIPELINE_PARALLEL_SIZE={pp} is above the model's {config.num_hidden_layers} layers; each stage needs one."


def _indivisible(tp: int, config: Any) -> Iterator[str]:
    if whole := not_divisible(tp, config):
        yield f"TENSOR_PARALLEL_SIZE={tp} does not divide the model's {', '.join(whole)}."
    kv_heads = kv_heads_of(config)
    if (
        kv_heads % tp and tp % kv_heads
    ):  # either each process has whole heads, or each head is in equally many processes
        yield f"TENSOR_PARALLEL_SIZE={tp} is neither a divisor nor a multiple of the model's {kv_heads} KV heads."


def kv_heads_of(config: Any) -> int:
    """Heads of keys and values; a config that does not tell has one for each attention head."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def nearest(settings: Settings, machine: Hardware, config: Any) -> Sizes:
    """The working numbers of processes that change fewest settings, and those least (by factors). 1, 1, 1 always works."""
    now = Sizes.of(settings)
    most = machine.cores or max(64, now.nproc_per_node)
    best, key = Sizes(1, 1, 1), _distance(now, Sizes(1, 1, 1))
    counts = (
        TRAINIUM2_COUNTS
        if machine.target == "trn2"
        else (*TRAINIUM_COUNTS, *range(32, most + 1, 32))
    )
    for count in [count for count in {*counts, now.nproc_per_node} if count <= most]:
        for tp in _divisors(math.gcd(count, settings.max_length)):
            for pp in _divisors(count // tp):
                sizes = Sizes(count, tp, pp)
                if (distance := _distance(now, sizes)) < key and not any(
                    size_problems(sizes, machine, config)
                ):
                    best, key = sizes, distance
    return best


def _distance(now: Sizes, other: Sizes) -> tuple[float, ...]:
    pairs = list(zip(astuple(now), astuple(other), strict=True))
    factors = sum(abs(math.log2(before / after)) for before, after in pairs)
    # Of two equally near the larger: more of the machine, more memory for each layer.
    return (
        sum(before != after for before, after in pairs),
        round(factors, 6),
        -other.nproc_per_node,
        -other.tensor_parallel_size,
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def model_problems(settings: Settings, config: Any) -> Iterator[str]:
    """What the training model of optimum-neuron cannot be, whatever the numbers of processes."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hidden % heads:
        yield f"MODEL_ID={settings.model_id}: its hidden size {hidden} is no multiple of its {heads} attention heads. Name another model."
    biased = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if biased:
        yield (
            f"MODEL_ID={settings.model_id} has biases ({', '.join(biased)} in its config.json); the training model has none, and would "
            "drop them without a word. Name a model without them."
        )
    if config.model_type == "qwen3" and getattr(config, "sliding_window", None) is not None:
        yield (
            f"MODEL_ID={settings.model_id} attends within a sliding window of {config.sliding_window} tokens; the training model cannot. "
            "Set use_sliding_window to false in its config.json, or name another model."
        )


def lora_problems(settings: Settings, config: Any) -> Iterator[str]:
    """What is wrong with LORA_TARGET_MODULES: unknown layers, and layers of one fused layer of which others are missing."""
    if not settings.lora_r:
        return
    named = settings.lora_target_modules.split()
    unknown = [name for name in named if name not in LORA_LAYERS]
    if unknown or not named:
        instead = f"names {', '.join(unknown)}" if unknown else "names no layer"
        yield f"LORA_TARGET_MODULES {instead}. Name some of {', '.join(LORA_LAYERS)}."
    tp, kv_heads = settings.tensor_parallel_size, kv_heads_of(config)
    # Where a process has no whole KV heads of its own, NxD keeps the three projections in one layer.
    fused: dict[tuple[str, ...], str] = {MLP: "one layer in training"}
    if kv_heads % tp:
        fused[ATTENTION] = (
            f"one layer in training with {kv_heads} KV heads on TENSOR_PARALLEL_SIZE={tp}"
        )
    for group, what in fused.items():
        missing = [name for name in group if name not in named]
        if missing and len(missing) < len(group):
            given = ", ".join(name for name in group if name in named)
            yield f"LORA_TARGET_MODULES has {given} without {', '.join(missing)}; they are {what}. Name all of them, or none."
