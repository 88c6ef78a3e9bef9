"""The EC2 instance types that trn-tune plans for: what each has, and what it costs.

The one home of these figures. Standard library only.

Devices, cores and device memory of Trainium and Inferentia are those of
https://awsdocs-neuron.readthedocs-hosted.com/en/latest/about-neuron/arch/neuron-hardware/
(trn1-, trn2- and inf2-arch); Trainium 2 has its cores in pairs, as the runtime configures them,
the only configuration that optimum-neuron supports. GPU memory is what `nvidia-smi` shows in all,
vCPU and host memory are EC2's, and peaks the vendors' for dense bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

PRICES_OF = "2026-11-28"  # when the sources of the prices below were last read
REGION = "Linux, us-east-1"
# Prices are older than this: a test fails, and `make plan` says so.
OLDEST_DAYS = 400

_SKYPILOT = "skypilot-catalog v8, aws/vms.csv, 2026"
_BLOCKS = "a note of May 2026 that quotes aws.amazon.com/ec2/capacityblocks/pricing"
_RECEIPTS = "data-receipts, hyperscalers.json, 9 November 2026"
_PRICE_BOOK = "a public price book, 2026"


@dataclass(frozen=True)
class Machine:
    """An EC2 type. Memory in GiB, `peak` in TFLOP/s of one device in dense bfloat16.

    `cores` of all devices together: one training process each. Prices in USD per hour: `price` on
    demand, `block` a capacity block; None where none is known. `spot` is what was seen, from and
    to; nothing is promised on it. `source` is the prices', `doubt` why they may be wrong.
    """

    device: str
    devices: int
    cores: int
    device_memory: float
    vcpu: int
    host_memory: int
    peak: float
    price: float | None = None
    source: str = ""
    block: float | None = None
    spot: tuple[float, float] | None = None
    doubt: str = ""

    @property
    def core_memory(self) -> int:
        """Bytes of device memory of one core."""
        return int(self.devices * self.device_memory * 2**30 / self.cores)

    @property
    def is_neuron(self) -> bool:
        return self.device in _NEURON


# Device -> GiB, TFLOP/s in dense bfloat16.
_NEURON = {"Trainium": (32, 190), "Trainium2": (96, 667), "Inferentia2": (32, 190)}
_GPUS = {
    "A100-40": (40.0, 312),
    "A100-80": (80.0, 312),
    "H100": (79.6, 989),
    "H200": (140.4, 989),
    "A10G": (22.5, 70),
    "L4": (22.5, 121),
    "L40S": (45.0, 362),
}


def _neuron(
    device: str,
    devices: int,
    cores: int,
    vcpu: int,
    host_memory: int,
    *price: object,
    **more: object,
) -> Machine:
    memory, peak = _NEURON[device]
    return Machine(device, devices, cores, memory, vcpu, host_memory, peak, *price, **more)  # type: ignore[arg-type]


def _gpus(
    device: str, devices: int, vcpu: int, host_memory: int, *price: object, **more: object
) -> Machine:
    memory, peak = _GPUS[device]
    return Machine(device, devices, devices, memory, vcpu, host_memory, peak, *price, **more)  # type: ignore[arg-type]


MACHINES = {
    "trn1.2xlarge": _neuron("Trainium", 1, 2, 8, 32, 1.34375, _SKYPILOT, spot=(0.154, 0.256)),
    "trn1.32xlarge": _neuron(
        *("Trainium", 16, 32, 128, 512, 21.50, _SKYPILOT), block=9.532, spot=(2.15, 6.14)
    ),
    "trn1n.32xlarge": _neuron("Trainium", 16, 32, 128, 512, 24.78, _SKYPILOT, spot=(2.48, 4.25)),
    "trn2.3xlarge": _neuron(
        *("Trainium2", 1, 4, 12, 128, None, _BLOCKS), block=2.235, spot=(2.74, 2.74)
    ),
    "trn2.48xlarge": _neuron(
        *("Trainium2", 16, 64, 192, 2048, None, _BLOCKS), block=35.7608, spot=(23.06, 23.06)
    ),
    "inf2.xlarge": _neuron("Inferentia2", 1, 2, 4, 16, 0.758, "not looked up again"),
    "inf2.8xlarge": _neuron("Inferentia2", 1, 2, 32, 128, 1.968, "not looked up again"),
    "inf2.24xlarge": _neuron("Inferentia2", 6, 12, 96, 384, 6.491, "not looked up again"),
    "inf2.48xlarge": _neuron("Inferentia2", 12, 24, 192, 768, 12.981, "not looked up again"),
    "p4d.24xlarge": _gpus("A100-40", 8, 96, 1152, 21.9576, _RECEIPTS, block=14.75),
    "p4de.24xlarge": _gpus("A100-80", 8, 96, 1152, 27.4471, _RECEIPTS),
    "p5.4xlarge": _gpus(
        *("H100", 1, 16, 256, None, _RECEIPTS),
        doubt="sources conflict: 6.88 is an eighth of p5.48xlarge, 4.326 a note of May 2026 that "
        "may mean a capacity block",
    ),
    "p5.48xlarge": _gpus("H100", 8, 192, 2048, 55.04, _RECEIPTS, block=39.33),
    "p5en.48xlarge": _gpus(
        *("H200", 8, 192, 2048, 63.296, "dstack, pull request 4110, 6 August 2026"),
        block=63.158,
        spot=(26.57, 27.20),
    ),
    "g5.xlarge": _gpus("A10G", 1, 4, 16, 1.006, _PRICE_BOOK),
    "g5.2xlarge": _gpus("A10G", 1, 8, 32, 1.212, _PRICE_BOOK),
    "g5.12xlarge": _gpus("A10G", 4, 48, 192, 5.672, _PRICE_BOOK),
    "g5.48xlarge": _gpus("A10G", 8, 192, 768, 16.288, _PRICE_BOOK),
    "g6.xlarge": _gpus("L4", 1, 4, 16, 0.8048, _PRICE_BOOK),
    "g6.2xlarge": _gpus("L4", 1, 8, 32, 0.9776, _PRICE_BOOK),
    "g6.12xlarge": _gpus("L4", 4, 48, 192, 4.6016, _PRICE_BOOK),
    "g6.48xlarge": _gpus("L4", 8, 192, 768, 13.3504, _PRICE_BOOK),
    "g6e.xlarge": _gpus("L40S", 1, 4, 32, 1.861, _PRICE_BOOK),
    "g6e.2xlarge": _gpus("L40S", 1, 8, 64, 2.242, _PRICE_BOOK),
    "g6e.12xlarge": _gpus("L40S", 4, 48, 384, 10.6032, _PRICE_BOOK),
    "g6e.48xlarge": _gpus("L40S", 8, 192, 1536, 30.1312, _PRICE_BOOK),
}
NEURON_MACHINES = {name: machine for name, machine in MACHINES.items() if machine.is_neuron}


def check_machine(name: str) -> None:
    """Raise InputError unless `name` is an instance type of the table, or empty."""
    from difflib import get_close_matches

    from stages.run.errors import InputError

    if name and name not in MACHINES:
        near = get_close_matches(name, MACHINES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InputError(f"{name[:60]!r} is none of {', '.join(MACHINES)}.{hint}")


def check_machines(names: str) -> None:
    """Raise InputError unless each word of `names` is an instance type of the table."""
    for name in names.split():
        check_machine(name)
