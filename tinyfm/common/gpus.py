"""Accelerators: what they compute, hold and draw, and what so many FLOPs cost on them.

    busy hours of a GPU = FLOPs / (peak x MFU) / 3600
    hours that are paid = busy hours / availability

MFU, the model FLOPs utilisation, is the share of the dense peak that the model's own FLOPs reach;
what activation checkpointing computes twice does not count (Chowdhery et al. 2022, appendix B).
Availability is the share of the wall time in which the job runs at all. Published GPU-hours give
only the product of the two.

Peaks are dense, from the vendors' data sheets; "with sparsity" they claim twice as much. GB are
10^9 bytes. Prices move: they are an input, and those here have a date.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class GPU:
    name: str
    peaks: dict[str, float]  # TFLOP/s of matrix products by dtype; what is not here does not exist
    memory: float  # GB
    bandwidth: float  # GB/s of that memory; 0 = not known to us, as below
    link: float  # GB/s to other devices, both directions together
    watts: float  # of the device, at most
    price: float = 0.0  # USD an hour, rented
    priced: str = ""  # when; on demand, and where a range was seen, its upper end

    def peak(self, dtype: str) -> float:
        """FLOP/s. Raises ValueError for a number format that it does not compute in."""
        if dtype not in self.peaks:
            raise ValueError(f"{self.name} has no {dtype}; use {' or '.join(self.peaks)}")
        return self.peaks[dtype] * 1e12


V100 = {"fp16": 125, "fp32": 15.7}
A100 = {"bf16": 312, "fp16": 312, "fp32": 19.5}
H100 = {"bf16": 989, "fp16": 989, "fp32": 67}
GPUS = {gpu.name: gpu for gpu in (
    GPU("v100-16gb", V100, 16, 900, 300, 300),
    GPU("v100-32gb", V100, 32, 900, 300, 300),
    GPU("a100-40gb", A100, 40, 1555, 600, 400, 2.0, "May 2023"),
    GPU("a100-80gb", A100, 80, 2039, 600, 400, 2.49, "early 2026"),
    GPU("h100", H100, 80, 3350, 900, 700, 2.79, "April 2026"),
    GPU("h100-pcie", {"bf16": 756, "fp16": 756, "fp32": 51}, 80, 2000, 128, 350),
    GPU("h200", H100, 141, 4800, 900, 700, 7.0, "May 2026"),
    GPU("mi300x", {"bf16": 1307.4, "fp16": 1307.4, "fp32": 163.4}, 192, 5300, 896, 750),
    GPU("rtx-3090", {"bf16": 71, "fp16": 71, "fp32": 35.6}, 24, 936, 112.5, 350),
    GPU("rtx-4090", {"bf16": 165, "fp16": 165, "fp32": 82.6}, 24, 1008, 64, 450),
    GPU("tpu-v3", {"bf16": 123}, 32, 0, 0, 450),
    GPU("tpu-v4", {"bf16": 275}, 32, 1228, 0, 0),
    GPU("tpu-v5e", {"bf16": 197}, 16, 819, 400, 0),
)}  # fmt: skip
ALIASES = {"v100": "v100-32gb", "a100": "a100-80gb"}
# Part of the name that the driver gives, the first that fits: H100 stands for its SXM form.
DRIVER_NAMES = {
    "H100 PCIe": "h100-pcie", "H100": "h100", "H200": "h200", "A100": "a100-80gb",
    "V100": "v100-32gb", "MI300X": "mi300x", "3090": "rtx-3090", "4090": "rtx-4090",
}  # fmt: skip


def get(name: str) -> GPU:
    """The accelerator of that name. Raises ValueError, with the known ones, if there is none."""
    key = ALIASES.get(name.lower(), name.lower())
    if key not in GPUS:
        near = difflib.get_close_matches(key, GPUS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"there is no GPU {name!r}; {hint}known: {', '.join(GPUS)}")
    return GPUS[key]


def by_driver_name(name: str) -> GPU | None:
    """The accelerator that torch.cuda.get_device_name calls so, or None if it is not known."""
    return next((GPUS[key] for part, key in DRIVER_NAMES.items() if part in name), None)


# ---- time and cost ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bill:
    gpu_hours: float  # paid, with the time in which nothing runs
    days: float  # of wall time
    energy_kwh: float
    cost_usd: float  # 0 if no price is known


def check_shares(**shares: float) -> None:
    """Raise ValueError unless each is above 0 and at most 1."""
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise ValueError(f"{name} is {share}; it must be above 0 and at most 1, such as 0.4")


def check_pue(pue: float) -> None:
    """Raise ValueError for a building that uses less energy than what is in it."""
    if not pue >= 1:
        raise ValueError(f"pue is {pue}; it must be at least 1, such as 1.1")


@dataclass(frozen=True)
class Assumptions:
    """What no formula gives: stated with every result that rests on it."""

    gpus: int = 1
    dtype: str = "bf16"  # of the products
    mfu: float = 0.4  # share of the peak that is reached
    availability: float = 1.0  # share of the time in which it runs
    price: float | None = None  # USD a GPU-hour; None = the dated one of the table
    pue: float = 1.1  # energy of the building over that of its GPUs

    def __post_init__(self):
        check_shares(mfu=self.mfu, availability=self.availability)
        check_pue(self.pue)


def rule_of_six(parameters: float, tokens: float) -> float:
    """FLOPs of training by Kaplan et al.'s (2020) rule: 2 a weight and token forward, 4 backward.

    It leaves attention out; the tables of embeddings, which multiply nothing, are usually left in.
    """
    return 6 * parameters * tokens


def busy_hours(flops: float, gpu: GPU, dtype: str = "bf16", mfu: float = 0.4) -> float:
    """GPU-hours of computing for so many model FLOPs. Raises ValueError for a dtype it has not."""
    check_shares(mfu=mfu)
    return flops / (gpu.peak(dtype) * mfu) / 3600


def utilisation(flops_per_s: float, gpu: GPU, dtype: str = "bf16") -> float:
    """MFU of a GPU that was measured to do so many model FLOPs a second: the inverse question."""
    return flops_per_s / gpu.peak(dtype)


def bill(busy: float, gpu: GPU, gpus: int = 1, availability: float = 1.0,
         price: float | None = None, pue: float = 1.1) -> Bill:  # fmt: skip
    """What so many busy GPU-hours cost on `gpus` of them, at a price in USD for each hour of one.

    The energy is that of GPUs at their limit, times the power usage effectiveness (pue) of the
    building: 1.1 is what Patterson et al. (2021) take for GPT-3. Raises ValueError for counts and
    shares that cannot be.
    """
    check_shares(availability=availability)
    check_pue(pue)
    if gpus < 1:
        raise ValueError(f"{gpus} GPUs; there must be at least 1")
    if (price or 0) < 0:
        raise ValueError(f"a price of {price} USD a GPU-hour; it must be at least 0")
    hours, rate = busy / availability, gpu.price if price is None else price
    return Bill(hours, hours / gpus / 24, hours * gpu.watts / 1000 * pue, hours * rate)
