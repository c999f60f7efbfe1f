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
import functools
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyfm import memory, systems
from tinyfm.common import files, gpus
from tinyfm.memory import Layout, Memory, Training
from tinyfm.muon import Muon, is_shard, local
from tinyfm.optim import OptimConfig, build_optimizers, hidden_matrices
from tinyfm.report import short

# ---- blocks -------------------------------------------------------------------------------------


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered, or computed twice, one at a time; none is within another."""
    lists = (nn.ModuleList, nn.Sequential)
    found = [
        block
        for parent in model.modules() if isinstance(parent, lists)
        for block in parent.children()
        if not isinstance(block, lists) and any(block.children())
        and type(block).forward is not nn.Module.forward
    ]  # fmt: skip
    inner = {id(module) for block in found for module in block.modules() if module is not block}
    return [block for block in found if id(block) not in inner]


def checkpoint_activations(model: nn.Module) -> None:
    """Let each block keep only its input, and run again in the backward pass (Chen et al. 2016)."""
    for block in blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


# ---- sharing out --------------------------------------------------------------------------------


def make_mesh(kind: str, shard_size: int):
    """All ranks in a row; or copies x shards, neighbours sharing one copy. ValueError if uneven."""
    from torch.distributed.device_mesh import init_device_mesh

    size = dist.get_world_size()
    if shard_size in (0, size):
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    if size % shard_size:
        fit = [n for n in range(1, size + 1) if size % n == 0]
        raise ValueError(
            f"shard_size {shard_size} does not divide the {size} processes; use one of {fit}"
        )
    return init_device_mesh(kind, (size // shard_size, shard_size),
                            mesh_dim_names=("copies", "shard"))  # fmt: skip


def shard(module: nn.Module, device: torch.device, dtype: torch.dtype,
          shard_size: int = 0) -> list[nn.Parameter]:  # fmt: skip
    """Share out a module's parameters in place, block by block onto the device; 0 = over all ranks.

    Weights are kept in float32 and gathered in `dtype`; gradients are summed in float32. Parameters
    of a single number cannot be cut: they stay, and are returned, for the caller to average their
    gradients.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    scalars = {p for p in module.parameters() if p.ndim == 0}
    policy = MixedPrecisionPolicy(
        None if dtype == torch.float32 else dtype, torch.float32, cast_forward_inputs=False
    )
    mesh = make_mesh(device.type, shard_size)
    options = {"mesh": mesh, "mp_policy": policy, "ignored_params": scalars}
    for block in blocks(module):
        fully_shard(block, **options)
    fully_shard(module, **options)
    for p in scalars:
        p.data = p.data if p.is_meta else p.data.to(device)
    return [p for p in module.parameters() if p in scalars and p.requires_grad]


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all weights of a sharded module; they are not to be changed.

    FSDP2's hooks are off: they count who ran, from which all ranks must draw the same conclusions,
    and take a state_dict for an end of this.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    hooks = [(part, name) for part in parts for name in ("_forward_pre_hooks", "_forward_hooks")]
    hooks += [(part, "_state_dict_pre_hooks") for part in module.modules()]
    kept = [getattr(part, name) for part, name in hooks]
    module._get_fsdp_state()._lazy_init()  # which its first forward pass does, if there was one
    for part in parts:
        part.unshard()
    for part, name in hooks:
        setattr(part, name, OrderedDict())
    try:
        yield
    finally:
        for (part, name), own in zip(hooks, kept):
            setattr(part, name, own)
        for part in parts:
            part.reshard()


# ---- in and out ---------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Tensor]:
    """model.state_dict(), a tied weight once, by the name that comes first."""
    once = {name for name, _ in model.named_parameters()}
    twice = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return {name: t for name, t in model.state_dict().items() if name not in twice}


def gather(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copies in CPU memory, put together one by one where they are shared out; {} unless `keep`.

    Every rank calls it, and those that do not keep them hold one tensor at a time.
    """
    copies = {}
    for name, tensor in tensors.items():
        tensor = tensor.full_tensor() if is_shard(tensor) else tensor
        if keep:
            copies[name] = tensor.detach().to("cpu", copy=True)
    return copies


def cut(tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, shared out as those of the same name are: each rank keeps its rows."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        if name in like and is_shard(like[name]) and tensor.shape == like[name].shape:
            from torch.distributed.tensor import distribute_tensor

            mesh, placements = like[name].device_mesh, like[name].placements
            there = tensor.to(like[name].device)
            result[name] = distribute_tensor(there, mesh, placements, src_data_rank=None)
    return result


def load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """files.load_model, also for a model that is shared out."""
    files.load_model(model, cut(tensors, model.state_dict()))


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
    from tinyfm import presets
    from tinyfm.gpt import GPT, GPTConfig

    forms = {"gpt": presets.GPT2, "llama": presets.LLAMA}
    system = systems.get(name) if name in systems.rows() else None
    with torch.device("meta"):
        if system is None:
            run = presets.get_preset(name).run
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
    from tinyfm import calc

    model, optim, batch = find(name)
    rows = rows or max(1, batch // ranks)
    flops = calc.training_cost(model, optim, rows).flops_per_step
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
