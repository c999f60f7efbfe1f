"""Run types of models of pictures: what binds CLIP, autoencoder, diffusion, and the three together,
to the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from data import captioned, pictures
from data.report import Report
from tinyfm import tokenizer
from tinyfm.autoencoder import AutoencoderConfig
from tinyfm.batches.latents import LatentConfig, LatentData
from tinyfm.batches.pairs import GLYPHS
from tinyfm.clip import CLIPConfig
from tinyfm.common import sheets
from tinyfm.recipes import base
from tinyfm.recipes.base import ImageRun, Run, write_png
from tinyfm.recipes.ddpm import DDPMRun
from tinyfm.text2image import TextToImage, TextToImageConfig
from tinyfm.training import checkpoint
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig


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


LETTERS = {  # the parts of text2image, smaller than the runs on all glyphs
    "autoencoder": AutoencoderConfig(beta_warmup_steps=50),
    "clip": CLIPConfig(context_length=24, rivals="all", memory=2048, memory_after=360),
}
COLOR = {  # text2image-autoencoder's, for letters in colour: what differs most is the paper, and
    # AdamW learns little else; Muon, which evens the directions out, learns the ink as well
    "optim": OptimConfig(lr=1e-3, kernels=True, warmup_steps=20, decay_fraction=0.6),
    "train": TrainConfig(steps=500, batch_size=32, eval_every=125),
}


def part_run(run: Run, option: str) -> Run:
    """The run of a part, on the same pictures, device and seed. Its `out` is a new one, or goes
    on."""
    from tinyfm.recipes import registry

    part, out = registry.get_preset(run.needs[option]).run, f"{run.out}-{option}"
    same = {name: getattr(run.data, name) for name in ("path", "color", "val_fraction", "cache")}
    same |= {"template": run.data.template} if option == "clip" else {}
    where = {name: getattr(run.train, name) for name in ("seed", "device", "dtype")}
    channels = "channels" if option == "clip" else "in_channels"
    sizes = {"image_size": run.model.autoencoder.image_size,
             channels: 3 if run.data.color else run.model.autoencoder.in_channels}  # fmt: skip
    if run.data.color and option == "autoencoder":
        part = replace(part, **COLOR)
        sizes["groups"] = 1  # normalised in small groups, a plain paper loses its colour
    return replace(
        part, model=replace(part.model, **sizes), data=replace(part.data, **same),
        train=replace(part.train, **where), out=out, resume=Path(out).exists(),
    )  # fmt: skip


def training_rows(run: Run) -> int:
    """How many of one's own pictures a run will train on, if all are good. Raises ValueError if
    there are none, or none with the captions it needs."""
    found = len(captioned.pairs(run.data.path, Report(), run.data.template))
    return found - max(2, round(run.data.val_fraction * found))


def fit_batch(part: Run) -> Run:
    """The run of a part, on few pictures of one's own in batches that are halved until two of them
    are there. Raises ValueError as `training_rows` does."""
    if part.data.path in GLYPHS:
        return part
    rows, batch_size = training_rows(part), part.train.batch_size
    while batch_size > max(2, rows // 2):
        batch_size //= 2
    return replace(part, train=replace(part.train, batch_size=batch_size))


def check_batch(run: Run) -> None:
    """Raise ValueError if one's own pictures do not fill a batch: before any part is trained."""
    if run.data.path in GLYPHS:
        return
    if 2 <= (rows := training_rows(run)) < run.train.batch_size:
        advice = f"use --train.batch-size <= {rows}, or add pairs"
        raise ValueError(f"{rows} training pictures, {run.train.batch_size} in a batch: {advice}")


def fit(run: Run, autoencoder, clip) -> Run:
    """The run with the configs of its parts, the denoiser's sizes following from theirs."""
    sizes = {"image_size": autoencoder.image_size // autoencoder.factor,
             "in_channels": autoencoder.latent_channels, "d_context": clip.text_width}  # fmt: skip
    diffusion = replace(run.model.diffusion, **sizes)
    return replace(run, model=type(run.model)(diffusion, autoencoder, clip))


def illustrate(opened: base.OpenRun, options) -> None:
    """n pictures of what the prompt says, made of a picture if one is given."""
    if not (options.prompt or "").strip():
        raise ValueError('say what to draw: --prompt "sans bold latin small letter a"')
    given = read_given(opened.run.model, options.init_image, options.mask, options.upscale)
    if options.init_image:
        whole = 1.0 if options.mask else 0.6  # of a masked part nothing need be left
        given["strength"] = whole if options.strength is None else options.strength
    elif options.strength is not None:
        raise ValueError("--strength says how much to change of --init-image, which lacks")
    opened.model.tokenizer = opened.tokenizer
    base.tell_cut(opened.tokenizer, [options.prompt], opened.run.model.clip.context_length)
    prompts = [options.prompt] * (options.n or 8)
    how = {"sampler": options.sampler, "guidance": options.guidance, **given}
    sheet = sheets.prompted(opened.model, prompts, options.steps, options.sampling.seed, **how)
    write_png(sheet._replace(titles=()), options)  # the prompt of all


def to_images(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, C) -> (1, C, H, W) in [-1, 1]."""
    return torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1


def read_given(config, init_image: str, mask: str, upscale: str) -> dict[str, Tensor]:
    """Files as TextToImage.generate takes them: init_images in the model's size, what a mask has
    white as 1, a small picture as it is. Raises ValueError for files that do not go together."""
    size, channels = config.autoencoder.image_size, config.autoencoder.in_channels
    given = {}
    if init_image:
        given["init_images"] = to_images(pictures.read(init_image, size, channels))
    if mask:
        if not init_image:
            raise ValueError(f"--mask {mask} says what to draw anew of --init-image, which lacks")
        sides = [pictures.size_of(path) for path in (mask, init_image)]
        if sides[0] != sides[1]:
            (w, h), (W, H) = sides
            raise ValueError(f"--mask is {w} x {h} pixels, --init-image {W} x {H}; make them equal")
        given["mask"] = (to_images(pictures.read(mask, size, 1)) > 0).float()
    if upscale:
        if init_image:
            raise ValueError(f"--upscale {upscale} goes without --init-image; leave one out")
        width, height = pictures.size_of(upscale)
        if width != height or size % width:
            sizes = " or ".join(f"{size // k} x {size // k}" for k in (4, 2))
            raise ValueError(f"--upscale is {width} x {height} pixels; give {sizes}")
        given["upscale"] = to_images(pictures.read(upscale, width, channels))
    return given
