"""Measures equal those of scikit-learn, on random guesses in which classes may be absent. Intervals
catch the true value as often as they say."""

import math

import numpy as np
import pytest
from scipy import stats
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


# ---- intervals ----------------------------------------------------------------------------------


def test_wilson_is_the_set_of_shares_that_the_test_does_not_reject():
    low, high = metrics.wilson(41, 50)
    for q in (low, high):
        assert abs(41 / 50 - q) == pytest.approx(1.959964 * math.sqrt(q * (1 - q) / 50), rel=1e-5)
    for k, n, level in ((0, 20, 0.95), (20, 20, 0.9), (117, 118, 0.95), (3, 500, 0.99)):
        expected = stats.binomtest(k, n).proportion_ci(level, "wilson")
        assert metrics.wilson(k, n, level) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("freedom", [1, 2, 4, 30, 300])
def test_students_t(freedom):
    for level in (0.5, 0.95, 0.99):
        expected = stats.t.ppf((1 + level) / 2, freedom)
        assert metrics.student_t(level, freedom) == pytest.approx(expected, rel=1e-4)


def test_wilson_catches_the_true_share():
    """The exact coverage, summed over all numbers of successes, averaged over true shares."""
    for n in (20, 50, 118, 200, 500):
        intervals = np.array([metrics.wilson(k, n) for k in range(n + 1)])
        coverage = []
        for p in np.linspace(0.5, 0.99, 99):
            chance = stats.binom.pmf(np.arange(n + 1), n, p)
            coverage.append(chance[(intervals[:, 0] <= p) & (p <= intervals[:, 1])].sum())
        assert abs(np.mean(coverage) - 0.95) < 0.01, n
        assert min(coverage) > 0.83, n  # the common interval has 0.18 at n = 20, p = 0.99


@pytest.mark.parametrize("clusters, size", [(8, 50), (40, 10), (150, 4)])
def test_an_interval_over_clusters_catches_the_true_share(clusters, size):
    """The share of a file varies by Beta(8, 2): examples of one file are alike."""
    rng = np.random.default_rng(0)
    place = np.repeat(np.arange(clusters), size)
    caught = np.zeros(2)
    for _ in range(400):
        right = rng.random(len(place)) < rng.beta(8, 2, clusters)[place]
        intervals = (
            metrics.clustered_wilson(right, place),
            metrics.wilson(int(right.sum()), len(place)),
        )
        caught += [low <= 0.8 <= high for low, high in intervals]
    assert 0.92 <= caught[0] / 400 <= 0.985
    if size >= 10:
        assert caught[1] / 400 < 0.9  # as if they were independent


def test_an_interval_over_documents_catches_the_true_ratio():
    """Documents of unequal lengths; longer ones are easier."""

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        size = np.exp(rng.normal(7, 0.8, n))
        return size * (rng.gamma(12, 0.14, n) - 0.05 * (np.log(size) - 7)), size

    rng = np.random.default_rng(0)
    bits, size = draw(1_000_000)
    true = bits.sum() / size.sum()
    intervals = np.array([metrics.bootstrap(*draw(100)) for _ in range(300)])
    caught = (intervals[:, 0] <= true) & (true <= intervals[:, 1])
    assert 0.92 <= caught.mean() <= 0.98


def test_a_bootstrap_is_that_of_whole_documents_and_does_not_change():
    rng = np.random.default_rng(1)
    size = rng.integers(100, 5000, 40)
    bits = size * rng.normal(1.6, 0.2, 40)
    low, high = metrics.bootstrap(bits, size)
    assert low < bits.sum() / size.sum() < high
    assert metrics.bootstrap(bits, size) == (low, high)
    many = np.repeat(bits / 50, 50), np.repeat(size / 50, 50)  # as if each were 50 documents
    assert np.diff(metrics.bootstrap(*many)) < 0.2 * (high - low)
    equal = metrics.bootstrap(size * 1.6, size)
    assert equal == pytest.approx((1.6, 1.6))


@pytest.mark.parametrize("files, per", [(1, 4), (4, 10), (10, 10)])
def test_an_interval_of_macro_f1_catches_its_mean(files, per):
    """Six classes of `files` files each; how well a file is read varies by a Beta distribution."""
    M = 6
    recall = np.linspace(0.4, 0.9, M)
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(M), files * per)
    place = np.arange(len(labels)) // per
    wrong = (labels + 1 + labels % 3) % M  # what a class is taken for
    values = []
    caught = []
    for i in range(300):
        chance = rng.beta(8 * recall[labels[::per]], 8 * (1 - recall[labels[::per]]))
        guesses = np.where(rng.random(len(labels)) < chance[place], labels, wrong)
        values.append(metrics.macro_f1(metrics.confusion_matrix(guesses, labels, M)))
        if i < 100:
            caught.append(metrics.measured_f1(guesses, labels, M, "texts", place, "files"))
            assert caught[-1] == values[-1]
    inside = [found.low <= np.mean(values) <= found.high for found in caught]
    assert np.mean(inside) >= 0.9
    width = np.mean([found.high - found.low for found in caught])
    assert width < 7 * np.std(values)  # 4 standard deviations, and Student's t for 6 files


