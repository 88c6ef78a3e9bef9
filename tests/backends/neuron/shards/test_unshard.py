"""The law of the slices: cutting a weight as optimum-neuron does and joining the slices gives the
weight."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.backends.neuron.shards.metadata import parse_metadata
from stages.backends.neuron.shards.unshard import (
    FusedLinearsSpec,
    GQAQKVColumnParallelLinearSpec,
    Misfit,
    Original,
    Partition,
    original_tensors,
)

HEAD = 2  # rows of a head
HIDDEN = 3


def attention(
    tp: int, kv_heads: int, copies: int, heads: int, fuse_qkv: bool = False, **changes: object
) -> GQAQKVColumnParallelLinearSpec:
    fields = {
        "module": "attention",
        "gqa_qkv_projection_name": "qkv_proj",
        "query_projection_name": "q_proj",
        "key_projection_name": "k_proj",
        "value_projection_name": "v_proj",
        "output_projection_name": "o_proj",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "kv_size_multiplier": copies,
        "q_output_size_per_partition": heads * HEAD // tp,
        "kv_output_size_per_partition": kv_heads * copies * HEAD // tp,
        "fuse_qkv": fuse_qkv,
        "bias": False,
        "tp_size": tp,
    }
    return GQAQKVColumnParallelLinearSpec(**{**fields, **changes})


def joined(original: Original, shards: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    pieces = [
        shards[original.parameter][piece.rank].narrow(original.dimension, piece.start, piece.length)
        for piece in original.slices
    ]
    return torch.cat(pieces, original.dimension)


def shapes(shards: dict[str, list[torch.Tensor]]) -> dict[str, list[tuple[int, ...]]]:
    return {name: [tuple(shard.shape) for shard in pieces] for name, pieces in shards.items()}


@st.composite
def attention_sizes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Ranks, key-value heads, their copies, heads: what neuronx-distributed accepts."""
    copies = draw(st.integers(1, 8))
    tp = copies * draw(st.integers(1, 4))
    kv_heads = tp // copies * draw(st.integers(1, 3))
    return tp, kv_heads, copies, kv_heads * copies * draw(st.integers(1, 4))


def cut(tensor: torch.Tensor, ranks: int, dimension: int = 0) -> list[torch.Tensor]:
    return list(tensor.chunk(ranks, dimension))


@given(sizes=attention_sizes(), fuse_qkv=st.booleans(), adapter=st.booleans())
def test_queries_follow_the_copies_of_their_keys_and_come_back(sizes, fuse_qkv, adapter):
    """The trained model has each key-value head `copies` times, and shares out the queries that
    attend to it among the copies."""
    tp, kv_heads, copies, heads = sizes
    spec = attention(tp, kv_heads, copies, heads, fuse_qkv)
    originals = {
        name: torch.randn(count * HEAD, HIDDEN)
        for name, count in {"q": heads, "k": kv_heads, "v": kv_heads}.items()
    }
    output = torch.randn(HIDDEN, heads * HEAD)
    attending = heads // kv_heads // copies
    order = [
        kv_head * attending * copies + copy * attending + place
        for copy in range(copies)
        for kv_head in range(kv_heads)
        for place in range(attending)
    ]
    trained = {
        "q": cut(originals["q"].view(heads, -1)[order].view(-1, HIDDEN), tp),
        "k": cut(originals["k"].repeat(copies, 1), tp),
        "v": cut(originals["v"].repeat(copies, 1), tp),
    }
    matrix = "lora_B.weight" if adapter else "weight"
    if fuse_qkv:
        shards = {
            f"attention.qkv_proj.{matrix}_qkv": [
                torch.cat(pieces) for pieces in zip(*trained.values(), strict=True)
            ]
        }
    else:
        shards = {f"attention.qkv_proj.{matrix}_{name}": pieces for name, pieces in trained.items()}
    in_output = "attention.o_proj.lora_A.weight" if adapter else "attention.o_proj.weight"
    columns = output.view(HIDDEN, heads, -1)[:, order].reshape(HIDDEN, -1)
    shards[in_output] = cut(columns, tp, 1)
    found, problems = original_tensors({}, [spec], shapes(shards))
    assert not problems
    results = {original.name: joined(original, shards) for original in found}
    for name, original in originals.items():
        assert torch.equal(results.pop(f"attention.{name}_proj.{matrix}"), original)
    assert torch.equal(results.pop(in_output), output)
    assert not results


