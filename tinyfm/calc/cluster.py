"""FSDP2: one model shared out over many ranks; and a job of any size, tried without its machines.

With DDP every rank holds all weights, gradients and averages. Fully sharded (ZeRO stage 3,
Rajbhandari et al. 2020; FSDP, Zhao et al. 2023), rank r of d holds 1/d of the rows of each tensor.
A block's weights are gathered when it is about to run, and freed when it has:

    forward    gather block 1, run it | gather 2, run ...        while one runs, the next comes
    backward   gather block L, run it, sum its gradients: each rank keeps the sum of its own rows
    update     each rank its rows, as if they were all there is (optim.py)

So the same batch gives the same update, to rounding. `shard_size` ranks share one copy; more of
them hold copies (hybrid: gathers stay within a machine, only gradients cross, of 1/d of the rows).

A block is found, not named: what has layers of its own and stands in an nn.ModuleList or an
nn.Sequential. The rest, tables and towers' ends, is one more unit, gathered for the whole pass.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from tinyfm.calc import memory, systems
from tinyfm.calc.memory import Layout, Memory, Training
from tinyfm.calc.report import short
from tinyfm.common import gpus
from tinyfm.training.distributed import local
from tinyfm.training.muon import Muon
from tinyfm.training.optim import OptimConfig, build_optimizers, hidden_matrices
from tinyfm.training.parallel import blocks, shard

# ---- blocks -------------------------------------------------------------------------------------

# ---- sharing out --------------------------------------------------------------------------------

# ---- in and out ---------------------------------------------------------------------------------


# ---- a job of any size, without its machines ----------------------------------------------------

NETWORK = 50.0  # GB/s a GPU between machines, each direction: 400 Gbit/s, as in many H100 clusters
MACHINE = 8  # GPUs in a machine, which reach each other by their own links
BUSY = 0.5  # share of the peak that the products reach while they run


@dataclass(frozen=True)
class Job:
    """What rank 0 of a job holds, and how long a step takes it."""

    parameters: int
    held: Memory  # bytes of weights, gradients, optimizer: counted on the sharded module
    expected: Memory  # the same, as memory.py's formula has it for the mean rank
    computing: float  # seconds of a step
    sending: float
    step: float  # both, as far as they do not overlap


@contextlib.contextmanager
def pretend(ranks: int) -> Iterator[None]:
    """Inside, this process is rank 0 of so many, to which nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def find(name: str) -> tuple[nn.Module, OptimConfig, int]:
    """(model without memory, optimizers, rows of a batch) of a preset, or of a published GPT or
    Llama with a batch of one row a GPU: 0. Raises ValueError for another name."""
    from tinyfm.gpt import GPT, GPTConfig
    from tinyfm.recipes import gpt, registry

    forms = {"gpt": gpt.GPT2, "llama": gpt.LLAMA}
    system = systems.get(name) if name in systems.rows() else None
    with torch.device("meta"):
        if system is None:
            run = registry.get_preset(name).run
            return run.build_model(), run.optim, run.train.batch_size
        if system.family not in forms:
            raise ValueError(f"{name} is of family {system.family}; use one of {', '.join(forms)}")
        s = system.shape
        sizes = {"n_layer": "layers", "n_head": "heads", "n_kv_head": "kv_heads", "d_ff": "d_ff",
                 "d_model": "d_model", "d_head": "d_head", "vocab_size": "vocab",
                 "context_length": "context"}  # fmt: skip
        config = GPTConfig(**forms[system.family] | {ours: s[name] for ours, name in sizes.items()})
        return GPT(config), OptimConfig("adamw"), 0


def seconds(compute: float, units: list[int], update: int, copies: int, inside: float,
            across: float) -> tuple[float, float]:  # fmt: skip
    """(all sending, a step) of a pass that computes so long, two thirds of it backward.

    units: parameters of the outermost unit, then of each block; inside, across: bytes a second to
    the ranks that share a copy, and between copies. A block is gathered in 2 bytes a parameter
    while the one before runs, forward and backward, where its sum, in 4, goes the other way. What
    nothing runs beside is the outermost unit, the first block, and the bytes of the `update`.
    """
    rest, *blocks = units
    gather, add = 2 * sum(blocks) / inside, 4 * sum(blocks) / inside
    alone = (2 + 4) * rest / inside + 2 * max(blocks) / inside
    alone += 2 * (copies - 1) / copies * update / across  # sums of copies, by ring
    forward, backward = max(compute / 3, gather), max(2 * compute / 3, gather + add)
    return 2 * gather + add + alone, forward + backward + alone


