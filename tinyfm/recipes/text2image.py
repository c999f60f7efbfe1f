"""The recipe of text-to-image: a denoiser between a CLIP's text tower and an autoencoder.

The two parts are other runs, trained first if they are not given.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from data import pictures
from tinyfm import tokenizer
from tinyfm.autoencoder import AutoencoderConfig
from tinyfm.batches.latents import LatentData
from tinyfm.batches.pairs import ImageConfig, PairConfig
from tinyfm.clip import CLIPConfig
from tinyfm.common import sheets
from tinyfm.common.config import RunPath
from tinyfm.ddpm import DiffusionConfig
from tinyfm.evaluate import generated
from tinyfm.recipes.autoencoder import AutoencoderRun
from tinyfm.recipes.base import OpenRun, Preset, Run, Scores
from tinyfm.recipes.clip import CLIPRun
from tinyfm.recipes.ddpm import loss_by_level
from tinyfm.recipes.drawing import DrawingRun
from tinyfm.recipes.pictures import part_of, save_sheet, to_images
from tinyfm.text2image import TextToImage, TextToImageConfig
from tinyfm.training import checkpoint
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TextToImageRun(DrawingRun):
    """Draw what a text says: diffusion between the text tower of a CLIP and an autoencoder."""

    model: TextToImageConfig = field(default_factory=TextToImageConfig)
    autoencoder: RunPath = ""  # run that supplies the autoencoder (default: train one first)
    # run that supplies the text tower and the tokenizer (default: train one first)
    clip: RunPath = ""

    family: ClassVar[str] = "text2image"
    PARTS: ClassVar[tuple[str, ...]] = ("autoencoder", "clip")
    SAMPLE_OPTIONS = frozenset({
        "prompt", "seed", "sampler", "steps", "guidance", "init_image", "strength", "mask",
        "upscale", "n", "out",
    })  # fmt: skip
    SHOWN_BY: ClassVar[dict[str, Any]] = {"steps": 20}
    ABOUT = DrawingRun.ABOUT._replace(library="diffusers")

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

    def score(self, model: TextToImage, data: LatentData) -> Scores:
        return loss_by_level(self, model, data)

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

    def take_parts(self, model: TextToImage, autoencoder: OpenRun, clip: OpenRun) -> None:
        """Copy the weights of trained parts into the model."""
        model.autoencoder.load_state_dict(autoencoder.model.state_dict())
        model.text_tower.load_state_dict(clip.model.text_tower.state_dict())

    # ---- the trained model ----------------------------------------------------------------------

    def sample(self, opened: OpenRun, options: Any) -> None:
        """Draw n pictures of --prompt, or change the picture that is given."""
        prompts = self.read_prompts(opened, options, self.model.clip.context_length)
        given = read_given(self.model, options.init_image, options.mask, options.upscale)
        if options.init_image:
            usual = 1.0 if options.mask else 0.6  # a masked part may be redrawn entirely
            given["strength"] = usual if options.strength is None else options.strength
        elif options.strength is not None:
            raise ValueError("--strength needs --init-image")
        sheet = sheets.prompted(
            opened.model,
            prompts,
            options.sampling.seed,
            steps=options.steps,
            sampler=options.sampler,
            guidance=self.guidance_of(options),
            **given,
        )
        save_sheet(sheet._replace(titles=()), options)  # all have the same prompt

    def measured_by(self, guidance: float) -> dict[str, Any]:
        return generated.denoising(guidance)


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
