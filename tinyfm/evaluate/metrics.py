"""Measures of predictions, of classes and of texts, and how certain they are.

A classifier predicts probabilities p (n, M) for n examples and M classes; labels (n,) are the true
classes. Its guess is the class of the highest probability. The confusion matrix C counts guesses:
C[i, j] is the number of examples of class i that were taken for class j. For class i

    precision = C[i, i] / sum_j C[j, i]      share of the guesses of the class that are right
    recall    = C[i, i] / sum_j C[i, j]      share of the examples of the class that are found
    F1        = 2 C[i, i] / (both sums)      the harmonic mean of the two

Macro-F1 is the mean of F1 over the classes, so a rare class counts as much as a common one. Where a
sum is zero, the measure is 0. A classifier is calibrated if its guesses with probability p are
right with frequency p (Guo et al. 2017).

The log-likelihood of a text is the sum of ln p(token), in nats. Of texts that a model wrote, the
edit distance (Levenshtein 1966) and chrF (Popovic 2015) say how near they are to the right ones.

A measure of n examples differs from that of all examples there could be. An interval of level 95%
is computed from the sample by a rule that catches the true value for 95% of all samples. It speaks
of other examples of the same kind, not of other seeds of the training.

    share p of n independent examples (Wilson 1927): all q with |p - q| <= z sqrt(q (1 - q) / n)
    share of examples in clusters, such as passages of one file, which are alike: the same, with
        fewer examples, n / deff, and Student's t instead of z (Korn & Graubard 1998)
    ratio of two sums over documents, such as bits / bytes: a bootstrap over documents (Efron 1979)
    macro-F1 and calibration error: the value +- t standard errors, of a bootstrap over clusters

deff, the design effect (Kish 1965), is the variance of p between clusters over that of independent
examples. The common p +- z sqrt(p (1 - p) / n) is too narrow for a p near 0 or 1.

A calibration error is biased: each bin adds the size of its noise, so that even a calibrated
classifier has an error, and a larger one with fewer examples. Macro-F1 is biased a little. The
quantiles of a bootstrap double such a bias: of simulated macro-F1s they held 51 to 91%. The
interval used here is that of the mean over other samples of as many examples, bias included. In
simulations it held 94 to 97% of macro-F1s, and of calibration errors 92 to 99%. It does not hold
the error that infinitely many examples would show: of a calibrated classifier never, of one that is
off by 0.05, with 450 examples, in 77%. So beside a calibration error stands the one that a
calibrated classifier would have with the same probabilities (`error_if_calibrated`).

All shares are from 0 to 1, all arrays are numpy arrays. Left out: areas under curves, regression,
tests of a difference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from data.report import counted

DRAWS = 2000  # samples of a bootstrap
ERROR_DRAWS = 200  # samples of a bootstrap that gives a standard error
DRAWN_AT_ONCE = 1 << 20  # units of these samples in memory
CHRF_ORDER = 6  # characters in the longest runs that chrF compares
MIN_UNITS = 10  # units, such as documents, that a bootstrap needs

Scores = dict[str, float]  # {measure: value}; some values are Measured


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


def among_highest(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Whether each label is among the k highest of scores (n, M): bool (n,).

    Among equal scores, the first class counts as the highest.
    """
    check(scores, labels)
    highest = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # (n, k)
    return (highest == labels[:, None]).any(1)


