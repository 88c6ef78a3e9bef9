"""`make push`: the model arrives whole on the Hub (loopback) with a card that holds what was
measured, once; what goes wrong is said with the remedy."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from stages.data import pack
from stages.make.stale import main as stale
from stages.model.card_answers import fenced, how_to_ask
from stages.run.errors import InputError
from stages.run.publish import StageResult, publish
from stages.run.settings import Settings
from stages.text.answer import Answer, write_answers
from stages.text.conversation import Message
from stages.text.prompt import TextFormat
from stages.text.questions import Question
from stages.text.text_template import DOLLY, PLAIN
from stages.text.tokens import TextTokenizer
from tests.conftest import ROOT
from tests.fakes import hub as hubs
from tests.fakes.hub import FOR_EVER, Hub
from tests.model.ask_hub import Answer as Pushed
from tests.model.ask_hub import Asker

SETTINGS = Settings(
    model_id=str(ROOT / "data/demo/model"),
    dataset=str(ROOT / "data/demo/demo.jsonl"),
    prompts=str(ROOT / "data/demo/prompts.jsonl"),
    max_length=128,
    inference_sequence_length=256,
    init_weights="random",
    learning_rate=2e-4,
    validation_fraction=0.2,
)
LOSSES = {"base": 2.5, "fine_tuned": 1.25}
ACC = {"base": 0.25, "base_stderr": None, "fine_tuned": 0.5, "fine_tuned_stderr": 0.125}
TASKS = {
    name: {"version": "1.0", "examples": 1_000, "local": local, "metrics": {"acc": ACC}}
    for name, local in (("arc_easy", False), ("private-name-task", True))
}
LM_EVAL = {"version": "0.4.13", "dtype": "float32", "limit": 1_000, "tasks": TASKS}
QUESTIONS = ("What is a shard?", "Why ```fences```?", "<b>Is this bold?</b>")


def tiny_model(work: Path, data: Path) -> None:
    """A model of the demo's vocabulary, as consolidate publishes it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(SETTINGS.model_id)
    config.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1})
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(work)
    shutil.copytree(data / "tokenizer", work, dirs_exist_ok=True)
    shutil.copyfile(data / "prompt.json", work / "prompt.json")


def evaluated(work: Path) -> StageResult:
    write_answers(
        work / "answers.jsonl",
        [
            Answer(Question((Message("user", one, ""),)), f"A {one}", 3, True, -2.5)
            for one in QUESTIONS
        ],
    )
    losses = {name: {"loss": loss, "perplexity": 2 * loss} for name, loss in LOSSES.items()}
    metrics = {"answers": 3, **losses, "loss_dtype": "float32", "lm_eval": LM_EVAL}
    return StageResult(metrics=metrics, tokens=9)


def publish_model(run: Path, settings: Settings = SETTINGS) -> None:
    """Publish train and consolidate in `run`, which has the data stage's output."""

    def trained(work: Path) -> StageResult:
        (work / "config.json").write_text(json.dumps(settings.affecting("train")))
        return StageResult(metrics={"step": 7, "epoch": 3.0, "loss": 1.5}, tokens=896)

    def consolidated(work: Path) -> StageResult:
        tiny_model(work, run / "data")
        if settings.lora_r:
            (work / "adapter").mkdir()
            (work / "adapter/adapter_config.json").write_text(f'{{"r": {settings.lora_r}}}')
            (work / "adapter/adapter_model.safetensors").write_bytes(b"matrices")
        return StageResult(metrics={"parameters": 12_345, "dtype": "float32"})

    publish("train", settings, {"data": run / "data"}, run / "train", trained)
    inputs = {"train": run / "train"}
    publish("consolidate", settings, inputs, run / "consolidate", consolidated)