def simulate(name: str, ranks: int, gpu: gpus.GPU, shard_size: int = 0, rows: int = 0) -> Job:
    """Share out a model over so many ranks, as training does, on tensors without memory.

    rows: of a batch on each GPU; 0 = the preset's, or 1. Raises ValueError for what does not fit.
    """
    from tinyfm.calc import estimate

    model, optim, batch = find(name)
    rows = rows or max(1, batch // ranks)
    flops = estimate.training_cost(model, optim, rows).flops_per_step
    units = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    parameters = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    muons = sum(p.numel() for p in hidden_matrices(model, optim.kernels) if p.requires_grad)
    sharing = shard_size or ranks
    expected = memory.state(
        parameters, Training(dtype="fp32", optimizer=optim.optimizer), Layout(sharing, zero=3),
        muons, frozen,
    )  # fmt: skip
    with pretend(ranks):
        shard(model, torch.device("cpu"), torch.bfloat16, shard_size)
        learnt = [local(p).nbytes for p in model.parameters() if p.requires_grad]
        averages = sum(
            local(p).nbytes * (1 if isinstance(optimizer, Muon) else 2)
            for optimizer in build_optimizers(model, optim)
            for group in optimizer.param_groups for p in group["params"]
        )  # fmt: skip
        weights = sum(local(p).nbytes for p in model.parameters())
    link = gpu.link / 2 if sharing <= MACHINE and gpu.link else NETWORK
    compute = flops / (gpu.peak("bf16") * BUSY)
    sending, step = seconds(
        compute, [parameters - sum(units), *units], sum(learnt), ranks // sharing, link * 1e9,
        NETWORK * 1e9,
    )  # fmt: skip
    held = Memory(weights, sum(learnt), averages)
    return Job(parameters, held, expected, compute, sending, step)


def report(name: str, job: Job, ranks: int, gpu: gpus.GPU, shard_size: int) -> str:
    """What was counted, and what was predicted, with what that rests on."""
    held = job.held
    state = " + ".join(short(n) + "B" for n in (held.weights, held.gradients, held.optimizer))
    return (
        f"{name}: {job.parameters:,} parameters, shared by {shard_size or ranks} of {ranks} x "
        f"{gpu.name}\n"
        f"rank 0 holds {state} = {short(held.total)}B of weights, gradients and averages, all in "
        f"float32; the calculator says {short(job.expected.total)}B\n"
        f"a step takes {job.step:.3f} s: {job.computing:.3f} s computing, {job.sending:.3f} s "
        f"sending, {job.computing + job.sending - job.step:.3f} s of it at the same time\n"
        f"This rests on products at {BUSY:.0%} of the peak while they run, links at full speed "
        f"({gpu.link / 2:g} GB/s in a machine of {MACHINE}, {NETWORK:g} GB/s between machines), "
        "and ranks that never wait for a slow one; one forward pass a step; no update, no data."
    )


def main(argv: list[str] | None = None) -> int | str:
    """python -m tinyfm.sharded llama-1b --gpus 64 [--shard-size 8] [--rows 8] [--gpu h100]"""
    parser = argparse.ArgumentParser("python -m tinyfm.sharded", description=main.__doc__)
    parser.add_argument("name", help="a preset, or a published gpt or llama of tinyfm.calc --list")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--shard-size", type=int, default=0, help="that share a copy; 0 = all")
    parser.add_argument("--rows", type=int, default=0, help="of a batch on each GPU")
    parser.add_argument("--gpu", default="h100")
    options = parser.parse_args(argv)
    try:
        gpu, shared = gpus.get(options.gpu), options.shard_size
        job = simulate(options.name, options.gpus, gpu, shared, options.rows)
    except ValueError as error:
        return f"error: {error}"
    print(report(options.name, job, options.gpus, gpu, shared))
    return 0


if __name__ == "__main__":
    sys.exit(main())
