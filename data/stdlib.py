"""The source code of Python's standard library: a small corpus for a code model.

Every installation has it, so it needs no download. One document a file; tests, installed packages
and the two folders of generated or vendored code are left out; equal files count once.

    python -m data.stdlib
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data.report import Report, show

# Not the library itself: its tests, the packages installed beside it, and pip's bundled wheel.
SKIP_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
                "idlelib", "ensurepip", "lib2to3"}  # fmt: skip


def python_files(root: Path, skip_folders: set[str] = SKIP_FOLDERS) -> Iterator[Path]:
    """The .py files under `root`, in an order that does not depend on the file system."""
    for folder, subfolders, names in os.walk(root):
        # os.walk lets us prune and order the descent by editing the list in place.
        subfolders[:] = sorted(set(subfolders) - skip_folders)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def library_folder() -> Path:
    """Where this interpreter keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def version() -> str:
    """What the documents depend on."""
    return f"stdlib-1 python-{platform.python_version()}"


def documents(report: Report | None = None) -> Iterator[str]:
    """Yield the text of each source file once."""
    report = report if report is not None else Report()
    seen = set()
    root = library_folder()
    for path in python_files(root):
        report.found += 1
        source = path.read_bytes()
        digest = hashlib.sha256(source).digest()
        name = path.relative_to(root).as_posix()
        if not source.strip():
            report.skip("empty", name)
        elif digest in seen:
            report.skip("the same text as another file", name)
        else:
            seen.add(digest)
            report.used += 1
            # A few files declare another encoding; their odd characters are not worth a parser.
            yield source.decode("utf-8", "replace").replace("\r\n", "\n")


if __name__ == "__main__":
    report = Report()
    show(documents(report), report)
