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
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data import command, reading, tables
from data.report import Report, counted

MAX_BYTES = 1 << 26
IMAGES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
MAX_TARS = 100_000  # that a range may stand for
# What the library raises for a damaged tar.
TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError)
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
    """a-{08..10}.tar -> a-08.tar, a-09.tar, a-10.tar. With several ranges: all combinations.

    Raises ValueError if these are more than MAX_TARS.
    """
    count = 1
    for first, last in RANGE.findall(name):
        count *= max(0, int(last[:20]) - int(first[:20]) + 1)
    if count > MAX_TARS:
        raise ValueError(f"{name} stands for {count:,} files, more than {MAX_TARS:,}: give a glob")
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
    names = expand(str(Path(path).expanduser()))
    if not names:
        raise ValueError(f"the range in {path} is empty: give the smaller number first")
    for name in names:
        matches = [name] if Path(name).is_file() else glob.glob(name)
        if not matches:
            raise ValueError(f"there is no file {name}: give a .tar, a glob or a range of them")
        found += matches
    return [Path(name).resolve() for name in sorted(set(found)) if Path(name).is_file()]


def reason_to_skip(member: tarfile.TarInfo) -> str | None:
    """Why a member of a tar is not read; None if it is."""
    parts = PurePosixPath(member.name)
    if not member.isreg() or member.issparse():
        return "a link, a device or a sparse file"
    if parts.is_absolute() or ".." in parts.parts:
        return "its name leads out of the folder"
    if member.size > MAX_BYTES:
        return f"larger than {MAX_BYTES >> 20} MiB"
    return None


def members(path: Path, report: Report) -> Iterator[dict]:
    """Yield the files in a tar, as webdataset has them: {"fname": name, "data": content}.

    Only those that are safe to read are, and of several with the same name the first one. The
    report has the others. A member's content is read when its turn comes, from its place in the
    file, and not before the next header shows that it is there as a whole.
    """
    names = set()
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            size = path.stat().st_size
            while member := tar.next():
                tar.members.clear()  # the library keeps them all
                if member.size < 0:
                    raise tarfile.ReadError("a size below zero, which leads back")
                if member.isdir():
                    continue
                reason = reason_to_skip(member)
                if reason is None and member.offset_data + member.size > size:
                    raise tarfile.ReadError("it ends within a file")
                if reason is None and member.name in names:
                    reason = "a second file of that name"
                if reason:
                    report.skip(reason, f"{path.name}/{member.name}")
                    continue
                names.add(member.name)
                content = tar.extractfile(member).read()
                yield {"__url__": path.name, "fname": member.name, "data": content}
            # A complete tar ends with blocks of zeros. Without them, it was cut short.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it ends without its mark")
    except TAR_ERRORS as error:
        report.skip(f"not a whole, unpacked tar: {error}", path.name)


def captions_of(member: dict[str, bytes]) -> tuple[tuple[str, ...], int]:
    """The captions of a sample, {extension: content}, and the invalid bytes replaced in them.

    They are those of its .txt, or else of its .json, each once. Raises ValueError, with the reason,
    if they cannot be read.
    """
    if "txt" in member:
        text, replaced = reading.decode(member["txt"])
        listed = text.split("\n")
    elif "json" in member:
        text, replaced = reading.decode(member["json"])
        fields = tables.clean(tables.parse_json(text))
        listed = fields.get("caption") or fields.get("text") or []
        listed = listed if isinstance(listed, list) else [listed]
    else:
        return (), 0
    texts = [text.strip() for text in listed if isinstance(text, str)]
    return tuple(dict.fromkeys(filter(None, texts))), replaced


def grouped(path: Path, report: Report) -> Iterator[dict]:
    """Yield the samples of a tar as webdataset has them: "__key__", and {extension: content}."""
    tariterators = reading.extra("webdataset").tariterators

    def keyed() -> Iterator[dict]:
        for member in members(path, report):
            key, _ = tariterators.base_plus_ext(member["fname"])
            if key is None:
                report.skip("hidden, or without an extension", f"{path.name}/{member['fname']}")
            else:
                yield member

    def skip_second(error: Exception) -> bool:
        report.skip("a second file of that name and extension", f"{path.name}: {error.args[0]}")
        return True

    yield from tariterators.group_by_keys(keyed(), handler=skip_second)


def samples(path: str | Path, report: Report, split: bool = False) -> Iterator[Sample]:
    """Yield the pictures of all tars in order, with or without captions.

    With `split`, yield only the share of this rank (of torch.distributed, or by the environment
    variables RANK and WORLD_SIZE) and of this worker of a DataLoader. Raises ValueError if a tar
    is missing.
    """
    webdataset = reading.extra("webdataset")
    tars = iter(find(path))
    if split:
        tars = webdataset.split_by_worker(webdataset.split_by_node(tars))
    for tar in tars:
        invalid = 0
        unread: Counter[str] = Counter()  # reason -> captions
        for member in grouped(tar, report):
            name = f"{tar.name}/{member['__key__']}"
            image = next((kind for kind in IMAGES if kind in member), None)
            report.found += 1
            if not image:
                report.skip("no picture of that name, or not beside it", name)
                continue
            captions = ()
            try:
                captions, replaced = captions_of(member)
                invalid += replaced
            except ValueError as error:
                unread[str(error)] += 1
            yield Sample(f"{name}.{image}", member[image], captions)
        report.note_replaced(invalid, f"the captions in {tar.name}")
        for reason, count in unread.items():
            report.note(f"{counted(count, 'captions')} in {tar.name} not read: {reason}")


def images(path: str | Path, captioned: bool) -> Iterator[io.BytesIO]:
    """Yield the image files in the order of `samples`; with `captioned`, those with captions."""
    for sample in samples(path, Report()):
        if sample.captions or not captioned:
            yield io.BytesIO(sample.image)


def look(path: str) -> None:
    """Print the captions of all samples."""
    report = Report()
    for sample in samples(path, report):
        report.used += 1
        print(f"{sample.name}: {' | '.join(sample.captions)}")
    print(report)


if __name__ == "__main__":
    command.run("tars", __doc__, look, "PATH")
