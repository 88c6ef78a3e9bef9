"""Progress of long work: a bar with the time left on a terminal, plain lines elsewhere.

A log file or CI gets one line per report instead of a bar redrawn thousands of times.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import unicodedata
from types import TracebackType

# Without a terminal, work that updates often prints at most this often.
SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts `total` pieces of work, or counts up where the total is not known (None).

    with Progress("pack", total=100, unit="rows") as bar: bar.update(10)

    Of several processes that do the same, only one is `shown`. `update(..., line=True)` forces a
    line where there is no terminal, for a training step that was logged.
    """

    def __init__(self, label: str, total: int | None, unit: str, done: int = 0, shown: bool = True):
        self.label, self.total, self.unit, self.done, self.shown = label, total, unit, done, shown
        self._first, self._started, self._last_line = done, time.monotonic(), time.monotonic()
        self._bar = None
        if (
            shown and sys.stderr.isatty() and importlib.util.find_spec("tqdm")
        ):  # make's own Python may have no packages
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=done,
                desc=label,
                unit=f" {unit}",
                dynamic_ncols=True,
                leave=True,
            )

    def update(
        self, count: int = 1, figures: dict[str, str] | None = None, line: bool = False
    ) -> None:
        """Advance by `count`; `figures` (loss, tokens/s) are shown after the bar or in the line."""
        self.done += count
        if self._bar is not None:
            if figures:
                self._bar.set_postfix(figures, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if self.shown and (line or now - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line = now
            shown = "".join(f", {name} {value}" for name, value in (figures or {}).items())
            count_of = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
            print(
                f"{self.label}: {count_of} {self.unit}{shown}{self._time_left()}",
                file=sys.stderr,
                flush=True,
            )

    def _time_left(self) -> str:
        if self.total is None or self.done <= self._first:
            return ""
        seconds = (
            (time.monotonic() - self._started)
            / (self.done - self._first)
            * (self.total - self.done)
        )
        return f", {duration(seconds)} left"

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Seconds as a person says them: `8 s`, `3 min 05 s`, `1 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def show_size(size: float) -> str:
    """`13.5 GB`, `812 MB`, `96 kB`, `12 B`: decimal units."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return (
                f"{size / scale:.3g} {unit}"
                if size < 1000 * scale
                else f"{size / scale:.0f} {unit}"
            )
    return f"{int(size)} B"


def printable(text: str) -> str:
    """`text` for the terminal: control characters of a dataset or an answer, which could move the
    cursor or set the title, are escaped; line breaks and tabs are not."""
    return "".join(
        character
        if character in "\n\t"
        or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
        or character in "\u200c\u200d"  # joiners of scripts and emoji
        else ascii(character)[1:-1]
        for character in text
    )
