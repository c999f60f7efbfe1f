"""Muon: a step for a matrix as a whole, in which no direction is learnt faster than another.

Muon (Jordan et al. 2024) treats the gradient G of a hidden matrix as one object: it keeps a
momentum M = mu M + (1 - mu) G and steps along the nearest orthogonal matrix, U V' of the singular
value decomposition M = U S V'. U V' comes from a few matrix products (Newton-Schulz), not from a
decomposition.

Where the model is shared out (sharded.py) a rank has some rows of each matrix. The momentum works
on those rows; for the products each rank gets its part of the matrices, whole.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor

from tinyfm.training.distributed import is_shard, local, shard_group

# ---- tensors that may be shared out -------------------------------------------------------------


# ---- the nearest orthogonal matrix ---------------------------------------------------------------

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


# ---- the optimizer -------------------------------------------------------------------------------


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
