"""Pictures of what an image model has learnt, row by row.

All randomness comes from `seed`, a stream a picture: picture i stays the same however many are
drawn. Letters: B pictures, C channels, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data import pictures
from tinyfm.common.seeds import row_generators

AT_ONCE = 64  # pictures that a diffusion model draws at a time: more only takes memory
FILMED, MOMENTS = 8, 10  # most samples in a film, and most moments of each


class Sheet(NamedTuple):
    """Pictures in rows."""

    images: Tensor  # (B, C, H, W), shown from -1, black, to 1, white
    columns: int
    about: str  # which rows are what
    titles: tuple[str, ...] = ()  # one a picture; with them small pictures are enlarged

    def save(self, path: str | Path) -> None:
        """Write it as a PNG; a single picture without a frame, to go on from."""
        levels = (self.images.float().cpu().clamp(-1, 1) + 1) * 127.5
        pixels = levels.round().byte().permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
        if len(pixels) == 1 and not self.titles:
            pictures.save(pixels[0], path)
        else:
            pictures.save_grid(pixels, path, self.columns, self.titles)


def noise(shape: Iterable[int], n: int, seed: int) -> Tensor:
    """Standard normal (n, *shape), row i from its own stream."""
    shape = tuple(shape)
    return torch.stack([torch.randn(shape, generator=g) for g in row_generators(seed, 0, range(n))])


def in_parts(n: int) -> list[range]:
    """0 .. n - 1, AT_ONCE at a time."""
    return [range(first, min(n, first + AT_ONCE)) for first in range(0, n, AT_ONCE)]


# ---- the autoencoder ----------------------------------------------------------------------------


@torch.no_grad()
def reconstructions(model: nn.Module, images: Tensor) -> Sheet:
    """Rows of 8 of `images` (B, C, H, W), each row above what the model makes of it.

    What does not fill a row is left out, but for the only one.
    """
    columns = min(8, len(images))
    images = images[: len(images) // columns * columns]
    rebuilt = model.decode(model.encode(images.to(next(model.parameters()).device))[0])
    pairs = zip(images.split(columns), rebuilt.float().cpu().split(columns))
    rows = torch.cat([row for pair in pairs for row in pair])
    return Sheet(rows, columns, "originals above their reconstructions")


@torch.no_grad()
def latent_space(model: nn.Module, images: Tensor, seed: int) -> Sheet:
    """`images` (B, C, H, W), what the model makes of them, B draws from the prior, and B steps from
    the first one's latent to the last one's.

    A plain autoencoder has no prior: noise of its latents' mean and scale stands in for it.
    """
    n, device = len(images), next(model.parameters()).device
    mean = model.encode(images.to(device))[0].float()
    drawn, source = noise(mean.shape[1:], n, seed).to(device), "the prior"
    if not model.config.variational:
        drawn, source = model.restore(drawn), "noise, as there is no prior"
    way = torch.linspace(0, 1, n, device=device)[:, None, None, None]
    z = torch.cat((mean, drawn, torch.lerp(mean[:1], mean[-1:], way)))
    rows = ("originals", "reconstructions", f"samples from {source}", "from the first to the last")
    titles = tuple(text for row in rows for text in (row, *[""] * (n - 1)))
    images = torch.cat((images, model.decode(z).float().cpu()))
    return Sheet(images, n, f"rows: {'; '.join(rows)}", titles)


# ---- diffusion ----------------------------------------------------------------------------------


def samples(model: nn.Module, n: int, sampler: str, steps: int, seed: int) -> Sheet:
    """n pictures in rows of 8. Raises ValueError for a sampler or steps that the model has not."""
    drawn = [
        model.sample(len(part), steps, sampler, generators=row_generators(seed, 0, part))
        for part in in_parts(n)
    ]
    return Sheet(torch.cat(drawn), min(8, n), f"{n} samples by {sampler} in {steps} steps")


def film(model: nn.Module, n: int, sampler: str, steps: int, seed: int) -> Sheet:
    """The first of those pictures, a row each, as they lose their noise. Raises ValueError as
    `samples` does."""
    n, moments = min(n, FILMED), min(MOMENTS, steps + 1)
    generators = row_generators(seed, 0, range(n))
    states = model.sample(n, steps, sampler, generators=generators, film=True)  # (S + 1, B, ...)
    shown = np.linspace(0, steps, moments).round().astype(int).tolist()
    titles = tuple(f"after {i} of {steps}" for i in shown) * n
    about = f"{n} samples, a row each, after {', '.join(map(str, shown))} of {steps} steps"
    return Sheet(states[shown].transpose(0, 1).flatten(0, 1), moments, about, titles)


# ---- text to image ------------------------------------------------------------------------------


def illustrate(
    model: nn.Module, prompts: Sequence[str], steps: int, seed: int = 0, **how
) -> Tensor:
    """A picture (B, C, H, W) for each prompt. how: options of TextToImage.generate, as its errors
    are."""
    drawn = [
        model.generate([prompts[i] for i in part], steps=steps,
                       generators=row_generators(seed, 0, part), **how)
        for part in in_parts(len(prompts))
    ]  # fmt: skip
    return torch.cat(drawn).cpu()


def prompted(model: nn.Module, prompts: Sequence[str], steps: int, seed: int = 0, **how) -> Sheet:
    """The pictures of `illustrate` in rows of 8, with their prompts."""
    images = illustrate(model, prompts, steps, seed, **how)
    about = f"{len(prompts)} picture{'s' * (len(prompts) > 1)} in {steps} steps"
    return Sheet(images, min(8, len(prompts)), about, tuple(prompts))
