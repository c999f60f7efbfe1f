"""What a language model makes of a text: its tokens, the next token's logits, its attention.

The page shows them.

Letters: T tokens, V vocabulary, N query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyfm import generate
from tinyfm.gpt import GPT
from tinyfm.tokenizer import Tokenizer

MOST_ATTENDED = 256  # tokens whose attention is shown: their weights are a square
LIKELIEST = 50  # tokens whose text comes with the logits


class Piece(NamedTuple):
    """One token of a text."""

    id: int
    text: str  # its bytes in hexadecimal, such as <e2 82>, if they are not whole characters
    shown: bool  # whether `text` is its text


def piece(tokenizer: Tokenizer, i: int) -> Piece:
    """The token of an id. An id beyond the tokenizer's is one of a soft prompt."""
    if i >= tokenizer.vocab_size:
        return Piece(i, "<prompt>", False)
    data = tokenizer.token_bytes(i)
    try:
        return Piece(i, data.decode("utf-8"), True)
    except UnicodeDecodeError:
        return Piece(i, f"<{data.hex(' ')}>", False)


def read_ids(tokenizer: Tokenizer, text: str, front: Sequence[int] = ()) -> list[int]:
    """The ids that a model reads for a text: of a soft prompt, then of the text.

    An empty text starts with the end-of-text token, as in generate.stream_text.
    """
    return [*front, *(tokenizer.encode(text) or [tokenizer.eot])]


def visible(model: GPT, ids: list[int]) -> list[int]:
    """The ids that are left when a text outgrows the context, as in generate.stream."""
    return ids[generate.visible_from(len(ids), model.config.context_length) :]


@torch.inference_mode()
def next_logits(model: GPT, tokenizer: Tokenizer, ids: list[int]) -> Tensor:
    """The logits of the next token, float32 (V,); -inf where an id stands for no token."""
    tokens = torch.tensor([visible(model, ids)], device=next(model.parameters()).device)
    logits = model.head(model.hidden(tokens)[:, -1]).float()[0]
    never = tokenizer.without_token(model.config.vocab_size)
    if never:
        logits[never] = -math.inf
    return logits.cpu()


class Stop(Exception):
    """Ends a forward pass from a hook, once a block has been reached."""


@torch.inference_mode()
def attention(model: GPT, ids: list[int], layer: int, head: int) -> Tensor:
    """Weights (T, T) of the last T tokens: how much each attends to itself and those before it.

    A hook catches what reaches the block; the block's own code makes queries and keys from it, and
    the weights from these. Row t of the weights sums to 1.

    Raises ValueError for a layer or a head that does not exist.
    """
    config = model.config
    for name, value, count in (("layer", layer, config.n_layer), ("head", head, config.n_head)):
        if not 0 <= value < count:
            raise ValueError(f"{name} is {value}; this model has 0 to {count - 1}")
    ids = visible(model, ids)[-MOST_ATTENDED:]
    block = model.blocks[layer]
    caught: list[Any] = []

    def catch(module, inputs):
        caught.extend(inputs)
        raise Stop

    hook = block.register_forward_pre_hook(catch)
    try:
        model.hidden(torch.tensor([ids], device=next(model.parameters()).device))
    except Stop:
        x, angles, mask = caught[:3]
    finally:
        hook.remove()
    q, k, _ = block.before_attention(x, angles)  # (1, N, T, K), (1, G, T, K)
    # With the identity in place of the values, the weighted means are the weights.
    identity = torch.eye(len(ids), dtype=q.dtype, device=q.device)
    values = identity.expand(1, k.size(1), -1, -1)  # (1, G, T, T)
    return block.attention.attend(q, k, values, mask)[0, head].float().cpu()
