"""The command line of a stage: options are the settings that affect it, errors are exit statuses.

0: published, or up to date. 1: a failure. 2: a problem that the user can fix. 130: interrupted.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from stages.run.disk import disk_failure
from stages.run.errors import InputError, StageFailure
from stages.run.guard import guard_stage
from stages.run.setting import kind, variable
from stages.run.settings import Settings


def stage_command(
    stage: str, *more: str, publishes: bool = True, **folders: str
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a click command of `main(settings, <folders>, output)`; one that publishes nothing has
    no `output`.

    `folders`: name -> help of each upstream output that the stage reads. `more`: settings that
    change no published output but are this stage's (PROMPT).
    """

    def decorate(main: Callable[..., None]) -> click.Command:
        def run(**given: Any) -> None:
            folders_given = {name: given.pop(name) for name in paths}
            guard_stage()
            for stream in (sys.stdout, sys.stderr):
                # What a terminal cannot show is escaped: printing never ends a stage.
                if isinstance(stream, io.TextIOWrapper):
                    stream.reconfigure(errors="backslashreplace")
            if not sys.stderr.isatty():
                # Redrawn bars of libraries fill a log; `Progress` writes lines instead.
                os.environ.setdefault("TQDM_DISABLE", "1")
            with_exit_status(
                lambda: main(Settings.read({**os.environ, **_set(given)}), **folders_given),
                list(folders_given.values())[-1].parent,
            )

        paths = {**folders, **({"output": "Folder to publish."} if publishes else {})}
        places = [
            click.Option(
                [f"--{name.replace('_', '-')}"],
                type=click.Path(path_type=Path),
                required=True,
                help=text,
            )
            for name, text in paths.items()
        ]
        doc = sys.modules[main.__module__].__doc__
        return click.Command(
            stage, callback=run, params=[*places, *_options(stage, more)], help=doc
        )

    return decorate


def with_exit_status(work: Callable[[], None], folder: Path = Path("outputs")) -> None:
    """Run `work`, which writes to `folder`; end the process with its error's status and message."""
    try:
        work()
    except InputError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(error.exit_status)
    except StageFailure as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)  # guard.py need not repeat it
        print(
            "interrupted: nothing was published. The same command continues, a training from its "
            "last complete checkpoint.",
            file=sys.stderr,
        )
        sys.exit(130)
    except Exception as error:
        failure = disk_failure(error, folder)
        if failure is None:
            raise  # a defect of ours: only the traceback helps
        print(f"failed: {failure}", file=sys.stderr)
        sys.exit(failure.exit_status)


def _options(stage: str, more: tuple[str, ...]) -> list[click.Option]:
    options = []
    for f in fields(Settings):
        if stage in (*f.metadata["stages"], *f.metadata["on_or_off"]) or variable(f) in more:
            unit = f" [{f.metadata['unit']}]" if f.metadata["unit"] else ""
            text = f"{f.metadata['help']}{unit} (default: {f.default})"
            # Values stay text: `Settings.read` parses them and reports all problems together.
            options.append(
                click.Option(
                    [f"--{f.name.replace('_', '-')}"],
                    envvar=variable(f),
                    metavar=kind(f).upper(),
                    help=text,
                )
            )
    return options


def _set(given: dict[str, Any]) -> dict[str, str]:
    return {name.upper(): value for name, value in given.items() if value is not None}
