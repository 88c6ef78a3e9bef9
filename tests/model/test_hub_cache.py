"""What was fetched once works without the Hub, and what was not is never taken for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import copy_project
from tests.fakes import hub as hubs
from tests.fakes.hub import FOR_EVER, Hub
from tests.model.ask_hub import Answer, Asker, digests

pytestmark = pytest.mark.torture("network")

ROWS = [str(number) for number in range(20)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hubs.running(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hub's cache, shared by those who ask."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def online(hub: Hub, home: Path) -> Iterator[Asker]:
    with Asker(hub.address, home) as asker:
        yield asker


@pytest.fixture(scope="module")
def offline(hub: Hub, home: Path) -> Iterator[Asker]:
    with Asker(hub.address, home, HF_HUB_OFFLINE="1") as asker:
        yield asker


@pytest.fixture(scope="module")
def cut_off(home: Path) -> Iterator[Asker]:
    """One who does not know that there is no network: the Hub's port is closed."""
    with Asker(f"http://127.0.0.1:{hubs.closed_port()}", home) as asker:
        yield asker


@pytest.fixture(autouse=True)
def behaving(hub: Hub) -> None:
    hub.faults.clear()
    hub.requests.clear()


def without_hub(hub: Hub, name: str, way: str, askers: dict[str, Asker]) -> Asker:
    """One who asks for `name` while the Hub gives nothing, in one of WAYS."""
    if way in askers:
        return askers[way]
    hub.misbehave(name, way, FOR_EVER)
    return askers["online"]


WAYS = ["offline", "cut off", "out of order", "limited", "forbidden", "html"]


@pytest.fixture
def askers(online: Asker, offline: Asker, cut_off: Asker) -> dict[str, Asker]:
    return {"online": online, "offline": offline, "cut off": cut_off}


@pytest.mark.parametrize("way", WAYS)
def test_what_was_fetched_once_is_read_from_the_cache_when_the_hub_gives_nothing(hub, askers, way):
    model, rows = hub.add_model(), hub.add_rows(ROWS)
    assert askers["online"].model(model).fetched and askers["online"].rows(rows).fetched
    of_model = without_hub(hub, model, way, askers).model(model)
    of_rows = without_hub(hub, rows, way, askers).rows(rows)
    assert of_model.files == digests(hub.folder / "models" / model), of_model.error
    assert of_model.pauses == [] and "taken from the cache" in of_model.printed[-1]
    assert of_rows.rows == ROWS, of_rows.error
    assert (
        sum(of_rows.pauses) <= 23
    )  # the library's own, for a server that is out of order or not there


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_that_holds_a_part_of_a_model_is_not_taken_for_the_model(hub, askers, way):
    model = hub.add_model()
    assert askers["online"].model(model, ("config.json",)).fetched
    asker = without_hub(hub, model, way, askers)
    assert asker.model(model, ("config.json",)).fetched
    refused = [asker.model(model), asker.tokenizer(model)]
    assert all(
        "the cache holds a part of it" in answer.error and "Run it once" in answer.error
        for answer in refused
    ), refused
    assert "model.safetensors" in refused[0].error


def test_a_download_that_was_killed_leaves_no_model_that_looks_whole(hub, askers, home):
    model = hub.add_model()
    assert askers["online"].model(model).fetched
    (snapshot,) = (home / "hub" / f"models--{model.replace('/', '--')}" / "snapshots").iterdir()
    (snapshot / "special_tokens_map.json").unlink()
    assert "special_tokens_map.json" in askers["offline"].tokenizer(model).error
    assert askers["online"].tokenizer(model).fetched and askers["offline"].tokenizer(model).fetched


def test_a_cache_that_another_program_filled_is_used_and_its_lack_is_seen(hub, askers, home):
    model = hub.add_model()
    assert askers["online"].model(model).fetched
    folder = home / "hub" / f"models--{model.replace('/', '--')}"
    shutil.rmtree(folder / "listings")
    assert askers["offline"].model(model).fetched
    (folder / "snapshots" / hub.commit_of(model) / "model.safetensors").unlink()
    assert "a part of it" in askers["offline"].model(model).error


def test_a_branch_that_moved_is_followed_and_its_former_commit_can_still_be_named(hub, askers):
    model, rows = hub.add_model(), hub.add_rows(ROWS)
    then = {
        name: hub.commit_of(name, kind) for name, kind in ((model, "models"), (rows, "datasets"))
    }
    old = askers["online"].model(model).files
    assert askers["online"].rows(rows).rows == ROWS
    (hub.folder / "models" / model / "model.safetensors").write_bytes(b"other")
    hub.change_rows(rows, ROWS[:7])
    new = digests(hub.folder / "models" / model)
    assert askers["online"].model(model).files == askers["offline"].model(model).files == new != old
    assert askers["online"].rows(rows).rows == askers["offline"].rows(rows).rows == ROWS[:7]
    assert askers["offline"].model(model, revision=then[model]).files == old


def test_rows_of_another_revision_are_never_taken_for_those_that_were_asked_for(hub, askers):
    rows = hub.add_rows(ROWS)
    assert askers["online"].rows(rows).fetched
    then = hub.commit_of(rows, "datasets")
    for asker in (askers["offline"], askers["cut off"]):
        refused = asker.rows(rows, revision="another")
        assert f"the cache holds commit {then} and not DATASET_REVISION=another" in refused.error, (
            refused
        )
        assert asker.rows(rows, revision=then).rows == ROWS


@pytest.mark.parametrize("asker", ["offline", "cut off"])
def test_what_was_never_fetched_is_told_with_what_to_check(askers, asker):
    told: list[Answer] = [askers[asker].model("owner/nothing"), askers[asker].rows("owner/nothing")]
    assert all(
        "cannot be reached and the cache does not hold it" in answer.error for answer in told
    ), told
    assert askers[asker].model("owner/nothing").pauses == ([] if asker == "offline" else [1.0, 4.0])


TINY = ("RECIPE=tiny", "MODEL_ID=owner/tiny", "INIT_WEIGHTS=random")


def test_make_works_a_second_time_without_the_hub(hub, tmp_path, torture):
    project = copy_project(tmp_path / "project")
    (hub.folder / "models" / "owner").mkdir(parents=True, exist_ok=True)
    shutil.copytree(project.folder / "data" / "tiny", hub.folder / "models" / "owner" / "tiny")
    rows = hub.add_rows(f"Because of {number}." for number in range(20))
    goal = "train" if torture.long else "data"
    arguments = (goal, *TINY, f"DATASET={rows}")
    environment = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    fetched = project.make(*arguments, **environment, HF_HUB_OFFLINE="0")
    assert hub.requests and "data: published" in fetched.stdout
    hub.requests.clear()
    assert project.stages_to_run(*arguments, **environment) == []
    changed = (*arguments, "SEED=7")
    cut_off = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{hubs.closed_port()}",
    }  # `datasets` tries for 23 seconds
    for way in [{"HF_HUB_OFFLINE": "1"}, cut_off][: torture.times(1, 2)]:
        assert "data: published" in project.make(*changed, **{**environment, **way}).stdout
        changed = tuple(argument.replace("SEED=7", "SEED=8") for argument in changed)
    assert hub.requests == []
