"""A Hub that refuses, breaks, stalls, cuts and lies: right content after trying again, or clear
words; never another content."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import hub as hubs
from tests.fakes.hub import FOR_EVER, Hub
from tests.model.ask_hub import Answer, Asker, digests

pytestmark = pytest.mark.torture("network")

ROWS = [str(number) for number in range(20)]
LARGE = 45_000_000  # bytes: the library writes a file by pieces of 10 MiB


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hubs.running(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(scope="module")
def asker(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    with Asker(hub.address, tmp_path_factory.mktemp("cache")) as asker:
        yield asker


@pytest.fixture(autouse=True)
def behaving(hub: Hub) -> None:
    """Every test begins with a Hub that does as it should."""
    hub.faults.clear()
    hub.requests.clear()
    hub.stall = 30.0


@pytest.fixture
def model(hub: Hub) -> str:
    """The name of a model of the Hub that nobody has asked for."""
    return hub.add_model()


def ask(asker: Asker, name: str) -> Answer:
    return asker.rows(name) if "rows" in name else asker.model(name)


def assert_right(hub: Hub, name: str, answer: Answer) -> None:
    assert answer.fetched, answer.error
    assert (
        answer.rows == ROWS
        if "rows" in name
        else answer.files == digests(hub.folder / "models" / name)
    )


# What is refused at once, and the words of the refusal; {kind} is model or dataset.
REFUSED = {
    "gated": ["is gated", "Accept its licence", "HF_TOKEN"],
    "gated, not signed in": ["is gated", "HF_TOKEN"],
    "forbidden": ["refuses access (403)", "HF_TOKEN"],
    "not signed in": ["does not know the token (401)", "HF_TOKEN"],
    "missing": ["no such {kind}", "Check the name"],
    "unknown": ["no such {kind}", "Check the name"],
    "no revision": ["has no revision 'main'", "_REVISION"],
    "limited, wait 3000": ["(429)", "Wait 3000 seconds"],
}
# What may pass by itself, and the words when it does not.
PASSING = {
    "limited": ["(429)", "Wait some minutes", "HF_TOKEN"],
    "limited, wait 2": ["(429)", "Wait 2 seconds"],
    "limited, window 3": ["(429)", "Wait 3 seconds"],
    "broken": ["out of order (500)", "later"],
    "bad gateway": ["out of order (502)", "later"],
    "out of order": ["out of order (503)", "later"],
    "closed": ["cannot be reached", "HF_ENDPOINT"],
    "html": ["is not the Hub", "sign-in"],
    "wrong json": ["is not the Hub", "proxy"],
}
KINDS = {"model": "MODEL_ID", "dataset": "DATASET"}


def new(hub: Hub, kind: str) -> str:
    return hub.add_model() if kind == "model" else hub.add_rows(ROWS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", REFUSED)
def test_what_waiting_does_not_help_is_refused_at_once_with_the_remedy_and_without_the_token(
    hub, asker, kind, fault
):
    name = new(hub, kind)
    hub.misbehave(name, fault, FOR_EVER)
    answer = ask(asker, name)
    assert answer.error.startswith(f"{KINDS[kind]}={name}"), answer.error
    assert all(word.format(kind=kind) in answer.error for word in REFUSED[fault]), answer.error
    assert "canary" not in answer.error + "".join(answer.printed)
    assert answer.pauses == [] and len(hub.requests) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", PASSING)
def test_what_lasts_ends_after_three_tries_with_growing_pauses(hub, asker, kind, fault):
    name = new(hub, kind)
    hub.misbehave(name, fault, FOR_EVER)
    answer = ask(asker, name)
    assert answer.error.startswith(f"{KINDS[kind]}={name}"), answer.error
    assert all(word in answer.error for word in PASSING[fault]), answer.error
    assert "canary" not in answer.error + "".join(answer.printed)
    assert 5 <= sum(answer.pauses) <= 23 and answer.pauses == sorted(answer.pauses)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again_and_said(hub, asker, kind, fault):
    name = new(hub, kind)
    hub.misbehave(name, fault)
    answer = ask(asker, name)
    assert_right(hub, name, answer)
    library = kind == "dataset" and fault in (
        "broken",
        "bad gateway",
        "out of order",
        "closed",
    )  # tried again by itself
    assert library or any(
        "trying again in" in line and "2 of 3" in line for line in answer.printed
    ), answer.printed


@pytest.mark.parametrize("kind", KINDS)
def test_a_redirect_that_never_ends_is_refused_without_another_try(hub, asker, kind, torture):
    if kind == "dataset" and not torture.long:
        pytest.skip("in the long form: the library follows a thousand of them")
    name = new(hub, kind)
    hub.misbehave(name, "loop", FOR_EVER)
    answer = ask(asker, name)
    assert (
        answer.error.startswith(f"{KINDS[kind]}={name}: the server at {hub.address}")
        and "HF_ENDPOINT" in answer.error
    )
    assert answer.pauses == []


def test_a_pause_is_as_long_as_the_hub_asks_within_five_minutes(hub, asker):
    waits = {
        fault: hub.add_model() for fault in ("limited", "limited, wait 2", "limited, window 3")
    }
    for fault, name in waits.items():
        hub.misbehave(name, fault)
    assert [asker.model(name).pauses for name in waits.values()] == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize(
    "fault", ["cut", "short", "shrunk", "html", "closed", "limited", "broken", "loop"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_does_not_arrive_whole_is_fetched_again_and_is_right(hub, asker, kind, fault):
    name = new(hub, kind)
    hub.misbehave(f"GET {'/datasets' if kind == 'dataset' else ''}/{name}/resolve", fault)
    assert_right(hub, name, ask(asker, name))


def test_a_download_that_is_cut_more_than_twice_goes_on_as_long_as_something_arrives(hub, asker):
    name = hub.add_model(LARGE)
    hub.misbehave(f"GET /{name}/resolve/{hub.commit_of(name)}/model.safetensors", "short", 3)
    assert_right(hub, name, asker.model(name))
    ranges = [
        request.range
        for request in hub.requests
        if request.method == "GET" and request.path.endswith(".safetensors")
    ]
    assert ranges == ["", "bytes=20971520-", "bytes=31457280-", "bytes=31457280-"]


@pytest.mark.parametrize(
    "half", ["an honest half", "a page of a proxy", "more than there is", "all, wrong"]
)
def test_what_a_killed_download_left_is_gone_on_with_or_thrown_away(
    hub, asker, model, half, tmp_path_factory
):
    weights = hub.folder / "models" / model / "model.safetensors"
    content = weights.read_bytes()
    left = {
        "an honest half": content[:100_000],
        "a page of a proxy": b"<html>Sign in to this network</html>",
        "more than there is": content + b"x",
        "all, wrong": bytes(len(content)),
    }[half]
    blob = (
        Path(asker.home)
        / "hub"
        / f"models--{model.replace('/', '--')}"
        / "blobs"
        / hubs.digest_of(weights.name, weights)
    )
    blob.parent.mkdir(parents=True)
    blob.with_name(f"{blob.name}.incomplete").write_bytes(left)
    assert_right(hub, model, asker.model(model))
    asked = [
        request.range
        for request in hub.requests
        if request.method == "GET" and request.path.endswith(".safetensors")
    ]
    assert asked[:1] == {"an honest half": ["bytes=100000-"], "all, wrong": [""]}.get(
        half, asked[:1]
    )


@pytest.mark.parametrize("where", ["/api/models/{}", "HEAD /{}/resolve", "GET /{}/resolve"])
@pytest.mark.parametrize("fault", ["stall", "dribble"])
def test_a_hub_that_falls_silent_ends_by_a_time_limit(hub, asker, model, where, fault, torture):
    if not torture.long and ("HEAD" in where or fault == "dribble"):
        pytest.skip("in the long form: each waits some seconds for nothing")
    hub.misbehave(where.format(model), fault, FOR_EVER)
    answer = asker.model(model, ("*.safetensors",))
    if fault == "dribble" and "HEAD" in where:
        assert answer.fetched  # it has no body
    else:
        assert "cannot be reached" in answer.error and sum(answer.pauses) <= 60


def test_the_token_goes_to_no_other_host(hub, asker, model):
    with hubs.running(hub.folder) as elsewhere:
        hub.misbehave("model.safetensors", f"http://localhost:{elsewhere.server_port}", FOR_EVER)
        assert_right(hub, model, asker.model(model))
        assert elsewhere.requests and not any(request.authorized for request in elsewhere.requests)
    assert all(request.authorized for request in hub.requests)


def test_whatever_happens_in_whatever_order_the_content_is_right_or_there_is_a_clear_error(
    hub, asker, torture
):
    faults = [name for name in (*hubs.REFUSALS, *hubs.FAULTS) if name not in ("stall", "dribble")]
    for _ in range(torture.times(6, 150)):
        kind = torture.random.choice(list(KINDS))
        name = new(hub, kind)
        hub.faults.clear()
        for fault in torture.random.choices(faults, k=torture.random.randint(1, 6)):
            hub.misbehave(
                name, fault if torture.random.random() < 0.7 else "", torture.random.randint(1, 4)
            )
        for _ in range(40):
            answer = ask(asker, name)
            if answer.fetched:
                break
            told = f"seed {torture.seed}: {hub.faults}\n{answer.error}"
            assert (
                answer.error.startswith(f"{KINDS[kind]}={name}")
                and "cannot be loaded from the Hub" not in answer.error
            ), told
        assert_right(hub, name, answer)
        torture.count()
