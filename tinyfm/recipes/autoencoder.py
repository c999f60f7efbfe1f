"""The recipe of autoencoders: compress pictures, and classify them by their latents."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tinyfm.adapt.heads import Batch, Reader, count_places, in_places
from tinyfm.autoencoder import Autoencoder, AutoencoderConfig, count_active
from tinyfm.batches.pairs import ImageData
from tinyfm.common import sheets
from tinyfm.recipes.base import About, OpenRun, Preset, Run, Scores
from tinyfm.recipes.pictures import (
    ImageRun,
    PictureClassifyRun,
    mean_metrics,
    save_sheet,
    save_step_sheet,
)
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class AutoencoderRun(ImageRun):
    """Compress pictures into few numbers, and rebuild them."""

    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)

    family: ClassVar[str] = "autoencoder"
    SAMPLE_OPTIONS = frozenset({"seed", "n", "out"})
    ABOUT = About(
        library="diffusers",
        use="It turns pictures of the kind that it was trained on into few numbers and back, for "
        "a diffusion model that works on these.",
        limits="Other pictures come back blurred. Details that its loss does not weigh are lost.",
    )
    MEASURED: ClassVar[int] = 1000  # training pictures for the latents' mean and scale
    SHOWN: ClassVar[int] = 32

    def build_model(self) -> Autoencoder:
        return Autoencoder(self.model)

    def score(self, model: Autoencoder, data: ImageData) -> Scores:
        """The terms of the loss, in nats a picture, and the number of latents in use.

        Also measures the mean and scale of the latents: a checkpoint follows, and the model carries
        them into it together with its weights of this moment.
        """
        device = next(model.parameters()).device
        rows = self.train.micro_batch_size or self.train.batch_size
        train = data.fixed_batches("train", self.MEASURED, rows)
        model.measure_latents(batch["images"].to(device) for batch in train)
        terms = mean_metrics(self, model, data)
        means = [model.encode(b["images"].to(device))[0].float() for b in data.val_batches(rows)]
        active = count_active(torch.cat(means))
        return {
            "val_reconstruction": terms["reconstruction"],
            "val_kl": terms["kl"],
            "val_active": int(active),
            "latent_scale": float(model.latent_scale),
        }

    def show(self, model: Autoencoder, data: ImageData, folder: Path, step: int) -> str:
        """Draw validation pictures above their reconstructions."""
        images = next(data.val_batches(self.SHOWN))["images"]
        return save_step_sheet(sheets.reconstructions(model, images), folder, step)

    def sample(self, opened: OpenRun, options: Any) -> None:
        """Draw n held-out pictures, their reconstructions, samples from the prior, and a walk
        between two latents."""
        images = self.held_out_images(options)
        save_sheet(sheets.latent_space(opened.model, images, options.sampling.seed), options)


# ---- classification -----------------------------------------------------------------------------

GRID = 8  # rows and columns of places, at most


def latent_means(autoencoder: Autoencoder, batch: Batch) -> Tensor:
    """The means of the latents, over a coarse grid. images (B, C, H, W) -> (B, D)."""
    return in_places(autoencoder.encode(batch["images"])[0], GRID)


@dataclass(frozen=True, kw_only=True)
class AutoencoderClassifyRun(PictureClassifyRun):
    """Classify pictures by an autoencoder's latents."""

    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)

    family: ClassVar[str] = "autoencoder-classify"
    trunk_run: ClassVar[type[Run]] = AutoencoderRun
    reader: ClassVar[Reader] = Reader(
        read=latent_means,
        inputs=("images",),
        width=lambda c: c.latent_channels * count_places(c.image_size // c.factor, GRID),
        unread=("decoder",),
    )


RUNS = (AutoencoderRun, AutoencoderClassifyRun)

PRESETS = {
    "autoencoder": Preset(
        "pictures into a quarter as many numbers and back, on letters and symbols: three minutes",
        AutoencoderRun(
            model=AutoencoderConfig(beta_warmup_steps=100),
            optim=OptimConfig(lr=2e-3, warmup_steps=20, decay_fraction=0.6),
            train=TrainConfig(steps=500, batch_size=32, eval_every=125),
        ),
        usual="4.2, as one seed gave",
    ),
}
