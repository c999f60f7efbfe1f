"""Which package of the standard library is this code from? A text task that is on your disk.

Each class is a package: a folder of the standard library that Python imports by one name. An
example is a passage of a few lines from one of its files, and the answer is the package's name:

    def decode(self, s, _w=WHITESPACE.match):          json
        obj, end = self.raw_decode(s, idx=_w(s, 0).end())

The files, not the passages, are split: none is in two splits, so that to know a file by heart does
not help. All classes have the same number of examples in a split. They begin at lines evenly spread
over the files, so that in a small package they overlap. A package's own name is not hidden; the
report says how many passages contain it.

Packages too small for enough passages are left out. Which there are depends on the Python.

    python -m data.packages
"""

import hashlib
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from data.labelled import HELD_OUT, SPLITS, TRAIN, Passage
from data.report import Report
from data.stdlib import library_folder, python_files

LENGTH = 400  # characters of a passage, at most; at least half as many
PER_CLASS = {TRAIN: 100, HELD_OUT: 25}
HELD_OUT_SHARE = 1 / 3  # of a package's characters, at most


def passages(text: str) -> Iterator[str]:
    """Yield, for each line that is not blank, as many whole lines from it on as LENGTH allows."""
    lines = text.splitlines(keepends=True)
    for start, line in enumerate(lines):
        end, size = start, 0
        while end < len(lines) and size + len(lines[end]) <= LENGTH:
            size += len(lines[end])
            end += 1
        passage = "".join(lines[start:end]).strip("\n")
        if line.strip() and len(passage) >= LENGTH // 2:
            yield passage


def find_packages(root: Path, report: Report) -> dict[str, dict[str, str]]:
    """{package: {file: its text}} of the files under `root`, the same text once."""
    packages, seen = {}, set()
    for path in python_files(root):
        name = path.relative_to(root)
        package, content = name.parts[0], path.read_bytes()
        if len(name.parts) == 1 or not package.isidentifier() or content in seen:
            continue  # a module, which is one file and cannot be split
        seen.add(content)
        report.found += 1
        text = content.decode("utf-8", "replace").replace("\r\n", "\n")
        packages.setdefault(package, {})[name.as_posix()] = text
    return packages


def split_files(sources: dict[str, str]) -> dict[str, list[str]]:
    """{split: texts}. In the order of a hash of their names, files are held out as long as they
    are no more than HELD_OUT_SHARE of the characters."""
    room = HELD_OUT_SHARE * sum(map(len, sources.values()))
    split = {name: [] for name in SPLITS}
    for name in sorted(sources, key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = sources[name]
        held_out = len(text) <= room
        room -= len(text) if held_out else 0
        split[HELD_OUT if held_out else TRAIN].append(text)
    return split


def evenly(items: list[str], count: int) -> list[str]:
    """`count` of them, spread evenly from the first on."""
    return [items[i * len(items) // count] for i in range(count)]


def version() -> str:
    """What the examples depend on."""
    return f"packages-1 python-{platform.python_version()}"


def examples(report: Report | None = None, root: Path | None = None) -> list[Passage]:
    """The passages, with their package as label. Raises ValueError if fewer than two packages are
    large enough."""
    report, found = report if report is not None else Report(), []
    sources = find_packages(root or library_folder(), report)
    for package, files in sources.items():
        parts, known = {}, set()
        for split, texts in split_files(files).items():  # what training shows is not asked later
            own = dict.fromkeys(part for text in texts for part in passages(text))
            parts[split] = [part for part in own if part not in known]
            known.update(own)
        if any(len(parts[split]) < count for split, count in PER_CLASS.items()):
            report.skip("package too small", package)
            continue
        report.used += len(files)
        for split, count in PER_CLASS.items():
            found += [Passage(part, (package,), split) for part in evenly(parts[split], count)]
    classes = {label for _, (label,), _ in found}
    if len(classes) < 2:
        raise ValueError(f"too few packages of the standard library have source files: {report}")
    told = sum(bool(re.search(rf"\b{label}\b", text)) for text, (label,), _ in found)
    report.notes.append(f"{len(classes)} packages, {len(found):,} passages")
    report.notes.append(f"{told / len(found):.0%} of passages contain their package's name")
    return found


if __name__ == "__main__":
    report = Report()
    found = examples(report)
    for text, (label,), split in found[:: len(found) // 4]:
        print(f"--- {label} ({split}) ---\n{text}")
    print(report)
