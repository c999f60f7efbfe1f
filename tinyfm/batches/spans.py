"""Text with hidden spans -> batches: how T5 learns from text alone (Raffel et al. 2020, 3.1.4).

In a window of text, spans of tokens are hidden, and each is replaced by one token, a sentinel. The
target has the sentinels with what they stand for, and a last sentinel closes it (their figure 2):

    text      Thank you for inviting me to your party last week
    source    Thank you <0> me to your party <1> week END
    targets   <0> for inviting <1> last <2> END

The decoder writes only what is hidden, so it has less to do than if it wrote the whole text.

Of L tokens, n = round(hidden L) are hidden, in k = round(n / span_length) spans. All ways to cut n
tokens into k spans of one token at least are equally likely, and so are all ways to cut the L - n
others into k parts. A row is a kept part, a span, a kept part, a span, and so on, as in T5's code:
the first token is always kept, and the last one hidden. What is hidden in sample i follows from
(seed, i) alone, so that a batch is a pure function of (seed, step), see order.py. In validation and
test it never changes.

L is as large as source and target allow. So all rows have the same length: there is no padding. A
window may hold the end of one document and the start of the next, with END between them, a token
as any other.
The sentinels are the last rows of the model's vocabulary, <0> the last one, unless the tokenizer
has T5's, <extra_id_0> and so on.

Legend: B batch, S tokens of a source, T tokens of a target, L tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from data.report import counted
from data.splits import HELD_OUT, SPLITS
from tinyfm.batches.text import LEARNED_TOKENIZERS, NAMES, TextConfig, TextData
from tinyfm.batches.text_pairs import TextPairConfig, check_end, check_room, collate
from tinyfm.tokenizer import Tokenizer

# ---- which tokens are hidden ---------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The sizes of a row."""

    length: int  # tokens of the window, L
    hidden: int  # of these, n
    spans: int  # k

    @property
    def source(self) -> int:
        """Tokens of the source: those that are kept, a sentinel for each span, END."""
        return self.length - self.hidden + self.spans + 1

    @property
    def target(self) -> int:
        """Tokens of the target: those that are hidden, a sentinel each and one more, END."""
        return self.hidden + self.spans + 2


def shape_of(length: int, share: float, span_length: float) -> Shape:
    """The sizes for a window of `length` tokens, two at least: one is kept and one is hidden."""
    hidden = min(max(1, round(share * length)), length - 1)
    spans = min(max(1, round(hidden / span_length)), hidden, length - hidden)
    return Shape(length, hidden, spans)


def longest_shape(config: TextPairConfig, context_length: int) -> Shape:
    """The longest window whose source and target have at most context_length tokens.

    Raises ValueError if there is none.
    """
    found = None
    for length in range(2, 2 * context_length + 1):
        shape = shape_of(length, config.hidden, config.span_length)
        if max(shape.source, shape.target) <= context_length:
            found = shape
    if found is None:
        raise ValueError(
            f"--model.context-length {context_length} has no room for a hidden span: use 5 or more"
        )
    return found


