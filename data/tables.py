"""Tables: many examples in one file. One reader for all, whatever the rows are used for.

    .csv             a header line, then a row a line; quotes around a cell that has commas or line
                     ends, and twice within it (RFC 4180); without any comma in the header, ";" or
                     tabs separate
    .tsv             a header line, then a row a line, cells separated by tabs; quotes mean nothing
    .jsonl, .ndjson  an object a line; only "\\n" ends a line
    .json            an array of objects, or as .jsonl
    .parquet         columns

All but .parquet may be compressed: .csv.gz, .jsonl.zst. `records` yields the rows of a table.
`rows` and `parse` yield documents: the first is fast, and the second can be done by many processes.
Both read a table from start to end and keep a row at a time.

A row that cannot be read is reported, and a table that cannot be trusted is refused: one in which a
quote opens a cell and does not close it would swallow the rows behind. Missing values are null,
NaN, an empty cell, and in a .csv or .tsv also a cell that says so as pandas, Excel or SQL do.
"""

import csv
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data import parquet, reading
from data.report import Report, named

WITH_HEADER = (".csv", ".tsv")
LINES = (".jsonl", ".ndjson")
SUFFIXES = (*WITH_HEADER, *LINES, ".json", ".parquet")
MISSING = {"nan", "NaN", "null", "NULL", "<NA>", "#N/A"}
# What the standard library and pyarrow raise for a file that is damaged.
READING_ERRORS = (ValueError, OSError, NotImplementedError, RecursionError, MemoryError)


def kind_of(path: str | Path) -> str:
    """The suffix that says how a table is read, such as ".csv"; "" for a file that is no table."""
    name = reading.unpacked_name(Path(path))
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    return ""


# ---- .csv and .tsv -------------------------------------------------------------------------------


def separator(header: str) -> str:
    """What separates the cells of a .csv, by its header line."""
    for mark in (",", ";", "\t"):
        if mark in header:
            return mark
    return ","


