"""Two error types: InputError for what the user can fix (exit 2), StageFailure for what failed
(exit 1).

Every message names the problem, the numbers and the remedy; several problems are reported together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class InputError(Exception):
    """What the user can fix: a setting, an example of the data, a missing file. Exit status 2."""

    exit_status = 2

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class StageFailure(Exception):
    """What failed although the input was right: a dead worker, a loss that is not finite. Exit
    status 1."""

    exit_status = 1


class Stopped(StageFailure):
    """A training that was ended at a checkpoint, and goes on with the same command. Exit status 75
    (EX_TEMPFAIL of sysexits.h)."""

    exit_status = 75


PROBLEMS_SHOWN = 5


def refusal(heading: str, problems: list[str]) -> StageFailure:
    """One failure that lists the first problems and says how many more there are."""
    more = (
        [f"... and {len(problems) - PROBLEMS_SHOWN} more"] if len(problems) > PROBLEMS_SHOWN else []
    )
    return StageFailure("\n".join([heading, *problems[:PROBLEMS_SHOWN], *more]))


def exception_chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from or while handling."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def refuse(problems: Iterable[str]) -> None:
    """Raise InputError with all of `problems`, if there are any."""
    if found := list(problems):
        raise InputError(found)