def cut(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Sizes (parts,), 1 at least, that sum to `total`: all such are equally likely."""
    borders = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(borders, prepend=0, append=total)


def hide_spans(
    ids: np.ndarray, shape: Shape, sentinels: np.ndarray, end: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(source (S,), target (T,)) of the ids (L,) of a window, int64; both end with END.

    The window is a kept part, a hidden span, a kept part, a hidden span, and so on, in sizes that
    `cut` draws: first those of the kept parts, then those of the spans. sentinels: the ids of <0>,
    <1> and so on, one more than there are spans: the last one closes the target.
    """
    kept = cut(shape.length - shape.hidden, shape.spans, rng)
    hidden = cut(shape.hidden, shape.spans, rng)
    ends = np.cumsum(kept + hidden)
    source = []
    target = []
    for number, (stop, size) in enumerate(zip(ends, hidden)):
        start = stop - size - kept[number]
        source += [ids[start : stop - size], sentinels[number : number + 1]]
        target += [sentinels[number : number + 1], ids[stop - size : stop]]
    target.append(sentinels[shape.spans : shape.spans + 1])
    return np.concatenate([*source, [end]]), np.concatenate([*target, [end]])


# ---- sentinels -----------------------------------------------------------------------------------


def find_sentinels(tokenizer: Tokenizer, vocab_size: int, count: int) -> np.ndarray:
    """The ids of <0>, <1> ..., int64 (count,): those of the tokenizer, or the model's last rows.

    Raises ValueError if the tokenizer leaves too few rows for them.
    """
    names = [f"<extra_id_{number}>" for number in range(count)]
    if all(name in tokenizer.specials for name in names):
        return np.array([tokenizer.specials[name] for name in names])
    if tokenizer.vocab_size + count > vocab_size:
        raise ValueError(
            f"the {tokenizer.vocab_size} tokens leave fewer than {count} of the model's "
            f"{vocab_size} rows for the sentinels of hidden spans: set --model.vocab-size "
            f"{tokenizer.vocab_size + count}"
        )
    return vocab_size - 1 - np.arange(count)


# ---- batches -------------------------------------------------------------------------------------


class SpanData:
    """Batches of windows with hidden spans. The text itself is that of `TextData`."""

    def __init__(self, text: TextData, shape: Shape, model: Any):
        """model: the model's config. Raises ValueError if it does not fit the tokenizer."""
        check_end(text.tokenizer, model.end_id)
        for name in HELD_OUT:
            if len(text.split(name)) < shape.length:
                raise ValueError(
                    f"{NAMES[name]} has {counted(len(text.split(name)), 'tokens')}, fewer than the "
                    f"{shape.length} of a row: use more text, or a smaller --model.context-length"
                )
        self.text = text
        self.shape = shape
        self.start = model.start_id
        self.tokenizer = text.tokenizer
        self.sentinels = find_sentinels(text.tokenizer, model.vocab_size, shape.spans + 1)
        self.unit = text.unit
        self.units_per_row = shape.length
        self.description = (
            f"{text.description}; of {shape.length} tokens in a row {shape.hidden} hidden, in "
            f"{shape.spans} spans"
        )
        self.fingerprint = text.fingerprint

    @classmethod
    def prepare(cls, config: TextPairConfig, model: Any, batch_size: int, seed: int) -> SpanData:
        """Open the text of `config`. It is prepared first if it has not been before.

        A tokenizer that is trained on the text leaves the model's last rows for the sentinels.
        """
        shape = longest_shape(config, model.context_length)
        kind = config.kind
        check_room(kind, model.vocab_size)
        source = TextConfig(config.text, kind, config.val_fraction, config.cache)
        tokens = model.vocab_size
        if kind in LEARNED_TOKENIZERS:
            tokens -= shape.spans + 1
        text = TextData.prepare(source, tokens, shape.length, batch_size, seed)
        return cls(text, shape, model)

    def collate(self, windows: np.ndarray, seeds: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Windows (B, L), and the seed of each -> a batch, as text_pairs.collate makes it."""
        pairs = [
            hide_spans(
                ids, self.shape, self.sentinels, self.tokenizer.eot, np.random.default_rng(seed)
            )
            for ids, seed in zip(windows, seeds)
        ]
        return collate(*zip(*pairs), self.start)

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """`rows` of the global batch of `step`."""
        windows = self.text.batch(step, rows)["tokens"][:, :-1].numpy()  # (B, L)
        first = step * self.text.batch_size
        samples = range(first, first + self.text.batch_size)[rows]
        return self.collate(windows, [(self.text.seed, sample) for sample in samples])

    def val_batches(self, rows: int) -> Iterator[dict[str, Tensor]]:
        """All validation text; see `split_batches`."""
        return self.split_batches("val", rows)

    def split_batches(self, name: str, rows: int) -> Iterator[dict[str, Tensor]]:
        """All whole windows of a split in order, `rows` at a time; what is hidden never changes."""
        split = self.text.split(name)
        length = self.shape.length
        count = len(split) // length
        for first in range(0, count, rows):
            numbers = range(first, min(first + rows, count))
            windows = np.stack([split.shards.read(i * length, length) for i in numbers])
            yield self.collate(windows, [(SPLITS.index(name), i) for i in numbers])

    def metrics(self, loss: float) -> dict[str, Any]:
        """No metrics beyond the loss: it is per token of the targets, not of the text."""
        return {}
