"""Time series as texts: a year of hourly weather at two places, a letter for each hour.

A text model forecasts once numbers are letters. As Chronos does (Ansari et al. 2024, section 3.1),
a series is scaled by its own past and cut into bins of equal width, and a bin is a token:

    z = (x - m) / s,    m mean of the past, s mean of |x - m| over the past
    letter = bin of z,  94 bins from -5 to 5; values beyond are put in the last bin

Chronos divides by the mean of |x| and has 4,094 bins from -15 to 15. With few bins the mean must go
first, or temperatures around 280 K would all be one letter. The package pvlib holds the weather, as
typical years of the National Renewable Energy Laboratory (TMY3) for Greensboro in North Carolina
and Sand Point in Alaska:

    pip download --no-deps --only-binary :all: pvlib==0.16.1 -d data/cache/packages
    python -m data.series

A document is 8 days, 192 letters: 7 days of past, which give m and s, and a day to forecast. The
series are temperature, dew point, humidity, pressure, wind and sunlight. The split is by time, as
forecasts are made: the last 4 weeks of a year are test, those before them validation, and no
document reaches across. Documents with gaps or a constant past are left out.

A forecast is several texts, of which quantiles are taken. It is scored by (Hyndman & Koehler 2006)

    MASE = mean |median - y| / max(mean |x_t - x_{t-24}| over the past, half a bin)

so that 1 is the error of "as yesterday" on the past, and by the quantile loss of the quantiles 0.1
to 0.9, each 2 max(q (y - f), (q - 1) (y - f)), over the mean of |y|, with y in the units of z.

Licence: BSD (pvlib); the weather data are free to use.
"""

import csv
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data import command, modality, wheels
from data.report import Report, counted
from data.splits import TEST, TRAIN, VAL, Document

PACKAGE = wheels.Package(
    name="pvlib",
    version="0.16.1",
    archive="pvlib-0.16.1-py3-none-any.whl",
    sha256="4e61b5228a13f782413d7cf8cc48eb6e62e7bf55d155958fa9fd72420b63603d",
    licence="BSD-3-Clause; the weather data are free to use",
)
MEMBERS = ("pvlib/data/723170TYA.CSV", "pvlib/data/703165TY.csv")
COLUMNS = (
    "Dry-bulb (C)", "Dew-point (C)", "RHum (%)", "Pressure (mbar)", "Wspd (m/s)", "GHI (W/m^2)"
)  # fmt: skip
GAP = -9900  # what the files write where a value is missing
DAY = 24
PAST = 7 * DAY
LENGTH = PAST + DAY
HELD_OUT = 28 * DAY  # hours of validation, and of test

FIRST = ord("!")  # the letter of the lowest bin
BINS = ord("~") - FIRST + 1
LIMIT = 5.0
NEAREST = 10  # documents from whose pasts a forecast is made
QUANTILES = np.arange(1, 10) / 10


# ---- numbers <-> letters -------------------------------------------------------------------------


def scale_of(past: np.ndarray) -> tuple[float, float]:
    """(m, s) of the past. Raises ValueError for gaps and for a constant past."""
    gaps = int((~np.isfinite(past)).sum())
    if gaps:
        raise ValueError(f"the series has {counted(gaps, 'gaps')}: fill them first")
    mean = float(past.mean())
    scale = float(np.abs(past - mean).mean())
    if scale <= 1e-9 * max(1.0, abs(mean)):
        raise ValueError(f"the series is constant, {mean:g}: there is nothing to forecast")
    return mean, scale


def encode(values: np.ndarray, mean: float, scale: float) -> str:
    """A letter for each value."""
    z = (np.asarray(values) - mean) / scale
    bins = np.clip(np.floor((z + LIMIT) / (2 * LIMIT) * BINS), 0, BINS - 1).astype(int)
    return "".join(chr(FIRST + i) for i in bins)


