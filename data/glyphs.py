"""Letters and symbols with their names: about 39,000 image-caption pairs that are on your disk.

matplotlib brings fonts along, and Unicode has a name for each character. So we draw every named
character of DejaVu Sans, Sans Mono and Serif and of STIX, in four styles each, black on white:

    serif bold italic latin small letter a with acute       sans digit seven       stix infinity

A caption is the style (oblique counts as italic), then the name in lower case; the name alone is
the label. Names compose: "small", "with acute" and "bold" stand in many captions each, and that
makes two honest tests of whether a model has understood the words.

    held-out fonts         bold italic in all four families. Bold was seen, italic was seen, the
                           character was seen, but never this drawing.
    held-out characters    seen in no font. Each is a known character "with" a mark that MIN_NAMES
                           others at least have: e, and "with circumflex", were seen apart.

A drawing that equals an earlier one in every pixel is dropped, whatever its name (a Latin A is
mostly a Greek Alpha as well), so that no picture is in two splits. The earlier one is that of the
earlier font, then of the lower code point; the held-out fonts come last. A character of a held-out
font that no other font has is dropped as well: it would be neither test. Mathematical letters are
left out: their names are styles ("mathematical bold italic small z"), which is the captions' part.

There are two variants, also together. One has only Latin letters and digits, to draw them: as who
is to draw must have seen each style, its second split is

    held-out pairs         of style and character, one in ten: each of the two was seen with others

The other is colour, where a drawing is painted in one ink on one paper, which its caption names:

    red serif bold latin small letter a with acute on yellow

A hash of the style and name chooses both, so that they are the same on every machine. Each drawing
has but one of the 56 pairs of colours: to draw it in another is a test that comes for free.

    python -m data.glyphs [contact-sheet.png]
"""

import hashlib
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import version as version_of
from itertools import permutations

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont, features

from data.pictures import FONTS, Record, save_grid
from data.report import Report

TRAIN, HELD_OUT_FONTS, HELD_OUT_CHARACTERS = "train", "held-out fonts", "held-out characters"
HELD_OUT_PAIRS = "held-out pairs"
SPLITS = (TRAIN, HELD_OUT_FONTS, HELD_OUT_CHARACTERS)
LETTER_SPLITS = (TRAIN, HELD_OUT_PAIRS, HELD_OUT_CHARACTERS)
HELD_OUT_STYLE = "bold italic"
FILES = {  # style words -> file; those of the held-out style last
    "sans": "DejaVuSans", "sans bold": "DejaVuSans-Bold", "sans italic": "DejaVuSans-Oblique",
    "mono": "DejaVuSansMono", "mono bold": "DejaVuSansMono-Bold",
    "mono italic": "DejaVuSansMono-Oblique", "serif": "DejaVuSerif",
    "serif bold": "DejaVuSerif-Bold", "serif italic": "DejaVuSerif-Italic", "stix": "STIXGeneral",
    "stix bold": "STIXGeneralBol", "stix italic": "STIXGeneralItalic",
    "sans bold italic": "DejaVuSans-BoldOblique", "mono bold italic": "DejaVuSansMono-BoldOblique",
    "serif bold italic": "DejaVuSerif-BoldItalic", "stix bold italic": "STIXGeneralBolIta",
}  # fmt: skip
SIZE = 32  # rows and columns of a drawing
FONT_SIZE = 26  # pixels an em, with which nearly all characters fit, accents and descenders too
BASELINE = 25  # rows above the line that letters stand on
STYLED = tuple(
    f"mathematical {style} "
    for style in ("sans-serif", "bold", "italic", "double-struck", "script", "monospace", "fraktur")
)
N_HELD_OUT = 400  # characters
MIN_NAMES = 3
LETTERS = ("latin ", "digit ")  # how the names of Latin letters and digits begin
COLORS: dict[str, tuple[int, int, int]] = {  # the corners of the RGB cube, as far apart as can be
    "black": (0, 0, 0), "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255),
    "yellow": (255, 255, 0), "magenta": (255, 0, 255), "cyan": (0, 255, 255),
    "white": (255, 255, 255),
}  # fmt: skip
MIN_INK = 0.25  # of the way from the paper to an ink: what comes less far is not drawn


