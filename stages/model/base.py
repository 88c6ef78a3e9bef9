"""Provide the base model: from a local folder, from the Hub, or random weights from a config.

Returns a local folder in the Hugging Face layout whose safetensors fit its config.json. Nothing
that was downloaded is executed: no code of a model, and no pickles, of which ALLOW_PICKLE=1 reads
only the tensors.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.model.check import (
    base_model_problems,
    pretrained_config,
    tied_weights,
    unused_keys,
)
from stages.model.config import generation_config, generation_settings, translated_config
from stages.model.files import (
    CONFIG_FILES,
    INDEX_FILE,
    PICKLE_INDEX,
    SINGLE_FILE,
    ignored_files,
    weight_files,
    weight_map,
)
from stages.model.from_pickles import content_of, convert, pickled_files
from stages.model.hub import download_files
from stages.model.location import local_model
from stages.run.disk import disk_guard
from stages.run.errors import InputError, StageFailure
from stages.run.fsync import written_whole
from stages.run.layout import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    PICKLED_WEIGHTS,
    PROMPT_FILE,
    TOKENIZER_FOLDER,
)
from stages.run.lock import locked
from stages.run.settings import Settings

# Base models that this module creates, random or from pickles. All runs share them.
MADE_MODELS = Path("outputs/.cache/models")


def base_config(settings: Settings) -> Any:
    """The `PretrainedConfig` of MODEL_ID; raises InputError where it cannot be read."""
    try:
        return pretrained_config(config_folder(settings.model_id, settings.model_revision))
    except StageFailure as failure:
        raise InputError(
            f"MODEL_ID={settings.model_id}: {failure} Name a folder in the Hugging Face layout."
        ) from failure


def config_folder(model: str, revision: str) -> Path:
    """A local folder with the model's configs, which are downloaded from the Hub if needed."""
    return local_model(model) or download_files(model, revision, CONFIG_FILES)


def config_notes(folder: Path) -> list[str]:
    """A line for each thing in `folder`'s config.json that is read in another way than it is
    written, or not at all. Raises StageFailure where one of its configs cannot be used."""
    config = pretrained_config(folder)
    if (folder / GENERATION_CONFIG_FILE).is_file():
        generation_config(folder)
    values, lines = translated_config(folder)
    if unused := unused_keys(config, values):
        lines.append(f"{', '.join(unused)}: not used by a {config.model_type}")
    return [f"config.json, {line}." for line in lines]


def base_model_folder(settings: Settings) -> Path:
    """A local folder with config.json and the base model's safetensors, downloaded or created if it
    does not exist yet. It has only what is read, under names and keys with one meaning.

    Raises InputError for weights that are missing, damaged, pickles, or not those of the model that
    config.json describes.
    """
    base_config(settings)  # raises before gigabytes of weights are downloaded
    try:
        for note in config_notes(config_folder(settings.model_id, settings.model_revision)):
            _say(f"MODEL_ID={settings.model_id}: {note}")
    except StageFailure as failure:
        raise InputError(f"MODEL_ID={settings.model_id}: {failure}") from failure
    if settings.init_weights == "random":
        return _random_model(settings)
    folder = local_model(settings.model_id) or _fetched(settings)
    is_adapter = (folder / "adapter_config.json").is_file()
    if not any(folder.glob("*.safetensors")) and not is_adapter:
        folder = _from_pickles(settings, folder)
    if problems := base_model_problems(folder):
        raise InputError(f"MODEL_ID={settings.model_id}: {problem}" for problem in problems)
    if ignored := ignored_files(folder):
        _say(
            f"MODEL_ID={settings.model_id}: {', '.join(ignored)}: not read; the weights are in "
            f"{weight_files(folder)[0]}."
        )
    return _as_read(folder)


def copy_config(base: Path, data: Path, output: Path) -> None:
    """Copy the base model's config, the tokenizer and the prompt template to `output`, next to the
    trained weights."""
    for name in CONFIG_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, output / name)
    shutil.copytree(data / TOKENIZER_FOLDER, output / TOKENIZER_FOLDER, dirs_exist_ok=True)
    shutil.copyfile(data / PROMPT_FILE, output / PROMPT_FILE)


