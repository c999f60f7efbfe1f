"""Sheets of pictures that show what an image model has learnt, row by row.

All randomness comes from `seed`, with one random stream per picture: picture i is the same however
many are drawn. Letters: B pictures, C channels, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data import pictures
from data.report import counted
from tinyfm.common.seeds import row_generators

AT_ONCE = 64  # pictures that a diffusion model draws at a time; more would only take memory
FILMED = 8  # most samples in a film
MOMENTS = 10  # most moments of each sample in a film


class Sheet(NamedTuple):
    """Pictures in rows."""

    images: Tensor  # (B, C, H, W) from -1, black, to 1, white
    columns: int
    about: str  # what the rows are
    titles: tuple[str, ...] = ()  # one per picture; small pictures with titles are enlarged

    def save(self, path: str | Path) -> None:
        """Write the sheet as a PNG; a single picture has no frame, so it can be an input again."""
        levels = (self.images.float().cpu().clamp(-1, 1) + 1) * 127.5
        pixels = levels.round().byte().permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
        if len(pixels) == 1 and not self.titles:
            pictures.save(pixels[0], path)
        else:
            pictures.save_grid(pixels, path, self.columns, self.titles)


def noise(shape: Iterable[int], n: int, seed: int) -> Tensor:
    """Standard normal noise (n, *shape); row i comes from its own stream."""
    shape = tuple(shape)
    return torch.stack([torch.randn(shape, generator=g) for g in row_generators(seed, 0, range(n))])


def split_range(n: int) -> list[range]:
    """The numbers 0 .. n - 1, AT_ONCE at a time."""
    return [range(first, min(n, first + AT_ONCE)) for first in range(0, n, AT_ONCE)]


# ---- autoencoders -------------------------------------------------------------------------------


@torch.no_grad()
def reconstructions(model: nn.Module, images: Tensor) -> Sheet:
    """`images` (B, C, H, W) in rows of 8, each row above its reconstructions.

    White pictures fill up the last row.
    """
    device = next(model.parameters()).device
    columns = min(8, len(images))
    rebuilt = model.rebuild(images.to(device)).float().cpu()
    rows = []
    for originals, copies in zip(images.split(columns), rebuilt.split(columns)):
        blank = originals.new_ones(columns - len(originals), *originals.shape[1:])
        rows += [originals, blank, copies, blank]
    return Sheet(torch.cat(rows), columns, "originals above their reconstructions")


@torch.no_grad()
def latent_space(model: nn.Module, images: Tensor, seed: int) -> Sheet:
    """Four rows: `images` (B, C, H, W), their reconstructions, B samples from the prior, and B
    steps from the latent of the first image to that of the last.

    A plain autoencoder has no prior; noise with the mean and scale of its latents replaces it.
    """
    n = len(images)
    device = next(model.parameters()).device
    mean = model.encode(images.to(device))[0].float()

    # Samples.
    drawn = noise(mean.shape[1:], n, seed).to(device)
    source = "the prior"
    if not model.config.variational:
        drawn = model.restore(drawn)
        source = "noise, as there is no prior"

    # The way from the first latent to the last.
    t = torch.linspace(0, 1, n, device=device)[:, None, None, None]
    between = torch.lerp(mean[:1], mean[-1:], t)

    decoded = model.decode(torch.cat((mean, drawn, between))).float().cpu()
    rows = ("originals", "reconstructions", f"samples from {source}", "from the first to the last")
    titles = []
    for row in rows:  # the title of a row is that of its first picture
        titles += [row] + [""] * (n - 1)
    return Sheet(torch.cat((images, decoded)), n, f"rows: {'; '.join(rows)}", tuple(titles))


# ---- diffusion ----------------------------------------------------------------------------------


def samples(model: nn.Module, n: int, sampler: str, steps: int, seed: int) -> Sheet:
    """n samples in rows of 8. Raises ValueError if the model does not have the sampler or steps."""
    drawn = [
        model.sample(len(part), steps, sampler, generators=row_generators(seed, 0, part))
        for part in split_range(n)
    ]
    about = f"{counted(n, 'samples')} by {sampler} in {counted(steps, 'steps')}"
    return Sheet(torch.cat(drawn), min(8, n), about)


def film(model: nn.Module, n: int, sampler: str, steps: int, seed: int) -> Sheet:
    """The first pictures of `samples`, one per row, as they lose their noise.

    Raises ValueError as `samples` does.
    """
    n = min(n, FILMED)
    moments = min(MOMENTS, steps + 1)
    generators = row_generators(seed, 0, range(n))
    states = model.sample(n, steps, sampler, generators=generators, film=True)  # (S + 1, B, ...)
    shown = np.linspace(0, steps, moments).round().astype(int).tolist()
    titles = tuple(f"after {i} of {steps}" for i in shown) * n
    after = ", ".join(map(str, shown))
    about = f"{counted(n, 'samples')}, a row each, after {after} of {counted(steps, 'steps')}"
    images = states[shown].transpose(0, 1).flatten(0, 1)  # the moments of a sample are a row
    return Sheet(images, moments, about, titles)


# ---- text to image ------------------------------------------------------------------------------


def illustrate(model: nn.Module, prompts: Sequence[str], seed: int = 0, **options) -> Tensor:
    """One picture per prompt, (B, C, H, W) on the CPU.

    options: those of the model's `generate`. Raises ValueError as it does.
    """
    drawn = []
    for part in split_range(len(prompts)):
        generators = row_generators(seed, 0, part)
        texts = [prompts[i] for i in part]
        drawn.append(model.generate(texts, generators=generators, **options))
    return torch.cat(drawn).cpu()


def prompted(model: nn.Module, prompts: Sequence[str], seed: int = 0, **options) -> Sheet:
    """The pictures of `illustrate` in rows of 8, with their prompts as titles."""
    images = illustrate(model, prompts, seed, **options)
    about = counted(len(prompts), "pictures")
    if "steps" in options:
        about += f" in {counted(options['steps'], 'steps')}"
    return Sheet(images, min(8, len(prompts)), about, tuple(prompts))
