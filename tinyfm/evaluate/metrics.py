"""Measures of what a model says against what is so.

A classifier gives probabilities p (n, M) for n examples of M classes; labels (n,) say which class
each is of. Of its guesses, argmax p, the confusion matrix C counts them all, C[i, j] being examples
of class i that were taken for j. For one class

    precision = C[i, i] / sum_j C[j, i]      of those taken for it, how many are of it
    recall    = C[i, i] / sum_j C[i, j]      of those that are of it, how many were found
    F1        = 2 C[i, i] / (both sums)      their harmonic mean

and macro-F1 is the mean of F1 over classes: a rare one counts as much as a common one. Where a sum
is zero, the measure is 0. Calibration asks whether what is said with probability p is right as
often as that (Guo et al. 2017). A language model's log-likelihood is the sum of ln p(token), in
nats. Shares are of 1. All arrays are numpy's. Left out: areas under curves, regression.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def check(scores: np.ndarray, labels: np.ndarray) -> None:
    """Raise ValueError unless scores (n, M) and labels (n,) in [0, M) fit each other, n > 0."""
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(labels):
        shapes = f"{scores.shape} and labels {labels.shape}"
        raise ValueError(f"scores are {shapes}: they must be (n, M) and (n,), n at least 1")
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        found = f"labels are {labels.min()} to {labels.max()}"
        raise ValueError(f"{found}: they must be 0 to {scores.shape[1] - 1}, one of the classes")


# ---- classes ------------------------------------------------------------------------------------


def accuracy(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Share of examples whose label is among the k highest of scores (n, M); of equal ones, the
    first count as higher."""
    check(scores, labels)
    highest = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((highest == labels[:, None]).any(1).mean())


def confusion_matrix(guesses: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """int64 (classes, classes): row i, column j counts examples of class i taken for j."""
    counts = np.bincount(labels * classes + guesses, minlength=classes**2)
    return counts.reshape(classes, classes)


def per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """ "precision", "recall" and "f1" (M,) from a confusion matrix (M, M)."""
    right, guessed, there = np.diag(confusion), confusion.sum(0), confusion.sum(1)

    def ratio(part, whole):
        return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)

    f1 = ratio(2 * right, guessed + there)
    return {"precision": ratio(right, guessed), "recall": ratio(right, there), "f1": f1}


def macro_f1(confusion: np.ndarray) -> float:
    """Mean of F1 over the classes that occur, as labels or as guesses."""
    occurs = confusion.sum(0) + confusion.sum(1) > 0
    return float(per_class(confusion)["f1"][occurs].mean())


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3): examples are put into bins (a, b] of
    equal width by the probability of their guess; mean of |accuracy - mean probability|."""
    check(probabilities, labels)
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(place, weights=right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def classification(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The measures above of probabilities (n, M) and labels (n,) in one table."""
    guesses, classes = probabilities.argmax(1), probabilities.shape[1]
    scores = {"accuracy": accuracy(probabilities, labels)}
    if classes > 5:
        scores["accuracy_top_5"] = accuracy(probabilities, labels, k=5)
    scores["macro_f1"] = macro_f1(confusion_matrix(guesses, labels, classes))
    return scores | {"calibration_error": calibration_error(probabilities, labels)}


# ---- retrieval, text, certainty -----------------------------------------------------------------


def recall_at(similarity: np.ndarray, owner: np.ndarray, k: int) -> float:
    """Share of queries (n,) whose own item `owner` (n,) is among the k most similar of (n, items).
    A tie counts against it: who finds all alike has found nothing."""
    check(similarity, owner)
    own = similarity[np.arange(len(owner)), owner][:, None]
    return float(((similarity >= own).sum(1) <= k).mean())


def perplexity(log_likelihood: float, tokens: int) -> float:
    """exp of the mean nats per token: how many equally likely tokens would be as hard to guess."""
    return math.exp(-log_likelihood / tokens)


def bits_per_byte(log_likelihood: float, utf8_bytes: int) -> float:
    """Bits for a byte of the text; unlike perplexity it compares models of any tokenizer."""
    return -log_likelihood / math.log(2) / utf8_bytes


def bootstrap_interval(
    values: ArrayLike, share: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Where the mean of n values, such as right or wrong, lies with probability `share`: between
    these quantiles of the means of n of them, drawn with replacement (Efron 1979)."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values) or not 0 < share < 1:
        raise ValueError(f"{len(values)} values, share {share}: give values, and a share below 1")
    rows = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[rows].mean(1), ((1 - share) / 2, (1 + share) / 2))
    return float(low), float(high)


SHOWN = 48  # confusions in the picture
Scores = dict[str, float]
