"""Chorales as texts: 360 hymns in four voices by J. S. Bach, sixteenth by sixteenth.

A line is a bar, a word is a quarter of four sixteenths, and a sixteenth has four letters: soprano,
alto, tenor, bass. A letter is a pitch, chr(12 + MIDI number): H is the C in the middle of a piano,
T the one above; a dot is a rest. So four letters, repeated, are a chord that lasts:

    OLH<OLH<OLH<OLH< OJGCOJGCOJGCOJGC    a quarter of C major, and one of G major

The spaces say nothing new, but with them a model need not count to 64 to know where a bar ends.

A voice that strikes the same pitch again and one that holds it are written alike, as in the grids
of Huang et al. (2018, Music Transformer, section 4.1) and of Boulanger-Lewandowski et al. (2012).

The package music21 holds the chorales as MusicXML:

    pip download --no-deps --only-binary :all: music21==10.5.1 -d data/cache/packages
    python -m data.chorales

A document is a chorale. Training has it in all keys in which each voice stays in its range; what is
held out is in its own key. Bach set some melodies up to eight times: chorales whose melodies start
with the same steps are in one split. Left out are pieces of other than four voices, those that
change their metre, and repeats, which are played once.

`fault` asks whether the bars add up, whether each voice stays in its range, and whether the voices
cross in more than a quarter of the sixteenths, which is rare in Bach's.

Licence: encoded by Margaret Greentree, used by permission in music21; the music is free.
"""

import io
import re
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import groupby, pairwise
from pathlib import Path

from data import command, modality, music, tunes, wheels
from data.music import PAUSE, STEPS, Note
from data.report import Report
from data.splits import TRAIN, Document, split_of

PACKAGE = replace(
    tunes.PACKAGE, licence="encoded by Margaret Greentree, used by permission; the music is free"
)
MEMBERS = re.compile(r"music21/corpus/bach/.+\.mxl")
HELD_OUT = 0.2  # share of the melodies, half for validation and half for test
VOICES = ("soprano", "alto", "tenor", "bass")
RANGES = ((57, 81), (53, 76), (47, 71), (36, 64))  # MIDI numbers of each voice, lowest and highest
REST = "."
SHIFT = 12  # from a MIDI number to its letter
QUARTER = 16  # letters
SIXTEENTH = Fraction(1, 16)
METRES = {64: "4/4", 48: "3/4", 96: "3/2"}  # letters of a bar
FEWEST_BARS = 4
CROSSED = 0.25  # share of the sixteenths in which voices cross, at most
FIRST_STEPS = 8  # of a melody, by which it is known
COPY = 16  # notes of a melody in a row that are also in training, in any key, make a copy


# ---- text -> voices ------------------------------------------------------------------------------


def bars_of(text: str) -> list[str]:
    """The letters of each bar."""
    return [line.replace(" ", "") for line in text.strip("\n").split("\n")]


def arrange(bars: Sequence[str]) -> str:
    """Bars of letters as lines of words. The quarters of a first bar end with it."""
    lines = []
    for i, bar in enumerate(bars):
        start = len(bar) % QUARTER if i == 0 else 0
        cuts = [0, *range(start or QUARTER, len(bar), QUARTER), len(bar)]
        lines.append(" ".join(bar[a:b] for a, b in pairwise(cuts)) + "\n")
    return "".join(lines)


def voices_of(text: str) -> list[list[int | None]]:
    """The pitches of each voice, one a sixteenth; None for a rest."""
    pitches = [None if a == REST else ord(a) - SHIFT for a in "".join(bars_of(text))]
    return [pitches[voice :: len(VOICES)] for voice in range(len(VOICES))]


def check_ranges(voices: Sequence[Sequence[int | None]]) -> None:
    """Raise ValueError for a pitch that a voice does not reach."""
    for name, voice, (low, high) in zip(VOICES, voices, RANGES):
        for pitch in voice:
            if pitch is not None and not low <= pitch <= high:
                raise ValueError(f"{chr(pitch + SHIFT)!r} is no note of the {name}")


