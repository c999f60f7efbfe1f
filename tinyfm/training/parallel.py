"""A model on all ranks at once: whole on each (DDP, Li et al. 2020), or a share (FSDP2).

Both exchange gradients while the backward pass runs, and for that they have to see the forward
pass: a loss that is called past them trains wrongly, and looks fine.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyfm.common import files
from tinyfm.common.device import Compiled
from tinyfm.training.distributed import World, is_shard, total


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
            self.scalars = shard(self.module, torch.device(device), *fsdp)
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
        return whole(self.module) if self.sharded else contextlib.nullcontext()


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
