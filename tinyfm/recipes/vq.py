"""The recipe of vector-quantised autoencoders: pictures as integers, and their classes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from data import pictures
from tinyfm.adapt.heads import Batch, Reader, count_places, in_places
from tinyfm.batches.pairs import ImageConfig, ImageData
from tinyfm.common import sheets
from tinyfm.evaluate import generated, judge
from tinyfm.recipes.base import About, OpenRun, Preset, Run, Scores
from tinyfm.recipes.pictures import (
    ImageRun,
    PictureClassifyRun,
    mean_metrics,
    only_image,
    save_sheet,
    save_step_sheet,
    to_images,
)
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig
from tinyfm.vq import VQVAE, VQConfig, count_codes, perplexity


def code_scores(model: nn.Module, inputs: Iterable[Tensor]) -> Scores:
    """The perplexity of the codes of these inputs, and the number of codes without use, means over
    the codebooks of model.config."""
    device = next(model.parameters()).device
    c = model.config
    counts = sum(count_codes(model.encode(x.to(device)), c.n_code) for x in inputs)  # (Q, K)
    used_alike = [float(perplexity(own)) for own in counts]
    return {
        "val_perplexity": sum(used_alike) / len(used_alike),
        "val_unused": int((counts == 0).sum()) / len(counts),
    }


@dataclass(frozen=True, kw_only=True)
class VQRun(ImageRun):
    """Turn pictures into a few integers, and rebuild them."""

    model: VQConfig = field(default_factory=VQConfig)

    family: ClassVar[str] = "vq"
    SAMPLE_OPTIONS = frozenset({"seed", "image", "n", "out"})
    ABOUT = About(
        library="diffusers",
        use="It turns pictures of the kind that it was trained on into integers and back, for a "
        "language model that writes these.",
        limits="Other pictures come back blurred. Details that its loss does not weigh are lost.",
    )
    SHOWN: ClassVar[int] = 32

    def build_model(self) -> VQVAE:
        return VQVAE(self.model)

    def score(self, model: VQVAE, data: ImageData) -> Scores:
        """The terms of the loss, and of the validation pictures that are read (data.val_images) the
        perplexity of the codes and the number of codes without use, means over codebooks."""
        rows = self.train.micro_batch_size or self.train.batch_size
        scores = {f"val_{name}": mean for name, mean in mean_metrics(self, model, data).items()}
        return scores | code_scores(model, (b["images"] for b in data.val_batches(rows)))

    def show(self, model: VQVAE, data: ImageData, folder: Path, step: int) -> str:
        """Draw validation pictures above their reconstructions."""
        images = next(data.val_batches(self.SHOWN))["images"]
        return save_step_sheet(sheets.reconstructions(model, images), folder, step)

    def sample_form(self, options: Any) -> tuple[str, frozenset[str]]:
        if options.image:
            return "with --image", self.SAMPLE_OPTIONS - {"n", "seed"}
        return "", self.SAMPLE_OPTIONS

    def sample(self, opened: OpenRun, options: Any) -> None:
        """Draw n held-out pictures, or --image, above their reconstructions; print the codes of the
        first."""
        if options.image:
            size = (self.model.image_size, self.model.in_channels)
            images = to_images(pictures.read(only_image(options, "rebuild"), *size))
        else:
            images = self.held_out_images(options)
        with torch.no_grad():
            codes = opened.model.encode(images[:1].to(next(opened.model.parameters()).device))
        width = len(str(self.model.n_code - 1))
        for q, book in enumerate(codes[0].tolist()):
            print(f"codes of the first picture, codebook {q} of {self.model.n_book}:")
            for row in book:
                print(" ".join(f"{code:{width}}" for code in row))
        save_sheet(sheets.reconstructions(opened.model, images), options)

    def measure(self, opened: OpenRun, model: VQVAE, data: ImageData, options: Any) -> Scores:
        """What a judge reads in rebuilt test pictures and in real ones, if it can read them."""
        judged_by = judge.config_of(options.judge_steps)
        return generated.measure_rebuilt(model, data, self.data, judged_by, options.samples)


# ---- classification -----------------------------------------------------------------------------

GRID = 8  # rows and columns of places, at most


def code_vectors(vq: VQVAE, batch: Batch) -> Tensor:
    """The vectors of the codes, over a coarse grid. images (B, C, H, W) -> (B, D)."""
    e, *_ = vq.quantizer(vq.to_vectors(batch["images"]))
    return in_places(e, GRID)


@dataclass(frozen=True, kw_only=True)
class VQClassifyRun(PictureClassifyRun):
    """Classify pictures by the vectors of their codes."""

    model: VQConfig = field(default_factory=VQConfig)

    family: ClassVar[str] = "vq-classify"
    trunk_run: ClassVar[type[Run]] = VQRun
    reader: ClassVar[Reader] = Reader(
        read=code_vectors,
        inputs=("images",),
        width=lambda c: c.latent_channels * count_places(c.image_size // c.factor, GRID),
        unread=("decoder", "quantizer.codebooks"),
    )


RUNS = (VQRun, VQClassifyRun)

PRESETS = {
    "vq": Preset(
        "pictures into 64 integers and back, on letters: three minutes",
        VQRun(
            data=ImageConfig(path="letters"),
            optim=OptimConfig(lr=2e-3, warmup_steps=20, decay_fraction=0.6),
            train=TrainConfig(steps=600, batch_size=32, eval_every=300),
        ),
    ),
}
