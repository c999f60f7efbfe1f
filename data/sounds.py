"""Sounds as texts: what a telephone exchange says, 558 recordings of one voice, 24 minutes.

A text has a sign for each sample, 8,000 a second. A sample x in [-1, 1] is written by its logarithm
(mu-law, the standard G.711 of telephones; here in the smooth form of van den Oord et al. 2016,
section 2.2, with mu = 255), because quiet differences are heard, loud ones hardly:

    y = sign(x) ln(1 + mu |x|) / ln(1 + mu)        bin = round((y + 1) / 2 * mu), 0 ... 255

The sign of a bin is one of the 256 letters from U+0100 to U+01FF, which all can be printed, and
have two bytes each in UTF-8. A tokenizer of kind "characters" makes a token of each.

Debian's package asterisk-core-sounds-en-wav holds the sounds; on other systems the same file is at
https://snapshot.debian.org/package/asterisk-core-sounds/1.6.1-1/.

    mkdir -p data/cache/packages && (cd data/cache/packages && apt-get download \\
        asterisk-core-sounds-en-wav=1.6.1-1)
    python -m data.sounds

A document is a sound, from 0.2 to 73 seconds. Ten that are silent are left out. No two share a
loud stretch of 6 milliseconds bit for bit, but much is said twice, such as "minute" and "minutes",
"7" and "7th", or a menu and its longer form. Sounds whose names say so are in one split.

`fault` asks for a voice or a tone: sounds that repeat themselves 60 to 400 times a second, for an
eighth of the time. Noise does not. It does not ask for words.

Licence: CC BY-SA 3.0; recorded by Allison Smith, paid for by Digium.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np

from data import command, modality, waves, wheels
from data.report import Report
from data.splits import Document, split_of

PACKAGE = wheels.Package(
    name="asterisk-core-sounds-en-wav",
    version="1.6.1-1",
    archive="asterisk-core-sounds-en-wav_1.6.1-1_all.deb",
    sha256="2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    licence="CC BY-SA 3.0 (recorded by Allison Smith)",
)
MEMBERS = re.compile(r"\./usr/share/asterisk/sounds/.+\.wav")
HELD_OUT = 0.15  # share of the sounds, half for validation and half for test
RATE = 8000  # samples a second
MU = 255
SIGNS = "".join(map(chr, range(0x100, 0x200)))
LONGEST = RATE  # samples of a text that is written: a second
SHORTEST = 1000  # samples
SILENT = 0.01  # amplitude
COPY = 48  # samples in a row that are also in training make a copy,
VARIED = 16  # if so many of them differ: silence is alike everywhere
# Parts of names that say how a sound differs from another one that says nearly the same.
BEFORE = re.compile(
    "^(vm|queue|conf|confbridge|auth|agent|privacy|priv|screen|ascending|descending|h)-"
)
BEHIND = re.compile(r"in|out|full|extended|p|[abc]|menu\d+|\d+")

# A moment, for `voiced`: a window, and the same window later by each of the periods.
WINDOW = 256  # samples
PERIODS = range(20, 134)  # samples: 400 to 60 times a second
STEP = 200  # samples from moment to moment
ALIKE = 0.8  # correlation from which the two windows are alike
VOICED = 1 / 8  # share of moments


# ---- samples <-> text ----------------------------------------------------------------------------


def to_bins(samples: np.ndarray, n_bins: int = 256) -> np.ndarray:
    """Samples in [-1, 1] -> bins from 0, uint16, by mu-law; louder ones get the first or last."""
    y = np.sign(samples) * np.log1p(MU * np.abs(samples)) / np.log1p(MU)
    return np.clip(np.rint((y + 1) / 2 * (n_bins - 1)), 0, n_bins - 1).astype(np.uint16)


def to_samples(bins: np.ndarray, n_bins: int = 256) -> np.ndarray:
    """The inverse but for rounding: bins -> samples in [-1, 1], float64."""
    y = bins / (n_bins - 1) * 2 - 1
    return np.sign(y) * np.expm1(np.abs(y) * np.log1p(MU)) / MU


def encode(samples: np.ndarray) -> str:
    """The text of samples (n,) in [-1, 1]."""
    return (to_bins(samples) + ord(SIGNS[0])).astype("<u2").tobytes().decode("utf-16-le")


def decode(text: str) -> np.ndarray:
    """The samples of a text, float64 (n,). Raises ValueError for a sign that is none of ours."""
    wrong = re.search(f"[^{SIGNS[0]}-{SIGNS[-1]}]", text)
    if wrong:
        raise ValueError(f"{wrong[0]!r} at place {wrong.start() + 1} is no sample")
    codes = np.frombuffer(text.encode("utf-16-le"), dtype="<u2")
    return to_samples(codes.astype(np.int64) - ord(SIGNS[0]))


# ---- is it a sound? ------------------------------------------------------------------------------


def voiced(samples: np.ndarray) -> np.ndarray:
    """Whether the sound repeats itself at each moment: bool, one for each STEP samples."""
    longest = PERIODS[-1]
    if len(samples) < WINDOW + longest:
        return np.zeros(0, dtype=bool)
    parts = np.lib.stride_tricks.sliding_window_view(samples, WINDOW + longest)[::STEP]
    parts = parts - parts.mean(1, keepdims=True)
    now = parts[:, :WINDOW]
    size = np.linalg.norm(now, axis=1)
    found = np.zeros(len(parts), dtype=bool)
    for period in PERIODS:
        later = parts[:, period : period + WINDOW]
        found |= (now * later).sum(1) > ALIKE * size * np.linalg.norm(later, axis=1)
    return found & (size > SILENT * WINDOW**0.5)


def fault(text: str) -> str:
    """What keeps a text from being a sound with a voice or a tone; "" if it is one."""
    try:
        samples = decode(text.strip())
    except ValueError as error:
        return str(error)
    if len(samples) < SHORTEST:
        return f"shorter than {SHORTEST} samples"
    if np.abs(samples).max() < SILENT:
        return "silent"
    if voiced(samples).mean() < VOICED:
        return "no voice or tone for an eighth of the time"
    return ""


def describe(text: str) -> dict[str, tuple[float, float]]:
    """How much of the time there is a voice, and how loud it is."""
    try:
        samples = decode(text.strip())
    except ValueError:
        return {}
    if len(samples) < SHORTEST:
        return {}
    moments = voiced(samples)
    decibels = 10 * np.log10(np.square(samples).mean())
    return {"share of voiced moments": (moments.sum(), len(moments)), "decibels": (decibels, 1)}


def copied(texts: Sequence[str], training: Iterable[str]) -> list[bool]:
    """Whether training has COPY neighbouring samples of each of these sounds."""
    return modality.share_runs(texts, training, COPY, VARIED)


def read_file(path: str) -> np.ndarray:
    """The samples of the .wav file of --prompt, int16 (n,). Raises ValueError for one that is not
    mono with RATE samples a second, and for silence."""
    if not Path(path).is_file():
        raise ValueError(f"--prompt {path!r} is no file: give a .wav file")
    try:
        samples = waves.read(Path(path).read_bytes(), RATE)
        if is_silent(samples):
            raise ValueError("it is silent")
    except ValueError as error:
        raise ValueError(f"--prompt {path}: {error}") from None
    return samples


def read_prompt(prompt: str) -> str:
    """The first half of what a text may have, of a .wav file. Raises ValueError for others."""
    return encode(read_file(prompt)[: LONGEST // 2] / waves.SCALE)


def is_silent(samples: np.ndarray) -> bool:
    """Whether nothing is heard in samples, int16 (n,)."""
    return bool(np.abs(samples / waves.SCALE).max() < SILENT)


PAUSE = np.zeros(RATE // 4)  # between two sounds
DRAWN = 8  # texts in a file


def save(parts: Sequence[np.ndarray], path: Path) -> str:
    """Write sounds, one after the other, as .wav and, as a spectrogram, as .png; return both names.

    parts: the samples of each in [-1, 1], float (n,).
    """
    from data import pictures  # loads Pillow, which texts do not need

    samples = np.concatenate([piece for part in parts for piece in (PAUSE, part)][1:])
    files = (path.with_suffix(".wav"), path.with_suffix(".png"))
    waves.write(samples, RATE, files[0])
    pictures.save(waves.picture(samples), files[1])
    return ", ".join(map(str, files))


def draw(texts: Sequence[str], path: Path) -> None:
    """Write up to DRAWN sounds as .wav and .png."""
    save([decode(text.strip()) for text in texts[:DRAWN]], path)


MODALITY = modality.Modality(
    about="prompts of a telephone exchange, spoken by one voice",
    unit="sounds",
    meaning="a voice or a tone is heard for an eighth of the time",
    fault=fault,
    longest=LONGEST,
    alphabet=SIGNS,
    readable=False,
    samples=40,
    markov_order=3,
    copied=copied,
    describe=describe,
    read_prompt=read_prompt,
    pieces=lambda text: [text[:LONGEST]],
    draw=draw,
    endings=(".wav", ".png"),
)


# ---- the source ----------------------------------------------------------------------------------


def group_of(name: str) -> str:
    """What a sound says, by its name: digits/h-7 -> 7, queue-minutes -> minute."""
    words = re.split("[-_]", BEFORE.sub("", PurePath(name).name.lower(), count=1))
    while len(words) > 1 and BEHIND.fullmatch(words[-1]):
        words.pop()
    joined = "".join(words)
    return re.sub(r"(?<=[a-z])\d+$", "", joined).removesuffix("s") or joined


def recordings(report: Report) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (name, split, samples as int16) of each sound that is not silent.

    Raises ValueError, with a command, if the package is not there.
    """
    report.note(f"licence: {PACKAGE.licence}")
    for member, content in wheels.read_matching(PACKAGE, MEMBERS):
        name = "/".join(PurePath(member).with_suffix("").parts[5:])
        report.found += 1
        try:
            samples = waves.read(content, RATE)
        except ValueError as error:
            report.skip(str(error), name)
            continue
        if is_silent(samples):
            report.skip("silent", name)
            continue
        report.used += 1
        yield name, split_of(group_of(name), HELD_OUT), samples


def version() -> str:
    """A name for the exact documents: it changes if they do."""
    return f"sounds-1 {PACKAGE.sha256}"


def documents(report: Report | None = None) -> Iterator[Document]:
    """Yield the text of each sound. Raises ValueError, with a command, without the package."""
    for name, split, samples in recordings(Report() if report is None else report):
        yield Document(encode(samples / waves.SCALE), split, name)


def look() -> None:
    """Print the size of the collection, a text, and how many held-out ones are valid."""
    modality.look(sys.modules[__name__])


if __name__ == "__main__":
    command.run("sounds", __doc__, look)
