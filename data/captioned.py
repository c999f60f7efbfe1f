"""Your own pictures with captions, in any of four forms.

    cats/1.png, cats/1.txt ...      next to each image a text file of its name: one caption a line
    pets/cat/1.png, pets/dog/2.jpg  a folder for each subject: "a picture of a cat"
    pairs.csv, pairs.jsonl          columns (or keys) "path" or "image", and "caption"; a picture
                                    may have several rows; paths are relative to the table
    shards-{000..009}.tar           such pairs in tar files, see tars.py

Training uses the first caption of a picture, retrieval uses all. An underscore in the name of a
folder is read as a space. Hidden files are left out. A report counts the pictures that were found,
used and skipped, with reasons. With the template "", no captions are read, and none are needed.

    python -m data.captioned my-pictures/
"""

import csv
import hashlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data import files, pictures, tars
from data.report import Report

SPLITS = ("train", "val")
TEMPLATE = "a picture of a {}"
HOW_TO_ADD = (
    "put a text file with its caption next to each image (1.png, 1.txt), or put the images into "
    "folders named for their subject, or list them in a .csv or .jsonl with the columns "
    '"path" and "caption"'
)


class Pair(NamedTuple):
    """A picture that is not opened yet, and its captions."""

    path: Path
    captions: tuple[str, ...]
    label: str  # the subject: its folder's name, or else the first caption


# ---- the four forms ------------------------------------------------------------------------------


def images_below(folder: Path) -> list[Path]:
    """The image files in a folder and all below it, without hidden ones, sorted by path."""
    found = []
    for path in folder.rglob("*"):
        if path.suffix.lower() not in pictures.SUFFIXES:
            continue
        hidden = "/." in f"/{path.relative_to(folder).as_posix()}"
        if not hidden and path.is_file():
            found.append(path)
    return sorted(found, key=Path.as_posix)


def folder_pairs(folder: Path, report: Report, template: str) -> Iterator[Pair]:
    """Yield the pairs of a folder and all below it, sorted by path.

    If one image of a folder has a text file, all others in it need one too, or are skipped.
    Otherwise the folder is named for the subject of its images.
    """
    images = images_below(folder)
    with_text = {image.parent for image in images if image.with_suffix(".txt").exists()}
    report.found += len(images)
    for image in images:
        if template and image.parent in with_text:
            try:
                text, _ = files.read(image.with_suffix(".txt"))
            except (ValueError, OSError) as error:
                report.skip(f"its caption: {error}", image.as_posix())
                continue
            captions = tuple(line.strip() for line in text.splitlines() if line.strip())
            yield Pair(image, captions, captions[0])
        elif image.parent != folder or not template:
            label = image.parent.name.replace("_", " ")
            yield Pair(image, (template.replace("{}", label),), label)
        else:
            report.skip("no caption", image.as_posix())


def table_captions(row: dict) -> list[str]:
    """The captions in a row of a table: a text, or a list of texts."""
    listed = row.get("caption")
    if not isinstance(listed, list):
        listed = [listed]
    return [text.strip() for text in listed if isinstance(text, str) and text.strip()]


def table_pairs(table: Path, report: Report, template: str) -> Iterator[Pair]:
    """Yield a pair for each picture of a table, with the captions of all its rows."""
    try:
        text, _ = files.read(table)
        if table.suffix.lower() == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [files.parse_json(line) for line in text.split("\n") if line.strip()]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{table} cannot be read: {error}") from error
    captions: dict[Path, list[str]] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            row = {}  # a line of a .jsonl that is no object
        path = row.get("path") or row.get("image")
        own = table_captions(row) if template else [""]
        if path and isinstance(path, str) and own:
            captions.setdefault(table.parent / path, []).extend(own)
        else:
            report.found += 1
            report.skip("no path or no caption", f"row {number}")
    report.found += len(captions)
    for path, own in captions.items():
        yield Pair(path, tuple(dict.fromkeys(own)), own[0])


def tar_pairs(path: Path, report: Report, template: str) -> Iterator[Pair]:
    """Yield the pairs of tar files. Their paths are TAR/PICTURE, which is no file."""
    for sample in tars.samples(path, report):
        captions = sample.captions if template else ("",)
        if captions:
            yield Pair(Path(sample.name), captions, captions[0])
        else:
            report.skip("no caption", sample.name)


def pairs(path: str | Path, report: Report, template: str = TEMPLATE) -> list[Pair]:
    """The pairs of a folder, a table or tars. No image is opened.

    Raises ValueError if the path is none of them, or there is no image, or none has a caption.
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
    if not found and template:
        raise ValueError(f"no image with a caption in {path} ({report}): {HOW_TO_ADD}")
    if not found:
        raise ValueError(f"no image in {path} ({report}): add some")
    return found


def version(path: str | Path, template: str = TEMPLATE) -> str:
    """A name for the exact pairs: captions, and names, sizes and times of change of the images."""
    if tars.is_tar(path):
        return f"tars-1 {files.fingerprint(tars.find(path))} {template}"
    digest = hashlib.sha256()
    for pair in pairs(path, Report(), template):
        digest.update(repr((*pair, files.state_of(pair.path))).encode())
    return f"captioned-1 {digest.hexdigest()}"


# ---- pairs -> records ----------------------------------------------------------------------------


def validation_paths(listed: list[Pair], val_fraction: float) -> set[Path]:
    """The paths of the validation pictures: those whose label and file name hash smallest.

    They are a share of `val_fraction`, but at least two, and at least one other is left.
    """
    hashes = {}
    for pair in listed:
        name = f"{pair.label}/{pair.path.name}".encode("utf-8", "surrogatepass")
        hashes[pair.path] = hashlib.sha256(name).digest()
    count = max(2, round(val_fraction * len(hashes)))
    count = min(count, len(hashes) - 1)
    return set(sorted(hashes, key=hashes.get)[:count])


def records(
    path: str | Path,
    size: int,
    channels: int,
    report: Report,
    template: str = TEMPLATE,
    val_fraction: float = 0.1,
) -> Iterator[pictures.Record]:
    """Yield a record for each readable pair, with an image uint8 (size, size, channels).

    A share of `val_fraction`, at least two, is in "val". The same picture under several names is
    in the split of the first one. Raises ValueError as `pairs` does, or if no image is readable.
    """
    listed = pairs(path, report, template)
    held_out = validation_paths(listed, val_fraction)
    if tars.is_tar(path):
        sources = tars.images(path, captioned=bool(template))
    else:
        sources = (pair.path for pair in listed)
    splits = {}  # hash of a picture -> its split
    with_frames = 0
    in_colour = 0
    for pair, source in zip(listed, sources):
        try:
            image, frames = pictures.decode(source, size, 3)
        except ValueError as error:
            report.skip(str(error), pair.path.as_posix())
            continue
        if frames > 1:
            with_frames += 1
        if channels == 1:
            if pictures.is_colored(image):
                in_colour += 1
            image = pictures.to_grey(image)
        content = hashlib.sha256(image.tobytes()).digest()
        split = splits.setdefault(content, "val" if pair.path in held_out else "train")
        report.used += 1
        yield pictures.Record(image, pair.captions, pair.label, split)
    if with_frames:
        report.notes.append(f"{with_frames:,} with several frames or pages, the first is used")
    if in_colour:
        report.notes.append(f"{in_colour:,} in colour, read as grey")
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
