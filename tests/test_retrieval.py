"""Retrieval: BM25 is its formula, exact search is exact, rankings are joined as in the papers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyfm.retrieval import BM25, add_scores, bm25_score, fuse, nearest, reciprocal_rank, words_of

PASSAGES = [
    "The cat sat on the mat.",
    "A cat, a cat and again a cat: three cats?",
    "Dogs chase the cat over a very long field of grass and corn and wheat.",
    "Nothing of the kind",
    "",
]


def test_words_are_in_lower_case_and_without_marks():
    assert words_of("It's Ünder_score, 3.5!") == ["it", "s", "ünder_score", "3", "5"]


def test_a_score_by_hand():
    """One word, which two of three passages contain; lengths 1, 2 and 3, so their mean is 2."""
    passages = ["a", "b a", "c c c"]
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    expected = [idf * 2.2 / (1 + 1.2 * (0.25 + 0.75 * length / 2)) for length in (1, 2)]
    assert BM25(passages).scores("A").tolist() == pytest.approx([*expected, 0])


words = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=8).map(" ".join)


@settings(max_examples=30, deadline=None)
@given(st.lists(words, min_size=1, max_size=6), words, st.floats(0, 3), st.floats(0, 1))
def test_the_lists_give_the_scores_of_the_formula(passages, question, k1, b):
    if not any(passages):
        passages = [*passages, "a"]
    scores = BM25(passages, k1, b).scores(question)
    expected = [bm25_score(question, passage, passages, k1, b) for passage in passages]
    assert scores.tolist() == pytest.approx(expected)


def test_the_best_come_first_and_what_has_no_word_is_left_out():
    index = BM25(PASSAGES)
    assert index.search("Which cat?", 9) == [1, 0, 2]
    assert index.search("cat", 1) == [1]
    assert index.search("unheard of", 9) == [3, 2]  # "of"; the shorter passage first
    assert index.search("xyz ?!", 9) == []
    with pytest.raises(ValueError, match="no passage"):
        BM25([])
    with pytest.raises(ValueError, match=r"k1 is -1 and b is 0.75"):
        BM25(PASSAGES, k1=-1)


@pytest.mark.parametrize("at_once", [1, 70, 1 << 20])
@pytest.mark.parametrize(("Q", "N", "k"), [(3, 50, 7), (1, 4, 9), (5, 1, 1)])
def test_search_in_chunks_is_exact(Q, N, k, at_once):
    g = torch.Generator().manual_seed(0)
    questions = torch.randn(Q, 8, generator=g)
    passages = torch.randn(N, 8, generator=g)
    scores, numbers = nearest(questions, passages, k, at_once)
    expected = (questions @ passages.T).topk(min(k, N), 1)
    assert numbers.equal(expected.indices)
    torch.testing.assert_close(scores, expected.values)


def test_reciprocal_ranks():
    assert fuse([[7, 8, 9], [9, 7]], 2) == [7, 9]  # 1/61 + 1/62 over 1/63 + 1/61
    assert fuse([[1], [2]], 5) == [1, 2]
    assert fuse([[1], [2]], 5, (1.0, 1.5)) == [2, 1]
    words, cosines = np.array([3.0, 2.0, 0.0]), np.array([0.0, 0.5, 0.1])
    assert add_scores(words, cosines, 1, 3) == [0, 1, 2]
    assert add_scores(words, cosines, 4, 2) == [1, 0]
    assert reciprocal_rank([4, 5, 6], 6) == pytest.approx(1 / 3)
    assert reciprocal_rank([*range(10), 11], 11) == 0
