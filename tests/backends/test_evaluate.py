"""The dtype of eval's losses, and what eval says of their cost before most of it is spent."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from stages.backends import evaluate
from stages.backends.evaluate import cost_note, loss_dtype
from stages.eval import require_small_increase
from stages.run import host
from stages.run.errors import StageFailure
from stages.run.settings import Settings

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("line", "memory", "dtype"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16", 10**12, torch.bfloat16),
        ("flags\t\t: fpu avx512f amx_bf16", 10**12, torch.bfloat16),
        ("Features\t: fp asimd bf16", 10**12, torch.bfloat16),
        ("flags\t\t: fpu avx512f", 10**12, torch.float32),
        ("Features\t: fp asimd", 10**12, torch.float32),
        ("flags\t\t: fpu avx512f", 50 * 10**9, torch.bfloat16),
        ("BogoMIPS\t: 50", 10**12, torch.bfloat16),
    ],
)
def test_losses_are_in_bfloat16_where_the_cpu_computes_it_or_has_no_memory_for_more(
    line: str, memory: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 7 billion parameters: 28 GB in float32."""
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(evaluate, "parameters", lambda settings: 7 * 10**9)
    monkeypatch.setattr(evaluate, "host_memory", lambda: memory)
    chosen, reason = loss_dtype(Settings(bf16=True), CPU)
    assert chosen == dtype
    assert ("28 GB of 50 GB" in reason) == (memory < 10**12)


def test_losses_of_a_float32_training_are_in_float32() -> None:
    assert loss_dtype(Settings(bf16=False), CPU) == (torch.float32, "BF16=0")


def test_losses_that_take_hours_are_announced_with_their_price_and_a_cheaper_number() -> None:
    """A 7B model on trn1.32xlarge's host: 20 seconds a sequence, on two models."""
    note = cost_note(20.0, 200, 21.50)
    assert "200 sequences take about 2 h 13 min and 47.78 USD" in note
    assert "EVAL_MAX_DOCUMENTS=15 takes about 10 min 00 s and 3.58 USD" in note


def test_without_a_known_price_only_the_time_is_said() -> None:
    assert "USD" not in cost_note(20.0, 200, None)


@pytest.mark.parametrize(("seconds", "count"), [(0.1, 200), (20.0, 4), (900.0, 1)])
def test_nothing_is_said_of_what_is_short_or_cannot_be_shorter(seconds: float, count: int) -> None:
    assert cost_note(seconds, count, 21.50) == ""


@pytest.mark.parametrize(("increase", "refused"), [(0.05, False), (-1, False), (0.06, True)])
def test_int8_weights_that_add_too_much_to_the_loss_are_refused(
    increase: float, refused: bool
) -> None:
    settings = Settings(quantize="int8", max_loss_increase=0.05)
    with (
        pytest.raises(StageFailure, match=r"adds 0.0600 nats.*=0.05") if refused else nullcontext()
    ):
        require_small_increase(settings, increase)


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(StageFailure, match="adds nan nats"):
        require_small_increase(Settings(quantize="int8"), float("nan"))
