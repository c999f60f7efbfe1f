"""The recipe of text-to-image: a denoiser between a CLIP's text tower and an autoencoder.

The two parts are runs of their own families, trained first if they are not given.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from data import pictures
from tinyfm import tokenizer
from tinyfm.autoencoder import AutoencoderConfig
from tinyfm.batches.latents import LatentConfig, LatentData
from tinyfm.batches.pairs import GLYPHS, ImageConfig, PairConfig
from tinyfm.clip import CLIPConfig
from tinyfm.common import sheets
from tinyfm.common.config import RunPath
from tinyfm.ddpm import DiffusionConfig
from tinyfm.evaluate import generated, judge
from tinyfm.recipes.autoencoder import AutoencoderRun
from tinyfm.recipes.base import About, OpenRun, Preset, Run, Scores
from tinyfm.recipes.clip import CLIPRun
from tinyfm.recipes.ddpm import loss_by_level
from tinyfm.recipes.pictures import (
    check_rows,
    part_of,
    save_sheet,
    save_step_sheet,
    spread_rows,
    to_images,
    warn_if_cut,
    warn_if_unseen,
    write_words,
)
from tinyfm.text2image import TextToImage, TextToImageConfig
from tinyfm.training import checkpoint
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TextToImageRun(Run):
    """Draw what a text says: diffusion between the text tower of a CLIP and an autoencoder."""

    model: TextToImageConfig = field(default_factory=TextToImageConfig)
    data: LatentConfig = field(default_factory=LatentConfig)
    autoencoder: RunPath = ""  # run that supplies the autoencoder (default: train one first)
    # run that supplies the text tower and the tokenizer (default: train one first)
    clip: RunPath = ""

    family: ClassVar[str] = "text2image"
    PARTS: ClassVar[tuple[str, ...]] = ("autoencoder", "clip")
    SAMPLE_OPTIONS = frozenset({
        "prompt", "seed", "sampler", "steps", "guidance", "init_image", "strength", "mask",
        "upscale", "n", "out",
    })  # fmt: skip
    SHOWN: ClassVar[int] = 32
    GUIDANCE: ClassVar[float] = 3.0
    ABOUT = About(
        task="text-to-image",
        library="diffusers",
        use="It draws what a caption of the kind in its training data says.",
        limits="It knows the words of its captions alone. Drawings may be wrong, or near to a "
        "training picture.",
    )

    def build_model(self) -> TextToImage:
        return TextToImage(self.model)

    def open_data(self) -> LatentData:
        autoencoder = self.model.autoencoder
        clip = self.model.clip
        sizes = (
            autoencoder.image_size,
            autoencoder.in_channels,
            clip.vocab_size,
            clip.context_length,
        )
        own = tokenizer.load(checkpoint.find(self.clip))
        data = LatentData.prepare(self.data, *sizes, self.train.batch_size, self.train.seed, own)
        data.val_images = self.data.val_images
        return data

    def get_ready(self, model: TextToImage, data: LatentData) -> None:
        model.tokenizer = data.tokenizer
        if self.data.cache_latents:
            data.encode_all(model, self.data)

    def write_files(self, folder: Path, data: LatentData) -> None:
        super().write_files(folder, data)
        if not self.init_from:  # the words of the base's captions are not known
            write_words(folder, data)

    def score(self, model: TextToImage, data: LatentData) -> Scores:
        return loss_by_level(self, model, data)

    def show(self, model: TextToImage, data: LatentData, folder: Path, step: int) -> str:
        """Draw captions of the validation split."""
        rows = spread_rows(len(data.val.labels), self.SHOWN)
        prompts = [data.val.captions[i][0] for i in rows]
        sheet = sheets.prompted(model, prompts, steps=20, guidance=self.GUIDANCE)
        return save_step_sheet(sheet, folder, step)

    # ---- the parts ------------------------------------------------------------------------------

    def with_parts(self, autoencoder: AutoencoderConfig, clip: CLIPConfig) -> TextToImageConfig:
        """The model's config for these parts: they determine the sizes of the denoiser."""
        diffusion = replace(
            self.model.diffusion,
            image_size=autoencoder.image_size // autoencoder.factor,
            in_channels=autoencoder.latent_channels,
            d_context=clip.text_width,
        )
        return TextToImageConfig(diffusion, autoencoder, clip)

    def part_run(self, option: str, usual: Run, given: dict[str, Any]) -> Run:
        """The run that trains a part, on pictures of the size that the autoencoder takes.

        usual: the preset of the part. given: the configs of the parts that are trained already.
        """
        autoencoder = given.get("autoencoder", self.model.autoencoder)
        data = {}
        model = {"image_size": autoencoder.image_size}
        channels = 3 if self.data.color else autoencoder.in_channels
        if option == "clip":
            data["template"] = self.data.template
            model["channels"] = channels
        else:
            model["in_channels"] = channels
            if self.data.color:
                usual = replace(usual, **COLOR)
                model["groups"] = (
                    1  # in small groups, normalisation would lose a plain paper's colour
                )
        return part_of(self, option, usual, model, data)

    def check_parts(self) -> None:
        check_rows(self)

    def take_parts(self, model: TextToImage, autoencoder: OpenRun, clip: OpenRun) -> None:
        """Copy the weights of trained parts into the model."""
        model.autoencoder.load_state_dict(autoencoder.model.state_dict())
        model.text_tower.load_state_dict(clip.model.text_tower.state_dict())

    # ---- the trained model ----------------------------------------------------------------------

    def sample(self, opened: OpenRun, options: Any) -> None:
        """Draw n pictures of --prompt, or change the picture that is given."""
        if not (options.prompt or "").strip():
            raise ValueError('say what to draw: --prompt "sans bold latin small letter a"')
        given = read_given(self.model, options.init_image, options.mask, options.upscale)
        if options.init_image:
            usual = 1.0 if options.mask else 0.6  # a masked part may be redrawn entirely
            given["strength"] = usual if options.strength is None else options.strength
        elif options.strength is not None:
            raise ValueError("--strength needs --init-image")
        opened.model.tokenizer = opened.tokenizer
        warn_if_cut(opened.tokenizer, [options.prompt], self.model.clip.context_length)
        if not options.adapter:  # an adapter may know further words
            warn_if_unseen(opened, [options.prompt])
        prompts = [options.prompt] * (options.n or 8)
        sheet = sheets.prompted(
            opened.model,
            prompts,
            options.sampling.seed,
            steps=options.steps,
            sampler=options.sampler,
            guidance=options.guidance,
            **given,
        )
        save_sheet(sheet._replace(titles=()), options)  # all have the same prompt

    def can_draw(self) -> bool:
        return self.data.path in GLYPHS

    def measure(
        self, opened: OpenRun, model: TextToImage, data: LatentData, options: Any
    ) -> Scores:
        """Share of drawings that a judge reads as their prompt, for data that it can read.

        --picture shows characters that were held out, drawn by the trained model.
        """
        if self.data.path not in GLYPHS:
            return {}
        judged_by = judge.config_of(options.judge_steps)
        how = generated.denoising(options.guidance)
        scores = generated.measure(model, data, self.data, how, judged_by, options.samples)
        if options.picture and model is opened.model:
            generated.draw_held_out(model, data, self.data.color, how, options.picture)
        return scores


