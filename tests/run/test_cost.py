"""Which EC2 instance this is, and what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.run import cost
from stages.run.settings import Settings


def machine_says(folder: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, product: str) -> None:
    (folder / "sys_vendor").write_text(f"{vendor}\n")
    (folder / "product_name").write_text(f"{product}\n")
    monkeypatch.setattr(cost, "DMI", folder)


@pytest.mark.parametrize(
    ("vendor", "product", "found"),
    [
        ("Amazon EC2", "trn1.32xlarge", "trn1.32xlarge"),
        ("Amazon EC2", "m7i.large", "m7i.large"),
        ("Amazon EC2", "", None),
        ("Xen", "HVM domU", None),
        ("QEMU", "trn1.32xlarge", None),
    ],
)
def test_the_type_is_what_ec2_itself_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, product: str, found: str | None
) -> None:
    machine_says(tmp_path, monkeypatch, vendor, product)
    assert cost.instance_type() == found


def test_a_machine_without_dmi_has_no_type_and_no_price(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "DMI", tmp_path / "nothing here")
    assert cost.instance_type() is None
    assert cost.hourly_price(Settings()) is None


def test_an_instance_without_a_known_price_has_none_rather_than_a_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_says(tmp_path, monkeypatch, "Amazon EC2", "m7i.large")
    assert cost.hourly_price(Settings()) is None
    assert cost.hourly_price(Settings(instance_price=0.1)) == 0.1


def test_a_price_that_is_set_wins_over_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_says(tmp_path, monkeypatch, "Amazon EC2", "trn1.32xlarge")
    assert cost.hourly_price(Settings()) == 21.50
    assert cost.hourly_price(Settings(instance_price=6.45)) == 6.45


def test_the_tutorials_run_costs_what_the_tutorial_says() -> None:
    assert cost.dollars(43 * 60 + 24, 21.50) == pytest.approx(15.55, abs=0.01)
    assert cost.dollars(0, 21.50) == 0
