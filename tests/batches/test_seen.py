"""The other picture of a question about two."""

import numpy as np
import pytest

from tinyfm.batches.seen import Comparison

VALUES = ["a", "b", "a", "c", "a", "b"]


@pytest.mark.parametrize("index", range(len(VALUES)))
@pytest.mark.parametrize("alike", [True, False])
def test_a_partner_is_alike_or_not_and_each_is_as_likely(index, alike):
    draws = np.stack((np.full(60, 0.5 - 0.01 * alike), np.arange(60) / 60), axis=1)
    found = Comparison("same?", VALUES).partners(np.full(60, index), draws)
    others = [i for i in range(len(VALUES)) if i != index]
    wanted = [i for i in others if (VALUES[i] == VALUES[index]) == alike] or others
    assert {i: 60 // len(wanted) for i in wanted} == dict(
        zip(*np.unique(found, return_counts=True))
    )


def test_a_picture_alone_has_none_that_is_alike():
    found = Comparison("same?", VALUES).has_like(np.arange(len(VALUES)))
    assert found.tolist() == [True, True, True, False, True, True]


def test_where_all_are_alike_the_answer_is_yes():
    comparison = Comparison("same?", ["a", "a"])
    assert comparison.partners(np.array([0, 1]), np.array([[0.9, 0.9]] * 2)).tolist() == [1, 0]
    assert comparison.answer(0, 1) == "yes"
