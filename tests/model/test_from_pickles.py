"""Models whose weights are pickles: refused, or made safetensors once when that is allowed. Nothing
in them runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages.model import base
from stages.model.base import base_model_folder
from stages.model.weights import SINGLE_FILE
from stages.run.errors import InputError
from stages.run.settings import Settings
from tests.model.model_damage import DIFFERS, NORM, PICKLE, SOMETHING, Damage, and_then, file, train
from tests.pickled import Call
from tests.saved_weights import assert_equal, written
from tests.tiny_llama import tiny_llama

pytestmark = pytest.mark.torture("models")


def taken_out(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the folder, which it then no longer has."""
    state = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    return state


def as_pickles(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The folder with its weights as one pickle; returns them."""
    state = taken_out(folder)
    torch.save(state, folder / PICKLE, **options)
    return state


def as_two_pickles(folder: Path) -> dict[str, torch.Tensor]:
    state = taken_out(folder)
    tiny_llama().save_pretrained(folder, max_shard_size="30KB", safe_serialization=False)
    return state


def allowed(folder: Path) -> Path:
    return base_model_folder(replace(Settings(), model_id=str(folder), allow_pickle=True))


@pytest.mark.parametrize("pickled", [as_pickles, as_two_pickles])
def test_pickles_are_refused_unless_they_are_allowed(
    folder: Path, no_rank: None, pickled: Damage
) -> None:
    pickled(folder)
    with pytest.raises(
        InputError,
        match=r"only as pickles \(\.bin\), which can run code when opened\. Set ALLOW_PICKLE=1",
    ):
        train(folder)


@pytest.mark.parametrize(
    "pickled",
    [
        as_pickles,
        as_two_pickles,
        lambda folder: as_pickles(folder, _use_new_zipfile_serialization=False),
    ],
    ids=["one", "parts", "of before 2020"],
)
def test_allowed_pickles_become_the_same_weights_once(
    folder: Path, no_rank: None, pickled: Callable, capsys
) -> None:
    state = pickled(folder)
    made = allowed(folder)
    assert_equal(written(made), state)
    assert_equal(AutoModelForCausalLM.from_pretrained(made, dtype="auto").state_dict(), state)
    assert made.parent == base.MADE_MODELS and not list(base.MADE_MODELS.glob("*.writing"))
    assert allowed(folder) == made
    assert capsys.readouterr().out.count("converting its pickles to safetensors") == 1
    with pytest.raises(AssertionError, match="a process of the training was started"):
        train(folder, allow_pickle=True)


@pytest.mark.parametrize("left_out", [None, "lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_tensor_of_a_pickle_is_written_once_under_the_name_that_loaders_read(
    tmp_path: Path, no_rank: None, left_out: str
) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path / "model")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != left_out}
    torch.save(state, tmp_path / "model" / PICKLE)
    made = allowed(tmp_path / "model")
    assert set(written(made)) == set(model.state_dict()) - {"lm_head.weight"}
    assert_equal(AutoModelForCausalLM.from_pretrained(made).state_dict(), model.state_dict())


def pickle_of(value: Any) -> Damage:
    return and_then(as_pickles, lambda folder: torch.save(value, folder / PICKLE))


def pickle_index(place: str) -> Damage:
    def damage(folder: Path) -> None:
        as_two_pickles(folder)
        path = folder / "pytorch_model.bin.index.json"
        content = json.loads(path.read_text())
        content["weight_map"][NORM] = place
        path.write_text(json.dumps(content))

    return damage


BAD_PICKLES: dict[str, tuple[Damage, str]] = {
    "a command": (
        pickle_of(Call(os.mkdir, "run-by-a-pickle")),
        r"contains more than tensors, which is never run.*mkdir",
    ),
    "a command beside a tensor": (
        pickle_of({NORM: Call(eval, "open('run-by-a-pickle', 'w')")}),
        r"contains more than tensors.*eval",
    ),
    "a command in an old file": (
        and_then(
            as_pickles,
            lambda folder: torch.save(
                Call(os.system, "touch run-by-a-pickle"),
                folder / PICKLE,
                _use_new_zipfile_serialization=False,
            ),
        ),
        r"contains more than tensors.*system",
    ),
    "bytes": (and_then(as_pickles, file(PICKLE, SOMETHING)), r"is damaged"),
    "nothing": (and_then(as_pickles, file(PICKLE, b"")), r"is damaged"),
    "half of it": (
        and_then(as_pickles, lambda folder: os.truncate(folder / PICKLE, 20_000)),
        r"is damaged",
    ),
    "a list": (pickle_of([torch.ones(2)]), r"holds no state dict"),
    "a tensor": (pickle_of(torch.ones(2)), r"holds no state dict"),
    "a training's whole state": (
        pickle_of({"model": {NORM: torch.ones(32)}, "step": 3}),
        r"model and 1 more of 2 entries are not tensors",
    ),
    "complex numbers": (
        pickle_of({NORM: torch.ones(32, dtype=torch.complex64)}),
        r"are not tensors of a known dtype",
    ),
    "one number as a terabyte": (
        pickle_of({NORM: torch.ones(1).expand(2**38)}),
        r"are not tensors of a known dtype",
    ),
    "a sparse tensor": (
        pickle_of({NORM: torch.ones(4, 8).to_sparse()}),
        r"are not tensors of a known dtype",
    ),
    "a number that is none": (
        pickle_of({NORM: torch.full((32,), torch.nan)}),
        r"model\.norm\.weight: 32 of 32 values are not finite",
    ),
    "another model": (pickle_of({NORM: torch.ones(32)}), DIFFERS + r"missing \(20\)"),
    "an index that leaves the folder": (
        pickle_index("../pytorch_model.bin"),
        r"names files outside its folder",
    ),
    "an index that names another file": (pickle_index("config.json"), r"names config\.json"),
    "an index that names a missing file": (
        pickle_index("pytorch_model-9.bin"),
        r"names pytorch_model-9\.bin, and .* has no such",
    ),
    "parts without index": (
        and_then(as_two_pickles, lambda folder: (folder / "pytorch_model.bin.index.json").unlink()),
        r"and no pytorch_model\.bin\.index\.json",
    ),
    "a tensor in two parts": (
        and_then(
            as_two_pickles,
            lambda folder: [
                torch.save({NORM: torch.ones(32)}, path)
                for path in folder.glob("pytorch_model-*.bin")
            ],
        ),
        r"model\.norm\.weight is in another file too",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD_PICKLES.values(), ids=BAD_PICKLES)
def test_an_allowed_pickle_that_is_not_weights_is_refused_and_nothing_in_it_runs(
    folder: Path, no_rank: None, monkeypatch: pytest.MonkeyPatch, damage: Damage, message: str
) -> None:
    damage(folder)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(InputError, match=f"(?s){message}"):
        train(folder, allow_pickle=True)
    assert not Path("run-by-a-pickle").exists()
    assert not list(base.MADE_MODELS.glob("*[!g]/model.safetensors")) or "missing" in message