def test_the_order_of_the_queries_is_the_librarys(written_shards):
    orders = json.loads((written_shards / "queries.json").read_text())
    assert len(orders) > 200
    for sizes in orders:
        spec = attention(sizes["tp"], sizes["kv_heads"], sizes["copies"], sizes["heads"])
        shards = {
            "attention.qkv_proj.weight_q": [(spec.q_output_size_per_partition, HIDDEN)]
            * sizes["tp"]
        }
        (original,), _ = original_tensors({}, [spec], shards)
        for query, piece in enumerate(original.slices):
            assert sizes["ranks"][piece.rank][piece.start // HEAD] == query, sizes


@given(
    rows=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    tp=st.integers(1, 6),
)
def test_fused_layers_come_apart(rows, tp):
    originals = {
        f"layer{number}": torch.randn(count * tp, HIDDEN) for number, count in enumerate(rows)
    }
    spec = FusedLinearsSpec(
        "mlp", "fused", list(originals), False, 0, [count * tp for count in rows], tp
    )
    shards = {
        "mlp.fused.weight": [
            torch.cat(pieces)
            for pieces in zip(*(cut(tensor, tp) for tensor in originals.values()), strict=True)
        ]
    }
    found, problems = original_tensors({}, [spec], shapes(shards))
    assert not problems
    assert [original.name for original in found] == [f"mlp.{name}.weight" for name in originals]
    assert all(
        torch.equal(joined(original, shards), tensor)
        for original, tensor in zip(found, originals.values(), strict=True)
    )


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 1))
def test_a_plain_cut_is_joined_along_its_dimension_though_the_last_shard_be_shorter(
    sizes, dimension
):
    """create_local_weight_with_padding gives the last rank what is left."""
    whole = torch.randn(sum(sizes), HIDDEN) if dimension == 0 else torch.randn(HIDDEN, sum(sizes))
    shards = {"weight": list(whole.split(sizes, dimension))}
    (original,), _ = original_tensors(
        {"weight": Partition(dimension, 1, len(sizes))}, [], shapes(shards)
    )
    assert torch.equal(joined(original, shards), whole)


def test_what_each_rank_has_whole_is_taken_from_the_first():
    (original,), _ = original_tensors({"norm": None}, [], {"norm": [(4,), (4,)]})
    assert [(piece.rank, piece.length) for piece in original.slices] == [(0, 4)]


def test_an_adapter_on_fused_layers_gives_each_the_one_matrix_a():
    spec = FusedLinearsSpec("mlp", "gate_up_proj", ["gate_proj", "up_proj"], False, 0, [4, 4], 2)
    found, problems = original_tensors(
        {}, [spec], {"mlp.gate_up_proj.lora_A.weight": [(1, 6), (1, 6)]}
    )
    assert not problems
    assert [original.name for original in found] == [
        "mlp.gate_proj.lora_A.weight",
        "mlp.up_proj.lora_A.weight",
    ]


