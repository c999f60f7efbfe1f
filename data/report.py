"""What happened to each candidate while a data set was read, and how a data set is shown."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

NAMES_SHOWN = 3


@dataclass
class Report:
    """Counts of what a source found and used, and the names of what it left out, by reason."""

    found: int = 0
    used: int = 0
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason -> names
    notes: list[str] = field(default_factory=list)  # used, but not quite as found

    def skip(self, reason: str, name: str) -> None:
        self.skipped.setdefault(reason, []).append(name)

    def __str__(self) -> str:
        parts = [f"{self.found:,} found, {self.used:,} used"]
        for reason, names in self.skipped.items():
            shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
            parts.append(f"{len(names):,} skipped: {reason} ({shown})")
        return "; ".join(parts + self.notes)


def show(documents: Iterable[str], report: Report, excerpt_chars: int = 600) -> None:
    """Read all documents; print their number, size and time, and how the first one begins."""
    start, count, size, first = time.perf_counter(), 0, 0, ""
    for document in documents:
        first = first or document
        count += 1
        size += len(document.encode("utf-8", "replace"))
    seconds = time.perf_counter() - start
    print(f"{count:,} documents, {size:,} bytes, {seconds:.1f} s")
    print(report)
    print(f"--- the first document begins ---\n{first[:excerpt_chars]}")
