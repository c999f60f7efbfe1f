"""Measures equal those of scikit-learn, on random guesses in which classes may be absent."""

import math

import numpy as np
import pytest
from sklearn import metrics as oracle

from tinyfm.evaluate import metrics


@pytest.fixture(params=range(6))
def guessed(request):
    """Probabilities (n, M) and labels (n,).

    With an odd number class 1 is never a guess, class 2 never a label, class 0 never either.
    """
    rng = np.random.default_rng(request.param)
    n, M = int(rng.integers(1, 60)), int(rng.integers(4, 9))
    logits, labels = rng.normal(size=(n, M)), rng.integers(M, size=n)
    if request.param % 2:
        logits[:, 1] = -9
        labels[labels == 2] = 3
        logits[:, 0] = -8
        labels[labels == 0] = 3
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True), labels


def test_measures_of_classes(guessed):
    p, labels = guessed
    guesses = p.argmax(1)
    M = p.shape[1]
    assert metrics.accuracy(p, labels) == pytest.approx(oracle.accuracy_score(labels, guesses))
    for k in (1, 2, M - 1):
        expected = oracle.top_k_accuracy_score(labels, p, k=k, labels=range(M))
        assert metrics.accuracy(p, labels, k) == pytest.approx(expected)
    confusion = metrics.confusion_matrix(guesses, labels, M)
    assert np.array_equal(confusion, oracle.confusion_matrix(labels, guesses, labels=range(M)))
    expected = oracle.precision_recall_fscore_support(
        labels, guesses, labels=range(M), zero_division=0
    )
    for name, values in zip(("precision", "recall", "f1"), expected):
        assert metrics.per_class(confusion)[name] == pytest.approx(values), name
    expected = oracle.f1_score(labels, guesses, average="macro", zero_division=0)
    assert metrics.macro_f1(confusion) == pytest.approx(expected)


def test_calibration_error_is_the_mean_gap_over_bins(guessed):
    p, labels = guessed
    total = 0.0
    confidence = p.max(1)
    right = p.argmax(1) == labels
    for low in range(15):
        here = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if here.any():
            total += here.sum() * abs(right[here].mean() - confidence[here].mean())
    assert metrics.calibration_error(p, labels) == pytest.approx(total / len(labels))


def test_calibration_error_of_certain_guesses():
    sure = np.array([[1.0, 0.0]] * 4)
    assert metrics.calibration_error(sure, np.zeros(4, int)) == 0
    assert metrics.calibration_error(sure, np.array([0, 0, 0, 1])) == pytest.approx(0.25)


def test_the_table_holds_each_measure(guessed):
    p, labels = guessed
    table = metrics.classification(p, labels)
    assert table["accuracy"] == metrics.accuracy(p, labels)
    assert ("accuracy_top_5" in table) == (p.shape[1] > 5)
    assert table["calibration_error"] == metrics.calibration_error(p, labels)
    assert table["macro_f1"] == pytest.approx(
        oracle.f1_score(labels, p.argmax(1), average="macro", zero_division=0)
    )


def test_among_equal_scores_the_first_class_is_the_guess():
    equal = np.ones((3, 4))
    assert metrics.accuracy(equal, np.array([0, 1, 2])) == pytest.approx(1 / 3)


def test_perplexity_and_bits_per_byte():
    """With 256 equally likely bytes, each takes 8 bits."""
    log_likelihood = -10 * math.log(256)
    assert metrics.perplexity(log_likelihood, 10) == pytest.approx(256)
    assert metrics.bits_per_byte(log_likelihood, 10) == pytest.approx(8)
    assert metrics.bits_per_byte(log_likelihood, 20) == pytest.approx(4)


def test_bad_input_is_refused():
    p = np.full((3, 2), 0.5)
    for scores, labels in ((p, np.zeros(2, int)), (p[0], np.zeros(2, int)), (p[:0], np.zeros(0))):
        with pytest.raises(ValueError, match=r"\(n, M\) and \(n,\)"):
            metrics.accuracy(scores, labels)
    with pytest.raises(ValueError, match="labels are 0 to 2: they must be 0 to 1"):
        metrics.calibration_error(p, np.array([0, 1, 2]))
