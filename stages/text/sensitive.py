"""Texts that look like secrets or addresses, counted by kind and never shown.

Patterns find what has the usual form; a count of 0 is no proof that nothing is there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from stages.text.examples import Example

# Kind, a text without which the pattern finds nothing, and the pattern.
_MARKED = tuple(
    (kind, mark, re.compile(pattern))
    for kind, marks, pattern in (
        ("e-mail address", "@", r"[\w.+-]{1,64}@[\w-]+(\.[\w-]+)*\.[A-Za-z]{2,}"),
        ("phone number", "+", r"(?<!\w)\+[1-9]\d{0,2}([ .-]?\d){8,12}(?!\d)"),
        ("AWS access key", "AKIA ASIA", r"\b(AKIA|ASIA)[A-Z2-7]{16}\b"),
        ("private key", "PRIVATE", r"-----BEGIN ([A-Z]+ )*PRIVATE KEY-----"),
        ("Hugging Face token", "_", r"\bhf_[A-Za-z]{34}\b"),
        ("GitHub token", "_", r"\bgh[pousr]_\w{36}"),
        ("GitHub token", "_", r"\bgithub_pat_\w{50,}"),
        ("API key", "sk-", r"\bsk-[\w-]{20,}"),
        ("Slack token", "xox", r"\bxox[abeprs]-[\w-]{10,}"),
        ("Google API key", "AIza", r"\bAIza[\w-]{35}"),
        ("JSON web token", "eyJ", r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"),
        ("password in a URL", "://", r"://[^\s/:@]{1,64}:[^\s/@]{1,64}@"),
    )
    for mark in marks.split()
)
# Kind, a quick pattern without which the text is not looked at, and the pattern.
_NUMBERS = tuple(
    (kind, re.compile(quick), re.compile(pattern))
    for kind, quick, pattern in (
        (
            "phone number",
            r"[0-9][ .-][0-9]{4}",
            r"(?<![\w.+-])(\+\d{1,3}[ .-]?)?(\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])",
        ),
        (
            "IP address",
            r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]",
            r"(?<![\w.])((25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(25[0-5]|2[0-4]\d|1?\d?\d)(?!\.?\w)",
        ),
    )
)
_ANY_NUMBER = re.compile("|".join(quick.pattern for _, quick, _ in _NUMBERS))
KINDS = tuple(dict.fromkeys(kind for kind, _, _ in (*_MARKED, *_NUMBERS)))


def count_sensitive(examples: Iterable[Example]) -> Counter[str]:
    """Kind -> how many examples have a text of that kind."""
    counts = Counter[str]()
    for example in examples:
        text = "\n".join(part for one in example.messages for part in (one.content, one.context))
        kinds = {kind for kind, mark, pattern in _MARKED if mark in text and pattern.search(text)}
        if _ANY_NUMBER.search(text):
            kinds |= {
                kind
                for kind, quick, pattern in _NUMBERS
                if quick.search(text) and pattern.search(text)
            }
        counts.update(kinds)
    return counts
