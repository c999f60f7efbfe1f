"""The glyphs: the drawings, their captions, and that no held-out drawing is in training."""

import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL.Image import open as open_image

from data import glyphs, near
from data.report import Report

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report():
    return Report()


@pytest.fixture(scope="module")
def drawn(report):
    """All drawings: they take seconds, so the variants with all fonts share them."""
    return list(glyphs.drawings(report))


def records_of(drawn, report, **variant):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "drawings", lambda report: iter(drawn))
        return list(glyphs.records(report, **variant))


@pytest.fixture(scope="module")
def records(drawn, report):
    return records_of(drawn, report)


def count_skipped(report) -> int:
    return sum(map(len, report.skipped.values())) + sum(report.unnamed.values())


def labels_of(records, split):
    return {record.label for record in records if record.split == split}


# --- Drawings -------------------------------------------------------------------------------------


def extent(ink: np.ndarray) -> int:
    """The longer side of the ink, (H, W)."""
    sides = [np.flatnonzero(ink.any(axis)) for axis in (0, 1)]
    return max(side[-1] - side[0] + 1 for side in sides)


@pytest.mark.parametrize("file", ["DejaVuSerif-BoldItalic", "STIXGeneral"])
def test_every_character_is_drawn_whole_and_as_large_as_fits(file):
    smaller = 0
    for character, name in list(glyphs.named_characters(file, Report()))[::5]:
        image = glyphs.draw(character, file)
        if image is None:
            continue
        for size in range(glyphs.FONT_SIZE, 0, -1):
            mask = glyphs.load_font(file, size).getmask(character)  # uncut, from FreeType
            ink = np.array(mask).reshape(mask.size[::-1])
            if extent(ink) <= glyphs.SIZE:
                break
        assert ink.sum() == (255 - image).sum(), name
        smaller += size < glyphs.FONT_SIZE
    assert smaller > 5


def test_ink_is_black_centred_and_keeps_its_place_on_the_line():
    image = glyphs.draw("A", "DejaVuSans")
    assert image.shape == (glyphs.SIZE, glyphs.SIZE, 1)
    assert image.dtype == np.uint8
    assert image.min() == 0
    assert image[0].min() == image[-1].min() == 255
    image = 255 - image
    rows = np.flatnonzero(image.any(1))
    columns = np.flatnonzero(image.any(0))
    assert rows[-1] == glyphs.BASELINE - 1
    assert abs(columns[0] + columns[-1] - (glyphs.SIZE - 1)) <= 1
    comma, apostrophe = (255 - glyphs.draw(c, "DejaVuSans") for c in ",'")
    assert np.flatnonzero(comma.any(1))[0] > 16 > np.flatnonzero(apostrophe.any(1))[-1]


def test_blanks_are_none_and_a_character_too_large_fills_the_frame():
    assert glyphs.draw(" ", "DejaVuSans") is None
    wide = 255 - glyphs.draw("\N{LONG LEFT RIGHT ARROW}", "STIXGeneral")
    columns = np.flatnonzero(wide.any((0, 2)))
    assert columns[-1] - columns[0] + 1 > glyphs.SIZE - 4


# --- The set --------------------------------------------------------------------------------------


def test_the_report_accounts_for_every_code_point(records, report):
    assert report.found == report.used + count_skipped(report)
    assert report.used == len(records)
    assert 35_500 < len(records) < 36_500  # "about 36,000"
    assert set(report.skipped) == {
        "no ink",
        "drawn before",
        "nearly drawn before",
        "no name",
        "the style is its name",
        "in a held-out font only",
    }
    for split in glyphs.SPLITS:
        rows = [record.label for record in records if record.split == split]
        expected = f"{split}: {len(rows):,} drawings of {len(set(rows)):,} characters"
        assert expected in report.notes


def test_captions_are_style_and_name(records):
    captions = set()
    for image, (caption,), label, split in records:
        assert image.shape == (32, 32, 1)
        assert split in glyphs.SPLITS
        style = caption.removesuffix(label)
        assert style[:-1] in glyphs.FILES
        unicodedata.lookup(label)  # KeyError if there is no such name
        captions.add(caption)
    assert len(captions) == len(records)
    assert {
        "serif bold italic latin small letter a with acute",
        "sans digit seven",
        "stix infinity",
    } <= captions


def test_no_drawing_occurs_twice(records):
    assert len({record.image.tobytes() for record in records}) == len(records)


