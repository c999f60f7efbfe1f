"""A lesson's experiment: what a student measures, and what was measured here.

A lesson's experiment.py holds

    UNITS      name of a measure -> its unit
    VARIANTS   what a student's number selects; the first is the one that was recorded
    measure    (seed, variant) -> {name: number, or list of numbers for a curve}
    draw       (figure, results): draws one or several results of measure

`python -m course record N` measures with several seeds and writes expected.json; the tables, the
figure and the numbers in lesson.md come from there (book.py).
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from course import check, cut
from course.lessons import ROOT, Lesson, load_file, read, write
from tinyfm.common.figures import new_figure
from tinyfm.evaluate.metrics import student_t

Measures = dict[str, Any]  # name -> number, or list of numbers
ROUNDING = 0.01  # relative: what another processor's arithmetic may change
# Okabe and Ito (2008): colours that the colour-blind can tell from each other.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 2,
    "svg.hashsalt": "tinyfm",  # the same drawing gives the same file
}


def load(lesson: Lesson) -> ModuleType:
    return load_file(lesson.folder / "experiment.py")


def variant_of(experiment: ModuleType, student: int | None) -> str:
    """The variant of a student's number; without a number, the recorded one."""
    return experiment.VARIANTS[(student or 0) % len(experiment.VARIANTS)]


def run_in(tree: Path, lesson: Lesson, seed: int, variant: str) -> Measures:
    """Measure with the code in tree, in a process that imports it.

    Raises CalledProcessError if the experiment fails; its messages have gone to the terminal.
    """
    answer = tree / "answer.json"
    words = [sys.executable, "-m", "course.experiment", lesson.folder.name, str(seed), variant]
    environment = dict(os.environ, PYTHONPATH=str(tree))
    subprocess.run([*words, str(answer)], cwd=tree, env=environment, check=True)
    return json.loads(read(answer))


def with_students_bodies(tree: Path, lesson: Lesson, folder: Path) -> list[str]:
    """Put a student's finished bodies into a tree. The labels of those that are still open."""
    still_open = []
    for exercise in lesson.exercises:
        path = folder / exercise.module
        if not path.is_file() or cut.is_open(read(path), exercise.name):
            still_open.append(lesson.label(exercise))
            continue
        body = cut.take_body(read(path), exercise.name)
        target = tree / exercise.module
        write(target, cut.put_body(read(target), exercise.name, body))
    return still_open


# ---- what was recorded --------------------------------------------------------------------------


def expected_path(lesson: Lesson) -> Path:
    return lesson.folder / "expected.json"


def read_expected(lesson: Lesson) -> dict | None:
    """{"recorded": about the machine, "results": [Measures of each seed]}, or None."""
    path = expected_path(lesson)
    return json.loads(read(path)) if path.is_file() else None


def values_of(results: Sequence[Measures], name: str) -> list[float]:
    return [result[name] for result in results]


def scalar_names(result: Measures) -> list[str]:
    return [name for name, value in result.items() if not isinstance(value, list)]


def prediction_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the value of one more seed lies in 95% of all cases, from the values of some seeds.

    mean +- t sd sqrt(1 + 1/n), with Student's t, and at least what rounding may change.
    """
    mean = statistics.fmean(values)
    n = len(values)
    half = ROUNDING * abs(mean)
    if n > 1:
        spread = statistics.stdev(values) * math.sqrt(1 + 1 / n)
        half = max(half, student_t(0.95, n - 1) * spread)
    return mean - half, mean + half


def short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def comparison(experiment: ModuleType, measured: Measures, expected: dict) -> list[str]:
    """A line a measure: measured, expected with the interval of one more seed, inside or not."""
    lines = []
    for name in scalar_names(measured):
        line = f"  {name:32} {short(measured[name]):>10} {experiment.UNITS[name]:20}"
        values = values_of(expected["results"], name)
        low, high = prediction_interval(values)
        verdict = "as expected" if low <= measured[name] <= high else "NOT as expected"
        middle = short(statistics.fmean(values))
        lines.append(f"{line} expected {middle} ({short(low)} to {short(high)}): {verdict}")
    return lines


def machine() -> dict[str, str]:
    import torch

    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    python = platform.python_version()  # many lessons read its documentation as their text
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {python}",
        "torch": torch.__version__,
    }


def one_line_lists(text: str) -> str:
    """JSON with each list of numbers on one line: a curve has hundreds."""
    return re.sub(r"\[[\s\d.,eE+-]*\]", lambda match: " ".join(match[0].split()), text)


def record(lesson: Lesson, seeds: Sequence[int]) -> None:
    """Measure the recorded variant with each seed, and write expected.json and the figure."""
    experiment = load(lesson)
    results = []
    start = time.monotonic()
    for seed in seeds:
        with check.copied_tree() as tree:
            results.append(run_in(tree, lesson, seed, experiment.VARIANTS[0]))
    seconds = round((time.monotonic() - start) / len(seeds))
    about = {**machine(), "seconds a seed": seconds, "seeds": list(seeds)}
    text = json.dumps({"recorded": about, "results": results}, indent=1)
    write(expected_path(lesson), one_line_lists(text) + "\n")
    draw(experiment, results, lesson.folder / "figure")


# ---- figures ------------------------------------------------------------------------------------


def draw(experiment: ModuleType, results: Sequence[Measures], path: Path) -> None:
    """Write path.svg and path.png: the lesson's figure in the look of all figures."""
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context({**STYLE, "axes.prop_cycle": cycler(color=COLOURS)}):
        figure = new_figure(8, 4.5)
        experiment.draw(figure, results)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=160)


def run(
    lesson: Lesson, bodies: Path | None, work: Path, student: int | None, seed: int
) -> list[str]:
    """The experiment with a student's code in place of the repository's.

    bodies: the folder of the student's modules; None = the code of this tree, as it is. Writes
    answer.json and the figure into work; returns what to print.
    """
    experiment = load(lesson)
    variant = variant_of(experiment, student)
    with check.copied_tree() as tree:
        still_open = with_students_bodies(tree, lesson, bodies) if bodies else []
        measured = run_in(tree, lesson, seed, variant)
    work.mkdir(parents=True, exist_ok=True)
    answer = {"lesson": lesson.number, "variant": variant, "seed": seed, "measured": measured}
    write(work / "answer.json", json.dumps(answer, indent=1) + "\n")
    draw(experiment, [measured], work / "figure")
    lines = []
    if still_open:
        verb = "is" if len(still_open) == 1 else "are"
        lines.append(f"{', '.join(still_open)} {verb} open: the repository's code stood in")
    expected = read_expected(lesson)
    if expected and variant == experiment.VARIANTS[0]:
        lines += comparison(experiment, measured, expected)
    else:
        for name in scalar_names(measured):
            lines.append(f"  {name:32} {short(measured[name]):>10} {experiment.UNITS[name]}")
        lines.append(f"no value was recorded for the variant {variant}; grading runs it again")
    return [*lines, f"wrote {work / 'answer.json'}, {work / 'figure.svg'} and .png"]


def main() -> None:
    """python -m course.experiment FOLDER SEED VARIANT ANSWER, in the tree to measure"""
    folder, seed, variant, answer = sys.argv[1:]
    experiment = load_file(Path("course") / folder / "experiment.py")
    measured = experiment.measure(int(seed), variant)
    write(Path(answer), json.dumps(measured))


if __name__ == "__main__":
    main()
