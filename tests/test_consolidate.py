"""What consolidate publishes, loaded by plain transformers: it ends an answer where eval does, and
its config.json holds one truth. Whole answers: tests/backends/torch/test_published_answers.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.consolidate import join
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings
from stages.text.find_tokenizer import find_tokenizer
from stages.text.prompt import TextFormat
from stages.text.tokens import TextTokenizer
from tests.text.conversations import text_ids
from tests.text.tokenizer_kinds import gpt2, llama, llama3
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def published(
    folder: Path,
    make_tokenizer: Callable[[Path], Path],
    config: dict[str, Any],
    generation: Any,
    architecture: str = "llama",
    eos_factor: float = 1.0,
    **changes: Any,
) -> Path:
    """The model folder that consolidate makes of a training whose base has these configs.

    `eos_factor` scales the head's row of EOS, so that answers end. `changes`: see `tiny_model`.
    """

    def build(work: Path) -> StageResult:
        tokenizer = find_tokenizer(str(make_tokenizer(folder / "tokenizer")))
        tokenizer.save(work / "tokenizer")
        model = tiny_model(architecture, vocab_size=tokenizer.vocab_size, **changes)
        with torch.no_grad():
            model.lm_head.weight[tokenizer.eos] *= eos_factor
        model.config.save_pretrained(work)
        saved = json.loads((work / "config.json").read_text())
        (work / "config.json").write_text(json.dumps({**saved, **config}))
        if generation is not None:
            (work / "generation_config.json").write_text(json.dumps(generation))
        TextFormat(tokenizer).save(work)
        writer = HuggingFaceStorageWriter(str(work / "shards"), save_distributed=True)
        dcp.save(dict(model.named_parameters()), storage_writer=writer, no_dist=True)
        return StageResult()

    publish("train", Settings(), {}, folder / "train", build)
    (folder / "model").mkdir()
    join(replace(Settings(), bf16=False), folder / "train", folder / "model")
    return folder / "model"


@pytest.mark.parametrize(
    "make_tokenizer, eos, generation",
    [
        (llama, 1, {"eos_token_id": 1, "do_sample": True, "temperature": 0.5}),
        (llama, None, {"temperature": 0.5, "do_sample": True}),
        (llama3, [400, 401], {"eos_token_id": [400, 401]}),
        (gpt2, 2, None),
    ],
)
def test_the_published_model_ends_an_answer_where_eval_does(
    tmp_path: Path, make_tokenizer: Callable[[Path], Path], eos: Any, generation: Any
) -> None:
    folder = published(tmp_path, make_tokenizer, {"eos_token_id": eos}, generation)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ends = TextTokenizer.load(folder).eos
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == ends
    assert model.config.eos_token_id == model.generation_config.eos_token_id == ends
    kept = {"eos_token_id", "temperature", "do_sample"} & (generation or {}).keys()
    for name in kept - {"eos_token_id"}:
        assert getattr(model.generation_config, name) == generation[name]


def test_the_difference_to_the_base_is_said(tmp_path: Path, capsys: Any) -> None:
    published(tmp_path, llama, {"eos_token_id": 1}, None)
    said = capsys.readouterr().out
    assert (
        "config.json ends an answer at 1 ('<s>'). The model is trained to end one at 2 ('</s>')"
        in said
    )


@pytest.mark.parametrize("add_bos", [True, None])
def test_a_first_token_that_only_autotokenizer_adds_is_said(
    tmp_path: Path, capsys: Any, add_bos: bool | None
) -> None:
    def contradicting(folder: Path) -> Path:
        path = gpt2(folder) / "tokenizer_config.json"
        config = json.loads(path.read_text())
        path.write_text(
            json.dumps(config if add_bos is None else {**config, "add_bos_token": add_bos})
        )
        return folder

    folder = published(tmp_path, contradicting, {}, None)
    theirs = AutoTokenizer.from_pretrained(folder)("a").input_ids
    same = theirs == text_ids(TextTokenizer.load(folder), "a")
    assert ("AutoTokenizer makes the ids" in capsys.readouterr().out) == (not same)
    assert same == (add_bos is None)


def test_settings_of_generation_that_eval_does_not_apply_are_named_and_not_published(
    tmp_path: Path, capsys: Any
) -> None:
    folder = published(tmp_path, llama, {}, {"top_k": 9, "repetition_penalty": 1.05})
    assert "generation_config.json has repetition_penalty=1.05. eval" in capsys.readouterr().out
    kept = json.loads((folder / "generation_config.json").read_text())
    assert kept == {"top_k": 9, "eos_token_id": 2}


def test_the_published_config_has_rope_in_one_place(tmp_path: Path) -> None:
    rope = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    own = {"rope_theta": None, "rope_scaling": None, "rope_parameters": rope}
    folder = published(tmp_path, llama, own, None)
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"]["factor"] == 2.0
    assert "rope_parameters" not in config
