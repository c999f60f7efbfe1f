"""The held-out scores of trained presets, recorded:  python benchmarks/results.py gpt RUN [RUN ...]

Measures each run (`python -m tinyfm.evaluate RUN --json`) and prints one table: a row a measure, a
column a run, and the interval of the run whose value is the median. Before them stand the first run
without training and the baselines of its data. The runs are of one preset and differ in their seed.
--record writes the table into README.md, between `<!-- results NAME -->` and `<!-- end -->`, with
the date, the machine, the commit that measured, and the minutes that training took.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from tinyfm.training.log import METRICS, read_metrics

ROOT = timing.PAGE.parent.parent


def measure(run: str, options: list[str]) -> dict:
    """What evaluate prints as JSON. Raises CalledProcessError if it fails."""
    words = [sys.executable, "-m", "tinyfm.evaluate", run, "--json", *options]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True)
    return json.loads(done.stdout)


def minutes(run: str) -> float:
    """From the first evaluation to the last one."""
    rows = read_metrics(Path(run) / METRICS)
    return (rows[-1]["time"] - rows[0]["time"]) / 60


def table(runs: list[str], found: list[dict]) -> str:
    """Rows of Markdown: each measure before training, of baselines, of each run; an interval."""
    columns = dict.fromkeys(column for row in found[0]["scores"].values() for column in row)
    others = ["untrained", *(c for c in columns if c not in ("untrained", "reached"))]
    names = others + [Path(run).name for run in runs]
    lines = [
        f"| measure | {' | '.join(names)} | 95% interval of the median run |",
        "|---|" + "---|" * len(names) + "---|",
    ]
    for measure in found[0]["scores"]:
        values = [each["scores"][measure]["reached"] for each in found]
        middle = values.index(statistics.median_low(values))
        beside = [found[0]["scores"][measure].get(column) for column in others]
        own = found[middle].get("intervals", {}).get(measure, {}).get("reached")
        interval = ""
        if own and own["low"] is not None:  # too few units give no interval
            interval = f"{own['low']:.4g} to {own['high']:.4g} ({own['of']})"
        cells = ["" if value is None else f"{value:.4g}" for value in (*beside, *values)]
        lines.append(f"| {measure} | {' | '.join(cells)} | {interval} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the preset")
    parser.add_argument("runs", nargs="+", help="run folders, one a seed")
    parser.add_argument("--record", action="store_true", help="write the table into README.md")
    given, options = parser.parse_known_args()
    found = [measure(run, options) for run in given.runs]
    times = ", ".join(f"{minutes(run):.0f}" for run in given.runs)
    head = f"{timing.describe_machine()}; training took {times} minutes"
    text = f"{head}\n\n{table(given.runs, found)}\n"
    print(text)
    if given.record:
        timing.record(f"results {given.name}", text)


if __name__ == "__main__":
    main()
