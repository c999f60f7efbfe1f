"""Run types of models of pictures: what binds CLIP, autoencoder, diffusion, and the three together,
to the trainer."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from data.pictures import save_grid
from tinyfm import tokenizer
from tinyfm.autoencoder import ACTIVE, Autoencoder, AutoencoderConfig
from tinyfm.batches.latents import LatentConfig, LatentData
from tinyfm.batches.pairs import ImageConfig, ImageData, PairConfig, PairData
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.common import sheets
from tinyfm.common.seeds import row_generators
from tinyfm.ddpm import Diffusion, DiffusionConfig
from tinyfm.evaluate import zero_shot
from tinyfm.run import Run
from tinyfm.text2image import TextToImage, TextToImageConfig
from tinyfm.training import checkpoint


@dataclass(frozen=True, kw_only=True)
class CLIPRun(Run):
    """Align images with text, or images with themselves."""

    model: CLIPConfig = field(default_factory=CLIPConfig)
    data: PairConfig = field(default_factory=PairConfig)

    family: ClassVar[str] = "clip"
    TEMPLATES: ClassVar[str] = "templates.json"  # how the training captions are made of names
    QUICK: ClassVar[int] = 1000  # images that are enough to follow the training

    def build_model(self) -> CLIP:
        return CLIP(self.model)

    def open_data(self) -> PairData:
        m, c = self.model, self.train
        sizes = (m.image_size, m.channels, m.vocab_size, m.context_length)
        return PairData.prepare(self.data, *sizes, c.batch_size, c.seed)

    def write_files(self, folder: Path, data: PairData) -> None:
        super().write_files(folder, data)
        templates = json.dumps(zero_shot.find_templates(data.train))
        (folder / self.TEMPLATES).write_text(templates, encoding="utf-8")

    def get_ready(self, model: CLIP, data: PairData) -> None:
        model.n_pairs = len(data.train.labels)

    def score(self, model: CLIP, data: PairData) -> dict[str, float]:
        """Share of QUICK images of each held-out split whose name is found among the split's.

        With four captions a name; evaluate.py measures it in full. SimCLR, which has no texts:
        the share of which the nearest training image has the same name.
        """
        scores, simclr = {}, self.model.loss == "simclr"
        if simclr:
            known = zero_shot.image_features(model, data.train.images)[None]
        for name, split in list(data.splits.items())[1:]:
            rows = np.random.default_rng(0).permutation(len(split.labels))[: self.QUICK]
            labels = [split.labels[i] for i in np.sort(rows)]
            images = split.images[np.sort(rows)]
            if simclr:
                x = zero_shot.image_features(model, images)
                near = zero_shot.classify(x, known, model.scale()).tolist()
                right = [data.train.labels[i] == label for i, label in zip(near, labels)]
            else:
                x = zero_shot.embed_images(model, images)
                names, templates = sorted(set(split.labels)), zero_shot.find_templates(split)[:4]
                classes = zero_shot.class_vectors(model, data.tokenizer, names, templates)
                found = zero_shot.classify(x, classes, model.scale()).tolist()
                right = [names[i] == label for i, label in zip(found, labels)]
            key = f"{'neighbour' if simclr else 'zero_shot'} {name}"
            scores[re.sub(r"\W", "_", key)] = sum(right) / len(right)
        return scores

    def show(self, model: CLIP, data: PairData, folder: Path, step: int) -> str:
        """Write a grid of validation images with the names found; return the first few."""
        split, n = data.val, min(48, len(data.val.labels))
        rows = np.linspace(0, len(split.labels) - 1, n).astype(int)
        embed = zero_shot.embed_images
        if self.model.loss == "simclr":
            names, embed = data.train.labels, zero_shot.image_features
            classes = embed(model, data.train.images)[None]
        else:
            names = sorted(set(split.labels))
            templates = zero_shot.find_templates(split)[:4]
            classes = zero_shot.class_vectors(model, data.tokenizer, names, templates)
        x = embed(model, split.images[rows])
        found = [names[i] for i in zero_shot.classify(x, classes, model.scale()).tolist()]
        folder.mkdir(exist_ok=True)
        images = split.images[rows].transpose(0, 2, 3, 1)
        save_grid(images, folder / f"step-{step:06d}.png", 8, found)
        pairs = [f"{split.labels[rows[i]]} -> {found[i]}" for i in range(0, n, max(1, n // 3))]
        return f"--- step {step} names: " + "; ".join(pairs[:3])


@dataclass(frozen=True, kw_only=True)
class ImageRun(Run):
    """What all have: pictures in the size of the model; and no text, but for the last."""

    data: ImageConfig = field(default_factory=ImageConfig)

    def open_data(self) -> ImageData:
        m, c = self.model, self.train
        return ImageData.load(self.data, m.image_size, m.in_channels, c.batch_size, c.seed)

    def write_files(self, folder: Path, data: ImageData) -> None:
        """Nothing: config and weights are enough."""

    def read_tokenizer(self, folder: Path) -> None:
        return None

    @property
    def rows_at_once(self) -> int:
        return self.train.micro_batch_size or self.train.batch_size

    def parts_of_loss(self, model: nn.Module, data: ImageData) -> dict[str, float]:
        """Mean of what model.loss measures, over the same pictures and noise as val_loss."""
        device, sums, count = next(model.parameters()).device, Counter(), 0
        for batch in data.val_batches(self.rows_at_once):
            n = len(next(iter(batch.values())))
            generators = row_generators(self.train.seed, -1, range(count, count + n))
            _, metrics = model.loss({k: v.to(device) for k, v in batch.items()}, generators)
            sums.update({name: n * float(value) for name, value in metrics.items()})
            count += n
        return {name: total / count for name, total in sums.items()}

    def save(self, sheet: sheets.Sheet, folder: Path, step: int) -> str:
        """Write folder/step-NNNNNN.png; return a line on it."""
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:06d}.png"
        sheet.save(path)
        return f"--- step {step}: {sheet.about}: {path}"


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
class DDPMRun(ImageRun):
    """Make pictures from noise."""

    model: DiffusionConfig = field(default_factory=DiffusionConfig)

    family: ClassVar[str] = "ddpm"
    SHOWN: ClassVar[int] = 32

    def __post_init__(self):
        if self.model.d_context:
            raise ValueError(
                f"d_context is {self.model.d_context}, but this run's pictures come without a "
                "context: set --model.d-context 0"
            )

    def build_model(self) -> Diffusion:
        return Diffusion(self.model)

    def score(self, model: Diffusion, data: ImageData) -> dict[str, float]:
        """The validation loss by quarters of the noise level, from little noise to most."""
        parts = self.parts_of_loss(model, data)
        return {f"val_{name}": value for name, value in parts.items()}

    def show(self, model: Diffusion, data: ImageData, folder: Path, step: int) -> str:
        """Draw samples."""
        steps = min(20, self.model.diffusion_steps)
        return self.save(sheets.samples(model, self.SHOWN, "dpm++", steps, seed=0), folder, step)


@dataclass(frozen=True, kw_only=True)
class TextToImageRun(ImageRun):
    """Draw what a text says: diffusion between the text tower of a CLIP and an autoencoder."""

    model: TextToImageConfig = field(default_factory=TextToImageConfig)
    data: LatentConfig = field(default_factory=LatentConfig)
    autoencoder: str = ""  # run it takes the autoencoder from; trained first if not given
    clip: str = ""  # run it takes the text tower and the tokenizer from; trained first if not given

    family: ClassVar[str] = "text2image"
    needs: ClassVar[dict[str, str]] = {
        "autoencoder": "text2image-autoencoder",
        "clip": "text2image-clip",
    }
    SHOWN: ClassVar[int] = 32
    GUIDANCE: ClassVar[float] = 3.0

    def build_model(self) -> TextToImage:
        return TextToImage(self.model)

    def open_data(self) -> LatentData:
        a, c = self.model.autoencoder, self.model.clip
        sizes = (a.image_size, a.in_channels, c.vocab_size, c.context_length)
        own = tokenizer.load(checkpoint.find(self.clip))
        data = LatentData.prepare(self.data, *sizes, self.train.batch_size, self.train.seed, own)
        data.val_images = self.data.val_images
        return data

    write_files, read_tokenizer = Run.write_files, Run.read_tokenizer  # it reads text again
    score = DDPMRun.score  # by quarters of the noise level

    def get_ready(self, model: TextToImage, data: LatentData) -> None:
        model.tokenizer = data.tokenizer
        if self.data.cache_latents:
            data.encode_all(model, self.data)

    def show(self, model: TextToImage, data: LatentData, folder: Path, step: int) -> str:
        """Draw captions of the validation split."""
        rows = np.linspace(0, len(data.val.labels) - 1, self.SHOWN).astype(int)
        prompts = [data.val.captions[i][0] for i in rows]
        sheet = sheets.prompted(model, prompts, 20, guidance=self.GUIDANCE)
        return self.save(sheet, folder, step)