@cache
def load_font(file: str, size: int) -> ImageFont.FreeTypeFont:
    # Pillow's other layout engine, Raqm, is not in every build and fails on some characters.
    path = FONTS / f"{file}.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def draw(character: str, file: str, size: int = FONT_SIZE) -> np.ndarray | None:
    """uint8 (SIZE, SIZE, 1), ink 0 on paper 255, antialiased; None where there is no ink.

    The ink is centred from left to right. From top to bottom it keeps its place on the line, or a
    comma would be an apostrophe, and moves only as far as the frame demands. A character too large
    for the frame is drawn in the largest size that fits.
    """
    canvas = Image.new("L", (6 * FONT_SIZE, 4 * FONT_SIZE))
    middle, line = canvas.width // 2, canvas.height // 2
    pen = ImageDraw.Draw(canvas)
    pen.text((middle, line), character, fill=255, font=load_font(file, size), anchor="ls")
    box = canvas.getbbox()
    if box is None:
        return None
    left, top, right, bottom = box
    if max(right - left, bottom - top) > SIZE:
        return draw(character, file, size - 1)
    left = (left + right - SIZE) // 2
    top = min(max(line - BASELINE, bottom - SIZE), top)
    return 255 - np.array(canvas.crop((left, top, left + SIZE, top + SIZE)))[:, :, None]


def named_characters(file: str, report: Report) -> Iterator[tuple[str, str]]:
    """Yield (character, name in lower case) for what a font can draw, by code point."""
    with TTFont(FONTS / f"{file}.ttf", lazy=True) as font:
        code_points = sorted(font.getBestCmap())
    report.found += len(code_points)
    for code_point in code_points:
        name = unicodedata.name(chr(code_point), "").lower()
        if name and not name.startswith(STYLED):
            yield chr(code_point), name
        else:
            reason = "the style is its name" if name else "no name"
            report.skip(reason, f"{file} U+{code_point:04X}")


def drawings(report: Report) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (style words, name, image), no image twice."""
    seen = set()
    for style, file in FILES.items():
        for character, name in named_characters(file, report):
            image = draw(character, file)
            if image is None:
                report.skip("no ink", f"{style} {name}")
            elif (content := image.tobytes()) in seen:
                report.skip("drawn before", f"{style} {name}")
            else:
                seen.add(content)
                yield style, name, image


def choose_held_out(names: Iterable[str]) -> set[str]:
    """N_HELD_OUT of the names at random, of those that are made of known parts: "BASE with MARK",
    with BASE a name too, and so that MIN_NAMES others with MARK are left."""
    names = set(names)
    parts = {name: name.partition(" with ") for name in names}
    left, chosen = Counter(mark for _, _, mark in parts.values()), set()
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        base, _, mark = parts[name]
        if len(chosen) < N_HELD_OUT and mark and base in names and left[mark] > MIN_NAMES:
            chosen.add(name)
            left[mark] -= 1
    return chosen


def number_of(text: str) -> int:
    """A large number, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def choose_colors(style: str, name: str) -> tuple[str, str]:
    """The ink and the paper of a drawing, two of COLORS."""
    pairs = list(permutations(COLORS, 2))
    return pairs[number_of(f"{style} {name}") % len(pairs)]


def split_of(style: str, name: str, held_out: set[str], letters: bool) -> str:
    """Where a drawing belongs, if those characters are held out."""
    if name in held_out:
        return HELD_OUT_CHARACTERS
    if letters:
        return TRAIN if number_of(f"{name}, {style}") % 10 else HELD_OUT_PAIRS
    return HELD_OUT_FONTS if style.endswith(HELD_OUT_STYLE) else TRAIN


