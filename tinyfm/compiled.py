"""torch.compile where it pays, and what happens where it cannot.

A GPT that writes one row of text multiplies every weight once a token: 2 operations for the 4 (or
2) bytes that must come from memory first. No processor is so slow at arithmetic that this would
not wait for its memory, so the best that can be had is to read each weight once, at full speed, and
do nothing else. The matrix libraries are built for many rows at once; on a CPU they reach 20% to
80% of that, and Python between the layers costs another part. Compiled, a few rows of y = x W' are

    y[i, o] = sum_j W[o, j] x[i, j],      one loop over W, all rows i inside it,

and a layer is two calls of machine code, one before and one after attention over the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfm.common.device import Compiled

FEW_ROWS = 4  # with more of them a matrix library is faster, in float32 with twice as many


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, written for the compiler: a sum over each row of the weight, fused over the rows of
    x. Uncompiled, or with many rows, it is F.linear itself."""
    rows = x.numel() // x.size(-1)
    few = rows <= FEW_ROWS * (2 if x.dtype == torch.float32 else 1)
    if not torch.compiler.is_compiling() or not few or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    shape = x.shape[:-1]
    # as_strided needs x in memory: else what makes x, a GELU say, would be fused into the loop and
    # computed again for every row of the weight.
    x = x.contiguous().as_strided((rows, x.size(-1)), (x.size(-1), 1))
    y = torch.stack([(weight * row).sum(-1) for row in x]).view(*shape, -1)
    return y if bias is None else y + bias


def compile_decoding(model: nn.Module) -> None:
    """Make a GPT write faster: compile what its blocks and its head do with one token a row.

    Costs seconds at the first token, and again for another number of rows. Prompts are read as
    before. The numbers differ from uncompiled ones by rounding only.
    """

    def one_token(function: Callable) -> Callable:
        compiled = Compiled(function, dynamic=False)
        return lambda x, *rest: (compiled if x.dim() == 2 or x.size(1) == 1 else function)(x, *rest)

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = lambda x, own=layer: few_rows_linear(x, own.weight, own.bias)
    for block in model.blocks:
        block.begin, block.end = one_token(block.begin), one_token(block.end)
    head = one_token(model.head.forward)  # of a copy, as strides that vary would compile it anew
    model.head.forward = lambda x: head(x.clone(memory_format=torch.contiguous_format))
