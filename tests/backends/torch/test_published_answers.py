"""The law of publishing: plain transformers, given what consolidate publishes, answers as eval does
and stops where eval stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.backends.device import DEVICES
from stages.backends.torch.compile_inference import Compilation, _description, _load_model
from stages.backends.torch.export import Decode, Prefill
from stages.backends.torch.generate import CompiledModel
from stages.run.settings import Settings
from stages.text.answer import Answerer
from tests.test_consolidate import published
from tests.text.conversations import dolly, question
from tests.text.tokenizer_kinds import (
    gemma,
    gpt2,
    gpt2_without_special,
    llama,
    llama3,
    mistral,
    qwen,
    smollm2,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MAX_NEW_TOKENS = 24
# What a base's generation_config.json may say. eval does not know the second line.
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1]}
SAMPLING |= {"repetition_penalty": 1.3, "min_new_tokens": 5, "no_repeat_ngram_size": 2}
QUESTIONS = [
    question(instruction, context)
    for instruction, context in (
        *(
            ("What is a chip?", ""),
            ("What is a chip?", "A chip has two cores."),
            ("the , cat !", ""),
        ),
        *((" Why does the dog sit? ", "on the log"), ("x", "y\n\nz"), ("def f(x):\n    y = 1", "")),
        *(("12345 + 67890?", "\t"), ("Größe? 中文 🦆", "naïve"), ("When, then?", "in the words")),
        ("### Answer\n", "### Instruction\n"),
    )
]


UNTIED = {"tie_word_embeddings": False}  # random tied embeddings only repeat the last token


def answers_of_eval(folder: Path) -> list[tuple[list[int], list[int], str]]:
    """Each question's prompt and answer as ids, and the answer's text: by all of compile-inference
    and eval but the compiler."""
    settings = replace(Settings(), max_new_tokens=MAX_NEW_TOKENS)
    device = DEVICES["cpu"](settings)
    work = Compilation(folder, folder, device, len(QUESTIONS), sequence_length=128)
    model = _load_model(work)
    steps = Prefill(model), Decode(_load_model(work))
    compiled = CompiledModel(_description(work, model, {}), device, {}, *steps, range(2, 128))
    answerer = Answerer(folder, lambda _: compiled, settings)
    prompts = answerer.encode(QUESTIONS)
    rows = zip(*answerer._generate(prompts, 0), strict=True)
    ids = [[new for new in row if new is not None] for row in rows]
    texts = [answer.answer for answer in answerer.answers(QUESTIONS)]
    return list(zip(prompts, ids, texts, strict=True))


@pytest.mark.parametrize(
    "make_tokenizer, architecture, eos_factor, changes",
    [
        *((llama, "llama", 1.5, {}), (llama3, "llama", 2, {}), (mistral, "mistral", 2, {})),
        *((qwen, "qwen3", 3, UNTIED), (gemma, "gemma3_text", 3, UNTIED)),
        *((smollm2, "smollm3", 2, {}), (gpt2, "olmo2", 3, {})),
        (gpt2_without_special, "phi3", 4, {}),
    ],
)
@torch.inference_mode()
def test_transformers_gives_evals_answers_and_stops_where_eval_stops(
    tmp_path: Path,
    make_tokenizer: Callable[[Path], Path],
    architecture: str,
    eos_factor: float,
    changes: dict[str, Any],
) -> None:
    folder = published(tmp_path, make_tokenizer, {}, SAMPLING, architecture, eos_factor, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = answers_of_eval(folder)
    for one, (prompt, ids, text) in zip(QUESTIONS, answers, strict=True):
        [user] = one.messages
        asked = dolly(user.content, user.context, "")
        inputs = tokenizer(asked, return_tensors="pt", return_token_type_ids=False)
        assert inputs["input_ids"][0].tolist() == prompt
        whole = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0]
        end = [tokenizer.eos_token_id] if len(ids) < MAX_NEW_TOKENS else []
        assert whole.tolist() == [*prompt, *ids, *end]
        assert tokenizer.decode(whole, skip_special_tokens=True) == asked + text
    lengths = [len(ids) for _, ids, _ in answers]
    assert sum(length < MAX_NEW_TOKENS for length in lengths) >= len(QUESTIONS) / 2, lengths
    assert len(set(lengths)) > 2, lengths
