"""Compare the patterns of MusicGen: four codes a step, with a delay or without, against one a step.

    python benchmarks/patterns.py [--seeds 3] [--runs runs/patterns-benchmark] [--codec RUN]

The preset codec is trained once. Then a small musicgen is trained on its codes, with each pattern
and each seed. All read the same windows of 125 frames (2.5 seconds), in the same order, with the
same settings. "flat" needs four times as many steps of the network for them, each of which computes
all four heads. So it stands there twice: once it has seen the same frames as the others, once a
quarter of them, in about as many steps of the network as the delay takes.

Nats a frame are those of the test sounds, and compare, since each pattern gives all sounds together
a probability of 1; musicgen.py says what each leaves out. The table shows each seed, and the
interval of the median one over windows. A Markov model of the codes stands beside them. Seconds are
those of writing two seconds of sound with a cache, the codec included, by turns; minutes of
training are those of the first seed. Runs are kept in --runs, and what is there already is not run
again. Other options are those of `python train.py musicgen`.

--record also writes the table into README.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.encoder import train
from benchmarks.results import measure, minutes
from benchmarks.seq2seq import cell
from benchmarks.timing import by_turns, describe_machine, record
from tinyfm.musicgen import count_steps
from tinyfm.recipes.run_dir import open_run

FRAMES = 125  # of a window
SECONDS = 2  # of a sound that is written
SMALL = """--model.music.n-layer 3 --model.music.n-head 2 --model.music.d-model 128
--train.batch-size 8"""
Q = 4  # codebooks of the preset
ROWS = {  # name -> pattern, and the share of the training steps, 1 / so many
    "parallel": ("parallel", 1),
    "delay": ("delay", 1),
    "flat": ("flat", 1),
    f"flat, 1/{Q} of the frames": ("flat", Q),
}


def train_all(options: argparse.Namespace, more: list[str]) -> dict[str, list[Path]]:
    """The runs of each row, one a seed. more: options of train.py."""
    folder = Path(options.runs)
    codec = Path(options.codec) if options.codec else train(folder / "codec", "codec")
    runs = {name: [] for name in ROWS}
    for seed in range(options.seeds):
        for name, (pattern, share) in ROWS.items():
            steps = options.steps // share
            words = ["musicgen", "--codec", str(codec.resolve()), *SMALL.split()]
            words += ["--train.seed", str(seed), "--train.steps", str(steps)]
            words += ["--model.music.pattern", pattern]
            words += ["--model.music.context-length", str(count_steps(pattern, Q, FRAMES))]
            words += ["--train.eval-every", str(steps)]
            runs[name].append(train(folder / f"{pattern}-{steps}-{seed}", *words, *more))
    return runs


def writing(run: Path):
    """A function that writes SECONDS of sound, and the steps of the network for each second."""
    model = open_run(str(run)).model
    music, codec = model.config.music, model.config.codec
    second = codec.rate // codec.hop  # frames
    steps = count_steps(music.pattern, Q, 1 + second) - count_steps(music.pattern, Q, 1)
    return lambda: model.generate(torch.zeros(1, 1, 0), SECONDS * second), steps


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=480, help="training steps of each model")
    parser.add_argument("--codec", help="a run of codec (default: train one)")
    parser.add_argument("--runs", default="runs/patterns-benchmark", help="folder of the runs")
    parser.add_argument("--record", action="store_true", help="write the table into README.md")
    options, more = parser.parse_known_args()
    runs = train_all(options, more)
    found = {name: [measure(str(run), []) for run in own] for name, own in runs.items()}
    works = {name: writing(own[0]) for name, own in runs.items()}
    times = by_turns({name: work for name, (work, _) in works.items()}, repeats=3)
    scores = found["delay"][0]["scores"]["test_frame_nats"]
    (markov,) = {*scores} - {"untrained", "reached"}
    lines = [
        f"{describe_machine()}; {options.steps} training steps, a quarter of them in the last "
        f"row; nats a frame of a model of the codes, {markov}: {scores[markov]:.2f}",
        "",
        "| pattern | steps a second of sound | nats a frame | minutes of training | seconds to "
        f"write {SECONDS} |",
        "|---|---|---|---|---|",
    ]
    for name, own in found.items():
        nats = cell(own, "test_frame_nats", 1, digits=2)
        spent = f"{minutes(str(runs[name][0])):.1f} | {times[name]:.2f}"
        lines.append(f"| {name} | {works[name][1]} | {nats} | {spent} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.record:
        record("patterns", text)


if __name__ == "__main__":
    main()
