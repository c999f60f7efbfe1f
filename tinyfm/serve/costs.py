"""The calculators of calc/ for the page: from a published system and a job to bytes and dollars."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from tinyfm.calc import memory, systems
from tinyfm.calc.memory import Layout, Training
from tinyfm.common import gpus

MOST = 1 << 20  # GPUs, rows, layers and heads
MOST_TOKENS = 1e18


@dataclass(frozen=True)
class Job:
    """What the sliders say. In sizes, 0 is what the system was published with."""

    system: str
    layers: int = 0
    heads: int = 0
    context: int = 0
    gpu: str = "h100"
    gpus: int = 1
    units: float = 0  # tokens, or images, to train on
    rows: int = 1  # micro-batch on a GPU
    dtype: str = "bf16"
    optimizer: str = "adamw"
    checkpoint: str = "none"
    zero: int = 0
    mfu: float = 0.4

    def __post_init__(self):
        for name in ("layers", "heads", "context", "gpus", "rows"):
            if not 0 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 to {MOST}")
        if not (math.isfinite(self.units) and 0 <= self.units <= MOST_TOKENS):
            raise ValueError(f"units is {self.units}; use 0 to {MOST_TOKENS:g}")


def list_systems() -> dict[str, Any]:
    """The names to choose from: published systems with their sizes, and GPUs."""
    found = []
    for name in systems.rows():
        system = systems.get(name)
        sizes = {}
        if systems.has_blocks_of_one_kind(name):
            sizes = {size: system.shape[size] for size in ("layers", "heads", "context")}
        found.append(
            {
                "name": name,
                "parameters": system.parameters,
                "unit": system.unit,
                "trained": system.trained,
                **sizes,
            }
        )
    cards = []
    for gpu in gpus.GPUS.values():
        dtypes = [dtype for dtype in gpu.peaks if dtype in memory.KEPT]
        cards.append({"name": gpu.name, "dtypes": dtypes})
    return {"systems": found, "gpus": cards}


def calculate(job: Job) -> dict[str, Any]:
    """Parameters, memory by term, FLOPs, days and dollars; None for what is not known.

    Raises ValueError for a system, a GPU or a layout that does not exist.
    """
    network = systems.get(job.system, job.context, job.layers, job.heads)
    gpu = gpus.get(job.gpu)
    training = Training(job.rows, job.dtype, job.optimizer, job.checkpoint)
    layout = Layout(job.gpus, zero=job.zero)
    used = memory.training_memory(network, training, layout)
    served = memory.serving_memory(network, network.row, 1, job.dtype)
    flops = job.units * network.flops_per_row() / network.row
    bill = gpus.bill(gpus.busy_hours(flops, gpu, job.dtype, job.mfu), gpu, job.gpus)
    return {
        "parameters": network.parameters,
        "parts": network.parameters_by_part(),
        "memory": asdict(used),
        "total": used.total,
        "gpu_memory": 1e9 * gpu.memory,
        "serving": asdict(served),
        "flops": flops,
        "days": bill.days,
        "gpu_hours": bill.gpu_hours,
        "energy_kwh": bill.energy_kwh or None,
        "cost_usd": bill.cost_usd or None,
        "priced": gpu.priced,
    }
