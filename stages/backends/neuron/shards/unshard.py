"""How optimum-neuron 0.4.5 cuts and rearranges a model's weights over the ranks, read backwards:
which slices of which shards make up each.

Nothing here touches a weight. From the metadata next to the shards and from the shards' shapes
follows, for each tensor of the original model, a list of slices to be joined along one dimension.
That holds for a plain column or row cut, for linear layers that were fused into one (gate_up_proj),
and for grouped heads whose queries were permuted and whose keys and values were repeated
(qkv_proj), in a whole model as in a LoRA adapter on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

Shape = tuple[int, ...]
# A parameter of the trained model -> the shape of its shard on each tensor-parallel rank.
Shapes = Mapping[str, Sequence[Shape]]


class Misfit(Exception):
    """Metadata that nothing here knows how to follow, or shards that do not fit it."""


@dataclass(frozen=True)
class Partition:
    """The cut of a parameter into `count` shards along `dimension`."""

    dimension: int
    stride: int
    count: int


@dataclass(frozen=True)
class Slice:
    """`length` rows (or columns) from `start` on of the shard of `rank`."""

    rank: int
    start: int
    length: int


@dataclass(frozen=True)
class Original:
    """A tensor of the original model: slices of the shards of `parameter`, joined along
    `dimension`."""

    name: str
    parameter: str
    dimension: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class FusedLinearsSpec:
    """Linear layers of one input in one: each rank holds its rows of the first, then its rows of
    the second, ..."""

    module: str
    fused_linear_name: str
    linear_names: Sequence[str]
    bias: bool
    fuse_axis: int
    original_dims: Sequence[int]
    tp_size: int

    def originals(self, shapes: Shapes) -> Iterator[Original]:
        if (
            self.bias
            or self.fuse_axis != 0
            or any(size % self.tp_size for size in self.original_dims)
        ):
            raise Misfit(
                f"{self.module}.{self.fused_linear_name}: fused biases, fused inputs and uneven "
                f"rows are not known here ({self})"
            )
        rows = [size // self.tp_size for size in self.original_dims]
        for suffix in ("weight", "lora_B.weight"):
            fused = f"{self.module}.{self.fused_linear_name}.{suffix}"
            if fused in shapes:
                _expect(shapes, fused, self.tp_size, 0, sum(rows))
                for name, length, end in zip(
                    self.linear_names, rows, accumulate(rows), strict=True
                ):
                    slices = tuple(
                        Slice(rank, end - length, length) for rank in range(self.tp_size)
                    )
                    yield Original(f"{self.module}.{name}.{suffix}", fused, 0, slices)
        yield from _copies(shapes, self.module, self.fused_linear_name, self.linear_names)


@dataclass(frozen=True)
class GQAQKVColumnParallelLinearSpec:
    """Attention with more ranks than key-value heads, or a number of them that the ranks do not
    divide.

    The key-value heads are repeated `kv_size_multiplier` times, one round of all of them after
    another, and the queries that attend to a head are spread over its copies; the output
    projection's columns follow the queries.
    """

    module: str
    gqa_qkv_projection_name: str
    query_projection_name: str
    key_projection_name: str
    value_projection_name: str
    output_projection_name: str
    num_attention_heads: int
    num_key_value_heads: int
    kv_size_multiplier: int
    q_output_size_per_partition: int
    kv_output_size_per_partition: int
    fuse_qkv: bool
    bias: bool
    tp_size: int

    def originals(self, shapes: Shapes) -> Iterator[Original]:
        self._check()
        queries, rows = self._query_slices(), self.q_output_size_per_partition
        keys, kv_rows = self._key_slices(), self.kv_output_size_per_partition
        # Name, its letter, its rows in each rank, and where they begin when the three are fused.
        projections = (
            (self.query_projection_name, "q", queries, rows, 0),
            (self.key_projection_name, "k", keys, kv_rows, rows),
            (self.value_projection_name, "v", keys, kv_rows, rows + kv_rows),
        )
        for suffix in ("weight", "lora_B.weight"):
            for name, letter, slices, size, start in projections:
                projection = f"{self.module}.{self.gqa_qkv_projection_name}"
                parameter = f"{projection}.{suffix}_{'qkv' if self.fuse_qkv else letter}"
                if parameter in shapes:
                    _expect(
                        shapes,
                        parameter,
                        self.tp_size,
                        0,
                        rows + 2 * kv_rows if self.fuse_qkv else size,
                    )
                    shift = start if self.fuse_qkv else 0
                    shifted = tuple(
                        Slice(piece.rank, piece.start + shift, piece.length) for piece in slices
                    )
                    yield Original(f"{self.module}.{name}.{suffix}", parameter, 0, shifted)
        for suffix in ("weight", "lora_A.weight"):
            output = f"{self.module}.{self.output_projection_name}.{suffix}"
            if output in shapes:
                _expect(shapes, output, self.tp_size, 1, rows)
                yield Original(output, output, 1, tuple(queries))
        linears = (self.query_projection_name, self.key_projection_name, self.value_projection_name)
        yield from _copies(shapes, self.module, self.gqa_qkv_projection_name, linears)

    def _check(self) -> None:
        heads, kv_heads, copies, ranks = (
            self.num_attention_heads,
            self.num_key_value_heads,
            self.kv_size_multiplier,
            self.tp_size,
        )
        divides = not (
            self.bias
            or heads % (kv_heads * copies)
            or heads % ranks
            or kv_heads * copies % ranks
            or ranks % copies
        )
        same_head = (
            self.q_output_size_per_partition * kv_heads * copies
            == self.kv_output_size_per_partition * heads
        )
        if not (divides and same_head and self.q_output_size_per_partition % (heads // ranks) == 0):
            raise Misfit(
                f"{self.module}.{self.gqa_qkv_projection_name}: heads, copies and ranks do not "
                f"fit each other ({self})"
            )

    def _query_slices(self) -> list[Slice]:
        """Each query head of the original model in order: where it lies."""
        head = self.q_output_size_per_partition // (self.num_attention_heads // self.tp_size)
        attending = self.num_attention_heads // (
            self.num_key_value_heads * self.kv_size_multiplier
        )  # to one copy of a key-value head
        slices = []
        for query in range(self.num_attention_heads):
            kv_head, place = divmod(query, attending * self.kv_size_multiplier)
            copy, place = divmod(place, attending)
            trained = (
                copy * self.num_key_value_heads + kv_head
            ) * attending + place  # its place in the trained model
            rank, place = divmod(trained, self.num_attention_heads // self.tp_size)
            slices.append(Slice(rank, place * head, head))
        return slices

    def _key_slices(self) -> list[Slice]:
        """The first copy of every key-value head: all of the first ranks."""
        size = self.kv_output_size_per_partition
        return [Slice(rank, 0, size) for rank in range(self.tp_size // self.kv_size_multiplier)]


Spec = FusedLinearsSpec | GQAQKVColumnParallelLinearSpec


def original_tensors(
    parameters: Mapping[str, Partition | None], specs: Sequence[Spec], shapes: Shapes
) -> tuple[list[Original], list[str]]:
    """The tensors that the parameters in `shapes` make up, in that order, and what does not fit.
    Without names that the metadata lacks."""
    by_parameter: dict[str, list[Original]] = {}
    problems = []
    for spec in specs:
        try:
            for original in spec.originals(shapes):
                by_parameter.setdefault(original.parameter, []).append(original)
        except Misfit as misfit:
            problems.append(str(misfit))
        except (ArithmeticError, TypeError, ValueError) as error:  # numbers that no model has
            problems.append(f"{spec}: {error!r}")
    for name in shapes:
        if name in parameters and name not in by_parameter:
            try:
                by_parameter[name] = [_joined(name, parameters[name], shapes[name])]
            except Misfit as misfit:
                problems.append(str(misfit))
    return [original for name in shapes for original in by_parameter.get(name, [])], problems


def _joined(name: str, partition: Partition | None, shapes: Sequence[Shape]) -> Original:
    """A parameter that the ranks share as it is: cut along one dimension, or whole on each of them
    (then the first rank's is taken)."""
    if partition is None:
        dimension, stride = 0, 1
    else:
        dimension, stride = partition.dimension, partition.stride
    if stride != 1:
        raise Misfit(
            f"{name}: its shards are interleaved (partition_stride {stride}), and no "
            "transformation says how"
        )
    alike = {
        shape if partition is None else shape[:dimension] + shape[dimension + 1 :]
        for shape in shapes
    }
    if (
        len(alike) != 1
        or not 0 <= dimension < len(shapes[0])
        or (partition and partition.count != len(shapes))
    ):
        raise Misfit(
            f"{name}: shards of shapes {[list(shape) for shape in shapes]} do not join along "
            f"dimension {dimension}"
        )
    used = shapes[:1] if partition is None else shapes
    return Original(
        name,
        name,
        dimension,
        tuple(Slice(rank, 0, shape[dimension]) for rank, shape in enumerate(used)),
    )


def _copies(shapes: Shapes, module: str, fused: str, linears: Iterable[str]) -> Iterator[Original]:
    """Layers that were fused share one lora_A, which every rank has whole."""
    parameter = f"{module}.{fused}.lora_A.weight"
    if parameter in shapes:
        for name in linears:
            yield Original(
                f"{module}.{name}.lora_A.weight",
                parameter,
                0,
                _joined(parameter, None, shapes[parameter]).slices,
            )


def _expect(shapes: Shapes, parameter: str, ranks: int, dimension: int, size: int) -> None:
    """All shards there, two-dimensional, of one shape, with `size` entries along `dimension`."""
    found = shapes[parameter]
    if (
        len(found) != ranks
        or len(set(found)) != 1
        or len(found[0]) != 2
        or found[0][dimension] != size
    ):
        expected = f"{ranks} matrices with {size} {('rows', 'columns')[dimension]}"
        raise Misfit(
            f"{parameter}: the metadata means {expected}, the shards have shapes "
            f"{[list(shape) for shape in found]}"
        )
