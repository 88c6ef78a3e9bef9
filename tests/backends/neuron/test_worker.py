"""Training with the real optimum-neuron, over fakes for the hardware's layers: the losses of
a plain loop on any layout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, get_scheduler

from stages.backends.batches import PackedSequences, sequences_of_step
from stages.backends.metrics import last_line
from stages.backends.neuron import cache
from stages.backends.neuron.arguments import environment, training_command
from stages.backends.neuron.consolidate import consolidate
from stages.backends.neuron.precompile import precompile
from stages.backends.neuron.shards.read import is_whole
from stages.backends.neuron.train import START, train
from stages.backends.schedule import sequences_per_step
from stages.model.base import base_model_folder
from stages.run.errors import StageFailure
from stages.run.fingerprint import ROOT
from stages.run.launch import launch
from stages.run.settings import Settings
from stages.text.sequences import IGNORED_LABEL
from tests.conftest import clean_environment, copy_project
from tests.fakes.hub import FOR_EVER, running
from tests.saved_weights import with_a_value_that_is_no_number
from tests.small_training import pack_with_metrics

pytest.importorskip("optimum.neuron", reason="optimum-neuron has no release for this Python")

FAKES = Path(__file__).parents[2] / "fakes"
STEPS = 8
# The model computes in bfloat16, whose numbers have three digits: losses of about 7 agree to two
# hundredths.
TOLERANCE = 0.03


@pytest.fixture(autouse=True)
def neuron_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One Neuron device, with the programs of the SDK first on the PATH."""
    on_neuron(monkeypatch)


def on_neuron(patch: pytest.MonkeyPatch) -> None:
    for name in set(os.environ) - set(clean_environment()):
        patch.delenv(name)
    path = f"{FAKES / 'commands'}:{os.environ['PATH']}"
    patch.setattr("stages.backends.neuron.arguments.own_path", lambda: path)
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.chdir(ROOT)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a two-layer model with grouped heads on 20 of the demo's rows."""
    folder = copy_project(tmp_path_factory.mktemp("neuron") / "project").folder / "data" / "tiny"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": 2, "tie_word_embeddings": False})
    )
    return Settings(
        model_id=str(folder),
        init_weights="random",
        dataset=str(folder / "rows.jsonl"),
        max_length=64,
        validation_fraction=0.2,
        max_steps=STEPS,
        learning_rate=5e-3,
        warmup_steps=2,
        bf16=True,
        logging_steps=1,
        save_steps=0,
        inference_sequence_length=64,
        neuron_compile_cache_url=str(tmp_path_factory.mktemp("compile-cache")),
    )