def paint(image: np.ndarray, ink: str, paper: str) -> np.ndarray:
    """uint8 (H, W, 1), black on white -> (H, W, 3): a grey becomes as much of a blend of two of
    COLORS. Raises ValueError for other colours."""
    if unknown := {ink, paper} - COLORS.keys():
        raise ValueError(f"no colour {', '.join(sorted(unknown))}; there are {', '.join(COLORS)}")
    white = image.astype(np.int32)
    blend = np.array(COLORS[ink]) * (255 - white) + np.array(COLORS[paper]) * white
    return ((blend + 127) // 255).astype(np.uint8)


def unpaint(image: np.ndarray) -> tuple[str, str, np.ndarray]:
    """(ink, paper, picture in black on white, uint8 (H, W, 1)) of a picture (H, W, 3), 0 to 255.

    The paper is the colour nearest to the border's median, the ink the one to which the pixels lie
    on the straightest way from there; how far they have come is how black they are. The ink is ""
    where none comes MIN_INK of the way.
    """
    names, colors = np.array(list(COLORS)), np.array(list(COLORS.values()))
    border = np.concatenate((image[0], image[-1], image[:, 0], image[:, -1]))
    origin = np.median(border, axis=0)
    own = np.square(colors - origin).sum(1).argmin()
    others, ahead = np.delete(names, own), np.delete(colors, own, 0) - origin  # (7, 3)
    way = image.reshape(-1, 3) - origin  # (H W, 3)
    reach = (way @ ahead.T / np.square(ahead).sum(1)).clip(0, 1)  # (H W, 7)
    off = np.square(way[:, None] - reach[:, :, None] * ahead).sum((0, 2))
    reach, ink = reach[:, off.argmin()], str(others[off.argmin()])
    drawing = (255 - 255 * reach).round().astype(np.uint8).reshape(*image.shape[:2], 1)
    return ink if reach.max() >= MIN_INK else "", str(names[own]), drawing


def version(color: bool = False, letters: bool = False) -> str:
    """What the records depend on."""
    freetype, unicode = features.version("freetype2"), unicodedata.unidata_version
    packages = [f"{name}-{version_of(name)}" for name in ("matplotlib", "pillow")]
    variant = ["color"] * color + ["letters-2"] * letters
    parts = ["glyphs-3", *variant, *packages, f"freetype-{freetype}", f"unicode-{unicode}"]
    return " ".join(parts)


def records(
    report: Report | None = None, color: bool = False, letters: bool = False
) -> Iterator[Record]:
    """Yield a record for each drawing; the same characters are held out in all variants.

    Images are uint8 (SIZE, SIZE, 1), or 3 in color. Raises ValueError if the fonts are not there.
    """
    report = report if report is not None else Report()
    if missing := [file for file in FILES.values() if not (FONTS / f"{file}.ttf").exists()]:
        advice = "install matplotlib from PyPI, which brings them along"
        raise ValueError(f"the fonts {', '.join(missing)} are not in {FONTS}: {advice}")
    drawn = list(drawings(report))
    seen = {name for style, name, _ in drawn if not style.endswith(HELD_OUT_STYLE)}
    held_out = choose_held_out(seen)
    labels = {split: [] for split in (LETTER_SPLITS if letters else SPLITS)}
    for style, name, image in drawn:
        caption, split = f"{style} {name}", split_of(style, name, held_out, letters)
        if name not in seen:
            report.skip("in a held-out font only", caption)
            continue
        if letters and not name.startswith(LETTERS):
            report.skip("no Latin letter or digit", caption)
            continue
        if color:
            ink, paper = choose_colors(style, name)
            image, caption = paint(image, ink, paper), f"{ink} {caption} on {paper}"
        report.used += 1
        labels[split].append(name)
        yield Record(image, (caption,), name, split)
    for split, names in labels.items():
        report.notes.append(f"{split}: {len(names):,} drawings of {len(set(names)):,} characters")


if __name__ == "__main__":
    start, report = time.perf_counter(), Report()
    everything = list(records(report))
    print(f"{len(everything):,} records, {time.perf_counter() - start:.1f} s")
    print(str(report).replace("; ", "\n"))
    if len(sys.argv) > 1:
        shown = everything[:: len(everything) // 120 + 1]
        images = np.stack([record.image for record in shown])
        save_grid(images, sys.argv[1], 12, [record.captions[0] for record in shown])
