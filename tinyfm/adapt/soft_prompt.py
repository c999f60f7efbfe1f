"""Soft prompts: trained vectors that a language model reads as if they were a text before the text.

A prompt of words steers a language model. Lester et al. 2021 train a prompt that need not consist
of words: n rows of the model's width D, which stand where the embeddings of n tokens would stand.
The model itself is frozen. The rows start as embeddings of common tokens (their section 3.2).

Here the token table simply grows: ids V .. V + n - 1 look up the trained rows, and the head gives
these ids the lowest possible logit, so they are never generated. So a prompt is a row of ids like
any other: `prompt_ids` go before each text, and generation, cache and loss need no change. They
take up n positions of the context.

Letters: B batch, T tokens, D width, V vocabulary of the base.
Left out: prompts for image models, trained prefixes in every layer (Li & Liang 2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMMON = 5000  # rows start as some of the first COMMON ids: in a BPE, the most common tokens


class PromptedEmbedding(nn.Embedding):
    """A token table in which ids V .. V + n - 1 look up n trained rows.

    The first V ids look up the weight of `table`, which is shared, not copied.
    """

    def __init__(self, table: nn.Embedding, n: int):
        V, D = table.weight.shape
        super().__init__(V, D, _weight=table.weight)
        self.weight = table.weight  # the same parameter: a head may be tied to it
        start = torch.randperm(min(V, COMMON), device=table.weight.device)[:n]
        self.prompt = nn.Parameter(table.weight.detach()[start].clone())  # (n, D)

    def forward(self, ids):
        """Ids (B, T) -> rows (B, T, D) of the weight, and for ids from V on, of the prompt."""
        V = self.num_embeddings
        tokens = super().forward(ids.clamp(max=V - 1))  # (B, T, D)
        prompt = self.prompt[(ids - V).clamp(min=0)]  # (B, T, D)
        return torch.where((ids >= V)[..., None], prompt, tokens)


def never_written(n: int, head: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
    """A forward hook of the head: logits (..., V) -> (..., V + n), the new ones the lowest there
    are."""
    return F.pad(logits, (0, n), value=torch.finfo(logits.dtype).min)


def find_reader(model: nn.Module) -> nn.Module:
    """The module with a token table and a head. Raises ValueError if there is none."""
    for module in model.modules():
        children = {name for name, _ in module.named_children()}
        if {"token_embedding", "head"} <= children:
            return module
    raise ValueError(f"{type(model).__name__} is no language model: a soft prompt needs tokens")


def add_prompt(model: nn.Module, n: int) -> None:
    """Give a model a soft prompt of n rows: its vocabulary, config.vocab_size, grows by n.

    Raises ValueError for a model without tokens, and if n exceeds the number of tokens to start
    from or leaves no room for a text in the context.
    """
    reader = find_reader(model)
    room = min(reader.token_embedding.num_embeddings, COMMON, reader.config.context_length - 1)
    if n > room:
        raise ValueError(f"prompt_tokens is {n}; this model has room for {room} at most")
    reader.token_embedding = PromptedEmbedding(reader.token_embedding, n)
    reader.config = replace(reader.config, vocab_size=reader.config.vocab_size + n)
    reader.prompt_hook = reader.head.register_forward_hook(partial(never_written, n))


def prompt_ids(model: nn.Module) -> list[int]:
    """The ids to put before each text that the model reads; [] for a model without a prompt.

    The prompt may lie in any module of the model, for instance in the body of a classifier.
    """
    for module in model.modules():
        if isinstance(module, PromptedEmbedding):
            first = module.num_embeddings
            return list(range(first, first + len(module.prompt)))
    return []


def drop_prompt(model: nn.Module) -> None:
    """Undo add_prompt; a model without a prompt stays as it is."""
    if not prompt_ids(model):
        return
    reader = find_reader(model)
    table = reader.token_embedding
    reader.token_embedding = nn.Embedding(*table.weight.shape, _weight=table.weight)
    reader.token_embedding.weight = table.weight
    reader.config = replace(reader.config, vocab_size=table.num_embeddings)
    reader.prompt_hook.remove()


# ---- data with a prompt -------------------------------------------------------------------------


def prepend(batch: dict[str, Tensor], ids: list[int]) -> dict[str, Tensor]:
    """The batch with ids before each row of batch["tokens"] (B, T + 1).

    batch["mask"] (B, T) grows by as many columns. The ids do not count as targets, and neither
    does the first token of a text: without a prompt, no token comes before it.
    """
    tokens = batch["tokens"]
    n = len(ids)
    mask = batch.get("mask")
    if mask is None:
        mask = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    prompt = torch.tensor(ids, dtype=tokens.dtype, device=tokens.device).expand(len(tokens), n)
    tokens = torch.cat((prompt, tokens), 1)  # (B, n + T + 1)
    return batch | {"tokens": tokens, "mask": F.pad(mask, (n, 0))}


class PromptedData:
    """Data for the trainer with the soft prompt before each row.

    All other attributes are those of the wrapped data.
    """

    def __init__(self, data: Any, ids: list[int]):
        self.data = data
        self.ids = ids

    def __getattr__(self, name):
        return getattr(self.data, name)

    def batch(self, step: int, rows: slice) -> dict[str, Tensor]:
        return prepend(self.data.batch(step, rows), self.ids)

    def val_batches(self, rows: int) -> Iterator[dict[str, Tensor]]:
        return (prepend(batch, self.ids) for batch in self.data.val_batches(rows))

    def split_batches(self, name: str, rows: int) -> Iterator[dict[str, Tensor]]:
        return (prepend(batch, self.ids) for batch in self.data.split_batches(name, rows))
