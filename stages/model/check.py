"""Is a written model folder the model that its config.json describes? Names, shapes and dtypes, without reading a weight.

Consolidation publishes a folder only when `check_model_folder` returns; `tied_weights` tells it which names are one parameter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.model.weights import DTYPES, INDEX_FILE, SINGLE_FILE, TensorSpec
from stages.run.errors import StageFailure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES_SHOWN = 5


def check_model_folder(folder: Path) -> dict[str, Any]:
    """Compare the safetensors headers in `folder` with the model of its config.json; return parameters, bytes (of the tensors) and dtype.

    `dtype` is the one that config.json gives. Raises StageFailure that lists what is missing, unexpected, of another shape or of another
    dtype (the first few of each, and how many), and what in the index does not match the files.
    """
    found = _written_tensors(folder)
    model = _described_model(folder)
    expected = _expected_tensors(model)
    problems = [
        *_listed("missing", (name for name in expected if name not in found)),
        *_listed("unexpected", (name for name in found if name not in expected)),
    ]
    both = [(spec, expected[name]) for name, spec in found.items() if name in expected]
    problems += _listed("of the wrong shape", (f"{a.name} {list(a.shape)}, not {list(b.shape)}" for a, b in both if a.shape != b.shape))
    problems += _listed("of the wrong dtype", (f"{a.name} {a.dtype}, not {b.dtype}" for a, b in both if a.dtype != b.dtype))
    if problems:
        raise StageFailure("\n".join([f"{folder} does not hold the model that its config.json describes.", *problems]))
    return {
        "parameters": sum(spec.elements for spec in found.values()),
        "bytes": sum(spec.nbytes for spec in found.values()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def tied_weights(folder: Path) -> dict[str, str]:
    """Names that config.json makes the same parameter as an earlier name: `lm_head.weight` -> `model.embed_tokens.weight`."""
    return _tied(_described_model(folder))


def _described_model(folder: Path) -> PreTrainedModel:
    """The model of config.json on the meta device, where tensors have shapes and dtypes but no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise StageFailure(f"{folder} has no config.json, so nothing says what its weights should be.")
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise StageFailure(f"{folder / 'config.json'} does not describe a causal language model: {error}") from error


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


def _written_tensors(folder: Path) -> dict[str, TensorSpec]:
    """What the headers of the safetensors files say; StageFailure where a file is damaged or the index disagrees with the files."""
    from safetensors import SafetensorError, safe_open

    names = {code: dtype for dtype, (code, _) in DTYPES.items()}
    tensors: dict[str, TensorSpec] = {}
    places: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    entry = file.get_slice(name)
                    if name in places:
                        raise StageFailure(f"{folder}: {name} is in {places[name]} and in {path.name}.")
                    if entry.get_dtype() not in names:
                        raise StageFailure(f"{path}: {name} has the dtype {entry.get_dtype()}, which nothing here writes.")
                    tensors[name] = TensorSpec(name, tuple(entry.get_shape()), names[entry.get_dtype()])
                    places[name] = path.name
        except SafetensorError as error:  # also when the file is shorter or longer than its header says
            raise StageFailure(f"{path} is damaged: {error}.") from error
    _check_index(folder, places, tensors)
    return tensors


def _check_index(folder: Path, places: Mapping[str, str], tensors: Mapping[str, TensorSpec]) -> None:
    files = set(places.values())
    path = folder / INDEX_FILE
    if not path.exists():
        if files != {SINGLE_FILE}:
            raise StageFailure(f"{folder} holds {sorted(files) or 'no weights'} and no {INDEX_FILE}: loaders look for {SINGLE_FILE}.")
        return
    try:
        index = json.loads(path.read_text())
        listed, total = dict(index["weight_map"]), index["metadata"]["total_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise StageFailure(f"{path} is not an index of weights: {error!r}.") from error
    wrong = [
        f"{name} (index: {listed.get(name, 'nowhere')}, file: {places.get(name, 'none')})"
        for name in {**listed, **places}
        if listed.get(name) != places.get(name)
    ]
    size = sum(spec.nbytes for spec in tensors.values())
    if wrong or total != size:
        sizes = [f"total_size is {total}, the tensors have {size} bytes"] if total != size else []
        raise StageFailure("\n".join([f"{path} does not match the files beside it.", *_listed("misplaced", wrong), *sizes]))


def _listed(kind: str, items: Iterable[str]) -> list[str]:
    """One line, `kind (count): first, second, ...`, or none where there are no items."""
    every = list(items)
    more = f", and {len(every) - NAMES_SHOWN} more" if len(every) > NAMES_SHOWN else ""
    return [f"{kind} ({len(every)}): {', '.join(every[:NAMES_SHOWN])}{more}"] if every else []
