"""Scaling laws of your own runs: train runs of several sizes, and fit a law to their losses.

    python -m tinyfm.calc sweep          # the presets sweep-1 ... sweep-8 and sweep-large
    python -m tinyfm.calc fit runs/sweep/sweep-[1-8]-* --held-out runs/sweep/sweep-large-*

A run has the FLOPs of its training, and its loss on the whole validation text at its last step.
Runs that differ in their seed alone are one point of the law, with their mean loss. The scatter of
the points about the law then has every source that a larger run will have too: seeds, and what
differs from size to size. The law never sees the runs that are held out: they test its prediction.

A sweep measures what compute buys only if no size is trained better than another. So:

- Tokens grow with the parameters: 20 of them a parameter, as in Hoffmann et al. (2022). That suits
  small models on bytes of docs too: at 8e11 FLOPs, 101, 26, 8 and 2 tokens a parameter gave losses
  of 1.655, 1.598, 1.606 and 1.703. Parameters are those without embeddings and head, as of Kaplan
  et al. (2020): the tables are a large part of small models alone.
- FLOPs are all that the model multiplies, head and attention included. Without the head's, small
  models look better than they are, which bends the law (Porian et al. 2024).
- Batches and learning rates suit each size (Porian et al. 2024). In the presets, batches grow about
  like C^(1/3) (Bi et al. 2024, eq. 1): with 16 rows for all, the smallest size ended at a loss of
  2.37, with its 3 rows at 2.12; the fifth at 1.64, with its 8 rows at 1.61. One pair of rates then
  suits all: trials at widths of 24, 48 and 68 found the best between 0.006 and 0.012 for AdamW,
  and between 0.014 and 0.02 for Muon. These losses are of one seed; those of the ratios were
  measured on an earlier split of the text.
- No text is read twice: a repeated token is worth less (Muennighoff et al. 2023).
- All runs read the same data, and are compared on the same text.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypedDict

import numpy as np
import torch

from tinyfm.calc import estimate
from tinyfm.calc.scaling_laws import PRIORS, PowerLaw, fit_broken_law, fit_power_law
from tinyfm.common import files
from tinyfm.common.figures import new_figure, save_figure
from tinyfm.training.log import read_metrics

# ---- runs as points -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A finished run."""

    name: str
    parameters: int
    non_embedding: int  # without embedding tables and head
    units: int  # tokens, or rows, that it was trained on
    flops: int  # forward and backward, as training_cost counts them
    seed: int
    loss: float  # on the validation split, at the last step
    data: str  # fingerprint: losses compare only where it is the same


