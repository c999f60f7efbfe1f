"""Train, validation and test: which documents are held out, and whether training has their text.

A model is trained on one part of the documents. Choices, such as a learning rate, are made by its
loss on the second part, validation. The figure to report is its loss on the third part, test,
which no choice has seen. A document is in one part as a whole.

A hash decides. It covers the name of a document, or else its content, so that documents that are
added later move none of the others. It is a number u, uniform in [0, 1):

    u < held_out / 2    validation
    u < held_out        test
    else                train

The sources about Python's library hash the name of a definition, `json.decoder:JSONDecoder`. So the
documentation of a class, its source code and the questions about it are in the same part.

Documents may quote each other. So the sources and the tools remove near duplicates first, by
data/dedupe.py. What remains is measured: the share of held-out words that lie in a run of 13 words
which training also has. (13 is the length of Brown et al. 2020, appendix C.) The documents with the
largest shares are removed until the share of all is below LIMIT.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from data.dedupe import hash_runs, hash_words

TRAIN = "train"
VAL = "val"
TEST = "test"
HELD_OUT = (VAL, TEST)
SPLITS = (TRAIN, *HELD_OUT)
RUN_WORDS = 13
LIMIT = 0.005  # share of held-out words in runs that training also has


class Document(NamedTuple):
    """A document of a source."""

    text: str
    split: str = ""  # "train", "val" or "test"; "" lets the hash of the text decide
    name: str = ""


def number_of(name: str) -> float:
    """The number u in [0, 1) of a name or content.

    It is made of the first 8 bytes of the SHA-256 of the name in UTF-8, the highest byte first,
    divided by 2^64.
    """
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(name: str, held_out: float) -> str:
    """The split of a document by its name or content; `held_out` is the share of both others."""
    u = number_of(name)
    if u < held_out / 2:
        return "val"
    return "test" if u < held_out else TRAIN


# ---- overlap -------------------------------------------------------------------------------------


class Overlap:
    """Finds the runs of held-out documents in training text, which is read once and not kept."""

    def __init__(self, documents: Iterable[str]):
        """documents: the held-out ones."""
        self.runs = [hash_runs(hash_words(text), RUN_WORDS) for text in documents]
        self.known = np.unique(np.concatenate([np.zeros(0, np.uint64), *self.runs]))
        self.found = np.zeros(len(self.known), dtype=bool)

    def read(self, text: str) -> None:
        """Note which runs occur in this training text."""
        runs = hash_runs(hash_words(text), RUN_WORDS)
        if len(self.known):
            place = np.minimum(np.searchsorted(self.known, runs), len(self.known) - 1)
            self.found[place[self.known[place] == runs]] = True

    def count(self) -> np.ndarray:
        """(words in runs that training has, all words) of each held-out document: int64 (n, 2).

        Word i of a document is in the runs that start at i - 12 to i, as far as they exist; it
        counts once if at least one of these was found, however many were. A document of fewer than
        13 words has no run, and its words are not counted at all.
        """
        counts = np.zeros((len(self.runs), 2), dtype=np.int64)
        for row, runs in zip(counts, self.runs):
            if len(runs):
                starts = self.found[np.searchsorted(self.known, runs)]
                covered = np.convolve(starts, np.ones(RUN_WORDS)) > 0
                row[:] = covered.sum(), len(covered)
        return counts


def share_of(counts: np.ndarray) -> float:
    """The share of held-out words in runs that training has; counts as `Overlap.count` gives."""
    covered, words = counts.reshape(-1, 2).sum(axis=0)
    return float(covered / max(1, words))


def overlapping(counts: np.ndarray, limit: float = LIMIT) -> list[int]:
    """The documents to remove so that the share of the rest is at most `limit`.

    The largest shares come first. At least half of the documents stay, whatever their share.
    """
    shares = counts[:, 0] / np.maximum(1, counts[:, 1])
    order = np.argsort(-shares, kind="stable")
    # The sums over the documents that stay, after 0, 1, 2, ... are removed.
    covered, words = np.cumsum(counts[order[::-1]], axis=0)[::-1].T
    enough = np.flatnonzero(covered <= limit * words)
    removed = min(len(order) // 2, *enough[:1]) if len(enough) else len(order) // 2
    return sorted(order[:removed].tolist())


def overlap_of(held_out: Sequence[str], training: Iterable[str]) -> np.ndarray:
    """`Overlap.count` of the held-out documents after all training text."""
    overlap = Overlap(held_out)
    for text in training:
        overlap.read(text)
    return overlap.count()


def repeating(texts: Sequence[str], parts: Sequence[str]) -> tuple[set[int], dict[str, float]]:
    """The held-out texts to leave out, and {split: share of its other words in runs of training}.

    parts: the split of each text. The texts are named by their numbers.
    """
    training = [text for text, part in zip(texts, parts) if part == TRAIN]
    removed: set[int] = set()
    shares = {}
    for split in HELD_OUT:
        numbers = [i for i, part in enumerate(parts) if part == split]
        counts = overlap_of([texts[i] for i in numbers], training)
        places = overlapping(counts)
        removed |= {numbers[i] for i in places}
        shares[split] = share_of(np.delete(counts, places, axis=0))
    return removed, shares
