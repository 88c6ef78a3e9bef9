"""What eval says of the cost of its losses, before most of it is spent."""

from __future__ import annotations

import pytest

from stages.backends.evaluate import cost_note


def test_losses_that_take_hours_are_announced_with_their_price_and_a_cheaper_number() -> None:
    """A 7B model on trn1.32xlarge's host: 20 seconds a sequence, on two models."""
    note = cost_note(20.0, 200, 21.50)
    assert "200 held-out sequences take about 2 h 13 min and 47.78 USD" in note
    assert "EVAL_MAX_DOCUMENTS=15 takes about 10 min 00 s and 3.58 USD" in note


def test_without_a_known_price_only_the_time_is_said() -> None:
    assert "USD" not in cost_note(20.0, 200, None)


@pytest.mark.parametrize(("seconds", "count"), [(0.1, 200), (20.0, 4), (900.0, 1)])
def test_nothing_is_said_of_what_is_short_or_cannot_be_shorter(seconds: float, count: int) -> None:
    assert cost_note(seconds, count, 21.50) == ""