def test_held_out_fonts_show_known_characters_in_new_drawings(records):
    train = [record for record in records if record.split == glyphs.TRAIN]
    held_out = [record for record in records if record.split == glyphs.HELD_OUT_FONTS]
    seen = {record.label for record in train}
    assert {record.label for record in held_out} <= seen
    assert len({record.label for record in held_out}) >= 2400
    styles = {}
    for record in records:
        style = record.captions[0].removesuffix(record.label)[:-1]
        styles.setdefault(record.split, set()).add(style)
    assert styles[glyphs.HELD_OUT_FONTS] == {"sans bold italic", "serif bold italic"}
    assert styles[glyphs.VAL] == {"mono bold italic", "stix bold italic"}
    families = ("sans", "mono", "serif", "stix")
    assert styles[glyphs.TRAIN] == {f"{f}{s}" for f in families for s in ("", " bold", " italic")}


@pytest.mark.parametrize("letters", [False, True])
def test_no_drawing_is_near_to_one_of_its_name_in_another_split(drawn, letters):
    records_by_name = {}
    for record in records_of(drawn, Report(), letters=letters):
        records_by_name.setdefault(record.label, []).append(record)
    nearest = 2.0
    for own in records_by_name.values():
        pixels = np.stack([record.image for record in own]).reshape(len(own), -1) / 127.5 - 1
        for i, record in enumerate(own):
            others = pixels[[other.split != record.split for other in own]]
            if len(others):
                nearest = min(nearest, np.abs(others - pixels[i]).mean(1).min())
    assert near.NEAR <= nearest < near.NEAR + 1e-3


def test_held_out_characters_are_new_though_their_words_are_not(records):
    held_out = labels_of(records, glyphs.HELD_OUT_CHARACTERS)
    train = labels_of(records, glyphs.TRAIN)
    assert len(held_out) == glyphs.N_HELD_OUT >= 400
    assert not held_out & (train | labels_of(records, glyphs.HELD_OUT_FONTS))
    marks = Counter(name.partition(" with ")[2] for name in train)
    for name in held_out:
        base, _, mark = name.partition(" with ")
        assert base in train
        assert marks[mark] >= glyphs.MIN_NAMES
    assert sum("letter" in name for name in held_out) > 300
    assert sum("letter" not in name for name in held_out) > 15


def test_plain_letters_and_digits_are_all_in_training(records):
    train = labels_of(records, glyphs.TRAIN)
    assert {
        f"latin {case} letter {a}" for case in ("small", "capital") for a in ascii_lowercase
    } <= train
    assert sum(name.startswith("digit ") for name in train) == 10


NAMES = st.tuples(st.sampled_from("abcdef"), st.sampled_from(("", " with x", " with y"))).map(
    "".join
)


@given(st.lists(NAMES, max_size=80), st.randoms())
def test_the_choice_leaves_enough_names_and_does_not_depend_on_their_order(names, random):
    chosen = glyphs.choose_held_out(names)
    left = Counter(name.partition(" with ")[2] for name in set(names) - chosen)
    for name in set(names):
        base, _, mark = name.partition(" with ")
        if name in chosen:
            assert base in set(names) - chosen
            assert left[mark] >= glyphs.MIN_NAMES
        else:  # all that may be held out are
            assert not mark or base not in names or left[mark] <= glyphs.MIN_NAMES
    random.shuffle(names)
    assert glyphs.choose_held_out(names) == chosen


def test_a_character_of_a_held_out_font_alone_is_dropped(records, report):
    dropped = report.skipped["in a held-out font only"]
    assert all("bold italic" in name for name in dropped)
    assert not set(dropped) & {record.captions[0] for record in records}


def test_missing_fonts_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "FONTS", tmp_path)
    with pytest.raises(ValueError, match=r"the fonts DejaVuSans, .* are not in .*install"):
        list(glyphs.records())


def test_the_version_names_the_libraries_that_the_drawings_depend_on():
    for part in ("matplotlib-", "pillow-", "freetype-", f"unicode-{unicodedata.unidata_version}"):
        assert part in glyphs.version()


