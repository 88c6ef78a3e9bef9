"""Plays power cuts: what a disk may hold when nothing but what was flushed is certain.

`recording` watches a folder while the real code works in it, and takes a `Moment` behind every
operation. A moment can be laid out as a folder again (`Moment.lay_out`), as a power cut would leave
it:

- the bytes of a file that was not flushed since they were written are lost, kept, or there in part;
- a name that was made, moved or removed is certain once a folder that it concerns was flushed;
  before that it may have reached the disk or not, by itself, but never without the operations
  that it builds on. A rename is one operation on both of its names, as a
  journal has it.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

Entry = tuple[int, str]  # a folder's number, and a name in it
ROOT_FOLDER = 0
OPERATIONS = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
)


@dataclass(frozen=True)
class Moment:
    """What is on the disk for certain, and what may be besides."""

    certain: dict[Entry, int]  # name -> number of the file or folder
    possible: list[
        dict[Entry, int | None]
    ]  # operations not yet certain, in order: names given or (None) taken away
    folders: set[int]
    flushed: dict[int, bytes]  # a file's bytes when it was last flushed
    written: dict[int, bytes]  # and as the program sees them
    finished: bool

    def lay_out(self, folder: Path, names: str, contents: str, chance: random.Random) -> None:
        """Write to a new folder what a cut leaves. `names` and `contents`: of what is not certain,
        none, all or some reached the disk."""
        kept = {
            "none": [],
            "all": range(len(self.possible)),
            "some": [i for i in range(len(self.possible)) if chance.random() < 0.5],
        }[names]
        entries: dict[Entry, int | None] = dict(self.certain)
        for operation in _with_what_they_build_on(self.possible, kept):
            entries.update(self.possible[operation])
        self._write(
            ROOT_FOLDER,
            folder,
            {entry: number for entry, number in entries.items() if number is not None},
            contents,
            chance,
        )

    def _write(
        self,
        number: int,
        path: Path,
        entries: dict[Entry, int],
        contents: str,
        chance: random.Random,
    ) -> None:
        path.mkdir()
        for (parent, name), child in entries.items():
            if parent != number:
                continue
            if child in self.folders:
                self._write(child, path / name, entries, contents, chance)
            else:
                old = self.flushed.get(child, b"")
                new = self.written.get(
                    child, old
                )  # a file that has lost its name is written to no more
                part = new[: chance.randrange(len(new) + 1)] if old != new else new
                (path / name).write_bytes(
                    {"none": old, "all": new, "some": chance.choice([old, new, part])}[contents]
                )


def _with_what_they_build_on(
    operations: list[dict[Entry, int | None]], kept: list[int] | range
) -> list[int]:
    """The kept operations and every earlier one on a name of theirs, in order."""
    found: list[int] = []
    concerned: set[Entry] = set()
    for number in reversed(range(len(operations))):
        if number in kept or concerned & operations[number].keys():
            found.append(number)
            concerned |= operations[number].keys()
    return found[::-1]


@dataclass
class Recorder:
    """Watches `root`. `flushes=False` ignores every flush: code that never flushed anything."""

    root: Path
    flushes: bool = True
    moments: list[Moment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._numbers: dict[int, int] = {}  # inode -> number, for as long as the inode has a name
        self._next = ROOT_FOLDER
        self._folders: set[int] = set()
        self._paths: dict[int, Path] = {}
        self._entries = self._scan()
        self._certain = dict(self._entries)
        self._possible: list[dict[Entry, int | None]] = []
        self._flushed = self._written()

    def look(self, finished: bool = False) -> None:
        """Take down what has changed since the last look: one operation."""
        entries = self._scan()
        changed: dict[Entry, int | None] = {
            entry: entries.get(entry)
            for entry in self._entries.keys() | entries.keys()
            if entries.get(entry) != self._entries.get(entry)
        }
        self._entries = entries
        if changed:
            assert len(changed) <= 2, f"several operations were taken for one: {changed}"
            self._possible.append(changed)
        if changed or finished:
            self._remember(finished)

    def flush(self, descriptor: int) -> None:
        """Take down that a file or folder was flushed."""
        self.look()
        number = self._numbers.get(os.fstat(descriptor).st_ino)
        if number is None or not self.flushes:
            return
        if number in self._folders:
            mine = [
                i
                for i, operation in enumerate(self._possible)
                if any(parent == number for parent, _ in operation)
            ]
            done = _with_what_they_build_on(self._possible, mine)
            for i in done:
                self._apply(self._possible[i])
            self._possible = [
                operation for i, operation in enumerate(self._possible) if i not in done
            ]
        else:
            self._flushed[number] = self._paths[number].read_bytes()
        self._remember(False)

    def _apply(self, operation: dict[Entry, int | None]) -> None:
        for entry, number in operation.items():
            if number is None:
                self._certain.pop(entry, None)
            else:
                self._certain[entry] = number

    def _remember(self, finished: bool) -> None:
        possible = [dict(operation) for operation in self._possible]
        self.moments.append(
            Moment(
                dict(self._certain),
                possible,
                set(self._folders),
                dict(self._flushed),
                self._written(),
                finished,
            )
        )

    def _written(self) -> dict[int, bytes]:
        return {
            number: path.read_bytes()
            for number, path in self._paths.items()
            if number not in self._folders
        }

    def _scan(self) -> dict[Entry, int]:
        found: dict[int, int] = {}
        entries: dict[Entry, int] = {}
        self._paths = {}

        def visit(path: Path) -> int:
            inode = path.stat().st_ino
            found[inode] = number = self._numbers.get(inode, self._next)
            self._next += number == self._next
            self._paths[number] = path
            if path.is_dir():
                self._folders.add(number)
                for child in sorted(path.iterdir()):
                    entries[number, child.name] = visit(child)
            return number

        visit(self.root)
        self._numbers = found  # an inode without a name may be given to another file
        return entries


_recorder: list[Recorder] = []  # the one that records, for the hook, which Python never removes
_hooked: list[bool] = []


def _hook(event: str, arguments: tuple) -> None:
    if event in OPERATIONS and _recorder:
        recorder = _recorder.pop()  # what the recorder itself does is not recorded
        try:
            # the hook comes before the operation, so what is seen is what the one before has done
            recorder.look()
        finally:
            _recorder.append(recorder)


@contextmanager
def recording(root: Path, flushes: bool = True) -> Iterator[Recorder]:
    """Record what this process does in `root`, by Python's audit events; os.fsync is watched
    besides."""
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked.append(True)
    recorder, fsync = Recorder(root, flushes), os.fsync

    def watched(descriptor) -> None:
        fsync(descriptor)
        with paused():
            recorder.flush(descriptor if isinstance(descriptor, int) else descriptor.fileno())

    os.fsync = watched
    _recorder.append(recorder)
    try:
        yield recorder
        _recorder.clear()
        recorder.look(finished=True)
    finally:
        os.fsync = fsync
        _recorder.clear()


@contextmanager
def paused() -> Iterator[None]:
    """Nothing is recorded meanwhile, but for what was done before."""
    held = _recorder[:]
    _recorder.clear()
    try:
        for recorder in held:
            recorder.look()
        yield
    finally:
        _recorder.extend(held)
