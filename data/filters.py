"""Rules that drop a document from the training text, and masks for private data in the others.

A filter is a function from a page to True (keep it) or False (drop it). A mask is a pattern, and a
function that decides for each match whether it is replaced. To add one, write it below and enter it
in FILTERS or MASKS under the name that it has on the command line of prepare.py.

The quality rules are those of Gopher (Rae et al. 2021, appendix A.1.1). All but `stop_words` work
for any language; `stop_words` expects English, and is off by default. The rules count the words
between spaces, so for Chinese, Japanese or Thai leave out `words` and `word-length`. Left out of
Gopher's rules: the upper bound on words, which would drop books, and repeated n-grams, which take
more time than all the others.

The masks find private data of a fixed form, by patterns that take linear time. Names and postal
addresses have no such form, and are not found. Rather too much is masked than too little: a
version number of four parts, for instance, is masked as an IP address.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from data.report import MAX_REASONS, NAMES_SHOWN, OTHER_REASONS, printable

# ---- counts --------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts of the documents: found, used, dropped (by reason) and changed (by change).

    Unlike a Report it is small whatever it counts: it keeps a few names for each reason.
    """

    found: int = 0
    used: int = 0
    dropped: dict[str, list] = field(default_factory=dict)  # reason -> [count, first names]
    changed: dict[str, int] = field(default_factory=dict)  # change -> count

    def drop(self, reason: str, names: list[str], count: int = 1) -> None:
        """Count documents as dropped. `names` has some or all of their names."""
        reason = printable(reason)
        if len(self.dropped) >= MAX_REASONS and reason not in self.dropped:
            reason = OTHER_REASONS
        entry = self.dropped.setdefault(reason, [0, []])
        entry[0] += count
        entry[1] += map(printable, names[: NAMES_SHOWN - len(entry[1])])

    def change(self, what: str, count: int = 1) -> None:
        """Count changes of a kind."""
        self.changed[what] = self.changed.get(what, 0) + count

    def add(self, other: "Tally") -> None:
        """Add the counts of another tally."""
        self.found += other.found
        self.used += other.used
        for reason, (count, names) in other.dropped.items():
            self.drop(reason, names, count)
        for what, count in other.changed.items():
            self.change(what, count)

    def lines(self) -> list[str]:
        """The lines of the report."""
        parts = [f"{self.found:,} found, {self.used:,} used"]
        for reason, (count, names) in self.dropped.items():
            more = ", ..." if count > len(names) else ""
            parts.append(f"{count:,} dropped: {reason} ({', '.join(names)}{more})")
        return parts + [f"{count:,} {what}" for what, count in self.changed.items()]


# ---- quality -------------------------------------------------------------------------------------


class Page(NamedTuple):
    """A text, split once for all filters."""

    text: str
    words: list[str]  # split at white space
    lines: list[str]  # without blank lines, and without white space at either end


# The report shows the docstring of a filter that failed: "words, not at least 50 words".


def words(page: Page) -> bool:
    """at least 50 words"""
    return len(page.words) >= 50


def word_length(page: Page) -> bool:
    """words of 3 to 10 characters on average"""
    return 3 * len(page.words) <= sum(map(len, page.words)) <= 10 * len(page.words)


def letters(page: Page) -> bool:
    """a letter in 80 % of the words"""
    # isalpha() of the whole word is true for most words, and faster than a look at each letter.
    without = sum(not (word.isalpha() or any(map(str.isalpha, word))) for word in page.words)
    return without <= 0.2 * len(page.words)


def symbols(page: Page) -> bool:
    """at most one hash or ellipsis for ten words"""
    count = sum(map(page.text.count, ("#", "...", "…")))
    return count <= 0.1 * len(page.words)


def bullets(page: Page) -> bool:
    """at most 90 % of the lines begin with a bullet"""
    count = sum(line[0] in "-*•‣◦" for line in page.lines)
    return count <= 0.9 * len(page.lines)


