"""One program for one process or many: torchrun starts them, this file lets them agree.

Started by `python`, a run is a world of one rank and nothing here communicates. Started by
`torchrun`, each process has a rank; it reads its rows of every global batch, DDP (Li et al. 2020)
averages the gradients, and small sums agree on the loss and on when to stop.
Left out: sharding the model itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    rank: int = 0  # of this process, 0 .. size - 1
    size: int = 1  # processes in all
    local_rank: int = 0  # on this machine: which GPU

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, batch_size: int) -> range:
        """This rank's share of the global batch."""
        share = batch_size // self.size
        return range(self.rank * share, (self.rank + 1) * share)


def start(device: torch.device | None = None) -> World:
    """Join the processes that torchrun started, or be the only one."""
    if "RANK" not in os.environ:
        return World()
    world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(world.local_rank)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=5))
    return world


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def first_rank_first(world: World) -> Iterator[None]:
    """The first rank goes through alone, then the others, who find its work done."""
    if not world.first:
        dist.barrier()
    yield
    if world.first and world.size > 1:
        dist.barrier()


def total(values: Tensor) -> Tensor:
    """Sum over ranks, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


class LossModule(nn.Module):
    """The model with its loss as forward: DDP synchronises only what runs through forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch, generators):
        return self.model.loss(batch, generators)


def parallel(model: nn.Module, world: World) -> nn.Module:
    """What to call as f(batch, generators) -> (loss, metrics): synchronised if there are others."""
    module = LossModule(model)
    return nn.parallel.DistributedDataParallel(module) if world.size > 1 else module
