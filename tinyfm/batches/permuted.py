"""Text and random orders -> batches: what XLNet learns from.

A row is a window of T tokens, cut from all documents in a row as batches/text.py cuts them for a
GPT. For each row a permutation of its places is drawn. Its last part, one place in six, is
predicted in its order, the rest is given (Yang et al. 2019, eq. 5). The end-of-text token is a
token like any other: nothing is masked, so the rows are text as it is.

With spans, neighbouring tokens are predicted together, as a token whose neighbours are all given is
easy to guess. (The paper has spans of up to 5 tokens, section 3.1.)

With a memory, the tokens in front of the row are in the batch too, and the model reads them first.
(The paper carries the memory over from the batch before. Then a batch would depend on all batches
before it.)

The order of sample i follows from (seed, i) alone, so that a batch is a pure function of (seed,
step), see order.py. Validation and test have orders that never change, so that losses can be
compared, whatever a run's seed.

Legend: B batch, T tokens of a row, M tokens of memory, P predicted tokens of a row, n windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data.splits import SPLITS
from tinyfm.batches import text
from tinyfm.batches.masked import NOT_PREDICTED
from tinyfm.batches.text import TextConfig, TextData
from tinyfm.xlnet import places_of


@dataclass(frozen=True)
class PermutedConfig(TextConfig):
    """Which text to read, and which part of each order to predict."""

    one_in: int = 6  # predict one token in so many, the last ones of each order
    span: int = 1  # most neighbours to predict together; 1 = each token stands alone
    memory: int = 0  # tokens in front of each row to read as memory

    whole: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("one_in", 1), ("span", 1), ("memory", 0)):
            if getattr(self, name) < least:
                option = f"--data.{name.replace('_', '-')}"
                raise ValueError(f"{option} {getattr(self, name)}: it must be at least {least}")


# ---- orders --------------------------------------------------------------------------------------


def draw_order(allowed: np.ndarray, config: PermutedConfig, rng: np.random.Generator) -> np.ndarray:
    """The order of each token of a row, int64 (T,): 0 if it is given, or else 1, 2, ...

    allowed: bool (T,), the places that may be predicted. At least one of them is. But without a
    memory, one token of the row is always given.
    """
    order = np.zeros(len(allowed), dtype=np.int64)
    places = np.flatnonzero(allowed)
    most = len(allowed) if config.memory else len(allowed) - 1
    count = min(max(1, round(len(places) / config.one_in)), len(places), most)
    if count < 1:
        return order
    # The places in random order, those of a span one after the other.
    lengths = rng.integers(1, config.span + 1, size=len(places))
    spans = np.repeat(np.arange(len(places)), lengths)[: len(places)]
    permuted = places[np.argsort(rng.random(len(places))[spans], kind="stable")]
    order[rng.permutation(permuted[-count:])] = np.arange(1, count + 1)
    return order


# ---- batches -------------------------------------------------------------------------------------


class PermutedData:
    """Batches of windows with orders. The text itself is that of `TextData`."""

    def __init__(self, data: TextData, config: PermutedConfig, segments: bool = False):
        """data: with windows of M + T tokens. segments: number the documents of each row."""
        self.text = data
        self.config = config
        self.segments = segments
        self.tokenizer = data.tokenizer
        self.unit = data.unit
        self.units_per_row = data.context_length - config.memory
        self.description = f"{data.description}; one in {config.one_in} predicted in each row"
        self.fingerprint = data.fingerprint

    @classmethod
    def prepare(
        cls,
        config: PermutedConfig,
        vocab_size: int,
        context_length: int,
        batch_size: int,
        seed: int,
        segments: bool = False,
    ) -> PermutedData:
        """Open the text of `config`. It is prepared first if it has not been before.

        Raises ValueError for rows in which nothing could be predicted, and for a memory that is
        longer than the text.
        """
        if context_length == 1 and not config.memory:
            raise ValueError(
                "--model.context-length 1: one token of each row is given, so none is left to "
                "predict; use 2 or more, or add --data.memory"
            )
        data = TextData.prepare(config, vocab_size, context_length, batch_size, seed)
        most = len(data.train) - 1 - context_length
        if config.memory > most:
            raise ValueError(
                f"--data.memory {config.memory}: the training text has {len(data.train):,} tokens; "
                f"use at most {most}, or more text"
            )
        data.context_length += config.memory
        return cls(data, config, segments)

    def collate(
        self,
        tokens: np.ndarray,
        order: np.ndarray,
        before: np.ndarray | None = None,
        counted: np.ndarray | None = None,
    ) -> dict[str, Tensor]:
        """Rows and their orders, int64 (B, T) both -> a batch.

        before (B, M): the tokens in front of the rows. counted (B, T): False for tokens that are no
        targets, whatever their order. "targets" (B, T): the tokens that are predicted, and -100
        elsewhere. "places" (B, P): where they are in each row, and -1 where it has fewer than
        another row. With segments, "segments" (B, T) has the number of each token's document in its
        row; the token that ends a document belongs to it.
        """
        there = order > 0
        if counted is not None:
            there &= counted
        targets = np.where(there, tokens, NOT_PREDICTED)
        fields = {"tokens": tokens, "order": order, "targets": targets}
        if before is not None and before.shape[1]:
            fields["before"] = before
        if self.segments:
            ends = tokens == self.tokenizer.eot
            fields["segments"] = np.cumsum(ends, axis=1) - ends
        batch = {name: torch.tensor(array) for name, array in fields.items()}
        return batch | {"places": places_of(batch["targets"])}

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """`rows` of the global batch of `step`, with the fields of `collate`."""
        windows = self.text.batch(step, rows)["tokens"][:, :-1].numpy()  # (B, M + T)
        first = step * self.text.batch_size
        everywhere = np.ones(self.units_per_row, dtype=bool)
        orders = []
        for sample in range(first, first + self.text.batch_size)[rows]:
            rng = np.random.default_rng((self.text.seed, sample))
            orders.append(draw_order(everywhere, self.config, rng))
        M = self.config.memory
        return self.collate(windows[:, M:], np.stack(orders), windows[:, :M])

    # ---- held-out text ----

    def split(self, name: str) -> text.Split:
        """The text of "train", "val" or "test"."""
        return self.text.split(name)

    def memory_of(self, name: str) -> int:
        """Tokens of memory in front of each window of a split: M, or half of a shorter split."""
        return min(self.config.memory, len(self.split(name)) // 2)

    def windows(self, name: str, first: int) -> tuple[np.ndarray, np.ndarray]:
        """The places of a split from `first` on, in n windows: (places, new), (n, T) both.

        The last window is moved back to full length. There the places that the window before has
        too are not new.
        """
        size = len(self.split(name))
        length = min(self.units_per_row, size - first)
        starts = np.arange(first, size, length)[:, None]
        places = np.minimum(starts, size - length) + np.arange(length)
        return places, places >= starts

    def split_batches(self, name: str, rows: int) -> Iterator[dict[str, Tensor]]:
        """All text of a split, `rows` windows at a time, with orders that never change.

        The first M tokens of the split are memory alone, and are not predicted.
        """
        tokens = self.split(name).tokens
        M = self.memory_of(name)
        places, new = self.windows(name, M)
        for first in range(0, len(places), rows):
            own = places[first : first + rows]
            orders = []
            for number, allowed in enumerate(new[first : first + rows], first):
                rng = np.random.default_rng((SPLITS.index(name), number))
                orders.append(draw_order(allowed, self.config, rng))
            before = tokens[own[:, :1] - np.arange(M, 0, -1)]
            yield self.collate(tokens[own], np.stack(orders), before)

    def val_batches(self, rows: int) -> Iterator[dict[str, Tensor]]:
        """All validation text, `rows` windows at a time; see `split_batches`."""
        return self.split_batches("val", rows)

    def documents_of(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """The number of the document of each token of `split_batches`: int64 (B, T).

        A token that ends a document counts for it, and the first of a split for the first document.
        """
        places, _ = self.windows(name, self.memory_of(name))
        numbers = np.searchsorted(self.split(name).starts, places) - 1
        for first in range(0, len(places), rows):
            yield np.maximum(numbers[first : first + rows], 0)

    def left_to_right(self, name: str, rows: int) -> Iterator[dict[str, Tensor]]:
        """All text of a split, each token but the first predicted once, in the order of the text.

        Without memory, a row is a token that is given and T tokens that are predicted: what a GPT
        reads (`TextData.split_batches`). With a memory of M, the first M tokens are such a row, and
        the later ones have at least M tokens in front of them.
        """
        tokens = self.split(name).tokens
        M = self.memory_of(name)
        if M > 1:
            yield self.collate(tokens[None, :M], np.arange(M)[None])
        given = 0 if M else 1
        places, new = self.windows(name, max(M, 1))
        if given:
            places = np.concatenate((places[:, :1] - 1, places), axis=1)
            new = np.concatenate((np.zeros_like(new[:, :1]), new), axis=1)
        for first in range(0, len(places), rows):
            own = places[first : first + rows]
            order = np.broadcast_to(np.arange(own.shape[1]) + 1 - given, own.shape)
            before = tokens[own[:, :1] - np.arange(M, 0, -1)]
            yield self.collate(tokens[own], order, before, new[first : first + rows])

    def metrics(self, loss: float) -> dict[str, Any]:
        """No metrics beyond the loss: a perplexity of some of the tokens is none of the text."""
        return {}
