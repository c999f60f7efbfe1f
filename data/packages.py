"""Which package of the standard library is this code from? A text classification task, no download.

A class is a package: a folder of the standard library that Python imports under one name. An
example is a passage of a few lines from one of its files, and the answer is the package's name:

    def decode(self, s, _w=WHITESPACE.match):          json
        obj, end = self.raw_decode(s, idx=_w(s, 0).end())

The split is by files, so that no file is in two splits and memorizing a file does not help. A
package of few files may have only one for validation or test; the report says how many do. Files
copy from one another too. So a passage is not held out if it shares a run of 13 words with a file
of training, nor is it in test if it shares one with a file of validation.

Within a split, all classes have the same number of examples. Their first lines are spread evenly
over the files, so that in a small package the passages overlap. The name of the package may occur
in a passage; the report says how often.

Packages too small for enough passages are left out. The list of packages depends on the version of
Python.

    python -m data.packages
"""

import hashlib
import platform
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from data import command
from data.labelled import Passage
from data.report import Report, counted
from data.splits import HELD_OUT, SPLITS, TEST, TRAIN, VAL, overlap_of
from data.stdlib import library_folder, python_files

LENGTH = 400  # characters: the most that a passage has; the least is half of it
PER_CLASS = {TRAIN: 100, VAL: 25, TEST: 25}  # examples
HELD_OUT_SHARE = 0.3  # of a package's characters, at most, for validation and again for test


def passages(text: str) -> Iterator[str]:
    """Yield the passage that starts at each line that is not blank.

    It has as many whole lines as fit into LENGTH characters.
    """
    lines = text.splitlines(keepends=True)
    for start, line in enumerate(lines):
        end = start
        size = 0
        while end < len(lines) and size + len(lines[end]) <= LENGTH:
            size += len(lines[end])
            end += 1
        passage = "".join(lines[start:end]).strip("\n")
        if line.strip() and len(passage) >= LENGTH // 2:
            yield passage


def find_packages(root: Path, report: Report) -> dict[str, dict[str, str]]:
    """{package: {file name: text}} of the files below `root`; a text that repeats is used once."""
    packages = {}
    seen = set()
    for path in python_files(root):
        name = path.relative_to(root)
        package = name.parts[0]
        if len(name.parts) == 1 or not package.isidentifier():
            continue  # a module is a single file, which cannot be split
        content = path.read_bytes()
        if content in seen:
            continue
        seen.add(content)
        report.found += 1
        text = content.decode("utf-8", "replace").replace("\r\n", "\n")
        packages.setdefault(package, {})[name.as_posix()] = text
    return packages


def split_files(sources: dict[str, str]) -> dict[str, dict[str, str]]:
    """{split: {file name: text}} of a package's {file name: text}.

    The files are taken in the order of a hash of their names. A file is held out if, with it, the
    test files have at most HELD_OUT_SHARE of the package's characters, or else those of validation.
    """
    whole = sum(map(len, sources.values()))
    room = dict.fromkeys((TEST, VAL), HELD_OUT_SHARE * whole)
    split = {name: {} for name in SPLITS}
    for name in sorted(sources, key=lambda name: hashlib.sha256(name.encode()).digest()):
        size = len(sources[name])
        with_room = [part for part in room if size <= room[part]]
        part = with_room[0] if with_room else TRAIN
        if with_room:
            room[part] -= size
        split[part][name] = sources[name]
    return split


def split_passages(files: dict[str, dict[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """{split: (passage, its file)} of what `split_files` gives. No passage occurs twice."""
    found = {}
    known = set()  # the passages so far
    for split, texts in files.items():
        found[split] = []
        for name, text in texts.items():
            for passage in passages(text):
                if passage not in known:
                    known.add(passage)
                    found[split].append((passage, name))
    return found


def drop_copies(
    parts: dict[str, dict[str, list[tuple[str, str]]]], files: dict[str, dict[str, dict[str, str]]]
) -> int:
    """Remove the held-out passages that another split has; return how many.

    parts: {package: what `split_passages` gives}; files: {package: what `split_files` gives}.
    Validation is compared with training, and test with both.
    """
    dropped = 0
    texts = []  # of the splits so far
    for split in SPLITS:
        if split != TRAIN:
            held_out = [passage for own in parts.values() for passage, _ in own[split]]
            counts = dict(zip(held_out, overlap_of(held_out, texts)[:, 0]))
            for own in parts.values():
                kept = [pair for pair in own[split] if not counts[pair[0]]]
                dropped += len(own[split]) - len(kept)
                own[split] = kept
        texts += [text for own in files.values() for text in own[split].values()]
    return dropped


def evenly(items: list, count: int) -> list:
    """`count` of the items, spread evenly, starting with the first."""
    return [items[i * len(items) // count] for i in range(count)]


def version() -> str:
    """A name for the exact examples: it changes if they do."""
    return f"packages-3 python-{platform.python_version()}"


@lru_cache(maxsize=1)  # it takes seconds, and a comparison opens the same data many times
def read_library(root: Path) -> tuple[list[Passage], Report]:
    """The passages of the library in this folder; see `examples`."""
    report = Report()
    sources = find_packages(root, report)
    files = {package: split_files(own) for package, own in sources.items()}
    parts = {package: split_passages(own) for package, own in files.items()}
    dropped = drop_copies(parts, files)
    found = []
    single = 0
    for package, own in parts.items():
        if any(len(own[split]) < count for split, count in PER_CLASS.items()):
            report.skip("package too small", package)
            continue
        report.used += len(sources[package])
        for split, count in PER_CLASS.items():
            for text, source in evenly(own[split], count):
                found.append(Passage(text, (package,), split, source))
        single += any(len({name for _, name in own[split]}) == 1 for split in HELD_OUT)
    classes = {passage.labels[0] for passage in found}
    if len(classes) < 2:
        raise ValueError(
            f"too few packages of the standard library have source files ({report}): install a "
            "Python that comes with its source files"
        )
    named = sum(bool(re.search(rf"\b{p.labels[0]}\b", p.text)) for p in found)
    report.notes.append(f"{counted(len(classes), 'packages')}, {counted(len(found), 'passages')}")
    report.notes.append(f"{counted(single, 'packages')} with a single file for validation or test")
    not_held_out = counted(dropped, "passages")
    report.notes.append(f"{not_held_out} not held out, as another split has their text")
    report.notes.append(f"{named / len(found):.0%} of passages contain their package's name")
    return found, report


def examples(report: Report | None = None, root: Path | None = None) -> list[Passage]:
    """The passages, with their package as label.

    `root` is the library's folder, by default that of this Python. Raises ValueError if fewer than
    two packages are large enough.
    """
    found, own = read_library(root or library_folder())
    if report is not None:
        report.add(own)
    return list(found)


def look() -> None:
    """Print a few examples."""
    report = Report()
    found = examples(report)
    for text, (label,), split, _ in found[:: len(found) // 4]:
        print(f"--- {label} ({split}) ---\n{text}")
    print(report)


if __name__ == "__main__":
    command.run("packages", __doc__, look)
