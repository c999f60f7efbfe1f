"""One dial: from a budget, such as ten minutes, to a run of the right size that ends on time.

    python train.py gpt --budget 10m
    python -m tinyfm.calc budget 10m      # the plan alone

A preset with a sweep (Preset.sweep) has one size for each width (`Run.at_width`). So a plan needs
four steps:

1. Fit the law to the table of the sweep (calc/size_law.py).
2. Time steps on this machine, with rows of zeros, which cost what real rows cost.
3. Choose the width that promises the least loss, with the tokens that the budget then allows.
4. Say so, with the command that trains the same run without the dial.

A budget in time is that of the command: preparing the data, timing, evaluations and the last
checkpoint count. Machines do not keep their speed. So the number of steps is corrected once, by the
speed of the run itself, and the expected loss with it. The result is the run that had this many
steps from the start, bit for bit: with the schedule "wsd", a run does not depend on its length
until its learning rate starts to fall, and the correction comes before. config.json has that
number.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyfm.calc import size_law
from tinyfm.calc.size_law import Budget, Choice, SizeLaw
from tinyfm.common import units
from tinyfm.recipes import run_dir
from tinyfm.recipes.base import Preset, Run
from tinyfm.training import distributed
from tinyfm.training.trainer import Trainer

TIMED = 2.0  # seconds of steps of each width that is timed
EVALUATIONS = 3  # before the first step, in the middle, and at the end
SHOWN = 2.0  # seconds of a checkpoint, a picture of the loss and samples, roughly
CORRECTED = 0.75  # part of the steps before the learning rate falls, after which they are corrected
LEAST_STEPS = 20
FREE = ("train.seed", "train.spike_sigmas")  # options that change neither size nor cost


# ---- the speed of this machine ------------------------------------------------------------------


class ZeroRows:
    """Data for the trainer: a model's example rows."""

    def __init__(self, model: nn.Module):
        self.model = model

    def batch(self, step: int, part: slice) -> dict[str, Any]:
        return self.model.example_batch(part.stop - part.start)


def seconds_per_step(run: Run) -> float:
    """Measured after a step that warms up."""
    model = run.build_model()
    trainer = Trainer(model, ZeroRows(model), run.train, run.optim, Path(run.out))
    trainer.update(0)
    steps = 0
    started = time.perf_counter()
    while not steps or time.perf_counter() < started + TIMED:
        trainer.update(0)
        steps += 1
    return (time.perf_counter() - started) / steps


# ---- the plan -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dial:
    """A budget, and what was chosen for it."""

    budget: Budget
    run: Run  # as it will be trained
    choice: Choice
    considered: list[Choice]
    known: bool  # whether the law speaks of these data
    law: SizeLaw
    size: float  # FLOPs a token
    text: int  # tokens of the training text
    started: float  # time.perf_counter() of the command's start
    seconds: float  # of the command, as expected
    command: str  # that trains the same run without the dial

    def with_steps(self, steps: int) -> Dial:
        """The same size with another number of steps, and the loss that they promise."""
        tokens = self.choice.tokens * steps / self.run.train.steps
        choice = size_law.promise(self.law, self.choice.width, self.size, tokens, self.text)
        return replace(self, run=with_steps(self.run, steps), choice=choice)

    def __str__(self) -> str:
        lines = [f"budget {self.budget.text}: bits per byte of validation by size, as expected"]
        for c in self.considered:
            mark = "  chosen" if c is self.choice else ""
            loss = f"{c.loss:.3f} ({c.low:.3f} to {c.high:.3f} in 90%)" if self.known else "-"
            lines.append(f"  width {c.width:4}  {c.tokens:8.3g} tokens  {loss}{mark}")
        beyond = self.choice.tokens * self.size / self.law.most
        if not self.known:
            lines.append("no loss is expected: the sweep behind the law read other data")
        elif beyond > 1:
            lines.append(f"that is {beyond:.2g} times the sweep's largest run: less certain")
        left = self.started + self.seconds - time.perf_counter()
        ends = datetime.now() + timedelta(seconds=left)
        lines.append(
            f"{self.run.train.steps:,} steps, {self.choice.tokens / self.text:.2g} times the text, "
            f"{units.duration(self.seconds)}, until {ends:%H:%M:%S}"
        )
        return "\n".join([*lines, f"the same without the dial: {self.command}"])

    def correction(self, planned: int) -> str:
        """What `correct` changed. planned: the steps before."""
        line = f"by the speed so far, {self.run.train.steps:,} steps instead of {planned:,}"
        if self.known:
            c = self.choice
            line += f": {c.loss:.3f} ({c.low:.3f} to {c.high:.3f} in 90%) bits per byte expected"
        return line

    def outcome(self, bpb: float) -> str:
        """What became of the plan, at the end of the run."""
        took = time.perf_counter() - self.started
        line = f"budget {self.budget.text}: {took:.0f} s, {self.seconds:.0f} expected"
        if self.known:
            line += f"; {bpb:.3f} bits per byte, {self.choice.loss:.3f} expected"
        return line


