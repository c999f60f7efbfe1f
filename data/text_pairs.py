"""Your own pairs of texts: a sentence and its translation, a question and its answer.

    pairs.tsv, pairs.csv     a header line, the columns "source" and "target"
    pairs.jsonl              an object a line, with these names as keys; more in tables.py

A source that occurs with several targets has several right answers. A source of five words or more
that is nearly one before (dedupe.py) is left out: the two could be in two splits.

    python -m data.text_pairs pairs.tsv
"""

from pathlib import Path

from data import command, dedupe, reading, tables
from data.report import Report, counted

COLUMNS = ("source", "target")
INDEX_MB = 16


def find(path: str) -> Path:
    """The table at a path. Raises ValueError if there is none."""
    table = Path(path).expanduser()
    if not table.is_file() or not tables.kind_of(table):
        kinds = ", ".join(tables.SUFFIXES)
        raise ValueError(f"{path} is not a file of pairs: give a {kinds}")
    return table


def version(path: str) -> str:
    """A name for the exact pairs: it changes if the file does."""
    return f"text-pairs-1 {reading.fingerprint([find(path)])}"


def as_text(value: object) -> str:
    """A cell as text with single spaces; "" if it is no text or number."""
    return " ".join(str(value).split()) if isinstance(value, str | int | float) else ""


def rows(path: str, report: Report | None = None) -> dict[str, list[str]]:
    """{source: its targets, each once} of a table, in its order.

    Raises ValueError if it is no table, lacks a column, or has no pair.
    """
    if report is None:
        report = Report()
    table = find(path)
    seen = dedupe.Seen(INDEX_MB)
    found: dict[str, list[str]] = {}
    for place, line in tables.records(table, report):
        if not set(COLUMNS) & line.keys():
            names = ", ".join(map(repr, line)) or "none"
            raise ValueError(
                f"{place} has neither source nor target, its columns are {names}: name them "
                "source and target, those of a .tsv or .csv in its first line"
            )
        source, target = (as_text(line.get(name)) for name in COLUMNS)
        if not source or not target:
            report.skip("no source" if not source else "no target", place)
            continue
        if target in found.get(source, []):
            report.skip("the same pair as one before", place)
            continue
        near = None
        if source not in found:
            near = dedupe.add_new(seen, source)
        if near:
            report.skip(f"{near} of a source before", place)
            continue
        found.setdefault(source, []).append(target)
        report.used += 1
    if not found:
        raise ValueError(f"{path} has no pair ({report}): add some")
    return found


def look(path: str) -> None:
    """Print a few pairs and how many there are."""
    report = Report()
    found = rows(path, report)
    for source in list(found)[:: max(1, len(found) // 8)]:
        print(f"{source}\n    {' | '.join(found[source])}")
    print(f"{counted(len(found), 'sources')}; {report}")


if __name__ == "__main__":
    command.run("text_pairs", __doc__, look, "TABLE")
