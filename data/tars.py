"""Pictures with captions in tar files, as the library webdataset reads them.

    shards-000.tar:  1.png 1.txt  2.jpg 2.json ...    the files of one picture stand together

A `.txt` has a caption in each line; a `.json` has them under "caption" or "text". A tar is read
from start to end at the full speed of the disk. The same pictures as small files would take longer.

Several tars are named as "shards-{000..009}.tar" or by a glob. They are divided so that each
picture is seen once: rank r of R takes the tars r, r + R, r + 2R ...; and of these, worker w of W
takes every W-th (webdataset: split_by_node, split_by_worker).

Tars may come from strangers. The library could open URLs and run commands; here it does neither,
and nothing is unpacked onto the disk. The list of members is checked before a tar is read. Links,
devices, names that lead out of the folder, and files larger than MAX_BYTES (a sparse file may
claim any size) are skipped and counted. So are files that are compressed, incomplete or no tar.

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
    """A picture that is not decoded yet, and its captions."""

    name: str  # TAR/PICTURE
    image: bytes  # the content of the image file
    captions: tuple[str, ...]


def is_tar(path: str | Path) -> bool:
    """Whether a path ends in .tar."""
    return str(path).lower().endswith(".tar")


def expand(name: str) -> list[str]:
    """a-{08..10}.tar -> a-08.tar, a-09.tar, a-10.tar. With several ranges: all combinations."""
    found = RANGE.search(name)
    if not found:
        return [name]
    first, last = found.groups()
    expanded = []
    for number in range(int(first), int(last) + 1):
        padded = f"{number:0{len(first)}d}"
        expanded += expand(name[: found.start()] + padded + name[found.end() :])
    return expanded


def find(path: str | Path) -> list[Path]:
    """The tars that a path names: one file, a glob, or a range such as {000..009}, sorted.

    Raises ValueError if there is none, or if one of a range is missing.
    """
    found = []
    for name in expand(str(Path(path).expanduser())):
        matches = [name] if Path(name).is_file() else glob.glob(name)
        if not matches:
            raise ValueError(f"there is no file {name}: give a .tar, a glob or a range of them")
        found += matches
    return [Path(name).resolve() for name in sorted(set(found))]


def allowed(path: Path, report: Report) -> set[str]:
    """The names of the members of a tar that are safe to read; the report has the others."""
    names = set()
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as members:
            for member in members:
                if member.isdir():
                    continue
                parts = PurePosixPath(member.name)
                if not member.isreg() or member.issparse():
                    reason = "a link, a device or a sparse file"
                elif parts.is_absolute() or ".." in parts.parts:
                    reason = "its name leads out of the folder"
                elif member.size > MAX_BYTES:
                    reason = f"larger than {MAX_BYTES >> 20} MiB"
                elif member.name in names:
                    reason = "a second file of that name"
                else:
                    names.add(member.name)
                    continue
                report.skip(reason, f"{path.name}/{member.name}")
            # A complete tar ends with blocks of zeros. Without them, it was cut short.
            members.fileobj.seek(members.offset)
            if members.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it ends without its mark")
    except (tarfile.TarError, OSError, EOFError) as error:
        report.skip(f"not a whole, unpacked tar: {error}", path.name)
    return names


def captions_of(member: dict[str, bytes]) -> tuple[str, ...]:
    """The captions of a sample, {extension: content}: of its .txt, or else of its .json.

    None if there are none or they cannot be read.
    """
    listed = member.get("txt", b"").decode("utf-8", "replace").splitlines()
    if not listed:
        try:
            fields = json.loads(member.get("json", b"{}"))
            listed = fields.get("caption") or fields.get("text") or []
        except (ValueError, AttributeError, RecursionError):
            pass
    if isinstance(listed, str):
        listed = [listed]
    if not isinstance(listed, list):
        listed = []  # neither a text nor a list of them
    texts = [text.strip() for text in listed if isinstance(text, str)]
    return tuple(dict.fromkeys(filter(None, texts)))


def grouped(tar: Path, names: set[str]) -> Iterator[dict]:
    """Yield the samples of a tar as webdataset has them: "__key__", and {extension: content}.

    Only members in `names` are read, and of several with the same name the first one.
    """
    webdataset = files.extra("webdataset")
    unread = set(names)

    def is_first(name: str) -> bool:
        if name not in unread:
            return False
        unread.remove(name)
        return True

    # Errors are ignored, because `allowed` has reported them.
    ignore = webdataset.ignore_and_continue
    with open(tar, "rb") as stream:  # opened here: the library might take a name for a URL
        members = webdataset.tariterators.tar_file_expander(
            [{"url": tar.name, "stream": stream}], select_files=is_first, handler=ignore
        )
        yield from webdataset.tariterators.group_by_keys(members, handler=ignore)


def samples(path: str | Path, report: Report, split: bool = False) -> Iterator[Sample]:
    """Yield the pictures of all tars in order, with or without captions.

    With `split`, yield only the share of this rank (of torch.distributed, or by the environment
    variables RANK and WORLD_SIZE) and of this worker of a DataLoader. Raises ValueError if a tar
    is missing.
    """
    webdataset = files.extra("webdataset")
    tars = iter(find(path))
    if split:
        tars = webdataset.split_by_worker(webdataset.split_by_node(tars))
    for tar in tars:
        for member in grouped(tar, allowed(tar, report)):
            name = f"{tar.name}/{member['__key__']}"
            image = next((kind for kind in IMAGES if kind in member), None)
            report.found += 1
            if image:
                yield Sample(f"{name}.{image}", member[image], captions_of(member))
            else:
                report.skip("no picture of that name, or not beside it", name)


def images(path: str | Path, captioned: bool) -> Iterator[io.BytesIO]:
    """Yield the image files in the order of `samples`; with `captioned`, those with captions."""
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
