"""Bytes and seconds in words."""

from __future__ import annotations


def size(n: float) -> str:
    """Bytes in words: "1.23 MB", "563 MB", "1.50 GiB".

    A MB is a million bytes; below 10 MB it has up to three digits, from there on no decimals. From
    1 GiB = 2**30 bytes on, the unit is GiB with two decimals.
    """
    if n < 2**30:
        return f"{n / 1e6:.3g} MB" if n < 10e6 else f"{n / 1e6:.0f} MB"
    return f"{n / 2**30:.2f} GiB"


UNITS = (  # name, seconds, largest number
    ("second", 1, 90),
    ("minute", 60, 90),
    ("hour", 3600, 48),
    ("day", 86400, 730),
    ("year", 365.25 * 86400, float("inf")),
)


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use, such as "40 seconds" or "2.5 hours"."""
    name, number = next((n, seconds / each) for n, each, most in UNITS if seconds / each < most)
    text = f"{number:,.0f}" if number >= 10 or name == "second" else f"{number:.2g}"
    return f"{text} {name}" if text == "1" else f"{text} {name}s"
