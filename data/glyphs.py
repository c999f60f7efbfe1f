"""Letters and symbols with their names: about 36,000 image-caption pairs that are on your disk.

matplotlib comes with fonts, and Unicode gives each character a name. So we draw every named
character of the fonts DejaVu Sans, DejaVu Sans Mono, DejaVu Serif and STIX, each in four styles,
black on white:

    serif bold italic latin small letter a with acute       sans digit seven       stix infinity

A caption is the style (a font family, then nothing, "bold", "italic" or "bold italic"; oblique
counts as italic), followed by the name in lower case. The label is the name alone. The words of a
name compose: "small", "with acute" and "bold" occur in many captions each. That allows two honest
tests of whether a model has understood the words:

    held-out fonts         bold italic of two families. Training has seen bold, italic, and the
                           character, but never this drawing.
    held-out characters    seen in no font. Each is a known character "with" a mark that at least
                           MIN_NAMES training characters have: training has seen "e", and has seen
                           "with circumflex", but not "e with circumflex".

Bold italic of the two other families is for validation. So the first test has two fonts, and says
nothing about families that training has not seen. matplotlib has no such family to hold out: its
other fonts are symbols, and Computer Modern, with 62 letters and digits (which the judge of
drawings reads, tinyfm/evaluate/judge.py). To hold out one of the four would take three fonts of
twelve from training. Other fonts of a system are not on every machine.

No picture may be in two splits, and no test picture may be a copy of a training picture. So a
drawing is dropped if it equals an earlier one in every pixel, whatever its name (a Latin A usually
looks like a Greek Alpha), and also if it is near to an earlier one of the same name (near.py). The
order is by font, the held-out fonts last, then by code point. Two more kinds are dropped. A
character that only fonts in bold italic have would belong to neither test. And the names of
mathematical letters contain styles ("mathematical bold italic small z"), which in the other
captions come from the font.

There are two variants, which can be combined:

letters    has only Latin letters and digits, for a model that draws. Such a model must have seen
           each style, so the first test is another one:

    held-out pairs         of style and character, one in ten. Training has seen both parts, each
                           with other partners. One in twenty of such pairs is for validation.

colour     paints each drawing in one ink on one paper, which the caption names:

    red serif bold latin small letter a with acute on yellow

A hash of style and name chooses the two colours, so they are the same on every machine. Each
drawing has only one of the 56 pairs of colours. To ask for it in another pair is one more test.

    python -m data.glyphs [contact-sheet.png]
"""

import hashlib
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import version as version_of
from itertools import permutations

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont, features

from data import command
from data.near import LEVELS, is_near
from data.pictures import FONTS, Record, check_free, save_grid
from data.report import Report, counted
from data.splits import TRAIN, VAL

HELD_OUT_FONTS = "held-out fonts"
HELD_OUT_CHARACTERS = "held-out characters"
HELD_OUT_PAIRS = "held-out pairs"
SPLITS = (TRAIN, VAL, HELD_OUT_FONTS, HELD_OUT_CHARACTERS)
LETTER_SPLITS = (TRAIN, VAL, HELD_OUT_PAIRS, HELD_OUT_CHARACTERS)

HELD_OUT_STYLE = "bold italic"
VALIDATION_STYLES = ("mono bold italic", "stix bold italic")
FILES = {  # style words -> font file; those of the held-out style come last
    "sans": "DejaVuSans",
    "sans bold": "DejaVuSans-Bold",
    "sans italic": "DejaVuSans-Oblique",
    "mono": "DejaVuSansMono",
    "mono bold": "DejaVuSansMono-Bold",
    "mono italic": "DejaVuSansMono-Oblique",
    "serif": "DejaVuSerif",
    "serif bold": "DejaVuSerif-Bold",
    "serif italic": "DejaVuSerif-Italic",
    "stix": "STIXGeneral",
    "stix bold": "STIXGeneralBol",
    "stix italic": "STIXGeneralItalic",
    "sans bold italic": "DejaVuSans-BoldOblique",
    "mono bold italic": "DejaVuSansMono-BoldOblique",
    "serif bold italic": "DejaVuSerif-BoldItalic",
    "stix bold italic": "STIXGeneralBolIta",
}
STYLED = tuple(  # first words of the names that contain a style
    f"mathematical {style} "
    for style in ("sans-serif", "bold", "italic", "double-struck", "script", "monospace", "fraktur")
)
LETTERS = ("latin ", "digit ")  # first words of the names of Latin letters and digits

