"""Retrieval: from many passages, find the few that answer a question.

Two ways to compare a question q with a passage d, and two to join them:

BM25 counts words (Robertson and Zaragoza 2009, eq. 3.15). A passage scores for each word t of the
question that it contains f(t) times:

    score(q, d) = sum_t idf(t) f(t) (k1 + 1) / (f(t) + k1 (1 - b + b |d| / mean length))
    idf(t)      = ln(1 + (N - n(t) + 1/2) / (n(t) + 1/2))

A rare word counts more than a common one; N passages, n(t) of which contain t. (The 1 inside the
logarithm is not in the paper. It keeps the weight of a very common word above 0.) A word that
occurs again counts less each time, up to idf(t) (k1 + 1); k1 says how fast. b says how far a long
passage is expected to contain more of each word.

Vectors of a model compare meanings: the score is the cosine of the two, computed for all passages,
some at a time, so that memory holds few scores (`nearest`). adapt/embedder.py trains such vectors.

Joining them. Reciprocal rank fusion (Cormack et al. 2009) needs no scores: a passage gets
weight / (60 + rank) from each ranking, the best one has rank 1. A ranking that is much worse than
the other does harm. Adding the scores, BM25 + weight * cosine, also uses by how much a passage is
better than the next (Bruch et al. 2023). BM25's scores have no upper bound, so the weight has to be
chosen: on questions of validation.

MRR@10 measures a ranking: the mean over questions of 1 / rank of the right passage, or 0 if that is
not among the first 10.

Letters: N passages, Q questions, E width of the vectors, k passages to find.
Left out: stemming and stop words. An approximate index is in recipes/approximate.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

WORD = re.compile(r"\w+")
FUSION = 60  # what Cormack et al. add to a rank
AT_ONCE = 1 << 22  # scores in memory


# ---- words ---------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())


def bm25_score(
    question: str, passage: str, passages: Sequence[str], k1: float = 1.2, b: float = 0.75
) -> float:
    """The score of one passage among all, word by word: the obvious way."""
    counts = [Counter(words_of(text)) for text in passages]
    mean = sum(own.total() for own in counts) / len(counts)
    own = Counter(words_of(passage))
    score = 0.0
    for word in words_of(question):
        if word not in own:
            continue
        n = sum(word in other for other in counts)
        idf = math.log(1 + (len(counts) - n + 0.5) / (n + 0.5))
        length = 1 - b + b * own.total() / mean
        score += idf * own[word] * (k1 + 1) / (own[word] + k1 * length)
    return score


class BM25:
    """The same scores for all passages at once.

    For each word, a list says which passages contain it, and what it adds to their scores. So a
    question costs time in proportion to the lists of its words.
    """

    def __init__(self, passages: Sequence[str], k1: float = 1.2, b: float = 0.75):
        """Raises ValueError without passages, or for k1 or b out of range."""
        if not passages:
            raise ValueError("there is no passage to search")
        if k1 < 0 or not 0 <= b <= 1:
            raise ValueError(f"k1 is {k1} and b is {b}: k1 must be at least 0, b from 0 to 1")
        self.size = len(passages)
        places = defaultdict(list)  # word -> numbers of passages
        times = defaultdict(list)  # word -> how often it is in each of them
        lengths = np.zeros(self.size)
        for i, passage in enumerate(passages):
            counts = Counter(words_of(passage))
            lengths[i] = counts.total()
            for word, count in counts.items():
                places[word].append(i)
                times[word].append(count)
        longer = k1 * (1 - b + b * lengths / max(1e-9, lengths.mean()))  # (N,)
        self.lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, own in places.items():
            index = np.array(own)
            f = np.array(times[word], dtype=np.float64)
            idf = math.log(1 + (self.size - len(own) + 0.5) / (len(own) + 0.5))
            self.lists[word] = (index, idf * f * (k1 + 1) / (f + longer[index]))

    def scores(self, question: str) -> np.ndarray:
        """The score of each passage, float64 (N,)."""
        scores = np.zeros(self.size)
        for word in words_of(question):
            if word in self.lists:
                index, added = self.lists[word]
                scores[index] += added
        return scores

    def search(self, question: str, k: int) -> list[int]:
        """The numbers of the k best passages, the best first; those that score 0 are left out."""
        scores = self.scores(question)
        best = np.argsort(-scores, kind="stable")[:k]
        return [int(i) for i in best if scores[i] > 0]


# ---- vectors -------------------------------------------------------------------------------------


def nearest(
    questions: Tensor, passages: Tensor, k: int, at_once: int = AT_ONCE
) -> tuple[Tensor, Tensor]:
    """(scores, numbers) of the k passages (N, E) with the largest products with each question
    (Q, E): (Q, k) each, the best first. At most `at_once` scores are compared at a time, or k + 1
    for each question.

    The best of some passages and the best so far are joined, and the best of these are kept.
    """
    Q, N = len(questions), len(passages)
    k = min(k, N)
    chunk = max(1, at_once // max(1, Q) - k)
    best = questions.new_full((Q, 0), 0.0)
    numbers = torch.zeros((Q, 0), dtype=torch.long, device=questions.device)
    for start in range(0, N, chunk):
        scores = questions @ passages[start : start + chunk].mT  # (Q, chunk)
        own = torch.arange(start, start + scores.size(1), device=questions.device)
        scores = torch.cat([best, scores], 1)
        numbers = torch.cat([numbers, own.expand(Q, -1)], 1)
        best, places = scores.topk(min(k, scores.size(1)), 1)
        numbers = numbers.gather(1, places)
    return best, numbers


# ---- rankings ------------------------------------------------------------------------------------


def fuse(
    rankings: Sequence[Sequence[int]],
    k: int,
    weights: Sequence[float] | None = None,
    constant: float = FUSION,
) -> list[int]:
    """The k best passages of several rankings together, by reciprocal rank fusion.

    weights: of the rankings; None = 1 each. constant: what is added to a rank; the smaller, the
    more the first places count.
    """
    scores: dict[int, float] = defaultdict(float)
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
        for rank, passage in enumerate(ranking, 1):
            scores[passage] += weight / (constant + rank)
    return sorted(scores, key=lambda passage: (-scores[passage], passage))[:k]


def add_scores(words: np.ndarray, cosines: np.ndarray, weight: float, k: int) -> list[int]:
    """The k passages with the largest BM25 score + weight * cosine; both (N,), of one question."""
    best = np.argsort(-(words + weight * cosines), kind="stable")[:k]
    return best.tolist()


def reciprocal_rank(ranking: Sequence[int], right: int, cut: int = 10) -> float:
    """1 / rank of the right passage, or 0 if it is not among the first `cut`."""
    first = list(ranking[:cut])
    return 1 / (first.index(right) + 1) if right in first else 0.0
