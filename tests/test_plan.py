"""`make plan`: what would run and what it needs, from manifests and arithmetic."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stages.forecast.fits import need_of, verdict
from stages.forecast.machine import place_of
from stages.forecast.planned import shape_here
from stages.plan import lines
from stages.run.publish import work_folder
from stages.run.setting import STAGES
from stages.run.settings import Settings
from tests.conftest import ROOT, Project
from tests.doctor_checks import llama_7b
from tests.forecast.test_minutes import ran

GRAPH = {
    **{"data": [], "precompile": [], "train": ["data"], "consolidate": ["train"]},
    "compile-inference": ["consolidate"],
    "eval": ["data", "consolidate", "compile-inference"],
}


def plan(folder: Path, **changes: object) -> str:
    return "\n".join(lines(Settings(**changes), folder / "demo", GRAPH))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_before_anything_ran_times_and_tokens_are_unknown(tmp_path: Path) -> None:
    said = plan(tmp_path)
    assert said.count(" missing") == len(STAGES)
    assert said.count("unknown (") == len(STAGES)
    assert "unknown until `make data` has run" in said
    assert "3,426,560 parameters = 4 layers x 725,504 + 1 x 524,288 embeddings + 256" in said
    assert "no memory forecasts on this machine yet" in said
    assert list(tmp_path.iterdir()) == []


def test_a_price_that_is_not_known_is_said_to_be_unknown(tmp_path: Path) -> None:
    assert "unknown: no price on demand is listed" in plan(tmp_path, instance="trn2.48xlarge")
    assert "unknown: sources conflict" in plan(tmp_path, instance="p5.4xlarge")
    assert "21.5 USD/h: on demand" in plan(tmp_path, instance="trn1.32xlarge")
    assert "6 USD/h: INSTANCE_PRICE" in plan(tmp_path, instance="p5.4xlarge", instance_price=6.0)


def test_what_a_cheap_machine_saves_is_said_as_far_as_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = plan(tmp_path, instance="trn1.32xlarge")
    assert "such as inf2.xlarge, 0.758 USD/h" in said
    assert "their time is unknown: each hour saves 20.74 USD" in said
    assert "what that saves is unknown: so is the price" in plan(tmp_path, instance="trn2.48xlarge")
    assert "such as" not in plan(tmp_path, instance="inf2.xlarge")
    monkeypatch.setattr("stages.forecast.machine.instance_type", lambda: "trn1.32xlarge")
    ran(tmp_path, "one", "consolidate", 3600)
    said = plan(tmp_path, instance="trn1.32xlarge", model_id=str(tmp_path / "one/consolidate"))
    assert "their 1 h 00 min save 20.74 USD, without those of unknown time" in said


def test_how_long_writing_takes_is_known_once_a_consolidate_has_written_enough(
    tmp_path: Path,
) -> None:
    unknown = "how long writing takes is unknown: no consolidate wrote 1 GB on this machine"
    assert unknown in plan(tmp_path)
    assert "nobody measured a g5.xlarge" in plan(tmp_path, instance="g5.xlarge")
    ran(tmp_path, "small", "consolidate", 8, outputs={"a": {"bytes": 269 * 10**6, "sha256": ""}})
    assert unknown in plan(tmp_path)
    ran(tmp_path, "one", "consolidate", 100, outputs={"a": {"bytes": 10**9, "sha256": ""}})
    said = plan(tmp_path, model_id=llama_7b(tmp_path).model_id, save_steps=1, save_total_limit=2)
    # 4.58 of its 100 s grew with the model.
    assert "consolidate 1 min 02 s, compile-inference 1 min 02 s" in said
    assert "at the 218 MB/s of run one's consolidate once it had started" in said


def test_the_hosts_memory_is_arithmetic_or_unknown(tmp_path: Path) -> None:
    model = llama_7b(tmp_path).model_id
    said = plan(tmp_path, model_id=model, backend="torch", lora_r=8)
    assert "a rank loads a tensor at a time, at most 524 MB: 131,072,000 x 4" in said
    assert "and 80 MB of adapters" in said
    said = plan(tmp_path, model_id=model, backend="neuron")
    assert "what a rank takes to load is unknown" in said
    assert "consolidate, 340 MB whatever the model's size" in said


def test_machines_are_put_side_by_side(tmp_path: Path) -> None:
    said = plan(
        tmp_path,
        model_id=llama_7b(tmp_path).model_id,
        compare="trn1.32xlarge p5.48xlarge trn2.48xlarge",
        backend="neuron",
        max_length=256,
    )
    trainium, others, h100, _, trainium2, *_ = said.split("compare ")[1].splitlines()[1:]
    assert (
        "21.5" in trainium and "7.1% of the peak of 1 of 32 cores, measured elsewhere" in trainium
    )
    assert "AWS pre-trains" in others
    assert "55.04" in h100 and "123 GB NOT in 85.5 GB" in h100
    assert trainium2.count("unknown") == 3 and "no utilisation of Trainium2 is known" in trainium2


def test_what_does_not_fit_is_said_with_what_would(tmp_path: Path) -> None:
    said = plan(tmp_path, instance="g5.xlarge", per_device_train_batch_size=512, max_length=2048)
    assert "DOES NOT FIT" in said and "The smallest change: GRADIENT_CHECKPOINTING=1" in said


def test_near_the_edge_it_does_not_say_that_it_fits() -> None:
    run = Settings(device="cpu", backend="torch", nproc_per_node=1)
    shape = shape_here(run)
    assert shape is not None
    total = need_of(shape, run, place_of(run)).bytes
    for share, said in ((0.8, "fits "), (0.9, "MAY NOT FIT "), (1.1, "DOES NOT FIT ")):
        place = replace(place_of(run), device_memory=int(total / share))
        assert verdict(run, shape, place, total).startswith(said)


def test_a_misspelt_setting_is_refused_and_nothing_is_written(project: Project) -> None:
    before = project.snapshot()
    done = project.make("plan", "INSTANC=trn1.32xlarge", check=False)
    assert done.returncode and "Did you mean" in done.stderr
    started = time.monotonic()
    assert "to run" not in project.make("plan", "RECIPE=tiny").stderr
    assert time.monotonic() - started < 5  # 0.4 s on an idle machine
    assert project.snapshot() == before


def test_what_was_planned_stands_beside_what_was_measured(built: Project) -> None:
    for stage in STAGES:
        forecast = built.manifest(stage)["forecast"]
        assert set(forecast) == {"seconds", "peak_memory_bytes", "bytes"}
        assert forecast["seconds"]["measured"] == built.manifest(stage)["seconds"]
        assert forecast["peak_memory_bytes"]["measured"] > 10**7
        assert forecast["bytes"]["measured"] > 0
    train = built.manifest("train")
    assert (
        train["forecast"]["peak_memory_bytes"]["measured"]
        == (train["metrics"]["peak_memory_bytes"])
    )
    assert train["forecast"]["peak_memory_bytes"]["planned"] > 10**8
    said = built.make("plan", "RECIPE=tiny").stdout
    assert said.count(" up to date") == len(STAGES)
    assert "2 memory forecasts on this machine: mean" in said


def test_a_changed_setting_shows_what_runs_again_and_how_long(built: Project) -> None:
    said = built.make("plan", "RECIPE=tiny", "LEARNING_RATE=0.002").stdout
    assert "LEARNING_RATE" in said and "measured on this machine in run tiny" in said
    assert "to run, in all" in said
    assert said.count(" up to date") == 2


def test_an_interrupted_training_goes_on_where_it_was(built: Project) -> None:
    run = built.folder / "outputs/tiny"
    made_from = built.manifest("train")["provenance"]
    shutil.rmtree(run / "train")
    (work_folder(run, "train", made_from) / "checkpoints" / "step-00000003").mkdir(parents=True)
    said = built.make("plan", "RECIPE=tiny").stdout
    assert "missing; goes on at step 3 of " in said


def test_a_model_whose_config_cannot_be_fetched_is_unknown_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = plan(tmp_path, model_id="someone/nothing", max_steps=10)
    assert "unknown, and with it memory and disk. MODEL_ID=someone/nothing: " in said
