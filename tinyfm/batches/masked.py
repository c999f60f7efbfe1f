"""Text with hidden tokens -> batches: what an encoder learns from.

A row is a window of T tokens, cut from all documents in a row as batches/text.py cuts them for a
GPT. So there is no padding, and a window may hold the end of one document and the start of the
next, with the end-of-text token between them (FULL-SENTENCES, Liu et al. 2019, section 4.2).

In each row a share of the tokens is to be predicted, 15% by default. Of these (Devlin et al. 2018)

    80%    become the mask
    10%    become a random token
    10%    stay as they are

The last two kinds make the model look at tokens that are not masked, too: any of them may be wrong.
The end-of-text token and other special tokens are neither predicted nor drawn. With whole words,
all tokens of a word are hidden together: one is easy to guess from the others. (The words of a
tokenizer that does not split at spaces are not known; then each run up to a space is one.)

The masks are dynamic (Liu et al. 2019, section 4.1): the same text is hidden in another way in each
epoch. Which tokens are hidden in sample i follows from (seed, i) alone, so that a batch is a pure
function of (seed, step), see order.py. Validation and test have masks that never change, so that
losses can be compared, whatever a run's seed.

Legend: B batch, T tokens of a row, n documents. Left out: padded rows of single sentences, and the
longer and longer spans of SpanBERT.
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
from tinyfm.batches.text import TextConfig, TextData
from tinyfm.tokenizer import Tokenizer

WORD_PIECES = ("wordpiece", "wordpiece-cased")
NOT_PREDICTED = -100  # the target where there is none, as in torch's cross-entropy
MASKED = 0.8  # of the hidden tokens
RANDOM = 0.1


@dataclass(frozen=True)
class MaskedConfig(TextConfig):
    """Which text to read, and how much of it to hide."""

    hidden: float = 0.15  # share of the tokens to predict
    whole_words: bool = False  # hide all tokens of a word together

    whole: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.hidden < 1:
            raise ValueError(f"--data.hidden {self.hidden}: it must be between 0 and 1")


# ---- the vocabulary ------------------------------------------------------------------------------


def mask_token(tokenizer: Tokenizer, vocab_size: int) -> int:
    """The id of the mask: the vocabulary's own, or else the model's last row.

    Raises ValueError if the tokenizer has a token for that row.
    """
    if tokenizer.mask is not None:
        return tokenizer.mask
    if tokenizer.vocab_size >= vocab_size:
        raise ValueError(
            f"the tokenizer has no mask, and its {tokenizer.vocab_size} tokens leave none of the "
            f"model's {vocab_size} rows for one: set --model.vocab-size {tokenizer.vocab_size + 1}"
        )
    return vocab_size - 1


def ordinary_tokens(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """True for the ids that may be predicted and drawn: those of text. bool (vocab_size,).

    Special tokens, such as the end of a text, are not; nor are ids that stand for no token.
    """
    ordinary = np.ones(vocab_size, dtype=bool)
    ordinary[tokenizer.vocab_size :] = False
    never = {tokenizer.eot, *tokenizer.specials.values()}
    ordinary[sorted(never.union(tokenizer.without_token(tokenizer.vocab_size)))] = False
    return ordinary


class Vocabulary:
    """The mask, the tokens that may be hidden or drawn, and those that start a word."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.mask = mask_token(tokenizer, vocab_size)
        self.ordinary = ordinary_tokens(tokenizer, vocab_size)
        self.ordinary[self.mask] = False
        self.drawn = np.flatnonzero(self.ordinary)
        # Whether a token starts a word: a space, or a sign that is no part of a word.
        self.starts_word = np.ones(vocab_size, dtype=bool)
        for i in self.drawn:
            first = tokenizer.token_bytes(int(i))[:1]
            self.starts_word[i] = not (first.isalnum() or first >= b"\x80")


# ---- hiding --------------------------------------------------------------------------------------