def _fetched(settings: Settings) -> Path:
    """The model's folder in the Hub's cache, with the weights that loaders look for and no second
    copy of them."""
    model, revision = settings.model_id, settings.model_revision
    folder = download_files(model, revision, ("*.json",))
    names = {SINGLE_FILE}
    if (folder / INDEX_FILE).is_file():
        try:
            names = {*weight_map(folder / INDEX_FILE).values()}
        except ValueError as error:
            raise InputError(f"MODEL_ID={model}: {error}") from error
    folder = download_files(model, revision, ("*.json", *sorted(names)))
    if not all((folder / name).exists() for name in names):  # an index that was left behind
        folder = download_files(model, revision, ("*.json", SINGLE_FILE))
    return folder


def _as_read(folder: Path) -> Path:
    """`folder`, or where it has more than is read, or a config.json that says it in other words: a
    folder with links to what is read, which no library can understand otherwise."""
    values, changes = translated_config(folder)
    if not changes and not ignored_files(folder):
        return folder
    original = json.loads((folder / CONFIG_FILE).read_bytes())
    generation = generation_settings(original)
    if {"temperature", "top_k", "top_p"} & generation.keys():
        generation.setdefault("do_sample", True)  # what they are for
    names = weight_files(folder)
    if (folder / GENERATION_CONFIG_FILE).is_file():
        names, generation = [*names, GENERATION_CONFIG_FILE], {}
    key = json.dumps([str(folder.resolve()), original, values, names])

    def write(output: Path) -> None:
        (output / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if generation:
            text = json.dumps(generation, indent=2) + "\n"
            (output / GENERATION_CONFIG_FILE).write_text(text, encoding="utf-8")
        for name in names:
            (output / name).symlink_to((folder / name).resolve())

    return _create_once(hashlib.sha256(key.encode()).hexdigest(), "base model", write)


@functools.cache
def _say(line: str) -> None:
    """Print a line, once a process."""
    print(f"note: {line}", flush=True)


def _from_pickles(settings: Settings, folder: Path) -> Path:
    """A folder with the pickled weights as safetensors; requires ALLOW_PICKLE=1."""
    model = f"MODEL_ID={settings.model_id}"
    if not settings.allow_pickle:
        if any(folder.glob(PICKLED_WEIGHTS)) or (folder / PICKLE_INDEX).is_file():
            raise InputError(
                f"{model} has weights only as pickles (.bin), which can run code when opened. "
                "Set ALLOW_PICKLE=1 to read only the tensors from them, or convert them to "
                "safetensors."
            )
        remedy = (
            "Name another model, or set INIT_WEIGHTS=random. With ALLOW_PICKLE=1, pickled weights "
            "are accepted too"
        )
        raise InputError(f"{model} holds no weights (.safetensors). {remedy}.")
    if local_model(settings.model_id) is None:
        folder = download_files(
            settings.model_id, settings.model_revision, ("*.json", PICKLED_WEIGHTS)
        )

    def write(output: Path) -> None:
        print(f"{model}: converting its pickles to safetensors in {MADE_MODELS}", flush=True)
        for path in configs:
            shutil.copyfile(path, output / path.name)
        convert(files, tied_weights(folder), output)

    try:
        files = pickled_files(folder)
        configs = [folder / name for name in CONFIG_FILES if (folder / name).is_file()]
        return _create_once(content_of([*files, *configs]), f"{model}, from pickles", write)
    except StageFailure as failure:
        raise InputError(f"{model}: {failure}") from failure


def _random_model(settings: Settings) -> Path:
    """Random float32 weights. They depend only on the config and SEED, so every stage uses the same
    ones."""
    import torch
    from transformers import AutoModelForCausalLM

    config = base_config(settings)
    digest = hashlib.sha256(f"{config.to_json_string()} {settings.seed}".encode()).hexdigest()

    def write(output: Path) -> None:
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
        with disk_guard(f"the random base model {output}", output, 4 * model.num_parameters()):
            model.save_pretrained(output)

    return _create_once(digest, "random base model", write)


def _create_once(digest: str, name: str, write: Callable[[Path], None]) -> Path:
    """The folder of the model with this `digest`; `write` fills it if it does not exist yet."""
    folder = MADE_MODELS / digest[:16]
    if folder.is_dir():
        return folder
    with locked(MADE_MODELS, name):
        if not folder.is_dir():  # else another run created it meanwhile
            with written_whole(folder) as writing:
                write(writing)
                for weights in writing.glob("*.safetensors"):
                    if weights.is_symlink():
                        continue
                    # safetensors writes files that only the owner can read.
                    shutil.copymode(writing / CONFIG_FILE, weights)
    return folder
