"""Every architecture of the torch backend, against transformers' own model of it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from stages.backends.batches import PackedSequences, sequences_of_step
from stages.backends.loss import loss_sum, supervised
from stages.backends.torch import optimizer
from stages.backends.torch.check import UNDIVIDED
from stages.backends.torch.consolidate import consolidate
from stages.backends.torch.export import Decode, Prefill, head_dim
from stages.backends.torch.generate import CompiledModel, empty_cache
from stages.backends.torch.train import environment
from stages.data import pack
from stages.model.check import base_model_problems
from stages.model.fit import ARCHITECTURES
from stages.run.fingerprint import ROOT
from stages.run.settings import Settings
from tests.conftest import clean_environment, copy_project, torchrun
from tests.tiny_models import tiny_model

STEPS = 4
DIVIDED = {
    "tensor parallel": {"tensor_parallel_size": 2, "save_steps": 2},
    "tensor parallel, recomputed": {"tensor_parallel_size": 2, "gradient_checkpointing": True},
}
LAYOUTS: dict[str, dict[str, Any]] = {"data parallel": {"save_steps": 2}, **DIVIDED}
TOKENS = ("bos", "eos", "pad")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES["torch"])


def layouts(architecture: str) -> list[str]:
    return [name for name in LAYOUTS if architecture not in UNDIVIDED or name not in DIVIDED]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Settings]:
    """A folder with the base model of each architecture and its training on each layout, and the
    settings that all share."""
    root = tmp_path_factory.mktemp("architectures")
    tiny = copy_project(root / "project").folder / "data" / "tiny"
    shared = Settings(
        model_id=str(tiny),
        init_weights="random",
        dataset=str(tiny / "rows.jsonl"),
        max_length=64,
        inference_sequence_length=64,
        validation_fraction=0.0,
        max_steps=STEPS,
        learning_rate=3e-3,
        weight_decay=0.0,
        bf16=False,
        logging_steps=1,
        save_steps=0,
        eval_steps=0,
        nproc_per_node=2,
    )
    vocabulary = pack(shared, root / "data").metrics["vocabulary"]
    jobs = {}
    for architecture in ARCHITECTURES["torch"]:
        model = tiny_model(architecture, vocab_size=vocabulary | 1)
        model.save_pretrained(root / architecture)
        for layout in layouts(architecture):
            (root / f"{architecture}, {layout}").mkdir()
            jobs[f"{architecture}, {layout}"] = (architecture, LAYOUTS[layout])
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [*torchrun(2, "tests.backends.torch.train_architectures"), str(root)],
        env={**clean_environment(), **environment(shared), "TMPDIR": str(root)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root, shared


def plain_training(
    base: Path, data: Path, shared: Settings, per_step: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a plain loop over the plain Hugging Face model, and its weights after it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    rows, losses = PackedSequences(data / "train"), []
    adamw = optimizer.adamw(model, shared)
    for step in range(STEPS):
        numbers = sequences_of_step(step, per_step, len(rows), shared.seed)
        batch = rows.batch(numbers, torch.device("cpu"))
        tokens = int(supervised(batch["labels"], batch["position_ids"]).sum())
        loss = loss_sum(model, batch) / tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), shared.max_grad_norm)
        for group in adamw.param_groups:
            group["lr"] = optimizer.learning_rate(step, STEPS, shared)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


@every_architecture
def test_on_every_layout_losses_and_published_weights_are_those_of_a_plain_loop(
    architecture: str, trained: tuple[Path, Settings], tmp_path: Path
) -> None:
    root, shared = trained
    for layout in layouts(architecture):
        per_step = 1 if layout in DIVIDED else 2
        losses, weights = plain_training(root / architecture, root / "data", shared, per_step)
        work = root / f"{architecture}, {layout}"
        lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
        assert [line["loss"] for line in lines] == pytest.approx(losses, abs=1e-4), layout

        published = tmp_path / layout
        published.mkdir()
        (published / "config.json").write_bytes((root / architecture / "config.json").read_bytes())
        consolidate(work / "shards", published, dtype=None, max_shard_size=2**30)
        assert base_model_problems(published) == []
        loaded = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32).state_dict()
        base = AutoModelForCausalLM.from_pretrained(root / architecture).state_dict()
        for name, expected in weights.items():
            torch.testing.assert_close(loaded[name], expected, atol=2e-3, rtol=0, msg=name)
            assert not torch.equal(loaded[name], base[name]), f"{name} was not trained"


@every_architecture
def test_a_resumed_training_ends_with_the_same_bytes(
    architecture: str, trained: tuple[Path, Settings]
) -> None:
    root, _ = trained
    for layout in layouts(architecture):
        if not LAYOUTS[layout].get("save_steps"):
            continue
        whole, resumed = (
            {path.name: path.read_bytes() for path in (root / folder / "shards").iterdir()}
            for folder in (f"{architecture}, {layout}", f"{architecture}, {layout} resumed")
        )
        assert whole == resumed, layout


def test_tied_embeddings_are_one_constant_and_untied_ones_two() -> None:
    tied, untied = (
        dict(Decode(tiny_model("llama", tie_word_embeddings=tie)).named_parameters())
        for tie in (True, False)
    )
    assert untied.keys() - tied.keys() == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        *((architecture, {}) for architecture in ARCHITECTURES["torch"]),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "mlp_bias": False}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 32, "tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "as usual",
)
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), seed=st.integers(0, 2**31))
@torch.inference_mode()
def test_prefill_then_decode_of_a_ragged_batch_equals_each_row_read_whole_and_alone(
    architecture: str, changes: dict[str, Any], lengths: list[int], seed: int
) -> None:
    model, exported = (tiny_model(architecture, **changes) for _ in range(2))
    ids = torch.randint(
        model.config.vocab_size,
        (len(lengths), max(lengths) + 1),
        generator=torch.Generator().manual_seed(seed),
    )
    counts = torch.tensor(lengths)
    shape = (len(lengths), model.config.num_key_value_heads, 24, head_dim(model))
    cache = empty_cache(layers=2, shape=shape, dtype=torch.float32, device="cpu")
    prefilled = Prefill(exported)(ids[:, :-1], counts, cache)
    decoded = Decode(exported)(ids[torch.arange(len(lengths)), counts], counts, cache)
    for row, length in enumerate(lengths):
        expected = model(ids[row : row + 1, : length + 1], use_cache=False).logits[0, -2:]
        torch.testing.assert_close(
            torch.stack((prefilled[row], decoded[row])), expected, rtol=1e-4, atol=1e-4
        )


@every_architecture
@torch.inference_mode()
def test_greedy_answers_to_20_prompts_are_those_of_transformers_token_for_token(
    architecture: str,
) -> None:
    model, exported = tiny_model(architecture), tiny_model(architecture)
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(3, 67, (length,), generator=generator).tolist() for length in range(1, 21)
    ]
    config = model.config
    steps = CompiledModel(
        {
            "batch_size": len(prompts),
            "sequence_length": 48,
            "vocab_size": config.vocab_size,
            **{f"{name}_token_id": getattr(config, f"{name}_token_id") for name in TOKENS},
            "device": "cpu",
            "dtype": "float32",
            "layers": config.num_hidden_layers,
            "cache_shape": (len(prompts), config.num_key_value_heads, 48, head_dim(model)),
        },
        {},
        Prefill(exported),
        Decode(exported),
    ).generate(
        prompts,
        max_new_tokens=24,
        do_sample=False,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        eos_token_id=2,
    )
    answers = [[new for new in answer if new is not None] for answer in zip(*steps, strict=True)]
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
        expected = whole[0, len(prompt) :].tolist()
        assert answer == (expected[: expected.index(2)] if 2 in expected else expected)
