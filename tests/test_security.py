"""SECURITY.md names tests for what it says; they are there."""

from __future__ import annotations

import re

from tests.conftest import ROOT


def test_every_border_names_tests_that_exist() -> None:
    lines = (ROOT / "SECURITY.md").read_text().splitlines()
    borders = [line for line in lines if line.startswith("| ") and not line.startswith("| Border")]
    named = [re.findall(r"`(tests/[\w/]+\.py)`", line.split("|")[3]) for line in borders]
    assert len(named) > 5 and all(named)
    assert not {path for paths in named for path in paths if not (ROOT / path).is_file()}