def decode(text: str) -> np.ndarray:
    """The middle of each letter's bin, in units of z: float64 (n,).

    A sign that stands for no bin, which a model may write, is read as the nearest letter.
    """
    bins = np.array([ord(letter) - FIRST for letter in text], dtype=float).clip(0, BINS - 1)
    return (bins + 0.5) / BINS * 2 * LIMIT - LIMIT


def fault(text: str) -> str:
    """What keeps a text from being a series of a document's length; "" if it is one."""
    wrong = [letter for letter in text if not 0 <= ord(letter) - FIRST < BINS]
    if wrong:
        return f"{wrong[0]!r} is no letter of a bin"
    if len(text) != LENGTH:
        return f"{counted(len(text), 'hours')}, not {LENGTH}"
    return ""


def read_past(prompt: str) -> np.ndarray:
    """The last PAST of the numbers of a prompt, as "12.5 13 12.8 ...": float64 (PAST,).

    Raises ValueError for what is no number, and for too few numbers.
    """
    words = re.split(r"[\s,;]+", prompt.strip())
    try:
        values = np.array([float(word) for word in words])
    except ValueError as error:
        raise ValueError(
            f"--prompt is a series of numbers, such as 12.5 13 12.8: {error}"
        ) from None
    if len(values) < PAST:
        raise ValueError(f"--prompt has {counted(len(values), 'numbers')}, and a past has {PAST}")
    return values[-PAST:]


def read_prompt(prompt: str) -> str:
    """The letters of a past. Raises ValueError as read_past and scale_of do."""
    past = read_past(prompt)
    return encode(past, *scale_of(past))


# ---- forecasts -----------------------------------------------------------------------------------


def forecast(texts: Sequence[str]) -> np.ndarray:
    """The quantiles of what texts say after their past: float64 (QUANTILES, DAY).

    A text that is too short stays where it ends.
    """
    ends = [decode(text.ljust(LENGTH, text[-1])[PAST:LENGTH]) for text in texts]
    return np.quantile(np.stack(ends), QUANTILES, axis=0)