# ---- pictures given to sample.py ----------------------------------------------------------------


def read_given(
    config: TextToImageConfig, init_image: str, mask: str, upscale: str
) -> dict[str, Tensor]:
    """Picture files as arguments of TextToImage.generate.

    init_images in the model's size; mask with 1 where the file is white; upscale, a small picture,
    in its own size. Raises ValueError for files that do not go together.
    """
    size = config.autoencoder.image_size
    channels = config.autoencoder.in_channels
    given = {}
    if init_image:
        given["init_images"] = to_images(pictures.read(init_image, size, channels))
    if mask:
        if not init_image:
            raise ValueError(f"--mask {mask} needs --init-image, the picture to redraw in part")
        w, h = pictures.size_of(mask)
        W, H = pictures.size_of(init_image)
        if (w, h) != (W, H):
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


RUNS = (TextToImageRun,)

# ---- presets ------------------------------------------------------------------------------------

# The parts, smaller than the presets for all glyphs.
AUTOENCODER = AutoencoderConfig(beta_warmup_steps=50)
CLIP = CLIPConfig(context_length=24, rivals="all", memory=2048, memory_after=360)
SMALL_CLIP = CLIPConfig(context_length=24)
# Changes to the autoencoder's run for letters in colour. Pictures differ most in their paper, and
# AdamW learns little else; Muon, which evens out the directions, learns the ink as well.
COLOR = {
    "optim": OptimConfig(lr=1e-3, kernels=True, warmup_steps=20, decay_fraction=0.6),
    "train": TrainConfig(steps=500, batch_size=32, eval_every=125),
}
DENOISER = DiffusionConfig(
    image_size=8,
    in_channels=4,
    channels=(64, 128),
    attend=(False, True),
    n_block=1,
    d_context=128,
    prediction="flow",
    clip=False,
)

