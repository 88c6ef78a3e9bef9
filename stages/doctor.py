"""Check that the stages can run here. Prints a line for each requirement: OK, or what to do.

python -m stages.doctor        exit status 1 when a stage could not run

Changes no file and fetches only the model's configs. Each backend has a `doctor` module with its
requirements; machine.py has those of every backend.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

# Read when the Hub's library is imported: without a network, the checks end soon.
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "5")

from stages import machine
from stages.checks import local_config, machine_problems, problems
from stages.model.base import base_config, config_folder, config_notes
from stages.model.hub import from_hub
from stages.model.hub_write import MISSING, model_visibility, rights
from stages.model.location import local_model, local_path, own_output_problems
from stages.run.backend import backend_module
from stages.run.check_result import FAIL, Check, CheckResult, fail, note
from stages.run.errors import InputError, StageFailure
from stages.run.setting import STAGES
from stages.run.settings import Settings
from stages.text.eval_set import read_eval_set
from stages.text.questions import read_questions
from stages.text.sources import FORMATS


def model_source(settings: Settings) -> Iterator[CheckResult]:
    try:
        base_config(settings)
        notes = config_notes(config_folder(settings.model_id, settings.model_revision))
    except (InputError, StageFailure) as error:
        yield fail("MODEL_ID", str(error).removeprefix("MODEL_ID="))
        return
    yield from (note("MODEL_ID", text) for text in notes)
    if run := os.environ.get("RUN"):
        for problem in own_output_problems(settings.model_id, machine.OUTPUTS / run):
            yield fail("MODEL_ID", problem.removeprefix("MODEL_ID="))
    name, folder = settings.model_id, local_model(settings.model_id)
    if folder is None:
        yield CheckResult("MODEL_ID", f"{name} at {settings.model_revision}, {_hub()}")
    elif settings.init_weights == "random" or any(folder.glob("*.safetensors")):
        yield CheckResult("MODEL_ID", f"{name}, a folder")
    else:
        remedy = "Put the weights into it, or set INIT_WEIGHTS=random."
        yield fail("MODEL_ID", f"{name} has no *.safetensors. {remedy}")


def dataset_source(settings: Settings) -> Iterator[CheckResult]:
    name = settings.dataset
    if name.startswith("s3://"):
        yield CheckResult("DATASET", f"{name}, in S3: not checked here")
        return
    try:
        path = local_path("DATASET", name, "a file or a folder", suffixes=FORMATS)
        if path is None and not _offline():
            from huggingface_hub import HfApi

            def ask() -> None:
                HfApi().auth_check(name, repo_type="dataset")

            from_hub("dataset", name, settings.dataset_revision, ask)
    except InputError as error:
        yield fail("DATASET", str(error).removeprefix("DATASET="))
        return
    if path is not None:
        yield CheckResult("DATASET", f"{name}, a {'folder' if path.is_dir() else 'file'}")
    elif _offline():
        reason = "HF_HUB_OFFLINE is set, so the Hub was not asked"
        yield note("DATASET", f"{name}: {reason}. It is read from the cache if that has it.")
    else:
        yield CheckResult("DATASET", f"{name} at {settings.dataset_revision}, {_hub()}")


def prompts_source(settings: Settings) -> Iterator[CheckResult]:
    try:
        asked = read_questions(settings)
    except InputError as error:
        for problem in error.problems:
            yield fail("PROMPTS", problem.removeprefix("PROMPTS="))
        return
    yield CheckResult("PROMPTS", f"{settings.prompts}, {len(asked.questions):,} prompts")
    if line := asked.note(settings):
        yield note("PROMPTS", line.partition(": ")[2])


def eval_set_source(settings: Settings) -> Iterator[CheckResult]:
    if not settings.eval_set:
        return
    try:
        read_eval_set(settings)
    except InputError as error:
        for problem in error.problems:
            yield fail("EVAL_SET", problem.removeprefix("EVAL_SET="))
        return
    yield CheckResult("EVAL_SET", settings.eval_set)


def fit(settings: Settings) -> Iterator[CheckResult]:
    """What the stages would refuse because of the settings, the model's config.json, or what this
    machine lacks."""
    try:
        config = local_config(str(config_folder(settings.model_id, settings.model_revision)))
    except InputError:
        config = None  # `model_source` reports it
    stages = [stage for stage in STAGES if stage != "eval"]  # its files are checked above
    found = [*problems(settings, config, stages), *machine_problems(settings, STAGES)]
    if found:
        yield from (fail("settings", problem) for problem in found)
    elif config is not None:
        yield CheckResult("settings", "the model can be trained and compiled with them")


def hub_repository(settings: Settings) -> Iterator[CheckResult]:
    """Whether `make push` may write to HUB_REPO, as far as the Hub tells; nothing is written."""
    name = settings.hub_repo
    if not name:
        return
    if _offline():
        yield note(
            "HUB_REPO", f"{name}: not asked, because HF_HUB_OFFLINE is set. Unset it to push."
        )
        return
    try:
        found = model_visibility(name, settings.hub_public)
        whose, problems = rights(name)
    except InputError as error:
        yield fail("HUB_REPO", str(error).removeprefix("HUB_REPO="))
        return
    yield from (fail("HUB_REPO", f"{name}: {problem}") for problem in problems)
    if not problems:
        kind = "public" if settings.hub_public else "private"
        state = f"will be made, {kind}" if found == MISSING else f"exists, {found}"
        yield CheckResult("HUB_REPO", f"{name} {state}; {whose}, who may write there")


CHECKS: list[Check] = [
    machine.python_version,
    machine.make_version,
    machine.backend_choice,
    machine.packages,
    machine.writable,
    model_source,
    dataset_source,
    prompts_source,
    eval_set_source,
    hub_repository,
    fit,
    machine.disk,
    machine.disk_speed,
    machine.memory,
    machine.training_memory,
]


def examine(settings: Settings) -> list[CheckResult]:
    """All results in the order of the checks, which run in parallel: some wait for the Hub, some
    import PyTorch."""
    checks = list(CHECKS)
    failures = []
    try:
        checks += backend_module("doctor", settings).CHECKS
    except InputError as error:
        failures.append(fail("backend", str(error)))
    with suppress(ImportError):  # a check reports it
        # transformers imports its modules on first use, which two threads must not do at the same
        # time.
        from transformers import AutoConfig  # noqa: F401
    with ThreadPoolExecutor(len(checks)) as pool:
        results = list(pool.map(lambda check: _results(check, settings), checks))
    return [result for group in results for result in group] + failures


def _results(check: Check, settings: Settings) -> list[CheckResult]:
    """The results of a check; an exception in it becomes a result too."""
    about = getattr(check, "__name__", "check").replace("_", " ")
    try:
        return list(check(settings))
    except InputError as error:
        return [fail(about, problem) for problem in error.problems]
    # A library does not load or a tool is broken: the other checks continue.
    except Exception as error:
        return [fail(about, f"{type(error).__name__}: {error}. Fix what it names.")]


def main() -> int:
    try:
        settings = Settings.read()
    except InputError as error:
        results = [fail("settings", problem) for problem in error.problems]
    else:
        results = examine(settings)
    width = max(len(result.about) for result in results)
    for result in results:
        print(result.line(width))
    failed = sum(result.state == FAIL for result in results)
    print(
        f"{failed} thing{'' if failed == 1 else 's'} to fix"
        if failed
        else "every stage can run here"
    )
    return 1 if failed else 0


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _hub() -> str:
    return "from the Hub's cache (HF_HUB_OFFLINE is set)" if _offline() else "on the Hub"


if __name__ == "__main__":
    sys.exit(main())