def publish_eval(run: Path, settings: Settings = SETTINGS) -> None:
    inputs = {name: run / name for name in ("data", "consolidate")}
    publish("eval", settings, inputs, run / "eval", evaluated)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("private-name") / "run"
    publish("data", SETTINGS, {}, run / "data", lambda work: pack(SETTINGS, work))
    publish_model(run)
    publish_eval(run)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A run with a model that was pushed nowhere yet."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hubs.running(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(scope="module")
def asker(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    with Asker(hub.address, tmp_path_factory.mktemp("cache")) as asker:
        yield asker


def pushed(asker: Asker, run: Path, target: str, **settings: Any) -> Pushed:
    answer = asker.push_model(run, **{**vars(SETTINGS), "hub_repo": target, **settings})
    assert not answer.error, answer.error
    return answer


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def writes(hub: Hub) -> int:
    return sum(hub.asked(word) for word in ("/commit/", "PUT ", "repos/create", "preupload"))


def test_the_hub_gets_a_private_model_that_transformers_loads_with_the_same_logits(
    hub: Hub, asker: Asker, run: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hub.requests.clear()
    answer = pushed(asker, run, "owner/whole")
    assert "push: pushed" in answer.printed[-1] and "(private)" in answer.printed[-1]
    assert "owner/whole" in hub.private and hub.asked("/commit/") == 1
    repository = hub.folder / "models/owner/whole"
    ours, theirs = files_of(run / "consolidate"), files_of(repository)
    del ours["manifest.json"]
    assert theirs.keys() == ours.keys() | {"README.md", ".gitattributes"}
    assert {name: theirs[name] for name in ours} == ours
    tokenizer = AutoTokenizer.from_pretrained(repository)
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", add_generation_prompt=True)
    with torch.no_grad():
        one, other = (
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits
            for folder in (run / "consolidate", repository)
        )
    assert torch.equal(one, other)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert fenced(text) in (repository / "README.md").read_text()  # the card's example


def test_the_card_holds_what_was_measured_and_nothing_private(
    hub: Hub, asker: Asker, run: Path
) -> None:
    pushed(asker, run, "owner/card")
    text = (hub.folder / "models/owner/card/README.md").read_text()
    data = ModelCard.load(hub.folder / "models/owner/card/README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {one.metric_type: one.metric_value for one in data.eval_results or []} == {
        "loss": 1.25,
        "perplexity": 2.5,
    }
    # A local base and dataset are nobody's business, and random weights have no base.
    assert not data.base_model and not data.datasets and not data.license
    assert "a local dataset" in text and "from random weights" in text
    assert "| Loss (nats per token) | 2.5000 | 1.2500 |" in text
    assert "| arc_easy | 1.0 | 1,000 | acc | 0.2500 | 0.5000 ± 0.1250 |" in text
    assert "lm-evaluation-harness 0.4.13 in float32, without a chat template, on at most" in text
    assert "LEARNING_RATE=0.0002" in text and "LORA_ALPHA" not in text
    assert "Optimizer steps: 7" in text and "12,345 parameters" in text
    assert all(f"Q: {one}\nA: A {one}" in text for one in QUESTIONS)
    rows = len((ROOT / "data/demo/demo.jsonl").read_text().splitlines())
    assert f"Examples: {rows:,}" in text
    for private in (str(ROOT), str(run), "private-name", "/tmp", "demo.jsonl", "hf_canary"):
        assert private not in text, private


def test_the_same_model_is_pushed_once_and_again_where_the_repository_is_gone(
    hub: Hub, asker: Asker, run: Path
) -> None:
    pushed(asker, run, "owner/once")
    hub.requests.clear()
    assert pushed(asker, run, "owner/once").printed[-1].startswith("push: up to date")
    assert not writes(hub)
    shutil.rmtree(hub.folder / "models/owner/once")
    pushed(asker, run, "owner/once")
    assert (hub.folder / "models/owner/once/model.safetensors").exists()
    pushed(asker, run, "owner/elsewhere")
    assert (hub.folder / "models/owner/elsewhere/model.safetensors").exists()


def test_what_a_former_model_left_is_removed_and_the_rest_is_kept(
    hub: Hub, asker: Asker, run: Path
) -> None:
    pushed(asker, run, "owner/former")
    repository = hub.folder / "models/owner/former"
    for name in ("model-00001-of-00002.safetensors", "adapter/adapter_config.json", "notes.txt"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("former")
    (run / ".pushed-model.json").unlink()
    lines = pushed(asker, run, "owner/former").printed
    assert any("model-00001-of-00002.safetensors" in line for line in lines)
    names = set(files_of(repository))
    assert "notes.txt" in names and "adapter/adapter_config.json" not in names
    assert "model-00001-of-00002.safetensors" not in names


def test_the_adapter_of_lora_is_there_and_the_card_tells_its_rank(
    hub: Hub, asker: Asker, run: Path
) -> None:
    settings = Settings(**{**vars(SETTINGS), "lora_r": 4, "init_weights": "pretrained"})
    publish_model(run, settings)
    lines = pushed(asker, run, "owner/lora").printed
    repository = hub.folder / "models/owner/lora"
    assert (repository / "adapter/adapter_model.safetensors").read_bytes() == b"matrices"
    text = (repository / "README.md").read_text()
    assert "LoRA: rank 4" in text and "PeftModel" in text and "LORA_R=4" in text
    # eval measured the model of before: its losses are not this one's.
    assert "On held-out sequences: not measured." in text and "1.25" not in text
    assert not ModelCard.load(repository / "README.md").data.eval_results
    assert any("eval has no record of this model" in line for line in lines)


def test_a_loss_of_another_base_than_the_trained_one_is_not_the_base_models(
    hub: Hub, asker: Asker, run: Path
) -> None:
    publish_eval(run, Settings(**{**vars(SETTINGS), "model_revision": "v2"}))
    pushed(asker, run, "owner/other-base")
    text = (hub.folder / "models/owner/other-base/README.md").read_text()
    assert "| Loss (nats per token) | not measured | 1.2500 |" in text
    assert "| acc | not measured | 0.5000 ± 0.1250 |" in text


ASKED: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    # an answer of answers.jsonl, the template, what the card has
    "with a context": (
        {"instruction": "How many?", "context": 'Three "balls".'},
        DOLLY,
        ['### Instruction\nHow many?\n\n### Context\nThree "balls".\n\n### Answer\n'],
    ),
    "a conversation": (
        {"messages": [{"role": role, "content": role} for role in ("user", "assistant", "user")]},
        DOLLY,
        ["### Instruction\nuser\n\n### Answer\nassistant</s>### Instruction\nuser"],
    ),
    "a text without a prompt": (
        {"instruction": "Once upon", "context": ""},
        PLAIN,
        ['model("Once upon", max_new_tokens=256)', "It continues a text"],
    ),
}


@pytest.mark.parametrize("asked", ASKED)
def test_the_card_asks_as_the_model_was_trained(tmp_path: Path, asked: str) -> None:
    answer, template, expected = ASKED[asked]
    tokenizer = TextTokenizer.load(ROOT / "data/demo/model")
    tokenizer.save(tmp_path)
    TextFormat(tokenizer, template).save(tmp_path)
    text = how_to_ask("owner/name", tmp_path, [answer], lora=False)
    assert all(one in text for one in expected), text
    ast.parse(text.split("```python\n")[1].split("\n```")[0])


def test_without_manifests_the_card_says_what_is_not_known(
    hub: Hub, asker: Asker, run: Path
) -> None:
    for stage in ("data", "train", "eval"):
        shutil.rmtree(run / stage)
    pushed(asker, run, "owner/bare")
    text = (hub.folder / "models/owner/bare/README.md").read_text()
    assert "a base model that is not recorded" in text
    assert "Dataset: not recorded" in text and "Settings: not recorded" in text
    assert "Answers to prompts: not measured" in text


def test_a_base_and_a_dataset_of_the_hub_and_the_bases_licence_are_metadata(
    hub: Hub, asker: Asker, run: Path
) -> None:
    base = hub.add_model()
    (hub.folder / "models" / base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own-1\nlicense_link: LICENSE.txt\n---\nA model.\n"
    )
    changes = {"model_id": base, "dataset": "owner/rows", "init_weights": "pretrained"}
    settings = Settings(**{**vars(SETTINGS), **changes})
    publish("data", settings, {}, run / "data", lambda work: copied(run / "data", work))
    publish_model(run, settings)
    pushed(asker, run, "owner/child")
    data = ModelCard.load(hub.folder / "models/owner/child/README.md").data
    assert (data.base_model, data.datasets) == (base, ["owner/rows"])
    assert (data.license, data.license_name) == ("other", "own-1")
    assert data.license_link == f"https://huggingface.co/{base}/blob/main/LICENSE.txt"


def copied(data: Path, work: Path) -> StageResult:
    shutil.copytree(data, work, dirs_exist_ok=True)
    return StageResult()


def test_the_licence_of_a_local_base_is_its_cards_unless_the_folder_has_changed(
    hub: Hub, asker: Asker, run: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(SETTINGS.model_id, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    settings = Settings(**{**vars(SETTINGS), "model_id": str(base)})
    publish_model(run, settings)
    pushed(asker, run, "owner/local-1", model_id=str(base))
    card = hub.folder / "models/owner/local-1/README.md"
    assert ModelCard.load(card).data.license == "apache-2.0" and "/base" not in card.read_text()
    (base / "config.json").write_text("{}")
    lines = pushed(asker, run, "owner/local-2", model_id=str(base)).printed
    assert not ModelCard.load(hub.folder / "models/owner/local-2/README.md").data.license
    assert any("no licence of the base model" in line for line in lines)


def test_a_public_repository_gets_nothing_unless_it_is_allowed(
    hub: Hub, asker: Asker, run: Path
) -> None:
    name = hub.add_model()
    hub.requests.clear()
    answer = asker.push_model(run, hub_repo=name)
    assert f"HUB_REPO={name} is public on the Hub" in answer.error and answer.exit_status == 2
    assert not writes(hub)
    assert "(public)" in pushed(asker, run, name, hub_public=True).printed[-1]
    pushed(asker, run, "owner/open", hub_public=True)
    assert "owner/open" not in hub.private
    # One that is private stays so.
    pushed(asker, run, "owner/closed")
    (run / ".pushed-model.json").unlink()
    assert "(private)" in pushed(asker, run, "owner/closed", hub_public=True).printed[-1]
    assert "owner/closed" in hub.private


REFUSED = {
    # the Hub's answer: where, words of the message, exit status
    "forbidden": ("repos/create", "a token with the right to write", 2),
    "not signed in": ("", "does not know the token (401)", 2),
    "limited": ("/commit/", "limits requests from this machine (429)", 1),
    "broken": ("/commit/", "out of order (500)", 1),
    "out of order": ("", "out of order (503)", 1),
    "closed": ("preupload", "cannot be reached", 1),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_refusal_names_the_remedy_and_the_next_push_sends_the_rest(
    hub: Hub, asker: Asker, run: Path, fault: str
) -> None:
    where, words, status = REFUSED[fault]
    name = f"owner/refused-{fault.replace(' ', '-')}"
    hub.large_files.clear()
    hub.misbehave(where, fault, FOR_EVER)
    answer = asker.push_model(run, hub_repo=name)
    hub.faults.clear()
    hub.requests.clear()
    assert answer.error.startswith(f"HUB_REPO={name}") and words in answer.error, answer.error
    assert answer.exit_status == status and "hf_canary" not in answer.error
    assert not (hub.folder / "models" / name / "config.json").exists()
    pushed(asker, run, name)
    assert (hub.folder / "models" / name / "config.json").exists()
    assert hub.asked("PUT ") == (
        0 if where == "/commit/" else 1
    )  # the weights, unless they arrived


def test_damaged_files_are_not_pushed(hub: Hub, asker: Asker, run: Path) -> None:
    weights = run / "consolidate/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    hub.requests.clear()
    answer = asker.push_model(run, hub_repo="owner/damaged")
    assert "model.safetensors has other bytes than were published" in answer.error
    assert answer.exit_status == 1 and not writes(hub)


def test_without_a_token_or_a_model_nothing_is_asked_of_the_hub(
    hub: Hub, asker: Asker, run: Path, tmp_path: Path
) -> None:
    hub.requests.clear()
    assert "Run `make consolidate`" in asker.push_model(tmp_path, hub_repo="owner/none").error
    with Asker(hub.address, tmp_path / "home", HF_TOKEN="") as stranger:
        answer = stranger.push_model(run, hub_repo="owner/none")
    assert "there is no token for the Hub" in answer.error and answer.exit_status == 2
    assert not hub.requests


FINE_GRAINED = {
    "role": "fineGrained",
    "fineGrained": {
        "scoped": [{"entity": {"type": "org", "name": "lab"}, "permissions": ["repo.write"]}]
    },
}


@pytest.mark.parametrize(
    ("target", "token", "state", "words"),
    [
        ("me/new", {"role": "write"}, "OK", "will be made, private; the token is me's"),
        ("lab/new", {"role": "write"}, "OK", "will be made"),
        ("lab/new", FINE_GRAINED, "OK", "will be made"),
        ("me/new", FINE_GRAINED, "FAIL", "has no right to write to me's repositories"),
        ("me/new", {"role": "read"}, "FAIL", "may only read"),
        ("readers/new", {"role": "write"}, "FAIL", "may only read in readers"),
        ("others/new", {"role": "write"}, "FAIL", "is no member of others"),
    ],
)
def test_the_doctor_says_whether_the_token_may_write_and_writes_nothing(
    hub: Hub, asker: Asker, target: str, token: dict[str, Any], state: str, words: str
) -> None:
    orgs = [{"name": "lab", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
    hub.account = {"name": "me", "orgs": orgs, "auth": {"accessToken": token}}
    hub.requests.clear()
    [line] = asker.rights(target).rows or []
    assert line.startswith(state) and words in line, line
    assert not writes(hub)


def test_the_doctor_refuses_a_public_repository_as_push_does(hub: Hub, asker: Asker) -> None:
    [line] = asker.rights(hub.add_model()).rows or []
    assert line.startswith("FAIL") and "HUB_PUBLIC=1" in line


@pytest.mark.parametrize(
    "text", ["name", "a/b/c", "s3://bucket/model", "owner/x..y", "https://huggingface.co/o/n"]
)
def test_a_repository_is_checked_when_settings_are_read(text: str) -> None:
    with pytest.raises(InputError, match=r"HUB_REPO: .*Write OWNER/NAME"):
        Settings.read({"HUB_REPO": text})


def test_a_token_in_the_name_is_not_printed() -> None:
    with pytest.raises(InputError) as refused:
        Settings.read({"HUB_REPO": "https://me:hf_canary@huggingface.co/me/model"})
    assert "canary" not in str(refused.value)


def test_the_base_model_is_no_place_for_what_is_made_of_it() -> None:
    with pytest.raises(InputError, match="would overwrite MODEL_ID=owner/Base"):
        Settings.read({"HUB_REPO": "owner/base", "MODEL_ID": "owner/Base"})


def test_make_push_without_a_repository_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("HUB_REPO", raising=False)
    with pytest.raises(SystemExit):
        stale(str(tmp_path), "data::", "consolidate:data:", "--given", "", "--goals", "push")
    assert "HUB_REPO is not set" in capsys.readouterr().err


def test_a_fence_is_longer_than_those_in_the_text() -> None:
    assert fenced("a ```` b").startswith("`````text\n")
    assert fenced("x") == "```text\nx\n```"
