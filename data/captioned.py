"""Your own pictures with captions, in any of five forms.

    cats/1.png, cats/1.txt ...      next to each image a text file of its name: one caption a line
    pets/cat/1.png, pets/dog/2.jpg  a folder for each subject: "a picture of a cat"
    cats/metadata.jsonl (or .csv)   a table in the folder, as the library datasets reads it:
                                    "file_name", and "text" or any other column
    pairs.csv, pairs.jsonl          or another table (tables.py) with columns "path", "image" or
                                    "file_name", and "caption" or "text"; a picture may have several
                                    rows; paths are relative to the table
    shards-{000..009}.tar           such pairs in tar files, see tars.py

Folders that are named for splits are splits: `train`, `val` (or validation, valid, dev) and `test`
(or eval), if there is a `train` and another one. A split that has no folder is drawn from `train`.
Otherwise a share of the pictures is held out, half of it for validation and half for test; a hash
of the name decides. A picture that is near to one of another split (near.py) moves to that split;
it is left out if it is near to two splits, or if your folders say where it belongs.

Training uses the first caption of a picture, retrieval uses all. An underscore in the name of a
folder is read as a space. Hidden files are left out. Linked folders are read, each folder once. A
report counts the pictures that were found, used and skipped, with reasons, and all other files.
With the template "", no captions are read, and none are needed.

    python -m data.captioned my-pictures/
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data import command, pictures, reading, tables, tars
from data.near import Seen
from data.report import Report, counted
from data.splits import HELD_OUT, TEST, TRAIN, VAL

FOLDERS = {  # names of folders that are splits, as the library datasets has them -> the split
    "train": TRAIN,
    "training": TRAIN,
    "val": VAL,
    "validation": VAL,
    "valid": VAL,
    "dev": VAL,
    "test": TEST,
    "testing": TEST,
    "eval": TEST,
    "evaluation": TEST,
}
METADATA = ("metadata.jsonl", "metadata.csv")
PATHS = ("path", "image", "file_name")  # columns with the path of a picture
CAPTIONS = ("caption", "text")  # columns with a caption, or a list of them
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
    split: str = ""  # "val" or "test", if your folders say so; "" = train, or to be drawn


# ---- the five forms ------------------------------------------------------------------------------


def files_below(folder: Path, report: Report) -> list[Path]:
    """The files in a folder and all below it, without hidden ones, sorted by path.

    Linked folders are read after the others, and each folder once. The report's notes count what
    is left out.
    """
    found = []
    left_out: Counter[str] = Counter()
    read = set()
    waiting = [str(folder)]

    def cannot_read(error: OSError) -> None:
        left_out["folders that cannot be read"] += 1

    while waiting:
        for parent, folders, names in os.walk(waiting.pop(0), onerror=cannot_read):
            real = os.path.realpath(parent)
            if real in read:
                left_out["links to a folder that is read already"] += 1
                folders.clear()
                continue
            read.add(real)
            left_out["hidden"] += sum(name[0] == "." for name in (*folders, *names))
            folders[:] = [name for name in folders if name[0] != "."]
            paths = [os.path.join(parent, name) for name in folders]
            waiting += filter(os.path.islink, paths)  # os.walk does not enter these
            for name in names:
                path = Path(parent, name)
                if name[0] == ".":
                    continue
                if path.is_file():
                    found.append(path)
                else:
                    left_out["links to nothing, or no files"] += 1
    add_note(report, left_out)
    return sorted(found, key=Path.as_posix)


def add_note(report: Report, left_out: Counter[str]) -> None:
    """Say in the report how many files were left out, by kind."""
    parts = [f"{count:,} {kind}" for kind, count in sorted(left_out.items()) if count]
    if parts:
        report.notes.append(f"not read: {', '.join(parts)}")


def find_splits(folder: Path, images: list[Path]) -> dict[str, str]:
    """{name of a folder: split}, if the folders of the images are named for splits."""
    tops = {image.relative_to(folder).parts[0] for image in images if image.parent != folder}
    splits = {top: FOLDERS[top.lower()] for top in tops if top.lower() in FOLDERS}
    return splits if TRAIN in splits.values() and len(set(splits.values())) > 1 else {}


def text_captions(image: Path) -> tuple[tuple[str, ...], int]:
    """The captions in the text file next to an image, and the invalid bytes replaced in them.

    Raises ValueError or OSError if it cannot be read.
    """
    text, replaced = reading.read(image.with_suffix(".txt"))
    return tuple(line.strip() for line in text.split("\n") if line.strip()), replaced


def read_metadata(found: list[Path], report: Report) -> dict[str, tuple[str, ...]]:
    """{path of a picture: its captions} of the tables in a folder."""
    captions = {}
    for table in found:
        of_table = Report()
        for pair in table_pairs(table, of_table, TEMPLATE):
            captions[os.path.normpath(pair.path)] = pair.captions
        for reason, rows in of_table.skipped.items():
            report.notes.append(f"{counted(len(rows), 'rows')} of {table.name}: {reason}")
        report.notes += of_table.notes
    return captions


def folder_pairs(folder: Path, report: Report, template: str) -> Iterator[Pair]:
    """Yield the pairs of a folder and all below it, sorted by path.

    If one image of a folder has a text file, all others in it need one too, or are skipped. So do
    images in a folder with a metadata table, or below it. Otherwise the folder is named for the
    subject of its images.
    """
    # The images, their text files and tables, and other files.
    found = files_below(folder, report)
    images = [path for path in found if path.suffix.lower() in pictures.suffixes()]
    report.found += len(images)
    texts = {image.with_suffix(".txt") for image in images}.intersection(found)
    metadata = [path for path in found if path.name in METADATA]
    others = set(found).difference(images, texts, metadata)
    add_note(report, Counter(path.suffix.lower() or "without a suffix" for path in others))

    # What they say.
    splits = find_splits(folder, images)
    roots = {folder, *(folder / top for top in splits)}  # not named for a subject
    with_text = {text.parent for text in texts}
    listed = read_metadata(metadata, report) if template else {}
    with_table = {table.parent for table in metadata}
    missing = set(listed).difference(map(os.path.normpath, images))
    for path in sorted(missing):
        report.found += 1
        report.skip("in a metadata table, but no picture", path)

    invalid = 0
    for image in images:
        name = image.as_posix()
        split = splits.get(image.relative_to(folder).parts[0], "")
        if splits and not split:
            report.skip("beside the folders of the splits", name)
            continue
        label = image.parent.name.replace("_", " ")
        captions = (template.replace("{}", label),)
        if template and not with_table.isdisjoint(image.parents):
            captions = listed.get(os.path.normpath(image), ())
        elif template and image.parent in with_text:
            try:
                captions, replaced = text_captions(image)
                invalid += replaced
            except (ValueError, OSError) as error:
                report.skip(f"its caption: {reading.reason_of(error)}", name)
                continue
        elif template and image.parent in roots:
            captions = ()
        else:
            yield Pair(image, captions, label, split.replace(TRAIN, ""))
            continue
        if captions:
            yield Pair(image, captions, captions[0], split.replace(TRAIN, ""))
        else:
            report.skip("no caption", name)
    report.note_replaced(invalid, f"the captions in {folder}")


def caption_column(rows: list[dict], report: Report) -> str:
    """The column of a table with the captions: one of CAPTIONS, or else the first with text."""
    columns = dict.fromkeys(name for row in rows for name in row)
    for name in CAPTIONS:
        if name in columns:
            return name
    for name in columns:
        if name not in PATHS and any(captions_in(row.get(name)) for row in rows):
            report.notes.append(f"captions from the column {name!r}")
            return name
    return CAPTIONS[0]


def captions_in(cell: object) -> list[str]:
    """The captions in a cell of a table: a text, or a list of texts."""
    listed = cell if isinstance(cell, list) else [cell]
    return [text.strip() for text in listed if isinstance(text, str) and text.strip()]


def table_pairs(table: Path, report: Report, template: str) -> Iterator[Pair]:
    """Yield a pair for each picture of a table, with the captions of all its rows."""
    read = Report()  # of rows; ours is of pictures
    rows = list(tables.records(table, read))
    report.notes += read.notes
    for reason, places in read.skipped.items():
        report.found += len(places)
        report.skipped.setdefault(reason, []).extend(places)
    column = caption_column([row for _, row in rows], report) if template else ""
    captions: dict[Path, list[str]] = {}
    for place, row in rows:
        path = next((row[name] for name in PATHS if row.get(name)), "")
        own = captions_in(row.get(column)) if template else [""]
        if path and isinstance(path, str) and own:
            captions.setdefault(table.parent / path, []).extend(own)
        else:
            report.found += 1
            report.skip("no path or no caption", place)
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
    elif path.is_file() and tables.kind_of(path):
        found = list(table_pairs(path, report, template))
    else:
        kinds = ", ".join(tables.SUFFIXES)
        raise ValueError(f"{path} is not a folder with images, nor a .tar, {kinds} of them")
    if not found and template:
        raise ValueError(f"no image with a caption in {path} ({report}): {HOW_TO_ADD}")
    if not found:
        raise ValueError(f"no image in {path} ({report}): add some")
    return found


def version(path: str | Path, template: str = TEMPLATE) -> str:
    """A name for the exact pairs: captions, and names, sizes and times of change of the images."""
    if tars.is_tar(path):
        return f"tars-2 {reading.fingerprint(tars.find(path))} {template}"
    digest = hashlib.sha256()
    for pair in pairs(path, Report(), template):
        digest.update(repr((*pair, reading.state_of(pair.path))).encode())
    return f"captioned-2 {digest.hexdigest()}"


# ---- pairs -> records ----------------------------------------------------------------------------


def choose_splits(listed: Sequence[Pair], val_fraction: float) -> dict[Path, str]:
    """{path: split} of all pairs.

    Of those without a split, a share of val_fraction / 2 goes to each of "val" and "test" that your
    folders do not have, but at least two, and at least one is left for "train". The hash of a
    picture's path in the folder decides, so its captions and the name of the folder do not matter.
    """
    root = os.path.commonpath([pair.path.parent for pair in listed])
    drawn = {}  # path -> hash
    splits = {}
    for pair in listed:
        splits[pair.path] = pair.split or TRAIN
        if not pair.split:
            name = pair.path.relative_to(root).as_posix()
            drawn[pair.path] = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    missing = [split for split in HELD_OUT if split not in splits.values()]
    if drawn and missing:
        count = max(2, round(val_fraction / 2 * len(drawn)))
        count = min(count, (len(drawn) - 1) // len(missing))
        order = sorted(drawn, key=drawn.get)
        for i, split in enumerate(missing):
            splits |= dict.fromkeys(order[i * count : (i + 1) * count], split)
    return splits


def settle(split: str, given: set[str], near: set[str]) -> str:
    """The split of a picture that is near to pictures of the splits `near`; "" = leave it out.

    given: the splits of your folders, which no picture leaves or enters.
    """
    others = near - {split}
    if not others:
        return split
    if len(near) == 1 and not given & {split, *near}:
        return next(iter(near))
    return ""


def records(
    path: str | Path,
    size: int,
    channels: int,
    report: Report,
    template: str = TEMPLATE,
    val_fraction: float = 0.1,
) -> Iterator[pictures.Record]:
    """Yield a record for each readable pair, with an image uint8 (size, size, channels).

    No picture is near to one of the same label in another split, see near.py. Raises ValueError as
    `pairs` does, or if no image is readable.
    """
    listed = pairs(path, report, template)
    splits = choose_splits(listed, val_fraction)
    given = {pair.split for pair in listed if pair.split}
    # What your folders hold out comes first, so that training loses the pictures near to it.
    listed.sort(key=lambda pair: not pair.split)
    if tars.is_tar(path):
        sources = tars.images(path, captioned=bool(template))
    else:
        sources = (pair.path for pair in listed)
    seen = Seen()
    with_frames = 0
    in_colour = 0
    for pair, source in zip(listed, sources):
        try:
            image, frames = pictures.decode(source, size, 3)
        except ValueError as error:
            report.skip(str(error), pair.path.as_posix())
            continue
        if channels == 1:
            colored = pictures.is_colored(image)
            image = pictures.to_grey(image)
        split = settle(splits[pair.path], given, seen.splits_near(image, pair.label))
        if not split:
            report.skip("nearly the same as a picture of another split", pair.path.as_posix())
            continue
        seen.add(image, pair.label, split)
        with_frames += frames > 1
        in_colour += channels == 1 and colored
        report.used += 1
        yield pictures.Record(image, pair.captions, pair.label, split)
    if with_frames:
        report.notes.append(f"{with_frames:,} with several frames or pages, the first is used")
    if in_colour:
        report.notes.append(f"{in_colour:,} in colour, read as grey")
    if not report.used:
        raise ValueError(f"no image in {path} can be used: {report}")


def look(path: str) -> None:
    """Print the captions of all pictures."""
    report = Report()
    for record in records(path, 32, 3, report):
        print(f"{record.split}: {' | '.join(record.captions)}")
    print(report)


if __name__ == "__main__":
    command.run("captioned", __doc__, look, "PATH")
