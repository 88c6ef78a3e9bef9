"""Is a model folder the model that its config.json describes? Names, shapes and dtypes, without
reading a weight.

Consolidation publishes a folder only when `check_model_folder` returns. A base model, which others
wrote, is given to no training that `base_model_problems` says anything of. `tied_weights` tells
which names are one parameter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.model.headers import listed, read_headers
from stages.model.weights import FLOATING, INDEX_FILE, TensorSpec
from stages.run.errors import StageFailure
from stages.run.layout import CONFIG_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Numbers of a config that the stages uses, under the names that transformers gives them
# whatever the architecture calls them.
COUNTS = (
    *(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ),
    *("head_dim", "max_position_embeddings"),
)
MOST_LAYERS = 1000  # the modules of a layer are made one by one, on the meta device too
# Llama 2's published weights hold this table, which no model reads: transformers passes over it as
# well.
NOT_A_WEIGHT = ".rotary_emb.inv_freq"


def check_model_folder(folder: Path) -> dict[str, Any]:
    """Compare the safetensors headers in `folder` with the model of its config.json; return
    parameters, bytes (of the tensors) and dtype.

    `dtype` is the one that config.json gives. Raises StageFailure that lists what is missing,
    unexpected, of another shape or of another dtype (the first few of each, and how many), and what
    in the index does not match the files.
    """
    headers = read_headers(folder)
    found, size = headers.tensors, sum(spec.nbytes for spec in headers.tensors.values())
    if not headers.problems and (folder / INDEX_FILE).exists():
        headers.problems += _size_problems(folder / INDEX_FILE, size)
    if headers.problems:
        raise StageFailure("\n".join(headers.problems))
    model = described_model(folder)
    expected = _expected_tensors(model)
    problems = [
        *_differences(found, expected),
        *listed(
            "of the wrong dtype",
            (
                f"{name} {a.dtype}, not {b.dtype}"
                for name, a, b in _both(found, expected)
                if a.dtype != b.dtype
            ),
        ),
    ]
    if problems:
        raise StageFailure(
            "\n".join(
                [f"{folder} does not hold the model that its config.json describes.", *problems]
            )
        )
    return {
        "parameters": sum(spec.elements for spec in found.values()),
        "bytes": size,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def base_model_problems(folder: Path) -> list[str]:
    """What keeps the weights in `folder` from being those of the model of its config.json; none is
    read, only headers.

    They may be in another floating dtype than config.json says, and may hold what loaders pass
    over: parameters that are tied to others.
    """
    if (folder / "adapter_config.json").is_file():
        return [
            f"{folder} has an adapter_config.json: loaders would take it for an adapter on "
            "another model. Merge it, or remove the file."
        ]
    headers = read_headers(folder)
    if headers.problems:
        return headers.problems
    try:
        model = described_model(folder)
    except StageFailure as failure:
        return [str(failure)]
    if getattr(model.config, "quantization_config", None):
        return [
            f"{folder}: its config.json says that the weights are quantised. Name the model that "
            "they were made from."
        ]
    expected, tied = _expected_tensors(model), _tied(model)
    found = {
        name: spec
        for name, spec in headers.tensors.items()
        if name not in tied and not name.endswith(NOT_A_WEIGHT)
    }
    wrong = (
        f"{name} {spec.dtype}"
        for name, spec, wanted in _both(found, expected)
        if {spec.dtype, wanted.dtype} - {*FLOATING}
    )
    differences = [*_differences(found, expected), *listed("not of a floating dtype", wrong)]
    heading = (
        f"{folder}: the weights are not those of the model that its config.json describes. "
        "Fetch both again from one place."
    )
    return ["\n".join([heading, *differences])] if differences else []


def tied_weights(folder: Path) -> dict[str, str]:
    """Names that config.json makes the same parameter as an earlier name: `lm_head.weight` ->
    `model.embed_tokens.weight`."""
    return _tied(described_model(folder))


def untied(name: str, kept: str) -> StageFailure:
    """The failure for two names that are one parameter in config.json and that training made
    different."""
    return StageFailure(
        f"{name} and {kept} are one parameter in config.json but two different ones in the shards: "
        "training untied them. Set tie_word_embeddings to false, or train with them tied."
    )


def pretrained_config(folder: Path) -> Any:
    """The `PretrainedConfig` in `folder`. Raises StageFailure where there is none, or one that no
    model can be made from."""
    from transformers import CONFIG_MAPPING, AutoConfig

    path = folder / CONFIG_FILE
    if not path.is_file():
        raise StageFailure(
            f"{folder} has no config.json, so nothing says what its weights should be."
        )
    try:
        described = json.loads(path.read_bytes())
        kind = described["model_type"]
        if kind not in CONFIG_MAPPING and "auto_map" in described:
            raise StageFailure(
                f"{path}: {kind!r} is a model with code of its own (auto_map), which is never "
                "run. Choose another model."
            )
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except StageFailure:
        raise
    except Exception as error:  # transformers' constructors uses whatever they are given
        reason = str(error).partition("\n")[0] if isinstance(error, ValueError) else repr(error)
        raise StageFailure(f"{path} cannot be used: {reason}") from error
    if problems := list(_count_problems(config)):
        raise StageFailure(f"{path} cannot be used: {'; '.join(problems)}.")
    return config


def described_model(folder: Path) -> PreTrainedModel:
    """The model of config.json on the meta device, where tensors have shapes and dtypes but no
    memory; StageFailure where there is none."""
    import torch
    from transformers import AutoModelForCausalLM

    config = pretrained_config(folder)
    try:
        with torch.device("meta"):
            # A config can name a kernel on the Hub as its attention; here it names none.
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, attn_implementation="eager"
            )
    except Exception as error:  # as above
        raise StageFailure(
            f"{folder / 'config.json'} does not describe a causal language model: {error}"
        ) from error


def _count_problems(config: Any) -> Iterator[str]:
    for name in COUNTS:
        value = getattr(config, name, None)
        if value is not None and not (type(value) is int and value > 0):
            yield f"{name} is {value!r}, and not a whole number above 0"
    layers = getattr(config, "num_hidden_layers", None)
    if type(layers) is int and layers > MOST_LAYERS:
        yield f"num_hidden_layers is {layers:,}, above {MOST_LAYERS:,}"


def _tied(model: PreTrainedModel) -> dict[str, str]:
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kept = first.setdefault(id(parameter), name)
        if kept != name:
            tied[name] = kept
    return tied


def _expected_tensors(model: PreTrainedModel) -> dict[str, TensorSpec]:
    tied = _tied(model)
    return {
        name: TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def _both(
    found: dict[str, TensorSpec], expected: dict[str, TensorSpec]
) -> Iterator[tuple[str, TensorSpec, TensorSpec]]:
    return ((name, spec, expected[name]) for name, spec in found.items() if name in expected)


def _differences(found: dict[str, TensorSpec], expected: dict[str, TensorSpec]) -> list[str]:
    shapes = (
        f"{name} {list(a.shape)}, not {list(b.shape)}"
        for name, a, b in _both(found, expected)
        if a.shape != b.shape
    )
    return [
        *listed("missing", (name for name in expected if name not in found)),
        *listed("unexpected", (name for name in found if name not in expected)),
        *listed("of the wrong shape", shapes),
    ]


def _size_problems(index: Path, size: int) -> Iterator[str]:
    """What is written here says the size of the tensors; published models' indexes count what they
    like."""
    try:
        total = json.loads(index.read_bytes())["metadata"]["total_size"]
    except (KeyError, TypeError) as error:
        yield f"{index} is not an index of weights: {error!r}."
        return
    if total != size:
        yield (
            f"{index} does not match the files beside it.\ntotal_size is {total}, the tensors "
            f"have {size} bytes"
        )
