"""Which EC2 instance this is and what it costs, for every manifest. Standard library only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.run.machines import MACHINES
from stages.run.settings import Settings

# On EC2 (Nitro) the hypervisor reports the vendor and the instance type here, also in containers.
DMI = Path("/sys/devices/virtual/dmi/id")
VENDOR = "Amazon EC2"


def instance_type() -> str | None:
    """This machine's EC2 type, such as `trn1.32xlarge`; None where it is no EC2 instance."""
    try:
        vendor = (DMI / "sys_vendor").read_text(encoding="utf-8").strip()
        name = (DMI / "product_name").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return name or None if vendor == VENDOR else None


def hourly_price(settings: Settings) -> float | None:
    """USD per hour: INSTANCE_PRICE where set, else the EC2 type's list price; None if unknown."""
    machine = MACHINES.get(instance_type() or "")
    return settings.instance_price or (machine.price if machine else None)


def dollars(seconds: float, price: float) -> float:
    """What `seconds` cost at `price` USD per hour, to a hundredth of a cent."""
    return round(seconds / 3600 * price, 4)


def cost_of(seconds: float, settings: Settings) -> dict[str, Any]:
    """A manifest's seconds, EC2 type, and USD for that time; None for each that is not known."""
    price = hourly_price(settings)
    return {
        "seconds": round(seconds, 3),
        "instance": instance_type(),
        "usd": None if price is None else dollars(seconds, price),
    }
