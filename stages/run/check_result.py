"""The result of one of the doctor's checks: functions of the settings, in the list CHECKS of a
module named `doctor`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from stages.run.disk import write_problem
from stages.run.settings import Settings

OK, NOTE, FAIL = "OK", "note", "FAIL"


@dataclass(frozen=True)
class CheckResult:
    """One line: the subject, the result with its remedy, and whether it is fine, advice or
    fatal."""

    about: str
    text: str
    state: str = OK

    def line(self, width: int) -> str:
        return f"{self.state:<4}  {self.about:<{width}}  {self.text}"


Check = Callable[[Settings], Iterable[CheckResult]]


def note(about: str, text: str) -> CheckResult:
    """Advice: every stage can run as it is."""
    return CheckResult(about, text, NOTE)


def fail(about: str, text: str) -> CheckResult:
    """A problem that keeps a stage from running; `text` ends with the remedy."""
    return CheckResult(about, text, FAIL)


def folder_result(about: str, folder: Path, setting: str = "") -> CheckResult:
    """Whether `folder` can be written or created; `setting` names the setting that moves it."""
    elsewhere = f", or set {setting} to another folder" if setting else ""
    if problem := write_problem(folder):
        return fail(about, f"{problem}{elsewhere}.")
    return CheckResult(about, f"{folder} can be {'written' if folder.is_dir() else 'made'}")