def choose_tokens(places: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the places, each as likely as another."""
    return np.sort(places[np.argsort(rng.random(len(places)))[:count]])


def choose_words(
    places: np.ndarray, words: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """The places of whole words, in random order, as long as these are at most `count` together.

    words (n,): the number of the word at each place. One word is always taken.
    """
    numbers, index, sizes = np.unique(words, return_inverse=True, return_counts=True)
    order = rng.permutation(len(numbers))
    enough = int((np.cumsum(sizes[order]) <= count).sum())
    taken = np.zeros(len(numbers), dtype=bool)
    taken[order[: max(1, enough)]] = True
    return places[taken[index]]


def hide(
    ids: np.ndarray,
    allowed: np.ndarray,
    vocabulary: Vocabulary,
    config: MaskedConfig,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets) of the ids of a row, int64 (T,) all.

    allowed: bool (T,), the places that may be hidden; special tokens never are (see Vocabulary).
    config.hidden is the share of these places that are hidden, rounded; at least one, if there is
    one. targets have the hidden ids, and NOT_PREDICTED elsewhere. In the inputs, MASKED of the
    hidden tokens read the mask, RANDOM of them one of vocabulary.drawn, and the rest themselves.
    """
    inputs = ids.copy()
    targets = np.full_like(ids, NOT_PREDICTED)
    places = np.flatnonzero(allowed & vocabulary.ordinary[ids])
    if not len(places):
        return inputs, targets
    count = max(1, round(config.hidden * len(places)))
    if config.whole_words:
        words = np.cumsum(vocabulary.starts_word[ids])[places]
        chosen = choose_words(places, words, count, rng)
    else:
        chosen = choose_tokens(places, count, rng)
    targets[chosen] = ids[chosen]
    # One number a place decides on its kind. The kinds differ in length, so all are drawn.
    kind = rng.random(len(chosen))
    drawn = vocabulary.drawn[rng.integers(len(vocabulary.drawn), size=len(chosen))]
    masked = kind < MASKED
    replaced = ~masked & (kind < MASKED + RANDOM)
    inputs[chosen[masked]] = vocabulary.mask
    inputs[chosen[replaced]] = drawn[replaced]
    return inputs, targets


# ---- batches -------------------------------------------------------------------------------------


class MaskedData:
    """Batches of windows with hidden tokens. The text itself is that of `TextData`."""

    def __init__(self, data: TextData, config: MaskedConfig, vocab_size: int):
        """vocab_size: the model's. Raises ValueError if no id is left for the mask."""
        self.text = data
        self.config = config
        self.vocabulary = Vocabulary(data.tokenizer, vocab_size)
        self.tokenizer = data.tokenizer
        self.unit = data.unit
        self.units_per_row = data.units_per_row
        self.description = f"{data.description}; {config.hidden:.0%} of them hidden in each row"
        self.fingerprint = data.fingerprint

    @classmethod
    def prepare(
        cls, config: MaskedConfig, vocab_size: int, context_length: int, batch_size: int, seed: int
    ) -> MaskedData:
        """Open the text of `config`. It is prepared first if it has not been before.

        A tokenizer that is trained on the text leaves the model's last row for the mask, unless it
        has one: WordPiece.
        """
        tokens = vocab_size
        if config.tokenizer in text.LEARNED_TOKENIZERS and config.tokenizer not in WORD_PIECES:
            tokens = vocab_size - 1
        data = TextData.prepare(config, tokens, context_length, batch_size, seed)
        return cls(data, config, vocab_size)

    def collate(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor]:
        """B pairs (inputs, targets) -> a batch.

        "tokens" (B, T): the inputs. "targets" (B, T): the hidden tokens, and -100 elsewhere.
        "places" (P,): where the targets are in the flat batch. No row is padded, so no "mask".
        """
        targets = torch.from_numpy(np.stack([targets for _, targets in rows]))
        tokens = torch.from_numpy(np.stack([inputs for inputs, _ in rows]))
        return {
            "tokens": tokens,
            "targets": targets,
            "places": (targets.flatten() != NOT_PREDICTED).nonzero()[:, 0],
        }

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """`rows` of the global batch of `step`, with the fields of `collate`."""
        windows = self.text.batch(step, rows)["tokens"][:, :-1].numpy()  # (B, T)
        first = step * self.text.batch_size
        samples = range(first, first + self.text.batch_size)[rows]
        everywhere = np.ones(windows.shape[1], dtype=bool)
        found = []
        for sample, ids in zip(samples, windows):
            rng = np.random.default_rng((self.text.seed, sample))
            found.append(hide(ids, everywhere, self.vocabulary, self.config, rng))
        return self.collate(found)

    def val_batches(self, rows: int) -> Iterator[dict[str, Tensor]]:
        """All validation text, `rows` windows at a time; see `split_batches`."""
        return self.split_batches("val", rows)

    def split_batches(self, name: str, rows: int) -> Iterator[dict[str, Tensor]]:
        """All text of a split in order, `rows` windows at a time, with masks that never change.

        The last window is moved back to full length. The tokens that it shares with the window
        before are not hidden again.
        """
        number = 0
        for batch in self.text.split_batches(name, rows):
            found = []
            for ids, allowed in zip(batch["tokens"][:, 1:].numpy(), batch["mask"].numpy()):
                rng = np.random.default_rng((SPLITS.index(name), number))
                found.append(hide(ids, allowed, self.vocabulary, self.config, rng))
                number += 1
            yield self.collate(found)

    def split(self, name: str) -> text.Split:
        """The text of "train", "val" or "test"."""
        return self.text.split(name)

    def documents_of(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """The number of the document of each token of `split_batches`: int64 (B, T)."""
        split = self.text.split(name)
        length = min(self.text.context_length, split.predicted)
        starts = np.arange(0, split.predicted, length)
        moved = np.minimum(starts, split.predicted - length) + 1
        for first in range(0, len(moved), rows):
            places = moved[first : first + rows, None] + np.arange(length)
            yield np.searchsorted(split.starts, places, side="right") - 1

    def metrics(self, loss: float) -> dict[str, Any]:
        """No metrics beyond the loss: a perplexity of hidden tokens is none of the text."""
        return {}
