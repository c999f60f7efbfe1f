"""Features: what a body trained for something else makes of an example, as one vector.

Pretraining names no classes, yet its states tell many things apart. Where to read them depends on
the family; the table READERS has an entry for each:

    GPT           states of the last layer, the mean over a text's tokens; padding does not count
    CLIP          the image tower's states before the projection: of the class token, and of patches
    Autoencoder   the latents' means
    Diffusion     the U-Net's middle, looking for noise (Baranchuk et al. 2022; Xiang et al. 2023):
                  to remove it, one must know what is drawn; none is added, so nothing is random

A picture's features keep where things are, a mean for each place of a coarse grid: R differs from P
in one place.

Letters: B batch, T tokens, D width of the features, C channels, H W rows and columns, P patches.
Left out: features of text towers, of several layers at once, of diffusion with a context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tinyfm.autoencoder import Autoencoder
from tinyfm.clip import CLIP
from tinyfm.ddpm import Diffusion, level
from tinyfm.gpt import GPT

PATCH_GRID, LATENT_GRID, MIDDLE_GRID = 4, 8, 4  # rows and columns of places, at most
NOISE = 0.3  # share of the way to pure noise that the U-Net is told

Batch = dict[str, Tensor]


def in_places(x: Tensor, grid: int) -> Tensor:
    """Channels (B, C, H, W) -> (B, C places), means over grid x grid places, or H x W if fewer."""
    return F.adaptive_avg_pool2d(x, (min(grid, x.size(2)), min(grid, x.size(3)))).flatten(1)


def count_places(rows: int, grid: int) -> int:
    """How many places `in_places` makes of so many rows and columns."""
    return min(grid, rows) ** 2


def read_tokens(gpt: GPT, batch: Batch) -> Tensor:
    """tokens (B, T), of which those count where mask (B, T) is True -> (B, D)."""
    states, real = gpt.hidden(batch["tokens"]).float(), batch["mask"][..., None]
    return (states * real).sum(1) / real.sum(1).clamp(min=1)


def read_patches(clip: CLIP, batch: Batch) -> Tensor:
    """images (B, C, H, W) -> (B, D): the class token's state, then those of the patches."""
    x = clip.image_tower.states(batch["images"])  # (B, P + 1, D of the tower)
    rows = clip.config.image_size // clip.config.patch_size
    patches = rearrange(x[:, 1:], "B (h w) D -> B D h w", h=rows)
    return torch.cat((x[:, 0], in_places(patches, PATCH_GRID)), dim=1)


def read_latents(autoencoder: Autoencoder, batch: Batch) -> Tensor:
    """images (B, C, H, W) -> (B, D): the means of the latents."""
    return in_places(autoencoder.encode(batch["images"])[0], LATENT_GRID)


def read_middle(diffusion: Diffusion, batch: Batch) -> Tensor:
    """images (B, C, H, W) -> (B, D): the way down of the U-Net, without the way up."""
    images = batch["images"]
    share = torch.full((len(images),), NOISE, dtype=torch.double)
    t, alpha, _ = (n.float().to(images.device) for n in level(diffusion.config, share))
    middle, _, _ = diffusion.unet.way_down(alpha[:, None, None, None] * images, t)
    return in_places(middle, MIDDLE_GRID)


class Reader(NamedTuple):
    """How a family gives features."""

    read: Callable[[nn.Module, Batch], Tensor]
    inputs: tuple[str, ...]  # what it needs of a batch
    width: Callable[[Any], int]  # D, from the body's config
    unread: tuple[str, ...]  # modules and parameters of the body on which they do not depend


READERS: dict[type, Reader] = {
    GPT: Reader(read_tokens, ("tokens", "mask"), lambda c: c.d_model, ("head",)),
    CLIP: Reader(
        read_patches, ("images",),
        lambda c: c.image_width * (1 + count_places(c.image_size // c.patch_size, PATCH_GRID)),
        ("image_projection", "text_tower", "text_projection", "logit_scale", "logit_bias"),
    ),
    Autoencoder: Reader(
        read_latents, ("images",),
        lambda c: c.latent_channels * count_places(c.image_size // c.factor, LATENT_GRID),
        ("decoder",),
    ),
    Diffusion: Reader(
        read_middle, ("images",),
        lambda c: c.channels[-1] * count_places(c.image_size // c.factor, MIDDLE_GRID),
        ("unet.up", "unet.norm", "unet.conv_out"),
    ),
}  # fmt: skip


def find_reader(body: nn.Module) -> Reader:
    """Raises ValueError for a body that has none, or that reads a context beside images."""
    if type(body) not in READERS:
        known = ", ".join(kind.__name__ for kind in READERS)
        raise ValueError(f"a {type(body).__name__} gives no features: use one of {known}")
    if width := getattr(body.config, "d_context", 0):
        raise ValueError(
            f"this diffusion model reads a context of width {width} beside images: classify with "
            "one trained on images alone"
        )
    return READERS[type(body)]