@dataclass(frozen=True)
class Size:
    """Runs that differ in their seed alone: a point of the law."""

    name: str
    runs: tuple[Point, ...]

    @property
    def flops(self) -> int:
        return self.runs[0].flops

    @property
    def loss(self) -> float:
        return fmean(run.loss for run in self.runs)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds, of which there must be two."""
        return stdev(run.loss for run in self.runs)


class Fingerprinted(TypedDict, total=False):
    """What the config.json of a run says of its data."""

    data_fingerprint: str


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
        non_embedding=cost.parameters - estimate.table_parameters(model),
        units=run.train.steps * run.train.batch_size * units_per_row,
        flops=cost.flops_per_step * run.train.steps,
        seed=run.train.seed,
        loss=evaluations[-1]["val_loss"],
        data=files.read_record(folder / "config.json", Fingerprinted).get("data_fingerprint", ""),
    )


def by_size(points: Sequence[Point]) -> list[Size]:
    """The sizes of these runs, by FLOPs. Raises ValueError if two runs are the same but in name."""
    groups: dict[tuple, list[Point]] = {}
    for point in points:
        same = groups.setdefault((point.flops, point.parameters, point.units), [])
        for other in same:
            if other.seed == point.seed:
                raise ValueError(
                    f"{other.name} and {point.name} have the same size and the same seed "
                    f"{point.seed}: leave one out"
                )
        same.append(point)
    sizes = []
    for key in sorted(groups):
        runs = tuple(sorted(groups[key], key=lambda point: point.seed))
        name = re.sub(r"-seed-\d+$", "", runs[0].name)
        sizes.append(Size(name, runs))
    return sizes


# ---- the law ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """Sizes, those held out, and the law of the former."""

    sizes: list[Size]
    held_out: list[Size]
    law: PowerLaw


def fit(points: Sequence[Point], held_out: Sequence[Point]) -> Sweep:
    """The law through the mean loss of each size.

    Raises ValueError if the runs, those held out included, differ in their data, or sizes in their
    number of seeds: an interval holds for means over equally many.
    """
    datasets = {point.data for point in [*points, *held_out]}
    if len(datasets) > 1:
        raise ValueError(
            f"the runs read {len(datasets)} different data: their losses do not compare"
        )
    sizes = by_size(points)
    tests = by_size(held_out)
    seeds = {len(size.runs): size.name for size in sizes + tests}
    if len(seeds) > 1:
        counts = ", ".join(f"{name} has {count}" for count, name in sorted(seeds.items()))
        raise ValueError(
            f"sizes differ in their number of seeds ({counts}): train the missing ones"
        )
    flops = np.array([size.flops for size in sizes], dtype=float)
    losses = np.array([size.loss for size in sizes])
    return Sweep(sizes, tests, fit_power_law(flops, losses))


def to_text(sweep: Sweep) -> str:
    """A table of the sizes and the law's losses, then what the law predicts for larger ones."""
    law = sweep.law
    shown = sweep.sizes + sweep.held_out
    width = max(len(size.name) for size in shown)
    heads = f"{'size':{width}}{'N':>10}{'all':>10}{'D':>10}{'D / N':>8}{'FLOPs':>11}"
    lines = [f"{heads}{'loss':>9}{'seeds':>9}{'law':>9}"]
    for size in shown:
        run = size.runs[0]
        ratio = run.units / max(1, run.non_embedding)
        line = f"{size.name:{width}}{run.non_embedding:10.3g}{run.parameters:10.3g}"
        line += f"{run.units:10.3g}{ratio:8.3g}{run.flops:11.3g}"
        spread = f"{size.spread:.4f}" if len(size.runs) > 1 else "-"
        line += f"{size.loss:9.4f}{spread:>9}{float(law.loss(run.flops)):9.4f}"
        if size in sweep.held_out:
            line += "  held out"
        lines.append(line)
    return "\n".join([*lines, *law_lines(sweep), *prediction_lines(sweep), *broken_lines(sweep)])


def law_lines(sweep: Sweep) -> list[str]:
    """The law, and how far the points are from it, beside how far their seeds put them."""
    law = sweep.law
    seeds = len(sweep.sizes[0].runs)
    lines = [
        "N: parameters without embeddings and head; D: tokens or rows of training",
        "loss: mean over the seeds; seeds: standard deviation over them",
        f"power law: {law.formula()}",
    ]
    scatter = f"points lie {law.deviation:.2g} from the law (standard deviation)"
    if seeds > 1:
        variance = fmean(size.spread**2 for size in sweep.sizes)
        scatter += f"; their {seeds} seeds explain {(variance / seeds) ** 0.5:.2g}"
    return [*lines, scatter]


def prediction_lines(sweep: Sweep) -> list[str]:
    """The prediction for each size held out, and whether it holds; without one, for larger runs."""
    law = sweep.law
    most = sweep.sizes[-1].flops
    tests = [(size.flops, size.loss) for size in sweep.held_out]
    lines = []
    for flops, measured in tests or [(4 * most, None), (10 * most, None)]:
        low, high = law.interval(flops)
        line = f"at {flops:.3g} FLOPs, {flops / most:.3g} x the largest: "
        line += f"{float(law.loss(flops)):.4f} [{low:.4f} to {high:.4f}]"
        if measured is not None:
            place = "inside" if low <= measured <= high else "OUTSIDE"
            line += f"; measured {measured:.4f}, {float(law.loss(flops)) / measured - 1:+.2%} off, "
            line += f"{place} the interval"
        lines.append(line)
    seeds = len(sweep.sizes[0].runs)
    of = f"the mean of {seeds} seeds" if seeds > 1 else "a run of one seed"
    lines.append(f"in brackets: where {of} is expected in 90% of the cases")
    return lines


