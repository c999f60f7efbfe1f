"""Optimizers and schedules: which parameter is updated how, how fast, and what is averaged.

AdamW (Loshchilov & Hutter 2019) scales each number of a gradient by its own running size. Muon
(Jordan et al. 2024) treats the gradient G of a hidden matrix as one object: it keeps a momentum
M = mu M + (1 - mu) G and steps along the nearest orthogonal matrix, U V' of the singular value
decomposition M = U S V', so that no direction is learnt faster than another. U V' comes from a few
matrix products (Newton-Schulz), not from a decomposition. Embeddings, heads, gains and biases
stay with AdamW: a table's rows and a vector are not maps between hidden states.

Learning rates follow warmup then decay, as a factor on each group's own rate. The exponential
moving average (EMA) of the weights is what diffusion models sample with.

Where the model is shared out (sharded.py) a rank has some rows of each matrix. Then AdamW, momentum
and EMA work on those rows, as they would on the rest; only Muon needs whole matrices, and each rank
orthogonalises its part of them.
Left out: second-order methods, 8-bit states, layer-wise rates.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["muon", "adamw"] = "muon"  # for hidden matrices; the rest is AdamW's
    lr: float = 3e-3  # AdamW's peak learning rate
    muon_lr: float = 0.02  # Muon's peak learning rate
    kernels: bool = False  # Muon for convolutions too; the rates of such a model change with it
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's averages of gradient and square
    momentum: float = 0.95  # Muon's average of gradients
    weight_decay: float = 0.1  # pull of matrices towards zero, times the learning rate
    schedule: Literal["wsd", "cosine"] = "wsd"  # warmup-stable-decay, or warmup-cosine
    warmup_steps: int = 20  # linear rise to the peak
    decay_fraction: float = 0.4  # wsd: last part of the run, falling linearly
    final_lr: float = 0.0  # share of the peak at the end
    clip: float = 1.0  # largest gradient norm; 0 = no clipping
    ema_half_life: float = 0.0  # steps in which the average forgets half; 0 = keep no average

    def __post_init__(self):
        for name in ("lr", "muon_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("weight_decay", "clip", "ema_half_life", "warmup_steps", "final_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or above")
        for name in ("momentum", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")


# ---- tensors that may be shared out -------------------------------------------------------------


def is_shard(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which each rank of a mesh holds some rows."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds, in the same memory: of a plain tensor, all of it."""
    return tensor.to_local() if is_shard(tensor) else tensor


def shard_group(shard: Tensor) -> dist.ProcessGroup:
    """The ranks among which it is shared out: the last dimension of its mesh."""
    return shard.device_mesh.get_group(shard.device_mesh.ndim - 1)


# ---- Muon ---------------------------------------------------------------------------------------

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steepest at 0, settles near 1


def orthogonalise(M: Tensor, steps: int = 5) -> Tensor:
    """Nearest orthogonal matrix, roughly, of each matrix in M (n, rows, columns), in bfloat16.

    Each step maps every singular value s to a s + b s^3 + c s^5 by products alone:
    X <- a X + (b A + c A A) X with A = X X'. From any s in [0.002, 1] it reaches 0.68 to 1.21.
    """
    a, b, c = NEWTON_SCHULZ
    X = M.bfloat16()
    tall = X.size(1) > X.size(2)
    if tall:  # A is the smaller of the two products
        X = X.mT
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # every singular value <= 1
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


