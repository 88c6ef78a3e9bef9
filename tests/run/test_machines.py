"""The table of EC2 types: plausible figures, prices that are known, and not too old."""

from __future__ import annotations

from datetime import date

import pytest

from stages.run.errors import InputError
from stages.run.machines import MACHINES, OLDEST_DAYS, PRICES_OF
from stages.run.settings import Settings


def test_the_prices_are_not_older_than_400_days() -> None:
    """Read the sources again, then set PRICES_OF."""
    assert (date.today() - date.fromisoformat(PRICES_OF)).days <= OLDEST_DAYS == 400


@pytest.mark.parametrize("name", list(MACHINES))
def test_every_machine_is_whole_and_no_price_is_without_a_source(name: str) -> None:
    machine = MACHINES[name]
    assert machine.cores % machine.devices == 0
    assert machine.core_memory * machine.cores <= machine.devices * machine.device_memory * 2**30
    assert machine.vcpu and machine.host_memory and machine.peak
    assert machine.source
    assert machine.price or machine.block or machine.doubt
    known = [price for price in (machine.block, machine.price) if price]
    assert not machine.spot or not known or machine.spot[0] <= machine.spot[1] <= max(known) * 1.25


def test_what_has_no_price_on_demand_gets_none() -> None:
    assert MACHINES["trn2.3xlarge"].price is MACHINES["trn2.48xlarge"].price is None
    assert MACHINES["p5.4xlarge"].price is None and "conflict" in MACHINES["p5.4xlarge"].doubt
    assert MACHINES["trn1.32xlarge"].price == 21.50


@pytest.mark.parametrize("name", ["INSTANCE", "COMPARE"])
def test_an_unknown_machine_is_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(InputError, match=r"none of .* Did you mean trn1\.32xlarge\?"):
        Settings.read({name: "trn1.32xlarg"})
    assert Settings.read({name: "trn1.32xlarge"})


def test_several_machines_are_compared() -> None:
    assert Settings.read({"COMPARE": "trn1.32xlarge p5.48xlarge"}).compare.split()[1] in MACHINES
