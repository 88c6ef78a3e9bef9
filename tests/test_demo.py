"""The demo as a newcomer runs it, and what it claims: the answers, and the first answer's start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.run.setting import STAGES
from tests.conftest import ROOT, Project, clean_environment, copy_project


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The demo, made from nothing, with fifty training questions to answer."""
    project = copy_project(tmp_path_factory.mktemp("demo") / "project")
    rows = (project.folder / "data/demo/demo.jsonl").read_text().splitlines(keepends=True)
    (project.folder / "data/fifty.jsonl").write_text("".join(rows[:50]))
    with pytest.MonkeyPatch.context() as patch:
        if "PYTEST_XDIST_WORKER" in os.environ:
            # Another worker has the other core: threads that wait for each other at every product
            # take three times as long.
            patch.setenv("OMP_NUM_THREADS", "1")
        project.make("demo", "PROMPTS=data/fifty.jsonl")
    return project


def test_nine_of_ten_training_questions_are_answered_to_the_letter(demo: Project) -> None:
    metrics = demo.manifest("eval", run="demo")["metrics"]
    assert metrics["judged"] == 50 and metrics["exact_matches"] >= 45
    lines = (demo.folder / "outputs/demo/eval/answers.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == 50 and all(
        answer["ended"] for answer in answers if answer["answer"] == answer["expected"]
    )


def test_one_question_is_answered_on_the_terminal(demo: Project) -> None:
    row = json.loads((demo.folder / "data/demo/prompts.jsonl").read_text().splitlines()[0])
    done = demo.make("eval", f"PROMPT={row['instruction']}", f"CONTEXT={row['context']}")
    assert done.stdout.strip() and done.stderr == ""


def test_an_answer_needs_neither_transformers_nor_datasets(demo: Project) -> None:
    block = (
        "import sys; sys.modules.update(transformers=None, datasets=None, pandas=None); from "
        "stages.eval import main; main(sys.argv[1:])"
    )
    folders = [
        word
        for name in ("data", "consolidate", "compile-inference")
        for word in (f"--{name}", f"outputs/demo/{name}")
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            block,
            "--prompt",
            "What is the KV cache?",
            *folders,
            "--output",
            "outputs/demo/eval",
        ],
        cwd=demo.folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_demo_run_again_has_nothing_to_do(demo: Project) -> None:
    assert "Nothing to be done" in demo.make("demo", "PROMPTS=data/fifty.jsonl").stdout


def test_the_consolidated_model_loads_in_plain_transformers(demo: Project) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo.folder / "outputs/demo/consolidate"
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == model.config.eos_token_id


@pytest.mark.parametrize("stage", [stage.replace("-", "_") for stage in STAGES])
def test_help_starts_without_the_heavy_libraries(stage: str) -> None:
    code = f"""
import sys
from stages.{stage} import main
try:
    main(["--help"])
finally:
    assert not {{"torch", "transformers", "datasets"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--output" in done.stdout, done.stderr


def test_the_demo_dataset_is_what_it_says() -> None:
    rows = [json.loads(line) for line in (ROOT / "data/demo/demo.jsonl").read_text().splitlines()]
    rewordings = [
        json.loads(line) for line in (ROOT / "data/demo/paraphrases.jsonl").read_text().splitlines()
    ]
    assert len(rows) >= 200 and all(
        row.keys() == {"instruction", "context", "response"} for row in rows
    )
    assert len({(row["instruction"], row["context"]) for row in rows}) == len(rows)
    assert {row["response"] for row in rewordings} <= {row["response"] for row in rows}
    assert not {row["instruction"] for row in rewordings} & {row["instruction"] for row in rows}


def test_the_shipped_tokenizer_gives_every_row_back(tmp_path: Path) -> None:
    from stages.text.tokens import TextTokenizer
    from tests.text.conversations import text_ids

    tokenizer = TextTokenizer.load(ROOT / "data/demo/model")
    for line in (ROOT / "data/demo/demo.jsonl").read_text().splitlines():
        text = " ".join(json.loads(line).values())
        assert tokenizer.decode(text_ids(tokenizer, text)) == text
