"""The first layers of a model, as a model: everything else is as in the whole one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from stages.model.files import SINGLE_FILE, weight_files
from stages.run.json_file import write_json
from stages.run.layout import CONFIG_FILE

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def cut_model(base: Path, layers: int, output: Path) -> int:
    """Write the first `layers` layers of the model in `base` to the folder `output`; returns how
    many layers `base` has. A model that has no more is written whole."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = json.loads((base / CONFIG_FILE).read_text(encoding="utf-8"))
    whole = config["num_hidden_layers"]
    kept = min(layers, whole)
    weights: dict[str, Any] = {}
    for name in weight_files(base):
        with safe_open(base / name, framework="pt") as file:
            for tensor in file.keys():  # noqa: SIM118 (not a mapping)
                layer = _LAYER.search(tensor)
                if layer is None or int(layer[1]) < kept:
                    weights[tensor] = file.get_tensor(tensor)
    shutil.rmtree(output, ignore_errors=True)  # it may be of another model
    output.mkdir(parents=True)
    save_file(weights, output / SINGLE_FILE, metadata={"format": "pt"})
    write_json(output / CONFIG_FILE, _cut_config(config, kept))
    for path in base.glob("*.json"):
        if path.name != CONFIG_FILE and not path.name.endswith(".index.json"):
            (output / path.name).write_bytes(path.read_bytes())
    return int(whole)


def _cut_config(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config with fewer layers; lists of one value for each layer are cut too, and those of
    token ids, which may be as long, are not."""
    whole = config["num_hidden_layers"]
    cut = {
        name: value[:layers] if _is_of_layers(name, value, whole) else value
        for name, value in config.items()
    }
    return {**cut, "num_hidden_layers": layers}


def _is_of_layers(name: str, value: object, layers: int) -> bool:
    return isinstance(value, list) and len(value) == layers and not name.endswith("_token_id")
