"""The source code of Python's standard library: a small corpus for a code model.

Every installation of Python has it, so there is nothing to download. Each source file is one
document. Left out are tests, installed packages, and the folders of tools and of bundled code in
SKIP_FOLDERS. Files with the same content count once.

    python -m data.stdlib
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data.report import Report, show

SKIP_FOLDERS = {
    # Tests.
    "test",
    "tests",
    "idle_test",
    # Packages that were installed into the same folder, and compiled files.
    "site-packages",
    "dist-packages",
    "__pycache__",
    # IDLE, the bundled pip, and the former 2to3.
    "idlelib",
    "ensurepip",
    "lib2to3",
}


def python_files(root: Path, skip_folders: set[str] = SKIP_FOLDERS) -> Iterator[Path]:
    """Yield the .py files below `root`, in an order that does not depend on the file system."""
    for folder, subfolders, names in os.walk(root):
        # os.walk visits what is left in this list: here the descent is pruned and sorted.
        subfolders[:] = sorted(set(subfolders) - skip_folders)
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(folder, name)


def library_folder() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def version() -> str:
    """A name for the exact documents: it changes if they do."""
    return f"stdlib-1 python-{platform.python_version()}"


def documents(report: Report | None = None) -> Iterator[str]:
    """Yield the text of each source file once."""
    if report is None:
        report = Report()
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
            # A few files declare another encoding. The characters that are lost in them are too
            # few to be worth reading the declaration.
            yield source.decode("utf-8", "replace").replace("\r\n", "\n")


if __name__ == "__main__":
    report = Report()
    show(documents(report), report)
