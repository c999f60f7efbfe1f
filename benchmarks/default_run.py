"""Measure `python train.py` as a whole process, and the share of a step that waits for data.

    python benchmarks/default_run.py [--options "--train.steps 50"]

Prints the seconds of `train.py --help`, the seconds and the peak memory of the run, and the share
of a step that reading its batch takes. The run has an empty cache, so its time includes preparing
the text and training the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from timing import describe_machine, seconds_of

from tinyfm.recipes import run_dir

HELPS = 5  # timed runs of train.py --help
BATCHES = 200  # timed batches


def run_train(*options: str) -> None:
    """Run train.py in a new process, without its output."""
    command = [sys.executable, "train.py", *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def main(options: list[str]) -> None:
    print(describe_machine())
    helps = [seconds_of(lambda: run_train("--help")) for _ in range(HELPS)]
    print(f"train.py --help: {statistics.median(helps):.2f} s, median of {HELPS}")

    with tempfile.TemporaryDirectory() as folder:
        # The run.
        out = Path(folder, "run")
        paths = ["--out", str(out), "--data.cache", str(Path(folder, "cache"))]
        seconds = seconds_of(lambda: run_train(*paths, *options))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of the largest, GiB
        metrics = (out / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in metrics.splitlines()]
        bpb = [row["val_bpb"] for row in rows if "val_bpb" in row]
        print(
            f"train.py: {seconds:.0f} s, {peak:.2f} GiB at most, "
            f"bits per byte {bpb[0]:.3f} to {bpb[-1]:.3f}"
        )
        # Its batches again.
        run = run_dir.read_run(out / "config.json")
        data = run.open_data()
        waits = [seconds_of(lambda step=step: data.batch(step)) for step in range(BATCHES)]

    speed = statistics.median(row["tokens_per_s"] for row in rows if "tokens_per_s" in row)
    step = run.train.batch_size * run.model.context_length / speed
    wait = statistics.median(waits)
    print(f"{speed:.0f} tokens/s; of a step's {step * 1e3:.0f} ms, {wait / step:.2%} is data wait")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--options", default="", help="more options for train.py, in one string")
    main(parser.parse_args().options.split())