def quoted_cells(lines: Iterator[str], notes: Counter[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, cells) of each row of a .csv, the header first."""

    def with_header() -> Iterator[str]:
        yield header
        yield from lines

    header = next(lines, "")
    csv.field_size_limit(reading.MAX_CELL_CHARS)
    reader = csv.reader(with_header(), delimiter=separator(header), strict=True)
    first = 1
    long_rows = 0
    longest = (0, 0)  # number of lines, first line
    try:
        for cells in reader:
            lines_taken = reader.line_num + 1 - first
            if lines_taken > 1:
                long_rows += 1
                longest = max(longest, (lines_taken, first))
            if cells:
                yield first, cells
            first = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"lines {first:,} to {reader.line_num:,}: a quote that opens a cell is not closed, or "
            f"a quote within a cell is not written twice ({error}); repair it, or save the table "
            "as a .tsv, where quotes mean nothing"
        ) from error
    if long_rows:
        size, first = longest
        notes[
            f"{named(long_rows, 'rows')} of several lines, the longest {size:,} lines from line "
            f"{first:,} (if that is wrong, a quote is missing there)"
        ] += long_rows


def tabbed_cells(lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its line, cells) of each row of a .tsv, the header first."""
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\n")
        if line:
            yield number, line.split("\t")


def check_header(cells: list[str]) -> list[str]:
    """The names of the columns. Raises ValueError if one occurs twice."""
    names = [reading.replace_invalid(cell).strip() for cell in cells]
    for name, count in Counter(filter(None, names)).most_common(1):
        if count > 1:
            raise ValueError(f"the column {name!r} occurs twice: rename one")
    return names


def rows_of_cells(
    text: reading.TextFile, kind: str, notes: Counter[str]
) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Yield (line number, {column: cell}) of each row of a .csv or .tsv.

    None stands for a row of more or fewer cells than the header. Raises ValueError if there is no
    header, or a quote is missing.
    """
    lines = text.parts(lines=True)
    found = quoted_cells(lines, notes) if kind == ".csv" else tabbed_cells(lines)
    _, header = next(found, (0, []))
    names = check_header(header)
    for number, cells in found:
        row = None
        if len(cells) == len(names):
            row = {n: "" if c.strip() in MISSING else c for n, c in zip(names, cells)}
        yield number, row


def columns_of(path: Path, kind: str) -> list[str]:
    """The names of the columns of a .csv or .tsv; none if it is not text."""
    try:
        header = next(reading.TextFile(path).parts(lines=True), "")
        mark = separator(header) if kind == ".csv" else "\t"
        return [name.strip().strip('"') for name in header.removesuffix("\n").split(mark)]
    except (ValueError, OSError):
        return []


# ---- .json and .jsonl ----------------------------------------------------------------------------


def no_number(constant: str) -> None:
    """NaN and infinity, which JSON does not have, become None: missing values."""


class RepeatedKeyError(ValueError):
    """A key that occurs twice in one object."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these keys. Python's json would keep the last of two values of a key, though
    nobody knows which was meant. Raises RepeatedKeyError."""
    table = dict(pairs)
    if len(table) < len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise RepeatedKeyError(f"the key {key[:60]!r} occurs twice in one object")
            seen.add(key)
    return table


BLANK = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder(parse_constant=no_number, object_pairs_hook=unique)


def parse_json(text: str) -> dict:
    """The object that a text holds. Raises ValueError with the reason if it holds none."""
    try:
        value = DECODER.decode(text)
    except RepeatedKeyError:
        raise
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def starts_array(path: Path) -> bool:
    """Whether the text of a file starts with "[", and its first line is no row on its own."""
    try:
        with reading.open_file(path) as file:
            head = file.peek(reading.HEAD_BYTES)
    except (ValueError, OSError):
        return False  # the reader of the rows will say why
    head = head.removeprefix(reading.BYTE_ORDER_MARK.encode("utf-8")).lstrip()
    if not head.startswith(b"["):
        return False
    line, _, rest = head.partition(b"\n")
    return not (rest.strip() and line.rstrip().endswith(b"]"))


def array_items(text: reading.TextFile) -> Iterator[Any]:
    """Yield the items of the one JSON array of a file, from a part of the text at a time."""
    rest = ""
    place = 0
    before = "["  # what must stand before the next item
    parts = text.parts(lines=False)
    for part in parts:
        rest = rest[place:] + part
        place = 0
        while True:
            start = BLANK.match(rest, place).end()
            if before and rest[start : start + 1] == before:
                start = BLANK.match(rest, start + 1).end()
            elif before and rest[start : start + 1] not in ("", "]"):
                raise ValueError(f"not a JSON array: {rest[start : start + 20]!r} needs a comma")
            if rest[start : start + 1] == "]":
                for after in itertools.chain([rest[start + 1 :]], parts):
                    if after.strip():
                        raise ValueError(f"text after the array: {after.strip()[:40]!r}")
                return
            try:
                item, place = DECODER.raw_decode(rest, start)
            except RecursionError:
                raise ValueError("a JSON array that is nested too deeply") from None
            except RepeatedKeyError:
                raise
            except ValueError:
                break  # incomplete, or not JSON
            before = ","
            yield item
        if len(rest) - place > reading.MAX_LINE_BYTES + len(part):
            break
    raise ValueError(f"an item that is not JSON or {reading.TOO_LONG}: {rest[place:][:40]!r}")


# ---- rows with all their fields ------------------------------------------------------------------


def clean(value: Any) -> Any:
    """A value of a table: NaN and infinity become None, and invalid text U+FFFD, at any depth."""
    if isinstance(value, str):
        return reading.replace_invalid(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {clean(name): clean(item) for name, item in value.items()}
    return value


def parsed_lines(path: Path, report: Report, name: str) -> Iterator[tuple[int, dict]]:
    """Yield (line number, object) of each line of a .jsonl; the report has the others."""
    invalid = 0
    with reading.open_file(path) as file:
        for number, line in enumerate(reading.byte_lines(file), 1):
            if line is not None and line.isspace():
                continue
            report.found += 1
            try:
                if line is None:
                    raise ValueError(reading.TOO_LONG)
                text, replaced = reading.decode(line)
                value = clean(parse_json(text))
            except (ValueError, RecursionError) as error:
                report.skip(str(error), f"{name}:{number}")
                continue
            invalid += replaced
            yield number, value
    report.note_replaced(invalid, name)


def parsed_array(path: Path, report: Report, name: str) -> Iterator[tuple[int, dict]]:
    """Yield (number, object) of each item of an array; the report has those that are no objects."""
    text = reading.TextFile(path)
    for number, item in enumerate(array_items(text), 1):
        report.found += 1
        if isinstance(item, dict):
            yield number, clean(item)
        else:
            report.skip("not a JSON object", f"{name}:{number}")
    report.note_replaced(text.invalid, name)


def parsed_cells(
    path: Path, kind: str, report: Report, name: str
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, {column: cell}) of each row of a .csv or .tsv."""
    text = reading.TextFile(path)
    notes: Counter[str] = Counter()
    for number, row in rows_of_cells(text, kind, notes):
        report.found += 1
        if row is None:
            report.skip("not as many cells as the header", f"{name}:{number}")
        else:
            yield number, clean(row)
    report.note_replaced(text.invalid, name)
    for note, count in notes.items():
        report.note(f"{count:,} {note} in {name}")


def parsed_parquet(path: Path, report: Report, name: str) -> Iterator[tuple[int, dict]]:
    """Yield (number, fields) of each row of a .parquet."""
    number = 0
    for batch in parquet.batches(path):
        for i in range(len(batch)):
            number += 1
            report.found += 1
            try:
                (fields,) = batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError:
                report.skip(reading.NOT_UTF8, f"{name}:{number}")
                continue
            yield number, clean(fields)


def records(path: Path, report: Report, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, fields) of each row of a table. The report counts the rows found and skipped.

    The name is that of the file (or `name`) and of the line or item. Missing values are None or
    "". A file whose name does not say what it is, is read as a .jsonl. Raises ValueError that
    names the file if it cannot be read to its end.
    """
    kind = kind_of(path)
    name = name or path.name
    try:
        if kind in WITH_HEADER:
            found = parsed_cells(path, kind, report, name)
        elif kind == ".parquet":
            found = parsed_parquet(path, report, name)
        elif starts_array(path):
            found = parsed_array(path, report, name)
        else:
            found = parsed_lines(path, report, name)
        for number, fields in found:
            yield f"{name}:{number}", fields
    except READING_ERRORS as error:
        reason = reading.reason_of(error).split("\n")[0]
        raise ValueError(f"{path} cannot be read: {reason}") from error


# ---- rows as documents ---------------------------------------------------------------------------


class Row(NamedTuple):
    """A document that is not parsed yet."""

    name: str
    kind: str  # "text"; "json": an object with the text; "unreadable": the content is the reason
    content: bytes


def to_bytes(text: str) -> bytes:
    """A text as UTF-8, with the bytes that were invalid as they were."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        return reading.replace_invalid(text).encode("utf-8")


def text_row(name: str, content: bytes) -> Row:
    """A row with a text, unless it is too long."""
    if len(content) > reading.MAX_LINE_BYTES:
        return Row(name, "unreadable", reading.TOO_LONG.encode("utf-8"))
    return Row(name, "text", content)


def text_of(value: Any, field: str) -> str:
    """The text in a field of an object. Raises ValueError with the reason if there is none."""
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if field not in value:
        raise ValueError(f"no field {field!r} among {', '.join(sorted(value)[:8])}")
    if not isinstance(value[field], str):
        raise ValueError(f"the field {field!r} is not text")
    return value[field]


def line_rows(path: Path) -> Iterator[Row]:
    """Yield the lines of a .jsonl. They are parsed later, as that takes most of the time."""
    with reading.open_file(path) as file:
        for number, line in enumerate(reading.byte_lines(file), 1):
            name = f"{path.as_posix()}:{number}"
            if line is None:
                yield Row(name, "unreadable", reading.TOO_LONG.encode("utf-8"))
            elif not line.isspace():
                yield Row(name, "json", line)


def item_rows(path: Path, field: str) -> Iterator[Row]:
    """Yield the items of a JSON array."""
    for number, item in enumerate(array_items(reading.TextFile(path)), 1):
        name = f"{path.as_posix()}:{number}"
        try:
            yield text_row(name, to_bytes(text_of(item, field)))
        except ValueError as error:
            yield Row(name, "unreadable", str(error).encode("utf-8", "replace"))


def cell_rows(path: Path, kind: str, field: str, notes: Counter[str]) -> Iterator[Row]:
    """Yield the cells of a column of a .csv or .tsv."""
    for number, row in rows_of_cells(reading.TextFile(path), kind, notes):
        name = f"{path.as_posix()}:{number}"
        if row is None:
            yield Row(name, "unreadable", b"not as many cells as the header")
        else:
            yield text_row(name, to_bytes(row[field]))


def parquet_rows(path: Path, field: str) -> Iterator[Row]:
    """Yield the cells of a column of a .parquet."""
    arrow = reading.extra("pyarrow")
    schema = reading.extra("pyarrow.parquet").read_schema(path)
    columns = {column.name: column.type for column in schema}
    if field not in columns:
        raise ValueError(f"no column {field!r} among {', '.join(columns)}")
    kind = getattr(columns[field], "value_type", columns[field])  # the type in a dictionary
    if str(kind) not in ("string", "large_string"):
        raise ValueError(f"the column {field!r} holds {kind}, not text")
    number = 0
    for batch in parquet.batches(path, [field]):
        # As bytes, because the library would stop at the first text that is not UTF-8.
        for value in batch[0].cast(arrow.string()).cast(arrow.binary()):
            yield text_row(f"{path.as_posix()}:{number}", value.as_py() or b"")
            number += 1


def to_the_end(path: Path, found: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows. If reading them fails, the last one is unreadable and has the reason."""
    try:
        yield from found
    except READING_ERRORS as error:
        reason = reading.reason_of(error).split("\n")[0]
        yield Row(path.as_posix(), "unreadable", reason.encode("utf-8", "replace"))


def rows(path: Path, field: str = "text", notes: Counter[str] | None = None) -> Iterator[Row]:
    """Yield the documents of a table. If it is broken, the last one has the reason.

    `notes` counts what is odd, such as rows of several lines.
    """
    kind = kind_of(path)
    if notes is None:
        notes = Counter()
    if kind == ".parquet":
        found = parquet_rows(path, field)
    elif kind in WITH_HEADER:
        found = cell_rows(path, kind, field, notes)
    else:
        found = item_rows(path, field) if starts_array(path) else line_rows(path)
    yield from to_the_end(path, found)


def parse(row: Row, field: str = "text") -> tuple[str, int]:
    """The text of a row, and the number of invalid sequences replaced in it.

    Raises ValueError with the reason if it has none.
    """
    if row.kind == "unreadable":
        raise ValueError(row.content.decode("utf-8"))
    if row.kind == "text":
        return reading.decode(row.content)
    line, replaced = reading.decode(row.content)
    text, _ = reading.decode(to_bytes(text_of(parse_json(line), field)))
    return text, replaced


def holds_documents(path: Path, field: str = "text") -> bool | None:
    """Whether the rows of a file are documents; None for a table without the field, of any kind
    that is also plain text: it can be read as such.
    """
    kind = kind_of(path)
    if kind in (*LINES, ".parquet"):
        return True
    if kind in WITH_HEADER:
        return field in columns_of(path, kind) or None
    if kind == ".json":
        first = next(rows(path, field), None)
        if first is None:
            return True  # an empty array
        try:
            return bool(parse(first, field))
        except ValueError as error:
            return True if reading.TOO_LONG in str(error) else None
    return False