def accuracy(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Share of the examples whose label is among the k highest of scores (n, M)."""
    return float(among_highest(scores, labels, k).mean())


def confusion_matrix(
    guesses: np.ndarray, labels: np.ndarray, classes: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """(classes, classes): entry [i, j] counts the examples of class i taken for class j.

    weights: (n,), how often each example counts; once by default.
    """
    counts = np.bincount(labels * classes + guesses, weights, minlength=classes**2)
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


def calibration_error(
    probabilities: np.ndarray,
    labels: np.ndarray,
    bins: int = 15,
    weights: np.ndarray | None = None,
) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3).

    The examples are put into bins (a, b] of equal width by the probability of their guess. The
    error is |accuracy - mean probability| of a bin, averaged over all examples. weights: (n,), how
    often each example counts; once by default.
    """
    check(probabilities, labels)
    weights = np.ones(len(labels)) if weights is None else weights
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(place, weights=(right - confidence) * weights, minlength=bins)
    return float(np.abs(gap).sum() / weights.sum())


def guess_alone(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities (n, M) as those of two classes, (n, 2): the guess, which is class 0, and 0.

    The calibration error reads no others, so many samples of it are computed on these.
    """
    confidence = probabilities.max(1)
    return np.stack([confidence, np.zeros_like(confidence)], axis=1)


def error_if_calibrated(probabilities: np.ndarray, bins: int = 15) -> float:
    """The calibration error that a calibrated classifier with these probabilities (n, M) has.

    Its guesses are right by chance, with their probability. The mean of ERROR_DRAWS such draws.
    """
    guess = guess_alone(probabilities)
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(ERROR_DRAWS):
        wrong = rng.random(len(guess)) >= guess[:, 0]
        errors.append(calibration_error(guess, wrong.astype(int), bins))
    return float(np.mean(errors))


# ---- texts --------------------------------------------------------------------------------------


def perplexity(log_likelihood: float, tokens: int) -> float:
    """exp of the mean nats per token: the number of equally likely tokens as hard to predict.

    It depends on the tokenizer, so it compares models with the same one.
    """
    return math.exp(-log_likelihood / tokens)


def bits_per_byte(log_likelihood: float, utf8_bytes: int) -> float:
    """Bits per byte of the text, from its log-likelihood in nats (at most 0) and its length.

    It compares models with any tokenizers.
    """
    return -log_likelihood / math.log(2) / utf8_bytes


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The fewest insertions, deletions and replacements that make b of a."""
    row = list(range(len(b) + 1))  # from the empty start of a to each start of b
    for i, x in enumerate(a, 1):
        above = row
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def count_ngrams(text: str, order: int) -> Counter[str]:
    """The runs of `order` characters of a text, without its white space."""
    text = "".join(text.split())
    return Counter(text[i : i + order] for i in range(len(text) - order + 1))


def chrf_counts(guess: str, right: str) -> np.ndarray:
    """Counts of the runs of 1 to 6 characters: in the guess, in the right text, in both; (6, 3).

    Where the right text is too short for a run, those of the guess do not count.
    """
    counts = np.zeros((CHRF_ORDER, 3))
    for row, order in zip(counts, range(1, CHRF_ORDER + 1)):
        own = count_ngrams(guess, order)
        wanted = count_ngrams(right, order)
        if wanted:
            row[:] = own.total(), wanted.total(), (own & wanted).total()
    return counts


def chrf(counts: np.ndarray) -> float:
    """chrF, from 0 to 1, of counts (6, 3), those of all texts added up.

    Precision and recall are means over the lengths that occur in both; recall counts twice as much
    as precision: F = 5 P R / (4 P + R). As sacrebleu computes it, which prints 100 times as much.
    """
    guessed, there, both = counts[(counts[:, :2] > 0).all(1)].T
    if not both.sum():
        return 0.0
    precision = (both / guessed).mean()
    recall = (both / there).mean()
    return float(5 * precision * recall / (4 * precision + recall))


# ---- intervals ----------------------------------------------------------------------------------


def check_level(level: float) -> None:
    """Raise ValueError unless level is between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval is {level}: it must be between 0 and 1")


def student_t(level: float, freedom: int) -> float:
    """The t with P(-t < T < t) = level for Student's T with `freedom` degrees of freedom.

    With T = sqrt(freedom) tan(angle), the density of the angle is cos(angle)^(freedom - 1).
    """
    angles = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate(([0], np.cumsum(density[1:] + density[:-1])))
    return math.sqrt(freedom) * math.tan(np.interp(level, below / below[-1], angles))


def wilson(successes: float, n: float, level: float = 0.95, z: float = 0) -> tuple[float, float]:
    """(low, high) of a share, from the number of successes among n independent examples.

    These are the q with (p - q)^2 = z^2 q (1 - q) / n for p = successes / n:

        (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    z: number of standard errors; 0 = that of the level, 1.96 for 95%. n and successes need not be
    whole. Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    check_level(level)
    if not 0 <= successes <= n or not n:
        raise ValueError(f"{successes} successes of {n}: there must be 0 to n of them, and n > 0")
    z = z or NormalDist().inv_cdf((1 + level) / 2)
    p = successes / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def clustered_wilson(
    right: np.ndarray, clusters: Sequence[Any], level: float = 0.95
) -> tuple[float, float]:
    """(low, high) of the share of True in right (n,), whose examples lie in clusters (n,).

    The clusters are what was drawn from a population: files, fonts. With k clusters the variance
    of the share p is

        k / (k - 1) sum over clusters (sum over the cluster's examples (right - p))^2 / n^2

    The design effect deff is that over p (1 - p) / n, and at least 1. The interval is that of
    `wilson` for n / deff examples, with the t of k - 1 degrees of freedom as z. If p is 0 or 1, the
    clusters do not differ, and deff is 1. Where each cluster has one example, this is `wilson` of
    the level. Raises ValueError for a single cluster, unless it has a single example.
    """
    check_level(level)
    n = len(right)
    _, place = np.unique(np.asarray(clusters), return_inverse=True)
    count = int(place.max()) + 1
    if count == n:
        return wilson(float(right.sum()), n, level)
    if count == 1:
        raise ValueError(f"all {n} examples are in one cluster: an interval needs two clusters")
    p = float(right.mean())
    if p in (0, 1):  # the clusters do not differ
        return wilson(p * n, n, level, student_t(level, count - 1))
    # The variance of p, from the sums of the clusters' deviations.
    deviations = np.bincount(place, weights=right - p)
    variance = count / (count - 1) * float((deviations**2).sum()) / n**2
    deff = max(1.0, variance / (p * (1 - p) / n))
    return wilson(p * n / deff, n / deff, level, student_t(level, count - 1))


def bootstrap(
    parts: np.ndarray, wholes: np.ndarray, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """(low, high) of sum(parts) / sum(wholes), (n,) both: the bits and bytes of n documents, say.

    A bootstrap draws n of the n units with replacement, many times. This is the bootstrap-t (Efron
    & Tibshirani 1993, section 12.5): by how many standard errors does the ratio r* of a
    draw differ from the ratio r of all units? The standard error of a ratio is, by linearisation,

        sqrt(sum (part - r whole)^2) / sum(whole)

    Where the lengths of documents differ much, this covers more than the quantiles of r* do. Raises
    ValueError for fewer than MIN_UNITS units: they say too little about all others.
    """
    check_level(level)
    parts = np.asarray(parts, dtype=np.float64)
    wholes = np.asarray(wholes, dtype=np.float64)
    n = len(parts)
    if n < MIN_UNITS or wholes.shape != parts.shape:
        raise ValueError(
            f"{n} parts and {len(wholes)} wholes: an interval needs as many of both, {MIN_UNITS} "
            "at least"
        )

    def ratio_and_error(parts: np.ndarray, wholes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ratio and standard error of each row, (draws,) each; parts and wholes (draws, n)."""
        sums = wholes.sum(1)
        ratios = parts.sum(1) / sums
        return ratios, np.sqrt(((parts - ratios[:, None] * wholes) ** 2).sum(1)) / sums

    (ratio,), (error,) = ratio_and_error(parts[None], wholes[None])
    rng = np.random.default_rng(seed)
    drawn = []
    at_once = max(1, DRAWN_AT_ONCE // n)
    for first in range(0, DRAWS, at_once):
        index = rng.integers(n, size=(min(at_once, DRAWS - first), n))
        ratios, errors = ratio_and_error(parts[index], wholes[index])
        # An error is 0 where all units have the same ratio: then r* is r.
        drawn.append((ratios - ratio) / np.where(errors > 0, errors, np.inf))
    lowest, highest = np.quantile(np.concatenate(drawn), ((1 - level) / 2, (1 + level) / 2))
    return float(ratio - highest * error), float(ratio - lowest * error)


def jackknife_error(without: np.ndarray) -> float:
    """Standard error of a measure from its values without each of m groups of the sample, (m,).

    The groups are random and of one size (Efron & Tibshirani 1993, section 11.5).
    """
    m = len(without)
    return math.sqrt((m - 1) * float(np.var(without)))


# ---- measures with intervals --------------------------------------------------------------------


class Measured(float):
    """A measure with its interval of 95%. Apart from that it is an ordinary number."""

    low: float  # nan where the sample is too small for an interval
    high: float
    n: int  # number of examples or documents
    about: str  # n in words, such as "575 texts in 78 files"

    def __new__(
        cls, value: float, interval: tuple[float, float], n: int, about: str = ""
    ) -> Measured:
        self = super().__new__(cls, value)
        self.low, self.high = interval
        self.n = n
        self.about = about or counted(n, "examples")
        return self

    def through(self, function: Callable[[float], float]) -> Measured:
        """The measure that a rising function makes of this one: perplexity of a loss."""
        interval = (function(self.low), function(self.high))
        return Measured(function(float(self)), interval, self.n, self.about)

    def __str__(self) -> str:
        """Such as "0.584 (0.54 to 0.62; 575 texts in 78 files)"."""
        value = f"{float(self):.4g}"
        if math.isnan(self.low):
            return f"{value} ({self.about}: too few for an interval)"
        return f"{value} ({self.low:.4g} to {self.high:.4g}; {self.about})"


NO_INTERVAL = (math.nan, math.nan)


def counted_together(
    n: int, unit: str, clusters: Sequence[Any], cluster: str
) -> tuple[str, np.ndarray]:
    """("575 texts in 78 files", the cluster's number of each example, int64 (n,)).

    Without clusters each example is its own.
    """
    _, place = np.unique(np.asarray(clusters), return_inverse=True)
    count = int(place.max(initial=-1)) + 1
    if not count or count == n:
        return counted(n, unit), np.arange(n)
    return f"{counted(n, unit)} in {counted(count, cluster)}", place


def resampled(
    measure: Callable[[np.ndarray], float],
    n: int,
    unit: str = "examples",
    clusters: Sequence[Any] = (),
    cluster: str = "",
) -> Measured:
    """A measure between 0 and 1 of n examples, +- t standard errors: see the top.

    measure: of weights (n,), how often each example counts. The standard error is the deviation
    over ERROR_DRAWS draws of all clusters with replacement.
    """
    about, place = counted_together(n, unit, clusters, cluster)
    count = int(place.max()) + 1
    value = measure(np.ones(n))
    if count < 2 or n < MIN_UNITS:
        return Measured(value, NO_INTERVAL, n, about)
    rng = np.random.default_rng(0)
    equal = np.full(count, 1 / count)
    draws = [measure(rng.multinomial(count, equal)[place]) for _ in range(ERROR_DRAWS)]
    half = student_t(0.95, count - 1) * float(np.std(draws))
    interval = (max(0.0, value - half), min(1.0, value + half))
    return Measured(value, interval, n, about)


def proportion(
    right: np.ndarray, unit: str = "examples", clusters: Sequence[Any] = (), cluster: str = ""
) -> Measured:
    """The share of True in right (n,).

    clusters: (n,), the file or font of each example; empty if the examples are independent. unit,
    cluster: the words for both, "texts" and "files".
    """
    right = np.asarray(right, dtype=bool)
    n = len(right)
    value = float(right.mean())
    about, place = counted_together(n, unit, clusters, cluster)
    interval = NO_INTERVAL
    if n == 1 or place.any():  # more than one cluster, or a single example
        interval = clustered_wilson(right, place)
    return Measured(value, interval, n, about)


def ratio_of_sums(parts: np.ndarray, wholes: np.ndarray, unit: str) -> Measured:
    """sum(parts) / sum(wholes) over n units: loss per token or bits per byte of n documents."""
    n = len(parts)
    value = float(np.sum(parts) / np.sum(wholes))
    interval = NO_INTERVAL if n < MIN_UNITS else bootstrap(parts, wholes)
    return Measured(value, interval, n, counted(n, unit))


def measured_f1(
    guesses: np.ndarray, labels: np.ndarray, classes: int, *counted_in: Any
) -> Measured:
    """Macro-F1 of guesses (n,), with its interval; counted_in: unit, clusters, cluster."""

    def measure(weights: np.ndarray) -> float:
        return macro_f1(confusion_matrix(guesses, labels, classes, weights))

    return resampled(measure, len(labels), *counted_in)


def measured_chrf(guesses: Sequence[str], answers: Sequence[Sequence[str]], unit: str) -> Measured:
    """chrF of n guesses, each with its right texts, of which the nearest counts."""
    best = []
    for guess, rights in zip(guesses, answers):
        best.append(max((chrf_counts(guess, right) for right in rights), key=chrf))
    counts = np.stack(best)  # (n, 6, 3)
    return resampled(lambda weights: chrf(np.tensordot(weights, counts, 1)), len(counts), unit)


def measured_calibration(
    probabilities: np.ndarray, labels: np.ndarray, *counted_in: Any
) -> Measured:
    """`calibration_error` with its interval; counted_in: unit, clusters, cluster."""

    check(probabilities, labels)
    guess = guess_alone(probabilities)
    wrong = (probabilities.argmax(1) != labels).astype(int)

    def measure(weights: np.ndarray) -> float:
        return calibration_error(guess, wrong, weights=weights)

    return resampled(measure, len(labels), *counted_in)


def classification(
    probabilities: np.ndarray,
    labels: np.ndarray,
    unit: str = "examples",
    clusters: Sequence[Any] = (),
    cluster: str = "",
) -> Scores:
    """All measures of probabilities (n, M) and labels (n,), with intervals.

    There is a top-5 accuracy with 6 classes or more. unit, clusters, cluster: as in `proportion`.
    """
    check(probabilities, labels)
    counted_in = (unit, clusters, cluster)
    guesses = probabilities.argmax(1)
    classes = probabilities.shape[1]
    scores = {"accuracy": proportion(guesses == labels, *counted_in)}
    if classes > 5:
        scores["accuracy_top_5"] = proportion(among_highest(probabilities, labels, 5), *counted_in)
    scores["macro_f1"] = measured_f1(guesses, labels, classes, *counted_in)
    scores["calibration_error"] = measured_calibration(probabilities, labels, *counted_in)
    scores["calibration_error_if_calibrated"] = error_if_calibrated(probabilities)
    return scores