@pytest.mark.parametrize("off", [0, 0.1])
@pytest.mark.parametrize("alike", [1, 10])
def test_an_interval_of_a_calibration_error_catches_its_mean(off, alike):
    rng = np.random.default_rng(0)
    n = 400
    place = np.arange(n) // alike
    values = []
    caught = []
    for i in range(300):
        confidence = 0.5 + 0.5 * rng.beta(2, 1.2, n)
        chance = confidence - off + rng.normal(0, 0.1, n)[place] * (alike > 1)
        labels = (rng.random(n) >= chance).astype(int)
        p = np.stack([confidence, 1 - confidence], axis=1)
        values.append(metrics.calibration_error(p, labels))
        if i < 100:
            caught.append(metrics.measured_calibration(p, labels, "texts", place, "files"))
            assert caught[-1] == values[-1]
    inside = [found.low <= np.mean(values) <= found.high for found in caught]
    assert np.mean(inside) >= 0.9
    assert np.mean([found.high - found.low for found in caught]) < 6 * np.std(values)
    if alike == 1:
        usual = metrics.error_if_calibrated(p)
        assert (abs(usual - np.mean(values)) < 0.005) == (off == 0)


def test_all_measures_of_classes_count_the_same_examples():
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 8
    p = rng.dirichlet(np.ones(8), 120) + np.eye(8)[labels] * (rng.random((120, 1)) < 0.6)
    scores = metrics.classification(p / p.sum(1, keepdims=True), labels, "texts", labels, "files")
    for name in ("accuracy", "accuracy_top_5", "macro_f1", "calibration_error"):
        own = scores[name]
        assert own.low < own < own.high and own.about == "120 texts in 8 files", name
    few = metrics.classification(p[:3] / p[:3].sum(1, keepdims=True), labels[:3])
    assert math.isnan(few["macro_f1"].low)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(0).normal(size=40)
    without = np.array([np.delete(x, i).mean() for i in range(40)])
    assert metrics.jackknife_error(without) == pytest.approx(x.std(ddof=1) / math.sqrt(40))


def test_a_measure_prints_its_interval():
    right = np.arange(100) < 80
    one = metrics.proportion(right, "texts")
    assert one == 0.8 and (one.low, one.high) == metrics.wilson(80, 100)
    assert str(one) == "0.8 (0.7112 to 0.8666; 100 texts)"
    files = metrics.proportion(right, "texts", [f"{i // 20}.py" for i in range(100)], "files")
    assert files.low < one.low and files.high > one.high and files.n == 100
    assert str(files).endswith("; 100 texts in 5 files)")
    assert metrics.proportion(right, "texts", range(100), "files").high == one.high
    single = metrics.proportion(right, "texts", ["a.py"] * 100, "files")
    assert math.isnan(single.low) and "too few" in str(single)
    loss = metrics.ratio_of_sums(np.full(12, 6.0), np.full(12, 4.0), "documents")
    assert (loss, loss.low, loss.high, loss.n) == (1.5, 1.5, 1.5, 12)
    few = metrics.ratio_of_sums(np.full(3, 6.0), np.full(3, 4.0), "documents")
    assert few == 1.5 and math.isnan(few.high) and "3 documents" in str(few)


def test_samples_without_an_interval_are_refused():
    for wrong in ((5, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="0 to n"):
            metrics.wilson(*wrong)
    with pytest.raises(ValueError, match="level of an interval is 95"):
        metrics.wilson(3, 4, 95)
    with pytest.raises(ValueError, match="two clusters"):
        metrics.clustered_wilson(np.ones(4), ["a"] * 4)
    with pytest.raises(ValueError, match="10 at least"):
        metrics.bootstrap(np.ones(9), np.ones(9))


# ---- texts that a model wrote --------------------------------------------------------------------


def test_edit_distance_by_hand_and_against_the_definition():
    assert metrics.edit_distance("kitten", "sitting") == 3
    assert metrics.edit_distance("", "abc") == metrics.edit_distance("abc", "") == 3
    assert metrics.edit_distance(["K", "AE", "T"], ["K", "EH", "T"]) == 1

    def defined(a, b):
        if not a or not b:
            return len(a) + len(b)
        last = defined(a[:-1], b[:-1]) + (a[-1] != b[-1])
        return min(last, defined(a[:-1], b) + 1, defined(a, b[:-1]) + 1)

    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b = ("".join(rng.choice(list("ab"), rng.integers(6))) for _ in range(2))
        assert metrics.edit_distance(a, b) == defined(a, b)


def test_chrf_is_sacrebleus():
    from sacrebleu.metrics import CHRF

    oracle = CHRF()
    rng = np.random.default_rng(0)
    texts = [
        "Datei öffnen",
        "Die Datei schließen",
        "x",
        "",
        "ab",
        "Datei  geöffnet: %s",
        "abcabcabc",
    ]
    guesses = [str(rng.choice(texts)) for _ in range(40)]
    answers = [[str(rng.choice(texts)) for _ in range(2)] for _ in range(40)]
    own = metrics.measured_chrf(guesses, answers, "strings")
    expected = oracle.corpus_score(guesses, [list(own) for own in zip(*answers)])
    assert float(own) == pytest.approx(expected.score / 100)
    assert own.low < own < own.high and own.about == "40 strings"
    for guess in texts:
        for right in texts:
            found = metrics.chrf(metrics.chrf_counts(guess, right))
            assert found == pytest.approx(oracle.sentence_score(guess, [right]).score / 100)
