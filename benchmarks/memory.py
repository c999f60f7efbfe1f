"""Compare the predicted with the measured peak memory of a training step, for every preset.

    python benchmarks/memory.py [PRESET ...] [--gib 4]

Each preset runs in a new process, for three steps of the trainer on example batches. A step has two
micro-batches, or one whole batch where the loss compares its rows with each other. The number of
rows is the largest power of 2 that is predicted to need at most --gib.

Measured is what torch allocated: max_memory_allocated on a CUDA device, and on a CPU the sum of the
allocations that torch's profiler saw. On a CPU the growth of the process is printed too. It
includes memory that the allocator keeps, scratch space of kernels and the profiler's records, which
nothing here predicts.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tinyfm.calc import estimate
from tinyfm.common import device as machine
from tinyfm.recipes import registry
from tinyfm.recipes.base import Run
from tinyfm.training.trainer import TrainConfig, Trainer

STEPS = 3
FEWEST_ROWS = 2  # a contrastive loss needs two rows
GiB = 2**30


class ExampleData:
    """Data for the trainer: example batches of a model."""

    def __init__(self, model: nn.Module):
        self.model = model

    def batch(self, step: int, rows: slice) -> dict[str, torch.Tensor]:
        return self.model.example_batch(rows.stop - rows.start)


def train(run: Run) -> None:
    """Train for STEPS steps."""
    with tempfile.TemporaryDirectory() as folder:
        model = run.build_model()
        trainer = Trainer(model, ExampleData(model), run.train, run.optim, Path(folder))
        for step in range(STEPS):
            trainer.update(step)


def measure_peak(run: Run) -> int:
    """The most bytes that torch held at once while it trained."""
    if torch.cuda.is_available():
        train(run)
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        train(run)
    held = 0
    peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()  # negative where memory is freed
            peak = max(peak, held)
    return peak


def settings(train: TrainConfig, rows: int, micro_batches: int) -> TrainConfig:
    """Settings for STEPS steps of `micro_batches` micro-batches with `rows` rows each."""
    return dataclasses.replace(
        train,
        steps=STEPS,
        batch_size=micro_batches * rows,
        micro_batch_size=rows if micro_batches > 1 else 0,
        compile=False,
    )


def compare(name: str, gib: float) -> str:
    """One line on a preset."""
    run = registry.find_preset(name).run
    device = machine.choose_device("auto")
    dtype = machine.choose_dtype("auto", device)
    with torch.device("meta"):
        model = run.build_model()
    micro_batches = 1 if getattr(model, "whole_batch", False) else 2

    def predict(rows: int) -> float:
        """GiB at the peak."""
        peak, _ = estimate.predict_peak(model, run.optim, settings(run.train, rows, micro_batches))
        return peak / GiB

    # The largest micro-batch that fits.
    rows = FEWEST_ROWS
    if predict(rows) > gib:
        return f"{name}: {rows} rows need {predict(rows):.2f} GiB, more than --gib {gib:g}"
    while predict(2 * rows) <= gib and 2 * micro_batches * rows <= run.train.batch_size:
        rows *= 2

    before = machine.peak_memory_bytes(device)
    run = dataclasses.replace(run, train=settings(run.train, rows, micro_batches))
    measured = measure_peak(run) / GiB
    growth = (machine.peak_memory_bytes(device) - before) / GiB
    predicted = predict(rows)
    line = (
        f"{name}, micro-batches of {rows} in {dtype}: {predicted:.3f} GiB predicted, "
        f"{measured:.3f} allocated, ratio {predicted / measured:.3f}"
    )
    if device.type == "cpu":
        line += f"; process grew by {growth:.3f}"
    return line


def main(names: list[str], gib: float) -> None:
    for name in names or registry.all_presets():
        command = [sys.executable, __file__, name, "--gib", str(gib), "--here"]
        subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="PRESET", help="presets; default: all")
    parser.add_argument("--gib", type=float, default=4.0, help="most memory to use, in GiB")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:  # the new process of one preset
        print(compare(options.names[0], options.gib), flush=True)
    else:
        main(options.names, options.gib)