def test_the_module_runs_and_does_not_import_matplotlib(tmp_path):
    code = "import runpy, sys; sys.argv = sys.argv[:2]\n"
    code += "runpy.run_module('data.glyphs', run_name='__main__')\n"
    code += "assert 'matplotlib' not in sys.modules"
    sheet = tmp_path / "sheet.png"
    done = subprocess.run(
        [sys.executable, "-c", code, str(sheet)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    assert "records" in done.stdout
    assert "held-out fonts:" in done.stdout
    with open_image(sheet) as image:
        assert min(image.size) > 1000


# --- Variants: letters, colour --------------------------------------------------------------------


@pytest.fixture(scope="module")
def variants():
    """Records and report of each variant, of four fonts."""
    fonts = {style: file for style, file in glyphs.FILES.items() if "mono" in style}
    choices = {"grey": {}, "letters": {"letters": True}, "colour": {"color": True}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "FILES", fonts)
        reports = {name: Report() for name in choices}
        return {
            name: (list(glyphs.records(reports[name], **choice)), reports[name])
            for name, choice in choices.items()
        }


def test_letters_are_the_same_drawings_with_pairs_held_out(variants):
    letters, report = variants["letters"]
    expected = [r for r in variants["grey"][0] if r.label.startswith(("latin ", "digit "))]
    assert [record[1:3] for record in letters] == [record[1:3] for record in expected]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(letters, expected))
    in_split = {split: [r for r in letters if r.split == split] for split in glyphs.LETTER_SPLITS}
    train, validation, pairs, characters = in_split.values()
    assert len(letters) == sum(map(len, in_split.values()))
    assert {r.label for r in characters} == {
        r.label for r in expected if r.split == glyphs.HELD_OUT_CHARACTERS
    }
    known = train + validation + pairs
    assert 0.08 < len(pairs) / len(known) < 0.12
    assert 0.04 < len(validation) / len(known) < 0.06
    for rows in (validation, pairs):  # training has each style
        styles = [{r.captions[0].removesuffix(r.label) for r in rows} for rows in (rows, train)]
        assert styles[0] == styles[1]
    assert report.found == report.used + count_skipped(report)
    assert report.used == len(letters) > 2000


def test_the_caption_names_the_colours_that_are_painted(variants):
    (records, _), (colored, _) = variants["grey"], variants["colour"]
    pairs = Counter()
    assert len(colored) == len(records)
    for grey, (image, (caption,), label, split) in zip(records, colored):
        assert image.shape == (32, 32, 3)
        assert image.dtype == np.uint8
        assert (label, split) == (grey.label, grey.split)
        ink, rest = caption.split(" ", 1)
        rest, paper = rest.rsplit(" on ", 1)
        assert rest == grey.captions[0]
        assert ink != paper
        pairs[ink, paper] += 1
        assert (image[grey.image[:, :, 0] == 255] == glyphs.COLORS[paper]).all()
        assert (image[grey.image[:, :, 0] == 0] == glyphs.COLORS[ink]).all()
    assert len(pairs) == 56  # as the docstring has it
    assert max(pairs.values()) < 2 * min(pairs.values())
    assert len({record.image.tobytes() for record in colored}) == len(colored)


def test_colours_are_far_apart_and_the_choice_is_the_same_everywhere():
    colors = np.array(list(glyphs.COLORS.values()))
    distances = np.abs(colors[:, None] - colors).max(2)
    assert (distances + 255 * np.eye(len(colors)) == 255).all()
    assert glyphs.choose_colors("serif bold", "latin small letter a") == ("black", "green")


def test_paint_blends_as_the_antialiasing_does():
    image = np.array([[[0], [51], [255]]], dtype=np.uint8)
    painted = glyphs.paint(image, "red", "cyan")
    assert painted.tolist() == [[[255, 0, 0], [204, 51, 51], [0, 255, 255]]]
    assert np.array_equal(glyphs.paint(image, "black", "white"), image.repeat(3, axis=2))
    with pytest.raises(ValueError, match=r"no colour pink: choose from black, .*white"):
        glyphs.paint(image, "red", "pink")


def test_unpaint_undoes_paint(variants):
    (records, _), (colored, _) = variants["grey"], variants["colour"]
    for grey, painted in zip(records, colored):
        if grey.label.startswith(("latin ", "digit ")):
            ink, paper, drawing = glyphs.unpaint(painted.image)
            assert painted.captions[0] == f"{ink} {grey.captions[0]} on {paper}"
            assert np.abs(drawing.astype(int) - grey.image).max() <= 1
    paper = np.full((4, 4, 3), 40)  # not quite black
    assert glyphs.unpaint(paper)[:2] == ("", "black")
    faint = paper.copy()
    faint[1:3, 1:3, 2] = 120
    assert glyphs.unpaint(faint)[:2] == ("blue", "black")


def test_each_variant_has_a_different_version():
    choices = [{"color": c, "letters": n} for c in (False, True) for n in (False, True)]
    assert len({glyphs.version(**choice) for choice in choices}) == 4
    assert glyphs.version() == glyphs.version(color=False, letters=False)


def test_answers_are_read_from_captions():
    name = "latin small letter a"
    found = glyphs.answers(f"serif bold italic {name}", name)
    assert list(found.values()) == ["serif", "bold italic", "yes", "yes"]
    assert list(glyphs.answers(f"mono {name}", name).values()) == ["mono", "regular", "no", "no"]
    painted = glyphs.answers(f"red sans italic {name} on yellow", name)
    assert painted["which ink?"] == "red" and painted["which paper?"] == "yellow"
    assert [painted["what style?"], painted["which family?"]] == ["italic", "sans"]
