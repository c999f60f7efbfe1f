"""A model on all ranks at once: whole on each (DDP, Li et al. 2020), or a share (FSDP2).

Both exchange gradients while the backward pass runs, and for that they have to see the forward
pass: a loss that is called past them trains wrongly, and looks fine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyfm import sharded
from tinyfm.common.device import Compiled
from tinyfm.distributed import World, total


class LossModule(nn.Module):
    """The model's loss as a forward: DDP and FSDP2 see only what runs through forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch, generators):
        return self.model.loss(batch, generators)


class Parallel:
    """The model's loss for training, f(batch, generators) -> (loss, metrics), on all ranks at once.

    The model goes to the device, whole; or, with fsdp = (dtype, shard_size) as sharded.shard takes
    them, block by block and a share of each, as it may not fit.
    """

    def __init__(self, model: nn.Module, world: World, device: torch.device | str = "cpu",
                 compiled: bool = False, fsdp: tuple = ()):  # fmt: skip
        self.world, self.module, self.scalars = world, LossModule(model), []
        self.sharded = bool(fsdp) and dist.is_initialized()
        if self.sharded:
            self.scalars = sharded.shard(self.module, torch.device(device), *fsdp)
        else:
            model.to(device)
            if world.size > 1:
                self.module = nn.parallel.DistributedDataParallel(self.module)
        self.model, self.call = model, Compiled(self.module) if compiled else self.module

    def __call__(self, batch: dict[str, Tensor], generators: list[torch.Generator]):
        return self.call(batch, generators)

    def loss(self, batch: dict[str, Tensor], generators: list[torch.Generator]):
        """The same for evaluation: each rank on its own, but all together where it is sharded."""
        if not self.sharded:
            return self.model.loss(batch, generators)
        result = self.module(batch, generators)
        self.module.reshard()  # FSDP2 keeps the outermost weights for a backward pass
        return result

    @contextlib.contextmanager
    def exchanging(self, last: bool) -> Iterator[None]:
        """Around a forward and a backward pass. Gradients add up, and are averaged at the last."""
        if self.sharded:
            self.module.set_requires_gradient_sync(last)
            yield
            for scalar in self.scalars if last else ():
                total(scalar.grad).div_(self.world.size)
        elif last or self.world.size == 1:
            yield
        else:
            with self.module.no_sync():
                yield

    def whole(self):
        """Inside, each rank has all weights, and may use the model without the others."""
        return sharded.whole(self.module) if self.sharded else contextlib.nullcontext()
