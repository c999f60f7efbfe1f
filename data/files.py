"""Your own text: a file, a folder with everything below it, or a glob such as "notes/**/*.md".

Any file that decodes as UTF-8 is text, whatever its name ends with; hidden files and folders are
left alone. One document a file. A report says what was found, used and skipped, and why.

    python -m data.files my-notes/
"""

import codecs
import glob
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from data.report import Report, show

HEAD_BYTES = 1 << 16  # enough to tell a film from a letter without reading the film
# Typing errors and old encodings leave a few bad bytes; with more it is some other encoding.
MAX_REPLACED_FRACTION = 0.01
SKIP_FOLDERS = {"__pycache__", "node_modules"}
REPLACEMENT = "\ufffd"


def find(path: str) -> list[Path]:
    """The files that `path` names, sorted. Raises ValueError if there is none."""
    path = os.path.expanduser(path)
    if os.path.isfile(path):
        return [Path(path)]
    if os.path.isdir(path):
        found = []
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = [s for s in subfolders if s[0] != "." and s not in SKIP_FOLDERS]
            found += [Path(folder, name) for name in names if name[0] != "."]
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
    if not found:
        raise ValueError(
            f"no file matches {path!r}: give a text file, a folder with text files, "
            f'a glob in quotes such as "notes/*.txt", or the name of a data set'
        )
    return sorted(found, key=Path.as_posix)


def decode(source: bytes) -> tuple[str, int]:
    """Turn bytes into (text, number of invalid sequences replaced); newlines become "\\n".

    Raises ValueError with the reason where the bytes are not UTF-8 text.
    """
    if source.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("UTF-16, save it as UTF-8")
    if b"\0" in source:
        raise ValueError("binary, it has NUL bytes")
    text = source.decode("utf-8-sig", "replace")
    replaced = text.count(REPLACEMENT) - source.count(REPLACEMENT.encode("utf-8"))
    if replaced > MAX_REPLACED_FRACTION * len(text):
        raise ValueError("not UTF-8, convert it")
    if not text.strip():
        raise ValueError("empty")
    return text.replace("\r\n", "\n").replace("\r", "\n"), replaced


def read(path: Path) -> tuple[str, int]:
    """`decode` of a file; a large binary file is refused by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
        # NUL bytes anywhere refuse the file, so do not read on where the head has one.
        return decode(head if b"\0" in head else head + file.read())


def version(path: str) -> str:
    """What the documents depend on: the files' names, sizes and times of change."""
    digest = hashlib.sha256()
    for name in find(path):
        stat = name.stat()
        digest.update(f"{name.as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return f"files-1 {digest.hexdigest()}"


def documents(path: str, report: Report | None = None) -> Iterator[str]:
    """Yield the text of each file that `path` names.

    Raises ValueError if no file matches, or none of them can be used.
    """
    report = report if report is not None else Report()
    for name in find(path):
        report.found += 1
        try:
            text, replaced = read(name)
        except (ValueError, OSError) as error:
            report.skip(getattr(error, "strerror", None) or str(error), name.as_posix())
            continue
        if replaced:
            report.notes.append(f"{replaced:,} invalid bytes replaced in {name.as_posix()}")
        report.used += 1
        yield text
    if not report.used:
        raise ValueError(f"no text in {path!r}: {report}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m data.files PATH    (a file, a folder, or a glob in quotes)")
    report = Report()
    try:
        show(documents(sys.argv[1], report), report)
    except ValueError as error:
        sys.exit(str(error))
