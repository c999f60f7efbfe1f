"""What keeps a document out of the training text, and what is blotted out in those that stay.

A filter is a function from a page to True (keep) or False; a mask is a pattern, and a function from
what it found to True (replace) or False. Add one below, and it has a name on the command line of
prepare.py.

The quality rules are those of Gopher (Rae et al. 2021, appendix A.1.1) that ask for no particular
language, save `stop_words`, which asks for English and is off unless it is named. They count words
between spaces: for Chinese, Japanese or Thai leave out `words` and `word_length`. Left out: its
upper bound on words, which would drop books, and its repeated n-grams, which cost more than all.

Masks find what has a form of its own, by patterns that take linear time; names and addresses have
none. They are cautious: a version number of four parts is masked as an IP address would be.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from data.report import NAMES_SHOWN

# ---- counts --------------------------------------------------------------------------------------

MAX_REASONS = 40  # strangers' files must not fill the memory with reasons of their own


@dataclass
class Tally:
    """How many documents were found and used, how many dropped for which reason, with a few names,
    and in how many something was changed. Its size has a bound, whatever it counts."""

    found: int = 0
    used: int = 0
    dropped: dict[str, list] = field(default_factory=dict)  # reason -> [count, first names]
    changed: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, names: list[str], count: int = 1) -> None:
        full = len(self.dropped) >= MAX_REASONS and reason not in self.dropped
        entry = self.dropped.setdefault("other reasons" if full else reason, [0, []])
        entry[0] += count
        entry[1] += names[: NAMES_SHOWN - len(entry[1])]

    def change(self, what: str, count: int = 1) -> None:
        self.changed[what] = self.changed.get(what, 0) + count

    def add(self, other: "Tally") -> None:
        self.found, self.used = self.found + other.found, self.used + other.used
        for reason, (count, names) in other.dropped.items():
            self.drop(reason, names, count)
        for what, count in other.changed.items():
            self.change(what, count)

    def lines(self) -> list[str]:
        parts = [f"{self.found:,} found, {self.used:,} used"]
        for reason, (count, names) in self.dropped.items():
            more = ", ..." if count > len(names) else ""
            parts.append(f"{count:,} dropped: {reason} ({', '.join(names)}{more})")
        return parts + [f"{count:,} {what}" for what, count in self.changed.items()]


# ---- quality -------------------------------------------------------------------------------------


class Page(NamedTuple):
    """A text, cut up once for all filters."""

    text: str
    words: list[str]  # between white space
    lines: list[str]  # that are not blank, without the white space around them


def words(page: Page) -> bool:
    """at least 50 words"""
    return len(page.words) >= 50


def word_length(page: Page) -> bool:
    """words of 3 to 10 characters on average"""
    return 3 * len(page.words) <= sum(map(len, page.words)) <= 10 * len(page.words)


def letters(page: Page) -> bool:
    """a letter in 80 % of the words"""
    without = sum(not (word.isalpha() or any(map(str.isalpha, word))) for word in page.words)
    return without <= 0.2 * len(page.words)


def symbols(page: Page) -> bool:
    """at most one hash or ellipsis for ten words"""
    count = sum(map(page.text.count, ("#", "...", "…")))
    return count <= 0.1 * len(page.words)


def bullets(page: Page) -> bool:
    """at most 90 % of the lines begin with a bullet"""
    return sum(line[0] in "-*•‣◦" for line in page.lines) <= 0.9 * len(page.lines)


def ellipses(page: Page) -> bool:
    """at most 30 % of the lines end with an ellipsis"""
    return sum(line.endswith(("...", "…")) for line in page.lines) <= 0.3 * len(page.lines)


def repetition(page: Page) -> bool:
    """at most 30 % of the lines, and 20 % of the characters, repeat an earlier line"""
    again = [(count - 1, len(line)) for line, count in Counter(page.lines).items() if count > 1]
    chars = sum(count * length for count, length in again)
    few = sum(count for count, _ in again) <= 0.3 * len(page.lines)
    return few and chars <= 0.2 * sum(map(len, page.lines))


def stop_words(page: Page) -> bool:
    """two of the words the, be, to, of, and, that, have, with"""
    return len({"the", "be", "to", "of", "and", "that", "have", "with"} & {*page.words}) >= 2


FILTERS: dict[str, Callable[[Page], bool]] = {
    "words": words, "word-length": word_length, "letters": letters, "symbols": symbols,
    "bullets": bullets, "ellipses": ellipses, "repetition": repetition, "stop-words": stop_words,
}  # fmt: skip


def failed(text: str, names: tuple[str, ...]) -> str | None:
    """The first of the filters that the text does not pass, and what it asks for; None if none."""
    page = Page(text, text.split(), [line for line in map(str.strip, text.split("\n")) if line])
    lacking = (name for name in names if not FILTERS[name](page))
    return next((f"{name}, not {FILTERS[name].__doc__}" for name in lacking), None)


# ---- private data --------------------------------------------------------------------------------

# Each begins with the characters that it begins with, and then looks back: faster than in order.
EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
CARD = re.compile(
    r"[0-9](?<![\w+(.-].)(?:[0-9]{12,18}|[0-9]{3}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{1,7})(?!\w)"
)
IP = re.compile(r"[0-9](?<![\w.].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![\w.]?\w)")
PHONE = re.compile(
    r"[+](?<!\w.)[0-9]{1,3}(?:[ .-]?\(?[0-9]{1,5}\)?){2,6}(?!\w)"  # with the country
    r"|[(0-9](?<![\w(+.-].)(?:(?<=\()[0-9]{3}\) ?|[0-9]{2}-)[0-9]{3}-[0-9]{4}(?![\w-])"  # USA
)


def is_card(found: re.Match) -> bool:
    """Does the last digit check the others? Every second is doubled (Luhn 1960, ISO/IEC 7812)."""
    digits = [int(digit) for digit in re.sub(r"\D", "", found[0])][::-1]
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return any(digits) and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def is_public(found: re.Match) -> bool:
    """Is it the address of a machine that can be reached, not of a house's own network?"""
    try:
        return ipaddress.ip_address(found[0]).is_global
    except ValueError:
        return False


MASKS: dict[str, tuple[re.Pattern, Callable[[re.Match], bool]]] = {
    "email": (EMAIL, bool), "card": (CARD, is_card), "ip": (IP, is_public), "phone": (PHONE, bool),
}  # fmt: skip


def mask(text: str, name: str) -> tuple[str, int]:
    """The text with "[name]" for each thing of that kind, and how many there were."""
    pattern, decide = MASKS[name]
    count = 0

    def replace(found: re.Match) -> str:
        nonlocal count
        count += (private := decide(found))
        return f"[{name}]" if private else found[0]

    if pattern is not EMAIL or "@" in text:  # that one may begin anywhere, which is slow
        text = pattern.sub(replace, text)
    return text, count
