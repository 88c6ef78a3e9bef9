"""Nothing that was downloaded is executed: not the code that a model, a tokenizer or a dataset
brings, and no pickle."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stages.backends.evaluate import _mean_loss
from stages.model.base import base_config, base_model_folder
from stages.model.check import described_model
from stages.run.errors import InputError, StageFailure
from stages.run.fingerprint import ROOT
from stages.run.settings import Settings
from stages.text.examples import Columns, open_examples
from stages.text.find_tokenizer import find_tokenizer
from tests.conftest import Project
from tests.tiny_llama import tiny_llama
from tests.torture.plugin import Torture

pytestmark = pytest.mark.torture("models")

# What each file of code would do as soon as it is imported.
EVIL = "import pathlib\npathlib.Path({marker!r}).write_text('ran')\nclass Evil: pass\n"
AUTO_MAP = {
    "AutoConfig": "configuration_evil.Evil",
    "AutoModel": "modeling_evil.Evil",
    "AutoModelForCausalLM": "modeling_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
}
# Calls that take weights or configs from a folder and could run what exists.
LOADERS = ("from_pretrained", "from_config")


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that nothing may write. The standard input is a pipe that nobody answers: who asks
    there fails."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def folder(tmp_path: Path, marker: Path) -> Path:
    """A Llama with a tokenizer, and code in every place from which transformers runs some when it
    is told to."""
    model = tmp_path / "model"
    tiny_llama().save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "data" / "demo" / "model" / name, model)
    for name in (
        "configuration_evil.py",
        "modeling_evil.py",
        "tokenization_evil.py",
        "__init__.py",
        "model.py",
    ):
        (model / name).write_text(EVIL.format(marker=str(marker)))
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(
        EVIL.format(marker=str(marker)) + "def generate(*a, **k): pass\n"
    )
    (model / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    )
    (model / "generation_config.json").write_text(
        json.dumps({"custom_generate": str(model), "trust_remote_code": True})
    )
    edit(model / "config.json", auto_map=AUTO_MAP, trust_remote_code=True)
    edit(model / "tokenizer_config.json", auto_map=AUTO_MAP, trust_remote_code=True)
    return model


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def settings(folder: Path) -> Settings:
    return Settings.read({"MODEL_ID": str(folder)})


def test_a_known_model_with_code_beside_it_is_loaded_without_the_code(folder: Path) -> None:
    assert base_config(settings(folder)).model_type == "llama"
    assert base_model_folder(settings(folder)) == folder
    assert type(described_model(folder)).__module__.startswith("transformers.")
    assert find_tokenizer(str(folder)).vocab_size > 0


def test_the_base_models_loss_is_measured_without_the_code(folder: Path) -> None:
    class NoRows:
        def in_order(self, _: int) -> Iterator:
            return iter(())

    device, dtype = torch.device("cpu"), torch.float32
    loss = _mean_loss(folder, "none", NoRows(), 0, settings(folder), None, device, dtype)
    assert loss == 0


def test_a_model_that_needs_its_code_is_refused(folder: Path) -> None:
    edit(folder / "config.json", model_type="evil", architectures=["Evil"])
    with pytest.raises(InputError, match=r"code of its own \(auto_map\), which is never run"):
        base_config(settings(folder))
    with pytest.raises(InputError, match=r"code of its own \(auto_map\), which is never run"):
        base_model_folder(settings(folder))
    with pytest.raises(StageFailure, match="code of its own"):
        described_model(folder)


@pytest.mark.parametrize("of", ["the tokenizer", "the model"])
def test_a_tokenizer_that_needs_its_code_is_refused(folder: Path, of: str) -> None:
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    edit(folder / "tokenizer_config.json", tokenizer_class="Evil")
    if of == "the model":
        (folder / "tokenizer_config.json").unlink()
        edit(folder / "config.json", model_type="evil")
    with pytest.raises(
        InputError,
        match=r"its files give no tokenizer.*Name a model whose folder has "
        r"tokenizer\.json",
    ):
        find_tokenizer(str(folder))


def test_an_attention_that_would_be_fetched_as_code_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kernels", None)
    edit(
        folder / "config.json",
        attn_implementation="kernels-community/evil",
        _attn_implementation="kernels-community/evil",
    )
    assert described_model(folder).config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["dataset.py", "evil.py"])
def test_a_dataset_with_a_script_is_not_run(tmp_path: Path, marker: Path, name: str) -> None:
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    (dataset / name).write_text(EVIL.format(marker=str(marker)))
    for given in (dataset, dataset / name):
        with pytest.raises(InputError, match=str(given)):
            open_examples(str(given), columns=Columns("instruction", "context", "response"))


def test_make_refuses_a_model_that_needs_its_code_and_asks_nothing(
    project: Project, tmp_path: Path, folder: Path
) -> None:
    edit(folder / "config.json", model_type="evil")
    copy = Project(shutil.copytree(project.folder, tmp_path / "project", symlinks=True))
    done = copy.make(
        "train", "RECIPE=tiny", f"MODEL_ID={folder}", "INIT_WEIGHTS=random", check=False
    )
    assert done.returncode == 2
    assert "code of its own (auto_map), which is never run" in done.stderr
    assert "Traceback" not in done.stderr and "[y/N]" not in done.stdout + done.stderr


def test_make_trains_and_asks_a_known_model_without_the_code_beside_it(
    project: Project, tmp_path: Path, folder: Path, marker: Path, torture: Torture
) -> None:
    torture.require_long()
    copy = Project(shutil.copytree(project.folder, tmp_path / "project", symlinks=True))
    tiny = copy.folder / "data" / "tiny"
    for path in folder.iterdir():
        if path.suffix in (".py", ".jinja"):
            shutil.copy(path, tiny)
    shutil.copytree(folder / "custom_generate", tiny / "custom_generate")
    shutil.copy(folder / "generation_config.json", tiny)
    for name in ("config.json", "tokenizer_config.json"):
        edit(tiny / name, auto_map=AUTO_MAP, trust_remote_code=True)
    copy.make("all", "RECIPE=tiny")
    assert not list((copy.folder / "outputs").rglob("*_evil.py"))


def sources() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted((ROOT / "stages").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            yield path, node


def keyword(call: ast.Call, name: str) -> object:
    values = [
        given.value.value
        for given in call.keywords
        if given.arg == name and isinstance(given.value, ast.Constant)
    ]
    return values[0] if values else None


def test_no_call_in_the_stages_leaves_open_whether_a_models_code_is_run() -> None:
    calls = [
        (path, node)
        for path, node in sources()
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in LOADERS
    ]
    assert len(calls) >= 6
    assert [
        f"{path}:{call.lineno}"
        for path, call in calls
        if keyword(call, "trust_remote_code") is not False
    ] == []


def test_no_pickle_in_the_stages_is_opened_but_as_weights() -> None:
    found = []
    for path, node in sources():
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            called = (node.func.value.id, node.func.attr)
            if called == ("torch", "load") and keyword(node, "weights_only") is not True:
                found.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
            if called[0] in (
                "pickle",
                "dill",
                "cloudpickle",
                "joblib",
                "marshal",
                "shelve",
            ) and called[1] in (
                "load",
                "loads",
                "Unpickler",
            ):
                found.append(f"{path}:{node.lineno}: {'.'.join(called)}")
            if called == ("np", "load") and keyword(node, "allow_pickle") not in (None, False):
                found.append(f"{path}:{node.lineno}: np.load with allow_pickle")
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("eval", "exec")
        ):
            found.append(f"{path}:{node.lineno}: {node.func.id}")
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            found += [
                f"{path}:{node.lineno}: {base}"
                for base in bases
                if base.endswith("pickle.Unpickler") or base.endswith("_Unpickler")
            ]
        if isinstance(node, ast.Attribute) and node.attr in (
            "unpack_archive",
            "extractall",
            "extract",
        ):
            found.append(f"{path}:{node.lineno}: {node.attr} of an archive")
    assert found == []
