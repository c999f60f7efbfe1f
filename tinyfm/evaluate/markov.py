"""A Markov model of tokens, the baseline of every language model (Markov 1913, Shannon 1948).

The next token depends on the k tokens before it, the context h. With n(h c) the number of times
that c followed h in training, n(h) that of all tokens after h, D(h) how many different ones there
were, and h' the context without its first token:

    p_k(c | h) = (n(h c) + D(h) p_{k-1}(c | h')) / (n(h) + D(h))

So a context that was seen rarely counts less than shorter ones (Witten & Bell 1991, method C). The
last of all is the uniform distribution, p_{-1} = 1 / A, over the A - 1 tokens of training and one
more for all others. Its order k is chosen on validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST_ORDERS = 10  # longer contexts are hardly ever seen twice


class Counts(NamedTuple):
    """How often what followed the contexts of one length, sorted."""

    grams: np.ndarray  # context and next token in one number, int64 (n,)
    counts: np.ndarray  # of each, float64 (n,)
    contexts: np.ndarray  # int64 (m,)
    totals: np.ndarray  # n(h) of each, float64 (m,)
    kinds: np.ndarray  # D(h) of each, float64 (m,)


def look_up(sorted_keys: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The value of each key, 0 for those that are not there: the shape of `keys`."""
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[place] == keys, values[place], 0.0)


class Markov:
    """Counts of training tokens, for contexts of 0 to `order` tokens."""

    def __init__(self, tokens: np.ndarray, order: int = MOST_ORDERS):
        """tokens: int64 (n,). The order is at most such that context and token fit in 63 bits."""
        self.alphabet = np.unique(tokens)
        self.size = len(self.alphabet) + 1
        self.bits = (self.size - 1).bit_length()
        self.order = max(0, min(order, 63 // self.bits - 1, len(tokens) - 1))
        places = self.place(tokens)
        self.counts = []
        for k in range(self.order + 1):
            grams, counts = np.unique(self.code(places, k), return_counts=True)
            contexts, starts = np.unique(grams >> self.bits, return_index=True)
            counts = counts.astype(float)
            totals = np.add.reduceat(counts, starts)
            kinds = np.diff([*starts, len(grams)]).astype(float)
            self.counts.append(Counts(grams, counts, contexts, totals, kinds))

    def place(self, tokens: np.ndarray) -> np.ndarray:
        """Their places in the alphabet; the last place is for all that training lacks."""
        places = np.searchsorted(self.alphabet, tokens)
        there = self.alphabet[np.minimum(places, self.size - 2)] == tokens
        return np.where(there, places, self.size - 1).astype(np.int64)

    def code(self, places: np.ndarray, k: int) -> np.ndarray:
        """Each run of k + 1 places in one number: (n,) -> (n - k,)."""
        found = np.zeros(len(places) - k, dtype=np.int64)
        for i in range(k + 1):
            found = (found << self.bits) | places[i : len(places) - k + i]
        return found

    def mix(self, k: int, grams: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """p_k of grams of k + 1 places, from p_{k-1} of the same tokens after shorter contexts."""
        own = self.counts[k]
        contexts = grams >> self.bits
        kinds = look_up(own.contexts, own.kinds, contexts)
        totals = look_up(own.contexts, own.totals, contexts)
        mixed = look_up(own.grams, own.counts, grams) + kinds * shorter
        return np.where(totals > 0, mixed / np.maximum(1, totals + kinds), shorter)

    def nats(self, tokens: np.ndarray) -> np.ndarray:
        """-ln p of each token but the first, at each order: (n,) -> float64 (order + 1, n - 1)."""
        places = self.place(tokens)
        p = np.full(len(tokens), 1 / self.size)
        found = []
        for k in range(self.order + 1):
            if k < len(places):  # the first k tokens have shorter contexts
                p = np.concatenate((p[:k], self.mix(k, self.code(places, k), p[k:])))
            found.append(-np.log(p[1:]))
        return np.stack(found)

    def write(
        self, n: int, start: int, end: int, longest: int, order: int, seed: int = 0
    ) -> list[list[int]]:
        """n rows of at most `longest` tokens after `start`, up to the token `end`."""
        rng = np.random.default_rng(seed)
        places = np.full((n, 1), self.place(np.array([start]))[0])
        every = np.arange(self.size - 1)
        running = np.ones(n, dtype=bool)
        rows: list[list[int]] = [[] for _ in range(n)]
        for _ in range(longest):
            p = np.full((n, self.size - 1), 1 / self.size)
            context = np.zeros(n, dtype=np.int64)
            for k in range(min(order, places.shape[1]) + 1):
                if k:
                    context |= places[:, -k] << (self.bits * (k - 1))
                p = self.mix(k, (context[:, None] << self.bits) | every, p)
            sums = p.cumsum(1)
            drawn = (sums < rng.random((n, 1)) * sums[:, -1:]).sum(1)
            places = np.concatenate((places, drawn[:, None]), 1)[:, -max(1, order) :]
            running &= self.alphabet[drawn] != end
            if not running.any():
                break
            for i in np.flatnonzero(running):
                rows[i].append(int(self.alphabet[drawn[i]]))
        return rows


def choose_order(model: Markov, tokens: Sequence[int] | np.ndarray) -> int:
    """The order with the smallest mean loss on these tokens."""
    return int(model.nats(np.asarray(tokens)).mean(1).argmin())
