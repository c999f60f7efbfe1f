"""Tiny Shakespeare: 1.1 MB of plays, the text on which small language models are compared.

It comes from Andrej Karpathy's char-rnn (2015). It is a single document, so the splits are parts of
it. With `--data.val-fraction 0.1`, the default, training reads the same first nine tenths as in
nanoGPT; validation and test are halves of the last tenth.

    python -m data.shakespeare
"""

from collections.abc import Iterator

from data import command
from data.download import DOWNLOADS, download
from data.report import Report, show
from data.splits import Document

URLS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
)
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PATH = DOWNLOADS / "tinyshakespeare.txt"


def version() -> str:
    """A name for the exact documents: it changes if they do."""
    return f"shakespeare-1 {SHA256}"


def documents(report: Report | None = None) -> Iterator[Document]:
    """Yield the text, which is downloaded the first time.

    Raises ConnectionError if the download fails, ValueError if the stored file is another one.
    """
    if report is None:
        report = Report()
    text = download(URLS, PATH, SHA256).read_text(encoding="utf-8")
    report.found += 1
    report.used += 1
    yield Document(text)


def look() -> None:
    """Print the size of the data set and the start of its first document."""
    report = Report()
    show((document.text for document in documents(report)), report)


if __name__ == "__main__":
    command.run("shakespeare", __doc__, look)
