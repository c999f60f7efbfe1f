"""Bytes and seconds in words."""

import pytest

from tinyfm.common import units


@pytest.mark.parametrize(
    ("n", "words"),
    [(0, "0 MB"), (1.5e6, "1.5 MB"), (563e6, "563 MB"), (2**30, "1.00 GiB"), (2**33, "8.00 GiB")],
)
def test_bytes(n, words):
    assert units.size(n) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 seconds"),
        (1, "1 second"),
        (89, "89 seconds"),
        (150, "2.5 minutes"),
        (1900, "32 minutes"),
        (3 * 3600, "3 hours"),
        (60 * 3600, "2.5 days"),
        (1e11, "3,169 years"),
    ],
)
def test_seconds(seconds, words):
    assert units.duration(seconds) == words
