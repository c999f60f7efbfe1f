"""Soft prompts: numbers, read as if they were a text before the text.

A prompt of words steers a language model; Lester et al. 2021 train one that need not be words: n
rows of the model's width D, put where the embeddings of n tokens would stand, everything else
frozen. They begin as embeddings of common tokens (section 3.2 there).

Here the table of a model simply grows: ids V .. V + n - 1 read the trained rows, and the head gives
them the least logit there is, as they are never written. A prompt is then a row of ids like others:
`prompt_ids` go before a text, and generation, cache and loss need not know. They take up places of
the context.

Letters: B batch, T tokens, D model width, V vocabulary of the base.
Left out: prompts for towers and images, prefixes in every layer (Li & Liang 2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMMON = 5000  # rows begin as some of this many first ids, in a BPE the most common tokens


class PromptedEmbedding(nn.Embedding):
    """A table whose ids V .. V + n - 1 stand for n trained rows; the others read it as before."""

    def __init__(self, table: nn.Embedding, n: int):
        V, D = table.weight.shape
        super().__init__(V, D, _weight=table.weight)
        self.weight = table.weight  # the same parameter, to which a head may be tied
        like = torch.randperm(min(V, COMMON), device=table.weight.device)[:n]
        self.prompt = nn.Parameter(table.weight.detach()[like].clone())  # (n, D)

    def forward(self, ids):
        V = self.num_embeddings
        rows = super().forward(ids.clamp(max=V - 1))
        return torch.where((ids >= V)[..., None], self.prompt[(ids - V).clamp(min=0)], rows)


def never_written(n: int, head: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
    """A hook that gives n more tokens the least logit there is: they are read, never written."""
    return F.pad(logits, (0, n), value=torch.finfo(logits.dtype).min)


def find_reader(model: nn.Module) -> nn.Module:
    """The part that reads and writes tokens. Raises ValueError if there is none."""
    for module in model.modules():
        if {"token_embedding", "head"} <= {name for name, _ in module.named_children()}:
            return module
    raise ValueError(f"{type(model).__name__} is no language model: a soft prompt needs tokens")


def add_prompt(model: nn.Module, n: int) -> None:
    """Make the vocabulary n tokens larger; all else, generation included, reads config.vocab_size.

    Raises ValueError for a model without tokens, and for more rows than it has tokens to begin as.
    """
    reader = find_reader(model)
    room = min(reader.token_embedding.num_embeddings, COMMON, reader.config.context_length - 1)
    if n > room:
        raise ValueError(f"prompt_tokens is {n}; this model has room for {room} at most")
    reader.token_embedding = PromptedEmbedding(reader.token_embedding, n)
    reader.config = replace(reader.config, vocab_size=reader.config.vocab_size + n)
    reader.prompt_hook = reader.head.register_forward_hook(partial(never_written, n))


def prompt_ids(model: nn.Module) -> list[int]:
    """The ids to put before every text that an adapted model reads; none without a soft prompt."""
    tables = [m for m in model.modules() if isinstance(m, PromptedEmbedding)]
    return [m.num_embeddings + i for m in tables for i in range(len(m.prompt))]


def drop_prompt(model: nn.Module) -> None:
    """The inverse of add_prompt, if there is a prompt."""
    if not prompt_ids(model):
        return
    reader = find_reader(model)
    table = reader.token_embedding
    reader.token_embedding = nn.Embedding(*table.weight.shape, _weight=table.weight)
    reader.token_embedding.weight = table.weight
    reader.config = replace(reader.config, vocab_size=table.num_embeddings)
    reader.prompt_hook.remove()


def prepend(batch: dict[str, Tensor], ids: list[int]) -> dict[str, Tensor]:
    """batch["tokens"] (B, T + 1) behind ids; as targets they do not count, nor does the first token
    of the text, which had none before it. batch["mask"] (B, T) grows by as many."""
    tokens, n = batch["tokens"], len(ids)
    mask = batch.get("mask", torch.ones_like(tokens[:, 1:], dtype=torch.bool))
    prompt = torch.tensor(ids, dtype=tokens.dtype, device=tokens.device).expand(len(tokens), n)
    return batch | {"tokens": torch.cat((prompt, tokens), 1), "mask": F.pad(mask, (n, 0))}


class PromptedData:
    """Data for the trainer whose rows begin with the soft prompt; all else is the data's own."""

    def __init__(self, data, ids: list[int]):
        self.data, self.ids = data, ids

    def __getattr__(self, name):
        return getattr(self.data, name)

    def batch(self, step: int, rows: slice) -> dict[str, Tensor]:
        return prepend(self.data.batch(step, rows), self.ids)

    def val_batches(self, rows: int) -> Iterator[dict[str, Tensor]]:
        return (prepend(batch, self.ids) for batch in self.data.val_batches(rows))
