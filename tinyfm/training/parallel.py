"""One model on all ranks: a copy on each (DDP), or a share on each (FSDP2).

DDP (distributed data parallel, Li et al. 2020) keeps the whole model on every rank, and averages
the gradients. FSDP2 (fully sharded data parallel, Rajbhandari et al. 2020, Zhao et al. 2023) gives
every rank some rows of each parameter, its gradient and its optimizer state. A block's weights are
gathered just before the block runs and dropped right after, so a rank never holds the whole model.

Both exchange gradients while the backward pass runs. They prepare for that in the forward pass,
which they must therefore see: a loss that is computed without calling the wrapped module trains
without exchanging gradients, and no error shows it.
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
from tinyfm.training.distributed import World, is_shard, joined, kept_whole, total

# ---- blocks --------------------------------------------------------------------------------------


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks, such as transformer layers: the units of sharding and recomputation.

    A block is an element of a ModuleList or Sequential that has children and a forward pass. No
    block lies within another.
    """
    lists = (nn.ModuleList, nn.Sequential)
    found = []
    for parent in model.modules():
        if not isinstance(parent, lists):
            continue
        for child in parent.children():
            has_children = any(child.children())
            has_forward = type(child).forward is not nn.Module.forward
            if not isinstance(child, lists) and has_children and has_forward:
                found.append(child)
    inner = {id(module) for block in found for module in block.modules() if module is not block}
    return [block for block in found if id(block) not in inner]


def checkpoint_activations(model: nn.Module) -> None:
    """Let each block store its input only, and compute the rest again in the backward pass.

    Needs less memory and about a third more time (Chen et al. 2016).
    """
    for block in blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


# ---- sharding (FSDP2) ----------------------------------------------------------------------------


def make_mesh(kind: str, shard_size: int) -> dist.device_mesh.DeviceMesh:
    """The ranks, arranged for sharding: shard_size neighbours share one copy; 0 = all ranks.

    kind: device type. One copy gives a row of ranks ("shard",), several a grid ("copies", "shard").
    Raises ValueError if shard_size does not divide the number of ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh

    size = dist.get_world_size()
    if shard_size in (0, size):
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    if size % shard_size:
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        raise ValueError(
            f"shard_size {shard_size} does not divide the {size} processes; use one of {divisors}"
        )
    shape = (size // shard_size, shard_size)
    return init_device_mesh(kind, shape, mesh_dim_names=("copies", "shard"))


def shard(
    module: nn.Module, device: torch.device, dtype: torch.dtype, shard_size: int = 0
) -> list[nn.Parameter]:
    """Shard a module's parameters in place, block by block, onto the device.

    Weights are kept in float32 and gathered in `dtype`; gradients are summed in float32.
    shard_size: number of ranks that share one copy, 0 = all.

    Some parameters stay whole on every rank; see `kept_whole`. Those of them that are trained are
    returned: the caller has to average their gradients.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kept = kept_whole(module)
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    mesh = make_mesh(device.type, shard_size)
    options = {"mesh": mesh, "mp_policy": policy, "ignored_params": kept}
    for block in blocks(module):
        fully_shard(block, **options)
    fully_shard(module, **options)
    for p in kept:
        if not p.is_meta:
            p.data = p.data.to(device)
    return [p for p in module.parameters() if p in kept and p.requires_grad]


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all weights of a sharded module. They must not be changed.

    All ranks enter and leave together. Inside, a rank may run the model without the others,
    because FSDP2's hooks are removed meanwhile. The hooks would count which modules have run, and
    that count has to be equal on all ranks; and a call of state_dict would drop the gathered
    weights.
    """
    from torch.distributed.fsdp import FSDPModule

    # Every place that holds hooks, and its hooks.
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    places = [(part, name) for part in parts for name in ("_forward_pre_hooks", "_forward_hooks")]
    places += [(part, "_state_dict_pre_hooks") for part in module.modules()]
    kept = [getattr(part, name) for part, name in places]

    # Gather the weights, and remove the hooks. The first forward pass initialises FSDP2; if none
    # has run yet, this must be done here.
    module._get_fsdp_state()._lazy_init()
    for part in parts:
        part.unshard()
    for part, name in places:
        setattr(part, name, OrderedDict())
    try:
        yield
    finally:
        for (part, name), hooks in zip(places, kept):
            setattr(part, name, hooks)
        for part in parts:
            part.reshard()


# ---- the model for training ----------------------------------------------------------------------


class LossModule(nn.Module):
    """The model's loss as a forward pass: DDP and FSDP2 see only calls of forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch, generators):
        return self.model.loss(batch, generators)


