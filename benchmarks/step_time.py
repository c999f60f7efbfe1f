"""Predicted and measured seconds of a training step.

    python benchmarks/step_time.py [--repeats 5]

A step takes its FLOPs, which the calculator counts, by the FLOP/s that the machine sustains. Those
are measured on one model of each family, and foretell the others: more layers, more rows, a longer
context, more channels. In one process, the models taking turns; medians.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tinyfm.calc import estimate
from tinyfm.common import device
from tinyfm.common.seeds import row_generators
from tinyfm.recipes import registry
from tinyfm.training.optim import build_optimizers

CASES = {  # preset -> rows, and what is changed in the others; the first one is measured
    "gpt": (8, [{}, {"n_layer": 4}, {"n_layer": 6}, {"context_length": 512}]),
    "clip": (256, [{}, {"image_layer": 6}, {"text_layer": 6}, {"image_layer": 6, "text_layer": 4}]),
    "autoencoder": (32, [{}, {"n_block": 2}, {"n_block": 3}]),
    "ddpm": (32, [{}, {"n_block": 2}, {"n_block": 3}]),
}


class Step:
    """A model of a preset, with changes, and what a step of it takes."""

    def __init__(self, name: str, rows: int, changes: dict):
        run = registry.get_preset(name).run
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))
        torch.manual_seed(0)
        self.model, self.rows = run.build_model(), rows
        self.flops = estimate.training_cost(self.model, run.optim, rows).flops_per_step
        self.optimizers = build_optimizers(self.model, run.optim)
        self.batch = self.model.example_batch(rows)
        self.dtype = device.choose_dtype("auto", torch.device("cpu"))
        self.about = ", ".join(f"{k} {v}" for k, v in changes.items()) or "as it is"
        self.seconds = []

    def take(self) -> None:
        begin = time.perf_counter()
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            loss, _ = self.model.loss(self.batch, row_generators(0, 0, range(self.rows)))
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - begin)


def main(repeats: int) -> None:
    device.keep_freed_memory()
    for name, (rows, variants) in CASES.items():
        steps = [Step(name, rows, changes) for changes in variants]
        steps.append(Step(name, 2 * rows, {}))
        for _ in range(1 + repeats):  # the first round warms up
            for step in steps:
                step.take()
        measured = [statistics.median(step.seconds[1:]) for step in steps]
        rate = steps[0].flops / measured[0]
        print(f"{name}: {rate / 1e9:.0f} GFLOP/s as it is with {rows} rows in {steps[0].dtype}")
        for step, seconds in zip(steps[1:], measured[1:]):
            what = step.about if step.rows == rows else f"{step.rows} rows"
            predicted = step.flops / rate
            both = f"{1e3 * predicted:6.0f} ms predicted, {1e3 * seconds:6.0f} measured"
            print(f"  {what:28} {both}, ratio {predicted / seconds:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    main(parser.parse_args().repeats)
