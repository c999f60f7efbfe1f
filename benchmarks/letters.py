"""Three ways to draw letters, in equal minutes: DALL-E, latent diffusion, diffusion of pixels.

    python benchmarks/letters.py [--minutes 15] [--seeds 3] [--runs runs/letters-benchmark]
                                 [--picture FILE] [--record]

The presets dalle, text2image and ddpm learn from the same drawings. Each trains for --minutes on
this machine, its parts included: trial steps, after the parts, say how many steps that is. One
judge (tinyfm/evaluate/judge.py) reads what they draw:

    right      the share of letters and digits that show the character of their prompt, for prompts
               of training and for pairs of a style and a character that training kept apart. The
               judge's own share, of real drawings, is the ceiling. ddpm has no prompts.
    sure       the share of which the judge is sure, among all names, whether that is right or not
    distance   the Frechet distance to real drawings of held-out pairs, in features of the judge.
               The prompted models draw the captions of these; ddpm draws what it likes.

Cells show each seed, and the interval of the median one. Runs are kept in --runs, and what is there
already is not run again. --picture writes the first drawings of each model of seed 0.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median_low
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.encoder import TRIAL_STEPS, steps_in, train
from benchmarks.prior import SHOWN, share_read
from benchmarks.results import minutes
from benchmarks.timing import describe_machine, record
from tinyfm.batches.order import fixed_order
from tinyfm.common import sheets
from tinyfm.evaluate import generated, judge
from tinyfm.evaluate.judge import Judge, as_pixels
from tinyfm.evaluate.metrics import Measured
from tinyfm.recipes import run_dir
from tinyfm.recipes.registry import find_preset

MODELS = {"dalle": "DALL-E", "text2image": "latent diffusion", "ddpm": "diffusion of pixels"}
KNOWN, NEW = generated.PROMPT_SETS[:2]
COUNT = generated.COUNT  # drawings whose distance is measured


class Found(NamedTuple):
    """What the judge says of a model, or of real drawings."""

    right: dict[str, Measured]  # of KNOWN and NEW; empty without prompts
    sure: Measured
    distance: Measured
    minutes: float = 0.0  # of training
    seconds: float = 0.0  # of drawing one picture, among sheets.AT_ONCE others


# ---- training -----------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A run, and those of its parts."""

    run: Path
    parts: dict[str, str]  # {option: run}

    @property
    def minutes(self) -> float:
        return sum(map(minutes, [str(self.run), *self.parts.values()]))


def train_for(wanted: float, folder: Path, preset: str, seed: int, more: list[str]) -> Trained:
    """A run that takes so many minutes with its parts, which are trained before a trial of it."""
    common = [preset, "--train.seed", str(seed), "--train.eval-every", "0", *more]
    trial = train(folder / f"{preset}-trial-{seed}", *common, "--train.steps", str(TRIAL_STEPS))
    # As train.py places them.
    options = find_preset(preset).run.PARTS
    parts = {option: f"{trial.resolve()}-{option}" for option in options}
    left = wanted - sum(map(minutes, parts.values()))
    steps = steps_in(left, trial)
    for option, part in parts.items():
        common += [f"--{option}", part]
    run = train(folder / f"{preset}-{seed}", *common, "--train.steps", str(steps))
    return Trained(run, parts)


# ---- what is drawn ------------------------------------------------------------------------------


class Prompts(NamedTuple):
    """What is asked for, and real drawings to compare with."""

    styled: dict[str, generated.StyledNames]  # of KNOWN and NEW
    captions: list[str]  # of the real drawings
    real: Tensor  # (COUNT, 1, H, W)
    others: Tensor  # as many further ones


def read_prompts(run: Path) -> Prompts:
    """Of the data of a run with prompts. Its real drawings are of held-out pairs."""
    data = run_dir.open_run(str(run)).run.open_data()
    split = data.splits[data.split("test")]
    rows = fixed_order(len(split.labels))[: 2 * COUNT]
    captions = [split.captions[i][0] for i in rows[:COUNT]]
    real, others = as_pixels(split.images[rows], 1).split(COUNT)
    styled = {what: own for what, own in generated.prompts_of(data).items() if what in (KNOWN, NEW)}
    return Prompts(styled, captions, real, others)


