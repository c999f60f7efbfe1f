"""Tiny Shakespeare: 1.1 MB of plays, the text on which small language models are compared.

From Andrej Karpathy's char-rnn (2015). One document, so the split is by position: at the default
fraction, the same first nine tenths that nanoGPT trains on.

    python -m data.shakespeare
"""

import sys
from collections.abc import Iterator

from data.download import DOWNLOADS, download
from data.report import Report, show

URLS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
)
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PATH = DOWNLOADS / "tinyshakespeare.txt"


def version() -> str:
    """What the documents depend on."""
    return f"shakespeare-1 {SHA256}"


def documents(report: Report | None = None) -> Iterator[str]:
    """Yield the text. Raises ConnectionError if it is not here and cannot be downloaded."""
    report = report if report is not None else Report()
    text = download(URLS, PATH, SHA256).read_text(encoding="utf-8")
    report.found += 1
    report.used += 1
    yield text


if __name__ == "__main__":
    report = Report()
    try:
        show(documents(report), report)
    except (ConnectionError, ValueError) as error:
        sys.exit(str(error))
