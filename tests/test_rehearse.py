"""`make rehearse`: the real trainings and stages on a cut model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.backends.record import RECORDS, Record
from stages.model.cut import cut_model
from stages.model.files import SINGLE_FILE
from stages.rehearse import _has_more_time, rehearse
from stages.run.errors import InputError
from stages.run.layout import CONFIG_FILE
from stages.run.manifest import manifest_of
from stages.run.settings import Settings
from tests.conftest import Project
from tests.tiny_models import tiny_model

RUN = ("RECIPE=tiny", "REHEARSAL_STEPS=2", "NPROC_PER_NODE=2")


def test_a_rehearsal_compares_and_goes_through_every_stage(built: Project) -> None:
    before = built.snapshot()
    first = built.make("rehearse", *RUN).stdout
    assert "rehearsal: 2 steps as on a CPU" in first
    assert "rehearsal: consolidated, compiled and asked" in first
    folder = built.folder / "outputs/tiny/rehearsal"
    report = json.loads((folder / "report.json").read_text())
    assert report["steps"] == 2 and report["out_of_band"] == [] and report["seconds"] > 0
    for stage in ("train", "consolidate", "compile-inference"):
        assert manifest_of(folder / "run" / stage)
    # Nothing of the run itself was touched, and nothing of it is stale.
    assert {name: facts for name, facts in built.snapshot().items() if name in before} == before
    assert built.stages_to_run("all", "RECIPE=tiny", "REHEARSE=1") == []


def test_the_cut_model_has_the_first_layers_and_everything_else(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text", num_hidden_layers=4, layer_types=["sliding_attention"] * 4)
    model.config.eos_token_id = [1, 2, 3, 4]
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "of_another_model.json").write_text("{}")
    assert cut_model(tmp_path / "whole", 2, tmp_path / "cut") == 4
    assert not (tmp_path / "cut" / "of_another_model.json").exists()
    assert json.loads((tmp_path / "cut" / CONFIG_FILE).read_text())["eos_token_id"] == [1, 2, 3, 4]
    cut = type(model).from_pretrained(tmp_path / "cut")
    assert cut.config.num_hidden_layers == len(cut.config.layer_types) == 2
    whole = model.state_dict()
    assert all(tensor.equal(whole[name]) for name, tensor in cut.state_dict().items())
    assert (tmp_path / "cut" / SINGLE_FILE).is_file()
    assert cut_model(tmp_path / "whole", 9, tmp_path / "all") == 4


def test_a_reference_that_ended_early_is_computed_again_where_it_has_more_time(
    tmp_path: Path,
) -> None:
    record = tmp_path / "record.jsonl"
    assert not _has_more_time(record, 3, 60)
    record.write_text('{"seconds": 30, "weights": {}}\n{"step": 1}\n{"step": 2}\n')
    assert _has_more_time(record, 3, 60)
    assert not _has_more_time(record, 3, 30)
    assert not _has_more_time(record, 2, 60)


def test_what_a_later_stage_would_refuse_is_refused_before_the_references(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    settings = Settings(model_id=str(tmp_path / "model"), nproc_per_node=3, tensor_parallel_size=3)
    with pytest.raises(InputError, match="TENSOR_PARALLEL_SIZE=3 does not divide"):
        rehearse(settings, tmp_path / "data")
    assert not (tmp_path / "rehearsal" / "float32").exists()


def test_only_a_rehearsals_training_records_and_ends_when_its_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(tmp_path)
    assert not record.is_late
    record.step(1, {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0})
    assert list(tmp_path.iterdir()) == []
    for seconds, late in (("inf", False), ("1000", False), ("0", True)):
        monkeypatch.setenv(RECORDS, seconds)
        assert Record(tmp_path).is_late == late
