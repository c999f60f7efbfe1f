"""What a budget buys: the preset `gpt` at several widths, on several numbers of tokens.

    python benchmarks/budget.py sweep --record    # an hour of one core
    python benchmarks/budget.py rates --record    # 40 minutes of one core
    python benchmarks/budget.py check --record    # 80 minutes, with nothing else running

sweep trains the preset `gpt` at each width (`at_width` in recipes/gpt.py) on each number of tokens,
as long as a run costs at most MOST FLOPs. The limit makes the grid a triangle: large sizes are
tried on few tokens, small ones on many, so that both terms of a law are seen, and no run takes
longer than a quarter of an hour. The most tokens are two passes through the text. It writes
tinyfm/calc/budget.csv, from which `train.py --budget` fits the law of tinyfm/calc/size_law.py;
beside each loss the table it prints has what the law says that is fitted to all other runs.

rates trains four widths at five multiples of the learning rates that `at_width` gives them, on the
fewest tokens, and draws the losses. If the rates transfer, all four curves have their minimum at
the same multiple. A parabola through the best point and its neighbours gives the minimum.

check trains with budgets of 2, 5, 10 and 20 minutes, and the preset for as many, with the number of
steps that fits. It prints how long each took, what was expected, and what was reached.

The runs of sweep and rates go to runs/budget, two at a time with one thread each; stopped ones are
continued by the same command. Those of check come one after the other, with all threads.
"""

from __future__ import annotations

import argparse
import csv
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from tinyfm.calc import size_law, sweep
from tinyfm.calc.size_law import Trained
from tinyfm.common.figures import new_figure, save_figure
from tinyfm.recipes import budget, registry, run_dir
from tinyfm.recipes.base import Run
from tinyfm.recipes.registry import scale_rates
from tinyfm.training.log import METRICS, read_metrics

ROOT = timing.PAGE.parent.parent
WIDTHS = (128, 192, 256, 384, 512)
TOKENS = (400_000, 1_000_000, 2_500_000, 6_250_000)
MOST = 7e13  # FLOPs of a run
RATE_WIDTHS = (128, 192, 256, 384)
FACTORS = (0.25, 0.4, 0.63, 1, 1.6)
MINUTES = (2, 5, 10, 20)
PRESET = registry.find_preset("gpt")

# ---- runs ---------------------------------------------------------------------------------------


def run_of(width: int, tokens: int) -> Run:
    """The run of this size, evaluated at its start and its end alone."""
    run = PRESET.run.at_width(width)
    steps = max(1, round(tokens / (run.train.batch_size * run.model.context_length)))
    return replace(run, train=replace(run.train, steps=steps, eval_every=0))


def tokens_of(run: Run) -> int:
    return run.train.steps * run.train.batch_size * run.model.context_length


def flops_per_token(run: Run) -> float:
    with torch.device("meta"):
        return run.build_model().flops_per_row() / run.model.context_length


def job_of(run: Run, folder: Path, more: Sequence[str]) -> sweep.Job:
    _, _, *words = shlex.split(run_dir.command("gpt", PRESET, run))
    return sweep.Job(folder, (*words, *more))


def read_run(run: Run, folder: Path, unique: int) -> tuple[Trained, float]:
    """(the finished run, its minutes)."""
    rows = read_metrics(folder / METRICS)
    M = flops_per_token(run)
    row = Trained(run.model.d_model, M, tokens_of(run), unique, rows[-1]["val_bpb"])
    return row, (rows[-1]["time"] - rows[0]["time"]) / 60


# ---- the sweep ----------------------------------------------------------------------------------


def grid() -> dict[str, Run]:
    """The runs of the sweep by name, the longest first, so that both threads stay busy."""
    runs = {f"width-{w}-tokens-{n}": run_of(w, n) for w in WIDTHS for n in TOKENS}
    costs = {name: tokens_of(run) * flops_per_token(run) for name, run in runs.items()}
    small = [name for name in runs if costs[name] <= MOST]
    return {name: runs[name] for name in sorted(small, key=costs.get, reverse=True)}


