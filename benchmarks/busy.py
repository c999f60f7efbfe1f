"""Training on a machine that has other work to do:  python benchmarks/busy.py [--record]

The default run's speed alone, and beside one process that never sleeps, each with two ways in
which OpenMP's threads wait for each other: spinning, as libgomp does by default, and sleeping, as
tinyfm's commands set it. The ways take turns. Prints one table; --record writes it into README.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from tinyfm.training.log import METRICS, read_metrics

ROOT = timing.PAGE.parent.parent
WAYS = {
    "spinning": {"GOMP_SPINCOUNT": "300000"},  # libgomp's default
    "spinning briefly": {"GOMP_SPINCOUNT": "10000"},
    "sleeping": {},  # tinyfm/__init__.py
    "one thread": {"OMP_NUM_THREADS": "1"},
}


@contextmanager
def busy_process():
    """A process that takes a core for itself."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def tokens_per_second(settings: dict[str, str], steps: int) -> float:
    """The median speed of a short training, without its first steps."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "train.py", "gpt", "--out", f"{folder}/run"]
        words += ["--train.steps", str(steps), "--train.eval-every", "0", "--train.log-every", "2"]
        environment = {**os.environ, **settings}
        subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True)
        rows = read_metrics(Path(folder, "run", METRICS))
    speeds = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    return statistics.median(speeds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=24, help="of each training (24)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (3)")
    parser.add_argument("--record", action="store_true", help="write the table into README.md")
    options = parser.parse_args()
    speeds: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.repeats):
        for name, settings in WAYS.items():
            alone = tokens_per_second(settings, options.steps)
            with busy_process():
                beside = tokens_per_second(settings, options.steps)
            speeds.setdefault((name, "alone"), []).append(alone)
            speeds.setdefault((name, "beside"), []).append(beside)
            print(f"{name}: {alone:,.0f} alone, {beside:,.0f} beside", flush=True)
    lines = [
        f"{timing.describe_machine()}; tokens a second, medians of {options.repeats}\n",
        "| threads that wait | alone | beside a busy process | ratio |",
        "|---|---|---|---|",
    ]
    for name in WAYS:
        alone = statistics.median(speeds[name, "alone"])
        beside = statistics.median(speeds[name, "beside"])
        lines.append(f"| {name} | {alone:,.0f} | {beside:,.0f} | {beside / alone:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.record:
        timing.record("busy", text)


if __name__ == "__main__":
    main()