class Parallel:
    """The model's loss on all ranks at once: a function (batch, generators) -> (loss, metrics).

    Without `fsdp` the whole model goes to the device. With it, the model goes there block by block
    and only a share of each block, because the whole may not fit; dtype and shard_size are those of
    `shard`. A run of one process has nobody to share with, and ignores `fsdp`.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        device: torch.device | str = "cpu",
        compiled: bool = False,
        fsdp: bool = False,
        dtype: torch.dtype = torch.float32,
        shard_size: int = 0,
    ):
        self.world = world
        self.model = model
        self.module = LossModule(model)
        self.sharded = fsdp and joined()
        self.kept: list[nn.Parameter] = []  # whole on every rank
        if self.sharded:
            self.kept = shard(self.module, torch.device(device), dtype, shard_size)
        else:
            model.to(device)
            if world.size > 1:
                self.module = nn.parallel.DistributedDataParallel(self.module)
        self.call = Compiled(self.module) if compiled else self.module

    def __call__(self, batch: dict[str, Tensor], generators: list[torch.Generator]):
        return self.call(batch, generators)

    def loss(self, batch: dict[str, Tensor], generators: list[torch.Generator]):
        """The same for evaluation, without gradients.

        If the model is sharded, all ranks have to call this together; otherwise each rank may call
        it on its own.
        """
        if not self.sharded:
            return self.model.loss(batch, generators)
        result = self.module(batch, generators)
        self.module.reshard()  # FSDP2 keeps the outermost weights, for a backward pass
        return result

    @contextlib.contextmanager
    def exchanging(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch.

        Gradients add up over the micro-batches. Only for the last one are they averaged over the
        ranks, so that a step exchanges them once.
        """
        if self.sharded:
            self.module.set_requires_gradient_sync(last)
            yield
            if last:
                for parameter in self.kept:
                    total(parameter.grad).div_(self.world.size)
        elif last or self.world.size == 1:
            yield
        else:
            with self.module.no_sync():
                yield

    def whole(self) -> contextlib.AbstractContextManager:
        """Inside, each rank has all weights, and may use the model without the others."""
        return whole(self.module) if self.sharded else contextlib.nullcontext()


# ---- weights to and from a checkpoint ------------------------------------------------------------


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """model.state_dict(), with each tied weight once, under the first of its names."""
    first_names = {name for name, _ in model.named_parameters()}
    all_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    duplicates = all_names - first_names
    return {name: t for name, t in model.state_dict().items() if name not in duplicates}


def copy_whole(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copies in CPU memory of whole tensors, put together where they are sharded; {} unless `keep`.

    Every rank calls this. The tensors are put together one by one, and a rank that does not keep
    them holds one at a time.
    """
    copies = {}
    for name, tensor in tensors.items():
        if is_shard(tensor):
            tensor = tensor.full_tensor()
        if keep:
            copies[name] = tensor.detach().to("cpu", copy=True)
    return copies


def distribute(tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shard whole tensors in the same way as the tensors of the same names in `like`.

    Each rank holds the whole tensors, and keeps its rows of them. Tensors whose counterpart is not
    sharded, or of another shape, are returned unchanged.
    """
    result = dict(tensors)
    for name, tensor in tensors.items():
        if name not in like:
            continue
        target = like[name]
        if is_shard(target) and tensor.shape == target.shape:
            from torch.distributed.tensor import distribute_tensor

            result[name] = distribute_tensor(
                tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None
            )
    return result


def load_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """files.load_model, also for a sharded model."""
    files.load_model(model, distribute(tensors, model.state_dict()))
