"""Checks of lesson 12. Figures with a source are published ones; the others are worked by hand."""

import math
from functools import partial

import numpy as np
import pytest

from course import compare
from course.lessons import checks
from data import dedupe, near, splits
from tinyfm.evaluate import metrics

agree = partial(compare.agree, tolerance=1e-6, relative=0)


# ---- splits --------------------------------------------------------------------------------------


@checks("split_of")
@pytest.mark.parametrize(
    ("name", "split"),
    # The first 8 bytes of their SHA-256, over 2^64: 0.0517, 0.2427, 0.3534, 0.5158, 0.9697.
    [
        ("pathlib:Path", "val"),
        ("b", "val"),
        ("json.decoder:JSONDecoder", "test"),
        ("os", "train"),
        ("Grüße", "train"),
    ],
)
def test_a_name_is_in_the_same_split_on_every_machine(name, split):
    got = splits.split_of(name, 0.5)
    assert got == split, f"{name!r} with half held out is in {got!r}; expected {split!r}"


@checks("split_of")
def test_half_of_what_is_held_out_is_validation_and_half_is_test():
    found = [splits.split_of(f"document {i}", 0.2) for i in range(4000)]
    shares = [found.count(split) / 4000 for split in ("train", "val", "test")]
    agree(shares, [0.8, 0.1, 0.1], "shares of train, val and test", tolerance=0.02)


@checks("split_of")
def test_a_larger_share_never_brings_a_document_back_to_training():
    names = [f"document {i}" for i in range(500)]
    small = {name for name in names if splits.split_of(name, 0.1) != "train"}
    large = {name for name in names if splits.split_of(name, 0.4) != "train"}
    assert small <= large, f"{len(small - large)} documents are held out at 10% but not at 40%"


# ---- bits a byte ---------------------------------------------------------------------------------


@checks("bits_per_byte")
def test_a_guess_of_one_in_256_costs_8_bits_a_byte():
    agree(metrics.bits_per_byte(-100 * math.log(256), 100), 8, "bits per byte of a uniform guess")


@checks("bits_per_byte")
def test_a_halved_probability_costs_one_bit():
    agree(metrics.bits_per_byte(-math.log(2), 1), 1, "bits per byte of a probability of 1/2")
    agree(metrics.bits_per_byte(-8 * math.log(2), 4), 2, "bits per byte of 2^-8 on 4 bytes")


@checks("bits_per_byte")
def test_certainty_costs_nothing():
    agree(metrics.bits_per_byte(0.0, 7), 0, "bits per byte of a probability of 1")


# ---- near pictures -------------------------------------------------------------------------------


def picture(*pixels: int) -> np.ndarray:
    return np.array(pixels, dtype=np.uint8).reshape(1, 2, 2)


@checks("is_near")
def test_a_picture_is_near_to_its_copy():
    assert near.is_near(picture(0, 9, 99, 255), [picture(0, 9, 99, 255)]), "a copy is not near"


@checks("is_near")
@pytest.mark.parametrize("other", [8, 12])
def test_darker_and_lighter_count_alike(other):
    """A difference of 2 of 255 is below LEVELS = 2.55, in both directions."""
    found = near.is_near(picture(10, 10, 10, 10), [picture(*4 * [other])])
    assert found, f"pictures of 10 and of {other} are not near; their mean difference is 2"


@checks("is_near")
@pytest.mark.parametrize("other", [7, 13, 255])
def test_a_mean_difference_above_the_limit_is_not_near(other):
    found = near.is_near(picture(10, 10, 10, 10), [picture(*4 * [other])])
    assert not found, f"pictures of 10 and of {other} are near; the limit is {near.LEVELS}"


@checks("is_near")
def test_the_mean_over_all_pixels_counts():
    white = picture(0, 0, 0, 0)
    assert near.is_near(white, [picture(0, 0, 0, 8)]), "one pixel of four differs by 8: mean 2"
    assert not near.is_near(white, [picture(0, 0, 0, 12)]), "one of four differs by 12: mean 3"
    wide = np.zeros((3, 4, 4), np.uint8)
    assert near.is_near(wide, [wide + np.uint8(2)]), "48 pixels that differ by 2 are not near"


@checks("is_near")
def test_one_near_picture_is_enough_and_none_is_none():
    far = picture(200, 200, 200, 200)
    own = picture(10, 10, 10, 10)
    assert near.is_near(own, [far, own]), "the second of two others is a copy"
    assert not near.is_near(own, []), "there are no others"


# ---- windows over a long text --------------------------------------------------------------------


def cut(context: list[int], ids: list[int], length: int, stride: int) -> list[tuple]:
    from tinyfm.evaluate import likelihood

    found = likelihood.windows(context, ids, length, stride)
    return [(window.inputs, window.targets) for window in found]


@checks("windows")
def test_eight_tokens_in_windows_of_four_and_steps_of_two():
    expected = [((0, 1, 2, 3), (1, 2, 3, 4)), ((2, 3, 4, 5), (5, 6)), ((3, 4, 5, 6), (7,))]
    found = cut([0], [1, 2, 3, 4, 5, 6, 7], 4, 2)
    assert found == expected, f"windows (inputs, targets) {found}; expected {expected}"


