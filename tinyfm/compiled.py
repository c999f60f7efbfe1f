"""Compiled decoding: a GPT that generates a few rows of text faster on a CPU.

To generate one token for one row, a GPT multiplies every weight once: 2 operations for the 4 (or 2)
bytes that must first come from memory. Every processor computes faster than that, so the memory is
the limit: the best possible speed is to read each weight once, at the full rate of the memory.
Matrix libraries are built for many rows. On a CPU, with one row, they reach 20% to 80% of that
limit, and the Python code between the layers costs more time. Compiled, y = x W' for a few rows is

    y[i, o] = sum_j W[o, j] x[i, j],      one loop over W, with all rows i inside it,

and a layer of the model is two calls of machine code, one before and one after the attention over
the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfm.common.device import Compiled

FEW_ROWS = 4  # with more rows a matrix library is faster; in float32 with more than twice as many


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear written for the compiler: a sum over each row of the weight, for all rows of x.

    x (.., K), weight (O, K), bias (O,) or None -> (.., O). It calls F.linear itself where that is
    faster: uncompiled, with many rows, and on other devices than a CPU.
    """
    rows = x.numel() // x.size(-1)
    most = 2 * FEW_ROWS if x.dtype == torch.float32 else FEW_ROWS
    if not torch.compiler.is_compiling() or rows > most or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    shape = x.shape[:-1]
    # as_strided needs x in memory. Without it the compiler would fuse the computation of x, such as
    # a GELU, into the loop and repeat it for every row of the weight.
    x = x.contiguous().as_strided((rows, x.size(-1)), (x.size(-1), 1))
    y = torch.stack([(weight * row).sum(-1) for row in x]).view(*shape, -1)
    return y if bias is None else y + bias


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """In place of nn.Linear.forward."""
    return few_rows_linear(x, layer.weight, layer.bias)


def own_copy(function: FunctionType) -> FunctionType:
    """The same function with its own code object.

    torch.compile keeps what it has compiled with the code object, looks through it at each call,
    and compiles no more than eight forms. With a copy for each model, one model neither slows the
    others down nor uses up their eight.
    """
    f = function
    code = f.__code__.replace()
    return FunctionType(code, f.__globals__, f.__name__, f.__defaults__, f.__closure__)


def compile_for_one_token(function: Callable) -> Callable:
    """Compile f(x, ..) for x (B, D) or (B, 1, D); longer x (B, T, D) go to f uncompiled."""
    compiled = Compiled(function, dynamic=False)

    def call(x: Tensor, *rest):
        if x.dim() == 2 or x.size(1) == 1:
            return compiled(x, *rest)
        return function(x, *rest)

    return call


def compile_decoding(model: nn.Module) -> None:
    """Make a GPT generate faster, in place: compile its blocks and its head for one token per row.

    Compiling takes seconds at the first token, and again when the number of rows changes. Prompts
    are read uncompiled. The logits differ from uncompiled ones by rounding only.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = MethodType(linear, layer)
    # The blocks of a model share what is compiled.
    before = own_copy(type(model.blocks[0]).before_attention)
    after = own_copy(type(model.blocks[0]).after_attention)
    for block in model.blocks:
        block.before_attention = compile_for_one_token(MethodType(before, block))
        block.after_attention = compile_for_one_token(MethodType(after, block))
    project = MethodType(own_copy(model.head.forward.__func__), model.head)
    head = compile_for_one_token(project)

    def contiguous_head(x: Tensor) -> Tensor:
        # The strides of x vary. A contiguous copy keeps the head from being compiled for each.
        return head(x.clone(memory_format=torch.contiguous_format))

    model.head.forward = contiguous_head
