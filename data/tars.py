"""Pictures with captions in tar files, as the library webdataset reads them.

    shards-000.tar:  1.png 1.txt  2.jpg 2.json ...    files of one name follow each other

A `.txt` holds a caption a line, a `.json` has them under "caption" or "text". A tar is read from
its beginning to its end, at the speed of the disk, where as many small files would make it seek.

Several tars, "shards-{000..009}.tar" or a glob, are dealt out: rank r of R takes each R-th, of
these its worker w of W each W-th, so that every picture is seen once (webdataset: split_by_node,
split_by_worker). Nothing is unpacked onto the disk, no URL is opened and no command run, though
the library could. Before it reads a tar, we look through the list of its members: links, devices,
names that lead out of the folder, and what would take more than MAX_BYTES, as a sparse file of
nothing may, are skipped and counted, and so are tars that are packed, cut short or no tars.

    python -m data.tars "shards-{000..009}.tar"
"""

import glob
import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data import files
from data.report import Report

MAX_BYTES = 1 << 26
IMAGES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Sample(NamedTuple):
    """A picture that was not decoded yet, and what is said of it."""

    name: str  # of the tar, a slash, and of the picture in it
    image: bytes
    captions: tuple[str, ...]


def is_tar(path: str | Path) -> bool:
    return str(path).lower().endswith(".tar")


def find(path: str | Path) -> list[Path]:
    """The tars that a name, a glob, or a name with {000..009} stands for. Raises ValueError for
    none, or if one of a range is missing."""
    names = [str(Path(path).expanduser())]
    while any(map(RANGE.search, names)):
        names = [
            RANGE.sub(f"{number:0{len(first)}d}", name, count=1)
            for name in names
            for first, last in [RANGE.search(name).groups()]
            for number in range(int(first), int(last) + 1)
        ]
    if missing := [name for name in names if not glob.glob(name) and not Path(name).is_file()]:
        raise ValueError(f"there is no file {missing[0]}")
    found = [p for name in names for p in ([name] if Path(name).is_file() else glob.glob(name))]
    return [Path(name).resolve() for name in sorted(dict.fromkeys(found))]


def allowed(path: Path, report: Report) -> set[str]:
    """The members of a tar that are safe to read; the others are reported."""
    names = set()
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as members:
            for member in members:
                parts = PurePosixPath(member.name)
                if member.isdir():
                    continue
                reason = ""
                if not member.isreg() or member.issparse():
                    reason = "a link, a device or a sparse file"
                elif parts.is_absolute() or ".." in parts.parts:
                    reason = "its name leads out of the folder"
                elif member.size > MAX_BYTES:
                    reason = f"larger than {MAX_BYTES >> 20} MiB"
                elif member.name in names:
                    reason = "a second file of that name"
                if reason:
                    report.skip(reason, f"{path.name}/{member.name}")
                else:
                    names.add(member.name)
            members.fileobj.seek(members.offset)
            if members.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it ends without its mark")
    except (tarfile.TarError, OSError, EOFError) as error:
        report.skip(f"not a whole, unpacked tar: {error}", path.name)
    return names


def captions_of(member: dict[str, bytes]) -> tuple[str, ...]:
    """The captions of a sample, as its .txt or .json has them; none if they cannot be read."""
    said = member.get("txt", b"").decode("utf-8", "replace").splitlines()
    try:
        found = json.loads(member.get("json", b"{}"))
        said = said or found.get("caption") or found.get("text") or []
    except (ValueError, AttributeError, RecursionError):
        pass
    said = [said] if isinstance(said, str) else said
    texts = [text.strip() for text in said if isinstance(text, str)]
    return tuple(dict.fromkeys(filter(None, texts)))


def samples(path: str | Path, report: Report, split: bool = False) -> Iterator[Sample]:
    """Yield the pictures of all tars in order, with captions or without.

    With `split` only those of this rank (of torch.distributed, or RANK and WORLD_SIZE) and this
    worker of a DataLoader. Raises ValueError if there is no such tar.
    """
    webdataset = files.extra("webdataset")
    tars = iter(find(path))
    if split:
        tars = webdataset.split_by_worker(webdataset.split_by_node(tars))
    for tar in tars:
        names = allowed(tar, report)

        def first(name: str, names: set[str] = names) -> bool:
            known = name in names
            names.discard(name)
            return known

        with open(tar, "rb") as stream:  # by us: the library would take a name for a URL
            read = webdataset.tariterators.tar_file_expander(
                [{"url": tar.name, "stream": stream}],
                select_files=first,
                handler=webdataset.ignore_and_continue,  # `allowed` has told
            )
            grouped = webdataset.tariterators.group_by_keys(
                read, handler=webdataset.ignore_and_continue
            )
            for member in grouped:
                name = f"{tar.name}/{member['__key__']}"
                image = next((kind for kind in IMAGES if kind in member), None)
                report.found += 1
                if image:
                    yield Sample(f"{name}.{image}", member[image], captions_of(member))
                else:
                    report.skip("no picture of that name, or not beside it", name)


def images(path: str | Path, captioned: bool) -> Iterator[io.BytesIO]:
    """The files of the pictures, in the order of `samples`; perhaps only of those with captions."""
    for sample in samples(path, Report()):
        if sample.captions or not captioned:
            yield io.BytesIO(sample.image)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit('usage: python -m data.tars PATH    (a .tar, or "shards-{000..009}.tar")')
    report = Report()
    try:
        for sample in samples(sys.argv[1], report):
            report.used += 1
            print(f"{sample.name}: {' | '.join(sample.captions)}")
    except ValueError as error:
        sys.exit(str(error))
    print(report)
