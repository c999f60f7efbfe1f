"""Tunes as texts: 11,500 folk songs and dances in ABC, the notation that folk musicians type.

    M:6/8            metre: a bar is six eighths
    L:1/8            length of a plain note
    K:G              key: G major, so F is sharp
    d|gfg d2B|...    notes; d is an octave above D; 2 doubles the length, / halves it; | ends a bar

The package music21 holds the Essen collection of folk songs, O'Neill's and Aird's collections of
airs, and Ryan's of fiddle tunes:

    pip download --no-deps --only-binary :all: music21==10.5.1 -d data/cache/packages
    python -m data.tunes

A document is a tune, reduced to its melody: metre, length, key, then all notes on one line. Titles,
words, chord names, ornaments, slurs and fingerings are left out, and of notes that sound together
all but the last. Tunes are skipped that change their metre or key, or have none.

A tune occurs in several collections and keys. So near duplicates are found by the steps from note
to note, which do not depend on the key (data/dedupe.py, with steps as words), and left out. Tunes
of one title are in one split.

`fault` asks whether the bars add up. A part of a tune is what stands between its ends, repeat signs
and double bars. All its bars have the length of the metre, but for the first and the last, which
may be shorter, as an upbeat is.

Licence: the Essen collection may be used in music21 without commerce; the others are old tunes that
their transcribers let everybody use. music21 itself is under BSD.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from data import command, dedupe, modality, music, wheels
from data.music import STEPS, Note
from data.report import Report
from data.splits import Document, split_of

PACKAGE = wheels.Package(
    name="music21",
    version="10.5.1",
    archive="music21-10.5.1-py3-none-any.whl",
    sha256="dc3309498c4c95cebdf8d4f20c868deb6b63bce1d929cad4f51a7ccc982987b1",
    licence="non-commercial use (Essen collection); free use (the others)",
)
MEMBERS = re.compile(r"music21/corpus/(?:essenFolksong|oneills1850|ryansMammoth|airdsAirs)/.+\.abc")
HELD_OUT = 0.1  # share of the titles, half for validation and half for test
FEWEST_BARS = 4  # of a tune
COPY = 16  # notes in a row that are also in training, in any key, make a copy
INDEX_MB = 8  # of memory, to recognize duplicates

FIELD = re.compile(r"([A-Za-z]):\s*(.*?)\s*")
# What is left out of a line of notes: chord names and fingerings in quotes, grace notes,
# ornaments, and signs of beams and slurs.
LEFT_OUT = re.compile(r'"[^"]*"|\{[^}]*\}|![^!]*!|\+[^+]*\+|[`~.H-Wh-wy\\$*;]|\((?!\d)|\)')
CHORD = re.compile(r"\[(?:[_^=]*[A-Ga-g][,']*[\d/]*)*([_^=]*[A-Ga-g][,']*[\d/]*)\](\d*/*\d*)")
NOTE = re.compile(r"([_^=]*)([A-Ga-gzx])([,']*)(\d*)(/*)(\d*)(-?)")
BAR = re.compile(r":*\|+[:\]]*|\[\||:+|\]|\[?[1-9](?![\d/])|\[(?=[1-9])")
TUPLET = re.compile(r"\((\d)(?::(\d?))?(?::(\d?))?")
BROKEN = re.compile(r"[<>]+")
METRE = re.compile(r"(\d{1,2})/(\d{1,2})")
KEY = re.compile(r"([A-G])([#b]?)\s*([A-Za-z]*)")

FIFTHS = {"F": -1, "C": 0, "G": 1, "D": 2, "A": 3, "E": 4, "B": 5}  # sharps of the major key
MODES = {"": 0, "maj": 0, "ion": 0, "mix": -1, "dor": -2, "m": -3, "min": -3, "aeo": -3,
         "phr": -4, "loc": -5, "lyd": 1}  # fmt: skip
NAMED_METRES = {"C": "4/4", "C|": "2/2", "c": "4/4", "c|": "2/2"}
TUPLETS = {2: 3, 3: 2, 4: 3, 6: 2, 8: 3}  # p notes in the time of so many


class Tune(NamedTuple):
    """A melody in parts, which consist of bars."""

    metre: Fraction  # length of a bar
    parts: list[list[list[Note]]]

    @property
    def notes(self) -> list[Note]:
        return [note for part in self.parts for bar in part for note in bar]


# ---- text -> notes -------------------------------------------------------------------------------


def read_metre(text: str) -> Fraction:
    """The length of a bar. Raises ValueError if it is none."""
    found = METRE.fullmatch(NAMED_METRES.get(text, text))
    if not found or int(found[1]) == 0 or int(found[2]) not in (1, 2, 4, 8, 16, 32):
        raise ValueError(f"M:{text} is no metre such as M:4/4")
    return Fraction(int(found[1]), int(found[2]))


def read_key(text: str) -> dict[str, int]:
    """{letter of a note: +1 sharp, -1 flat}. Raises ValueError if it is no key."""
    found = KEY.match(text)
    mode = found[3].lower() if found else ""
    if mode != "m":
        mode = mode[:3]
    if not found or mode not in MODES:
        raise ValueError(f"K:{text} is no key such as K:G or K:Em")
    sharps = FIFTHS[found[1]] + MODES[mode] + {"#": 7, "b": -7, "": 0}[found[2]]
    order = "FCGDAEB"
    if sharps < 0:
        return dict.fromkeys(order[sharps:], -1)
    return dict.fromkeys(order[:sharps], 1)


def read_fields(text: str) -> tuple[dict[str, str], str]:
    """({letter: value} of the lines at the start, the notes on one line).

    Raises ValueError without M, L and K, and for a field among the notes.
    """
    fields = {}
    notes = []
    for line in text.strip().split("\n"):
        found = FIELD.fullmatch(line)
        if found and notes:
            raise ValueError(f"{line!r} stands among the notes")
        if found:
            fields[found[1]] = found[2]
        else:
            notes.append(line)
    missing = [name for name in "MLK" if name not in fields]
    if missing:
        raise ValueError(f"there is no line {missing[0]}:")
    return fields, "".join(notes)


def read_pitch(
    sign: str, letter: str, octaves: str, key: dict[str, int], altered: dict[str, int]
) -> int:
    """The MIDI number of a note.

    Its sign, if it has one, is put into `altered`: it holds for the rest of the bar.
    """
    name = letter.upper()
    if sign:
        altered[letter + octaves] = sign.count("^") - sign.count("_")
    shift = altered.get(letter + octaves, key.get(name, 0))
    octave = 12 * (letter.islower() + octaves.count("'") - octaves.count(","))
    return 60 + STEPS[name] + octave + shift


def parse(text: str) -> Tune:
    """The notes of a tune. Raises ValueError, with what is wrong, if it cannot be read."""
    fields, line = read_fields(text)
    metre = read_metre(fields["M"])
    unit = read_metre(fields["L"])
    key = read_key(fields["K"])
    parts: list[list[list[Note]]] = [[]]
    bar: list[Note] = []
    altered: dict[str, int] = {}
    left = 0  # notes of the tuplet
    factor = Fraction(1)
    broken = Fraction(0)  # what the next note is longer or shorter by, as a share
    place = 0
    while place < len(line):
        if found := NOTE.match(line, place):
            sign, letter, octaves, number, slashes, divisor, tie = found.groups()
            below = int(divisor) if divisor else 2 ** len(slashes)
            if (number and int(number) == 0) or below == 0:
                raise ValueError(f"{found[0]!r} has no length")
            length = unit * Fraction(int(number or 1), below) * (1 + broken)
            broken = Fraction(0)
            if left:
                left -= 1
                length *= factor
            pitch = None if letter in "zx" else read_pitch(sign, letter, octaves, key, altered)
            bar.append(Note(pitch, length, bool(tie)))
        elif found := BROKEN.match(line, place):
            if not bar:
                raise ValueError(f"{found[0]!r} has no note before it")
            share = 1 - Fraction(1, 2 ** len(found[0]))
            longer = share if found[0][0] == ">" else -share
            bar[-1] = bar[-1]._replace(length=bar[-1].length * (1 + longer))
            broken = -longer
        elif found := TUPLET.match(line, place):
            left = int(found[1])
            time = int(found[2]) if found[2] else TUPLETS.get(left, 2)
            factor = Fraction(time, left) if left else Fraction(1)
            left = int(found[3]) if found[3] else left
        elif found := BAR.match(line, place):
            if bar:
                parts[-1].append(bar)
            bar = []
            altered = {}
            if found[0] != "|" and parts[-1]:
                parts.append([])
        else:
            raise ValueError(f"{line[place]!r} among the notes means nothing")
        place = found.end()
    if bar:
        parts[-1].append(bar)
    return Tune(metre, [part for part in parts if part])


# ---- is it a tune? -------------------------------------------------------------------------------


def right_bars(tune: Tune) -> tuple[int, int]:
    """(bars with the right length, all bars)."""
    right = 0
    count = 0
    for part in tune.parts:
        for i, bar in enumerate(part):
            length = sum(note.length for note in bar)
            at_end = i in (0, len(part) - 1)
            right += length == tune.metre or (at_end and length < tune.metre)
            count += 1
    return right, count


def fault(text: str) -> str:
    """What keeps a text from being a tune; "" if it is one."""
    try:
        tune = parse(text)
    except ValueError as error:
        return str(error)
    right, count = right_bars(tune)
    if count < FEWEST_BARS or not any(note.pitch for note in tune.notes):
        return f"fewer than {FEWEST_BARS} bars with notes"
    if right < count:
        return "a bar does not add up to the metre"
    return ""


def describe(text: str) -> dict[str, tuple[float, float]]:
    """The share of bars that add up, and how many there are."""
    try:
        right, count = right_bars(parse(text))
    except ValueError:
        return {}
    return {"share of right bars": (right, count), "bars": (count, 1)} if count else {}


def steps(text: str) -> tuple[int, ...]:
    """The semitones from note to note, which are the same in all keys."""
    pitches = [note.pitch for note in parse(text).notes if note.pitch is not None]
    return tuple(after - before for before, after in pairwise(pitches))


def copied(texts: Sequence[str], training: Iterable[str]) -> list[bool]:
    """Whether training has COPY neighbouring notes of each of these tunes, in any key."""
    return modality.share_runs(list(map(steps, texts)), map(steps, training), COPY - 1)


# ---- a file of tunes -> documents ----------------------------------------------------------------


def plain_key(text: str) -> str:
    """A key as it is written here: `E Minor` -> Em. Raises ValueError if it is none."""
    read_key(text)
    found = KEY.match(text)
    mode = found[3].lower()[:3]
    if mode in ("maj", "ion"):
        mode = ""
    if mode == "min":
        mode = "m"
    return f"{found[1]}{found[2]}{mode}"


def is_full(head: str, notes: str) -> bool:
    """Whether the notes after the last sign of a bar have the length of a bar.

    head: the lines M, L and K.
    """
    bar = re.split(r"[|:\]]", notes)[-1]
    try:
        tune = parse(head + bar)
    except ValueError:
        return False
    return bool(bar) and sum(note.length for note in tune.notes) == tune.metre


def reduce(lines: Sequence[str]) -> str:
    """The melody of a tune as it was published.

    In the Essen collection a line ends with a phrase, and so, without a sign, may a bar: a sign is
    added where the bar is full.

    Raises ValueError for a tune without metre or key, or that changes one of them.
    """
    fields: dict[str, str] = {}
    lines_of_notes = []
    for line in lines:
        found = FIELD.fullmatch(line)
        if re.search(r"\[[A-Z]:", line):
            raise ValueError("it changes its metre, key or voice")
        if found is None:
            lines_of_notes.append(re.sub(r"\s", "", LEFT_OUT.sub("", line)))
        elif found[1] in "MLKV" and (lines_of_notes or found[1] in fields):
            raise ValueError("it changes its metre, key or voice")
        else:
            fields.setdefault(found[1], found[2])
    if "M" not in fields or "K" not in fields:
        raise ValueError("no metre or key")
    metre = NAMED_METRES.get(fields["M"], fields["M"])
    length = fields.get("L") or ("1/8" if read_metre(metre) >= Fraction(3, 4) else "1/16")
    head = f"M:{metre}\nL:{length}\nK:{plain_key(fields['K'])}\n"
    notes = ""
    for line in lines_of_notes:
        notes += CHORD.sub(r"\1\2", line)
        if is_full(head, notes):
            notes += "|"
    return head + notes


def version() -> str:
    """A name for the exact documents: it changes if they do."""
    return f"tunes-1 {PACKAGE.sha256}"


def documents(report: Report | None = None) -> Iterator[Document]:
    """Yield each tune that can be read, without near duplicates.

    Raises ValueError, with a command, if the package is not there.
    """
    if report is None:
        report = Report()
    report.note(f"licence: {PACKAGE.licence}")
    seen = dedupe.Seen(INDEX_MB)
    for _, content in wheels.read_matching(PACKAGE, MEMBERS):
        book = content.decode("utf-8", "replace").replace("\r", "")
        for published in re.split(r"^X:.*\n", book, flags=re.MULTILINE)[1:]:
            report.found += 1
            lines = [line.partition("%")[0].strip() for line in published.split("\n")]
            lines = [line for line in lines if line]
            title = next((line[2:].strip() for line in lines if line.startswith("T:")), "")
            try:
                text = reduce(lines)
                melody = steps(text)
            except ValueError as error:
                report.skip(re.sub(r"'.*'", "something", str(error)), title)
                continue
            if len(melody) < COPY:
                report.skip(f"fewer than {COPY + 1} notes", title)
                continue
            words = " ".join(f"step{step + 100}" for step in melody)
            if dedupe.add_new(seen, words):
                report.skip("a near duplicate", title)
                continue
            report.used += 1
            name = re.sub(r"[\W\d_]", "", title.lower()) or words
            yield Document(text + "\n", split_of(name, HELD_OUT), title)


# ---- sound and a picture -------------------------------------------------------------------------


def played(tunes: Sequence[Tune]) -> list[Note]:
    """The notes of all tunes, one tune after the other, tied ones as one.

    Repeats are not played.
    """
    found: list[Note] = []
    for tune in tunes:
        for note in (*tune.notes, music.PAUSE):
            if found and found[-1].tied and found[-1].pitch == note.pitch:
                note = note._replace(length=note.length + found.pop().length)
            found.append(note)
    return found


def draw(texts: Sequence[str], path: Path) -> None:
    """Write up to music.DRAWN tunes, one after the other."""
    music.write([played([parse(text) for text in texts[: music.DRAWN]])], path)


def read_prompt(prompt: str) -> str:
    """The start of a tune, in which \\n is a line end. Raises ValueError if it cannot be read."""
    text = prompt.replace("\\n", "\n")
    try:
        parse(text)
    except ValueError as error:
        example = "M:6/8\\nL:1/8\\nK:G\\nd|gfg"
        raise ValueError(
            f"--prompt {prompt!r} starts no tune: {error}; such as {example}"
        ) from None
    return text


MODALITY = modality.Modality(
    about="folk songs and dances in ABC notation",
    unit="tunes",
    meaning="each bar adds up to the metre; the first and the last of a part may be shorter",
    fault=fault,
    longest=600,
    key=steps,
    copied=copied,
    describe=describe,
    read_prompt=read_prompt,
    draw=draw,
    endings=(".mid", ".wav", ".png"),
)


def look() -> None:
    """Print the size of the collection, a tune, and how many held-out ones are valid."""
    modality.look(sys.modules[__name__])


if __name__ == "__main__":
    command.run("tunes", __doc__, look)
