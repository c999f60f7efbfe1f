"""The source code of Python's standard library: a small corpus for a code model.

Every installation of Python has it, so there is nothing to download. Left out are tests, installed
packages, and the folders of tools and of bundled code in SKIP_FOLDERS. Files with the same content
count once.

A document is a class or a function at the top of a file, with what follows it up to the next one;
the start of a file, with its imports, is a document too. There are only some 500 files, so that
whole files would be too few to hold out. A share of HELD_OUT of the documents is validation and
test, see splits.py. Other parts of their files are in training: the loss is that of unseen code of
known modules.

    python -m data.stdlib
"""

import hashlib
import os
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data import command
from data.report import Report, show
from data.splits import Document, split_of

HELD_OUT = 0.1  # share of the definitions of `docs`, `stdlib` and `chats` held out, half for each

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

# The start of a definition that is not indented: comments, decorators, then def or class NAME.
DEFINITION = re.compile(r"(?:^[#@].*\n)*^(?:async def|def|class) +(\w+)", re.MULTILINE)


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


def module_name(path: Path, root: Path, package: str) -> str:
    """.../numpy/linalg/__init__.py -> numpy.linalg"""
    parts = [package, *path.relative_to(root).with_suffix("").parts]
    return ".".join(part for part in parts if part not in ("", "__init__"))


def definitions(source: str, module: str) -> Iterator[tuple[str, str]]:
    """Cut a file before each definition: (name, text), the first one with the module's name.

    The names are those of `definition_of` in data/docs.py.
    """
    name = module
    start = 0
    for found in DEFINITION.finditer(source):
        yield name, source[start : found.start()]
        name = f"{module}:{found[1]}"
        start = found.start()
    yield name, source[start:]


def version() -> str:
    """A name for the exact documents: it changes if they do."""
    return f"stdlib-2 python-{platform.python_version()}"


def documents(report: Report | None = None) -> Iterator[Document]:
    """Yield the definitions of each source file once."""
    if report is None:
        report = Report()
    seen = set()
    root = library_folder()
    for path in python_files(root):
        report.found += 1
        source = path.read_bytes()
        digest = hashlib.sha256(source).digest()
        if not source.strip():
            report.skip("empty", path.relative_to(root).as_posix())
        elif digest in seen:
            report.skip("the same text as another file", path.relative_to(root).as_posix())
        else:
            seen.add(digest)
            report.used += 1
            # A few files declare another encoding. The characters that are lost in them are too
            # few to be worth reading the declaration.
            text = source.decode("utf-8", "replace").replace("\r\n", "\n")
            for name, part in definitions(text, module_name(path, root, "")):
                if part.strip():
                    yield Document(part, split_of(name, HELD_OUT), name)


def look() -> None:
    """Print the size of the data set and the start of its first document."""
    report = Report()
    show((document.text for document in documents(report)), report)


if __name__ == "__main__":
    command.run("stdlib", __doc__, look)
