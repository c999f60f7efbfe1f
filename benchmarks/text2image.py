"""Measure text-to-image: precomputed latents, samplers, guidance, and the judge that scores it.

    python benchmarks/text2image.py latents [--repeats 5]
    python benchmarks/text2image.py samplers RUN [--guidance 2]
    python benchmarks/text2image.py guidance RUN
    python benchmarks/text2image.py judge [--folds 4]

latents: training images/s of the preset, with latents computed once and with the encoder in every
step, by turns; medians. Also for pictures of 64 x 64 and 128 x 128, whose autoencoders reduce 8 and
16 rows and columns to one, so that all latents have the same size.

samplers: the Frechet distance, in the judge's features, between the fonts' own drawings and those
of the run for the same prompts: a third of the letters and digits in all styles of training. By
DPM-Solver++ in few steps and DDIM in many, from the same noise.

guidance: the shares of these drawings that the judge reads as the prompt says.

judge: the shares of real drawings, unseen in training, that the judge reads right: letters and
digits among each other, held-out characters among all names. Each fold trains a judge without
another tenth of the drawings.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from timing import by_turns, training_step

from tinyfm.common import device, sheets
from tinyfm.common.seeds import row_generators
from tinyfm.evaluate import generated, judge
from tinyfm.evaluate.judge import Judge, JudgeConfig
from tinyfm.evaluate.metrics import proportion
from tinyfm.recipes import run_dir
from tinyfm.recipes.base import Run
from tinyfm.recipes.registry import find_preset
from tinyfm.training.optim import build_optimizers

SAMPLERS = (("dpm++", 10), ("dpm++", 20), ("dpm++", 50), ("ddim", 20), ("ddim", 250))
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


# ---- latents ------------------------------------------------------------------------------------


def compare_latents(run: Run, repeats: int) -> None:
    """Time whole training steps of the run, on empty pictures and on empty latents."""
    dtype = device.choose_dtype("auto", torch.device("cpu"))
    torch.manual_seed(0)
    model = run.build_model()
    optimizers = build_optimizers(model, run.optim)
    rows = run.train.batch_size
    with_latents = model.example_batch(rows)
    images = model.autoencoder.example_batch(rows)["images"]  # (B, C, H, W)
    with_images = {"images": images, "tokens": with_latents["tokens"]}

    def loss_on(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss, _ = model.loss(batch, row_generators(0, 0, range(rows)))
        return loss

    steps = {
        "encoded in every step": training_step(lambda: loss_on(with_images), optimizers, dtype),
        "made once": training_step(lambda: loss_on(with_latents), optimizers, dtype),
    }
    times = by_turns(steps, repeats)
    speeds = {name: rows / elapsed for name, elapsed in times.items()}
    shown = ", ".join(f"{name} {speed:.0f} images/s" for name, speed in speeds.items())
    ratio = speeds["made once"] / speeds["encoded in every step"]
    side = images.size(2)
    print(f"{side} x {side}, {dtype}, latents {shown}: {ratio:.2f}x", flush=True)


def double_pictures(run: Run) -> Run:
    """The run with pictures of twice the size, and one more level in its autoencoder."""
    old = run.model.autoencoder
    channels = (*old.channels, old.channels[-1])
    autoencoder = replace(old, image_size=2 * old.image_size, channels=channels)
    return replace(run, model=replace(run.model, autoencoder=autoencoder))


# ---- what a run draws ---------------------------------------------------------------------------


@dataclass
class Drawer:
    """A trained run, the judge, and the prompts to draw."""

    model: nn.Module
    critic: Judge
    prompts: list[tuple[str, str]]  # (style, name of the character) of each prompt

    def draw(self, sampler: str, steps: int, guidance: float) -> torch.Tensor:
        """A picture for each prompt, (B, C, H, W)."""
        texts = [f"{style} {name}" for style, name in self.prompts]
        return sheets.illustrate(self.model, texts, steps=steps, sampler=sampler, guidance=guidance)


def open_drawer(path: str) -> Drawer:
    """Open the run at `path`; train the judge, if that was not done before."""
    opened = run_dir.open_run(path)
    opened.model.tokenizer = opened.tokenizer
    critic, _ = judge.load_or_train(opened.run.data.cache)
    prompts = generated.prompts_of(opened.run.open_data())["letters and digits"]
    return Drawer(opened.model, critic, prompts[::3])


@torch.inference_mode()
def compare_samplers(drawer: Drawer, guidance: float) -> None:
    real = judge.embed(drawer.critic, generated.real_drawings(drawer.prompts))
    distances = {}
    for sampler, steps in SAMPLERS:
        start = time.perf_counter()
        images = drawer.draw(sampler, steps, guidance)
        seconds = time.perf_counter() - start
        distance = generated.frechet_distance(judge.embed(drawer.critic, images), real)
        distances[sampler, steps] = distance
        print(
            f"{sampler}, {steps} steps: Frechet distance {distance:.1f} of {len(images)} "
            f"pictures, {seconds:.0f} s",
            flush=True,
        )
    ratio = distances["dpm++", 20] / distances["ddim", 250]
    print(f"dpm++ in 20 steps over ddim in 250: {ratio:.3f}")


@torch.inference_mode()
def compare_guidances(drawer: Drawer) -> None:
    styles = [style for style, _ in drawer.prompts]
    names = [name for _, name in drawer.prompts]
    for guidance in GUIDANCES:
        images = drawer.draw("dpm++", 20, guidance)
        shares = judge.prompt_following(drawer.critic, images, names, styles)
        text = ", ".join(f"{key} {value:.3f}" for key, value in shares.items())
        print(f"guidance {guidance:g}: {text}", flush=True)


# ---- the judge ----------------------------------------------------------------------------------


def compare_judges(cache: str, folds: int) -> None:
    right = Counter()
    asked = Counter()
    for fold in range(folds):
        _, ceilings = judge.load_or_train(cache, JudgeConfig(fold=fold))
        for question, shares in ceilings.items():
            text = ", ".join(f"{key} {float(value):.4f}" for key, value in shares.items())
            print(f"without part {fold}, {question}: {text}", flush=True)
            found = shares["character"]
            right[question] += round(found * found.n)
            asked[question] += found.n
    for question, n in asked.items():
        pooled = proportion(np.arange(n) < right[question], "images")
        print(f"{question}, {folds} folds: {pooled} read right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ("latents", "samplers", "guidance", "judge")
    parser.add_argument("what", choices=kinds, help="what to measure")
    parser.add_argument("run", nargs="?", default="runs/text2image", help="a text2image run")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, for latents")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance, for samplers")
    parser.add_argument("--folds", type=int, default=4, help="number of judges, for judge")
    options = parser.parse_args()
    preset = find_preset("text2image").run
    if options.what == "latents":
        device.keep_freed_memory()
        larger = double_pictures(preset)
        for run in (preset, larger, double_pictures(larger)):
            compare_latents(run, options.repeats)
    elif options.what == "samplers":
        compare_samplers(open_drawer(options.run), options.guidance)
    elif options.what == "guidance":
        compare_guidances(open_drawer(options.run))
    else:
        compare_judges(preset.data.cache, options.folds)


if __name__ == "__main__":
    main()
