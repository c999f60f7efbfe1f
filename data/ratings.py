"""Sentences that some twenty people each have rated: how good or bad is what it says, -4 to 4?

They were collected for VADER (Hutto and Gilbert 2014), and its source distribution holds them:

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d data/cache/packages
    python -m data.ratings films

    films       10,605 snippets of film reviews (from Pang and Lee 2005)
    products     3,708 sentences of 300 product reviews
    editorials   5,190 sentences of some 500 editorials of the New York Times
    tweets       4,200 tweets

As a task of classification, the label is "positive" or "negative": the sign of the mean rating.
Sentences whose mean is 0 are left out. The raters do not agree: `agreement` says how often one
rater has the sign of the mean of all the others. That is what a person would reach on this task.

Near duplicates are left out before the split. The split is by reviews and editorials; films and
tweets do not say what they are from, so there each sentence is alone. Held-out sentences that
repeat training text are left out (splits.py). Of the tweets, 196 are left out because the file of
texts and the file of ratings give the same number different ratings.

Licence: MIT (the package). The texts are of their authors, and were collected for research.
"""

import html
import json
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from data import command, dedupe, wheels
from data.labelled import Passage
from data.report import Report, counted
from data.splits import TEST, VAL, repeating, split_of

PACKAGE = wheels.Package(
    name="vaderSentiment",
    version="3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    licence="MIT",
)
MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TEXTS = "hutto_ICWSM_2014/{}_GroundTruth.txt"  # lines: number, mean rating, text
RATINGS = "hutto_ICWSM_2014/{}_anonDataRatings.txt"  # number, mean, standard deviation, [ratings]
SETS = {
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "tweets": "tweets",
}
HELD_OUT_SHARE = 0.2  # of the reviews or sentences, half for validation and half for test
MOST_OFF = 0.01  # by which two means of one sentence may differ, as they are rounded
INDEX_MB = 16


class Rated(NamedTuple):
    """A sentence with the ratings of all raters, integers from -4 to 4."""

    text: str
    ratings: tuple[int, ...]
    source: str  # the review or editorial that it is from, or itself
    split: str

    @property
    def mean(self) -> float:
        return fmean(self.ratings)


def read_lines(member: str, parts: int) -> Iterator[list[str]]:
    """The fields of each line of a file of the data set."""
    text = wheels.read(PACKAGE, MEMBER, member).decode("utf-8-sig")
    for line in text.splitlines():
        fields = line.split("\t", parts - 1)
        if len(fields) == parts:
            yield fields


def sentences(name: str, report: Report) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield (number, text, ratings) of each sentence whose two files agree."""
    ratings = {}
    for number, _, _, listed in read_lines(RATINGS.format(SETS[name]), 4):
        ratings[number] = tuple(json.loads(listed))
    for number, mean, text in read_lines(TEXTS.format(SETS[name]), 3):
        report.found += 1
        own = ratings.get(number, ())
        if not own or abs(fmean(own) - float(mean)) > MOST_OFF:
            report.skip("other ratings in the second file", f"{name} {number}")
            continue
        yield number, " ".join(html.unescape(text).split()), own


def rows(name: str, report: Report | None = None) -> list[Rated]:
    """The sentences of one of SETS.

    Raises ValueError for another name, and, with a command, if the package is not there.
    """
    if name not in SETS:
        raise ValueError(f"there are no ratings of {name!r}: choose one of {', '.join(SETS)}")
    if report is None:
        report = Report()
    report.note(f"licence: {PACKAGE.licence}")
    found = []
    seen = dedupe.Seen(INDEX_MB)
    for number, text, ratings in sentences(name, report):
        reason = dedupe.add_new(seen, text)
        if reason:
            report.skip(f"{reason} of a sentence before", f"{name} {number}")
            continue
        document, _, sentence = number.partition("_")
        source = f"{name} {document}" if sentence else text
        found.append(Rated(text, ratings, source, split_of(source, HELD_OUT_SHARE)))
    found = without_overlap(found, report)
    report.used += len(found)
    return found


def without_overlap(found: Sequence[Rated], report: Report) -> list[Rated]:
    """Leave out held-out sentences until less than splits.LIMIT of the rest repeats training."""
    removed, shares = repeating([row.text for row in found], [row.split for row in found])
    for i in sorted(removed):
        report.skip("held out, but training has 13-word runs of it", found[i].text[:40])
    report.note(f"{shares[VAL]:.2%} of validation and {shares[TEST]:.2%} of test in such runs")
    return [row for i, row in enumerate(found) if i not in removed]


def agreement(found: Sequence[Rated]) -> float:
    """The share of ratings that have the sign of the mean of all others of their sentence.

    Where a rating or that mean is 0, half counts: a guess would be right as often.
    """
    points = 0.0
    count = 0
    for row in found:
        own = np.array(row.ratings)
        others = (own.sum() - own) / (len(own) - 1)
        product = own * others
        points += float((product > 0).sum() + (product == 0).sum() / 2)
        count += len(own)
    return points / count


def version() -> str:
    """A name for the exact examples: it changes if they do."""
    return f"ratings-1 {PACKAGE.sha256}"


def examples(name: str, report: Report | None = None) -> list[Passage]:
    """The sentences of a set, with the label "positive" or "negative"; errors as those of `rows`.

    Sentences with a mean rating of 0 are left out.
    """
    if report is None:
        report = Report()
    found = []
    for row in rows(name, report):
        if not row.mean:
            report.used -= 1
            report.skip("a mean rating of 0", row.text[:40])
            continue
        label = "positive" if row.mean > 0 else "negative"
        found.append(Passage(row.text, (label,), row.split, row.source))
    return found


def look(name: str) -> None:
    """Print a few sentences with their ratings, and how far the raters agree."""
    report = Report()
    found = rows(name, report)
    for row in found[:: len(found) // 5]:
        print(f"{row.mean:5.2f}  {row.text}\n       {' '.join(map(str, row.ratings))}")
    sources = len({row.source for row in found})
    print(f"{counted(len(found), 'sentences')} from {sources:,} sources; {report}")
    print(f"a rater has the sign of the mean of the others: {agreement(found):.1%}")


if __name__ == "__main__":
    command.run("ratings", __doc__, look, "SET")
