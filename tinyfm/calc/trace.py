"""The cost of a module, measured by running it on tensors that have no memory.

Such a tensor has a shape, a dtype and a device, and operations give others (common/shapes.py). So a
training step of any size "runs" in a second on any machine. Meanwhile two things are counted:

- FLOPs, by torch's own formulas for matrix products, 2 a multiply-add. Attention is unfused here,
  so that the products which a fused kernel computes twice are counted once.
- Bytes: a storage is added when it appears and subtracted when its last tensor is gone. The highest
  sum is the peak. Activations are the part of it beyond weights, gradients and optimizer.

Nothing here depends on a family. A module needs loss(batch, generators), as for the trainer, and
example_batch(rows): any batch of that many rows with the shapes that its data have.

Left out: scratch memory inside a kernel, memory that an allocator keeps, and torch itself.
"""

from __future__ import annotations

import copy
import weakref
from bisect import bisect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tinyfm.common.shapes import ShapesOnly
from tinyfm.training.optim import OptimConfig, build_optimizers, hidden_matrices, scale_and_clip

CPU = torch.device("cpu")


def without_memory(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy, in training mode, whose parameters and buffers need no memory; tied ones stay tied.

    Call it under ShapesOnly().
    """
    copies: dict[int, Any] = {}  # by the id of the original, as deepcopy's memo is
    for tensor in (*model.parameters(), *model.buffers()):
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, tensor.requires_grad)
        copies[id(tensor)] = fake
    model = copy.deepcopy(model, copies).train()
    if getattr(model, "whole_batch", False):  # as the trainer prepares it, but for one rank
        model.rows_at_once = 0
        model.gather = lambda rows: rows
    return model


def run_loss(model: nn.Module, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The loss of an example batch, with products in the given dtype, as in the trainer."""
    batch = {name: tensor.to(device) for name, tensor in model.example_batch(rows).items()}
    generators = [torch.Generator().manual_seed(0)] * rows  # the values do not matter here
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss, _ = model.loss(batch, generators)
    return loss


# ---- components ---------------------------------------------------------------------------------


def component_namer(model: nn.Module) -> Callable[[str], str]:
    """A function from the name of a parameter or submodule to the name of its component.

    Components are the submodules of the top level; or of the next level, if the top has only one.
    """
    top = {name.split(".")[0] for name, _ in model.named_parameters()}
    depth = 2 if len(top) == 1 else 1
    return lambda name: ".".join(name.split(".")[:depth])


def count_parts(model: nn.Module, frozen: bool = False) -> dict[str, int]:
    """Parameters of each component, or only the frozen ones.

    A tied parameter counts for the component that comes first.
    """
    parts: dict[str, int] = {}
    component = component_namer(model)
    for name, parameter in model.named_parameters():
        if frozen and parameter.requires_grad:
            continue
        part = component(name)
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


# ---- FLOPs --------------------------------------------------------------------------------------


class FlopCounter(TorchDispatchMode):
    """Counts FLOPs, forward and backward, by component of `model`.

    A forward operation belongs to the component that is running, and to "loss" if none is. A
    backward operation belongs to the component that was running when its autograd node was made:
    autograd numbers its nodes in the order in which they are made.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.flops: dict[str, list[int]] = {}  # component: [forward, backward]
        self.running = ["loss"]  # components being run, the innermost last
        self.changes = [(0, "loss")]  # (number of an autograd node, component from that node on)
        component = component_namer(model)
        for name, module in model.named_modules():
            if part := component(name):
                module.register_forward_pre_hook(lambda *_, part=part: self.enter(part))
                module.register_forward_hook(lambda *_: self.leave())

    def enter(self, part: str) -> None:
        self.running.append(part)
        self.note_change()

    def leave(self) -> None:
        self.running.pop()
        self.note_change()

    def note_change(self) -> None:
        self.changes.append((torch.autograd._get_sequence_nr(), self.running[-1]))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        count = flop_registry.get(function._overloadpacket)
        if count is None:
            return result
        node = torch._C._current_autograd_node()  # None in the forward pass
        part = self.running[-1]
        if node and part == "loss":
            after = bisect(self.changes, node._sequence_nr(), key=lambda change: change[0])
            part = self.changes[after - 1][1]
        sums = self.flops.setdefault(part, [0, 0])
        direction = 0 if node is None else 1
        sums[direction] += count(*args, **kwargs, out_val=result)
        return result


def count_flops(model: nn.Module, rows: int = 1) -> dict[str, list[int]]:
    """FLOPs of each component for `rows` rows: [forward, backward], 2 a multiply-add."""
    with ShapesOnly(), sdpa_kernel(SDPBackend.MATH):
        fake = without_memory(model, CPU)
        with FlopCounter(fake) as counter:
            run_loss(fake, rows, CPU, torch.float32).backward()
    return counter.flops


# ---- bytes --------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is entered."""

    def __init__(self):
        super().__init__()
        self.alive: set[int] = set()
        self.now = 0
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes()
        self.alive.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def average_bytes(model: nn.Module, optim: OptimConfig) -> tuple[int, int]:
    """Bytes of (the optimizer's averages, the moving average of the weights), all in float32.

    AdamW keeps two averages of a parameter, Muon one. Frozen parameters have none.
    """
    learnt = [p for p in model.parameters() if p.requires_grad]
    numbers = 2 * sum(p.numel() for p in learnt)
    if optim.optimizer == "muon":
        numbers -= muon_parameters(model, optim)
    moving = sum(p.nbytes for p in learnt) if optim.ema_half_life else 0
    return 4 * numbers, moving


def muon_parameters(model: nn.Module, optim: OptimConfig) -> int:
    """Number of trained parameters that Muon would update."""
    matrices = hidden_matrices(model, optim.kernels)
    return sum(p.numel() for p in matrices if p.requires_grad)


def step_bytes(
    model: nn.Module,
    optim: OptimConfig,
    rows: int,
    accumulate: bool = False,
    at_once: int = 0,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> tuple[int, int]:
    """Peak bytes of a training step with micro-batches of `rows` rows, weights included.

    Returns the peak of the forward and backward passes, and the peak of the update after them.
    accumulate: there are several micro-batches, so gradients exist when the last one starts.
    at_once: rows that a model which takes the whole batch processes at a time; 0 = all.
    """
    with ShapesOnly():
        fake = without_memory(model, device)
        fake.rows_at_once = at_once
        parameters = [p for p in fake.parameters() if p.requires_grad]
        optimizers = build_optimizers(fake, optim)
        peak = Peak()
        for tensor in (*fake.parameters(), *fake.buffers()):
            peak.add(tensor.untyped_storage())
        _, moving_average = average_bytes(fake, optim)
        peak.now += moving_average
        with peak:
            # An update with gradients of 0, so that the optimizers have their averages.
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            for optimizer in optimizers:
                optimizer.step()
            if not accumulate:
                fake.zero_grad()
            # Forward and backward.
            peak.most = peak.now
            run_loss(fake, rows, device, dtype).backward()
            passes = peak.most
            # The update.
            peak.most = peak.now
            scale_and_clip(fake, 1.0, optim.clip)
            for optimizer in optimizers:
                optimizer.step()
            update = peak.most
    return passes, update
