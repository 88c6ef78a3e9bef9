"""The one list of what a stage would refuse, from the settings, config.json and PROMPTS.

make asks it before it starts anything, `make doctor` prints it, and each stage asks it for itself
and for the stages after it. So nothing that could have been known is refused after a training.
Standard library only, because make asks at every start; what needs the tokenizer or the machine is
checked by the first stage that has it.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from stages.model.config import translated_config
from stages.model.fit import quantize_problems, raw_config
from stages.run.backend import backend_module
from stages.run.errors import InputError, StageFailure, refuse
from stages.run.layout import CONFIG_FILE
from stages.run.setting import STAGES
from stages.run.settings import Settings
from stages.text.eval_set import read_eval_set
from stages.text.questions import read_questions
from stages.text.text_template import format_problems
from stages.track.check import tracker_problems


def problems(settings: Settings, config: Any | None, stages: Collection[str]) -> list[str]:
    """Why any of `stages` would refuse.

    `config` has config.json's values as attributes; without it, only the settings and PROMPTS are
    checked. A config.json that lacks a value is left to the stage that reads the model.
    """
    found: list[str] = []
    backend = backend_module("check", settings)
    if "compile-inference" in stages:
        found += quantize_problems(settings)  # needs no config.json
    try:
        if config is not None and {"precompile", "train"} & set(stages):
            found += backend.training_problems(settings, config, vocabulary=0)
        if config is not None and "compile-inference" in stages:
            found += backend.inference_problems(settings, config)
    except (AttributeError, TypeError):
        pass
    except InputError as error:  # NEURON_RT_* names no cores
        found += error.problems
    if "data" in stages:
        found += format_problems(settings)
    if "eval" in stages and not settings.prompt:
        for read in (read_questions, read_eval_set):
            try:
                read(settings)
            except ImportError:
                pass  # a format that needs pyarrow, where only the standard library is there
            except InputError as error:
                found += error.problems
    return list(dict.fromkeys(found))


def machine_problems(settings: Settings, stages: Collection[str]) -> list[str]:
    """What this machine lacks to run `stages`. Later stages may run on another one."""
    try:
        found = list(backend_module("check", settings).machine_problems(settings, stages))
    except InputError as error:  # NEURON_RT_* names no cores
        found = error.problems
    if {"precompile", "train"} & set(stages):  # a refusal after precompile's hours would be late
        found = [*found, *tracker_problems(settings)]
        if settings.budget:
            from stages.run.limits import limit_problems

            found = [*found, *limit_problems(settings)]
    if "eval" in stages and settings.lm_eval and not settings.prompt:
        from stages.run.harness import harness_problems  # few runs need it

        found = [*found, *harness_problems(settings)]
    return found


def local_config(model: str) -> Any | None:
    """The values of config.json in the folder `model` as attributes, None where there is none.

    Raises InputError for one that cannot be read, or means two things.
    """
    if not (Path(model) / CONFIG_FILE).is_file():
        return None
    try:
        return raw_config(translated_config(Path(model))[0])
    except StageFailure as failure:
        raise InputError(f"MODEL_ID={model}: {failure}") from failure


def require(settings: Settings, stage: str) -> None:
    """Raise InputError with everything that `stage`, or a stage after it, would refuse."""
    from stages.model.base import config_folder

    folder = config_folder(settings.model_id, settings.model_revision)
    later = STAGES[STAGES.index(stage) :]
    refuse(
        [
            *problems(settings, local_config(str(folder)), later),
            *machine_problems(settings, {stage}),
        ]
    )