@checks("windows")
@pytest.mark.parametrize(("n", "length", "stride"), [(30, 8, 4), (31, 8, 8), (5, 8, 4), (40, 7, 1)])
def test_every_token_is_scored_once_and_never_read_before(n, length, stride):
    found = cut([0], list(range(1, n + 1)), length, stride)
    scored = [token for _, targets in found for token in targets]
    assert scored == list(range(1, n + 1)), f"scored {scored}; expected 1 to {n}, each once"
    for inputs, targets in found:
        assert len(inputs) <= length, f"a window reads {len(inputs)} tokens; at most {length} fit"
        assert inputs[-1] == targets[-1] - 1, f"inputs {inputs} end not before {targets[-1]}"


@checks("windows")
def test_the_context_is_read_and_not_scored():
    found = cut([7, 8, 9], [1, 2], 8, 4)
    assert found == [((7, 8, 9, 1), (1, 2))], f"windows {found} of context 7 8 9 and ids 1 2"
    found = cut(list(range(10)), [10], 4, 2)
    assert found == [((6, 7, 8, 9), (10,))], f"windows {found}; expected the last 4 of a context"


@checks("windows")
def test_later_windows_have_as_much_context_as_fits():
    lengths = [len(inputs) for inputs, _ in cut([0], list(range(1, 41)), 8, 2)]
    assert set(lengths) == {8}, f"windows read {lengths} tokens; all could read 8"


# ---- an interval of a share ----------------------------------------------------------------------


