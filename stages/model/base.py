"""Where the base model comes from: a local folder, the Hub, or random weights made from a config.

Hands on a local folder in the Hugging Face layout with safetensors in it. Nothing downloaded is executed: no remote
code, no pickles.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from stages.model.hub import download_files
from stages.run.errors import InputError
from stages.run.lock import locked
from stages.run.settings import Settings

# Random base models live beside the runs that share them.
RANDOM_MODELS = Path("outputs/.cache/models")


def load_config(settings: Settings) -> Any:
    """The `PretrainedConfig` of MODEL_ID; raises InputError when there is none that can be read."""
    from transformers import AutoConfig

    folder = Path(settings.model_id)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"MODEL_ID={settings.model_id} has no config.json. Name a folder in the Hugging Face layout.")
    else:
        folder = download_files(settings.model_id, settings.model_revision, ("config.json",))
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"MODEL_ID={settings.model_id}: its config.json cannot be used: {reason}") from None


def base_model_folder(settings: Settings) -> Path:
    """A local folder with config.json and the base model's safetensors, downloaded or made where it is not there yet."""
    if settings.init_weights == "random":
        return _random_model(settings)
    folder = Path(settings.model_id)
    if not folder.is_dir():
        folder = download_files(settings.model_id, settings.model_revision, ("*.json", "*.safetensors"))
    if not any(folder.glob("*.safetensors")):
        pickles = any(folder.glob("*.bin"))
        found = "has weights as pickles (.bin) alone, which can run code when opened" if pickles else "holds no weights"
        remedy = "Convert them to safetensors" if pickles else "Name another model, or set INIT_WEIGHTS=random"
        raise InputError(f"MODEL_ID={settings.model_id} {found}. {remedy}.")
    return folder


def copy_description(base: Path, data: Path, output: Path) -> None:
    """Put beside trained weights in `output` what describes them: the base model's config, the data's tokenizer and prompt."""
    for name in ("config.json", "generation_config.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, output / name)
    shutil.copytree(data / "tokenizer", output / "tokenizer", dirs_exist_ok=True)
    shutil.copyfile(data / "prompt.json", output / "prompt.json")


def _random_model(settings: Settings) -> Path:
    """Random float32 weights: a function of the config and SEED alone, so that every stage finds the same."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(settings)
    key = hashlib.sha256(f"{config.to_json_string()} {settings.seed}".encode()).hexdigest()[:16]
    folder = RANDOM_MODELS / key
    if folder.is_dir():
        return folder
    with locked(RANDOM_MODELS, "random base model"):
        if not folder.is_dir():  # else another run made it meanwhile
            torch.manual_seed(settings.seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            beside = folder.with_name(f"{key}.making")
            shutil.rmtree(beside, ignore_errors=True)
            model.save_pretrained(beside)
            beside.rename(folder)
    return folder
