"""A training job on many GPUs, tried on one machine: memory of a rank, and time of a step.

The model is really sharded with FSDP2, as training does it (training/parallel.py), but on tensors
without memory and in a process group that sends nothing. So the bytes of a rank are counted on the
sharded module, and can be compared with the formula of memory.py. The time of a step is computed:

    compute    FLOPs of a step / (peak of the GPU x BUSY), a third of it forward
    forward    while a block runs, the next one is gathered: the longer of the two counts
    backward   the same, and the gradients of the block before are summed meanwhile
    alone      nothing runs while the outermost unit and the first block are gathered, and while
               copies of the model exchange their gradients

Left out: the update, the data, latency of the links, and waiting for slow ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from tinyfm.calc import estimate, memory, trace
from tinyfm.calc.memory import Layout, MemoryUse, Training
from tinyfm.calc.report import short
from tinyfm.common.gpus import GPU
from tinyfm.training.distributed import local
from tinyfm.training.muon import Muon
from tinyfm.training.optim import OptimConfig, build_optimizers
from tinyfm.training.parallel import blocks, shard

NETWORK = 50.0  # GB/s a GPU between machines, each direction: 400 Gbit/s, as in many H100 clusters
MACHINE = 8  # GPUs in a machine, connected by links of their own
BUSY = 0.5  # share of the GPU's peak that matrix products reach while they run
GATHER_BYTES = 2  # of a parameter: weights are gathered in bfloat16,
SUM_BYTES = 4  # and gradients are summed in float32


@dataclass(frozen=True)
class Job:
    """Memory of rank 0, and the time of a step in seconds."""

    parameters: int
    held: MemoryUse  # weights, gradients and optimizer, counted on the sharded module
    expected: MemoryUse  # the same for the mean rank, by the formula of memory.py
    computing: float
    sending: float
    step: float  # computing and sending, less the time in which they overlap


@contextlib.contextmanager
def pretend(ranks: int) -> Iterator[None]:
    """Inside, this process is rank 0 of `ranks` processes that do not exist; nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def step_seconds(
    compute: float, units: list[int], update: int, copies: int, inside: float, across: float
) -> tuple[float, float]:
    """(seconds of all sending, seconds of a step).

    compute: seconds of computing; two thirds of it are the backward pass.
    units: parameters of the outermost unit, then of each block.
    update: bytes of a rank's gradients, which `copies` copies of the model add up.
    inside, across: bytes a second between ranks that share a copy, and between copies.
    """
    rest, *blocks = units
    gather = GATHER_BYTES * sum(blocks) / inside
    reduce = SUM_BYTES * sum(blocks) / inside
    # Sending that no computing hides.
    alone = (GATHER_BYTES + SUM_BYTES) * rest / inside + GATHER_BYTES * max(blocks) / inside
    alone += 2 * (copies - 1) / copies * update / across  # a ring over the copies
    # Sending while blocks run.
    forward = max(compute / 3, gather)
    backward = max(2 * compute / 3, gather + reduce)
    return 2 * gather + reduce + alone, forward + backward + alone


MOST = 1 << 20  # GPUs, and rows on each


def simulate(
    model: nn.Module,
    optim: OptimConfig,
    rows: int,
    ranks: int,
    gpu: GPU,
    shard_size: int = 0,
) -> Job:
    """Shard a model over `ranks` GPUs as training does, on tensors without memory.

    model: on the "meta" device; it is sharded in place. rows: of the batch on each GPU.
    shard_size: GPUs that share one copy of the model; 0 = all. Raises ValueError if it does not
    divide the ranks, and for a GPU without bf16.
    """
    if max(ranks, rows, shard_size) > MOST:
        raise ValueError(f"{ranks} GPUs with {rows} rows each: use at most {MOST} of each")
    compute_rate = gpu.peak("bf16") * BUSY
    sharing = shard_size or ranks

    # What the formulas say, of the whole model.
    flops = estimate.training_cost(model, optim, rows).flops_per_step
    units = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    parameters = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    expected = memory.state_memory(
        parameters,
        Training(dtype="fp32", optimizer=optim.optimizer),
        Layout(sharing, zero=3),
        trace.muon_parameters(model, optim),
        frozen,
    )

    # What rank 0 holds of the sharded model.
    with pretend(ranks):
        shard(model, torch.device("cpu"), torch.bfloat16, shard_size)
        weights = sum(local(p).nbytes for p in model.parameters())
        gradients = sum(local(p).nbytes for p in model.parameters() if p.requires_grad)
        averages = 0
        for optimizer in build_optimizers(model, optim):
            kept = 1 if isinstance(optimizer, Muon) else 2  # averages of a parameter
            for group in optimizer.param_groups:
                averages += sum(kept * local(p).nbytes for p in group["params"])

    # The time of a step. Links inside a machine are rated for both directions together.
    inside = gpu.link / 2 if sharing <= MACHINE and gpu.link else NETWORK
    compute = flops / compute_rate
    sending, step = step_seconds(
        compute,
        units=[parameters - sum(units), *units],
        update=gradients,
        copies=ranks // sharing,
        inside=inside * 1e9,
        across=NETWORK * 1e9,
    )
    held = MemoryUse(weights, gradients, averages)
    return Job(parameters, held, expected, compute, sending, step)


def to_text(name: str, job: Job, ranks: int, gpu: GPU, shard_size: int) -> str:
    """The counts and the predictions, and the assumptions they rest on."""
    held = job.held
    terms = " + ".join(f"{short(n)}B" for n in (held.weights, held.gradients, held.optimizer))
    overlap = job.computing + job.sending - job.step
    return (
        f"{name}: {job.parameters:,} parameters, shared by {shard_size or ranks} of {ranks} x "
        f"{gpu.name}\n"
        f"rank 0 holds {terms} = {short(held.total)}B of weights, gradients and averages, all in "
        f"float32; the calculator says {short(job.expected.total)}B\n"
        f"a step takes {job.step:.3f} s: {job.computing:.3f} s computing, {job.sending:.3f} s "
        f"sending, {overlap:.3f} s of it at the same time\n"
        f"Assumed: products at {BUSY:.0%} of the peak while they run, links at full speed "
        f"({gpu.link / 2:g} GB/s in a machine of {MACHINE}, {NETWORK:g} GB/s between machines), "
        "ranks that never wait for a slow one, one forward pass a step, no update, no data."
    )