def broken_lines(sweep: Sweep) -> list[str]:
    """What a law of six parameters predicts, under priors of three weights."""
    flops = np.array([size.flops for size in sweep.sizes], dtype=float)
    losses = np.array([size.loss for size in sweep.sizes])
    budgets = [size.flops for size in sweep.held_out] or [4 * sweep.sizes[-1].flops]
    laws = [fit_broken_law(flops, losses, prior) for prior in PRIORS]
    weights = ", ".join(f"{prior:g}" for prior in PRIORS)
    lines = []
    for budget in budgets:
        found = ", ".join(f"{float(law(budget)):.4f}" for law in laws)
        lines.append(f"at {budget:.3g} FLOPs by BNSL, of 6 parameters, with priors of weight ")
        lines[-1] += f"{weights}: {found}"
    return lines


def plot(sweep: Sweep, path: Path) -> None:
    """The runs, and the law with its interval, on a logarithmic axis of FLOPs."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot(xlabel="training FLOPs", ylabel="validation loss", xscale="log")
    budgets = [size.flops for size in sweep.sizes + sweep.held_out]
    along = np.geomspace(min(budgets) / 2, max(budgets) * 4)
    (line,) = axes.plot(along, sweep.law.loss(along), label="power law")
    axes.fill_between(along, *sweep.law.interval(along), color=line.get_color(), alpha=0.15)
    for label, group, mark in (("runs", sweep.sizes, "k."), ("held out", sweep.held_out, "r.")):
        runs = [run for size in group for run in size.runs]
        if runs:
            axes.plot([run.flops for run in runs], [run.loss for run in runs], mark, label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


# ---- training the runs --------------------------------------------------------------------------

TRAIN = Path(__file__).parents[2] / "train.py"


@dataclass(frozen=True)
class Job:
    """A run to train, in its directory."""

    folder: Path
    words: tuple[str, ...]  # the arguments of train.py, but for --out and --resume

    def start(self) -> subprocess.Popen:
        """Start or continue the run, on one thread; its output goes to `log`."""
        words = [*self.words, "--out", str(self.folder)]
        if any(self.folder.glob("step-*/manifest.json")):
            words.append("--resume")
        elif (self.folder / "config.json").exists():
            shutil.rmtree(self.folder)  # it was stopped before it had saved anything
        with self.log.open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, str(TRAIN), *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C reaches train_all alone, which stops the runs
            )

    @property
    def log(self) -> Path:
        return self.folder.parent / "logs" / f"{self.folder.name}.log"

    def last_words(self) -> str:
        """The end of the log in one line, without the frames that messages stand in."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        texts = [line.strip("╭╮╰╯│─ ") for line in lines]
        return " ".join(filter(None, texts))[-200:]


def train_all(jobs: Sequence[Job], at_once: int) -> None:
    """Train the runs in this order, `at_once` at a time, and print a line for each that ends.

    Finished runs are not trained again, stopped ones are continued. If one fails or this process is
    interrupted, the others are stopped, which saves them. Raises ValueError if one fails.
    """
    waiting = list(jobs)
    running: dict[Job, subprocess.Popen] = {}
    started = time.perf_counter()
    try:
        while waiting or running:
            # The first run prepares the data, if need be; the others start when that is done.
            prepared = (jobs[0].folder / "config.json").exists() or jobs[0] not in running
            if waiting and len(running) < at_once and (not running or prepared):
                job = waiting.pop(0)
                job.log.parent.mkdir(parents=True, exist_ok=True)
                running[job] = job.start()
            for job, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                if process.returncode:
                    raise ValueError(f"{job.folder} failed: {job.last_words()}; see {job.log}")
                done = len(jobs) - len(waiting) - len(running)
                minutes = (time.perf_counter() - started) / 60
                print(f"[{done} of {len(jobs)}, {minutes:.1f} min] {job.folder}", flush=True)
            time.sleep(0.05)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
