"""Training of every architecture, and its LoRA, against plain loops over transformers and peft."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from stages.backends.batches import PackedSequences, sequences_of_step
from stages.backends.loss import loss_sum, supervised
from stages.backends.torch import optimizer
from stages.backends.torch.check import JOINED_LAYERS, UNDIVIDED
from stages.backends.torch.checkpoint import trained_weights
from stages.backends.torch.consolidate import consolidate
from stages.backends.torch.lora import adapter_config, add_adapters, freeze, initialise
from stages.backends.torch.train import environment
from stages.data import pack
from stages.model.check import base_model_problems, tied_weights
from stages.model.fit import ARCHITECTURES, LORA_LAYERS
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
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES["torch"])


LORA: dict[str, Any] = {"lora_r": 4, "lora_alpha": 12, "lora_dropout": 0.0}
DROPOUT = "LoRA with dropout"
# Validation too, which leaves the weights in another state than a step does.
DROPOUT_SETTINGS = {**LORA, **LAYOUTS["tensor parallel"], "lora_dropout": 0.2, "eval_steps": 2}


def lora_layers(architecture: str) -> str:
    return " ".join(JOINED_LAYERS if architecture == "phi3" else LORA_LAYERS)


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
        validation_fraction=0.2,
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
    jobs: dict[str, Any] = {f"{DROPOUT}, tensor parallel": ("llama", DROPOUT_SETTINGS)}
    for architecture in ARCHITECTURES["torch"]:
        model = tiny_model(architecture, vocab_size=vocabulary | 1)
        model.save_pretrained(root / architecture)
        for layout in layouts(architecture):
            jobs[f"{architecture}, {layout}"] = (architecture, LAYOUTS[layout])
            jobs[f"{architecture}, LoRA, {layout}"] = (
                architecture,
                {**LAYOUTS[layout], **LORA, "lora_target_modules": lora_layers(architecture)},
            )
    for name in jobs:
        (root / name).mkdir()
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
    model: torch.nn.Module, data: Path, shared: Settings, per_step: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a plain loop over the plain Hugging Face model, and its weights after it."""
    model.train()
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


def logged_losses(work: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (work / "metrics.jsonl").read_text().splitlines()]


def consolidated(work: Path, base: Path, output: Path) -> Path:
    output.mkdir()
    shutil.copyfile(base / "config.json", output / "config.json")
    consolidate(
        work / "shards",
        output,
        dtype=None,
        max_shard_size=2**30,
        tied=tied_weights(base),
        base=base,
    )
    assert base_model_problems(output) == []
    return output


@every_architecture
def test_on_every_layout_losses_and_published_weights_are_those_of_a_plain_loop(
    architecture: str, trained: tuple[Path, Settings], tmp_path: Path
) -> None:
    root, shared = trained
    for layout in layouts(architecture):
        per_step = 1 if layout in DIVIDED else 2
        plain = AutoModelForCausalLM.from_pretrained(root / architecture, dtype=torch.float32)
        losses, weights = plain_training(plain, root / "data", shared, per_step)
        work = root / f"{architecture}, {layout}"
        assert logged_losses(work) == pytest.approx(losses, abs=1e-4), layout
        published = consolidated(work, root / architecture, tmp_path / layout)
        loaded = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32).state_dict()
        base = AutoModelForCausalLM.from_pretrained(root / architecture).state_dict()
        for name, expected in weights.items():
            torch.testing.assert_close(loaded[name], expected, atol=2e-3, rtol=0, msg=name)
            assert not torch.equal(loaded[name], base[name]), f"{name} was not trained"


@every_architecture
def test_lora_on_every_layout_is_that_of_peft(
    architecture: str, trained: tuple[Path, Settings], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    root, shared = trained
    settings = replace(shared, **LORA, lora_target_modules=lora_layers(architecture))
    for layout in layouts(architecture):
        per_step = 1 if layout in DIVIDED else 2
        base = AutoModelForCausalLM.from_pretrained(root / architecture, dtype=torch.float32)
        ours = AutoModelForCausalLM.from_pretrained(root / architecture, dtype=torch.float32)
        add_adapters(ours, settings)
        freeze(ours)
        initialise(ours, settings)
        config = peft.LoraConfig(**adapter_config(settings) | {"inference_mode": False})
        plain = peft.get_peft_model(base, config)
        first = {f"base_model.model.{name}": value for name, value in trained_weights(ours).items()}
        peft.set_peft_model_state_dict(plain, first)
        losses, _ = plain_training(plain, root / "data", shared, per_step)
        work = root / f"{architecture}, LoRA, {layout}"
        assert logged_losses(work) == pytest.approx(losses, abs=1e-4), layout

        published = consolidated(work, root / architecture, tmp_path / layout)
        base = AutoModelForCausalLM.from_pretrained(root / architecture, dtype=torch.float32)
        adapted = peft.PeftModel.from_pretrained(base, published / "adapter").eval()
        merged = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
        ids = torch.arange(3, 30).unsqueeze(0)
        with torch.no_grad():
            torch.testing.assert_close(
                adapted(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4
            )
            assert not torch.allclose(adapted(ids).logits, ours(ids).logits, atol=1e-3)


@every_architecture
def test_a_checkpoint_of_lora_holds_the_adapters_alone(
    architecture: str, trained: tuple[Path, Settings]
) -> None:
    root, _ = trained
    checkpoints = root / f"{architecture}, LoRA, data parallel" / "checkpoints"
    for checkpoint in checkpoints.iterdir():
        written = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        tensors = {name for name, entry in written.items() if hasattr(entry, "size")}
        assert tensors and all(".lora_" in name for name in tensors)


def test_a_resumed_training_ends_with_the_same_bytes(trained: tuple[Path, Settings]) -> None:
    root, _ = trained
    names = [folder.name for folder in root.glob("* resumed")]
    assert len(names) > 4 * len(UNDIVIDED) and f"{DROPOUT}, tensor parallel resumed" in names
    for name in names:
        whole, resumed = (
            {path.name: path.read_bytes() for path in (root / folder / "shards").iterdir()}
            for folder in (name.removesuffix(" resumed"), name)
        )
        assert whole == resumed, name


@every_architecture
@torch.no_grad()
def test_a_document_in_a_pack_has_the_logits_that_it_has_alone(architecture: str) -> None:
    model = tiny_model(architecture)
    ids = torch.randint(3, 67, (1, 32), generator=torch.Generator().manual_seed(1))
    ends = [0, 12, 13, 32]  # one document is longer than the sliding windows, one a single token
    lengths = [end - start for start, end in pairwise(ends)]
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    packed: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda *call: packed.append(call[-1].logits[0]))
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    loss_sum(model, batch, only_supervised=False)
    hook.remove()
    for start, end in pairwise(ends):
        alone = model(ids[:, start:end], use_cache=False).logits[0]
        torch.testing.assert_close(packed[0][start:end], alone, atol=1e-5, rtol=1e-4)