def errors(document: str, guesses: Sequence[str]) -> dict[str, float]:
    """MASE and the weighted quantile loss of guesses, which start with the document's past."""
    past, truth = np.split(decode(document), [PAST])
    found = forecast(guesses)
    naive = np.abs(past[DAY:] - past[:-DAY]).mean()
    difference = truth - found  # (QUANTILES, DAY)
    levels = QUANTILES[:, None]
    loss = 2 * np.maximum(levels * difference, (levels - 1) * difference)
    median = found[len(QUANTILES) // 2]
    return {
        "MASE": float(np.abs(truth - median).mean() / max(naive, LIMIT / BINS)),
        "weighted quantile loss": float(loss.mean() / np.abs(truth).mean()),
    }


def as_yesterday(past: str, training: Sequence[str]) -> list[str]:
    """A forecast without a model: the last day again."""
    return [past + past[-DAY:]]


def as_nearest(past: str, training: Sequence[str]) -> list[str]:
    """What came after the NEAREST training pasts, by their mean distance in bins."""
    rows = np.frombuffer("".join(training).encode("ascii"), np.uint8).reshape(-1, LENGTH)
    own = np.frombuffer(past.encode("ascii"), np.uint8)
    distances = np.abs(rows[:, :PAST].astype(int) - own).mean(1)
    return [past + training[i][PAST:] for i in distances.argsort(kind="stable")[:NEAREST]]


def answer(prompt: str, texts: Sequence[str]) -> str:
    """Three quantiles of the forecast for each hour, in the units of the prompt."""
    mean, scale = scale_of(read_past(prompt))
    low, middle, high = forecast(texts)[[0, len(QUANTILES) // 2, -1]] * scale + mean
    lines = ["hour     10%     50%     90%"]
    for hour, row in enumerate(zip(low, middle, high), 1):
        lines.append(f"{hour:4} " + " ".join(f"{value:7.4g}" for value in row))
    return "\n".join(lines)


def draw(texts: Sequence[str], path: Path) -> None:
    """Draw the texts, one below the other; texts with one past as a forecast with its quantiles.

    The median is black, and grey reaches from the quantile 0.1 to 0.9.
    """
    from data import pictures  # loads Pillow, which texts do not need

    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(text[:PAST], []).append(text)
    panels = []
    for past, own in groups.items():
        found = forecast(own)
        low, middle, high = found[[0, len(QUANTILES) // 2, -1]]
        known = decode(past)
        lines = [np.concatenate((known, part)) for part in (high, middle, low)]
        rows = [np.floor((LIMIT - line) / (2 * LIMIT) * BINS).astype(int) for line in lines]
        panel = np.full((BINS + 4, LENGTH, 1), 255, dtype=np.uint8)
        panel[:, PAST] = 225  # where the forecast starts
        for column, (top, centre, bottom) in enumerate(zip(*rows)):
            panel[top : bottom + 1, column] = 170
            panel[centre, column] = 0
        panels.append(panel)
    pictures.save(np.concatenate(panels).repeat(2, 0).repeat(4, 1), path.with_suffix(".png"))


MODALITY = modality.Modality(
    about="hourly weather, a letter for each hour",
    unit="series",
    meaning=f"a letter of a bin for each of {LENGTH} hours",
    fault=fault,
    longest=LENGTH,
    read_prompt=read_prompt,
    answer=answer,
    given=PAST,
    errors=errors,
    rivals={"as yesterday": as_yesterday, "nearest pasts": as_nearest},
    draw=draw,
    endings=(".png",),
)


# ---- the source ----------------------------------------------------------------------------------


def version() -> str:
    """A name for the exact documents: it changes if they do."""
    return f"series-1 {PACKAGE.sha256}"


def columns(content: str) -> dict[str, np.ndarray]:
    """{name: values of all hours, nan where they are missing} of a TMY3 file."""
    rows = list(csv.reader(content.splitlines()[1:]))  # the first line describes the place
    head = rows[0]
    found = {}
    for name in COLUMNS:
        place = head.index(name)
        values = np.array([float(row[place]) for row in rows[1:]])
        found[name] = np.where(values == GAP, math.nan, values)
    return found


def windows(hours: int) -> Iterator[tuple[int, str]]:
    """(first hour, split) of each document of a series, a day apart; none lies in two splits."""
    borders = {TRAIN: (0, hours - 2 * HELD_OUT), VAL: (hours - 2 * HELD_OUT, hours - HELD_OUT)}
    borders[TEST] = (hours - HELD_OUT, hours)
    for split, (first, end) in borders.items():
        for start in range(first, end - LENGTH + 1, DAY):
            yield start, split


def documents(report: Report | None = None) -> Iterator[Document]:
    """Yield the windows of all series.

    Raises ValueError, with a command, if the package is not there.
    """
    if report is None:
        report = Report()
    report.note(f"licence: {PACKAGE.licence}")
    for member in MEMBERS:
        place = Path(member).stem
        content = wheels.read(PACKAGE, member).decode("utf-8", "replace")
        for name, values in columns(content).items():
            for start, split in windows(len(values)):
                report.found += 1
                own = values[start : start + LENGTH]
                title = f"{name} of {place} from hour {start}"
                try:
                    mean, scale = scale_of(own[:PAST])
                    scale_of(own)
                except ValueError as error:
                    kind = "gaps" if "gap" in str(error) else "a constant past"
                    report.skip(kind, title)
                    continue
                report.used += 1
                yield Document(encode(own, mean, scale), split, title)


def look() -> None:
    """Print the size of the data set, a series, and how many held-out ones are valid."""
    modality.look(sys.modules[__name__])


if __name__ == "__main__":
    command.run("series", __doc__, look)
