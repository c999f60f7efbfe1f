"""The records that a run writes: metrics.jsonl, loss.png, and a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import sys
import time
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


class Logbook:
    """Logs the numbers of a run as they come. On all ranks but the first it does nothing.

    steps: number of steps of the whole run. start: step from which the run starts or resumes; rows
    logged after it are dropped, because those steps are trained again.
    """

    def __init__(self, run: Path, steps: int, start: int, first: bool, tensorboard: bool = False):
        self.run = run
        self.steps = steps
        self.first = first
        self.board = None
        self.terminal = first and sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not self.terminal)
        self.path = run / METRICS
        rows, damaged = read_lines(self.path)
        self.rows = [row for row in rows if row["step"] <= start]
        if first:
            run.mkdir(parents=True, exist_ok=True)
            if damaged:
                with (run / DAMAGED).open("ab") as file:
                    file.writelines(damaged)
                self.say(f"{len(damaged)} damaged lines of {self.path} were moved to {DAMAGED}")
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
        if self.terminal and "val_loss" not in row:  # an evaluation gets a line, also here
            values = {name: f"{value:.4g}" for name, value in shown.items()}
            self.bar.set_postfix(values, refresh=False)
        else:
            values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self.say(f"step {row['step']}/{self.steps}  {values}")

    def draw(self) -> None:
        """Redraw loss.png: training and validation loss over steps."""
        if not self.first:
            return
        figure = new_figure(7, 4)
        axes = figure.add_subplot(xlabel="step", ylabel="loss")
        for name, style in (("loss", {"linewidth": 1}), ("val_loss", {"marker": "o"})):
            points = [(row["step"], row[name]) for row in self.rows if name in row]
            if points:
                axes.plot(*zip(*points), label=name, **style)
        axes.set_title(str(self.run.name))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        figure.savefig(self.run / "loss.png", dpi=110)

    def close(self) -> None:
        self.bar.close()
        if self.board:
            self.board.close()