def ellipses(page: Page) -> bool:
    """at most 30 % of the lines end with an ellipsis"""
    count = sum(line.endswith(("...", "…")) for line in page.lines)
    return count <= 0.3 * len(page.lines)


def repetition(page: Page) -> bool:
    """at most 30 % of the lines, and 20 % of the characters, repeat an earlier line"""
    repeated_lines = 0
    repeated_chars = 0
    for line, count in Counter(page.lines).items():
        if count > 1:
            repeated_lines += count - 1
            repeated_chars += (count - 1) * len(line)
    if repeated_lines > 0.3 * len(page.lines):
        return False
    return repeated_chars <= 0.2 * sum(map(len, page.lines))


def stop_words(page: Page) -> bool:
    """two of the words the, be, to, of, and, that, have, with"""
    listed = {"the", "be", "to", "of", "and", "that", "have", "with"}
    return len(listed & {*page.words}) >= 2


FILTERS: dict[str, Callable[[Page], bool]] = {
    "words": words,
    "word-length": word_length,
    "letters": letters,
    "symbols": symbols,
    "bullets": bullets,
    "ellipses": ellipses,
    "repetition": repetition,
    "stop-words": stop_words,
}
OFF_BY_DEFAULT = ("stop-words",)


def failed(text: str, names: tuple[str, ...]) -> str | None:
    """The reason to drop a text: the first of the named filters that fails; None if all pass."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    page = Page(text, text.split(), lines)
    for name in names:
        keep = FILTERS[name]
        if not keep(page):
            return f"{name}, not {keep.__doc__}"
    return None


# ---- private data --------------------------------------------------------------------------------

# CARD, IP and PHONE match their first character, and only then look at the characters before it.
# The other order, as in EMAIL, would look back at every position of the text, which is slower.
EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
CARD = re.compile(
    r"[0-9](?<![\w+(.-].)(?:[0-9]{12,18}|[0-9]{3}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{1,7})(?!\w)"
)
IP = re.compile(r"[0-9](?<![\w.].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![\w.]?\w)")
PHONE = re.compile(
    r"[+](?<!\w.)[0-9]{1,3}(?:[ .-]?\(?[0-9]{1,5}\)?){2,6}(?!\w)"  # with country code
    r"|[(0-9](?<![\w(+.-].)(?:(?<=\()[0-9]{3}\) ?|[0-9]{2}-)[0-9]{3}-[0-9]{4}(?![\w-])"  # USA
)


def is_card(found: re.Match) -> bool:
    """Whether the last digit is the right check digit (Luhn 1960, ISO/IEC 7812).

    From the right, every second digit is doubled; if that gives two digits, their sum is taken.
    The sum of all must be a multiple of ten.
    """
    digits = [int(digit) for digit in re.sub(r"\D", "", found[0])][::-1]
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return any(digits) and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def is_public(found: re.Match) -> bool:
    """Whether a match is an address of the public internet, rather than of a private network."""
    try:
        return ipaddress.ip_address(found[0]).is_global
    except ValueError:
        return False


def always(found: re.Match) -> bool:
    """Every match of the pattern is replaced."""
    return True


MASKS: dict[str, tuple[re.Pattern, Callable[[re.Match], bool]]] = {
    "email": (EMAIL, always),
    "card": (CARD, is_card),
    "ip": (IP, is_public),
    "phone": (PHONE, always),
}


def mask(text: str, name: str) -> tuple[str, int]:
    """The text with private data of one kind replaced by "[name]", and their number."""
    pattern, decide = MASKS[name]
    count = 0

    def replace(found: re.Match) -> str:
        nonlocal count
        if not decide(found):
            return found[0]
        count += 1
        return f"[{name}]"

    # EMAIL tries a match at almost every character, which is slow. So first look for an "@".
    if pattern is EMAIL and "@" not in text:
        return text, 0
    text = pattern.sub(replace, text)
    return text, count
