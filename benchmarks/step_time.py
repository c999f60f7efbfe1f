"""Compare the predicted with the measured seconds of a training step.

    python benchmarks/step_time.py [--repeats 5]

The calculator counts the FLOPs of a step; divided by the FLOP/s of the machine they give the
seconds. The FLOP/s are measured on one model of each family. They predict the time of other models
of the family: with more layers, more rows, a longer context, more blocks. All models of a family
take turns in this process; the medians are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from timing import by_turns, training_step

from tinyfm.calc import estimate
from tinyfm.common import device
from tinyfm.common.seeds import row_generators
from tinyfm.recipes import registry
from tinyfm.training.optim import build_optimizers

CASES = {  # preset -> (rows, changes of each model that is predicted)
    "gpt": (8, [{"n_layer": 4}, {"n_layer": 6}, {"context_length": 512}]),
    "clip": (256, [{"image_layer": 6}, {"text_layer": 6}, {"image_layer": 6, "text_layer": 4}]),
    "autoencoder": (32, [{"n_block": 2}, {"n_block": 3}]),
    "ddpm": (32, [{"n_block": 2}, {"n_block": 3}]),
}


class Case:
    """A model of a preset, with changes; its training step, and the FLOPs of that step."""

    def __init__(self, preset: str, rows: int, changes: dict):
        run = registry.find_preset(preset).run
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))
        torch.manual_seed(0)
        self.rows = rows
        self.model = run.build_model()
        self.flops = estimate.training_cost(self.model, run.optim, rows).flops_per_step
        self.batch = self.model.example_batch(rows)
        self.dtype = device.choose_dtype("auto", torch.device("cpu"))
        self.step = training_step(self.loss, build_optimizers(self.model, run.optim), self.dtype)

    def loss(self) -> torch.Tensor:
        loss, _ = self.model.loss(self.batch, row_generators(0, 0, range(self.rows)))
        return loss


def compare(preset: str, rows: int, variants: list[dict], repeats: int) -> None:
    """Measure the preset, and predict and measure its variants and twice as many rows."""
    known = Case(preset, rows, {})
    predicted = {}
    for changes in variants:
        about = ", ".join(f"{name} {value}" for name, value in changes.items())
        predicted[about] = Case(preset, rows, changes)
    predicted[f"{2 * rows} rows"] = Case(preset, 2 * rows, {})

    steps = {"": known.step} | {about: case.step for about, case in predicted.items()}
    times = by_turns(steps, repeats)
    rate = known.flops / times[""]
    print(f"{preset}: {rate / 1e9:.0f} GFLOP/s as it is with {rows} rows in {known.dtype}")
    for about, case in predicted.items():
        expected = case.flops / rate
        measured = times[about]
        print(
            f"  {about:28} {1e3 * expected:6.0f} ms predicted, {1e3 * measured:6.0f} measured, "
            f"ratio {expected / measured:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="number of timed rounds")
    options = parser.parse_args()
    device.keep_freed_memory()
    for preset, (rows, variants) in CASES.items():
        compare(preset, rows, variants, options.repeats)


if __name__ == "__main__":
    main()
