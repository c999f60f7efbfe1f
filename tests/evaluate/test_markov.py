"""Markov models of tokens, the baseline of texts."""

import numpy as np
import pytest

from tinyfm.evaluate.markov import Markov, choose_order


def test_probabilities_by_hand():
    """Of 0 1 0 1 0 2: the alphabet has three tokens and a place for others.

    Order 0: n(0) = 3, D = 3, so p = (3 + 3/4) / 9. After 0 came 1 twice and 2 once, so at order 1
    p(1 | 0) = (2 + 2 p(1)) / 5. Token 7 is new: p = 3/4 / 9 at order 0, and after 1, which had 0
    alone behind it, 1/3 of that.
    """
    model = Markov(np.array([0, 1, 0, 1, 0, 2]), 1)
    one = (2 + 3 / 4) / 9
    new = 3 / 4 / 9
    expected = [[one, new], [(2 + 2 * one) / 5, (0 + 1 * new) / 3]]
    assert np.exp(-model.nats(np.array([0, 1, 7]))) == pytest.approx(np.array(expected))


def test_the_probabilities_of_all_tokens_sum_to_one():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, size=300)
    model = Markov(tokens, 3)
    contexts = [[0, 1, 2], [4, 4, 4], [9, 9, 9]]  # the last one is new
    for context in contexts:
        p = [np.exp(-model.nats(np.array([*context, c]))[:, -1]) for c in (0, 1, 2, 3, 4, 99)]
        assert np.sum(p, axis=0) == pytest.approx(np.ones(4))


def test_order_and_texts_of_a_language_with_memory_two():
    """The third token of each triple is the sum of the two before it, modulo 3."""
    rng = np.random.default_rng(0)

    def draw(n):
        rows = []
        for a, b in rng.integers(3, size=(n, 2)):
            rows += [9, a, b, (a + b) % 3]
        return np.array([*rows, 9])

    model = Markov(draw(2000), 6)
    order = choose_order(model, draw(500))
    assert order >= 2
    rows = model.write(200, start=9, end=9, longest=8, order=order)
    right = [len(row) == 3 and row[2] == (row[0] + row[1]) % 3 for row in rows]
    assert np.mean(right) > 0.95
    assert rows == model.write(200, start=9, end=9, longest=8, order=order)
    assert max(map(len, model.write(5, start=9, end=9, longest=2, order=0))) <= 2
