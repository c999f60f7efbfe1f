"""Which script is this letter from, or which character is it? Two picture tasks, no download.

The pictures are the drawings of data/glyphs.py, and the answers come from their names: "serif bold
greek small letter alpha with tonos" belongs to the script "greek". There are two tasks:

    scripts       Latin, Greek, Arabic and other scripts, and two classes that are no scripts:
                  arrows and signs of mathematics. In training, all classes have nearly the same
                  number of drawings.
    characters    The characters that all sixteen fonts draw, each font in a different way.

Whole fonts are held out; training has the same characters in other fonts. Test has bold italic of
two families, which no training on glyphs sees, and mono bold. Validation has those of the
two other families, and sans bold. (Arabic has no font in bold italic, and Hebrew has one. A model
that was trained on glyphs has seen mono bold and sans bold.) A letter that looks the same in two
scripts is drawn as a letter of the first one only, see glyphs.py.

    python -m data.scripts [contact-sheet.png]
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator

import numpy as np
from PIL import Image

from data import command, glyphs
from data.pictures import Record, check_free, save_grid
from data.report import Report, counted
from data.splits import SPLITS, TEST, TRAIN, VAL

TASKS = ("scripts", "characters")
SCRIPTS = (
    "arabic",
    "armenian",
    "canadian syllabics",
    "cyrillic",
    "georgian",
    "greek",
    "hebrew",
    "lao",
    "latin",
)
PER_SCRIPT = 250  # training drawings of each script, at most
HELD_OUT_STYLES = {
    "sans bold italic": TEST,
    "serif bold italic": TEST,
    "mono bold": TEST,
    "mono bold italic": VAL,
    "stix bold italic": VAL,
    "sans bold": VAL,
}


def script_of(name: str) -> str:
    """The class of a character by its Unicode name in lower case; "" if it is in no class."""
    for script in SCRIPTS:
        if name.startswith(f"{script} "):
            return script
    words = name.split()
    if "arrow" in words or "arrows" in words:
        return "arrow"
    if unicodedata.category(unicodedata.lookup(name)) == "Sm":  # symbol, mathematical
        return "mathematics"
    return ""


def version(task: str) -> str:
    """A name for the exact records: it changes if they do."""
    return f"{task}-2 {glyphs.version()}"


def resized(image: np.ndarray, size: int, channels: int) -> np.ndarray:
    """A drawing, uint8 (H, W, 1), as (size, size, channels)."""
    if image.shape[0] != size:
        picture = Image.fromarray(image[:, :, 0])
        image = np.array(picture.resize((size, size), Image.Resampling.BICUBIC))[:, :, None]
    return np.repeat(image, channels, axis=2)


def style_of(record: Record) -> str:
    """The font of a drawing: "sans bold"."""
    return record.captions[0].removesuffix(f" {record.label}")


def by_character(drawn: list[Record]) -> dict[str, dict[str, list[Record]]]:
    """{name: {split: drawings}} of the characters that are in all splits.

    The characters are in the order of a hash.
    """
    found: dict[str, dict[str, list[Record]]] = {}
    for record in sorted(drawn, key=lambda record: glyphs.stable_hash(record.label)):
        split = HELD_OUT_STYLES.get(style_of(record), TRAIN)
        found.setdefault(record.label, {}).setdefault(split, []).append(record)
    return {name: splits for name, splits in found.items() if len(splits) == len(SPLITS)}


def choose_scripts(characters: dict[str, dict[str, list[Record]]]) -> Iterator[tuple[str, str]]:
    """Yield (class, name) of the characters of the scripts task.

    A character is left out if it would give its class more than PER_SCRIPT training drawings.
    """
    taken: Counter[str] = Counter()  # class -> training drawings
    for name, splits in characters.items():
        script = script_of(name)
        count = len(splits[TRAIN])
        if script and taken[script] + count <= PER_SCRIPT:
            taken[script] += count
            yield script, name


def choose_characters(characters: dict[str, dict[str, list[Record]]]) -> Iterator[tuple[str, str]]:
    """Yield (class, name), which are equal, of the characters that all fonts draw."""
    for name, splits in characters.items():
        if sum(map(len, splits.values())) == len(glyphs.FILES):
            yield name, name


def choose(task: str, drawn: list[Record]) -> Iterator[tuple[str, str, Record]]:
    """Yield (class, split, drawing) of the drawings that belong to a task."""
    characters = by_character(drawn)
    chosen = choose_scripts(characters) if task == "scripts" else choose_characters(characters)
    for label, name in chosen:
        for split in SPLITS:
            for record in characters[name][split]:
                yield label, split, record


def records(
    task: str, size: int = glyphs.SIZE, channels: int = 1, report: Report | None = None
) -> Iterator[Record]:
    """Yield a record for each drawing of a task (one of TASKS).

    Its captions are its class and its font.

    Images are uint8 (size, size, channels). Raises ValueError as glyphs.records does.
    """
    assert task in TASKS
    if report is None:
        report = Report()
    labels = {}  # split -> the class of each drawing
    drawn = list(glyphs.records(Report()))
    report.found += len(drawn)
    for label, split, record in choose(task, drawn):
        report.used += 1
        labels.setdefault(split, []).append(label)
        image = resized(record.image, size, channels)
        yield Record(image, (label, style_of(record)), record.label, split)
    for split, own in labels.items():
        classes = counted(len(set(own)), "classes")
        report.notes.append(f"{split}: {counted(len(own), 'drawings')} of {classes}")


def look(picture: str = "") -> None:
    """Print the sizes of both data sets; draw a sheet of pictures of the first."""
    if picture:
        check_free(picture)
    for task in TASKS:
        report = Report()
        everything = list(records(task, report=report))
        print(f"{task}: {report}")
        if picture and task == "scripts":
            shown = everything[:: len(everything) // 120 + 1]
            images = np.stack([record.image for record in shown])
            save_grid(images, picture, 12, [record.captions[0] for record in shown])


if __name__ == "__main__":
    command.run("scripts", __doc__, look, "[PNG]")
