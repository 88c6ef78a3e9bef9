"""The memory of a training on the torch backend, by part, for the rank with the most.

Arithmetic on the sizes in config.json, or, for activations and logits, what a traced step had
(`stages.forecast.trace`). Standard library only.

Two moments of a step can be its peak: when the backward pass begins (all activations and the logits
are there, no gradients yet) and when it ends (all gradients are, no activations). Weights and the
optimizer are there in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stages.backends.schedule import data_parallel_size
from stages.forecast.parameters import Shape, trainable
from stages.run.settings import Settings

# Bytes that Python, torch, transformers and datasets take in a rank before it has a model, and what
# tcmalloc keeps: measured on 2026-11-29 with torch 2.13 for CPUs
# (tests/benchmarks/results/2026-11-29-forecasts.md). In a device's memory they take nothing.
CPU_PROCESS = 580 * 10**6
# A CUDA context and cuBLAS's workspaces; NVIDIA's own figures differ by device: 0.3 to 0.6 GB.
CUDA_CONTEXT = 500 * 10**6


@dataclass(frozen=True)
class Part:
    """`bytes` of one rank that `name` takes, and the arithmetic behind them."""

    name: str
    bytes: int
    basis: str


@dataclass(frozen=True)
class Need:
    """The parts of a rank's peak; `moment` says when it is."""

    parts: tuple[Part, ...]
    moment: str

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


def training_memory(
    shape: Shape, settings: Settings, device: str, traced: int | None = None
) -> Need:
    """The peak of one rank on `device` (cpu, cuda, neuron).

    `traced`: the bytes of the traced step's activations, logits and work, in place of the
    arithmetic.
    """
    constant = list(_states(shape, settings))
    if device == "cpu":
        constant.append(Part("process", CPU_PROCESS, "Python and libraries, measured elsewhere"))
    elif device == "cuda":
        constant.append(Part("context", CUDA_CONTEXT, "CUDA and cuBLAS, the vendor's order"))
    begins = (
        [Part("activations and logits", traced, "a traced step")]
        if traced is not None
        else [*_activations(shape, settings, device == "cpu"), _logits(shape, settings)]
    )
    if device == "cpu" and settings.bf16:
        begins.append(_heap(shape, settings))
    if settings.gradient_accumulation_steps > 1:  # those of the micro-batches before are there
        trained = _trained(shape, settings)
        begins.append(Part("gradients", 4 * trained, f"{trained:,} x 4, of micro-batches before"))
    ends = [_gradients(shape, settings), *_buffers(shape, settings)]
    first = Need((*constant, *begins), "when the backward pass begins")
    last = Need((*constant, *ends), "when the backward pass ends")
    return max(first, last, key=lambda need: need.bytes)


def _per_rank(shape: Shape, settings: Settings) -> int:
    """Weights of one tensor-parallel rank: matrices and embeddings are divided, norms are not."""
    tensor = settings.tensor_parallel_size
    embeddings = shape.embedding * (1 if shape.tied else 2)
    divided = shape.layers * (shape.layer - shape.norms) + embeddings
    return divided // tensor + shape.layers * shape.norms + shape.hidden


