"""Your own text: a file, a folder with everything below it, or a glob such as "notes/**/*.md".

    .jsonl, .parquet     one document a row, in the field (or column) "text"
    .csv, .tsv, .json    the same, if they have "text"; otherwise as anything else
    anything else        one document a file, if it is UTF-8 text; its name does not matter

Each may also be compressed (.gz, .zst); see tables.py and reading.py. Hidden files and folders are
left out, and so are runs, models and prepared folders. A report counts the documents that were
found, used and skipped, with reasons. Files may come from strangers, so they are read with limits:
neither a line without an end nor a small file that expands to a huge one takes much memory or time.

    python -m data.files my-notes/
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from data import command, reading, tables
from data.report import Report, counted, printable, show


def version(path: str) -> str:
    """The `reading.fingerprint` of the files that `path` names."""
    return reading.fingerprint(reading.find(path))


def plain_tables(paths: list[Path], field: str = "text") -> list[Path]:
    """Those tables that do not have the field, and are read as plain text."""
    return [path for path in paths if tables.holds_documents(path, field) is None]


def note_plain_tables(paths: list[Path], field: str = "text") -> str:
    """A remark on the tables that are read as plain text; "" if there are none."""
    plain = plain_tables(paths, field)
    if not plain:
        return ""
    count = counted(len(plain), "tables")
    return f"read as plain text: {count} without {field!r} ({plain[0].name})"


def check_libraries(paths: list[Path]) -> None:
    """Raise ValueError if a file needs a library that is missing: now, not after hours of work."""
    if any(path.suffix.lower() in (".zst", ".parquet") for path in paths):
        reading.extra("pyarrow.parquet")


def candidates(
    path: Path, notes: Counter[str]
) -> Iterator[tuple[str, Callable[[], tuple[str, int]]]]:
    """Yield (name, function that reads it) of each document in a file.

    The function returns the text and the number of invalid sequences replaced in it. It raises
    ValueError or OSError if there is no text. `notes` counts what is odd.
    """
    if tables.holds_documents(path):
        for row in tables.rows(path, notes=notes):
            yield row.name, partial(tables.parse, row)
    else:
        yield path.as_posix(), partial(reading.read, path)


def documents(path: str, report: Report | None = None) -> Iterator[str]:
    """Yield the text of each file that `path` names; for a table, the text of each row.

    Raises ValueError if no file matches, or none of them can be used.
    """
    for _, text in named_documents(path, report):
        yield text


def named_documents(path: str, report: Report | None = None) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of what `documents` reads: the file, and for a table the row too."""
    if report is None:
        report = Report()
    found = reading.find(path, report)
    check_libraries(found)
    remark = note_plain_tables(found)
    if remark:
        report.note(remark)
    for file in found:
        notes: Counter[str] = Counter()
        for name, load in candidates(file, notes):
            report.found += 1
            try:
                text, replaced = load()
            except (ValueError, OSError) as error:
                report.skip(reading.reason_of(error), name)
                continue
            report.note_replaced(replaced, name)
            report.used += 1
            yield printable(name), text
        for note, count in notes.items():
            report.note(f"{count:,} {note} in {file.name}")
    if not report.used:
        raise ValueError(f"no text in {path!r}: {report}")


def look(path: str) -> None:
    """Print the size of the texts and the start of the first one."""
    report = Report()
    show(documents(path, report), report)


if __name__ == "__main__":
    command.run("files", __doc__, look, "PATH")
