"""Your own examples with labels: texts or pictures, and the class of each.

    reviews.csv, reviews.tsv        a header line, a column "text", and a column "label" or several
    reviews.jsonl                   an object a line, with these names as keys; more in tables.py
    pictures.csv, pictures.jsonl    a column "path" or "image" instead of "text": one picture a row,
                                    relative to the table
    pets/cat/1.png, pets/dog/2.jpg  a folder for each class of pictures
    pets/train/cat/1.png, pets/test/...   the same in folders named for splits, see captioned.py

A text or picture that repeats is used once. A report counts the examples that were found, used and
skipped, with reasons. All texts are in memory at once; pictures are opened one by one.

    python -m data.labelled reviews.csv
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data import command, reading, tables
from data.report import Report, counted
from data.splits import TRAIN

# Modules that read pictures are imported in the functions that need them, so that a table of texts
# needs no Pillow.
if TYPE_CHECKING:
    from data.pictures import Record

LABEL_COLUMNS = ("label",)


class Passage(NamedTuple):
    """A text and its labels: one for each question, such as its topic or its language."""

    text: str
    labels: tuple[str, ...]
    split: str
    source: str  # the file it is from: passages of one file are alike


class Row(NamedTuple):
    """A row of a table, or a picture in a folder, with its labels."""

    source: str  # the text, or the path of the picture
    labels: tuple[str, ...]


# ---- tables -------------------------------------------------------------------------------------


def check_columns(
    table: Path, names: Sequence[str], input_columns: Sequence[str], label_columns: Sequence[str]
) -> str:
    """The first of `input_columns` that the table, with columns of these names, has.

    Raises ValueError if it has none of them, or if one of `label_columns` is missing.
    """
    found = ", ".join(map(repr, names[:20])) or "none"
    for name in label_columns:
        if name not in names:
            raise ValueError(
                f"{table} has no column {name!r}, its columns are {found}: "
                "name those of the labels by --data.label-columns"
            )
    for name in input_columns:
        if name in names:
            return name
    wanted = " or ".join(map(repr, input_columns))
    raise ValueError(
        f"{table} has no column {wanted}, its columns are {found}: "
        "name that of the text or the picture's path by --data.input-column"
    )


def as_text(value: object) -> str:
    """A cell of a table as text, without white space at either end.

    It is "" if the value is not a text, number or boolean.
    """
    return str(value).strip() if isinstance(value, str | int | float) else ""


def check_enough(rows: list[Row], path: str | Path, report: Report) -> None:
    """Raise ValueError if there are fewer than two rows."""
    if len(rows) < 2:
        examples = counted(len(rows), "labelled examples")
        raise ValueError(f"{path} has {examples}, need 2 ({report}): add some")


def table_rows(
    table: Path, report: Report, input_columns: Sequence[str], label_columns: Sequence[str]
) -> list[Row]:
    """The rows of a table that have an input and all labels; an input that repeats is used once.

    Raises ValueError if the table cannot be read, has no rows, or lacks a column.
    """
    lines = list(tables.records(table, report))
    if not lines:
        raise ValueError(f"{table} has no row below its header line ({report}): add some")
    names = list(dict.fromkeys(name for _, line in lines for name in line))
    column = check_columns(table, names, input_columns, label_columns)
    seen: dict[str, tuple[str, ...]] = {}  # input -> labels
    for place, line in lines:
        source = as_text(line.get(column))
        labels = tuple(as_text(line.get(name)) for name in label_columns)
        if not source:
            report.skip(f"no {column}", place)
        elif not all(labels):
            report.skip("no label", place)
        elif source in seen and seen[source] == labels:
            report.skip(f"the same {column} as a row before", place)
        elif source in seen:
            report.skip(f"the same {column} as a row before, with another label", place)
        else:
            seen[source] = labels
    return [Row(source, labels) for source, labels in seen.items()]


def text_rows(
    path: str | Path,
    report: Report,
    input_column: str = "",
    label_columns: Sequence[str] = LABEL_COLUMNS,
) -> list[Row]:
    """The texts of a table. An `input_column` of "" stands for "text".

    Raises ValueError if there are fewer than two, or a column is missing.
    """
    table = Path(path).expanduser()
    if not table.is_file() or not tables.kind_of(table):
        kinds = ", ".join(tables.SUFFIXES)
        raise ValueError(f"{path} is not a file of labelled texts: give a {kinds}")
    rows = table_rows(table, report, (input_column or "text",), label_columns)
    report.used += len(rows)
    check_enough(rows, path, report)
    return rows


# ---- pictures -----------------------------------------------------------------------------------


def picture_rows(
    path: str | Path,
    report: Report,
    input_column: str = "",
    label_columns: Sequence[str] = LABEL_COLUMNS,
) -> list[Row]:
    """The pictures of a table, or of a folder with a folder for each class; none is opened.

    An `input_column` of "" stands for "path" or "image". Raises ValueError as `text_rows` does.
    """
    from data import captioned

    path = Path(path).expanduser()
    if path.is_dir():
        if len(label_columns) > 1:
            raise ValueError(
                f"{path} is a folder, which gives one label: leave out --data.label-columns"
            )
        pairs = captioned.folder_pairs(path, report, template="")
        found = [pair for pair in pairs if pair.path.parent != path]
        splits = captioned.find_splits(path, [pair.path for pair in found])
        roots = {path / name for name in splits}  # their own pictures have no class
        rows = [Row(str(p.path), (p.label,)) for p in found if p.path.parent not in roots]
        for pair in found:
            if pair.path.parent in roots:
                report.skip("no class", pair.path.as_posix())
    elif path.is_file() and tables.kind_of(path):
        columns = (input_column,) if input_column else ("path", "image")
        rows = table_rows(path, report, columns, label_columns)
        rows = [Row(str(path.parent / row.source), row.labels) for row in rows]
    else:
        kinds = ", ".join(tables.SUFFIXES)
        raise ValueError(f"{path} is no folder with a folder for each class, and no {kinds}")
    check_enough(rows, path, report)
    return rows


def folder_splits(path: str | Path, rows: Sequence[Row]) -> list[str]:
    """ "val" or "test" for each picture in a folder named for it; "" for all others."""
    from data import captioned

    folder = Path(path).expanduser()
    if not folder.is_dir():
        return [""] * len(rows)
    images = [Path(row.source) for row in rows]
    splits = captioned.find_splits(folder, images)
    tops = [image.relative_to(folder).parts[0] for image in images]
    return [splits.get(top, "").replace(TRAIN, "") for top in tops]


def version(rows: Sequence[Row]) -> str:
    """A name for the exact pictures: their paths and labels, and a hash of each file."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((*row, reading.state_of(Path(row.source)))).encode())
    return f"labelled-5 {digest.hexdigest()}"


