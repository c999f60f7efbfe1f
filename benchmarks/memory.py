"""Predicted and measured peak memory of a training step, for every preset.

    python benchmarks/memory.py [PRESET ...] [--gib 4]

Each preset runs in a process of its own: three steps of the trainer, on example batches, two
micro-batches a step, or one whole batch where a loss compares its rows, the largest that are
predicted to stay within --gib. Measured is what torch allocated: on a CUDA device
max_memory_allocated, on a CPU the sum of the allocations that its profiler saw. Of a CPU the growth
of the process is printed too: what the allocator keeps, scratch space of kernels and the profiler's
own records are in it, and nothing here predicts that.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


class Examples:
    """Data for the trainer: example batches of a model."""

    def __init__(self, model):
        self.model = model

    def batch(self, step: int, rows: slice) -> dict:
        return self.model.example_batch(rows.stop - rows.start)


def train(run, folder: str):
    """Three steps, of two micro-batches each; the trainer."""
    from tinyfm.training.trainer import Trainer

    model = run.build_model()
    trainer = Trainer(model, Examples(model), run.train, run.optim, Path(folder))
    for step in range(3):
        trainer.update(step)
    return trainer


def allocated(run) -> int:
    """Most bytes that torch held at once while it trained."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda, now, most = torch.cuda.is_available(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        if cuda:
            train(run, folder)
            return torch.cuda.max_memory_allocated()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            train(run, folder)
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def measure(name: str, gib: float) -> str:
    """One line for a preset."""
    import torch

    from tinyfm.calc import trace as calculator
    from tinyfm.common import device as machine
    from tinyfm.recipes import registry

    run = registry.get_preset(name).run
    device = machine.choose_device("auto")
    dtype = machine.choose_dtype("auto", device)
    with torch.device("meta"):
        model = run.build_model()

    parts = 1 if getattr(model, "whole_batch", False) else 2  # micro-batches of a step

    def predict(rows: int) -> float:
        where = {"accumulate": parts > 1, "device": device, "dtype": dtype}
        return max(calculator.step_bytes(model, run.optim, rows, **where)) / 2**30

    rows = 2  # the least that a contrast needs
    if predict(rows) > gib:
        return f"{name}: {rows} rows need {predict(rows):.2f} GiB, more than --gib {gib:g}"
    while predict(2 * rows) <= gib and 2 * parts * rows <= run.train.batch_size:
        rows *= 2
    micro = rows if parts > 1 else 0
    changes = {"steps": 3, "batch_size": parts * rows, "micro_batch_size": micro, "compile": False}
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))
    before = machine.peak_memory_bytes(device)
    measured, predicted = allocated(run) / 2**30, predict(rows)
    line = f"{name}, micro-batches of {rows} in {dtype}: {predicted:.3f} GiB predicted, "
    line += f"{measured:.3f} allocated, ratio {predicted / measured:.3f}"
    if device.type == "cpu":
        line += f"; process grew by {(machine.peak_memory_bytes(device) - before) / 2**30:.3f}"
    return line


def main(names: list[str], gib: float) -> None:
    from tinyfm.recipes import registry

    for name in names or registry.all_presets():
        command = [sys.executable, __file__, name, "--gib", str(gib), "--here"]
        subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="PRESET")
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--here", action="store_true", help="in this process")
    options = parser.parse_args()
    if options.here:
        print(measure(options.names[0], options.gib), flush=True)
    else:
        main(options.names, options.gib)
