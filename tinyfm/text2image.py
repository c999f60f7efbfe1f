"""Text-to-image: three models, trained separately, form a system that draws what a text says.

    prompt -> tokens -> text tower (clip.py) -> context: the states of all tokens
    noise, context -> U-Net, step by step (ddpm.py) -> latent -> decoder (autoencoder.py) -> image

This is latent diffusion (Rombach et al. 2022). CLIP's training has taught the text tower which text
belongs to which image, and the autoencoder compresses any image. Both stay frozen; only the
denoiser between them is trained.

Editing. The trained model can also change an image, fill a hole in it, or enlarge it, without more
training. A sampler only needs a function denoise(x, t, alpha, sigma) -> (x_0, eps). We can correct
its estimate x_0 with what is known of the image, and compute eps = (x - alpha x_0) / sigma from it:

    image-to-image    start in the middle of the path, at x = alpha z + sigma eps, where z is the
                      latent of the image; fewer remaining steps change less (SDEdit, Meng et al.
                      2022)
    inpainting        set x_0 = z where the image is known; the rest then adapts to it (Blended
                      Latent Diffusion, Avrahami et al. 2023)
    super-resolution  replace x_0 by x_0 + E(y) - E(D(x_0)). D decodes and E encodes; y is D(x_0)
                      with the mean of each block of pixels moved to the pixel of the small image
                      (similar to ILVR, Choi et al. 2021)

A latent keeps an image only approximately, so the known pixels replace the drawn ones at the end.

Letters: B batch, T tokens, D width of the text tower, C channels, H W rows and columns, Z latent
channels, h w rows and columns of a latent or of a small image. Left out: several text towers;
denoisers that were trained to read a mask or a small image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfm.autoencoder import Autoencoder, AutoencoderConfig, reparameterise
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.ddpm import (
    Denoise,
    Diffusion,
    DiffusionConfig,
    NoisePath,
    evaluation_mode,
    gaussian_noise,
    last,
    new_generators,
    q_sample,
)
from tinyfm.tokenizer import encode_captions
from tinyfm.tokenizer import load as load_tokenizer
from tinyfm.unet import check_images

LATENT = DiffusionConfig(
    image_size=8, in_channels=4, channels=(64, 128), attend=(True, True), d_context=128, clip=False
)


@dataclass(frozen=True)
class TextToImageConfig:
    """The configs of the three parts. Each may be given as a dict of its fields."""

    diffusion: DiffusionConfig = LATENT
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    clip: CLIPConfig = field(default_factory=CLIPConfig)  # CLIP whose text tower reads the prompts

    def __post_init__(self):
        parts = {"diffusion": DiffusionConfig, "autoencoder": AutoencoderConfig, "clip": CLIPConfig}
        for name, kind in parts.items():
            value = getattr(self, name)
            if isinstance(value, dict):  # a config read from JSON
                object.__setattr__(self, name, kind(**value))

        # The denoiser must fit the latents and the contexts.
        a = self.autoencoder
        self.check_denoiser("clip", False, "latents go beyond [-1, 1]")
        self.check_denoiser("in_channels", a.latent_channels, "autoencoder.latent_channels")
        side = a.image_size // a.factor
        self.check_denoiser("image_size", side, "autoencoder.image_size over its factor")
        self.check_denoiser("d_context", self.clip.text_width, "clip.text_width")
        if self.clip.loss == "simclr":
            raise ValueError("clip.loss is 'simclr', which trains no text tower; use 'infonce'")

    def check_denoiser(self, name: str, needed: object, reason: str) -> None:
        """Raise ValueError unless a field of the diffusion config has the needed value."""
        value = getattr(self.diffusion, name)
        if value != needed:
            raise ValueError(f"diffusion.{name} is {value}; it must be {needed}: {reason}")


# ---- editing: pure functions --------------------------------------------------------------------

Correct = Callable[[Tensor], Tensor]  # of estimates x_0 (B, Z, h, w), or of images (B, C, H, W)
Given = dict[str, Tensor]  # tensors given to `generate`: latents, init_images, mask, upscale


def with_correction(denoise: Denoise, correct: Correct) -> Denoise:
    """denoise with the estimate correct(x_0) instead of x_0, and the eps that follows from it.

    eps is the one for which x = alpha x_0 + sigma eps holds with the new x_0.
    """

    def corrected(x: Tensor, t: float, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        x0, _ = denoise(x, t, alpha, sigma)
        x0 = correct(x0)
        return x0, (x - alpha * x0) / sigma

    return corrected


def last_steps(path: NoisePath, strength: float) -> NoisePath:
    """The last int(steps * strength) steps of a path. Raises ValueError if there are none."""
    steps = len(path) - 1
    if not 0 < strength <= 1 or int(steps * strength) < 1:
        allowed = f"above 0, at most 1, and enough for one of {steps} steps"
        raise ValueError(f"strength is {strength}; it must be {allowed}")
    return path[-1 - int(steps * strength) :]


def match_means(images: Tensor, small: Tensor) -> Tensor:
    """Change images (B, C, H, W) so that the means of their blocks are small (B or 1, C, h, w).

    All pixels of a block move the same share of their way to white, or to black. So their mean
    moves by this share too, and no pixel leaves [-1, 1].
    """
    H, W = images.shape[-2:]
    h, w = small.shape[-2:]
    means = F.avg_pool2d(images, (H // h, W // w))  # (B, C, h, w)
    goal = torch.where(small > means, 1.0, -1.0)
    share = ((small - means) / (goal - means)).nan_to_num()  # 0 / 0 where a block is already black
    goal = F.interpolate(goal, (H, W))  # (B, C, H, W): the same for all pixels of a block
    share = F.interpolate(share, (H, W))
    return torch.lerp(images, goal, share)


def output_size(
    config: TextToImageConfig, size: Sequence[int] | None, given: Given
) -> tuple[int, int]:
    """(H, W) of the result: `size` if given, else that of init_images, else that of training.

    Raises ValueError if the given tensors exclude each other.
    """
    images = given.get("init_images")
    if images is None and "mask" in given:
        raise ValueError("a mask needs init_images; give them, or leave out the mask")
    if images is not None and "upscale" in given:
        raise ValueError("upscale excludes init_images; leave one out")
    if size:
        H, W = size
    elif images is not None:
        H, W = images.shape[-2:]
    else:
        H = config.autoencoder.image_size
        W = config.autoencoder.image_size
    return H, W


def check_given(config: TextToImageConfig, B: int, H: int, W: int, given: Given) -> None:
    """Raise ValueError unless the given tensors fit B images of H x W. One row serves all."""
    C = config.autoencoder.in_channels
    f = config.autoencoder.factor
    check_images((B, C, H, W), C, f * config.diffusion.factor)
    h, w = given["upscale"].shape[-2:] if "upscale" in given else (H, W)
    shapes = {
        "latents": (config.autoencoder.latent_channels, H // f, W // f),
        "init_images": (C, H, W),
        "mask": (1, H, W),
        "upscale": (C, h, w),
    }
    for name, x in given.items():
        if name in ("init_images", "upscale") and x.ndim == 4:
            check_images(x.shape, C, 1)  # its message names the channels
        shape = shapes[name]
        if x.shape not in ((B, *shape), (1, *shape)):
            needed = f"({B} or 1, {', '.join(map(str, shape))})"
            raise ValueError(f"{name} of {tuple(x.shape)} must be {needed}; change it, or size")
    if H % h or W % w:
        raise ValueError(f"upscale of {h} x {w} does not divide {H} x {W}; change it, or size")


# ---- the model ----------------------------------------------------------------------------------

Prompts = str | Sequence[str] | Tensor  # a text, B texts, or their tokens (B, T)


class Plan(NamedTuple):
    """What a sampler needs to draw B images, and what to correct at the end."""

    denoise: Denoise
    x: Tensor  # the first state (B, Z, h, w)
    path: NoisePath  # from there to the end
    generators: Sequence[torch.Generator]  # one per image
    correct_x0: Correct  # of the last state
    correct_images: Correct  # of the images decoded from it


class TextToImage(nn.Module):
    """A frozen text tower and a frozen autoencoder, with a diffusion model between them.

    `tokenizer` is the text tower's. It is None at first, and then prompts must be tokens.
    """

    outer = ()  # as in ddpm.py
    unit = "pair"  # one row of a batch: an image and its caption

    def __init__(self, config: TextToImageConfig):
        super().__init__()
        self.config = config
        self.tokenizer = None
        self.text_tower = CLIP(config.clip).text_tower.requires_grad_(False)
        self.autoencoder = Autoencoder(config.autoencoder).requires_grad_(False)
        self.diffusion = Diffusion(config.diffusion)
        self.train()

    def train(self, mode: bool = True) -> TextToImage:
        """Set the mode of the diffusion model; the frozen parts stay in evaluation mode."""
        super().train(mode)
        self.text_tower.eval()
        self.autoencoder.eval()
        return self

    def reset_buffers(self):
        """Set the mean and scale of the latents to those of the config."""
        self.autoencoder.reset_buffers()

    # ---- text ----

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> tokens (B, T), int64. A text that is too long loses its last words.

        Raises ValueError without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("a text needs a tokenizer: set model.tokenizer, or give tokens")
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows, _ = encode_captions(self.tokenizer, texts, self.config.clip.context_length)
        return torch.from_numpy(rows)

    def encode_text(self, prompts: Prompts) -> Tensor:
        """Prompts -> contexts (B, context_length, D), float32.

        Each row of tokens ends with its end token. More end tokens fill it to the full length, so
        that a context does not depend on the longest row of its batch.
        """
        tokens = prompts if isinstance(prompts, Tensor) else self.tokenize(prompts)
        missing = max(0, self.config.clip.context_length - tokens.size(1))
        tokens = torch.cat((tokens, tokens[:, -1:].expand(-1, missing)), dim=1)
        return self.text_tower.states(tokens.to(self.text_tower.position.device)).float()

    def null_context(self, negative: Prompts | None = None) -> Tensor | None:
        """The context that guidance moves away from: of the negative prompts, if given.

        Otherwise that of an empty text, or None for a model that has learned one.
        """
        if negative is not None:
            return self.encode_text(negative)
        if self.config.diffusion.learned_null:
            return None
        return self.encode_text("")

    # ---- images and latents ----

    def encode_images(
        self, images: Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> latents (B, Z, h, w) of about unit variance, float32.

        The latents are the encoder's means; with generators, CPU generators, row i is a draw from
        the encoder's Gaussian by generators[i].
        """
        mean, logvar = self.autoencoder.encode(images)
        z = mean.float()
        logvar = logvar.float()
        if generators is not None:
            z = reparameterise(z, logvar, gaussian_noise(generators, z.shape[1:]).to(z.device))
        return self.autoencoder.standardise(z)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, Z, h, w) -> images (B, C, H, W) in [-1, 1], float32."""
        return self.autoencoder.decode(self.autoencoder.restore(latents)).float().clamp(-1, 1)

    # ---- training ----

    def loss(
        self, batch: dict[str, Tensor], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Diffusion.loss on latents: (loss, metrics).

        batch has "latents" (B, Z, h, w) or "images" (B, C, H, W), and "context" (B, T, D) or
        "tokens" (B, T). Without a learned null context it may have "null_context"; the default is
        that of an empty text.
        """
        with torch.no_grad():
            if "latents" in batch:
                z = batch["latents"]
            else:
                z = self.encode_images(batch["images"])
            if "context" in batch:
                context = batch["context"]
            else:
                context = self.encode_text(batch["tokens"])
            if "null_context" in batch:
                null = batch["null_context"]
            else:
                null = self.null_context()
        rows = {"images": z, "context": context, "null_context": null}
        return self.diffusion.loss(rows, generators)

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch of zeros with the fields of a real one whose images are already encoded."""
        diffusion = self.config.diffusion
        clip = self.config.clip
        side = diffusion.image_size
        batch = {
            "latents": torch.zeros(rows, diffusion.in_channels, side, side),
            "tokens": torch.zeros(rows, clip.context_length, dtype=torch.long),
        }
        if not diffusion.learned_null:
            batch["null_context"] = torch.zeros(rows, clip.context_length, clip.text_width)
        return batch

    # ---- generation ----

    def first_state(
        self,
        given: Given,
        H: int,
        W: int,
        path: NoisePath,
        strength: float | None,
        generators: Sequence[torch.Generator],
    ) -> tuple[Tensor, NoisePath, Tensor | None]:
        """(x, path, z): the first state, the path from there, and a given image's latent or None.

        Row i draws from generators[i]: first its latent z, then its noise.
        """
        # The latent of a given image; a small one is enlarged first.
        images = given.get("init_images")
        if "upscale" in given:
            images = F.interpolate(given["upscale"], (H, W), mode="bilinear")
        z = None
        if images is not None:
            z = self.encode_images(images, generators)
        elif strength is not None:
            raise ValueError(f"strength is {strength}, but no image is given; give init_images")

        # Noise.
        if "latents" in given:
            noise = given["latents"]
        else:
            a = self.config.autoencoder
            noise = gaussian_noise(generators, (a.latent_channels, H // a.factor, W // a.factor))
        noise = noise.to(self.text_tower.position.device).expand(len(generators), -1, -1, -1)
        if z is None:
            return noise, path, None

        # Start in the middle of the path.
        if strength is None:
            strength = 1.0 if "mask" in given else 0.8
        path = last_steps(path, strength)
        if "mask" in given and strength == 1:  # noise alone, so that nothing shows through the mask
            return noise, path, z
        _, alpha, sigma = path[0]
        return q_sample(z, noise, alpha, sigma), path, z

    def corrections(self, given: Given, z: Tensor | None) -> tuple[Correct, Correct]:
        """Two functions that enforce what is known of the image: on estimates x_0, and on images.

        z is the latent of the given image, if there is one.
        """
        if "upscale" in given:
            return self.enlarge(given["upscale"])
        if "mask" in given:
            return self.keep_known(given["init_images"], given["mask"], z)
        return nn.Identity(), nn.Identity()

    def keep_known(self, images: Tensor, mask: Tensor, z: Tensor) -> tuple[Correct, Correct]:
        """Two functions that keep what the mask does not let change: of estimates, and of images.

        images: (B or 1, C, H, W), and z (B or 1, Z, h, w) is their latent. mask: (B or 1, 1, H, W),
        above 0.5 where a pixel is to be drawn again. A position of the latent is drawn again if any
        of its pixels is.
        """
        unknown = mask > 0.5
        factor = self.config.autoencoder.factor
        unknown_z = F.max_pool2d(unknown.float(), factor) > 0  # (B or 1, 1, h, w)

        def correct_x0(x0: Tensor) -> Tensor:
            return torch.where(unknown_z, x0, z)

        def correct_images(drawn: Tensor) -> Tensor:
            return torch.where(unknown, drawn, images)

        return correct_x0, correct_images

    def enlarge(self, small: Tensor) -> tuple[Correct, Correct]:
        """Two functions that give an image the block means of a small one: of estimates, of images.

        small: (B or 1, C, h, w). Of an estimate x_0 only the difference of two encodings, with and
        without the right means, is added: so the error that encoding makes cancels.
        """

        def correct_x0(x0: Tensor) -> Tensor:
            drawn = self.decode(x0)
            matched = match_means(drawn, small)
            return x0 + self.encode_images(matched) - self.encode_images(drawn)

        def correct_images(drawn: Tensor) -> Tensor:
            return match_means(drawn, small)

        return correct_x0, correct_images

    @torch.no_grad()
    def plan(
        self,
        prompts: Prompts,
        latents: Tensor | None = None,
        steps: int = 50,
        guidance: float = 7.5,
        sampler: str = "ddim",
        *,
        negative: Prompts | None = None,
        generators: Sequence[torch.Generator] | None = None,
        size: Sequence[int] | None = None,
        init_images: Tensor | None = None,
        mask: Tensor | None = None,
        upscale: Tensor | None = None,
        strength: float | None = None,
    ) -> Plan:
        """What a sampler needs to draw B prompts. The arguments are those of `generate`."""
        # Text.
        context = self.encode_text(prompts)
        path = self.diffusion.path(steps, sampler)
        B = len(context)
        if generators is None:
            generators = new_generators(B)
        null = None
        if guidance != 1:
            null = self.null_context(negative)
        negatives = 1 if null is None else len(null)
        if B < 1 or len(generators) != B or negatives not in (1, B):
            counts = f"{B} prompts, {len(generators)} generators and {negatives} negative prompts"
            raise ValueError(f"there are {counts}; give one of each per image")

        # Given tensors.
        given = {"latents": latents, "init_images": init_images, "mask": mask, "upscale": upscale}
        given = {name: x for name, x in given.items() if x is not None}
        for name, x in given.items():
            given[name] = x.to(self.text_tower.position.device, torch.float32)
        H, W = output_size(self.config, size, given)
        check_given(self.config, B, H, W, given)

        # The start, and what is known of the end.
        denoise = self.diffusion.denoiser(context, guidance, null)
        x, path, z = self.first_state(given, H, W, path, strength, generators)
        correct_x0, correct_images = self.corrections(given, z)
        denoise = with_correction(denoise, correct_x0)
        return Plan(denoise, x, path, generators, correct_x0, correct_images)

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        latents: Tensor | None = None,
        steps: int = 50,
        guidance: float = 7.5,
        sampler: str = "ddim",
        **options,
    ) -> Tensor:
        """Draw B prompts: images (B, C, H, W) in [-1, 1], float32.

        latents: the starting noise (B, Z, h, w).
        steps, guidance, sampler: see Diffusion.sample.

        Options:

        negative: prompts that guidance moves away from, one or B.
        generators: B CPU generators. Row i draws only from generators[i]; by default torch's global
            generator seeds them.
        size: (H, W) of the images.
        init_images: images (B, C, H, W) to start from.
        mask: (B, 1, H, W), with 1 where init_images are to be drawn again; the rest is kept.
        upscale: small images (B, C, h, w) to enlarge to `size`.
        strength: share of the steps to take from a given image, in (0, 1]; 0.8, or 1 with a mask.

        Tensors of one row serve all B. Raises ValueError for inputs that do not fit.
        """
        plan = self.plan(prompts, latents, steps, guidance, sampler, **options)
        states = self.diffusion.sampler_states(
            sampler, plan.denoise, plan.x, plan.path, plan.generators
        )
        with evaluation_mode(self):
            x0 = plan.correct_x0(last(states))
            return plan.correct_images(self.decode(x0))

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> TextToImage:
        """Read a StableDiffusionPipeline folder of diffusers; see hub/stable_diffusion.py."""
        from tinyfm.hub import stable_diffusion

        parts = stable_diffusion.Parts(Autoencoder, Diffusion, CLIPConfig, load_tokenizer)
        return stable_diffusion.load(cls, TextToImageConfig, parts, folder, dtype)

    def save_pretrained(self, folder: str, tokenizer=None, overwrite: bool = False) -> None:
        """Write weights, configs and tokenizer in that layout; see hub/stable_diffusion.py."""
        from tinyfm.hub import stable_diffusion

        stable_diffusion.save(self, folder, tokenizer, overwrite)