def records(
    rows: Sequence[Row], splits: Sequence[str], size: int, channels: int, report: Report
) -> "Iterator[Record]":
    """Yield a record for each readable picture, uint8 (size, size, channels).

    Its captions are its labels. The same picture under several names is used once, and one that is
    near to a picture of another split with the same labels (near.py) is left out. Raises ValueError
    if none can be used.
    """
    from data import near, pictures

    seen = set()
    so_far = near.Seen()
    for row, split in zip(rows, splits):
        try:
            image, _ = pictures.decode(row.source, size, channels)
        except ValueError as error:
            report.skip(str(error), row.source)
            continue
        content = hashlib.sha256(image.tobytes()).digest()
        if content in seen:
            report.skip("the same picture as one before", row.source)
            continue
        seen.add(content)
        labels = " ".join(row.labels)
        if so_far.splits_near(image, labels) - {split}:
            report.skip("nearly the same as a picture of another split", row.source)
            continue
        so_far.add(image, labels, split)
        report.used += 1
        yield pictures.Record(image, row.labels, row.labels[0], split)
    if not report.used:
        raise ValueError(f"no picture can be used: {report}")


def look(table: str) -> None:
    """Print how many examples each label has."""
    report = Report()
    counts = Counter(row.labels for row in text_rows(table, report))
    for labels, count in counts.items():
        print(f"{count:,} of {', '.join(labels)}")
    print(report)


if __name__ == "__main__":
    command.run("labelled", __doc__, look, "TABLE")
