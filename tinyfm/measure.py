"""What a module of our own costs, found by running it on tensors that have no memory.

A fake tensor knows its shape, number format and device, and every operation on it gives another, so
a training step of any size "runs" in a second on any machine. Beside it two things are counted:

- FLOPs: torch's counter adds up the matrix products, 2 a multiply-add. Attention is unfused here,
  so that what a fused kernel computes twice is not counted twice.
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
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tinyfm.ledgers import Stack
from tinyfm.memory import Layout, Module, Training, state
from tinyfm.optim import OptimConfig, build_optimizers, hidden_matrices, scale_and_clip
from tinyfm.trainer import TrainConfig

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


def micro_batch(model: nn.Module, train: TrainConfig, world: int = 1) -> tuple[int, bool]:
    """Rows of a forward pass, and whether a step has several, as the trainer cuts a batch."""
    batch = train.batch_size // world
    whole = getattr(model, "whole_batch", False)
    rows = batch if whole else train.micro_batch_size or batch
    return rows, rows < batch


def count_flops(model: nn.Module, rows: int = 1) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass of `rows` rows, 2 a multiply-add."""
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        fake = without_memory(model, CPU)
        with FlopCounterMode(display=False) as forward:
            loss = run_loss(fake, rows, CPU, torch.float32)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


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
    """Bytes of the optimizer's averages, AdamW's two and Muon's one, and of the moving average."""
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    hidden = [p for p in hidden_matrices(model) if p.requires_grad]
    muons = sum(p.numel() for p in hidden) if optim.optimizer == "muon" else 0
    everything = sum(p.nbytes for p in model.parameters())
    return 4 * (2 * n - muons), everything if optim.ema_half_life else 0


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


def count_parts(model: nn.Module) -> dict[str, int]:
    """Parameters of each submodule, a tied one where it comes first."""
    counted: set[nn.Parameter] = set()
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter not in counted:
            counted.add(parameter)
            part = name.split(".")[0]
            parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def measure(
    name: str, model: nn.Module, optim: OptimConfig, rows: int = 1, accumulate: bool = False,
    at_once: int = 0, device: torch.device = CPU, dtype: torch.dtype = torch.float32,
) -> Module:  # fmt: skip
    """What memory.py asks of a network, of a module of our own; dtype is that of its products.

    The peak of a step is found for `rows` rows of a micro-batch and for twice as many: a line goes
    through the two. What the model keeps beyond weights, gradients and averages of all parameters,
    such as a moving average, counts as activations.
    """
    n, rows = sum(p.numel() for p in model.parameters()), max(2, rows)  # one has nothing to compare
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    tables += [model.head] if hasattr(model, "head") else []
    outer = {p for table in tables for p in table.parameters()}
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    sizes = [sum(p.numel() for p in block.parameters()) for blocks in lists for block in blocks]
    (one, update), (two, _) = (
        step_bytes(model, optim, n, accumulate, at_once, device, dtype) for n in (rows, 2 * rows)
    )
    matrices = sum(p.numel() for p in hidden_matrices(model))
    known = state(n, Training(dtype="fp32", optimizer=optim.optimizer), Layout(), matrices).total
    config, cache = model.config, 0
    if hasattr(config, "n_kv_head"):  # a decoder, which generates from keys and values
        cache = 2 * config.G * config.K
    return Module(
        name, count_parts(model), n, n - sum(p.numel() for p in outer),
        matrices, max(sizes, default=n),
        sum(count_flops(model, 2)) // 2, fixed_bytes=2 * one - two - known,
        row_bytes=(two - one) // rows, update_bytes=update - known,
        row=config.context_length if cache else 1, unit="token" if cache else "row",
        shape={"window": getattr(config, "window", 0)},
        stacks=(Stack((), config.n_layer, cache=cache),) if cache else (),
    )  # fmt: skip