def write_table(found: Sequence[tuple[Trained, float]], path: Path) -> None:
    """The table that size_law.read_table reads; the last columns say where a row comes from."""
    source = timing.describe_machine()
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = [{**asdict(run), "minutes": f"{m:.1f}", "source": source} for run, m in found]
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def sweep_text(runs: Sequence[Trained]) -> str:
    """The runs, each beside what the law of the others says of it, and the law."""
    lines = [
        "| width | tokens | times the text | FLOP | bits per byte | by the other runs | off |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        law = size_law.fit_size_law([other for other in runs if other is not run])
        U = float(size_law.worth(run.tokens, run.unique))
        M = run.flops_per_token
        low, high = law.interval(M, U)
        said = law.loss(M, U)
        cells = [f"{run.width}", f"{run.tokens:.3g}", f"{run.tokens / run.unique:.2f}"]
        cells += [f"{M * run.tokens:.2g}", f"{run.bpb:.3f}"]
        cells += [f"{said:.3f} ({low:.3f} to {high:.3f})", f"{said / run.bpb - 1:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    law = size_law.fit_size_law(runs)
    E, A, B, alpha, beta = np.exp(law.theta)
    lines += [
        "",
        f"L = {E:.3f} + {A:.3f} (M / {law.M0:.3g})^-{alpha:.3f} + {B:.3f} (U / {law.D0:.3g})^"
        f"-{beta:.3f}; runs lie {law.deviation:.2%} from it (standard deviation)",
    ]
    return "\n".join(lines) + "\n"


def do_sweep(options: argparse.Namespace, more: list[str]) -> str:
    runs = grid()
    folder = Path(options.out)
    sweep.train_all([job_of(run, folder / name, more) for name, run in runs.items()], 2)
    unique = len(PRESET.run.open_data().train)
    found = [read_run(run, folder / name, unique) for name, run in runs.items()]
    found.sort(key=lambda each: (each[0].width, each[0].tokens))
    write_table(found, size_law.FOLDER / PRESET.sweep)
    minutes = sum(m for _, m in found)
    text = sweep_text([run for run, _ in found])
    return f"{timing.describe_machine()}; {len(found)} runs, {minutes:.0f} minutes in all\n\n{text}"


# ---- learning rates -----------------------------------------------------------------------------


def minimum(factors: Sequence[float], losses: Sequence[float]) -> float:
    """Where the parabola through the best point and its neighbours, over ln factor, is least.

    At an end of the factors, that end.
    """
    best = int(np.argmin(losses))
    if best in (0, len(losses) - 1):
        return factors[best]
    around = slice(best - 1, best + 2)
    a, b, _ = np.polyfit(np.log(factors[around]), losses[around], 2)
    return float(np.exp(-b / (2 * a)))


def rates_text(losses: dict[int, list[float]]) -> str:
    heads = " | ".join(f"× {factor:g}" for factor in FACTORS)
    lines = [f"| width | {heads} | least at × |", "|---|" + "---|" * (len(FACTORS) + 1)]
    minima = {width: minimum(FACTORS, each) for width, each in losses.items()}
    for width, each in losses.items():
        cells = " | ".join(f"{loss:.3f}" for loss in each)
        lines.append(f"| {width} | {cells} | {minima[width]:.2f} |")
    ratio = max(minima.values()) / min(minima.values())
    return "\n".join([*lines, "", f"The minima lie within a factor of {ratio:.2f}."]) + "\n"


def draw_rates(losses: dict[int, list[float]], path: Path) -> None:
    figure = new_figure(7, 4)
    axes = figure.add_subplot(xlabel="learning rates, as a multiple", ylabel="bits per byte")
    axes.set_xscale("log", base=2)
    for width, each in losses.items():
        axes.plot(FACTORS, each, marker="o", label=f"width {width}")
    axes.legend()
    save_figure(figure, path)


def do_rates(options: argparse.Namespace, more: list[str]) -> str:
    runs = {}
    for width in RATE_WIDTHS[::-1]:
        for factor in FACTORS:
            run = run_of(width, TOKENS[0])
            runs[width, factor] = replace(run, optim=scale_rates(run.optim, factor))
    folders = {key: Path(options.out) / "width-{}-rates-{}".format(*key) for key in runs}
    sweep.train_all([job_of(run, folders[key], more) for key, run in runs.items()], 2)
    losses = {
        width: [read_run(runs[width, f], folders[width, f], 1)[0].bpb for f in FACTORS]
        for width in RATE_WIDTHS
    }
    if options.record:
        draw_rates(losses, timing.PAGE.with_name("budget.png"))
    return f"{timing.describe_machine()}; one seed\n\n{rates_text(losses)}"


# ---- plans and what becomes of them -------------------------------------------------------------


def train(out: Path, *words: str) -> tuple[str, float]:
    """(what train.py printed, its seconds)."""
    command = [sys.executable, "train.py", "gpt", *words, "--out", str(out)]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout, time.perf_counter() - started


def last_bpb(out: Path) -> float:
    return read_metrics(out / METRICS)[-1]["val_bpb"]


def expected(printed: str) -> tuple[str, list[float]]:
    """(the chosen width, its loss with the ends of its interval), of what a plan printed."""
    (found,) = re.findall(
        r"width +(\d+) .* tokens  (\S+) \((\S+) to (\S+) in 90%\)  chosen", printed
    )
    return found[0], [float(word) for word in found[1:]]


def do_check(options: argparse.Namespace, more: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        rows = check_rows(Path(folder), options.minutes, more)
    heads = ("budget", "took, s", "width", "bits per byte expected", "reached", "off")
    heads = (*heads, "the preset took, s", "and reached")
    lines = [" | ".join(row) for row in (heads, ["---"] * len(heads), *rows)]
    text = "\n".join(f"| {line} |" for line in lines)
    return f"{timing.describe_machine()}; one seed\n\n{text}\n"


def check_rows(out: Path, minutes: Sequence[float], more: list[str]) -> list[list[str]]:
    """A row of the table for each budget."""
    # The preset, to know the seconds of its steps and of all else.
    _, whole = train(out / "preset", *more)
    speeds = [
        row["tokens_per_s"] for row in read_metrics(out / "preset" / METRICS) if "loss" in row
    ]
    run = PRESET.run
    step = run.train.batch_size * run.model.context_length * np.mean(1 / np.array(speeds))
    rows = []
    for each in minutes:
        printed, seconds = train(out / f"dial-{each:g}", "--budget", f"{each:g}m", *more)
        width, (loss, low, high) = expected(printed)
        bpb = last_bpb(out / f"dial-{each:g}")
        steps = max(2, run.train.steps + int((60 * each - whole) / step))
        plain = run_dir.command("gpt", PRESET, budget.with_steps(run, steps))
        _, plain_seconds = train(out / f"preset-{each:g}", *shlex.split(plain)[3:], *more)
        row = [f"{each:g} minutes", f"{seconds:.0f}", width]
        row += [f"{loss:.3f} ({low:.3f} to {high:.3f})", f"{bpb:.3f}", f"{loss / bpb - 1:+.1%}"]
        rows.append([*row, f"{plain_seconds:.0f}", f"{last_bpb(out / f'preset-{each:g}'):.3f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", choices=("sweep", "rates", "check"))
    add("--out", default="runs/budget", help="folder of the runs of sweep and rates")
    add("--minutes", nargs="+", type=float, default=MINUTES, help="budgets of check")
    add("--record", action="store_true", help="write the table into README.md")
    options, more = parser.parse_known_args()
    work = {"sweep": do_sweep, "rates": do_rates, "check": do_check}[options.what]
    text = work(options, more)
    print(text)
    if options.record:
        timing.record(f"budget {options.what}", text)


if __name__ == "__main__":
    main()