def right_bars(text: str) -> tuple[int, int]:
    """(bars of the right length, all bars). The commonest length is right, if it is that of a
    metre; the first bar and the last one may be shorter, by whole sixteenths."""
    lengths = list(map(len, bars_of(text)))
    length = Counter(lengths).most_common(1)[0][0]
    if length not in METRES:
        return 0, len(lengths)
    at_end = (0, len(lengths) - 1)
    right = [
        n == length or (i in at_end and 0 < n < length and n % len(VOICES) == 0)
        for i, n in enumerate(lengths)
    ]
    return sum(right), len(lengths)


def crossings(voices: Sequence[Sequence[int | None]]) -> tuple[int, int]:
    """(sixteenths in which a voice is above the one that should be above it, all sixteenths)."""
    crossed = []
    for chord in zip(*voices):
        pitches = [pitch for pitch in chord if pitch is not None]
        crossed.append(any(upper < lower for upper, lower in pairwise(pitches)))
    return sum(crossed), len(crossed)


def fault(text: str) -> str:
    """What keeps a text from being a chorale; "" if it is one."""
    right, count = right_bars(text)
    if count < FEWEST_BARS:
        return f"fewer than {FEWEST_BARS} bars"
    if right < count:
        return "a bar does not add up to the metre"
    if arrange(bars_of(text)).strip() != text.strip():
        return "a quarter has other than four sixteenths"
    voices = voices_of(text)
    try:
        check_ranges(voices)
    except ValueError as error:
        return re.sub(r"^'.*' ", "a letter ", str(error))
    if any(all(pitch is None for pitch in voice) for voice in voices):
        return "a voice is silent"
    crossed, count = crossings(voices)
    if crossed > CROSSED * count:
        return f"voices cross in more than {CROSSED:.0%} of the sixteenths"
    return ""


def describe(text: str) -> dict[str, tuple[float, float]]:
    """The share of bars that add up, how many there are, and how often voices cross."""
    right, count = right_bars(text)
    crossed, sixteenths = crossings(voices_of(text))
    return {
        "share of right bars": (right, count),
        "bars": (count, 1),
        "share of crossed sixteenths": (crossed, sixteenths),
    }


def steps(text: str) -> tuple[int, ...]:
    """The semitones from note to note of the soprano, which are the same in all keys."""
    letters = "".join(bars_of(text))[:: len(VOICES)]
    pitches = [ord(letter) for letter, _ in groupby(letters) if letter != REST]
    return tuple(after - before for before, after in pairwise(pitches))


def copied(texts: Sequence[str], training: Iterable[str]) -> list[bool]:
    """Whether training has COPY neighbouring notes of each of these melodies, in any key."""
    return modality.share_runs(list(map(steps, texts)), map(steps, training), COPY - 1)


# ---- a file of the package -> text ---------------------------------------------------------------


