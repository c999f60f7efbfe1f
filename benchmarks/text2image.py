"""What text-to-image gains: latents made once, few steps, guidance; and who judges that.

    python benchmarks/text2image.py latents [--repeats 5]
    python benchmarks/text2image.py samplers RUN [--guidance 2]
    python benchmarks/text2image.py guidance RUN
    python benchmarks/text2image.py judge [--folds 4]

latents: training images/s of the preset, with its latents made once and with the encoder in every
step, by turns; medians. Also for pictures of 64 x 64 and 128 x 128, of which the autoencoder
squeezes 8 and 16 rows and columns into one, so that the latents are as small as before. samplers:
the Frechet distance, in the judge's features, between the fonts' own drawings and those of the run
for the same prompts, a third of the letters and digits in all styles of training; by DPM-Solver++
in few steps and DDIM in many, from the same noise. guidance: how many of these the judge reads
right. judge: how many real drawings it reads right that it did not see, and others taught alike,
each without another tenth of them.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tinyfm.common import device, sheets
from tinyfm.common.seeds import row_generators
from tinyfm.evaluate import generated, judge
from tinyfm.recipes import run_dir
from tinyfm.recipes.registry import get_preset
from tinyfm.training.optim import build_optimizers


def latents(run, repeats: int) -> None:
    """Each step is a whole training step of the run, on empty pictures or latents."""
    dtype = device.choose_dtype("auto", torch.device("cpu"))
    torch.manual_seed(0)
    model, rows = run.build_model(), run.train.batch_size
    optimizers = build_optimizers(model, run.optim)
    made = model.example_batch(rows)
    images = model.autoencoder.example_batch(rows)["images"]
    batches = {
        "encoded in every step": {"images": images, "tokens": made["tokens"]},
        "made once": made,
    }
    seconds = {name: [] for name in batches}
    for _ in range(1 + repeats):  # the first round warms up
        for name, batch in batches.items():
            begin = time.perf_counter()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss, _ = model.loss(batch, row_generators(0, 0, range(rows)))
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - begin)
    speeds = {name: rows / statistics.median(times[1:]) for name, times in seconds.items()}
    shown = ", ".join(f"{name} {speed:.0f} images/s" for name, speed in speeds.items())
    ratio = speeds["made once"] / speeds["encoded in every step"]
    side = images.size(2)
    print(f"{side} x {side}, {dtype}, latents {shown}: {ratio:.2f}x", flush=True)


def larger(run):
    """The run with pictures of twice the size, and one more level in its autoencoder."""
    a = run.model.autoencoder
    a = replace(a, image_size=2 * a.image_size, channels=(*a.channels, a.channels[-1]))
    return replace(run, model=replace(run.model, autoencoder=a))


def open_run(path: str):
    """(model, judge, prompts, asked for)."""
    opened = run_dir.open_run(path)
    opened.model.tokenizer = opened.tokenizer
    critic, _ = judge.load_or_train(opened.run.data.cache)
    asked = generated.prompts_of(opened.run.open_data())["letters and digits"][::3]
    return opened.model, critic, [f"{style} {name}" for style, name in asked], asked


@torch.inference_mode()
def samplers(path: str, guidance: float) -> None:
    model, critic, prompts, asked = open_run(path)
    real = judge.embed(critic, generated.real_drawings(asked))
    distances = {}
    for sampler, steps in (
        ("dpm++", 10),
        ("dpm++", 20),
        ("dpm++", 50),
        ("ddim", 20),
        ("ddim", 250),
    ):
        begin = time.perf_counter()
        images = sheets.illustrate(model, prompts, steps, sampler=sampler, guidance=guidance)
        seconds = time.perf_counter() - begin
        found = generated.frechet_distance(judge.embed(critic, images), real)
        distances[sampler, steps] = found
        print(f"{sampler}, {steps} steps: Frechet distance {found:.1f} of {len(images)} pictures, "
              f"{seconds:.0f} s", flush=True)  # fmt: skip
    ratio = distances["dpm++", 20] / distances["ddim", 250]
    print(f"dpm++ in 20 steps over ddim in 250: {ratio:.3f}")


@torch.inference_mode()
def guidances(path: str) -> None:
    model, critic, prompts, asked = open_run(path)
    styles, names = (list(column) for column in zip(*asked))
    for guidance in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0):
        images = sheets.illustrate(model, prompts, 20, sampler="dpm++", guidance=guidance)
        found = judge.prompt_following(critic, images, names, styles)
        text = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
        print(f"guidance {guidance:g}: {text}", flush=True)


def judges(cache: str, folds: int) -> None:
    found = []
    for fold in range(folds):
        _, scores = judge.load_or_train(cache, judge.JudgeConfig(fold=fold))
        found.append(scores["character"])
        text = ", ".join(f"{key} {value:.4f}" for key, value in scores.items())
        print(f"without part {fold}: {text}", flush=True)
    print(f"character, mean of {folds}: {statistics.mean(found):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("latents", "samplers", "guidance", "judge"))
    parser.add_argument("run", nargs="?", default="runs/text2image")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--folds", type=int, default=4)
    options, preset = parser.parse_args(), get_preset("text2image").run
    if options.what == "latents":
        device.keep_freed_memory()
        for run in (preset, larger(preset), larger(larger(preset))):
            latents(run, options.repeats)
    elif options.what == "judge":
        judges(preset.data.cache, options.folds)
    elif options.what == "samplers":
        samplers(options.run, options.guidance)
    else:
        guidances(options.run)