@pytest.fixture(scope="module")
def data(base: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    pack_with_metrics(base, folder)
    return folder


def batch_of(step: int, count: int, rows: PackedSequences, seed: int) -> dict[str, torch.Tensor]:
    """The global batch of a step as Neuron trains it: documents of a row see each other, none
    predicts the next one's first token."""
    batch = rows.batch(sequences_of_step(step, count, len(rows), seed), torch.device("cpu"))
    return {
        "input_ids": batch["input_ids"],
        "labels": batch["labels"].masked_fill(batch["position_ids"] == 0, IGNORED_LABEL),
    }


@pytest.fixture(scope="module")
def reference(base: Settings, data: Path) -> dict[int, list[float]]:
    """Losses of a plain loop by rows per step."""
    return {count: plain_loop(base, data, count)["loss"] for count in (1, 2)}


def plain_loop(settings: Settings, data: Path, count: int) -> dict[str, list[float]]:
    """`loss` and `grad_norm` by step of a plain float32 loop over the Hugging Face model in this
    process, with `count` rows per step."""
    rows = PackedSequences(data / "train")
    model = AutoModelForCausalLM.from_pretrained(base_model_folder(settings), dtype=torch.float32)
    adamw = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0)
    schedule = get_scheduler(settings.lr_scheduler_type, adamw, settings.warmup_steps, STEPS)
    lines: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    for step in range(STEPS):
        loss = model(**batch_of(step, count, rows, settings.seed)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        lines["loss"].append(loss.item())
        lines["grad_norm"].append(norm.item())
    return lines


def trained(settings: Settings, data: Path, work: Path) -> list[dict[str, Any]]:
    """Train in `work`; the lines of metrics.jsonl."""
    work.mkdir(exist_ok=True)
    train(settings, data, work.parent / "precompile", work)
    return lines_of(work)


def lines_of(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def run_worker(settings: Settings, data: Path, work: Path) -> None:
    """The processes of a training alone: their checkpoints stay."""
    work.mkdir()
    command = training_command(settings, base_model_folder(settings), data, work, steps=STEPS)
    done = subprocess.run(
        command, env={**os.environ, **environment(settings)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "data parallel 2": {"nproc_per_node": 2},
    "two accumulated micro-batches, recomputed": {
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_losses_on_any_layout_are_those_of_a_plain_loop(
    layout: dict, base: Settings, data: Path, reference: dict, tmp_path: Path
) -> None:
    settings = replace(base, **layout)
    lines = trained(settings, data, tmp_path / "work")
    check_losses(lines, reference[sequences_per_step(settings)])
    assert lines[0].keys() == {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
    }


def check_losses(lines: list[dict[str, Any]], expected: list[float]) -> None:
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == pytest.approx(expected, abs=TOLERANCE)
    assert expected[-1] < expected[0] - 10 * TOLERANCE, (
        "the reference is to learn enough to tell it from a model that stands still"
    )


def test_a_token_weighs_the_same_whatever_its_micro_batch_and_rank_have(
    base: Settings, data: Path, tmp_path: Path
) -> None:
    uneven = with_uneven_labels(data, tmp_path / "uneven")
    settings = replace(base, nproc_per_node=2, gradient_accumulation_steps=2)
    expected = plain_loop(settings, uneven, sequences_per_step(settings))
    lines = trained(settings, uneven, tmp_path / "work")
    check_losses(lines, expected["loss"])
    norms = [line["grad_norm"] for line in lines]
    assert norms == pytest.approx(expected["grad_norm"], rel=0.1)


def with_uneven_labels(data: Path, folder: Path) -> Path:
    """The packed data with the labels of the first 60, 0, 2 or 20 tokens of a row, as
    LOSS_ON=response makes them of answers of different lengths. One rank has none in the last
    step."""
    shutil.copytree(data, folder)
    shutil.rmtree(folder / "train")
    rows = load_from_disk(str(data / "train"))

    def keep(row: dict[str, Any], index: int) -> dict[str, Any]:
        kept = list(row["labels"][: (60, 0, 2, 20)[index % 4]])
        return {"labels": kept + [IGNORED_LABEL] * (len(row["labels"]) - len(kept))}

    rows.map(keep, with_indices=True).save_to_disk(str(folder / "train"))
    return folder


@pytest.fixture(scope="module")
def split(base: Settings, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a training on two tensor-parallel processes, with the checkpoint of its
    fourth step."""
    with pytest.MonkeyPatch.context() as patch:
        on_neuron(patch)
        work = tmp_path_factory.mktemp("split") / "work"
        run_worker(
            replace(base, nproc_per_node=2, tensor_parallel_size=2, save_steps=4), data, work
        )
    return work


def test_losses_of_two_tensor_parallel_processes_are_those_of_a_plain_loop(
    split: Path, reference: dict
) -> None:
    check_losses(lines_of(split), reference[1])


def test_tensor_parallel_processes_keep_one_copy_of_what_is_not_split(split: Path) -> None:
    assert not differing(split / "saved" / "shards")


def test_tensor_parallel_processes_keep_one_copy_of_an_adapters_whole_matrices(
    base: Settings, data: Path, tmp_path: Path
) -> None:
    settings = replace(
        base,
        nproc_per_node=2,
        tensor_parallel_size=2,
        lora_r=4,
        lora_dropout=0.0,
        learning_rate=1e-2,
    )
    lines = trained(settings, data, tmp_path / "work")
    assert lines[-1]["loss"] < lines[0]["loss"]
    shards = tmp_path / "work" / "shards"
    config = json.loads((shards / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (
        4,
        sorted(settings.lora_target_modules.split()),
    )
    assert str(base_model_folder(base)) not in json.dumps(config), "a path of this machine"
    assert not differing(shards)
    adapter = rank_tensors(shards / "model" / "dp_rank_00_tp_rank_00_pp_rank_00.pt")
    assert all("lora_" in name for name in adapter)
    assert all(tensor.any() for tensor in adapter.values()), (
        "a B matrix is zero until it is trained"
    )


def differing(shards: Path) -> list[str]:
    """Names of tensors that both tensor-parallel ranks have whole and that are not the same on
    both."""
    parameters = json.loads((shards / "mp_metadata_pp_rank_0.json").read_text())["parameters"]
    split = {
        name.replace(".default.", ".")
        for name, facts in parameters.items()
        if facts["tensor_model_parallel"]
    }
    first, second = (
        rank_tensors(shards / "model" / f"dp_rank_00_tp_rank_{rank:02d}_pp_rank_00.pt")
        for rank in (0, 1)
    )
    whole = [name for name in first if name not in split]
    assert whole
    return [name for name in whole if not torch.equal(first[name], second[name])]


def rank_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one rank's file, read in a process that knows the class of the references in
    it."""
    code = (
        "import sys, torch\n"
        "path, output = sys.argv[1:]\n"
        "refs = torch.load(path, weights_only=False)\n"
        "torch.save({name: torch.load(f'{path}.tensors/tensor_{ref.tid}.pt') for name, ref in "
        "refs.items()}, output)\n"
    )
    output = path.with_suffix(".whole")
    subprocess.run(
        [sys.executable, "-c", code, path, output],
        check=True,
        env={**os.environ, "PYTHONPATH": str(FAKES / "neuron_sdk")},
    )
    return torch.load(output, weights_only=True)


def test_shards_of_a_checkpoint_are_the_model_that_went_on_training(
    split: Path, base: Settings, data: Path, tmp_path: Path
) -> None:
    check_checkpoint(split, base, data, tmp_path / "consolidated")


def test_heads_of_keys_and_values_that_processes_share_are_one_in_the_shards(
    base: Settings, data: Path, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for file in Path(base.model_id).iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 1}))
    settings = replace(
        base, model_id=str(source), nproc_per_node=2, tensor_parallel_size=2, save_steps=4
    )
    run_worker(settings, data, tmp_path / "work")
    check_checkpoint(tmp_path / "work", settings, data, tmp_path / "consolidated")


def check_checkpoint(work: Path, settings: Settings, data: Path, consolidated: Path) -> None:
    """The loss logged for the step after a checkpoint is that of the model which its shards are put
    together to."""
    consolidated.mkdir()
    consolidate(
        work / "checkpoints" / "checkpoint-4" / "shards",
        consolidated,
        dtype=None,
        max_shard_size=10**9,
    )
    (consolidated / "config.json").write_bytes(
        (base_model_folder(settings) / "config.json").read_bytes()
    )
    model = AutoModelForCausalLM.from_pretrained(consolidated, dtype=torch.float32)
    with torch.no_grad():
        loss = model(**batch_of(4, 1, PackedSequences(data / "train"), settings.seed)).loss.item()
    logged = {line["step"]: line["loss"] for line in lines_of(work)}
    assert loss == pytest.approx(logged[5], abs=TOLERANCE / 3)
    assert abs(logged[5] - logged[1]) > TOLERANCE, (
        "the checkpoint is to be told from the base model"
    )


def test_a_loss_that_is_no_number_stops_the_training_and_names_the_step(
    base: Settings, data: Path, tmp_path: Path
) -> None:
    broken = with_a_value_that_is_no_number(base_model_folder(base), tmp_path / "broken")
    with pytest.raises(StageFailure, match=r"Step 1: the loss .* not finite"):
        trained(
            replace(base, model_id=str(broken), init_weights="pretrained"), data, tmp_path / "work"
        )
    assert not (tmp_path / "work" / "shards").exists()


def test_train_compiles_nothing_after_precompile(
    base: Settings,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = replace(
        base,
        neuron_compile_cache_url=str(tmp_path / "compile-cache"),
        logging_steps=3,
        save_steps=2,
    )
    precompiled, work = tmp_path / "precompile", tmp_path / "work"
    precompiled.mkdir()
    work.mkdir()
    monkeypatch.setenv("FAKE_FAILS", "0")
    # A graph that failed is poison to the next run, unless the compiler is told to try again: the
    # project tells it.
    with pytest.raises(
        StageFailure, match=r"1 of 2 graphs did not compile:\n  neuronxcc-\S+/MODULE_"
    ):
        precompile(settings, data, precompiled)
    monkeypatch.delenv("FAKE_FAILS")
    # A lock on it may be that of another stage's compiler; of a killed one where no other runs.
    (failed,) = cache.names(settings.neuron_compile_cache_url, "poisoned")
    lock = Path(settings.neuron_compile_cache_url) / failed / "model.hlo_module.pb.lock"
    with cache.in_use(settings.neuron_compile_cache_url):
        lock.touch()
        with pytest.raises(StageFailure, match=r"1 of this training's graphs .*\n  neuronxcc"):
            precompile(settings, data, precompiled)
    assert lock.exists()
    figures = precompile(settings, data, precompiled).metrics
    assert not lock.exists() and "the locks are removed" in capfd.readouterr().out
    assert (figures["graphs"], figures["compile_cache_hits"], figures["compile_cache_misses"]) == (
        1,
        1,
        1,
    )
    figures = precompile(
        settings, data, precompiled
    ).metrics  # of another run, say, with the same shapes
    assert (figures["graphs"], figures["compile_cache_hits"], figures["compile_cache_misses"]) == (
        0,
        2,
        0,
    )
    compiled = cache.names(settings.neuron_compile_cache_url)
    capfd.readouterr()
    assert train(settings, data, precompiled, work).metrics["graphs_compiled"] == 0
    assert cache.names(settings.neuron_compile_cache_url) == compiled
    assert "compiles again" not in capfd.readouterr().out
    assert last_line(work / "metrics.jsonl")["step"] == STEPS


def test_a_hub_that_refuses_compiled_graphs_is_one_that_has_none(
    base: Settings,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    graphs = tmp_path / "models" / "me" / "graphs"
    graphs.mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    # First the Hub refuses to say what it has, then to send what it has.
    for refused in ("HEAD /me/graphs/resolve", "GET /me/graphs/resolve"):
        folder = tmp_path / refused[:4].strip()
        url = str(folder / "cache")
        settings = replace(base, custom_cache_repo="me/graphs", neuron_compile_cache_url=url)
        folder.mkdir()
        with running(tmp_path) as hub:
            hub.misbehave(refused, "limited", FOR_EVER)
            monkeypatch.setenv("HF_ENDPOINT", hub.address)
            assert len(trained(settings, data, folder / "work")) == STEPS
        said = capfd.readouterr().out
        assert said.count("CUSTOM_CACHE_REPO=me/graphs: the Hub does not say") == 1
        assert "429" in said and hub.asked(refused) == 3
        shutil.copytree(url, graphs, dirs_exist_ok=True)


def test_a_training_that_goes_on_counts_its_steps_and_rates_from_the_base_model(
    base: Settings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(base, save_steps=2)
    work = tmp_path / "work"
    work.mkdir()
    command = training_command(
        settings, base_model_folder(base), data, work, steps=STEPS, first_step=4
    )
    launch(command, environment(settings), work / "error")
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    adamw = torch.optim.AdamW([torch.zeros(1)], lr=base.learning_rate)
    schedule = get_scheduler(base.lr_scheduler_type, adamw, base.warmup_steps, STEPS)
    rates = [schedule.lr_lambdas[0](step) * base.learning_rate for step in range(STEPS)]
    assert [line["step"] for line in lines] == [5, 6, 7, 8]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates[4:])
    assert [path.name for path in (work / "checkpoints").glob("checkpoint-*")] == [
        "checkpoint-6"
    ]  # the last is saved/ itself
    # Killed now, before its stage published: what was saved is kept, and nothing is trained again.
    (work / START).write_text('{"step": 4}')
    monkeypatch.setattr(
        "stages.backends.neuron.train.launch", lambda *_: pytest.fail("trained again")
    )
    assert train(settings, data, tmp_path / "precompile", work).metrics["first_step"] == 4
    assert (
        is_whole(work / "shards")
        and not (work / "saved").exists()
        and not (work / "checkpoints").exists()
    )
