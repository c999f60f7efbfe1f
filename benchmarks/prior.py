"""Why an autoencoder alone does not draw letters, and what diffusion adds.

    python benchmarks/prior.py RUN [--picture FILE] [--record]

RUN is a trained text2image run. The same decoder turns latents into pictures; what differs is where
the latents come from:

- the prior, N(0, 1) for each latent: what a VAE is sampled from;
- N(mean, variance) of each latent, over the letters and digits of training;
- one Gaussian with the mean and the covariance of all latents;
- the diffusion model, with the prompts of these letters and digits;
- the encoder, of the real drawings: the best that a decoder can do.

The Frechet distance is to the real drawings, in the features of the judge. Read: the share of
pictures to one character of which the judge gives a probability of 0.9 or more, in the style that
it finds likeliest; whether it is the right one is not asked, as noise has no prompt. --picture
writes the first drawings of each, and --record writes the table into README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import timing
from tinyfm.common import sheets
from tinyfm.evaluate import generated, judge
from tinyfm.evaluate.judge import CHARACTERS, STYLES, Judge, as_pixels, indices
from tinyfm.evaluate.metrics import Measured, proportion
from tinyfm.recipes import run_dir
from tinyfm.text2image import TextToImage

GUIDANCE = 3.0
SHOWN = 10  # pictures in a row
SURE = 0.9  # probability of a picture that is read


@torch.inference_mode()
def draw(model: TextToImage, real: Tensor, captions: list[str]) -> dict[str, Tensor]:
    """Where the latents come from -> pictures (B, 1, H, W) in [-1, 1], as many as real ones."""
    autoencoder = model.autoencoder
    z = model.encode_images(real)  # (B, Z, h, w), standardised
    shape = z.shape[1:]
    noise = sheets.noise(shape, len(z), seed=0)
    flat = z.flatten(1).double()
    mean = flat.mean(0)
    # A covariance of few pictures has directions without any variance, so no Cholesky factor.
    values, vectors = torch.linalg.eigh(flat.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    independent = mean + noise.flatten(1) * flat.std(0)
    joint = mean + noise.flatten(1).double() @ root

    def decode(latents: Tensor) -> Tensor:
        parts = latents.float().view(-1, *shape).split(sheets.AT_ONCE)
        return torch.cat([model.decode(part) for part in parts])

    options = {"sampler": generated.SAMPLER, "guidance": GUIDANCE}
    return {
        "the prior": decode(autoencoder.standardise(noise)),
        "a Gaussian for each latent": decode(independent),
        "one Gaussian for all": decode(joint),
        "the diffusion model": sheets.illustrate(model, captions, generated.STEPS, **options),
        "the encoder, of real drawings": decode(z),
    }


@torch.inference_mode()
def share_read(network: Judge, images: Tensor, names: Sequence[str] = CHARACTERS) -> Measured:
    """Share of pictures that the judge is sure to read, as one of these names."""
    features = judge.embed(network, images)
    styles = network.style(features)[:, : len(STYLES)].argmax(1)
    logits = network.read(features, styles)[:, indices(names, network.names)]
    sure = logits.softmax(1).amax(1) >= SURE
    return proportion(sure.numpy(), "pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a trained text2image run")
    parser.add_argument("--picture", help="a PNG file to write")
    parser.add_argument("--record", action="store_true", help="write the table into README.md")
    options = parser.parse_args()
    opened = run_dir.open_run(options.run)
    model = opened.model
    model.tokenizer = opened.tokenizer
    network, _ = judge.load_or_train(opened.run.data.cache)
    prompts = generated.prompts_of(opened.run.open_data())["letters and digits"]
    real = as_pixels(generated.real_drawings(prompts), 1)
    drawn = draw(model, real, [f"{style} {name}" for style, name in prompts])

    lines = ["| latents from | Frechet distance | read by the judge |", "|---|---|---|"]
    features = judge.embed(network, real)
    for name, images in drawn.items():
        distance = generated.measured_distance(judge.embed(network, images), features)
        read = share_read(network, images)
        cells = [f"{distance:.0f} ({distance.low:.0f} to {distance.high:.0f})"]
        cells.append(f"{read:.0%} ({read.low:.0%} to {read.high:.0%})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = f"{timing.describe_machine()}; {len(real):,} pictures each\n\n" + "\n".join(lines) + "\n"
    print(text)
    if options.picture:
        chosen = np.random.default_rng(0).permutation(len(real))[:SHOWN]
        titles = [name if i == 0 else "" for name in drawn for i in range(SHOWN)]
        rows = torch.cat([images[chosen] for images in drawn.values()])
        sheets.Sheet(rows, SHOWN, "where the latents come from", tuple(titles)).save(
            options.picture
        )
    if options.record:
        timing.record("prior", text)


if __name__ == "__main__":
    main()