@checks("wilson")
@pytest.mark.parametrize(
    ("successes", "n", "interval"),
    # Newcombe 1998, table I, method 3.
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_published_intervals(successes, n, interval):
    agree(metrics.wilson(successes, n), interval, f"interval of {successes} of {n}", tolerance=6e-5)


@checks("wilson")
def test_its_ends_are_z_standard_errors_from_the_share():
    for q in metrics.wilson(8, 10, z=1.5):
        agree(abs(0.8 - q) / math.sqrt(q * (1 - q) / 10), 1.5, "standard errors from 0.8 to an end")


@checks("wilson")
def test_a_higher_level_is_wider_and_more_examples_are_narrower():
    def width(*arguments):
        low, high = metrics.wilson(*arguments)
        return high - low

    assert width(8, 10, 0.99) > width(8, 10, 0.9), "99% is no wider than 90%"
    agree(
        width(800, 1000) / width(8000, 10000), math.sqrt(10), "ratio of the widths", tolerance=0.01
    )


@checks("wilson")
def test_success_and_failure_are_mirror_images():
    low, high = metrics.wilson(3, 20)
    agree(metrics.wilson(17, 20), (1 - high, 1 - low), "the interval of 17 of 20")


@checks("wilson")
@pytest.mark.parametrize(("successes", "n"), [(5, 4), (-1, 4), (0, 0)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError):
        metrics.wilson(successes, n)


# ---- the minimum of random orders ----------------------------------------------------------------


def words(start: int, end: int) -> str:
    return " ".join(f"w{i}" for i in range(start, end))


def minima(text: str) -> list[int]:
    """By the definition, with Python's own integers."""
    a, b = dedupe.draw_orders()
    found = dedupe.shingles(text).tolist()
    return [min((h * s + t) % 2**32 for h in found) for s, t in zip(a.tolist(), b.tolist())]


@checks("minhash")
def test_each_number_is_the_smallest_place_of_a_shingle():
    got = dedupe.minhash(words(0, 12))
    n = dedupe.BANDS * dedupe.BAND_ROWS
    assert got.shape == (n,), f"shape {got.shape}, expected ({n},)"
    assert got.dtype == np.uint32, f"numbers are {got.dtype}, expected uint32"
    agree(got, minima(words(0, 12)), "the smallest places")


@checks("minhash")
def test_a_long_text_is_read_to_its_end():
    """Its shingles fill more than one block."""
    end = dedupe.BLOCK + 3000
    both = np.minimum(dedupe.minhash(words(0, 5000)), dedupe.minhash(words(4996, end)))
    agree(dedupe.minhash(words(0, end)), both, "the smaller of the minima of two parts")


@checks("minhash")
def test_two_texts_agree_as_often_as_they_share_shingles():
    """196 of 396 shingles are shared: J = 0.495. The standard deviation is 0.047."""
    same = dedupe.minhash(words(0, 300)) == dedupe.minhash(words(0, 200) + " " + words(400, 500))
    agree(same.mean(), 0.495, "share of equal numbers", tolerance=0.15)


@checks("minhash")
def test_other_texts_have_other_numbers():
    same = dedupe.minhash(words(0, 300)) == dedupe.minhash(words(1000, 1300))
    assert same.mean() < 0.05, f"{same.mean():.0%} of the numbers of two other texts are equal"


# ---- held-out words that training has ------------------------------------------------------------


def count(held_out: list[str], training: list[str]) -> list[list[int]]:
    overlap = splits.Overlap(held_out)
    for text in training:
        overlap.read(text)
    return overlap.count().tolist()


@checks("Overlap.count")
def test_a_run_of_13_words_covers_13_words():
    found = count([words(0, 20)], ["x y z " + words(3, 16) + " x y z"])
    assert found == [[13, 20]], f"counts {found} of 20 words, of which training has 3 to 15"


@checks("Overlap.count")
def test_runs_that_overlap_cover_a_word_once():
    found = count([words(0, 20)], [words(3, 18)])
    assert found == [[15, 20]], f"counts {found} of 20 words, of which training has 3 to 17"


@checks("Overlap.count")
def test_runs_at_both_ends_cover_everything():
    found = count([words(0, 20)], [words(0, 13), words(7, 20)])
    assert found == [[20, 20]], f"counts {found}; training has words 0 to 12, and 7 to 19"


@checks("Overlap.count")
def test_twelve_words_are_no_run():
    found = count([words(0, 20)], [words(3, 15)])
    assert found == [[0, 20]], f"counts {found}; training has only 12 words of a row"


@checks("Overlap.count")
def test_each_document_has_its_own_counts():
    found = count([words(50, 70), words(0, 5), words(0, 30)], [words(10, 40)])
    assert found == [[0, 20], [0, 0], [20, 30]], f"counts {found} of three documents"


# ---- examples that are alike ---------------------------------------------------------------------

PAIRS = np.repeat([True, True, True, True, False], 2)  # five files, alike inside


@checks("clustered_wilson")
def test_examples_that_are_alike_count_for_less():
    """Variance 5/4 (4 x 0.4^2 + 1.6^2) / 100 = 0.04, deff 0.04 / 0.016 = 2.5, t of 4: 2.7764."""
    got = metrics.clustered_wilson(PAIRS, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    agree(got, (0.222554, 0.982423), "8 of 10 right, in five files of two alike", tolerance=1e-5)


@checks("clustered_wilson")
def test_one_example_a_cluster_is_the_plain_interval():
    got = metrics.clustered_wilson(PAIRS, list("abcdefghij"))
    agree(got, metrics.wilson(8, 10), "the interval of ten files of one example")


@checks("clustered_wilson")
def test_clusters_that_are_more_even_than_chance_gain_nothing():
    got = metrics.clustered_wilson(np.array([True, False] * 5), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    agree(
        got, metrics.wilson(5, 10, z=2.776445), "five files with one of two right", tolerance=1e-5
    )


@checks("clustered_wilson")
def test_when_all_are_right_the_number_of_clusters_still_counts():
    right = np.ones(10, dtype=bool)
    got = metrics.clustered_wilson(right, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    agree(
        got, metrics.wilson(10, 10, z=2.776445), "ten right of ten, in five files", tolerance=1e-5
    )


@checks("clustered_wilson")
def test_a_single_cluster_is_refused():
    with pytest.raises(ValueError):
        metrics.clustered_wilson(PAIRS, [0] * 10)


@checks("clustered_wilson")
def test_its_intervals_contain_the_truth_about_as_often_as_they_say():
    """Files of 5 passages that are all right or all wrong, with probability 0.7."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        right = np.repeat(rng.random(30) < 0.7, 5)
        low, high = metrics.clustered_wilson(right, np.repeat(np.arange(30), 5))
        hits += low <= 0.7 <= high
    assert hits >= 276, f"{hits} of 300 intervals of 95% contain the truth; expected 276 or more"


# ---- what no exercise covers ---------------------------------------------------------------------


def test_a_model_is_scored_without_dropout():
    import torch

    from tinyfm.evaluate import likelihood
    from tinyfm.gpt import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 8, 1, 2, d_model=16, dropout=0.5, zero_init=False)).train()
    pair = [([1, 2], [3, 4, 5])]
    first, second = (likelihood.score_ids(model, pair)[0][0] for _ in range(2))
    agree(first, second, "the log-likelihood of a text, the second time")


def test_an_almost_equal_document_has_been_seen():
    seen = dedupe.Seen(megabytes=1)
    seen.add(dedupe.keys_of(words(0, 400), near=True))
    other = words(0, 200) + " another " + words(201, 400)
    found = seen.look_up(dedupe.keys_of(other, near=True))
    assert found == "a near duplicate", f"one word of 400 differs: {found}"


def test_confidence_that_is_too_low_does_not_make_up_for_one_that_is_too_high():
    """Five right at a confidence of 0.6 and three of five at 1: both bins are off by 0.4."""
    probabilities = np.array([[0.6, 0.4]] * 5 + [[1.0, 0.0]] * 5)
    labels = np.array([0] * 8 + [1] * 2)
    agree(metrics.calibration_error(probabilities, labels), 0.4, "calibration error")


def test_the_document_with_most_overlap_is_removed():
    counts = np.array([[0, 100], [90, 100], [0, 100], [2, 100]])
    found = splits.overlapping(counts, limit=0.005)
    assert found == [1, 3], f"documents {found} are removed; expected 1 and 3"