def artist(run: Path) -> tuple[Callable[[Sequence[str]], Tensor], bool]:
    """(captions -> pictures (B, 1, H, W), whether it reads the captions)."""
    opened = run_dir.open_run(str(run))
    if opened.run.family == "ddpm":
        how = (generated.SAMPLER, generated.STEPS)
        return lambda captions: sheets.samples(opened.model, len(captions), *how, 0).images, False
    opened.model.tokenizer = opened.tokenizer
    options = opened.run.measured_by(opened.run.GUIDANCE)
    return lambda captions: sheets.illustrate(opened.model, captions, **options), True


@torch.inference_mode()
def examine(network: Judge, trained: Trained, prompts: Prompts) -> tuple[Found, Tensor]:
    """(what the judge says of a run, its first drawings)."""
    draw, reads = artist(trained.run)
    start = time.perf_counter()
    drawn = draw(prompts.captions)
    seconds = (time.perf_counter() - start) / len(drawn)
    right = {}
    for what, styled in prompts.styled.items() if reads else ():
        styles, names = zip(*styled)
        images = draw([f"{style} {name}" for style, name in styled])
        right[what] = judge.prompt_following(network, images, names, styles)["character"]
    real = judge.embed(network, prompts.real)
    distance = generated.measured_distance(judge.embed(network, drawn), real)
    sure = share_read(network, drawn, network.names)
    return Found(right, sure, distance, trained.minutes, seconds), drawn[:SHOWN]


# ---- the table ----------------------------------------------------------------------------------


def cell(values: Sequence[Measured], scale: float = 1.0) -> str:
    """All seeds, and the interval of the median, such as "96.1, 97.0 (94.9 to 97.3)"."""
    middle = values[values.index(median_low(values))]
    digits = 0 if scale == 1.0 else 1
    shown = ", ".join(f"{scale * value:.{digits}f}" for value in values)
    return f"{shown} ({scale * middle.low:.{digits}f} to {scale * middle.high:.{digits}f})"


def row(name: str, seeds: Sequence[Found]) -> str:
    """A line of the table; without minutes, of real drawings."""
    cells = [name]
    for what in (KNOWN, NEW):
        own = [found.right[what] for found in seeds if what in found.right]
        cells.append(cell(own, 100) if own else "")
    cells.append(cell([found.sure for found in seeds], 100))
    cells.append(cell([found.distance for found in seeds]))
    for field, digits in (("minutes", 1), ("seconds", 3)):
        values = [getattr(found, field) for found in seeds]
        cells.append(", ".join(f"{value:.{digits}f}" for value in values) if any(values) else "")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=15.0, help="training of each model, with its parts")
    add("--seeds", type=int, default=3, help="number of seeds")
    add("--runs", default="runs/letters-benchmark", help="folder of the runs")
    add("--picture", help="a PNG file to write")
    add("--record", action="store_true", help="write the table into README.md")
    options, more = parser.parse_known_args()
    folder = Path(options.runs)
    seeds = range(options.seeds)
    runs = {
        preset: [train_for(options.minutes, folder, preset, seed, more) for seed in seeds]
        for preset in MODELS
    }
    prompts = read_prompts(runs["dalle"][0].run)
    network, ceilings = judge.load_or_train(find_preset("dalle").run.data.cache)

    # Real drawings, which the judge has not seen where it is asked what they show.
    features = judge.embed(network, prompts.real)
    real = Found(
        {KNOWN: ceilings["characters"]["character"]},
        share_read(network, prompts.others, network.names),
        generated.measured_distance(judge.embed(network, prompts.others), features),
    )
    lines = [
        f"| drawn by | {KNOWN}: % right | {NEW}: % right | % sure | distance "
        "| minutes of training | seconds a picture |",
        "|---|---|---|---|---|---|---|",
        row("real drawings", [real]),
    ]
    shown = {"real drawings": prompts.real[:SHOWN]}
    for preset, name in MODELS.items():
        examined = [examine(network, trained, prompts) for trained in runs[preset]]
        found, drawings = zip(*examined)
        lines.append(row(name, found))
        shown[name] = drawings[0]
    about = f"{COUNT} drawings for shares of sure ones and distances"
    text = f"{describe_machine()}; {about}\n\n" + "\n".join(lines) + "\n"
    print(text)
    if options.picture:
        titles = [name if i == 0 else "" for name in shown for i in range(SHOWN)]
        sheet = sheets.Sheet(torch.cat(list(shown.values())), SHOWN, "letters", tuple(titles))
        sheet.save(options.picture)
    if options.record:
        record("letters", text)


if __name__ == "__main__":
    main()
