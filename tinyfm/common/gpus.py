"""Accelerators: their speed, memory and power, and the time and cost of a number of FLOPs on them.

    busy GPU-hours = FLOPs / (peak x MFU) / 3600
    paid GPU-hours = busy GPU-hours / availability

MFU, the model FLOPs utilisation, is the share of the dense peak that the model's own FLOPs reach;
activations that checkpointing computes twice count once (Chowdhery et al. 2022, appendix B).
Availability is the share of the wall time in which the job runs at all. Published GPU-hours give
only the product of the two.

Energy is that of whole servers in a building:

    energy = paid GPU-hours x (watts of a GPU and its share of the server) x PUE

The PUE, power usage effectiveness, is the energy of the building over that of all its computers,
processors, switches and fans included, and not over that of its GPUs. A DGX H100 may take 10.2 kW,
of which its eight GPUs take 5.6. A maker's maximum is an upper bound: Latif et al. (2024) measured
at most 8.4 kW in training on such a server.

Peaks are dense, from the vendors' data sheets; "with sparsity" they claim twice as much. GB are
10^9 bytes. Prices change: they are an input, and those of the table carry a date.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}  # bytes of a number


@dataclass(frozen=True)
class GPU:
    """One accelerator. Where a number is 0, it is not known."""

    name: str
    peaks: dict[str, float]  # TFLOP/s of matrix products, by the dtypes that the hardware has
    memory: float  # GB
    bandwidth: float  # GB/s of that memory
    link: float  # GB/s to other devices, both directions together
    watts: float  # power limit of the device
    server: float = 0.0  # watts of the device and its share of a server, at most
    price: float = 0.0  # USD per hour, rented on demand; the upper end of a range
    priced: str = ""  # date of the price

    def peak(self, dtype: str) -> float:
        """Dense peak in FLOP/s. Raises ValueError for a dtype that the hardware does not have."""
        if dtype not in self.peaks:
            raise ValueError(f"{self.name} has no {dtype}; use {' or '.join(self.peaks)}")
        return self.peaks[dtype] * 1e12


# ---- the table ----------------------------------------------------------------------------------

V100 = {"fp16": 125, "fp32": 15.7}
A100 = {"bf16": 312, "fp16": 312, "fp32": 19.5}
H100 = {"bf16": 989, "fp16": 989, "fp32": 67, "fp8": 1979}
PCIE = {"bf16": 756, "fp16": 756, "fp32": 51, "fp8": 1513}
B200 = {"bf16": 2250, "fp16": 2250, "fp32": 75, "fp8": 4500}
MI300X = {"bf16": 1307.4, "fp16": 1307.4, "fp32": 163.4, "fp8": 2614.9}
RTX_4090 = {"bf16": 165, "fp16": 165, "fp32": 82.6, "fp8": 330}  # sums in fp32
# A server's watts are an eighth of the maximum in its user guide: 6.5 kW for a DGX A100, 10.2 for a
# DGX H100 or H200, 14.3 for a DGX B200. Numbers of the B200 are those of that server, also divided
# by 8. Bandwidths of TPUs: cloud.google.com/tpu/docs.
GPUS = {gpu.name: gpu for gpu in (
    # name, peaks, memory, bandwidth, link, watts, server, price, priced
    GPU("v100-16gb", V100, 16, 900, 300, 300),
    GPU("v100-32gb", V100, 32, 900, 300, 300),
    GPU("a100-40gb", A100, 40, 1555, 600, 400, 812.5, 2.0, "May 2023"),
    GPU("a100-80gb", A100, 80, 2039, 600, 400, 812.5, 2.49, "early 2026"),
    GPU("h100", H100, 80, 3350, 900, 700, 1275, 2.79, "April 2026"),
    GPU("h100-pcie", PCIE, 80, 2000, 128, 350),
    GPU("h200", H100, 141, 4800, 900, 700, 1275, 7.0, "May 2026"),
    GPU("b200", B200, 180, 8000, 1800, 1000, 1787.5),
    GPU("mi300x", MI300X, 192, 5300, 896, 750),
    GPU("rtx-3090", {"bf16": 71, "fp16": 71, "fp32": 35.6}, 24, 936, 112.5, 350),
    GPU("rtx-4090", RTX_4090, 24, 1008, 64, 450),
    GPU("tpu-v3", {"bf16": 123}, 32, 900, 0, 450),
    GPU("tpu-v4", {"bf16": 275}, 32, 1228, 0, 0),
    GPU("tpu-v5e", {"bf16": 197}, 16, 819, 400, 0),
)}  # fmt: skip
ALIASES = {"v100": "v100-32gb", "a100": "a100-80gb"}
# Part of the name that the driver gives -> name here. The first match counts, so that "H100" is the
# SXM form.
DRIVER_NAMES = {
    "H100 PCIe": "h100-pcie", "H100": "h100", "H200": "h200", "A100": "a100-80gb",
    " B200": "b200", "V100": "v100-32gb", "MI300X": "mi300x", "3090": "rtx-3090",
    "4090": "rtx-4090",
}  # fmt: skip


def get(name: str) -> GPU:
    """The accelerator of that name. Raises ValueError with the known names if there is none."""
    key = ALIASES.get(name.lower(), name.lower())
    if key not in GPUS:
        near = difflib.get_close_matches(key, GPUS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"there is no GPU {name!r}; {hint}known: {', '.join(GPUS)}")
    return GPUS[key]


def by_driver_name(name: str) -> GPU | None:
    """The accelerator with that torch.cuda.get_device_name, or None if it is not in the table."""
    for part, key in DRIVER_NAMES.items():
        if part in name:
            return GPUS[key]
    return None


# ---- time and cost ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bill:
    """Time, energy and cost of a job."""

    gpu_hours: float  # paid GPU-hours, those in which nothing runs included
    days: float  # days of wall time
    watts: float  # of a GPU, with its share of the server where that is known
    energy_kwh: float  # of the building
    cost_usd: float  # 0 if no price is known


def check_shares(**shares: float) -> None:
    """Raise ValueError unless every share is above 0 and at most 1."""
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise ValueError(f"{name} is {share}; it must be above 0 and at most 1, such as 0.4")


def check_pue(pue: float) -> None:
    """Raise ValueError for a power usage effectiveness below 1: no building can have that."""
    if not pue >= 1:
        raise ValueError(f"pue is {pue}; it must be at least 1, such as 1.1")


@dataclass(frozen=True)
class Assumptions:
    """Inputs that no formula gives; reports state them with every result that depends on them."""

    gpus: int = 1
    dtype: str = "bf16"  # number format of the matrix products
    mfu: float = 0.4  # share of the peak that the model's FLOPs reach
    availability: float = 1.0  # share of the wall time in which the job runs
    price: float | None = None  # USD per GPU-hour; None = the dated price of the table
    watts: float | None = None  # of a GPU and its share of the server; None = those of the table
    pue: float = 1.1  # power usage effectiveness: energy of the building over that of its computers

    def __post_init__(self):
        check_shares(mfu=self.mfu, availability=self.availability)
        check_pue(self.pue)


def rule_of_six(parameters: float, tokens: float) -> float:
    """FLOPs of training by the rule of Kaplan et al. (2020): 6 per parameter and token.

    2 are of the forward pass, 4 of the backward pass. The rule leaves attention out; embeddings,
    which multiply nothing, are usually counted as parameters.
    """
    return 6 * parameters * tokens


def busy_hours(flops: float, gpu: GPU, dtype: str = "bf16", mfu: float = 0.4) -> float:
    """GPU-hours of computing for a number of model FLOPs.

    Raises ValueError for a dtype that the GPU does not have, and an mfu not in (0, 1].
    """
    check_shares(mfu=mfu)
    return flops / (gpu.peak(dtype) * mfu) / 3600


def bill(
    busy: float,
    gpu: GPU,
    gpus: int = 1,
    availability: float = 1.0,
    price: float | None = None,
    watts: float | None = None,
    pue: float = 1.1,
) -> Bill:
    """The bill of a number of busy GPU-hours on `gpus` GPUs, at a price in USD per GPU-hour.

    watts: of a GPU and its share of the server, on average. Without it, servers are taken to draw
    their maximum all the time, so the energy is an upper bound; or GPUs theirs, if no server is
    known. Patterson et al. (2021, table 4) have 330 W and a PUE of 1.1 for GPT-3 on V100. Raises
    ValueError for impossible counts, shares, prices and powers.
    """
    check_shares(availability=availability)
    check_pue(pue)
    if gpus < 1:
        raise ValueError(f"{gpus} GPUs; there must be at least 1")
    if price is None:
        price = gpu.price
    if price < 0:
        raise ValueError(f"a price of {price} USD per GPU-hour; it must be at least 0")
    if watts is None:
        watts = gpu.server or gpu.watts
    if watts < 0:
        raise ValueError(f"{watts} W a GPU; it must be at least 0")
    hours = busy / availability
    return Bill(
        gpu_hours=hours,
        days=hours / gpus / 24,
        watts=watts,
        energy_kwh=hours * watts / 1000 * pue,
        cost_usd=hours * price,
    )
