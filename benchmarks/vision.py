"""Measure a GPT that sees: the names that it writes, beside those that CLIP chooses; its answers.

    python benchmarks/vision.py [--two] [--seeds 3] [--runs runs/vision-benchmark]

The presets vision-gpt and clip are trained with each seed, on the same pictures, and evaluated on
the same test pictures. The GPT writes a name, which has to be exactly right. CLIP chooses: among
the names of the split, which is easier, or among all names of the data, which is like writing. The
two are trained for different times, which stand in the first line.

Beside the answers to questions stands what is right if the commonest answer of training is always
given. The tables show each seed, and the interval of the median one. Runs are kept in --runs, as
vision-gpt-0 and clip-0 for seed 0, and what is there already is not run again.

--two trains the preset vision-gpt-two instead, and has the second table alone: its questions in
words, by example, and about two pictures.

--record also writes the tables into README.md.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.encoder import train
from benchmarks.results import measure, minutes
from benchmarks.timing import describe_machine, record
from data.glyphs import HELD_OUT_CHARACTERS, HELD_OUT_FONTS

TEST = (HELD_OUT_FONTS, HELD_OUT_CHARACTERS)
PRESETS = ("vision-gpt", "clip")


def find_measure(found: list[dict], pattern: str) -> str:
    """The measure whose whole name a pattern matches. Raises ValueError if there is none."""
    for name in found[0]["scores"]:
        if re.fullmatch(pattern, name):
            return name
    raise ValueError(f"no measure {pattern!r} among {', '.join(found[0]['scores'])}")


def cell(found: list[dict], pattern: str) -> str:
    """A measure in percent: all seeds, and the interval of the median, "72.1, 70.9 (69 to 75)"."""
    name = find_measure(found, pattern)
    values = [each["scores"][name]["reached"] for each in found]
    middle = found[values.index(statistics.median_low(values))]
    interval = middle["intervals"][name]["reached"]
    shown = ", ".join(f"{100 * value:.1f}" for value in values)
    return f"{shown} ({100 * interval['low']:.1f} to {100 * interval['high']:.1f})"


def names_table(seeing: list[dict], clip: list[dict]) -> str:
    """The table of names."""
    lines = [
        "| pictures | written by the GPT | CLIP, among all names | CLIP, among the split's names |",
        "|---|---|---|---|",
    ]
    for split in TEST:
        written = cell(seeing, f"{split}: caption")
        among_all = cell(clip, rf"zero-shot, {split}, all [\d,]+ names")
        among_own = cell(clip, rf"zero-shot, {split}, [\d,]+ names")
        lines.append(f"| {split} | {written} | {among_all} | {among_own} |")
    return "\n".join(lines)


def questions_table(seeing: list[dict]) -> str:
    """The table of questions, of each split beside the commonest answer."""
    heads = [f"{split} | commonest answer" for split in TEST]
    lines = [f"| question | {' | '.join(heads)} |", "|---|---|---|---|---|"]
    start = f"{TEST[0]}: "
    names = [name.removeprefix(start) for name in seeing[0]["scores"] if name.startswith(start)]
    for name in names[1:]:
        cells = []
        for split in TEST:
            common = seeing[0]["scores"][f"{split}: {name}"]["commonest answer"]
            cells += [cell(seeing, re.escape(f"{split}: {name}")), f"{100 * common:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--two", action="store_true", help="the preset vision-gpt-two alone")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--runs", default="runs/vision-benchmark", help="folder of the runs")
    parser.add_argument("--record", action="store_true", help="write the tables into README.md")
    options, more = parser.parse_known_args()
    presets = ("vision-gpt-two",) if options.two else PRESETS
    runs = {preset: [] for preset in presets}
    for seed in range(options.seeds):
        for preset in presets:
            place = Path(options.runs, f"{preset}-{seed}")
            runs[preset].append(train(place, preset, "--train.seed", str(seed), *more))
    found = {preset: [measure(str(run), []) for run in own] for preset, own in runs.items()}
    times = [f"{preset} {minutes(str(own[0])):.0f}" for preset, own in runs.items()]
    head = f"{describe_machine()}; minutes of training: {', '.join(times)}"
    tables = [] if options.two else [names_table(*found.values())]
    tables.append(questions_table(found[presets[0]]))
    text = "\n\n".join([head, *tables]) + "\n"
    print(text)
    if options.record:
        record("vision two" if options.two else "vision", text)


if __name__ == "__main__":
    main()