def unpack(content: bytes) -> ElementTree.Element:
    """The score in a compressed MusicXML file, .mxl."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        name = min(n for n in archive.namelist() if re.fullmatch(r"(?!META-INF/).+xml", n))
        wheels.check_size(name, archive.getinfo(name).file_size)
        return ElementTree.fromstring(archive.read(name))


def read_note(note: ElementTree.Element) -> int | None:
    """The MIDI number of a <note>; None for a rest."""
    pitch = note.find("pitch")
    if pitch is None:
        return None
    octave = 12 * (int(pitch.findtext("octave")) + 1)
    return octave + STEPS[pitch.findtext("step")] + int(pitch.findtext("alter", "0"))


def read_voice(part: ElementTree.Element) -> tuple[list[int | None], set[Fraction], Fraction]:
    """(the pitch at each sixteenth, all metres, the length of the first bar) of a <part>."""
    voice: list[int | None] = []
    metres = set()
    unit = Fraction(1)
    time = Fraction(0)  # 1 is a whole note
    first = Fraction(0)
    for number, measure in enumerate(part.findall("measure")):
        for element in measure:
            if element.tag == "attributes":
                if divisions := element.findtext("divisions"):
                    unit = Fraction(1, 4 * int(divisions))
                if (metre := element.find("time")) is not None:
                    beats, kind = metre.findtext("beats"), metre.findtext("beat-type")
                    metres.add(Fraction(int(beats), int(kind)))
            elif element.tag == "note" and element.find("grace") is None:
                if element.find("chord") is not None:
                    continue  # it sounds with the note before
                time += int(element.findtext("duration")) * unit
                while len(voice) * SIXTEENTH < time:  # the pitch that sounds as each one begins
                    voice.append(read_note(element))
        if number == 0:
            first = time
    return voice, metres, first


def to_text(score: ElementTree.Element) -> str:
    """A chorale as text. Raises ValueError, with the reason, for a piece that is none."""
    parts = score.findall("part")
    if len(parts) != len(VOICES):
        raise ValueError("it has other than four voices")
    voices, metres, firsts = zip(*map(read_voice, parts))
    all_metres = set().union(*metres)
    if len(all_metres) > 1 or len(set(map(len, voices))) > 1:
        raise ValueError("it changes its metre, or its voices have different lengths")
    length = int(16 * all_metres.pop()) * len(VOICES)
    upbeat = int(16 * firsts[0]) * len(VOICES) % length
    letters = "".join(
        REST if pitch is None else chr(pitch + SHIFT) for chord in zip(*voices) for pitch in chord
    )
    cuts = [0, *range(upbeat or length, len(letters), length), len(letters)]
    text = arrange([letters[start:end] for start, end in pairwise(cuts)])
    if reason := fault(text):
        raise ValueError(reason)
    return text


def transpose(text: str, semitones: int) -> str:
    """The text so many semitones higher."""
    move = {code: code + semitones for code in range(ord(REST) + 1, 127)}
    return text.translate(move)


def keys_of(text: str) -> list[str]:
    """The text in the keys from six semitones lower to five higher, its own first, in which each
    voice stays in its range."""
    found = [text]
    for semitones in (*range(-6, 0), *range(1, 6)):
        moved = transpose(text, semitones)
        try:
            check_ranges(voices_of(moved))
        except ValueError:
            continue
        found.append(moved)
    return found


def version() -> str:
    """A name for the exact documents: it changes if they do."""
    return f"chorales-2 {PACKAGE.sha256}"


def documents(report: Report | None = None) -> Iterator[Document]:
    """Yield each chorale in its key, and for training in further keys.

    Raises ValueError, with a command, if the package is not there.
    """
    if report is None:
        report = Report()
    report.note(f"licence: {PACKAGE.licence}")
    for member, content in wheels.read_matching(PACKAGE, MEMBERS):
        report.found += 1
        name = Path(member).stem
        try:
            text = to_text(unpack(content))
        except ValueError as error:
            report.skip(str(error), name)
            continue
        melody = " ".join(map(str, steps(text)[:FIRST_STEPS]))
        split = split_of(melody, HELD_OUT)
        report.used += 1
        for own in keys_of(text) if split == TRAIN else (text,):
            yield Document(own, split, name)


# ---- sound and a picture -------------------------------------------------------------------------


def notes_of(texts: Sequence[str]) -> list[list[Note]]:
    """The notes of each voice, one chorale after the other; equal sixteenths are one note."""
    voices: list[list[Note]] = [[] for _ in VOICES]
    for text in texts:
        for own, voice in zip(voices, voices_of(text)):
            for pitch, same in groupby(voice):
                own.append(Note(pitch, len(list(same)) * SIXTEENTH))
            own.append(PAUSE)
    return voices


def draw(texts: Sequence[str], path: Path) -> None:
    """Write up to music.DRAWN chorales; the .mid has a track for each voice."""
    music.write(notes_of(texts[: music.DRAWN]), path)


def read_prompt(prompt: str) -> str:
    """The start of a chorale, in which \\n is a line end. Raises ValueError if it is none."""
    text = prompt.replace("\\n", "\n")
    try:
        check_ranges(voices_of(text))
    except ValueError as error:
        raise ValueError(
            f"--prompt {prompt!r} starts no chorale: {error}; four letters are a sixteenth, such "
            "as OLH< for C major"
        ) from None
    return text


MODALITY = modality.Modality(
    about="chorales in four voices by J. S. Bach",
    unit="chorales",
    meaning="each bar adds up to the metre, the first and the last may be shorter; each voice "
    "stays in its range; voices seldom cross",
    fault=fault,
    longest=1700,
    samples=100,
    key=steps,
    copied=copied,
    describe=describe,
    read_prompt=read_prompt,
    draw=draw,
    endings=(".mid", ".wav", ".png"),
)


def look() -> None:
    """Print the size of the collection, a chorale, and how many held-out ones are valid."""
    modality.look(sys.modules[__name__])


if __name__ == "__main__":
    command.run("chorales", __doc__, look)
