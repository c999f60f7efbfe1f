"""Which script is this letter of, or which character is it? Two picture tasks, on your disk.

The pictures are the drawings of data/glyphs.py, the answer is read off their names: "serif bold
greek small letter alpha with tonos" is of the script "greek". Two questions:

    scripts       Latin, Greek, Arabic ... and beside the scripts arrows, and signs of mathematics.
                  In training all classes have nearly the same number of drawings.
    characters    which of the characters that all sixteen fonts draw, each in its own way

What is held out are whole fonts, of characters that training has in other fonts: the four in bold
italic, which no training on glyphs sees, and mono bold, as Arabic has no other to spare (and
which a model trained on glyphs has seen). A letter that looks the same in two scripts is drawn as
that of the first alone, see glyphs.py.

    python -m data.scripts [contact-sheet.png]
"""

import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator

import numpy as np
from PIL import Image

from data import glyphs
from data.labelled import HELD_OUT, SPLITS, TRAIN
from data.pictures import Record, save_grid
from data.report import Report

TASKS = ("scripts", "characters")
SCRIPTS = ("arabic", "armenian", "canadian syllabics", "cyrillic", "georgian", "greek", "hebrew",
           "lao", "latin")  # fmt: skip
PER_SCRIPT = 250  # training drawings of each, nearly
HELD_OUT_STYLES = tuple(
    style for style in glyphs.FILES if style.endswith(glyphs.HELD_OUT_STYLE) or style == "mono bold"
)


def script_of(name: str) -> str:
    """Of a character by its Unicode name in lower case; "" for one of no class here."""
    for script in SCRIPTS:
        if name.startswith(f"{script} "):
            return script
    if "arrow" in name.split() or "arrows" in name.split():
        return "arrow"
    return "mathematics" if unicodedata.category(unicodedata.lookup(name)) == "Sm" else ""


def version(task: str) -> str:
    """What the records depend on."""
    return f"{task}-1 {glyphs.version()}"


def fit(image: np.ndarray, size: int, channels: int) -> np.ndarray:
    """A drawing, uint8 (H, W, 1), as (size, size, channels)."""
    if image.shape[0] != size:
        picture = Image.fromarray(image[:, :, 0])
        image = np.array(picture.resize((size, size), Image.Resampling.BICUBIC))[:, :, None]
    return np.repeat(image, channels, axis=2)


def by_character(drawn: list[Record]) -> dict[str, dict[str, list[Record]]]:
    """{name: {split: drawings}} of the characters that are in both, in the order of a hash."""
    found: dict[str, dict[str, list[Record]]] = {}
    for record in sorted(drawn, key=lambda record: glyphs.number_of(record.label)):
        style = record.captions[0].removesuffix(f" {record.label}")
        split = HELD_OUT if style in HELD_OUT_STYLES else TRAIN
        found.setdefault(record.label, {}).setdefault(split, []).append(record)
    return {name: splits for name, splits in found.items() if len(splits) == len(SPLITS)}


def choose(task: str, drawn: list[Record]) -> Iterator[tuple[str, str, Record]]:
    """Yield (class, split, drawing) of those that belong to a task."""
    taken: Counter[str] = Counter()  # training drawings of a script
    for name, splits in by_character(drawn).items():
        if task == "characters":
            label = name if sum(map(len, splits.values())) == len(glyphs.FILES) else ""
        else:
            label, count = script_of(name), len(splits[TRAIN])
            label = label if taken[label] + count <= PER_SCRIPT else ""
            taken[label] += count
        if not label:
            continue
        yield from ((label, split, record) for split in SPLITS for record in splits[split])


def records(
    task: str, size: int = glyphs.SIZE, channels: int = 1, report: Report | None = None
) -> Iterator[Record]:
    """Yield a record for each drawing of a task; its caption is its class.

    Images are uint8 (size, size, channels). Raises ValueError as glyphs.records does.
    """
    assert task in TASKS
    report, counts = report if report is not None else Report(), {}
    drawn = list(glyphs.records(Report()))
    report.found += len(drawn)
    for label, split, record in choose(task, drawn):
        report.used += 1
        counts.setdefault(split, []).append(label)
        yield Record(fit(record.image, size, channels), (label,), record.label, split)
    for split, labels in counts.items():
        report.notes.append(f"{split}: {len(labels):,} drawings of {len(set(labels)):,} classes")


if __name__ == "__main__":
    for task in TASKS:
        report = Report()
        everything = list(records(task, report=report))
        print(f"{task}: {report}")
        if len(sys.argv) > 1 and task == "scripts":
            shown = everything[:: len(everything) // 120 + 1]
            images = np.stack([record.image for record in shown])
            save_grid(images, sys.argv[1], 12, [record.captions[0] for record in shown])