def check(name: str, preset: Preset, run: Run) -> None:
    """Raise ValueError for a run without a law, and for options that the dial chooses."""
    if not preset.sweep:
        raise ValueError(
            f"--budget needs sizes that were swept, and {name} as asked has none: choose "
            "--train.steps instead"
        )
    if run.resume:
        raise ValueError("a run that is resumed has its number of steps: leave out --budget")
    if distributed.joined():
        raise ValueError("--budget plans for one process: start it without torchrun")
    changed = changes(preset, run)
    chosen = [key for key in changed if not key.startswith("data.") and key not in FREE]
    if run.train.eval_every != preset.run.train.eval_every:
        chosen.append("train.eval_every")
    if chosen:
        name = run_dir.option(chosen[0])
        raise ValueError(f"--budget chooses among the sizes of the sweep: leave out --{name}")


def changes(preset: Preset, run: Run) -> list[str]:
    """The settings of a run that differ from the preset's, and matter for its result."""
    records = [run_dir.to_record("", each) for each in (preset.run, run)]
    return [text.split(" ")[0] for text in run_dir.differences(*records, run)]


def with_steps(run: Run, steps: int) -> Run:
    """The run with this number of steps, and EVALUATIONS."""
    between = -(-steps // (EVALUATIONS - 1))
    return replace(run, train=replace(run.train, steps=steps, eval_every=between))


def turn(name: str, preset: Preset, run: Run, started: float) -> Dial:
    """The dial's choice for a run with the user's options. started: when the command was.

    Raises ValueError for a budget that is none, too small or far too large.
    """
    check(name, preset, run)
    budget = size_law.read_budget(run.budget, run.gpu)
    table = size_law.read_table(size_law.FOLDER / preset.sweep)
    law = size_law.fit_size_law(table)

    # The sizes, and what their data have to say.
    runs = {width: run.at_width(width) for width in sorted({row.width for row in table})}
    data = run.open_data()
    T = data.units_per_row
    V = len(data.train)
    held_out = T * sum(len(batch["tokens"]) for batch in data.val_batches(64))
    sizes = {}  # FLOPs a token
    batches = {}  # tokens
    for width, each in runs.items():
        with torch.device("meta"):
            sizes[width] = each.build_model().flops_per_row() / T
        batches[width] = each.train.batch_size * T

    # Time a width, choose, time the choice: until the choice has been timed. The other widths are
    # taken to compute as many FLOPs a second as the nearest one that was.
    speeds: dict[int, float] = {}  # FLOP/s
    width = preset.run.model.d_model
    while width not in speeds:
        speeds[width] = sizes[width] * batches[width] / seconds_per_step(runs[width])
        per_token = {}  # seconds
        ends = {}  # seconds of all that is no step: a forward pass is a third of training
        for w, M in sizes.items():
            near = min(speeds, key=lambda timed: abs(math.log(timed / w)))
            per_token[w] = M / speeds[near]
            ends[w] = EVALUATIONS * held_out * per_token[w] / 3 + (EVALUATIONS - 1) * SHOWN
        spent = time.perf_counter() - started
        tokens = {
            w: {
                "seconds": (budget.amount - spent - ends[w]) / per_token[w],
                "flops": budget.amount / sizes[w],
                "tokens": budget.amount,
            }[budget.kind]
            for w in sizes
        }
        possible = {w: n for w, n in tokens.items() if n >= LEAST_STEPS * batches[w]}
        if not possible:
            raise ValueError(
                f"a budget of {budget.text} leaves less than {LEAST_STEPS} steps of the smallest "
                "size: use more, such as 10m"
            )
        considered = size_law.consider(law, sizes, possible, V)
        choice = size_law.choose(law, sizes, considered, budget, V)
        width = choice.width

    chosen = with_steps(runs[width], int(choice.tokens / batches[width]))
    return Dial(
        budget=budget,
        run=chosen,
        choice=choice,
        considered=considered,
        known=not any(key.startswith("data.") for key in changes(preset, run)),
        law=law,
        size=sizes[width],
        text=V,
        started=started,
        seconds=spent + ends[width] + choice.tokens * per_token[width],
        command=run_dir.command(name, preset, chosen),
    )


# ---- ending on time -----------------------------------------------------------------------------


def first_part(trainer: Trainer, steps: int) -> tuple[float, float]:
    """Train the first steps of a run; return the seconds of a step and of an evaluation.

    The very first step, which comes after an evaluation and warms up, is not timed.
    """
    started = time.perf_counter()
    trainer.fit(until=1)
    first = time.perf_counter()
    trainer.fit(until=steps)
    step = (time.perf_counter() - first) / (steps - 1)
    return step, max(0.0, first - started - step)


def correct(dial: Dial, trainer: Trainer) -> Dial:
    """Train the first part of a run whose budget is time; return the dial with the steps that fit.

    Its speed is that of its first part. Steps after the learning rate has begun to fall cannot be
    taken back, so if the machine has become much slower, the run takes longer.
    """
    run = dial.run
    level = 1 - run.optim.decay_fraction  # part of a run before its learning rate falls
    done = int(CORRECTED * level * run.train.steps)
    step, evaluation = first_part(trainer, done)
    if trainer.signals.agreed:
        return dial
    left = dial.started + dial.budget.amount - time.perf_counter()
    left -= (EVALUATIONS - 1) * (evaluation + SHOWN)
    return dial.with_steps(max(math.ceil(done / level), done + int(left / step)))
