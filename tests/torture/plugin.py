"""Damage on purpose, at two lengths, and its summary.

Tests with the mark `torture(kind)` run in a short form in `make test`. `make torture` runs them
alone, in their long form, from one seed, and ends with a table: what was done, how often, in how
long, and how it ended.
"""

from __future__ import annotations

import functools
import random
import time
from collections import defaultdict
from dataclasses import dataclass

import hypothesis
import pytest

LONG_EXAMPLES = 3_000  # of each property; hypothesis' own default, 100, is the short form


@dataclass
class Torture:
    """What a test that does damage is given. `times` is how often it is to do it; `count` says what
    was done (1 unless told)."""

    seed: int
    long: bool
    random: random.Random
    done: int | None = None

    def require_long(self) -> None:
        """Skip the test in the short form: it takes a minute and more."""
        if not self.long:
            pytest.skip("in the long form: make torture")

    def times(self, short: int, long: int) -> int:
        return long if self.long else short

    def count(self, number: int = 1) -> None:
        self.done = (self.done or 0) + number


def examples(short: int, long: int) -> hypothesis.settings:
    """For a property whose examples are expensive: how many of them, in the two forms."""
    in_long_form = hypothesis.settings.default.max_examples == LONG_EXAMPLES
    return hypothesis.settings(max_examples=long if in_long_form else short, deadline=None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--torture",
        type=int,
        metavar="SEED",
        help="the long forms of what is marked torture, from this seed",
    )


def pytest_configure(config: pytest.Config) -> None:
    seed = config.getoption("--torture")
    if seed is not None:
        hypothesis.settings.register_profile("torture", max_examples=LONG_EXAMPLES, deadline=None)
        hypothesis.settings.load_profile("torture")


def pytest_report_header(config: pytest.Config) -> list[str]:
    seed = config.getoption("--torture")
    return [] if seed is None else [f"torture, the long form, TORTURE_SEED={seed}"]


@pytest.fixture
def torture(request: pytest.FixtureRequest) -> Torture:
    seed = request.config.getoption("--torture")
    chosen = 1 if seed is None else seed
    return Torture(chosen, seed is not None, random.Random(f"{chosen} {request.node.nodeid}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Counts the examples of a property, seeds it, and tells the time of the test itself."""
    mark = item.get_closest_marker("torture")
    if mark is None:
        return (yield)
    item.user_properties.append(("torture", mark.args[0]))
    handle = getattr(getattr(item, "obj", None), "hypothesis", None)
    examples = 0
    if handle is not None:
        inner, seed = handle.inner_test, item.config.getoption("--torture")
        if seed is not None:
            hypothesis.seed(seed)(item.obj)

        @functools.wraps(inner)
        def counted(*arguments, **named):
            nonlocal examples
            examples += 1
            return inner(*arguments, **named)

        handle.inner_test = counted
    started = time.monotonic()
    try:
        return (yield)
    finally:
        if handle is not None:
            handle.inner_test = inner  # parameters share it
        item.user_properties.append(("seconds", time.monotonic() - started))
        given = getattr(item, "funcargs", {}).get("torture")
        done = given.done if given is not None and given.done is not None else examples or 1
        item.user_properties.append(("done", done))


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    """The table, in the long form alone."""
    if config.getoption("--torture") is None:
        return
    done: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    failed: dict[str, int] = defaultdict(int)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            facts = dict(report.user_properties)
            if report.when != "call" or "torture" not in facts:
                continue
            kind = facts["torture"]
            done[kind] += facts.get("done", 1)
            seconds[kind] += facts["seconds"]
            failed[kind] += outcome == "failed"
    terminalreporter.section(f"torture, TORTURE_SEED={config.getoption('--torture')}")
    terminalreporter.write_line(f"{'kind':<22} {'done':>8} {'seconds':>9}  outcome")
    for kind in sorted(done):
        outcome = f"{failed[kind]} tests failed" if failed[kind] else "as it should"
        terminalreporter.write_line(f"{kind:<22} {done[kind]:>8,} {seconds[kind]:>9.1f}  {outcome}")
    total = sum(seconds.values())
    terminalreporter.write_line(
        f"{'in all':<22} {sum(done.values()):>8,} {total:>9.1f}  {sum(failed.values())} tests "
        "failed"
    )
