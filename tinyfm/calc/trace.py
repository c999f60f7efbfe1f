"""What a module of our own costs, found by running it on tensors that have no memory.

A fake tensor knows its shape, number format and device, and every operation on it gives another, so
a training step of any size "runs" in a second on any machine. Beside it two things are counted:

- FLOPs: of each matrix product by torch's own formulas, 2 a multiply-add. Attention is unfused
  here, so that what a fused kernel computes twice is not counted twice.
- bytes: each new storage is added when it appears and subtracted when its last tensor is gone; the
  highest sum is the peak. Activations are what it holds beyond weights, gradients and optimizer.

So nothing about a family stands here. Of a module it asks what the trainer asks,
`loss(batch, generators)`, and `example_batch(rows)`: any batch of that many rows, as data would
give it.

Left out: scratch space inside a kernel, what an allocator keeps, and torch itself.
"""

from __future__ import annotations

import copy
import weakref
from bisect import bisect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tinyfm.training.optim import OptimConfig, build_optimizers, hidden_matrices, scale_and_clip

CPU = torch.device("cpu")


def without_memory(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy with fake parameters and buffers, tied where the model ties them.

    To be called under a FakeTensorMode.
    """
    copies: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, tensor.requires_grad)
        copies[id(tensor)] = fake
    model = copy.deepcopy(model, copies).train()
    if getattr(model, "whole_batch", False):  # as the trainer sets it, but alone
        model.rows_at_once, model.gather = 0, lambda rows: rows
    return model


def run_loss(model: nn.Module, rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The loss of an example batch, in the number format that the trainer would use."""
    batch = {name: tensor.to(device) for name, tensor in model.example_batch(rows).items()}
    generators = [torch.Generator().manual_seed(row) for row in range(rows)]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return model.loss(batch, generators)[0]


def naming(model: nn.Module) -> Callable[[str], str]:
    """From the name of a parameter or module to that of the component it is in: a submodule of the
    top level, or of the next, if there is but one."""
    alone = len({name.split(".")[0] for name, _ in model.named_parameters()}) == 1
    return lambda name: ".".join(name.split(".")[: 1 + alone])


class Products(TorchDispatchMode):
    """Counts FLOPs, forward and backward, for the component of `model` that each belongs to.

    Forward that is the one which runs; "loss" is what none of them does. Backward it is the one
    which ran when the node of autograd was made: nodes are numbered in that order.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.flops: dict[str, list[int]] = {}
        self.running, self.began = ["loss"], [(0, "loss")]  # who runs, from which node on
        component = naming(model)
        for name, module in model.named_modules():
            if part := component(name):
                module.register_forward_pre_hook(lambda *_, part=part: self.turn(part))
                module.register_forward_hook(lambda *_: self.turn())

    def turn(self, part: str = "") -> None:
        """A module begins, or, without a name, ends."""
        self.running.append(part) if part else self.running.pop()
        self.began.append((torch.autograd._get_sequence_nr(), self.running[-1]))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            node, part = torch._C._current_autograd_node(), self.running[-1]
            if node and part == "loss":
                after = bisect(self.began, node._sequence_nr(), key=lambda began: began[0])
                part = self.began[after - 1][1]
            sums = self.flops.setdefault(part, [0, 0])
            sums[node is not None] += count(*args, **(kwargs or {}), out_val=result)
        return result


def count_flops(model: nn.Module, rows: int = 1) -> dict[str, list[int]]:
    """FLOPs of each component for `rows` rows: [forward, backward], 2 a multiply-add."""
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        fake = without_memory(model, CPU)
        with Products(fake) as counted:
            run_loss(fake, rows, CPU, torch.float32).backward()
    return counted.flops


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that operations make while it is entered."""

    def __init__(self):
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def average_bytes(model: nn.Module, optim: OptimConfig) -> tuple[int, int]:
    """Bytes of the optimizer's averages, AdamW's two and Muon's one, and of the moving average.

    What is frozen has none of them.
    """
    learnt = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in hidden_matrices(model, optim.kernels) if p.requires_grad]
    muons = sum(p.numel() for p in hidden) if optim.optimizer == "muon" else 0
    average = sum(p.nbytes for p in learnt) if optim.ema_half_life else 0
    return 4 * (2 * sum(p.numel() for p in learnt) - muons), average


def step_bytes(
    model: nn.Module, optim: OptimConfig, rows: int, accumulate: bool = False, at_once: int = 0,
    device: torch.device = CPU, dtype: torch.dtype = torch.float32,
) -> tuple[int, int]:  # fmt: skip
    """Peak bytes of a step of the trainer with micro-batches of `rows` rows, weights and all.

    Returns the peak of the forward and backward passes, and that of the update after them.
    accumulate: there are several micro-batches, so gradients are there when the last one comes.
    at_once: rows that a model which takes whole batches cuts them into; 0 = all.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = without_memory(model, device)
        fake.rows_at_once = at_once
        parameters = [p for p in fake.parameters() if p.requires_grad]
        optimizers, peak = build_optimizers(fake, optim), Peak()
        for tensor in (*fake.parameters(), *fake.buffers()):
            peak.add(tensor.untyped_storage())
        peak.now += average_bytes(fake, optim)[1]
        with peak:
            for parameter in parameters:  # an update of nothing, to have the optimizers' averages
                parameter.grad = torch.zeros_like(parameter)
            for optimizer in optimizers:
                optimizer.step()
            if not accumulate:
                fake.zero_grad()
            peak.most = peak.now
            run_loss(fake, rows, device, dtype).backward()
            backward, peak.most = peak.most, peak.now
            scale_and_clip(fake, 1.0, optim.clip)
            for optimizer in optimizers:
                optimizer.step()
        return backward, peak.most


def count_parts(model: nn.Module, frozen: bool = False) -> dict[str, int]:
    """Parameters, or frozen ones, of each component, a tied one where it comes first."""
    parts: dict[str, int] = {}
    component = naming(model)
    for name, parameter in model.named_parameters():
        if not frozen or not parameter.requires_grad:
            part = component(name)
            parts[part] = parts.get(part, 0) + parameter.numel()
    return parts
