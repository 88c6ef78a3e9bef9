"""Which EC2 instance this is, and what an hour of it costs. Standard library only: publish asks for every manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.run.settings import Settings

# What the hypervisor tells of itself and of the machine: on EC2 (Nitro) the vendor and the instance type. Containers see it too.
DMI = Path("/sys/devices/virtual/dmi/id")
VENDOR = "Amazon EC2"

# USD per hour on demand, Linux, us-east-1: https://aws.amazon.com/ec2/pricing/on-demand, rounded as optimum-neuron's tutorial of
# Llama 2 7B gives them ("trn1.32xlarge, 21.50 $/h"). INSTANCE_PRICE is for other regions, spot and reserved instances.
PRICES = {
    "trn1.2xlarge": 1.34,
    "trn1.32xlarge": 21.50,
    "trn1n.32xlarge": 24.78,
}


def instance_type() -> str | None:
    """This machine's EC2 type, `trn1.32xlarge`; None where it is no EC2 instance or does not tell."""
    try:
        vendor = (DMI / "sys_vendor").read_text(encoding="utf-8").strip()
        name = (DMI / "product_name").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return name or None if vendor == VENDOR else None


def hourly_price(settings: Settings) -> float | None:
    """USD per hour: INSTANCE_PRICE where it is set, else what is known of this EC2 type; None where nothing is known."""
    return settings.instance_price or PRICES.get(instance_type() or "")


def dollars(seconds: float, price: float) -> float:
    """What `seconds` cost at `price` USD per hour, to a hundredth of a cent."""
    return round(seconds / 3600 * price, 4)


def cost_of(seconds: float, settings: Settings) -> dict[str, Any]:
    """For a manifest: the seconds, this machine's EC2 type, and the USD that it cost for so long; None where one is not known."""
    price = hourly_price(settings)
    return {
        "seconds": round(seconds, 3),
        "instance": instance_type(),
        "usd": None if price is None else dollars(seconds, price),
    }
