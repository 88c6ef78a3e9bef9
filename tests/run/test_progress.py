"""What reaches the terminal."""

from __future__ import annotations

import subprocess
import sys

from stages.run.fingerprint import ROOT
from stages.run.progress import printable

PRINTS = """
import click
from stages.run.cli import stage_command
@stage_command("data")
def main(settings, output):
    "A stage."
    print("na\u00efve \U0001f986")
main()
"""


def test_control_sequences_of_a_text_do_not_reach_the_terminal() -> None:
    text = "\x1b]0;title\x07 red: \x1b[31m\r\x00 \u202e\tna\u00efve\n\U0001f468\u200d\U0001f469"
    assert printable(text) == (
        r"\x1b]0;title\x07 red: \x1b[31m\r\x00 \u202e" + "\tna\u00efve\n\U0001f468\u200d\U0001f469"
    )


def test_printing_what_the_terminal_cannot_show_ends_no_stage() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTS, "--output", "nowhere"],
        cwd=ROOT,
        env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "na\\xefve \\U0001f986\n"), done.stderr
