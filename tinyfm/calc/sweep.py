"""Scaling laws of your own runs: python -m tinyfm.calc fit runs/sweep-* --held-out runs/sweep-large

Each run gives one point: the FLOPs of its training, and its validation loss at the last step. The
runs should grow in size and in steps together (scaling_laws.py says how to divide a budget), each
with a learning rate that suits it, and should all read the same data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyfm.calc import estimate
from tinyfm.calc.scaling_laws import FORMS, FittedLaw, fit_law
from tinyfm.common import files
from tinyfm.common.figures import new_figure
from tinyfm.training.log import read_metrics


@dataclass(frozen=True)
class Point:
    """A finished run, as a point of a scaling law."""

    name: str
    parameters: int
    units: int  # tokens, or rows, that it was trained on
    flops: int  # forward and backward, as training_cost counts them
    loss: float  # on the validation split, at the last step
    data: str  # fingerprint: losses compare only where it is the same


def read_point(folder: Path, run: Any) -> Point:
    """The point of a run in its directory. Raises ValueError if the run is not finished.

    run: as its config.json describes it.
    """
    evaluations = [row for row in read_metrics(folder / "metrics.jsonl") if "val_loss" in row]
    step = evaluations[-1]["step"] if evaluations else 0
    if not evaluations or step != run.train.steps:
        raise ValueError(
            f"{folder} is at step {step} of {run.train.steps}: finish it, or leave it out"
        )
    with torch.device("meta"):
        model = run.build_model()
    cost = estimate.training_cost(model, run.optim, run.train.batch_size)
    _, units_per_row = estimate.data_unit(model)
    return Point(
        name=folder.name,
        parameters=cost.parameters,
        units=run.train.steps * run.train.batch_size * units_per_row,
        flops=cost.flops_per_step * run.train.steps,
        loss=evaluations[-1]["val_loss"],
        data=files.read_json(folder / "config.json").get("data_fingerprint", ""),
    )


def fit_laws(points: list[Point], held_out: list[Point]) -> list[FittedLaw]:
    """A law of each form through the points.

    Raises ValueError if the points, or those held out, differ in their data.
    """
    datasets = {point.data for point in points + held_out}
    if len(datasets) > 1:
        raise ValueError(
            f"the runs read {len(datasets)} different data: their losses do not compare"
        )
    flops = np.array([point.flops for point in points], dtype=float)
    losses = np.array([point.loss for point in points])
    return [fit_law(form, flops, losses) for form in FORMS]


def to_text(points: list[Point], laws: list[FittedLaw], held_out: list[Point]) -> str:
    """A table of the runs and the laws' losses, then what each law predicts for larger runs."""
    shown = points + held_out
    width = max(len(point.name) for point in shown)
    forms = "".join(f"{law.form:>11}" for law in laws)
    lines = [f"{'run':{width}}{'N':>10}{'trained on':>11}{'FLOPs':>11}{'loss':>8}{forms}"]
    for point in shown:
        line = f"{point.name:{width}}{point.parameters:10.3g}{point.units:11.3g}"
        line += f"{point.flops:11.3g}{point.loss:8.4f}"
        line += "".join(f"{float(law.loss(point.flops)):11.4f}" for law in laws)
        if point in held_out:
            line += "  held out"
        lines.append(line)
    most = max(point.flops for point in points)
    budgets = [point.flops for point in held_out] or [4 * most, 10 * most]
    for law in laws:
        lines.append(f"{law.form}: {law.formula()}")
        for flops in budgets:
            loss = float(law.loss(flops))
            low, high = law.interval(flops)
            line = f"  at {flops:.3g} FLOPs, {flops / most:.3g} x the largest: "
            line += f"{loss:.4f} [{low:.4f} to {high:.4f}]"
            if held_out:
                line += f", {loss / held_out[0].loss - 1:+.2%} from the measured loss"
            lines.append(line)
    lines.append("in brackets: the middle 90% of a bootstrap over the residuals")
    return "\n".join(lines)


def plot(points: list[Point], laws: list[FittedLaw], held_out: list[Point], path: Path) -> None:
    """The runs, and the laws with their intervals, on a logarithmic axis of FLOPs."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot(xlabel="training FLOPs", ylabel="validation loss", xscale="log")
    budgets = [point.flops for point in points + held_out]
    along = np.geomspace(min(budgets) / 2, max(budgets) * 4)
    for law in laws:
        (line,) = axes.plot(along, law.loss(along), label=law.form)
        axes.fill_between(along, *law.interval(along), color=line.get_color(), alpha=0.15)
    for label, group, mark in (("runs", points, "ko"), ("held out", held_out, "k*")):
        if group:
            axes.plot([p.flops for p in group], [p.loss for p in group], mark, label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