@pytest.mark.parametrize(
    ("parameters", "specs", "found", "problem"),
    [
        (
            {"w": Partition(0, 2, 2)},
            [],
            {"w": [(2, 3), (2, 3)]},
            r"w: its shards are interleaved \(partition_stride 2\)",
        ),
        (
            {"w": Partition(0, 1, 2)},
            [],
            {"w": [(2, 3), (2, 4)]},
            r"w: shards of shapes \[\[2, 3\], \[2, 4\]\] do not join along dimension 0",
        ),
        (
            {"w": Partition(0, 1, 3)},
            [],
            {"w": [(2, 3), (2, 3)]},
            r"w: shards of shapes .* do not join",
        ),
        (
            {"w": Partition(2, 1, 2)},
            [],
            {"w": [(2, 3), (2, 3)]},
            r"w: shards of shapes .* do not join along dimension 2",
        ),
        ({"w": None}, [], {"w": [(2, 3), (2, 4)]}, r"w: shards of shapes .* do not join"),
        (
            {},
            [FusedLinearsSpec("mlp", "fused", ["a", "b"], False, 0, [4, 4], 2)],
            {"mlp.fused.weight": [(5, 3), (5, 3)]},
            r"mlp\.fused\.weight: the metadata means 2 matrices with 4 rows, the shards have "
            r"shapes \[\[5, 3\], \[5, 3\]\]",
        ),
        (
            {},
            [FusedLinearsSpec("mlp", "fused", ["a", "b"], True, 0, [4, 4], 2)],
            {},
            r"mlp\.fused: fused biases",
        ),
        (
            {},
            [FusedLinearsSpec("mlp", "fused", ["a", "b"], False, 1, [4, 4], 2)],
            {},
            r"fused inputs",
        ),
        (
            {},
            [FusedLinearsSpec("mlp", "fused", ["a", "b"], False, 0, [4, 5], 2)],
            {},
            r"uneven rows are not known here",
        ),
        (
            {},
            [FusedLinearsSpec("mlp", "fused", ["a", "b"], False, 0, [4, 4], 0)],
            {},
            r"ZeroDivisionError",
        ),
        (
            {},
            [attention(4, 2, 2, 6)],
            {},
            r"attention\.qkv_proj: heads, copies and ranks do not fit each other",
        ),
        ({}, [attention(4, 2, 2, 8, bias=True)], {}, r"heads, copies and ranks do not fit"),
        (
            {},
            [attention(4, 2, 2, 8, q_output_size_per_partition=5)],
            {},
            r"heads, copies and ranks do not fit",
        ),
        (
            {},
            [attention(4, 2, 2, 8)],
            {"attention.o_proj.weight": [(3, 5)] * 4},
            r"attention\.o_proj\.weight: the metadata means 4 matrices with 4 columns",
        ),
        (
            {},
            [attention(4, 2, 2, 8)],
            {"attention.qkv_proj.weight_k": [(2, 3)] * 3},
            r"attention\.qkv_proj\.weight_k: the metadata means 4 matrices with 2 rows",
        ),
    ],
)
def test_shards_that_do_not_fit_their_metadata_are_refused_by_name(
    parameters, specs, found, problem
):
    _, problems = original_tensors(parameters, specs, found)
    assert len(problems) == 1
    assert re.search(problem, problems[0])


def fused_fields(**changes: object) -> dict[str, object]:
    fields = {
        "fused_linear_name": "f",
        "linear_names": ["a", "b"],
        "bias": False,
        "fuse_axis": 0,
        "original_dims": [4, 4],
        "tp_size": 2,
    }
    return {**fields, "peft_type": None, **changes}


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ([], "is not the metadata"),
        ({"parameters": {"w": {}}, "model_weight_transformation_specs": []}, "KeyError"),
        (
            {"parameters": {}, "model_weight_transformation_specs": [{"specs": []}, 7]},
            "is not the metadata",
        ),
        (
            ("os.system", {}),
            r"the transformation os\.system of mlp .* is not one of optimum-neuron 0\.4\.5",
        ),
        (("FusedLinearsSpec", fused_fields(order="up first")), "is not one of optimum-neuron"),
        (
            ("FusedLinearsSpec", fused_fields(peft_type="ia3")),
            "mlp: adapters of type ia3 are not known here",
        ),
    ],
)
def test_metadata_that_nothing_here_knows_is_refused(metadata, problem):
    if isinstance(metadata, tuple):
        metadata = {
            "parameters": {},
            "model_weight_transformation_specs": [
                {"module_fully_qualified_name": "mlp", "specs": [metadata]}
            ],
        }
    with pytest.raises(Misfit, match=problem):
        parse_metadata(metadata)
