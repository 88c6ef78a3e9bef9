"""Where the base model comes from: a local folder, the Hub, or random weights made from a config.

Hands on a local folder in the Hugging Face layout with safetensors in it that fit its config.json.
Nothing that was downloaded is executed: no code that a model brings, and no pickles but where
ALLOW_PICKLE=1 asks for their tensors.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.model.check import base_model_problems, pretrained_config, tied_weights
from stages.model.from_pickles import PICKLE_INDEX, content_of, convert, pickled_files
from stages.model.hub import download_files
from stages.model.location import local_model
from stages.run.disk import disk_guard
from stages.run.errors import InputError, StageFailure
from stages.run.fsync import fsync_tree
from stages.run.layout import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    PICKLED_WEIGHTS,
    PROMPT_FILE,
    TOKENIZER_FOLDER,
)
from stages.run.lock import locked
from stages.run.settings import Settings

# Base models that were made here, random or from pickles, are next to the runs that share them.
MADE_MODELS = Path("outputs/.cache/models")
CONFIG_FILES = (CONFIG_FILE, GENERATION_CONFIG_FILE)


def base_config(settings: Settings) -> Any:
    """The `PretrainedConfig` of MODEL_ID; raises InputError where none can be read."""
    try:
        return pretrained_config(config_folder(settings.model_id, settings.model_revision))
    except StageFailure as failure:
        raise InputError(
            f"MODEL_ID={settings.model_id}: {failure} Name a folder in the Hugging Face layout."
        ) from failure


def config_folder(model: str, revision: str) -> Path:
    """A local folder with the model's config.json, which is downloaded where it is on the Hub."""
    return local_model(model) or download_files(model, revision, (CONFIG_FILE,))


def base_model_folder(settings: Settings) -> Path:
    """A local folder with config.json and the base model's safetensors, downloaded or made where it
    does not exist yet.

    Raises InputError for weights that do not exist, damaged, pickles, or not those of the model
    that config.json describes.
    """
    if settings.init_weights == "random":
        return _random_model(settings)
    base_config(settings)  # for its refusals, before gigabytes of weights
    folder = local_model(settings.model_id) or download_files(
        settings.model_id, settings.model_revision, ("*.json", "*.safetensors")
    )
    if not any(folder.glob("*.safetensors")):
        folder = _from_pickles(settings, folder)
    if problems := base_model_problems(folder):
        raise InputError(f"MODEL_ID={settings.model_id}: {problem}" for problem in problems)
    return folder


def copy_config(base: Path, data: Path, output: Path) -> None:
    """Put beside trained weights in `output` what describes them: the base model's config, the
    data's tokenizer and prompt."""
    for name in CONFIG_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, output / name)
    shutil.copytree(data / TOKENIZER_FOLDER, output / TOKENIZER_FOLDER, dirs_exist_ok=True)
    shutil.copyfile(data / PROMPT_FILE, output / PROMPT_FILE)


def _from_pickles(settings: Settings, folder: Path) -> Path:
    """The folder with its pickled weights as safetensors, if there are such and ALLOW_PICKLE=1."""
    model = f"MODEL_ID={settings.model_id}"
    if not settings.allow_pickle:
        if any(folder.glob(PICKLED_WEIGHTS)) or (folder / PICKLE_INDEX).is_file():
            raise InputError(
                f"{model} has weights as pickles (.bin) alone, which can run code when opened. "
                "Set ALLOW_PICKLE=1 to have the tensors read "
                "from them and nothing else, or convert them to safetensors."
            )
        remedy = (
            "Name another model, or set INIT_WEIGHTS=random; ALLOW_PICKLE=1 looks for "
            "pickled weights too"
        )
        raise InputError(f"{model} holds no weights (.safetensors). {remedy}.")
    if local_model(settings.model_id) is None:
        folder = download_files(
            settings.model_id, settings.model_revision, ("*.json", PICKLED_WEIGHTS)
        )

    def write(made: Path) -> None:
        print(f"{model}: its pickles as safetensors, in {MADE_MODELS}", flush=True)
        for path in described:
            shutil.copyfile(path, made / path.name)
        convert(files, tied_weights(folder), made)

    try:
        files = pickled_files(folder)
        described = [folder / name for name in CONFIG_FILES if (folder / name).is_file()]
        return _made_once(content_of([*files, *described]), f"{model}, from pickles", write)
    except StageFailure as failure:
        raise InputError(f"{model}: {failure}") from failure


def _random_model(settings: Settings) -> Path:
    """Random float32 weights: a function of the config and SEED alone, so that every stage finds
    the same."""
    import torch
    from transformers import AutoModelForCausalLM

    config = base_config(settings)
    digest = hashlib.sha256(f"{config.to_json_string()} {settings.seed}".encode()).hexdigest()

    def write(made: Path) -> None:
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
        with disk_guard(f"the random base model {made}", made, 4 * model.num_parameters()):
            model.save_pretrained(made)

    return _made_once(digest, "random base model", write)


def _made_once(digest: str, what: str, write: Callable[[Path], None]) -> Path:
    """The folder of the model that `digest` stands for; `write` fills it where no run has yet."""
    folder = MADE_MODELS / digest[:16]
    if folder.is_dir():
        return folder
    with locked(MADE_MODELS, what):
        if not folder.is_dir():  # else another run made it meanwhile
            beside = folder.with_name(f"{folder.name}.making")
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            try:
                write(beside)
                for weights in beside.glob("*.safetensors"):
                    shutil.copymode(
                        beside / CONFIG_FILE, weights
                    )  # safetensors lets only the owner read
                fsync_tree(beside)
                beside.rename(folder)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                raise
    return folder
