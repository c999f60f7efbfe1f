"""Optimizers and schedules: which parameter is updated how, how fast, and what is averaged.

AdamW (Loshchilov & Hutter 2019) scales each number of a gradient by its own running size. Muon
(muon.py) treats that of a hidden matrix as one object. Embeddings, heads, gains and biases stay
with AdamW: a table's rows and a vector are not maps between hidden states.

Learning rates follow warmup then decay, as a factor on each group's own rate. The exponential
moving average (EMA) of the weights is what diffusion models sample with.

Where the model is shared out (sharded.py) a rank has some rows of each matrix. AdamW and EMA work
on those rows, as they would on the rest.
Left out: second-order methods, 8-bit states, layer-wise rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyfm.training.distributed import is_shard, local, shard_group
from tinyfm.training.muon import Muon


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
