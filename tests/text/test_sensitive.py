"""Texts that look like secrets or addresses are counted by kind; what resembles them is not."""

from __future__ import annotations

import time

import pytest

from stages.text.sensitive import KINDS, count_sensitive
from tests.text.conversations import example

# Made up, and put together here: no scanner should take this file for one with secrets.
FOUND = {
    "e-mail address": ["write to ann.lee+x@mail.example.co.uk.", "<a@b.org>"],
    "phone number": ["(555) 010-1234", "call 555-010-1234", "+49 30 1234 5678", "+442079460958"],
    "IP address": ["ssh 10.0.0.12", "at 192.168.1.255."],
    "AWS access key": ["AKIA" + "ABCDEFGH23456723"],
    "private key": ["-----BEGIN " + "RSA PRIVATE KEY-----", "-----BEGIN " + "PRIVATE KEY-----"],
    "Hugging Face token": ["hf_" + "abcdefghij" * 3 + "abcd"],
    "GitHub token": ["ghp_" + "a1B2" * 9, "github_pat_" + "a1B2_" * 12],
    "API key": ["sk-" + "abc123DEF456ghi789jkl0"],
    "Slack token": ["xoxb-" + "123456789012-abcdef"],
    "Google API key": ["AIza" + "aB3-_" * 7],
    "JSON web token": ["eyJ" + "hbGciOiJI.eyJzdWIiOiIx.c2ln"],
    "password in a URL": ["https://ann:" + "hunter2@example.org/x"],
}
NOTHING = [
    "a@b",
    "in 1914-1918 and 1939-1945, 12345-6789",
    "version 1.2.3.4.5, 256.1.1.1, 1.2.3",
    "AKIATOOSHORT",
    "the PRIVATE KEY of it",
    "hf_model and sk-learn, xox, eyJ",
    "https://example.org:8000/a@b",
    "2 + 12 = 14, +1 for it",
]


def kinds(text: str) -> set[str]:
    return set(count_sensitive([example("row 1", text, "", "answer")]))


def test_every_kind_is_tried_here() -> None:
    assert {*FOUND} == {*KINDS}


@pytest.mark.parametrize(("kind", "text"), [(kind, one) for kind in FOUND for one in FOUND[kind]])
def test_what_has_the_usual_form_is_found(kind: str, text: str) -> None:
    assert kind in kinds(text)


@pytest.mark.parametrize("text", NOTHING)
def test_what_only_resembles_it_is_not(text: str) -> None:
    assert kinds(text) == set()


def test_an_example_counts_once_for_a_kind_wherever_it_is() -> None:
    rows = [example("1", "a@b.org", "c@d.org", "e@f.org"), example("2", "x", "", "g@h.org")]
    assert count_sensitive(rows) == {"e-mail address": 2}


def test_a_hostile_text_takes_no_time() -> None:
    hostile = [
        text * 20_000 for text in ("a@", "1.", "+1 ", "://a:", "eyJ.", "555-0101 ", "a.b@c.")
    ]
    started = time.thread_time()
    count_sensitive([example("row", text, "", "x") for text in hostile])
    assert time.thread_time() - started < 2