def orthogonalise_shards(M: Tensor, like: Tensor) -> Tensor:
    """`orthogonalise` of n matrices, of which each rank has the rows M (n, some rows, columns).

    like: one of the n shards. Every rank gets its part of the n, whole, and gives back the rows:
    the same products as on one rank, each done once.
    """
    group, rows, columns = shard_group(like), like.size(0), M.size(2)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    height = -(-rows // size)  # of all shards but the last: torch.chunk's rule
    heights = [min(height, max(0, rows - r * height)) for r in range(size)]
    counts = [len(M) // size + (r < len(M) % size) for r in range(size)]
    outward = [n * heights[rank] * columns for n in counts]  # my rows of their matrices
    inward = [counts[rank] * h * columns for h in heights]  # their rows of my matrices

    def exchange(values: Tensor, sent: list[int], received: list[int]) -> Tensor:
        result = values.new_empty(sum(received))
        dist.all_to_all_single(result, values.contiguous(), received, sent, group=group)
        return result

    parts = exchange(M.bfloat16().flatten(), outward, inward).split(inward)
    shapes = [(counts[rank], h, columns) for h in heights]
    whole = torch.cat([part.view(shape) for part, shape in zip(parts, shapes)], dim=1)
    whole = orthogonalise(whole) if counts[rank] else whole
    rows_of = torch.cat([part.flatten() for part in whole.split(heights, dim=1)])
    return exchange(rows_of, inward, outward).view_as(M)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices; the same update as torch.optim.Muon. A kernel (C out,
    C in, H, W) is taken for the matrix (C out, C in x H x W) that it is to a patch of its input.

    Matrices of one shape are stacked and orthogonalised together: few large products in place of
    many small ones. A matrix with more rows than columns takes a step sqrt(rows / columns) longer,
    which keeps the size of what it puts out.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"]]
        if wrong := [shape for shape in shapes if len(shape) not in (2, 4)]:
            raise ValueError(f"Muon updates matrices; it was given the shape {wrong[0]}")

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape, p.device].append(p)
            for (shape, _), params in by_shape.items():
                ratio = shape[0] / shape[1:].numel()  # of rows to columns
                self.update(params, group, group["lr"] * max(1, ratio) ** 0.5)

    def update(self, params: list[Tensor], group: dict, lr: float) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        averages = [local(self.state[p]["momentum_buffer"]) for p in params]
        grads, weights = [local(p.grad) for p in params], [local(p) for p in params]
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, averages, group["momentum"])  # Nesterov's look ahead
        M, first = torch.stack(ahead).flatten(2), params[0]
        updates = orthogonalise_shards(M, first) if is_shard(first) else orthogonalise(M)
        updates = [x.view_as(w) for x, w in zip(updates.to(first.dtype), weights)]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-lr)


# ---- parameter groups ---------------------------------------------------------------------------


def hidden_matrices(model: nn.Module, kernels: bool = False) -> list[Tensor]:
    """The 2-D weights between hidden states, and the kernels of convolutions if asked for: all but
    those below a name of `model.outer`.

    A model names there what reads its input or writes its output, at any depth: tables, not maps.
    """
    named, outer, ndims = model.named_parameters(), set(model.outer), (2, 4) if kernels else (2,)
    return [p for name, p in named if p.ndim in ndims and outer.isdisjoint(name.split("."))]


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the hidden matrices and AdamW for the rest; matrices decay."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizers: list[torch.optim.Optimizer] = []
    hidden = [p for p in hidden_matrices(model, config.kernels) if p.requires_grad]
    if config.optimizer == "muon" and hidden:
        optimizers.append(Muon(hidden, config.muon_lr, config.momentum, config.weight_decay))
        taken = {id(p) for p in hidden}
        params = [p for p in params if id(p) not in taken]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


# ---- schedules, clipping, averaging -------------------------------------------------------------


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Share of the peak learning rate at a step of 0 .. steps - 1.

    Both rise linearly over warmup_steps. "cosine" (Loshchilov & Hutter 2017) then falls along half
    a cosine; "wsd" (Hu et al. 2024) stays, and falls linearly over the last decay_fraction.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        left = steps - step
        share = min(1.0, max(0.0, left / max(1.0, config.decay_fraction * steps)))
    return config.final_lr + (1 - config.final_lr) * share


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]


def total_norm(grads: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, on every rank the same."""
    shards = [g for g in grads if is_shard(g)]
    norm = torch.nn.utils.get_total_norm([g for g in grads if not is_shard(g)])
    if not shards:
        return norm
    square = torch.nn.utils.get_total_norm([local(g) for g in shards]).square()
    dist.all_reduce(square, group=shard_group(shards[0]))
    return (square + norm.square()).sqrt()


@torch.no_grad()
def scale_and_clip(model: nn.Module, scale: Tensor | float, clip: float) -> Tensor:
    """Multiply all gradients by scale, then shrink them to norm clip; return the norm between."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = total_norm(grads) * scale
    factor = scale * (torch.clamp(clip / (norm + 1e-6), max=1.0) if clip > 0 else 1.0)
    torch._foreach_mul_([local(g) for g in grads], factor)
    return norm


def learnt(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are trained, by name; the others are frozen."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


class EMA:
    """Moving average of a model's parameters: average += (1 - decay) (parameter - average).

    decay = 2^(-1 / half_life); early on it is (1 + step) / (10 + step) if that is less, so that the
    average does not hold on to the random start. What is frozen is its own average: not kept.
    """

    def __init__(self, model: nn.Module, half_life: float):
        self.half_life = half_life
        self.average = {name: p.detach().clone() for name, p in learnt(model)}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(0.5 ** (1 / self.half_life), (1 + step) / (10 + step))
        params = [local(p) for _, p in learnt(model)]
        torch._foreach_lerp_([local(a) for a in self.average.values()], params, 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights and the average."""
        for name, p in learnt(model):
            parameter, average = local(p), local(self.average[name])
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the averages from tensors by name, shared out as they are."""
        for name, average in self.average.items():
            average.copy_(tensors[name])