PRESETS = {
    "text2image": Preset(
        "letters as a text says, with its text tower and autoencoder: thirteen minutes in all",
        TextToImageRun(
            model=TextToImageConfig(DENOISER, AUTOENCODER, CLIP),
            optim=OptimConfig(lr=2e-3, warmup_steps=50, ema_half_life=100, decay_fraction=0.5),
            train=TrainConfig(steps=2400, batch_size=64, eval_every=800),
        ),
        usual="0.21, as one seed gave",
    ),
    "text2image-autoencoder": Preset(
        "the first part of it: as autoencoder, on fewer pictures for fewer steps",
        AutoencoderRun(
            model=AUTOENCODER,
            data=ImageConfig(path="letters"),
            optim=OptimConfig(lr=2e-3, warmup_steps=20, decay_fraction=0.6),
            train=TrainConfig(steps=250, batch_size=32, eval_every=125),
        ),
    ),
    "text2image-clip": Preset(
        "the second part: as clip, on fewer pictures for fewer steps",
        CLIPRun(
            model=CLIP,
            data=PairConfig(path="letters", neighbours=16),
            optim=OptimConfig(lr=0.006, muon_lr=0.01, warmup_steps=20, decay_fraction=0.6),
            train=TrainConfig(steps=600, batch_size=256, eval_every=300),
        ),
    ),
    "text2image-small": Preset(
        "the same in a few minutes, less well: letters can be read, accents not always",
        TextToImageRun(
            model=TextToImageConfig(DENOISER, AUTOENCODER, SMALL_CLIP),
            optim=OptimConfig(lr=2e-3, warmup_steps=20, ema_half_life=40, decay_fraction=0.5),
            train=TrainConfig(steps=600, batch_size=64, eval_every=200),
        ),
    ),
    "text2image-small-autoencoder": Preset(
        "the first part of text2image-small",
        AutoencoderRun(
            model=AUTOENCODER,
            data=ImageConfig(path="letters"),
            optim=OptimConfig(lr=2e-3, warmup_steps=20, decay_fraction=0.6),
            train=TrainConfig(steps=100, batch_size=32, eval_every=50),
        ),
    ),
    "text2image-small-clip": Preset(
        "the second part of text2image-small",
        CLIPRun(
            model=SMALL_CLIP,
            data=PairConfig(path="letters"),
            optim=OptimConfig(lr=0.006, muon_lr=0.01, warmup_steps=20, decay_fraction=0.6),
            train=TrainConfig(steps=150, batch_size=128, eval_every=75),
        ),
    ),
}
