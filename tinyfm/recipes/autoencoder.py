"""TODO."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from tinyfm.autoencoder import ACTIVE, Autoencoder, AutoencoderConfig
from tinyfm.batches.pairs import ImageData
from tinyfm.common import sheets
from tinyfm.recipes import base
from tinyfm.recipes.base import ImageRun, Run, write_png
from tinyfm.recipes.classify import PictureClassifyRun


@dataclass(frozen=True, kw_only=True)
class AutoencoderRun(ImageRun):
    """Squeeze pictures into few numbers, and rebuild them."""

    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)

    family: ClassVar[str] = "autoencoder"
    MEASURED: ClassVar[int] = 1000  # training pictures whose latents give their mean and scale
    SHOWN: ClassVar[int] = 32

    def build_model(self) -> Autoencoder:
        return Autoencoder(self.model)

    def score(self, model: Autoencoder, data: ImageData) -> dict[str, float]:
        """The terms of the loss apart, in nats a picture, and how many latents are in use.

        The mean and scale of the latents are measured here as well, as a checkpoint follows: the
        model carries them into it, with its weights of this moment.
        """
        device, rows = next(model.parameters()).device, self.rows_at_once
        train = data.fixed_batches("train", self.MEASURED, rows)
        model.measure_latents(batch["images"].to(device) for batch in train)
        terms = self.parts_of_loss(model, data)
        means = torch.cat([
            model.encode(batch["images"].to(device))[0].float() for batch in data.val_batches(rows)
        ])  # fmt: skip
        active = (means.var(dim=0, correction=0) > ACTIVE).sum()
        scores = {f"val_{name}": terms[name] for name in ("reconstruction", "kl")}
        return scores | {"val_active": int(active), "latent_scale": float(model.latent_scale)}

    def show(self, model: Autoencoder, data: ImageData, folder: Path, step: int) -> str:
        """Draw validation pictures and their reconstructions."""
        images = next(data.val_batches(self.SHOWN))["images"]
        return self.save(sheets.reconstructions(model, images), folder, step)


@dataclass(frozen=True, kw_only=True)
class AutoencoderClassifyRun(PictureClassifyRun):
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)

    family: ClassVar[str] = "autoencoder-classify"
    trunk_run: ClassVar[type[Run]] = AutoencoderRun


def walk(opened: base.OpenRun, options) -> None:
    """n held-out pictures, what the model makes of them, and what lies between their codes."""
    val, seed = opened.run.open_data().val, options.sampling.seed
    chosen = np.random.default_rng(seed).permutation(len(val.labels))[: options.n or 8]
    write_png(sheets.latent_space(opened.model, val.batch(chosen)["images"], seed), options)