def _states(shape: Shape, settings: Settings) -> Iterator[Part]:
    """Weights, their copies to compute with, and AdamW's moments."""
    data, whole = data_parallel_size(settings), _per_rank(shape, settings)
    trained = whole
    if settings.lora_r:
        trained = trainable(shape, settings) // settings.tensor_parallel_size
        size = 2 if settings.bf16 else 4
        yield Part("frozen weights", size * whole // data, f"{whole:,} x {size} / {data} DP")
        yield Part("adapters", 4 * trained // data, f"{trained:,} x 4 / {data} DP")
    else:
        yield Part("master weights", 4 * whole // data, f"{whole:,} x 4 / {data} DP")
    gathered = whole + (trained if settings.lora_r else 0)
    size = 2 if settings.bf16 else 4
    yield Part("weights", size * gathered, f"{gathered:,} x {size}, gathered for a step")
    yield Part("optimizer", 8 * trained // data, f"{trained:,} x 2 moments x 4 / {data} DP")


def _trained(shape: Shape, settings: Settings) -> int:
    """Trained weights of one tensor-parallel rank."""
    if settings.lora_r:
        return trainable(shape, settings) // settings.tensor_parallel_size
    return _per_rank(shape, settings)


def _gradients(shape: Shape, settings: Settings) -> Part:
    data, trained = data_parallel_size(settings), _trained(shape, settings)
    return Part("gradients", 4 * trained // data, f"{trained:,} x 4 / {data} DP")


def _buffers(shape: Shape, settings: Settings) -> Iterator[Part]:
    """What FSDP exchanges gradients through: those of the largest group, if they are bfloat16, and
    a float32 copy. With data parallelism Gloo has copies too: fitted to runs on a CPU."""
    if settings.lora_r:
        return
    tensor = settings.tensor_parallel_size
    largest = max(shape.layer, shape.embedding * (1 if shape.tied else 2)) // tensor
    size = (2 if settings.bf16 else 0) + (4 if data_parallel_size(settings) == 1 else 10)
    yield Part("buffers", size * largest, f"{largest:,} x {size}, of the largest group")


def _activations(shape: Shape, settings: Settings, packed: bool) -> Iterator[Part]:
    """What the layers keep for the backward pass."""
    tokens = settings.per_device_train_batch_size * settings.max_length
    each = layer_bytes(shape, settings, packed)
    if not settings.gradient_checkpointing:
        basis = f"{tokens:,} tokens x {shape.layers} layers x {each:,}"
        yield Part("activations", tokens * shape.layers * each, basis)
        return
    kept = (2 if settings.bf16 else 4) * shape.hidden // settings.tensor_parallel_size
    basis = f"{tokens:,} tokens x ({shape.layers} layers x {kept:,} + one of {each:,})"
    yield Part("activations", tokens * (shape.layers * kept + each), basis)


def layer_bytes(shape: Shape, settings: Settings, packed: bool) -> int:
    """Bytes per token that one layer keeps for the backward pass, without checkpointing.

    As traced on transformers' models (tests/forecast/test_trace.py): a norm keeps its input in
    float32 and its result; attention keeps queries, keys, values and its result, and if it is not
    `packed` (a CPU's) keys and values repeated for the query heads; the MLP four tensors of the
    intermediate size. Tensor parallelism divides all but the inputs of the two halves of a layer,
    which are gathered from the sequence's parts.
    """
    size, tensor = (2 if settings.bf16 else 4), settings.tensor_parallel_size
    norms = 4 if shape.kind in ("gemma3_text", "olmo2") else 2
    queries = shape.heads * shape.head_size
    keys = shape.key_value_heads * shape.head_size
    of_norms = norms * shape.hidden * (4 + size)
    attention = size * ((2 if packed else 5) * queries + 2 * keys)
    mlp = size * 4 * shape.intermediate
    adapters = (
        len(settings.lora_target_modules.split()) * 4 * shape.hidden if settings.lora_r else 0
    )
    gathered = 2 * size * shape.hidden
    return (of_norms + attention + mlp + adapters) // tensor + gathered


def _logits(shape: Shape, settings: Settings) -> Part:
    """The logits' float32 softmax, its gradient, and the gradient's gradient of the cast, where all
    tokens are supervised; those that are not have no logits (`loss_sum`)."""
    count, basis = _count_logits(shape, settings)
    return Part("logits", 12 * count, f"{basis} x 3 copies x 4")


def _heap(shape: Shape, settings: Settings) -> Part:
    """What bfloat16 logits had, which the heap does not use again: fitted to runs on a CPU."""
    count, basis = _count_logits(shape, settings)
    return Part("heap's gap", 2 * count, f"{basis} x 2, of freed logits")


def _count_logits(shape: Shape, settings: Settings) -> tuple[int, str]:
    tokens = settings.per_device_train_batch_size * settings.max_length
    vocabulary = -(-shape.vocabulary // settings.tensor_parallel_size)
    return tokens * vocabulary, f"{tokens:,} tokens x {vocabulary:,}"


def neuron_memory(shape: Shape, settings: Settings) -> Need:
    """The peak of one core with optimum-neuron.

    Tensor and pipeline parallelism divide bfloat16 weights and at most float32 gradients; with
    ZeRO-1 data parallelism also divides AdamW's 12 bytes.

    Activations as Korthikanti et al. 2022 (arXiv:2205.05198) count them with sequence parallelism:
    34 s b h bytes a layer, 2 with checkpointing. Not modelled: the compiler's scratch, collectives,
    fragmentation, and pipeline micro-batches in flight.
    """
    layers = settings.tensor_parallel_size * settings.pipeline_parallel_size
    data = data_parallel_size(settings)
    count = shape.parameters // layers
    trained = trainable(shape, settings) // layers
    shards = data if settings.zero_1 else 1
    tokens = settings.per_device_train_batch_size * settings.max_length
    here = -(-shape.layers // settings.pipeline_parallel_size)
    each = shape.hidden * (2 if settings.gradient_checkpointing else 34)
    kept = tokens * here * each // settings.tensor_parallel_size
    vocabulary = -(-shape.vocabulary // settings.tensor_parallel_size)
    parts = (
        Part("weights", 2 * count, f"{count:,} x 2"),
        Part("gradients", 4 * trained, f"{trained:,} x 4"),
        Part("optimizer", 12 * trained // shards, f"{trained:,} x 12 / {shards} DP"),
        Part("activations", kept, f"{tokens:,} tokens x {here} layers x {each:,} / TP"),
        Part("logits", 10 * tokens * vocabulary, f"{tokens:,} tokens x {vocabulary:,} x 10"),
    )
    return Need(parts, "arithmetic; the compiler's scratch and collectives are not modelled")
