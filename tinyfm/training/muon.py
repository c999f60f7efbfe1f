"""Muon: one step for a matrix as a whole, in which all directions are learnt equally fast.

Muon (Jordan et al. 2024) treats the gradient G of a hidden matrix as one object. It keeps a
momentum M and steps along the nearest orthogonal matrix to it:

    M <- mu M + (1 - mu) G           momentum
    M = U S V'                       singular value decomposition
    W <- W - lr U V'                 all singular values replaced by 1

The decomposition itself would be slow. A few matrix products, the Newton-Schulz iteration, give
U V' closely enough.

Where the model is sharded (parallel.py), each rank holds some rows of each matrix. The momentum
works on those rows. For the products the ranks exchange rows, so that each rank gets some of the
matrices whole, and none is computed twice.

Letters: M a stack of n matrices, a b c the coefficients of Newton-Schulz, X its iterate.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor

from tinyfm.training.distributed import is_shard, local, shard_group

# ---- the nearest orthogonal matrix ---------------------------------------------------------------

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steepest at 0, settles near 1


def orthogonalise(M: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrix, roughly, of each matrix in M (n, rows, columns), in bfloat16.

    The exact result would be

        U, S, Vh = torch.linalg.svd(M, full_matrices=False);  return U @ Vh

    Newton-Schulz needs products only. Each step maps every singular value s to a s + b s^3 + c s^5,
    by X <- a X + (b A + c A A) X with A = X X'. From any s in [0.002, 1] five steps lead to a value
    between 0.68 and 1.21. So X starts as the matrix divided by its Frobenius norm (at least 1e-7),
    which is no less than its largest singular value. Of a matrix with more rows than columns the
    transpose is taken, where A is smaller.
    """
    a, b, c = NEWTON_SCHULZ
    X = M.bfloat16()
    tall = X.size(1) > X.size(2)
    if tall:  # X X' is then larger than X' X: work on the transpose
        X = X.mT
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # every singular value is now <= 1
    for _ in range(steps):
        A = X @ X.mT
        polynomial = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, polynomial, X, beta=a)
    return X.mT if tall else X


# ---- of matrices in shards -----------------------------------------------------------------------


def shard_heights(rows: int, size: int) -> list[int]:
    """How many rows of a matrix each of `size` ranks holds.

    FSDP2 cuts as torch.chunk does: all parts have the same height, but the last ones may be lower
    or empty.
    """
    full = -(-rows // size)  # rounded up
    return [min(full, max(0, rows - r * full)) for r in range(size)]


def deal(n: int, size: int) -> list[int]:
    """How many of n matrices each of `size` ranks gets: equally many, the first ones one more."""
    return [n // size + (r < n % size) for r in range(size)]


def exchange(
    values: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    """Send sent[r] of the values (a vector) to each rank r, and return those from all ranks.

    The values are in the order of the ranks that they go to, and the result is in the order of the
    ranks that they come from: received[r] from rank r.
    """
    result = values.new_empty(sum(received))
    dist.all_to_all_single(result, values.contiguous(), received, sent, group=group)
    return result


def orthogonalise_shards(M: Tensor, like: Tensor) -> Tensor:
    """`orthogonalise` of n matrices of which each rank holds the rows M (n, some rows, columns).

    like: one of the n sharded matrices; its size(0) is the number of all rows. The ranks send each
    other rows in bfloat16, until each has its part of the n matrices whole: rank 0 the first ones.
    After the products they send the rows back. These are the same products as on one rank, and
    each is computed once.
    """
    group = shard_group(like)
    size = dist.get_world_size(group)
    rank = dist.get_rank(group)
    n, _, columns = M.shape
    heights = shard_heights(like.size(0), size)
    counts = deal(n, size)
    # Numbers exchanged with each rank r: my rows of its matrices, its rows of my matrices.
    outward = [counts[r] * heights[rank] * columns for r in range(size)]
    inward = [counts[rank] * heights[r] * columns for r in range(size)]

    # Collect my matrices whole.
    parts = exchange(M.bfloat16().flatten(), outward, inward, group).split(inward)
    shapes = [(counts[rank], height, columns) for height in heights]
    whole = torch.cat([part.view(shape) for part, shape in zip(parts, shapes)], dim=1)
    if counts[rank]:
        whole = orthogonalise(whole)  # (counts[rank], rows, columns)
    # Send the rows back to where they came from.
    returned = torch.cat([part.flatten() for part in whole.split(heights, dim=1)])
    return exchange(returned, inward, outward, group).view_as(M)


# ---- the optimizer -------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices; the same update as torch.optim.Muon.

    A convolution kernel (C out, C in, H, W) counts as the matrix (C out, C in x H x W) by which it
    multiplies each patch of its input.

    Matrices of one shape are stacked and orthogonalised together, in a few large products instead
    of many small ones. A matrix with more rows than columns takes a step sqrt(rows / columns) times
    longer, which keeps the size of its output independent of its shape.

    Raises ValueError for a parameter that is neither a matrix nor a kernel.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim not in (2, 4):
                    raise ValueError(
                        f"Muon updates matrices; it was given the shape {tuple(p.shape)}; "
                        "give this parameter to AdamW"
                    )

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape, p.device].append(p)
            for (shape, _), params in by_shape.items():
                rows = shape[0]
                columns = shape[1:].numel()
                self.update(params, group, group["lr"] * max(1, rows / columns) ** 0.5)

    def update(self, params: list[Tensor], group: dict, lr: float) -> None:
        """One step for parameters of one shape."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        first = params[0]
        weights = [local(p) for p in params]
        grads = [local(p.grad) for p in params]
        averages = [local(self.state[p]["momentum_buffer"]) for p in params]

        # Momentum, and Nesterov's look ahead: one more average step with the same gradient.
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, averages, group["momentum"])

        # The nearest orthogonal matrices.
        M = torch.stack(ahead).flatten(2)  # (n, rows, columns)
        updates = orthogonalise_shards(M, first) if is_shard(first) else orthogonalise(M)
        updates = [x.view_as(w) for x, w in zip(updates.to(first.dtype), weights)]

        # Weight decay, then the step.
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-lr)
