"""Your own pictures with captions, in any of four forms.

    cats/1.png, cats/1.txt ...      beside each image a text file of its name; a caption a line
    pets/cat/1.png, pets/dog/2.jpg  a folder for each kind: "a picture of a cat"
    pairs.csv, pairs.jsonl          columns (or keys) "path" or "image", and "caption"; a picture
                                    may have several rows, paths are relative to the table
    shards-{000..009}.tar           such pairs in tar files, see tars.py

The first caption of a picture is the one to train on, retrieval takes them all. An underscore in
the name of a folder is read as a space. Hidden files are left alone. A report says what was found,
used and skipped, and why. With template "" no captions are read, and none are needed.

    python -m data.captioned my-pictures/
"""

import csv
import hashlib
import io
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data import files, pictures, tars
from data.report import Report

SPLITS = ("train", "val")
TEMPLATE = "a picture of a {}"
HOW_TO_ADD = (
    "put a text file with its caption beside each image (1.png, 1.txt), or the images into folders "
    'named for what they show, or list them in a .csv or .jsonl with columns "path" and "caption"'
)


class Pair(NamedTuple):
    """A picture that was not opened yet, and what is said of it."""

    path: Path
    captions: tuple[str, ...]
    label: str  # what it shows: its folder's name, or else the first caption


def folder_pairs(folder: Path, report: Report, template: str) -> Iterator[Pair]:
    """Yield the pairs of a folder and all below it, sorted by path. A folder in which one image has
    a text file is one of captions, where images without are skipped; another one is a kind."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in pictures.SUFFIXES)
    shown = (path for path in found if "/." not in f"/{path.relative_to(folder).as_posix()}")
    images = sorted(filter(Path.is_file, shown), key=Path.as_posix)
    with_text = {image.parent for image in images if image.with_suffix(".txt").exists()}
    report.found += len(images)
    for image in images:
        if template and image.parent in with_text:
            try:
                lines = files.read(image.with_suffix(".txt"))[0].splitlines()
            except (ValueError, OSError) as error:
                report.skip(f"its caption: {error}", image.as_posix())
                continue
            captions = tuple(line.strip() for line in lines if line.strip())
            yield Pair(image, captions, captions[0])
        elif image.parent != folder or not template:
            label = image.parent.name.replace("_", " ")
            yield Pair(image, (template.replace("{}", label),), label)
        else:
            report.skip("no caption", image.as_posix())


def table_pairs(table: Path, report: Report, template: str) -> Iterator[Pair]:
    """Yield a pair for each picture of a table, with the captions of all its rows."""
    try:
        text = files.read(table)[0]
        if table.suffix.lower() == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [files.parse_json(line) for line in text.split("\n") if line.strip()]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{table} cannot be read: {error}") from error
    pictured: dict[Path, list[str]] = {}
    for number, row in enumerate(rows, 1):
        row = row if isinstance(row, dict) else {}
        path, said = row.get("path") or row.get("image"), row.get("caption")
        said = [text for text in (said if isinstance(said, list) else [said])
                if isinstance(text, str) and text.strip()] if template else [""]  # fmt: skip
        if path and isinstance(path, str) and said:
            pictured.setdefault(table.parent / path, []).extend(map(str.strip, said))
        else:
            report.found += 1
            report.skip("no path or no caption", f"row {number}")
    report.found += len(pictured)
    for path, said in pictured.items():
        yield Pair(path, tuple(dict.fromkeys(said)), said[0])


def tar_pairs(path: Path, report: Report, template: str) -> Iterator[Pair]:
    """Yield the pairs of tar files; their paths name no file."""
    for sample in tars.samples(path, report):
        captions = sample.captions if template else ("",)
        if captions:
            yield Pair(Path(sample.name), captions, captions[0])
        else:
            report.skip("no caption", sample.name)


def pairs(path: str | Path, report: Report, template: str = TEMPLATE) -> list[Pair]:
    """The pairs of a folder or a table; no image is opened.

    Raises ValueError if the path is neither, or there is no image, or none has a caption.
    """
    path = Path(path).expanduser()
    if tars.is_tar(path):
        found = list(tar_pairs(path, report, template))
    elif path.is_dir():
        found = list(folder_pairs(path, report, template))
    elif path.is_file() and path.suffix.lower() in (".csv", ".jsonl"):
        found = list(table_pairs(path, report, template))
    else:
        raise ValueError(f"{path} is not a folder with images, nor a .tar, .csv or .jsonl of them")
    if not found:
        need, advice = ("image with a caption", HOW_TO_ADD) if template else ("image", "add some")
        raise ValueError(f"no {need} in {path} ({report}): {advice}")
    return found


def version(path: str | Path, template: str = TEMPLATE) -> str:
    """What the pairs depend on: captions, and the images' names, sizes and times of change."""
    if tars.is_tar(path):
        return f"tars-1 {files.fingerprint(tars.find(path))} {template}"
    digest = hashlib.sha256()
    for pair in pairs(path, Report(), template):
        stat = pair.path.stat() if pair.path.exists() else None
        digest.update(repr((*pair, stat and (stat.st_size, stat.st_mtime_ns))).encode())
    return f"captioned-1 {digest.hexdigest()}"


def records(path: str | Path, size: int, channels: int, report: Report, template: str = TEMPLATE,
            val_fraction: float = 0.1) -> Iterator[pictures.Record]:  # fmt: skip
    """Yield a record for each readable pair. Raises ValueError as `pairs` does, or if none is.

    A share of val_fraction, at least two, is in "val": those whose label and file name have the
    smallest hash. The same picture under several names is in one split, that of the first.
    """
    listed = pairs(path, report, template)
    draws = {}
    for pair in listed:
        name = f"{pair.label}/{pair.path.name}".encode("utf-8", "surrogatepass")
        draws[pair.path] = hashlib.sha256(name).digest()
    count = min(max(2, round(val_fraction * len(draws))), len(draws) - 1)
    held_out = set(sorted(draws, key=draws.get)[:count])
    notes, splits = Counter(), {}  # of the pictures so far; splits: digest -> split
    sources = (pair.path for pair in listed)
    if tars.is_tar(path):
        sources = tars.images(path, captioned=bool(template))
    for pair, source in zip(listed, sources):
        try:
            image, frames = pictures.decode(source, size, 3)
        except ValueError as error:
            report.skip(str(error), pair.path.as_posix())
            continue
        notes["with several frames or pages, the first is used"] += frames > 1
        notes["in colour, read as grey"] += channels == 1 and pictures.is_colored(image)
        image = pictures.to_grey(image) if channels == 1 else image
        content = hashlib.sha256(image.tobytes()).digest()
        split = splits.setdefault(content, "val" if pair.path in held_out else "train")
        report.used += 1
        yield pictures.Record(image, pair.captions, pair.label, split)
    report.notes += [f"{count:,} {what}" for what, count in notes.items() if count]
    if not report.used:
        raise ValueError(f"no image in {path} can be used: {report}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m data.captioned PATH    (a folder, .csv, .jsonl or .tar)")
    report = Report()
    try:
        for record in records(sys.argv[1], 32, 3, report):
            print(f"{record.split}: {' | '.join(record.captions)}")
    except ValueError as error:
        sys.exit(str(error))
    print(report)
