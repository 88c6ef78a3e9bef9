"""What the doctor's checks yield. A check is a function of the settings, in the list CHECKS of a module named `doctor`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from stages.run.disk import write_problem
from stages.run.settings import Settings

OK, NOTE, FAIL = "OK", "note", "FAIL"


@dataclass(frozen=True)
class CheckResult:
    """One line: what was looked at, what was found and what to do about it, and whether that is fine, advice, or stops a stage."""

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
    """What keeps a stage from running; `text` ends with what to do."""
    return CheckResult(about, text, FAIL)


def folder_result(about: str, folder: Path, setting: str = "") -> CheckResult:
    """Whether `folder` can be written, or made where it is not there yet; `setting` is what moves it elsewhere."""
    elsewhere = f", or set {setting} to another folder" if setting else ""
    if problem := write_problem(folder):
        return fail(about, f"{problem}{elsewhere}.")
    return CheckResult(about, f"{folder} can be {'written' if folder.is_dir() else 'made'}")
