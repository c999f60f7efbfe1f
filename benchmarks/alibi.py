"""Positions that a model has not seen: ALiBi beside RoPE, trained on short rows, read on long ones.

    python benchmarks/alibi.py [--seeds 3] [--options "--train.steps 20"] [--picture FILE]

Trains the preset `gpt` on rows of 128 tokens, for two thirds of its steps, with either kind of
position; one run a seed, ten minutes on two cores in all. Then each model reads the test text in
rows of 128 to 512 tokens, without further training: neither kind has weights for positions. Always
the same tokens are scored, the last 64 of each window of 512; a longer row only shows the model
more of what stands before them. Press et al. 2022 found that ALiBi gains by that, and that rotary
positions fail.

Prints the mean loss over the seeds, in nats per token, the smallest and the largest, and the
interval of 95% of the median seed over the windows. --picture draws the losses of all seeds, and
--record writes the table into README.md.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import timing
from tinyfm.common.figures import new_figure, save_figure
from tinyfm.evaluate.metrics import Measured, ratio_of_sums
from tinyfm.gpt import GPT
from tinyfm.recipes import run_dir

POSITIONS = {"alibi": "C0", "rope": "C1"}  # kind -> colour in the picture
TRAINED = 128  # tokens of a row in training
LENGTHS = (128, 192, 256, 384, 512)  # tokens of a row that is read
SCORED = 64  # tokens at the end of each row
ROWS = 16  # that are read at once


def train(position: str, seed: int, out: Path, options: list[str]) -> None:
    """Train one model, in a new process. Raises CalledProcessError if it fails."""
    words = ["--model.position", position, "--model.context-length", str(TRAINED)]
    words += ["--train.batch-size", "32", "--train.steps", "200", "--train.eval-every", "0"]
    words += ["--train.seed", str(seed)]
    command = [sys.executable, "train.py", "gpt", *words, "--out", str(out), *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def longer(model: GPT, context_length: int) -> GPT:
    """The same weights with a longer context."""
    other = GPT(replace(model.config, context_length=context_length)).eval()
    other.load_state_dict(model.state_dict())
    return other


@torch.inference_mode()
def losses(model: GPT, windows: np.ndarray) -> dict[int, Measured]:
    """Length of a row -> nats per token of the last SCORED tokens of windows (n, 513)."""
    tokens = torch.from_numpy(windows)
    found = {}
    for length in LENGTHS:
        nats = []
        for batch in tokens.split(ROWS):
            states = model.hidden(batch[:, -length - 1 : -1])[:, -SCORED:]
            logits = model.head(states).float()  # (B, SCORED, V)
            loss = F.cross_entropy(logits.mT, batch[:, -SCORED:], reduction="none")
            nats.append(loss.sum(1))
        found[length] = ratio_of_sums(
            torch.cat(nats).numpy(), np.full(len(windows), SCORED), "windows"
        )
    return found


def measure(out: Path) -> dict[int, Measured]:
    """The losses of a trained run on windows of the test text."""
    opened = run_dir.open_run(str(out))
    text = opened.run.open_data().split("test").tokens
    size = max(LENGTHS) + 1
    windows = text[: len(text) // size * size].reshape(-1, size)
    return losses(longer(opened.model, max(LENGTHS)), windows)


def table(results: dict[str, list[dict[int, Measured]]]) -> str:
    """Markdown: a row for each length, and for each kind of position its loss."""
    kinds = " | ".join(f"{kind} | its interval" for kind in results)
    lines = [f"| tokens of a row | {kinds} |", "|---|" + "---|---|" * len(results)]
    for length in LENGTHS:
        cells = [f"{length}"]
        for seeds in results.values():
            values = [each[length] for each in seeds]
            median = statistics.median_low(values)  # one of them, with its interval
            mean = statistics.mean(map(float, values))
            cells.append(f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})")
            cells.append(f"{median.low:.3f} to {median.high:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    windows = next(iter(results.values()))[0][LENGTHS[0]].about
    return "\n".join(lines) + f"\n\nTrained on rows of {TRAINED} tokens; {windows}.\n"


def draw(results: dict[str, list[dict[int, Measured]]], path: str) -> None:
    """A line for each seed: the loss by the tokens of a row."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for kind, seeds in results.items():
        for number, each in enumerate(seeds):
            label = kind if number == 0 else None
            losses = [each[length] for length in LENGTHS]
            axes.plot(LENGTHS, losses, color=POSITIONS[kind], marker="o", label=label)
    axes.axvline(TRAINED, color="grey", linestyle=":", label="rows of training")
    axes.set_xticks(LENGTHS)
    axes.set_xlabel("tokens of a row")
    axes.set_ylabel("nats per token")
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each kind")
    parser.add_argument("--options", default="", help="more options for train.py, in one string")
    parser.add_argument("--picture", help="a file to draw the losses into")
    parser.add_argument("--record", action="store_true", help="write the table into README.md")
    given = parser.parse_args()
    if given.seeds < 1:
        parser.error(f"--seeds is {given.seeds}; it must be at least 1")
    results: dict[str, list[dict[int, Measured]]] = {kind: [] for kind in POSITIONS}
    minutes = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.seeds):
            for kind, found in results.items():
                out = Path(folder, f"{kind}-{seed}")
                start = time.perf_counter()
                train(kind, seed, out, given.options.split())
                minutes.append((time.perf_counter() - start) / 60)
                found.append(measure(out))
    head = f"{timing.describe_machine()}; {given.seeds} seeds; "
    head += f"training took {statistics.mean(minutes):.1f} minutes a run"
    text = f"{head}\n\n{table(results)}"
    print(text)
    if given.picture:
        draw(results, given.picture)
    if given.record:
        timing.record("alibi", text)


if __name__ == "__main__":
    main()
