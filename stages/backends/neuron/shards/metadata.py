"""mp_metadata_pp_rank_PP.json, which optimum-neuron 0.4.5 writes next to its shards: how each
parameter is cut, and which layers were fused or rearranged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from stages.backends.neuron.shards.unshard import (
    FusedLinearsSpec,
    GQAQKVColumnParallelLinearSpec,
    Misfit,
    Partition,
    Spec,
)

LARGEST_SIZE = 1 << 24  # of heads, rows, ranks
# The parameters of a linear layer's adapter have the adapter's name in the metadata, not in the
# shards.
ADAPTER_NAME = re.compile(r"(\.lora_(?:embedding_)?[AB])\.\w+")
SPECS: dict[str, type[Spec]] = {
    kind.__name__: kind for kind in (FusedLinearsSpec, GQAQKVColumnParallelLinearSpec)
}


def parse_metadata(metadata: Any) -> tuple[dict[str, Partition | None], list[Spec]]:
    """Parameter -> its cut (None: every rank has all of it), and the specs. Raises Misfit for what
    nothing here knows."""
    try:
        parameters = {
            _without_adapter_name(name): _partition(fields)
            for name, fields in metadata["parameters"].items()
        }
        specs = [
            _spec(entry["module_fully_qualified_name"], kind, fields)
            for entry in metadata["model_weight_transformation_specs"]
            for kind, fields in entry["specs"]
        ]
        return parameters, specs
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise Misfit(f"it is not the metadata of optimum-neuron's shards: {error!r}") from error


def _without_adapter_name(name: str) -> str:
    return ADAPTER_NAME.sub(r"\1", name)


def _partition(fields: Mapping[str, Any]) -> Partition | None:
    if not fields["tensor_model_parallel"]:
        return None
    return Partition(
        int(fields["partition_dim"]), int(fields["partition_stride"]), int(fields["num_partitions"])
    )


def _spec(module: str, kind: str, values: Mapping[str, Any]) -> Spec:
    others = {name: value for name, value in values.items() if name != "peft_type"}
    if kind not in SPECS or set(others) != set(SPECS[kind].__dataclass_fields__) - {"module"}:
        raise Misfit(
            f"the transformation {kind} of {module} with {sorted(others)} is not one of "
            f"optimum-neuron 0.4.5 ({', '.join(SPECS)})"
        )
    if values.get("peft_type") not in (None, "lora"):
        raise Misfit(
            f"{module}: adapters of type {values['peft_type']} are not known here, only LoRA"
        )
    spec = SPECS[kind](module=module, **others)
    for field in fields(spec):
        if not _is(str(field.type), getattr(spec, field.name)):
            raise Misfit(
                f"{module}: {field.name} of its transformation {kind} is not what it is in "
                f"optimum-neuron 0.4.5 ({field.type})"
            )
    return spec


def _is(kind: str, value: Any) -> bool:
    """Whether a value that was read from JSON is of the kind that a spec's field is annotated with.
    A size is a count of something."""
    if kind.startswith("Sequence["):
        return isinstance(value, list) and all(
            _is(kind[len("Sequence[") : -1], item) for item in value
        )
    if kind == "int":
        return type(value) is int and 0 <= value <= LARGEST_SIZE
    return type(value).__name__ == kind
