"""What became of each candidate while a data set was read, and a look at a data set."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

NAMES_SHOWN = 3  # for each reason, the report names this many candidates


@dataclass
class Report:
    """How many candidates (files, rows, pictures) a source found and used.

    It also has the names of those that were skipped, by reason.
    """

    found: int = 0
    used: int = 0
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason -> names
    notes: list[str] = field(default_factory=list)  # other remarks, such as repairs

    def skip(self, reason: str, name: str) -> None:
        """Count a candidate as skipped."""
        self.skipped.setdefault(reason, []).append(name)

    def __str__(self) -> str:
        parts = [f"{self.found:,} found, {self.used:,} used"]
        for reason, names in self.skipped.items():
            shown = ", ".join(names[:NAMES_SHOWN])
            if len(names) > NAMES_SHOWN:
                shown += ", ..."
            parts.append(f"{len(names):,} skipped: {reason} ({shown})")
        return "; ".join(parts + self.notes)


def show(documents: Iterable[str], report: Report, excerpt_chars: int = 600) -> None:
    """Read all documents; print their number, size and time, and the start of the first one."""
    start = time.perf_counter()
    count = 0
    size = 0
    first = ""
    for document in documents:
        first = first or document
        count += 1
        size += len(document.encode("utf-8", "replace"))
    seconds = time.perf_counter() - start
    print(f"{count:,} documents, {size:,} bytes, {seconds:.1f} s")
    print(report)
    print(f"--- start of the first document ---\n{first[:excerpt_chars]}")
