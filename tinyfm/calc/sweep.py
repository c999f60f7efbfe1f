"""A sweep of one's own runs, and the scaling laws that go through it.

    python -m tinyfm.calc fit runs/sweep-* [--held-out runs/large] [--plot scaling.png]

Each run gives one point: the FLOPs of its training, and its validation loss at the last step. Let
the runs differ in size and steps together, as scaling_laws.py says a budget should be split; let
the learning rate suit each; and let all read the same data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyfm.calc import estimate, report
from tinyfm.calc.scaling_laws import FORMS, Fitted, fit_law
from tinyfm.recipes import run_dir as calc


@dataclass(frozen=True)
class Run:
    name: str
    parameters: int
    units: int  # tokens, or rows, it was trained on
    flops: int  # forward and backward, as calc counts them
    loss: float  # on the validation split, at the last step
    data: str  # fingerprint: losses compare only where it is the same


def read_run(folder: str) -> Run:
    """What a finished run has to say. Raises ValueError if it is none, or not finished."""
    import torch

    from tinyfm.common import files
    from tinyfm.training.log import read_metrics

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"{folder} is not a run directory: it has no config.json")
    run = calc.rebuild(path / "config.json")
    rows = [row for row in read_metrics(path / "metrics.jsonl") if "val_loss" in row]
    if not rows or rows[-1]["step"] != run.train.steps:
        at = rows[-1]["step"] if rows else 0
        raise ValueError(
            f"{folder} is at step {at} of {run.train.steps}: finish it, or leave it out"
        )
    with torch.device("meta"):
        model = run.build_model()
    cost = estimate.training_cost(model, run.optim, run.train.batch_size)
    units = run.train.steps * run.train.batch_size * estimate.unit_of(model)[1]
    data = files.read_json(path / "config.json").get("data_fingerprint", "")
    return Run(path.name, cost.parameters, units, cost.flops_per_step * run.train.steps,
               rows[-1]["val_loss"], data)  # fmt: skip


def fit_text(runs: list[Run], laws: list[Fitted], held: list[Run]) -> str:
    """The runs beside the curves through them, and what the curves say of larger ones."""
    width = max(len(run.name) for run in runs + held)
    heads = "".join(f"{law.form:>11}" for law in laws)
    lines = [f"{'run':{width}}{'N':>10}{'trained on':>11}{'FLOPs':>11}{'loss':>8}{heads}"]
    for run in runs + held:
        numbers = f"{run.parameters:10.3g}{run.units:11.3g}{run.flops:11.3g}{run.loss:8.4f}"
        losses = "".join(f"{float(law.loss(run.flops)):11.4f}" for law in laws)
        lines.append(f"{run.name:{width}}{numbers}{losses}{'  held out' if run in held else ''}")
    most = max(run.flops for run in runs)
    for law in laws:
        lines.append(f"{law.form}: {law.formula()}")
        for flops in [run.flops for run in held] or [4 * most, 10 * most]:
            loss, (low, high) = float(law.loss(flops)), law.interval(flops)
            lines.append(f"  at {flops:.3g} FLOPs, {flops / most:.3g} x the largest: "
                         f"{loss:.4f} [{low:.4f} to {high:.4f}]")  # fmt: skip
            lines[-1] += f", {loss / held[0].loss - 1:+.2%} from what it became" if held else ""
    return "\n".join([*lines, "in brackets: the middle 90% of a bootstrap over the residuals"])


def draw(runs: list[Run], laws: list[Fitted], held: list[Run], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # without a window system
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="training FLOPs", ylabel="validation loss", xscale="log")
    budgets = [run.flops for run in runs + held]
    along = np.geomspace(min(budgets) / 2, max(budgets) * 4)
    for law in laws:
        (line,) = axes.plot(along, law.loss(along), label=law.form)
        axes.fill_between(along, *law.interval(along), color=line.get_color(), alpha=0.15)
    for name, group, mark in (("runs", runs, "ko"), ("held out", held, "k*")):
        if group:
            axes.plot([r.flops for r in group], [r.loss for r in group], mark, label=name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def fit_runs(argv: list[str]) -> str:
    """`python -m tinyfm.calc fit RUN...`: a scaling law of one's own runs, as text."""
    parser = report.Parser("python -m tinyfm.calc fit")
    parser.add_argument("runs", nargs="+", help="directories of finished runs on the same data")
    parser.add_argument("--held-out", metavar="RUN", help="a larger run, to compare with")
    parser.add_argument("--plot", default="", help="where to draw it (scaling.png beside the runs)")
    options = parser.parse_args(argv)
    # runs/sweep-* may have caught the one to be foretold too.
    held = [read_run(options.held_out)] if options.held_out else []
    apart = Path(options.held_out).resolve() if held else None
    fitted = [folder for folder in options.runs if Path(folder).resolve() != apart]
    runs = sorted(map(read_run, fitted), key=lambda run: run.flops)
    different = {run.data for run in runs + held}
    if len(different) > 1:
        raise ValueError(
            f"the runs read {len(different)} different data: their losses do not compare"
        )
    flops = np.array([run.flops for run in runs], dtype=float)
    losses = np.array([run.loss for run in runs])
    laws = [fit_law(form, flops, losses) for form in FORMS]
    picture = Path(options.plot or Path(options.runs[0]).parent / "scaling.png")
    draw(runs, laws, held, picture)
    return f"{fit_text(runs, laws, held)}\ndrawn in {picture}"
