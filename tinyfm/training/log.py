"""The records that a run writes: metrics.jsonl, loss.png, and a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from tinyfm.common import schema
from tinyfm.common.figures import new_figure
from tinyfm.common.folders import temporary_name

METRICS = "metrics.jsonl"
DAMAGED = "metrics.damaged.jsonl"  # lines of metrics.jsonl that cannot be read


def to_line(row: dict) -> str:
    """A line of metrics.jsonl."""
    return json.dumps(row) + "\n"


def read_row(line: bytes) -> dict[str, float]:
    """A line of metrics.jsonl, without values that are not finite.

    Raises ValueError if it is no object of numbers with a step.
    """
    row = schema.check(schema.parse_json(line, non_finite=True), dict, METRICS)
    schema.check(row.get("step"), int, f"{METRICS}: step")
    wrong = [n for n, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    for name in wrong:
        del row[name]
    return schema.check(row, dict[str, float], METRICS)


def read_lines(path: Path) -> tuple[list[dict], list[bytes]]:
    """(rows, damaged lines) of a metrics.jsonl. A last line that a kill cut short is left out."""
    rows = []
    damaged = []
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for line in lines:
        try:
            rows.append(read_row(line))
        except ValueError:
            if line.endswith(b"\n"):
                damaged.append(line)
    return rows, damaged


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, without damaged lines."""
    rows, _ = read_lines(path)
    return rows


def summary_writer() -> type:
    """TensorBoard's writer. Raises ValueError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--train.tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter


def summary_score(scores: Mapping[str, float]) -> str:
    """The name of the score that sums up an evaluation: the first that is no loss, if there is one.

    scores: those of an evaluation, the validation loss and its terms (val_loss_...) among them.
    """
    others = [name for name in scores if not name.startswith(("val_loss", "step", "time"))]
    return others[0] if others else "val_loss"


def in_short(row: Mapping[str, float]) -> str:
    """The loss and the speed of a row, such as "loss 3.214  15.1k tokens/s"."""
    parts = []
    for name, value in row.items():
        if name.startswith("loss"):
            parts.append(f"{name} {value:.4g}")
        elif name.endswith("_per_s"):
            parts.append(f"{tqdm.format_sizeof(value)} {name.removesuffix('_per_s')}/s")
    return "  ".join(parts)


class Logbook:
    """Logs the numbers of a run as they come. On all ranks but the first it does nothing.

    steps: number of steps of the whole run. start: step from which the run starts or resumes; rows
    logged after it are dropped, because those steps are trained again. usual: the lowest and the
    highest final value of the summary score in earlier runs, if they are known.
    """

    def __init__(
        self,
        run: Path,
        steps: int,
        start: int,
        first: bool,
        tensorboard: bool = False,
        usual: Sequence[float] = (),
    ):
        self.run = run
        self.steps = steps
        self.usual = usual
        self.first = first
        self.board = None
        self.terminal = first and sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, initial=start, unit="step", disable=not self.terminal, dynamic_ncols=True
        )
        self.path = run / METRICS
        rows, damaged = read_lines(self.path)
        self.rows = [row for row in rows if row["step"] <= start]
        if first:
            run.mkdir(parents=True, exist_ok=True)
            if damaged:
                with (run / DAMAGED).open("ab") as file:
                    file.writelines(damaged)
                self.say(f"damaged lines of {self.path} moved to {DAMAGED}: {len(damaged)}")
            # Written under another name and then renamed: a kill here loses no row.
            kept = temporary_name(self.path)
            kept.write_text("".join(map(to_line, self.rows)), encoding="utf-8")
            kept.replace(self.path)
            if tensorboard:
                self.board = summary_writer()(run / "tensorboard")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.first:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def add(self, row: dict[str, float]) -> None:
        """Log one row. It has a "step", and gets the "time" in seconds since 1970."""
        if not self.first:
            return
        row = {**row, "time": round(time.time(), 2)}
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_line(row))
        shown = {name: value for name, value in row.items() if name not in ("step", "time")}
        if self.board:
            for name, value in shown.items():
                self.board.add_scalar(name, value, row["step"])
        if "val_loss" in row:  # an evaluation, in full
            values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self.say(f"step {row['step']}/{self.steps}  {values}")
        elif self.terminal:
            self.bar.set_postfix_str(in_short(row), refresh=False)
        else:
            self.say(f"step {row['step']}/{self.steps}  {in_short(row)}")

    def points(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of all rows with this number."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def draw(self) -> None:
        """Redraw loss.png: the losses over steps, and below them the summary score."""
        if not self.first:
            return
        evaluations = [row for row in self.rows if "val_loss" in row]
        score = summary_score(evaluations[-1]) if evaluations else "val_loss"
        panels = 1 if score == "val_loss" else 2
        figure = new_figure(7, 3 * panels + 1)
        losses, *below = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
        losses.set_title(str(self.run.name))
        names = dict.fromkeys(name for row in self.rows for name in row if name.startswith("loss"))
        for name in names:
            label = f"{name.replace('_', ' ')}, in training"
            losses.plot(*self.points(name), label=label, linewidth=1)
        losses.plot(*self.points("val_loss"), label="validation loss", marker="o")
        for axes in below:
            axes.plot(*self.points(score), label=score, marker="o", color="C1")
        for i, value in enumerate(self.usual):
            label = None if i else "usual at the end"
            figure.axes[-1].axhline(value, linestyle="--", color="gray", label=label)
        labels = ("loss", score.replace("val_bpb", "bits per byte of validation text"))
        for axes, name in zip(figure.axes, labels):
            axes.set_ylabel(name)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.axes[-1].set_xlabel("step")
        figure.savefig(self.run / "loss.png", dpi=110)

    def close(self) -> None:
        self.bar.close()
        if self.board:
            self.board.close()
