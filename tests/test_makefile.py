"""The real Makefile: what runs again and why, what never does, and what a dry run may not do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from stages.run.limits import METADATA
from stages.run.setting import STAGES
from tests.conftest import ROOT, Project, clean_environment
from tests.fakes.metadata import metadata_service

TINY = ("RECIPE=tiny",)
AFTER_DATA = ["train", "consolidate", "compile-inference", "eval"]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# What makes a stage stale.


def test_a_built_run_is_fresh_in_another_folder_with_other_times(built: Project) -> None:
    assert built.stages_to_run("all", *TINY) == []
    assert built.make("-q", "all", *TINY).returncode == 0


def test_touching_everything_reruns_nothing(built: Project) -> None:
    for path in built.folder.rglob("*"):
        if path.is_file() and ".venv" not in path.parts:
            path.touch()
    assert built.stages_to_run("all", *TINY) == []


def test_a_comment_or_a_blank_line_reruns_nothing(built: Project) -> None:
    for script in built.folder.glob("stages/**/*.py"):
        script.write_text(f"# a comment\n\n{script.read_text()}")
    assert built.stages_to_run("all", *TINY) == []


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("LEARNING_RATE=2e-3", AFTER_DATA),
        ("TEMPERATURE=0.5", ["eval"]),
        ("LM_EVAL_LIMIT=5", ["eval"]),
        ("MAX_SHARD_SIZE=1GB", ["consolidate", "compile-inference", "eval"]),
        ("INFERENCE_SEQUENCE_LENGTH=32", ["compile-inference", "eval"]),
        ("QUANTIZE=int8", ["compile-inference", "eval"]),
        ("PER_DEVICE_TRAIN_BATCH_SIZE=2", ["precompile", *AFTER_DATA]),
        ("WARMUP_STEPS=5", ["precompile", *AFTER_DATA]),  # was 0: another graph on Neuron
        ("LOSS_ON=response", ["data", *AFTER_DATA]),
        ("LOGGING_STEPS=2", []),
        ("TRACKER=tensorboard", []),
        ("SAVE_STEPS=7", []),
        ("PUSH_DATASET=owner/rows", ["data"]),  # it pushes them, and publishes nothing
        ("KEEP_SHARDS=0", ["consolidate"]),  # it removes them, and publishes nothing
        ("LEARNING_RATE=0.001", []),  # as it was, written in another way
    ],
)
def test_a_setting_reruns_the_stages_that_it_concerns(
    built_once: Project, change: str, stages: list[str]
) -> None:
    assert built_once.stages_to_run("all", *TINY, change) == stages


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("stages/text/packing.py", ["data", *AFTER_DATA]),
        ("stages/backends/torch/optimizer.py", AFTER_DATA),
        ("stages/backends/torch/generate.py", ["compile-inference", "eval"]),
        ("stages/backends/evaluate.py", ["eval"]),
        ("stages/run/progress.py", []),
    ],
)
def test_an_edit_reruns_the_stages_that_run_the_code(
    built: Project, file: str, stages: list[str]
) -> None:
    path = built.folder / file
    path.write_text(path.read_text() + "\n\nADDED = 1\n")
    assert [stage for stage in built.stages_to_run("all", *TINY) if stage != "precompile"] == stages


def test_another_pinned_version_reruns_what_it_shapes(built: Project) -> None:
    edit(built.folder / "stages/requirements.txt", "tokenizers==0.22.2", "tokenizers==0.22.1")
    shown = built.make("status", *TINY).stdout
    assert "data  to run: tokenizers 0.22.2 -> 0.22.1" in shown
    assert "precompile  up to date" in shown


def test_other_rows_rerun_data_and_say_so(built: Project) -> None:
    edit(built.folder / "data/tiny/rows.jsonl", "Trainium", "Inferentia")
    assert "data  to run: DATASET has other content" in built.make("status", *TINY).stdout


def test_a_renamed_dataset_reruns_nothing(built: Project) -> None:
    (built.folder / "data/tiny/rows.jsonl").rename(built.folder / "data/other.jsonl")
    assert built.stages_to_run("all", *TINY, "DATASET=data/other.jsonl") == []


def test_a_missing_output_file_reruns_its_stage(built: Project) -> None:
    (built.folder / "outputs/tiny/consolidate/model.safetensors").unlink()
    assert built.stages_to_run("all", *TINY)[0] == "consolidate"


def test_a_stage_remade_with_the_same_content_stops_there(built: Project) -> None:
    """Blank lines in the dataset: other bytes, the same rows."""
    rows = built.folder / "data/tiny/rows.jsonl"
    rows.write_text("\n" + rows.read_text())
    assert built.stages_to_run("all", *TINY) == ["data", *AFTER_DATA]
    done = built.make("all", *TINY)
    assert "data: published" in done.stdout
    assert all(f"{stage}: up to date" in done.stdout for stage in AFTER_DATA)
    assert built.stages_to_run("all", *TINY) == []


def test_eval_alone_runs_again_for_another_temperature(built: Project) -> None:
    before = {
        stage: (built.folder / f"outputs/tiny/{stage}/manifest.json").stat().st_mtime_ns
        for stage in STAGES
    }
    done = built.make("eval", *TINY, "TEMPERATURE=0.5", "DO_SAMPLE=1")
    assert "eval: DO_SAMPLE False -> True; TEMPERATURE 1.0 -> 0.5" in done.stdout
    after = {
        stage: (built.folder / f"outputs/tiny/{stage}/manifest.json").stat().st_mtime_ns
        for stage in STAGES
    }
    assert [stage for stage in STAGES if before[stage] != after[stage]] == ["eval"]


def test_shards_that_were_removed_are_trained_again_only_when_they_are_needed(
    built: Project,
) -> None:
    consolidated = built.manifest("consolidate")
    built.make("consolidate", *TINY, "KEEP_SHARDS=0")  # set after the fact, it frees the disk too
    assert not (built.folder / "outputs/tiny/train/shards").exists()
    assert built.manifest("consolidate") == consolidated
    built.make("consolidate", *TINY, "KEEP_SHARDS=0", "MAX_SHARD_SIZE=20kB")
    assert not (built.folder / "outputs/tiny/train/shards").exists()
    assert len(list((built.folder / "outputs/tiny/consolidate").glob("*.safetensors"))) > 1
    assert built.stages_to_run("consolidate", *TINY, "MAX_SHARD_SIZE=20kB") == []
    assert built.stages_to_run("consolidate", *TINY, "MAX_SHARD_SIZE=30kB") == [
        "train",
        "consolidate",
    ]


# Asking changes nothing.


def test_dry_runs_and_questions_change_nothing(built: Project) -> None:
    before = built.snapshot()
    assert built.make("-q", "all", *TINY, "LEARNING_RATE=5e-3", check=False).returncode == 1
    for arguments in (
        ("-n", "all"),
        ("-n", "all", "LEARNING_RATE=5e-3"),
        ("-q", "all"),
        ("status",),
        ("help",),
    ):
        built.make(*arguments, *TINY)
    assert built.snapshot() == before


def test_a_spot_instances_notice_leads_to_a_checkpoint_and_the_same_command_goes_on(
    built: Project,
) -> None:
    command = ("train", *TINY, "MAX_STEPS=4", "INSTANCE_PRICE=36")
    with metadata_service("2026-11-28T12:00:00Z") as address:
        done = built.make(*command, check=False, **{METADATA: address})
    assert "Error 75" in done.stderr
    assert "Stopped at the checkpoint of step 1 of 4. EC2 takes this spot" in done.stderr
    (work,) = (built.folder / "outputs/tiny/.work").glob("train-*")
    before = json.loads((work / "spent.json").read_text())["seconds"]
    # What it took counts: the same command is refused by a budget that it would break.
    refused = built.make(*command, f"BUDGET={before / 100:.4f}", check=False)
    assert refused.returncode == 2 and "it is used up before this start" in refused.stderr
    goes_on = built.make(*command).stdout
    assert "continuing from the checkpoint of step 1 of 4" in goes_on
    manifest = built.manifest("train")
    assert manifest["metrics"]["step"] == 4 and manifest["seconds"] > before
    assert not {"stop", "spent.json"} & set(manifest["outputs"])


def test_an_adopted_stage_is_not_made_again(built: Project) -> None:
    edit(built.folder / "stages/backends/loss.py", 'reduction="sum"', 'reduction=str("sum")')
    assert "train" in built.stages_to_run("all", *TINY)
    why = built.make("why", *TINY, "STAGE=train").stdout
    assert "train would run:\n  stages/backends/loss.py was edited\n" in why
    for stage in ("precompile", "train", "eval"):
        built.make("adopt", *TINY, f"STAGE={stage}")
    assert built.stages_to_run("all", *TINY) == []
    assert "adopted" in built.make("history", *TINY).stdout
    assert "STAGE='nope' is no stage" in built.make("why", "STAGE=nope", check=False).stderr


def test_a_dry_run_on_a_fresh_clone_lists_the_stages_in_order(project: Project) -> None:
    assert project.stages_to_run("all", *TINY) == list(STAGES)
    assert project.stages_to_run("consolidate", *TINY) == [
        "data",
        "precompile",
        "train",
        "consolidate",
    ]
    assert not (project.folder / "outputs").exists()


def test_a_dry_run_says_why(built_once: Project) -> None:
    assert (
        "# train: LEARNING_RATE 0.001 -> 0.002"
        in built_once.make("-n", "all", *TINY, "LEARNING_RATE=2e-3").stderr
    )


# Failures.


def test_a_failing_stage_leaves_the_former_output(built: Project) -> None:
    before = built.manifest("data")
    (built.folder / "data/tiny/rows.jsonl").write_text('{"instruction": 3}\n')
    done = built.make("data", *TINY, check=False)
    assert done.returncode == 2 and "rows.jsonl" in done.stderr and "instruction" in done.stderr
    assert "Traceback" not in done.stderr
    assert built.manifest("data") == before
    assert (built.folder / "outputs/tiny/data/train").is_dir()


def test_all_bad_settings_are_refused_together_before_anything_runs(project: Project) -> None:
    done = project.make(
        "train", *TINY, "LEARNING_RATE=-1", "TOP_P=2", "LEARNIG_RATE=1", check=False
    )
    assert done.returncode == 2
    assert all(
        part in done.stderr
        for part in ("LEARNING_RATE=-1 must be above 0", "TOP_P=2", "Did you mean LEARNING_RATE?")
    )
    assert not (project.folder / "outputs").exists()


@pytest.mark.parametrize(
    "argument",
    [
        "RECIPE=nowhere",
        "RECIPE=../x",
        "RUN=a b",
        "RUN=../x",
        "RUN=.hidden",
        "RECIPE=$(shell touch pwned)",
    ],
)
def test_a_bad_recipe_or_run_is_refused(project: Project, argument: str) -> None:
    done = project.make("status", argument, check=False)
    assert done.returncode == 2 and argument.split("=")[0] in done.stderr
    assert not (project.folder / "pwned").exists()


def test_exported_variables_of_others_change_no_goal(built_once: Project) -> None:
    for exported in ({"CONTEXT": "prod"}, {"PROMPT": "$ "}, {"MAKELEVEL": "1", "V": "1"}):
        assert built_once.stages_to_run("all", *TINY, **exported) == [], exported
    outer = built_once.make("-n", "all", *TINY, "V=1", MAKELEVEL="1")
    assert "from the outer make: V is not a setting" in outer.stderr
    assert built_once.make("-n", "all", *TINY, "CONTEXT=c", check=False).returncode == 2


def test_make_B_is_refused_with_what_to_do_instead(built_once: Project) -> None:
    done = built_once.make("-B", "train", *TINY, check=False)
    assert done.returncode == 2 and "remove outputs/tiny/STAGE" in done.stderr
    assert built_once.make("-n", "-j4", "train", *TINY).returncode == 0


def test_what_a_recipe_sets_for_another_model_is_said(project: Project) -> None:
    other = ("RECIPE=tiny", "MODEL_ID=data/demo/model", "INIT_WEIGHTS=random")
    said = project.make("-n", "data", *other).stderr
    assert "note: RECIPE=tiny, made for MODEL_ID=data/tiny, also sets DATASET=" in said
    assert "made for" not in project.make("-n", "data", "RECIPE=tiny").stderr


# Values arrive as typed.

AWKWARD = (
    "It costs $5, $(shell touch pwned) `touch pwned`; \"double\" 'single' # not a "
    "comment\nand a second line \\ % $$"
)


@pytest.mark.parametrize("by", ["command line", "environment"])
def test_a_prompt_arrives_as_typed(built_once: Project, by: str) -> None:
    spy = built_once.folder / "spy"
    spy.write_text('#!/bin/bash\nprintf %s "$PROMPT" > "$0.out"\n')
    spy.chmod(0o755)
    arguments, environment = (
        ([f"PROMPT={AWKWARD}"], {}) if by == "command line" else ([], {"PROMPT": AWKWARD})
    )
    # VENV= runs the stages with PYTHON itself; stale.py needs the real one, so the spy passes on
    # what is not a stage.
    spy.write_text(
        '#!/bin/bash\n[[ $* == *stages.* ]] && printf %s "$PROMPT" > "$0.out" || exec '
        f'{shutil.which("python3")} "$@"\n'
    )
    built_once.make("eval", *TINY, "VENV=", "PYTHON=./spy", *arguments, **environment)
    assert (built_once.folder / "spy.out").read_text() == AWKWARD
    assert not (built_once.folder / "pwned").exists()


def test_one_prompt_is_answered_without_touching_the_stages(built: Project) -> None:
    before = built.snapshot()
    done = built.make("eval", *TINY, "PROMPT=What is $5?", "SEED=7", "DO_SAMPLE=1")
    assert done.stdout.strip()
    assert "train would run again: SEED 42 -> 7" in done.stderr
    assert built.snapshot() == before
    assert (
        built.make("eval", *TINY, "PROMPT=What is $5?", "SEED=7", "DO_SAMPLE=1").stdout
        == done.stdout
    )


def test_the_model_that_exists_is_pushed_and_nothing_is_trained_for_it(built: Project) -> None:
    shutil.rmtree(built.folder / "outputs/tiny/precompile")  # only a training needs it
    changed = (*TINY, "HUB_REPO=owner/model", "LEARNING_RATE=2e-3")
    assert built.stages_to_run("push", *changed) == ["push"]
    assert (
        "the existing model is pushed; train would run again"
        in built.make("-n", "push", *changed).stderr
    )
    assert built.stages_to_run("all", "push", *changed)[-2:] == ["eval", "push"]
    shutil.rmtree(built.folder / "outputs/tiny/consolidate")
    assert built.stages_to_run("push", *TINY, "HUB_REPO=owner/model")[-2:] == [
        "consolidate",
        "push",
    ]


def test_a_prompt_longer_than_the_compiled_length_is_refused_with_both_numbers(
    built_once: Project,
) -> None:
    done = built_once.make("eval", *TINY, f"PROMPT={'word ' * 100}", check=False)
    assert done.returncode == 2 and "64" in done.stderr and "Traceback" not in done.stderr


def test_command_line_beats_environment_beats_recipe_beats_default(project: Project) -> None:
    def rate(*arguments: str, **environment: str) -> str:
        lines = project.make("help", *arguments, **environment).stdout.splitlines()
        return next(line.strip() for line in lines if line.strip().startswith("LEARNING_RATE="))

    assert rate(*TINY, "LEARNING_RATE=3", LEARNING_RATE="2") == "LEARNING_RATE=3"
    assert rate(*TINY, LEARNING_RATE="2") == "LEARNING_RATE=2"
    assert rate(*TINY) == "LEARNING_RATE=1e-3"
    assert rate("RECIPE=llama2-7b") == "LEARNING_RATE=5e-5"


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("*.mk")))
def test_every_setting_of_a_shipped_recipe_takes_effect(project: Project, recipe: str) -> None:
    said = re.findall(
        r"^(\w+) \?= (.*)$", (ROOT / f"recipes/{recipe}.mk").read_text(), re.MULTILINE
    )
    shown = {line.strip() for line in project.make("help", f"RECIPE={recipe}").stdout.splitlines()}
    assert said and {f"{name}={value}" for name, value in said} <= shown
    assert project.stages_to_run("all", f"RECIPE={recipe}") == list(STAGES)


# Targets.


def test_clean_asks_before_it_removes_a_trained_model(built: Project) -> None:
    outputs = built.folder / "outputs/tiny"
    assert built.make("clean", *TINY, check=False).returncode != 0 and outputs.exists()
    cleaned = built.make("clean", *TINY, "YES=1")
    assert not outputs.exists() and "kept outputs/.cache" in cleaned.stdout


def test_runs_lie_side_by_side(built_once: Project) -> None:
    assert built_once.stages_to_run("data", *TINY, "RUN=another") == ["data"]


def test_what_a_run_was_is_written_down(built_once: Project) -> None:
    for stage in STAGES:
        manifest = built_once.manifest(stage)
        assert {
            "provenance",
            "outputs",
            "content",
            "seconds",
            "device",
            "versions",
            "metrics",
        } <= manifest.keys()
        assert not any(
            str(built_once.folder) in json.dumps(part)
            for part in (manifest["provenance"], manifest["outputs"])
        )
    losses = built_once.manifest("eval")["metrics"]
    assert losses["base"]["loss"] > 0 and losses["fine_tuned"]["perplexity"] > 1
    assert losses["loss_dtype"] == "float32"  # BF16=0


def test_status_says_what_data_read(built_once: Project) -> None:
    assert "read: instruction in 'instruction'" in built_once.make("status", *TINY).stdout


def test_gates_are_checked_without_asking_the_model_again(built_once: Project) -> None:
    passed = built_once.make("eval", *TINY, "GATES=ended>=0 perplexity>1")
    assert "eval: up to date" in passed.stdout and "GATES: passed" in passed.stdout
    failed = built_once.make("eval", *TINY, "GATES=ended>1 perplexity>1", check=False)
    assert failed.returncode and "failed: GATES: ended>1: ended is" in failed.stderr


def test_int8_weights_are_measured_and_too_large_a_loss_publishes_nothing(built: Project) -> None:
    int8 = ("eval", *TINY, "QUANTIZE=int8", "MAX_LOSS_INCREASE=1")
    done = built.make(*int8)
    assert "QUANTIZE=int8 adds" in done.stdout
    metrics = built.manifest("eval")["metrics"]
    assert metrics["quantized"]["loss"] != metrics["fine_tuned"]["loss"]
    assert "quantised" in built.make("status", *TINY, *int8[2:]).stdout
    assert built.stages_to_run("all", *TINY, *int8[2:]) == []
    before = built.manifest("eval")
    # Weights of three steps: their loss is surely too large.
    edit(built.folder / "stages/backends/torch/int8.py", "LARGEST = 127", "LARGEST = 1")
    failed = built.make("eval", *TINY, "QUANTIZE=int8", "MAX_LOSS_INCREASE=0.0001", check=False)
    assert failed.returncode == 2 and "MAX_LOSS_INCREASE=0.0001 allows no more" in failed.stderr
    assert built.manifest("eval") == before


def test_the_model_talks_in_make_chat(built_once: Project) -> None:
    done = subprocess.run(
        ["make", "chat", *TINY],
        cwd=built_once.folder,
        env=clean_environment(),
        input="What is a shard?\nAnd a rank?\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 2, done.stderr


def test_nothing_is_left_beside_the_outputs(built_once: Project) -> None:
    left = {path.name for path in (built_once.folder / "outputs/tiny").iterdir()}
    assert left == {*STAGES, ".lock"}


def test_serving_uses_what_is_published_and_runs_no_stage_though_one_is_stale(
    built_once: Project,
) -> None:
    for goal in ("serve", "serve-check"):
        assert built_once.stages_to_run(goal, *TINY, "LEARNING_RATE=1e-2") == [goal]
    assert built_once.stages_to_run("benchmark", *TINY, "LEARNING_RATE=1e-2") == []
    missing = built_once.stages_to_run("serve", *TINY, "RUN=other")
    assert missing == ["data", "precompile", "train", "consolidate", "serve"]
