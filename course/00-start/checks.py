"""Checks of lesson 0."""

import pytest

from course.lessons import checks
from tinyfm.common.units import size


def same(n: float, expected: str) -> None:
    got = size(n)
    assert got == expected, f"size({n}): expected {expected!r}, got {got!r}"


@checks("size")
def test_small_sizes_have_three_digits():
    same(1.5e6, "1.5 MB")
    same(1_234_567, "1.23 MB")
    same(0, "0 MB")


@checks("size")
def test_from_ten_megabytes_on_there_are_no_decimals():
    same(10e6, "10 MB")
    same(563_400_000, "563 MB")


@checks("size")
def test_a_megabyte_is_a_million_bytes():
    same(2_000_000, "2 MB")


@checks("size")
def test_a_gibibyte_is_1024_to_the_third_power():
    same(2**30, "1.00 GiB")
    same(3 * 2**29, "1.50 GiB")


@checks("size")
def test_below_a_gibibyte_the_unit_is_megabytes():
    same(2**30 - 1, "1074 MB")


@pytest.mark.parametrize("n", [1, 10**9, 10**12])
def test_every_size_names_a_unit(n):
    assert size(n).endswith(("MB", "GiB")), f"size({n}) is {size(n)!r}; expected MB or GiB"
