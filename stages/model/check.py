"""Check that a model folder holds the model of its config.json: names, shapes and dtypes. No weight
is read.

Consolidation publishes a folder only when `check_model_folder` returns. Training uses a base model
only when `base_model_problems` returns none. `tied_weights` names the parameters with two names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.model.config import translated_config
from stages.model.files import INDEX_FILE, listed, weight_files
from stages.model.headers import read_headers
from stages.model.weights import FLOATING, TensorSpec
from stages.run.errors import StageFailure
from stages.run.layout import CONFIG_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Numbers of a config that the stages use, under the names that transformers gives them for every
# architecture.
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
MOST_LAYERS = 1000  # the modules of each layer are created, on the meta device too
# Keys that tools leave in config.json about the file, and a former name of dtype.
NOT_OF_THE_MODEL = ("_name_or_path", "_commit_hash", "_attn_implementation_autoset", "torch_dtype")
# Llama 2's published weights hold this table, which no model reads: transformers ignores it too.
NOT_A_WEIGHT = ".rotary_emb.inv_freq"


def check_model_folder(folder: Path) -> dict[str, Any]:
    """Compare the safetensors headers in `folder` with the model of its config.json; return
    parameters, bytes (of the tensors) and dtype.

    `dtype` is that of config.json. Raises StageFailure that lists the tensors that are missing,
    unexpected, of another shape or of another dtype (the first few of each, and their number), and
    the entries of the index that do not match the files.
    """
    headers = read_headers(folder)
    actual, size = headers.tensors, sum(spec.nbytes for spec in headers.tensors.values())
    if not headers.problems and (folder / INDEX_FILE).exists():
        headers.problems += _size_problems(folder / INDEX_FILE, size)
    if headers.problems:
        raise StageFailure("\n".join(headers.problems))
    model = described_model(folder)
    expected = _expected_tensors(model)
    problems = [
        *_differences(actual, expected),
        *listed(
            "of the wrong dtype",
            (
                f"{name} {a.dtype}, not {b.dtype}"
                for name, a, b in _both(actual, expected)
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
        "parameters": sum(spec.elements for spec in actual.values()),
        "bytes": size,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def base_model_problems(folder: Path) -> list[str]:
    """Why the weights in `folder` are not those of the model of its config.json. Only headers are
    read.

    The weights may have another floating dtype than config.json says, and may include parameters
    that loaders ignore because they are tied to others.
    """
    if (folder / "adapter_config.json").is_file():
        return [
            f"{folder} has an adapter_config.json: loaders would treat it as an adapter of "
            "another model. Merge it, or remove the file."
        ]
    headers = read_headers(folder, weight_files(folder))
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
    actual = {
        name: spec
        for name, spec in headers.tensors.items()
        if name not in tied and not name.endswith(NOT_A_WEIGHT)
    }
    not_floating = (
        f"{name} {spec.dtype}"
        for name, spec, described in _both(actual, expected)
        if {spec.dtype, described.dtype} - {*FLOATING}
    )
    differences = [
        *_differences(actual, expected),
        *listed("not of a floating dtype", not_floating),
    ]
    heading = (
        f"{folder}: the weights are not those of the model that its config.json describes. "
        "Fetch both again from one place."
    )
    return ["\n".join([heading, *differences])] if differences else []


def tied_weights(folder: Path) -> dict[str, str]:
    """Names that config.json ties to an earlier name: `lm_head.weight` ->
    `model.embed_tokens.weight`."""
    return _tied(described_model(folder))


def untied(name: str, kept: str) -> StageFailure:
    """The failure for two names that are one parameter in config.json but differ after training."""
    return StageFailure(
        f"{name} and {kept} are one parameter in config.json but two different ones in the shards: "
        "training untied them. Set tie_word_embeddings to false, or train with them tied."
    )


def pretrained_config(folder: Path) -> Any:
    """The `PretrainedConfig` in `folder`, whichever version of transformers wrote it. Raises
    StageFailure where there is no valid one."""
    from transformers import CONFIG_MAPPING

    path = folder / CONFIG_FILE
    values, _ = translated_config(folder)
    try:
        kind = values["model_type"]
        if kind not in CONFIG_MAPPING:
            reason = (
                "a model with code of its own (auto_map), which is never run"
                if "auto_map" in values
                else "not a model that the installed transformers knows"
            )
            raise StageFailure(
                f"{path} cannot be used: {kind!r} is {reason}. Choose another model."
            )
        config = CONFIG_MAPPING[kind].from_dict(values)
    except StageFailure:
        raise
    except Exception as error:  # transformers' constructors raise anything for bad values
        reason = str(error).partition("\n")[0] if isinstance(error, ValueError) else repr(error)
        raise StageFailure(f"{path} cannot be used: {reason}") from error
    problems = list(_count_problems(config))
    partial = "partial_rotary_factor"
    if partial in unused_keys(config, values):
        # The architecture ignores it, but the function that makes RoPE's table does not.
        problems.append(f"{partial} is {values[partial]!r}, and a {kind} turns whole heads")
    if problems:
        raise StageFailure(f"{path} cannot be used: {'; '.join(problems)}.")
    return config


def unused_keys(config: Any, values: dict[str, Any]) -> list[str]:
    """The keys of a config.json (`values`) that `config`, made from it, has no use for: the
    architecture does not know them, so they change nothing."""
    kind = type(config)
    known = {*kind().to_dict(), *kind.attribute_map, *NOT_OF_THE_MODEL}
    return [name for name in values if name not in known]


def described_model(folder: Path) -> PreTrainedModel:
    """The model of config.json on the meta device, where tensors have shapes and dtypes but no
    memory. Raises StageFailure where config.json gives no model."""
    import torch
    from transformers import AutoModelForCausalLM

    config = pretrained_config(folder)
    try:
        with torch.device("meta"):
            # A config can name a kernel on the Hub as its attention; eager uses none.
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, attn_implementation="eager"
            )
    except Exception as error:  # as in pretrained_config
        raise StageFailure(
            f"{folder / 'config.json'} does not describe a causal language model: {error}"
        ) from error


def _count_problems(config: Any) -> Iterator[str]:
    for name in COUNTS:
        value = getattr(config, name, None)
        if value is not None and not (type(value) is int and value > 0):
            yield f"{name} is {value!r}, not a whole number above 0"
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
    actual: dict[str, TensorSpec], expected: dict[str, TensorSpec]
) -> Iterator[tuple[str, TensorSpec, TensorSpec]]:
    return ((name, spec, expected[name]) for name, spec in actual.items() if name in expected)


def _differences(actual: dict[str, TensorSpec], expected: dict[str, TensorSpec]) -> list[str]:
    shapes = (
        f"{name} {list(a.shape)}, not {list(b.shape)}"
        for name, a, b in _both(actual, expected)
        if a.shape != b.shape
    )
    return [
        *listed("missing", (name for name in expected if name not in actual)),
        *listed("unexpected", (name for name in actual if name not in expected)),
        *listed("of the wrong shape", shapes),
    ]


def _size_problems(index: Path, size: int) -> Iterator[str]:
    """Compare the size in an index that this project wrote; the indexes of published models count
    differently."""
    try:
        total = json.loads(index.read_bytes())["metadata"]["total_size"]
    except (KeyError, TypeError) as error:
        yield f"{index} is not an index of weights: {error!r}."
        return
    if total != size:
        yield (
            f"{index} does not match the files next to it.\ntotal_size is {total}, the tensors "
            f"have {size} bytes"
        )
