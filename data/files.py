"""Your own text: a file, a folder with everything below it, or a glob such as "notes/**/*.md".

    .jsonl, .jsonl.zst   a JSON object a line, one document each, in its field "text"
    .parquet             a document a row, in its column "text"
    anything else        a document a file, if it decodes as UTF-8, whatever its name ends with

Hidden files and folders are left alone. A report says what was found, used and skipped, and why.
What strangers made is read with limits: a line that never ends, or a small file that expands
without end, costs neither memory nor an evening.

    python -m data.files my-notes/
"""

import codecs
import glob
import hashlib
import importlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple

from data.report import Report, show

HEAD_BYTES = 1 << 16  # enough to tell a film from a letter without reading the film
# Typing errors and old encodings leave a few bad bytes; with more it is some other encoding.
MAX_REPLACED_FRACTION = 0.01
SKIP_FOLDERS = {"__pycache__", "node_modules"}
REPLACEMENT = "\ufffd"
TABLES = (".jsonl", ".jsonl.zst", ".parquet")  # many documents a file
MAX_LINE_BYTES, PARQUET_ROWS = 1 << 22, 16  # their product may be held at once
TOO_LONG = f"longer than {MAX_LINE_BYTES >> 20} MiB"
# Zstandard writes text in a fifth to a tenth, and can write 32,000 equal bytes as one.
MAX_EXPANSION, FREE_BYTES = 500, 1 << 26


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


def parse_json(line: str) -> object:
    """The value of a line of JSON; None if it is not JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return None


# ---- many documents in a file --------------------------------------------------------------------


class Row(NamedTuple):
    """A document that was not parsed yet."""

    name: str
    kind: str  # "text"; "json", an object with the text; "unreadable", the reason in place of it
    content: bytes


def extra(module: str) -> ModuleType:
    """A library that only some data need. Raises ValueError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        advice = "pip install -r data/requirements.txt"
        raise ValueError(f"these data need {module.split('.')[0]}, run: {advice}") from error


def lines(stream: BinaryIO, limit: float) -> Iterator[bytes | None]:
    """The lines of a stream; None for one of more than MAX_LINE_BYTES, which is never held whole.

    Raises ValueError when it has given more than `limit` bytes.
    """
    too_long, size = False, 0
    while line := stream.readline(MAX_LINE_BYTES):
        size += len(line)
        if size > limit:
            raise ValueError(f"expands more than {MAX_EXPANSION}-fold")
        ends = line.endswith(b"\n") or len(line) < MAX_LINE_BYTES
        if ends:
            yield None if too_long else line
        too_long = not ends
    if too_long:
        yield None


def unpacked(file: BinaryIO) -> BinaryIO:
    """The content of a .zst; it takes a window of at most 128 MiB, as the program zstd does."""
    return io.BufferedReader(extra("pyarrow").CompressedInputStream(file, "zstd"), 1 << 20)


def json_rows(path: Path) -> Iterator[Row]:
    """The lines of a .jsonl or .jsonl.zst. Raises ValueError or OSError where it breaks off."""
    packed = path.suffix.lower() == ".zst"
    limit = MAX_EXPANSION * path.stat().st_size + FREE_BYTES if packed else float("inf")
    with open(path, "rb") as file:
        stream = unpacked(file) if packed else file
        for number, line in enumerate(lines(stream, limit), 1):
            name = f"{path.as_posix()}:{number}"
            if line is None:
                yield Row(name, "unreadable", TOO_LONG.encode())
            elif not line.isspace():
                yield Row(name, "json", line)


def parquet_rows(path: Path, field: str) -> Iterator[Row]:
    """The rows of a .parquet, a few at a time. Raises ValueError or OSError where it breaks off."""
    arrow, parquet = extra("pyarrow"), extra("pyarrow.parquet")
    with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        columns = {column.name: column.type for column in file.schema_arrow}
        if field not in columns:
            raise ValueError(f"no column {field!r} among {', '.join(columns)}")
        kind = getattr(columns[field], "value_type", columns[field])  # of a dictionary
        if str(kind) not in ("string", "large_string"):
            raise ValueError(f"the column {field!r} holds {kind}, not text")
        batches = file.iter_batches(PARQUET_ROWS, columns=[field])
        # As bytes: the library would stop at the first that are not UTF-8.
        texts = (batch[0].cast(arrow.string()).cast(arrow.binary()) for batch in batches)
        for number, text in enumerate(value.as_py() or b"" for batch in texts for value in batch):
            name, long = f"{path.as_posix()}:{number}", len(text) > MAX_LINE_BYTES
            yield Row(name, "unreadable", TOO_LONG.encode()) if long else Row(name, "text", text)


def is_table(path: Path) -> bool:
    return path.name.lower().endswith(TABLES)


def to_the_end(path: Path, found: Iterator[Row]) -> Iterator[Row]:
    """The rows, and where reading them fails a last one that says why."""
    try:
        yield from found
    except (ValueError, OSError, NotImplementedError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).split("\n")[0]
        yield Row(path.as_posix(), "unreadable", reason.encode("utf-8", "replace"))


def rows(path: Path, field: str = "text") -> Iterator[Row]:
    """The documents of a table; where it breaks off, a last one that says why."""
    columns = path.suffix.lower() == ".parquet"
    yield from to_the_end(path, parquet_rows(path, field) if columns else json_rows(path))


def parse(row: Row, field: str = "text") -> tuple[str, int]:
    """(text, number of invalid sequences replaced). Raises ValueError with the reason for none."""
    if row.kind == "unreadable":
        raise ValueError(row.content.decode("utf-8"))
    if row.kind == "text":
        return decode(row.content)
    try:
        found = json.loads(row.content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8, convert it") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    if field not in found:
        raise ValueError(f"no field {field!r} among {', '.join(sorted(found)[:8])}")
    if not isinstance(found[field], str):
        raise ValueError(f"the field {field!r} is not text")
    half = found[field].encode("utf-16", "surrogatepass")  # of a UTF-16 pair: becomes U+FFFD
    return decode(half.decode("utf-16", "replace").encode("utf-8"))


# ---- all of them ---------------------------------------------------------------------------------


def check_libraries(paths: list[Path]) -> None:
    """Raise ValueError now, rather than in the middle, if a file needs a library that is absent."""
    if any(path.suffix.lower() != ".jsonl" and is_table(path) for path in paths):
        extra("pyarrow.parquet")


def fingerprint(found: list[Path]) -> str:
    """What the documents depend on: the files' names, sizes and times of change."""
    digest = hashlib.sha256()
    for name in found:
        stat = name.stat()
        digest.update(f"{name.as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return f"files-2 {digest.hexdigest()}"


def version(path: str) -> str:
    """The `fingerprint` of what `path` names."""
    return fingerprint(find(path))


def documents(path: str, report: Report | None = None) -> Iterator[str]:
    """Yield the text of each file that `path` names, of a table that of each row.

    Raises ValueError if no file matches, or none of them can be used.
    """
    report = report if report is not None else Report()
    found = find(path)
    check_libraries(found)
    for name in found:
        plain = not is_table(name)
        for row in [name] if plain else rows(name):
            report.found += 1
            label = name.as_posix() if plain else row.name
            try:
                text, replaced = read(name) if plain else parse(row)
            except (ValueError, OSError) as error:
                report.skip(getattr(error, "strerror", None) or str(error), label)
                continue
            if replaced:
                report.notes.append(f"{replaced:,} invalid bytes replaced in {label}")
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
