"""Measures of predictions: of classes, and of texts.

A classifier predicts probabilities p (n, M) for n examples and M classes; labels (n,) are the true
classes. Its guess is the class of the highest probability. The confusion matrix C counts guesses:
C[i, j] is the number of examples of class i that were taken for class j. For class i

    precision = C[i, i] / sum_j C[j, i]      share of the guesses of the class that are right
    recall    = C[i, i] / sum_j C[i, j]      share of the examples of the class that are found
    F1        = 2 C[i, i] / (both sums)      the harmonic mean of the two

Macro-F1 is the mean of F1 over the classes, so a rare class counts as much as a common one. Where a
sum is zero, the measure is 0. A classifier is calibrated if its guesses with probability p are
right with frequency p (Guo et al. 2017).

The log-likelihood of a text is the sum of ln p(token), in nats.

All shares are from 0 to 1, all arrays are numpy arrays. Left out: areas under curves, regression.
"""

from __future__ import annotations

import math

import numpy as np

Scores = dict[str, float]  # {measure: value}


# ---- classes ------------------------------------------------------------------------------------


def check(scores: np.ndarray, labels: np.ndarray) -> None:
    """Raise ValueError unless scores are (n, M), labels (n,) in [0, M), and n at least 1."""
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise ValueError(
            f"scores are {scores.shape} and labels {labels.shape}: they must be (n, M) and (n,), "
            "n at least 1"
        )
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(
            f"labels are {labels.min()} to {labels.max()}: they must be 0 to "
            f"{scores.shape[1] - 1}, numbers of classes"
        )


def accuracy(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Share of the examples whose label is among the k highest of scores (n, M).

    Among equal scores, the first class counts as the highest.
    """
    check(scores, labels)
    highest = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # (n, k)
    return float((highest == labels[:, None]).any(1).mean())


def confusion_matrix(guesses: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """int64 (classes, classes): entry [i, j] counts the examples of class i taken for class j."""
    counts = np.bincount(labels * classes + guesses, minlength=classes**2)
    return counts.reshape(classes, classes)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, or 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)


def per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of each class, (M,), from a confusion matrix (M, M)."""
    right = np.diag(confusion)
    guessed = confusion.sum(0)
    there = confusion.sum(1)
    return {
        "precision": ratio(right, guessed),
        "recall": ratio(right, there),
        "f1": ratio(2 * right, guessed + there),
    }


def macro_f1(confusion: np.ndarray) -> float:
    """Mean of F1 over the classes that occur as a label or as a guess."""
    occurs = confusion.sum(0) + confusion.sum(1) > 0
    return float(per_class(confusion)["f1"][occurs].mean())


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3).

    The examples are put into bins (a, b] of equal width by the probability of their guess. The
    error is |accuracy - mean probability| of a bin, averaged over all examples.
    """
    check(probabilities, labels)
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(place, weights=right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def classification(probabilities: np.ndarray, labels: np.ndarray) -> Scores:
    """All measures of probabilities (n, M) and labels (n,); top-5 accuracy with 6 classes or
    more."""
    guesses = probabilities.argmax(1)
    classes = probabilities.shape[1]
    scores = {"accuracy": accuracy(probabilities, labels)}
    if classes > 5:
        scores["accuracy_top_5"] = accuracy(probabilities, labels, k=5)
    scores["macro_f1"] = macro_f1(confusion_matrix(guesses, labels, classes))
    scores["calibration_error"] = calibration_error(probabilities, labels)
    return scores


# ---- texts --------------------------------------------------------------------------------------


def perplexity(log_likelihood: float, tokens: int) -> float:
    """exp of the mean nats per token: the number of equally likely tokens as hard to predict.

    It depends on the tokenizer, so it compares models with the same one.
    """
    return math.exp(-log_likelihood / tokens)


def bits_per_byte(log_likelihood: float, utf8_bytes: int) -> float:
    """Bits per byte of the text: it compares models with any tokenizers."""
    return -log_likelihood / math.log(2) / utf8_bytes
