"""Your own text: a file, a folder with everything below it, or a glob such as "notes/**/*.md".

    .jsonl, .jsonl.zst   one JSON object a line; each is a document, in its field "text"
    .parquet             one document a row, in the column "text"
    anything else        one document a file, if it is UTF-8 text; its name does not matter

Hidden files and folders are left out. A report counts the documents that were found, used and
skipped, with reasons. Files may come from strangers, so they are read with limits: neither a line
without an end nor a small file that expands to a huge one takes much memory or time.

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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple

from data.report import Report, show

HEAD_BYTES = 1 << 16  # the start of a file, which shows whether it is binary
# Typing errors and old encodings leave a few invalid bytes. With more of them, the whole file is in
# another encoding.
MAX_REPLACED_FRACTION = 0.01
SKIP_FOLDERS = {"__pycache__", "node_modules"}
REPLACEMENT = "\ufffd"  # stands for invalid bytes
TABLES = (".jsonl", ".jsonl.zst", ".parquet")  # files with many documents
MAX_LINE_BYTES = 1 << 22  # a longer document is skipped
PARQUET_ROWS = 16  # rows that are in memory at a time
TOO_LONG = f"longer than {MAX_LINE_BYTES >> 20} MiB"
# Zstandard makes text five to ten times smaller, but 32,000 equal bytes can become a single one.
MAX_EXPANSION = 500
FREE_BYTES = 1 << 26  # a file that expands to less may expand by any factor


# ---- paths ---------------------------------------------------------------------------------------


def find(path: str) -> list[Path]:
    """The files that `path` (a file, a folder or a glob) names, sorted.

    Raises ValueError if there is none.
    """
    path = os.path.expanduser(path)
    if os.path.isfile(path):
        return [Path(path)]
    found = []
    if os.path.isdir(path):
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


def is_table(path: Path) -> bool:
    """Whether a file holds many documents."""
    return path.name.lower().endswith(TABLES)


def state_of(path: Path) -> tuple[int, int] | None:
    """The size of a file in bytes and its time of change in nanoseconds; None if it is missing."""
    if not path.exists():
        return None
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def fingerprint(found: list[Path]) -> str:
    """A hash of the files' names, sizes and times of change, which the documents depend on."""
    digest = hashlib.sha256()
    for path in found:
        stat = path.stat()
        digest.update(f"{path.as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return f"files-2 {digest.hexdigest()}"


def version(path: str) -> str:
    """The `fingerprint` of the files that `path` names."""
    return fingerprint(find(path))


# ---- bytes -> text -------------------------------------------------------------------------------


def decode(source: bytes) -> tuple[str, int]:
    """Turn bytes into (text, number of invalid sequences replaced); newlines become "\\n".

    Raises ValueError with the reason if the bytes are not UTF-8 text.
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
    """`decode` of a file. Only the first bytes of a large binary file are read."""
    with open(path, "rb") as file:
        source = file.read(HEAD_BYTES)
        if b"\0" not in source:  # with a NUL byte, `decode` refuses it anyway
            source += file.read()
    return decode(source)


def parse_json(line: str) -> object:
    """The value of a line of JSON; None if it is not JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return None


# ---- many documents in a file --------------------------------------------------------------------


class Row(NamedTuple):
    """A document that is not parsed yet."""

    name: str
    kind: str  # "text"; "json": an object with the text; "unreadable": the content is the reason
    content: bytes


def extra(module: str) -> ModuleType:
    """Import a library that only some data need.

    If it is missing, raises ValueError with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        advice = "pip install -r data/requirements.txt"
        raise ValueError(f"these data need {module.split('.')[0]}, run: {advice}") from error


def check_libraries(paths: list[Path]) -> None:
    """Raise ValueError if a file needs a library that is missing: now, not after hours of work."""
    if any(path.suffix.lower() != ".jsonl" and is_table(path) for path in paths):
        extra("pyarrow.parquet")


def lines(stream: BinaryIO, limit: float) -> Iterator[bytes | None]:
    """Yield the lines of a stream; None for a line longer than MAX_LINE_BYTES.

    A long line is never in memory as a whole. Raises ValueError after more than `limit` bytes.
    """
    size = 0
    too_long = False  # whether the current line is
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
    """The content of a .zst. The decompressor uses a window of up to 128 MiB, as `zstd` does."""
    return io.BufferedReader(extra("pyarrow").CompressedInputStream(file, "zstd"), 1 << 20)


def json_rows(path: Path) -> Iterator[Row]:
    """Yield the lines of a .jsonl or .jsonl.zst. Raises ValueError or OSError if it is broken."""
    packed = path.suffix.lower() == ".zst"
    limit = float("inf")
    if packed:
        limit = MAX_EXPANSION * path.stat().st_size + FREE_BYTES
    with open(path, "rb") as file:
        stream = unpacked(file) if packed else file
        for number, line in enumerate(lines(stream, limit), 1):
            name = f"{path.as_posix()}:{number}"
            if line is None:
                yield Row(name, "unreadable", TOO_LONG.encode())
            elif not line.isspace():
                yield Row(name, "json", line)


def parquet_rows(path: Path, field: str) -> Iterator[Row]:
    """Yield the rows of a .parquet. Raises ValueError or OSError if it is broken."""
    arrow = extra("pyarrow")
    parquet = extra("pyarrow.parquet")
    with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        columns = {column.name: column.type for column in file.schema_arrow}
        if field not in columns:
            raise ValueError(f"no column {field!r} among {', '.join(columns)}")
        kind = getattr(columns[field], "value_type", columns[field])  # the type in a dictionary
        if str(kind) not in ("string", "large_string"):
            raise ValueError(f"the column {field!r} holds {kind}, not text")
        number = 0
        for batch in file.iter_batches(PARQUET_ROWS, columns=[field]):
            # As bytes, because the library would stop at the first text that is not UTF-8.
            for value in batch[0].cast(arrow.string()).cast(arrow.binary()):
                text = value.as_py() or b""
                name = f"{path.as_posix()}:{number}"
                if len(text) > MAX_LINE_BYTES:
                    yield Row(name, "unreadable", TOO_LONG.encode())
                else:
                    yield Row(name, "text", text)
                number += 1


def reason_of(error: Exception) -> str:
    """The reason why a file was not read: of an OSError, without the path."""
    return getattr(error, "strerror", None) or str(error)


def to_the_end(path: Path, found: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows. If reading them fails, the last one is unreadable and has the reason."""
    try:
        yield from found
    except (ValueError, OSError, NotImplementedError) as error:
        reason = reason_of(error).split("\n")[0]
        yield Row(path.as_posix(), "unreadable", reason.encode("utf-8", "replace"))


def rows(path: Path, field: str = "text") -> Iterator[Row]:
    """Yield the documents of a table. If it is broken, the last one has the reason."""
    if path.suffix.lower() == ".parquet":
        found = parquet_rows(path, field)
    else:
        found = json_rows(path)
    yield from to_the_end(path, found)


def parse(row: Row, field: str = "text") -> tuple[str, int]:
    """The text of a row, and the number of invalid sequences replaced in it.

    Raises ValueError with the reason if it has none.
    """
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
    # JSON can hold half of a UTF-16 surrogate pair, which UTF-8 cannot: it becomes U+FFFD.
    utf16 = found[field].encode("utf-16", "surrogatepass")
    return decode(utf16.decode("utf-16", "replace").encode("utf-8"))


# ---- all documents -------------------------------------------------------------------------------


def candidates(path: Path) -> Iterator[tuple[str, Callable[[], tuple[str, int]]]]:
    """Yield (name, function that reads it) of each document in a file.

    The function returns the text and the number of invalid sequences replaced in it. It raises
    ValueError or OSError if there is no text.
    """
    if is_table(path):
        for row in rows(path):
            yield row.name, partial(parse, row)
    else:
        yield path.as_posix(), partial(read, path)


def documents(path: str, report: Report | None = None) -> Iterator[str]:
    """Yield the text of each file that `path` names; for a table, the text of each row.

    Raises ValueError if no file matches, or none of them can be used.
    """
    if report is None:
        report = Report()
    found = find(path)
    check_libraries(found)
    for file in found:
        for name, load in candidates(file):
            report.found += 1
            try:
                text, replaced = load()
            except (ValueError, OSError) as error:
                report.skip(reason_of(error), name)
                continue
            if replaced:
                report.notes.append(f"{replaced:,} invalid bytes replaced in {name}")
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
