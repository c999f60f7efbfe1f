"""Your own examples with labels: texts or pictures, and which class each is of.

    reviews.csv, reviews.tsv        a header line, a column "text", and a column "label" or several
    reviews.jsonl                   an object a line with the same as keys
    pictures.csv, pictures.jsonl    a column "path" or "image" in place of "text": a picture each,
                                    relative to the table
    pets/cat/1.png, pets/dog/2.jpg  a folder for each class of pictures

The same text or picture twice is used once. A report says what was found, used and skipped, and
why. All texts are held in memory; pictures are opened one by one.

    python -m data.labelled reviews.csv
"""

import csv
import hashlib
import io
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data import files
from data.report import Report

# What reads pictures is imported by the functions that need it: a table of texts needs no Pillow.
if TYPE_CHECKING:
    from data.pictures import Record

TRAIN, HELD_OUT = "train", "held out"
SPLITS = (TRAIN, HELD_OUT)
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLES = (*DELIMITERS, ".jsonl")
LABEL_COLUMNS = ("label",)


class Passage(NamedTuple):
    """A text and its labels, one for each question that is asked of it."""

    text: str
    labels: tuple[str, ...]
    split: str


class Row(NamedTuple):
    """A line of a table, or a picture in a folder: a text or a path, and its labels."""

    source: str
    labels: tuple[str, ...]


# ---- tables -------------------------------------------------------------------------------------


def read_table(table: Path) -> list[dict]:
    """The rows of a table; {} for one that is not whole. Raises ValueError if it has none."""
    try:
        text = files.read(table)[0]
        if table.suffix.lower() == ".jsonl":
            lines = [files.parse_json(line) for line in text.split("\n") if line.strip()]
            return [line if isinstance(line, dict) else {} for line in lines]
        delimiter = DELIMITERS[table.suffix.lower()]
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{table} cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"{table} has no row below its header line: add some")
    return [{} if None in row or None in row.values() else row for row in rows]


def find_columns(table: Path, rows: list[dict], input_columns, label_columns) -> str:
    """The first of `input_columns` that there is. Raises ValueError for a column that is not."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = ", ".join(map(repr, names)) or "none"
    if lacking := [name for name in label_columns if name not in names]:
        raise ValueError(
            f"{table} has no column {lacking[0]!r}, its columns are {found}: "
            "name those of the labels by --data.label-columns"
        )
    if not (there := [name for name in input_columns if name in names]):
        wanted = " or ".join(map(repr, input_columns))
        raise ValueError(
            f"{table} has no column {wanted}, its columns are {found}: "
            "name that of the text or the picture's path by --data.input-column"
        )
    return there[0]


def as_text(value: object) -> str:
    """A cell of a table as text, without blanks around it; "" for what is neither text, number nor
    boolean."""
    return str(value).strip() if isinstance(value, str | int | float) else ""


def enough(rows: list[Row], path: str | Path, report: Report) -> list[Row]:
    """The rows. Raises ValueError for fewer than two."""
    if len(rows) < 2:
        raise ValueError(f"{path} has {len(rows)} labelled examples, need 2 ({report}): add some")
    return rows


def table_rows(
    table: Path, report: Report, input_columns: Sequence[str], label_columns: Sequence[str]
) -> list[Row]:
    """The rows of a table that have an input and all labels, no input twice."""
    lines = read_table(table)
    column = find_columns(table, lines, input_columns, label_columns)
    seen: dict[str, tuple[str, ...]] = {}
    report.found += len(lines)
    for number, line in enumerate(lines, 1):
        source = as_text(line.get(column))
        labels = tuple(as_text(line.get(name)) for name in label_columns)
        if not line:
            report.skip("not as many fields as the header, or no JSON object", f"row {number}")
        elif not source or not all(labels):
            report.skip(f"no {'label' if source else column}", f"row {number}")
        elif source in seen:
            same = "" if seen[source] == labels else ", with another label"
            report.skip(f"the same {column} as a row before{same}", f"row {number}")
        else:
            seen[source] = labels
    return [Row(source, labels) for source, labels in seen.items()]


def text_rows(
    path: str | Path, report: Report, input_column: str = "",
    label_columns: Sequence[str] = LABEL_COLUMNS,
) -> list[Row]:  # fmt: skip
    """The texts of a table. Raises ValueError if there are none, or a column is not there."""
    table = Path(path).expanduser()
    if not table.is_file() or table.suffix.lower() not in TABLES:
        raise ValueError(f"{path} is not a file of labelled texts: give a {', '.join(TABLES)}")
    rows = table_rows(table, report, (input_column or "text",), label_columns)
    report.used += len(rows)
    return enough(rows, path, report)


# ---- pictures -----------------------------------------------------------------------------------


def picture_rows(
    path: str | Path, report: Report, input_column: str = "",
    label_columns: Sequence[str] = LABEL_COLUMNS,
) -> list[Row]:  # fmt: skip
    """The pictures of a table, or of a folder of folders, each with the path to open; none is
    opened. Raises ValueError as `text_rows` does."""
    from data import captioned

    path = Path(path).expanduser()
    if path.is_dir():
        if len(label_columns) > 1:
            raise ValueError(
                f"{path} is a folder, which gives one label: leave out --data.label-columns"
            )
        pairs = captioned.folder_pairs(path, report, template="")
        rows = [Row(str(pair.path), (pair.label,)) for pair in pairs if pair.path.parent != path]
    elif path.is_file() and path.suffix.lower() in TABLES:
        columns = (input_column,) if input_column else ("path", "image")
        rows = table_rows(path, report, columns, label_columns)
        rows = [Row(str(path.parent / row.source), row.labels) for row in rows]
    else:
        tables = ", ".join(TABLES)
        raise ValueError(f"{path} is no folder with a folder for each class, and no {tables}")
    return enough(rows, path, report)


def version(rows: Sequence[Row]) -> str:
    """What the pictures of these rows depend on: paths, labels, sizes and times of change."""
    digest = hashlib.sha256()
    for row in rows:
        stat = Path(row.source).stat() if Path(row.source).exists() else None
        digest.update(repr((*row, stat and (stat.st_size, stat.st_mtime_ns))).encode())
    return f"labelled-1 {digest.hexdigest()}"


def records(
    rows: Sequence[Row], splits: Sequence[str], size: int, channels: int, report: Report
) -> "Iterator[Record]":
    """Yield a record for each picture that can be read, its captions being its labels; the same
    picture under several names once. Raises ValueError if none can be used."""
    from data import pictures

    seen = set()
    for row, split in zip(rows, splits):
        try:
            image, _ = pictures.decode(row.source, size, channels)
        except ValueError as error:
            report.skip(str(error), row.source)
            continue
        if (content := hashlib.sha256(image.tobytes()).digest()) in seen:
            report.skip("the same picture as one before", row.source)
            continue
        seen.add(content)
        report.used += 1
        yield pictures.Record(image, row.labels, row.labels[0], split)
    if not report.used:
        raise ValueError(f"no picture can be used: {report}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m data.labelled TABLE    (a .csv, .tsv or .jsonl of text, label)")
    report = Report()
    try:
        for labels, count in Counter(row.labels for row in text_rows(sys.argv[1], report)).items():
            print(f"{count:,} of {', '.join(labels)}")
    except ValueError as error:
        sys.exit(str(error))
    print(report)