SIZE = 32  # rows and columns of a drawing
FONT_SIZE = 26  # pixels per em; nearly all characters fit, with accents and descenders
BASELINE = 25  # rows above the line that letters stand on

N_HELD_OUT = 400  # number of held-out characters
MIN_NAMES = 3  # number of training characters that keep each held-out mark

COLORS: dict[str, tuple[int, int, int]] = {  # the corners of the RGB cube: as far apart as possible
    "black": (0, 0, 0),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
}
MIN_INK = 0.25  # an ink is found if some pixel is this far on the way from the paper to it


# ---- drawing -------------------------------------------------------------------------------------


@cache
def load_font(file: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of `size` pixels per em."""
    # Pillow's other layout engine, Raqm, is not in every build and fails on some characters.
    path = FONTS / f"{file}.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def draw(character: str, file: str, size: int = FONT_SIZE) -> np.ndarray | None:
    """uint8 (SIZE, SIZE, 1), ink 0 on paper 255, antialiased; None if there is no ink.

    The ink is centred horizontally. Vertically it keeps its place on the line (otherwise a comma
    would look like an apostrophe), and is moved only as far as is needed to fit in the frame. A
    character too large for the frame is drawn in the largest size that fits.
    """
    # Draw on a canvas that is larger than any character.
    canvas = Image.new("L", (6 * FONT_SIZE, 4 * FONT_SIZE))
    middle = canvas.width // 2
    line = canvas.height // 2
    pen = ImageDraw.Draw(canvas)
    pen.text((middle, line), character, fill=255, font=load_font(file, size), anchor="ls")
    box = canvas.getbbox()
    if box is None:
        return None
    left, top, right, bottom = box
    if max(right - left, bottom - top) > SIZE:
        return draw(character, file, size - 1)

    # Place the frame around the ink, and cut it out.
    left = (left + right - SIZE) // 2
    top = min(max(line - BASELINE, bottom - SIZE), top)
    frame = canvas.crop((left, top, left + SIZE, top + SIZE))
    return 255 - np.array(frame)[:, :, None]


def named_characters(file: str, report: Report) -> Iterator[tuple[str, str]]:
    """Yield (character, name in lower case) of the characters of a font, by code point."""
    with TTFont(FONTS / f"{file}.ttf", lazy=True) as font:
        code_points = sorted(font.getBestCmap())
    report.found += len(code_points)
    for code_point in code_points:
        name = unicodedata.name(chr(code_point), "").lower()
        if not name:
            report.skip("no name", f"{file} U+{code_point:04X}")
        elif name.startswith(STYLED):
            report.skip("the style is its name", f"{file} U+{code_point:04X}")
        else:
            yield chr(code_point), name


def drawings(report: Report) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (style words, name, image) of all fonts, no image twice, and none near to another of
    its name."""
    seen = set()
    images_of = defaultdict(list)  # name -> (sum of the pixels, image) of each drawing
    for style, file in FILES.items():
        for character, name in named_characters(file, report):
            image = draw(character, file)
            if image is None:
                report.skip("no ink", f"{style} {name}")
                continue
            content = image.tobytes()
            if content in seen:
                report.skip("drawn before", f"{style} {name}")
                continue
            seen.add(content)
            total = int(image.sum())
            similar = [
                other
                for its_total, other in images_of[name]
                if abs(its_total - total) < LEVELS * image.size
            ]
            if is_near(image, similar):
                report.skip("nearly drawn before", f"{style} {name}")
                continue
            images_of[name].append((total, image))
            yield style, name, image


# ---- splits --------------------------------------------------------------------------------------


def stable_hash(text: str) -> int:
    """A hash in [0, 2**64) that is the same on every machine, unlike Python's hash()."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def choose_held_out(names: Iterable[str]) -> set[str]:
    """Up to N_HELD_OUT of the names, chosen at random but always the same.

    Each has the form "BASE with MARK", where BASE is one of the names too, and at least MIN_NAMES
    names with MARK are not chosen.
    """
    names = set(names)
    parts = {name: name.partition(" with ") for name in names}
    left = Counter(mark for _, _, mark in parts.values())  # mark -> names not chosen
    chosen = set()
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        base, _, mark = parts[name]
        if len(chosen) < N_HELD_OUT and mark and base in names and left[mark] > MIN_NAMES:
            chosen.add(name)
            left[mark] -= 1
    return chosen


def split_of(style: str, name: str, held_out: set[str], letters: bool) -> str:
    """The split of a drawing, where `held_out` are the names of the held-out characters."""
    if name in held_out:
        return HELD_OUT_CHARACTERS
    if letters:
        part = stable_hash(f"{name}, {style}") % 20
        if part in (0, 10):
            return HELD_OUT_PAIRS
        return VAL if part == 1 else TRAIN
    if style in VALIDATION_STYLES:
        return VAL
    return HELD_OUT_FONTS if style.endswith(HELD_OUT_STYLE) else TRAIN


# ---- colour --------------------------------------------------------------------------------------


def choose_colors(style: str, name: str) -> tuple[str, str]:
    """The ink and the paper of a drawing: two different names of COLORS."""
    pairs = list(permutations(COLORS, 2))
    return pairs[stable_hash(f"{style} {name}") % len(pairs)]


def paint(image: np.ndarray, ink: str, paper: str) -> np.ndarray:
    """Black on white, uint8 (H, W, 1) -> ink on paper, uint8 (H, W, 3).

    A grey becomes the same blend of ink and paper as it is of black and white. Raises ValueError
    for a name that is not in COLORS.
    """
    unknown = {ink, paper} - COLORS.keys()
    if unknown:
        raise ValueError(f"no colour {', '.join(sorted(unknown))}: choose from {', '.join(COLORS)}")
    white = image.astype(np.int32)
    blend = np.array(COLORS[ink]) * (255 - white) + np.array(COLORS[paper]) * white
    return ((blend + 127) // 255).astype(np.uint8)  # rounded


def unpaint(image: np.ndarray) -> tuple[str, str, np.ndarray]:
    """The inverse of `paint`: (H, W, 3), 0 to 255 -> (ink, paper, drawing).

    The drawing is uint8 (H, W, 1), black on white. The image may also be painted imperfectly, by
    a model. The ink is "" if no pixel has come MIN_INK of the way from the paper to it.
    """
    names = np.array(list(COLORS))
    colors = np.array(list(COLORS.values()))

    # Paper: the colour that is nearest to the median of the border.
    border = np.concatenate((image[0], image[-1], image[:, 0], image[:, -1]))
    origin = np.median(border, axis=0)
    own = np.square(colors - origin).sum(1).argmin()

    # Ink: of the 7 lines from the paper to another colour, the one that the pixels are nearest to.
    others = np.delete(names, own)
    ahead = np.delete(colors, own, 0) - origin  # (7, 3)
    way = image.reshape(-1, 3) - origin  # (H W, 3)
    reach = (way @ ahead.T / np.square(ahead).sum(1)).clip(0, 1)  # (H W, 7)
    off = np.square(way[:, None] - reach[:, :, None] * ahead).sum((0, 2))  # (7,)
    nearest = off.argmin()
    ink = str(others[nearest])

    # Drawing: the further a pixel is on the way from paper to ink, the blacker it is.
    reach = reach[:, nearest]  # (H W,)
    drawing = (255 - 255 * reach).round().astype(np.uint8).reshape(*image.shape[:2], 1)
    if reach.max() < MIN_INK:
        ink = ""
    return ink, str(names[own]), drawing


# ---- questions -----------------------------------------------------------------------------------


def answers(caption: str, name: str) -> dict[str, str]:
    """{question: answer} about a drawing, from its caption and its name.

    Training on the glyphs never shows bold italic, but bold and italic: a model can answer "yes" to
    both without having seen them together, and has to compose "bold italic".
    """
    before, _, after = caption.rpartition(name)
    words = before.split()
    colors = {}
    if after:  # painted: "red serif bold " and " on yellow"
        colors = {"which ink?": words.pop(0), "which paper?": after.split()[-1]}
    family, *style = words
    return {
        "which family?": family,
        "what style?": " ".join(style) or "regular",
        "is it bold?": "yes" if "bold" in style else "no",
        "is it italic?": "yes" if "italic" in style else "no",
        **colors,
    }


def compared(caption: str, name: str) -> dict[str, str]:
    """{question about two drawings: what must be equal for a "yes"}, of one of them."""
    return {"same character?": name, "same family?": answers(caption, name)["which family?"]}


# ---- the data set --------------------------------------------------------------------------------


def version(color: bool = False, letters: bool = False) -> str:
    """A name for the exact records: it changes if they do."""
    parts = ["glyphs-4"]
    if color:
        parts.append("color")
    if letters:
        parts.append("letters-3")
    parts += [f"{name}-{version_of(name)}" for name in ("matplotlib", "pillow")]
    parts.append(f"freetype-{features.version('freetype2')}")
    parts.append(f"unicode-{unicodedata.unidata_version}")
    return " ".join(parts)


def records(
    report: Report | None = None, color: bool = False, letters: bool = False
) -> Iterator[Record]:
    """Yield a record for each drawing. All variants hold out the same characters.

    Images are uint8 (SIZE, SIZE, 1), or (SIZE, SIZE, 3) in colour. Raises ValueError if a font is
    missing.
    """
    if report is None:
        report = Report()
    missing = [file for file in FILES.values() if not (FONTS / f"{file}.ttf").exists()]
    if missing:
        raise ValueError(
            f"the fonts {', '.join(missing)} are not in {FONTS}: install matplotlib from PyPI, "
            "which contains them"
        )
    drawn = list(drawings(report))
    seen = {name for style, name, _ in drawn if not style.endswith(HELD_OUT_STYLE)}
    held_out = choose_held_out(seen)
    labels = {split: [] for split in (LETTER_SPLITS if letters else SPLITS)}
    for style, name, image in drawn:
        caption = f"{style} {name}"
        if name not in seen:
            report.skip("in a held-out font only", caption)
            continue
        if letters and not name.startswith(LETTERS):
            report.skip("no Latin letter or digit", caption)
            continue
        split = split_of(style, name, held_out, letters)
        if color:
            ink, paper = choose_colors(style, name)
            image = paint(image, ink, paper)
            caption = f"{ink} {caption} on {paper}"
        report.used += 1
        labels[split].append(name)
        yield Record(image, (caption,), name, split)
    for split, names in labels.items():
        characters = counted(len(set(names)), "characters")
        report.notes.append(f"{split}: {counted(len(names), 'drawings')} of {characters}")


def look(picture: str = "") -> None:
    """Print the size of the data set; draw a sheet of its pictures."""
    if picture:
        check_free(picture)
    start = time.perf_counter()
    report = Report()
    everything = list(records(report))
    print(f"{counted(len(everything), 'records')}, {time.perf_counter() - start:.1f} s")
    print(str(report).replace("; ", "\n"))
    if picture:
        shown = everything[:: len(everything) // 120 + 1]
        images = np.stack([record.image for record in shown])
        save_grid(images, picture, 12, [record.captions[0] for record in shown])


if __name__ == "__main__":
    command.run("glyphs", __doc__, look, "[PNG]")
