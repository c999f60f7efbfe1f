"""What became of each candidate while a data set was read, and a look at a data set."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

NAMES_SHOWN = 3  # for each reason, the report names this many candidates
# More names, reasons and notes than these are only counted: they could fill the memory.
MAX_NAMES = 10_000
MAX_REASONS = 40
OTHER_REASONS = "other reasons"
MORE_NOTES = "more notes"


def named(n: int, things: str) -> str:
    """1 and "rows" -> "row"; 2 and "rows" -> "rows"."""
    ending = "es" if things.endswith(("ches", "sses")) else "s"
    return things.removesuffix(ending) if n == 1 else things


def counted(n: int, things: str) -> str:
    """1 and "rows" -> "1 row"; 1200 and "training pictures" -> "1,200 training pictures"."""
    return f"{n:,} {named(n, things)}"


def printable(name: str) -> str:
    """A name of a file for people: a name may hold any bytes, also such that move the cursor."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else "?" for c in name)


@dataclass
class Report:
    """How many candidates (files, rows, pictures) a source found and used.

    It also has the names of those that were skipped, by reason.
    """

    found: int = 0
    used: int = 0
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason -> names
    notes: list[str] = field(default_factory=list)  # other remarks, such as repairs
    unnamed: dict[str, int] = field(default_factory=dict)  # skipped ones beyond MAX_NAMES, noted

    def skip(self, reason: str, name: str) -> None:
        """Count a candidate as skipped."""
        reason = printable(reason)
        if len(self.skipped) >= MAX_REASONS and reason not in self.skipped:
            reason = OTHER_REASONS
        names = self.skipped.setdefault(reason, [])
        if len(names) < MAX_NAMES:
            names.append(printable(name))
        else:
            self.unnamed[reason] = self.unnamed.get(reason, 0) + 1

    def note(self, remark: str) -> None:
        """Add a remark."""
        if len(self.notes) < MAX_REASONS:
            self.notes.append(printable(remark))
        else:
            self.unnamed[MORE_NOTES] = self.unnamed.get(MORE_NOTES, 0) + 1

    def add(self, other: "Report") -> None:
        """Count and name what another report does too."""
        self.found += other.found
        self.used += other.used
        for reason, names in other.skipped.items():
            for name in names:
                self.skip(reason, name)
        for remark in other.notes:
            self.note(remark)
        for what, count in other.unnamed.items():
            self.unnamed[what] = self.unnamed.get(what, 0) + count

    def note_replaced(self, count: int, name: str) -> None:
        """Add the remark that bytes of a file were no text, if there were any."""
        if count:
            self.note(f"{counted(count, 'invalid bytes')} replaced in {name} (save it as UTF-8)")

    def __str__(self) -> str:
        parts = [f"{self.found:,} found, {self.used:,} used"]
        for reason, names in self.skipped.items():
            count = len(names) + self.unnamed.get(reason, 0)
            shown = ", ".join(names[:NAMES_SHOWN])
            if count > NAMES_SHOWN:
                shown += ", ..."
            parts.append(f"{count:,} skipped: {reason} ({shown})")
        parts += self.notes
        more = self.unnamed.get(MORE_NOTES, 0)
        if more:
            parts.append(f"{more:,} {MORE_NOTES}")
        return "; ".join(parts)


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
    print(f"{counted(count, 'documents')}, {counted(size, 'bytes')}, {seconds:.1f} s")
    print(report)
    print(f"--- start of the first document ---\n{first[:excerpt_chars]}")
