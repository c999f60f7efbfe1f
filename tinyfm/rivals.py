"""More wrong answers than a batch has, for CLIP's InfoNCE (clip.py).

The rows of a batch are each other's wrong answers. They are few and soon easily told apart; then
there is nothing left to learn from them, though among all M pairs of the data many an image would
find a wrong text. Two remedies, which go together:

    memory      The vectors of the last N rows stay, as further columns of z that cost no tower a
                pass (cross-batch memory, XBM, Wang et al. 2020). They were made by the weights of
                some steps ago and have no gradient. While weights move fast they mislead, and the
                more so the older: N is a few batches, and the memory may begin `after` so many.

    margin      The loss estimates a softmax over all M from what there is as a sample (Jean et al.
                2015). Of n answers, n - 1 are wrong, and each stands for (M - 1) / (n - 1) of all:
                ln of that is added to its z.

Letters: B batch, N rows remembered, E embedding width, M pairs in the data, n of them at hand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Memory(nn.Module):
    """The last N rows: vectors of both sides (N, E), and ids (N,), -1 where there is none yet.

    All of it are buffers, saved with the weights: a run that goes on has the memory it had.
    """

    def __init__(self, rows: int, width: int, after: int):
        super().__init__()
        self.after = after
        self.register_buffer("x", torch.zeros(rows, width))
        self.register_buffer("y", torch.zeros(rows, width))
        self.register_buffer("ids", torch.full((rows,), -1))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))  # seen so far

    def joined(self, x: Tensor, y: Tensor, ids: Tensor) -> list[Tensor]:
        """Those of a batch (B, E), (B, E), (B,), and below them those remembered, (B + N, ...)."""
        return [torch.cat(pair) for pair in ((x, self.x), (y, self.y), (ids, self.ids))]

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor, ids: Tensor) -> None:
        """A batch, in place of the oldest rows; it leaves none if it comes too early, nor does a
        row that is not finite, of a step that the trainer is about to skip."""
        fine = (x + y).isfinite().all(1) & (self.batches >= self.after)
        ids, x, y = ids.where(fine, -1), x.nan_to_num(), y.nan_to_num()
        for memory, rows in zip((self.x, self.y, self.ids), self.joined(x, y, ids)):
            memory.copy_(rows[: len(memory)])
        self.batches += 1


def margins(ids: Tensor, n_pairs: int) -> Tensor:
    """ln of how many wrong answers each column stands for, (columns,); -inf where it is empty.

    It is 0, one stands for itself, where n_pairs is no more than the answers there are.
    """
    known = ids >= 0
    each = ((n_pairs - 1) / (known.sum() - 1)).clamp(min=1)
    return each.log().where(known, -math.inf)
