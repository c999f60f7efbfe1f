"""Text-to-image: three models, trained one by one, make a system that none of them is.

    prompt -> tokens -> text tower (clip.py) -> context, the states of all tokens
    noise, context -> U-Net, step by step (ddpm.py) -> latent -> decoder (autoencoder.py) -> picture

This is latent diffusion (Rombach et al. 2022). The tower learnt which text goes with which picture,
the autoencoder to squeeze any picture; both stay as they are, and only the denoiser is trained.

Given a picture, or what is known of one, the same model changes it, fills it in or enlarges it:
see editing.py, which is all that takes.

Letters: B batch, T tokens, D width of the text tower, C channels, H W rows and columns, Z latent
channels, h w rows and columns of a latent or a small picture. Left out: several text towers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfm.autoencoder import Autoencoder, AutoencoderConfig, reparameterise
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.ddpm import SAMPLERS, Diffusion, DiffusionConfig, Path, gaussian_noise, q_sample
from tinyfm.unet import check_images

LATENT = DiffusionConfig(image_size=8, in_channels=4, channels=(64, 128), attend=(True, True),
                         d_context=128, clip=False)  # fmt: skip


@dataclass(frozen=True)
class TextToImageConfig:
    """The parts, each as its own family has it, or as a dict of its fields."""

    diffusion: DiffusionConfig = LATENT
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    clip: CLIPConfig = field(default_factory=CLIPConfig)  # of which the text tower is used

    def __post_init__(self):
        parts = {"diffusion": DiffusionConfig, "autoencoder": AutoencoderConfig, "clip": CLIPConfig}
        for name, kind in parts.items():
            if isinstance(getattr(self, name), dict):  # as read from JSON
                object.__setattr__(self, name, kind(**getattr(self, name)))
        a, fits = self.autoencoder, {"clip": (False, "latents go beyond [-1, 1]")}
        fits["in_channels"] = (a.latent_channels, "autoencoder.latent_channels")
        fits["image_size"] = (a.image_size // a.factor, "autoencoder.image_size over its factor")
        fits["d_context"] = (self.clip.text_width, "clip.text_width")
        for name, (needed, source) in fits.items():
            if (value := getattr(self.diffusion, name)) != needed:
                raise ValueError(f"diffusion.{name} is {value}; it must be {needed}: {source}")
        if self.clip.loss == "simclr":
            raise ValueError("clip.loss is 'simclr', which trains no text tower; use 'infonce'")


# ---- the model ----------------------------------------------------------------------------------

Prompts = str | Sequence[str] | Tensor  # a text, B texts, or their tokens (B, T)


class TextToImage(nn.Module):
    """A text tower and an autoencoder, both frozen, and a diffusion model between them.

    `tokenizer`, None at first, is the tower's. Without it a prompt must be tokens.
    """

    outer = ()  # no tables are trained: all matrices lie between hidden states

    def __init__(self, config: TextToImageConfig):
        super().__init__()
        self.config, self.tokenizer = config, None
        self.text_tower = CLIP(config.clip).text_tower.requires_grad_(False)
        self.autoencoder = Autoencoder(config.autoencoder).requires_grad_(False)
        self.diffusion = Diffusion(config.diffusion)
        self.train()

    def train(self, mode: bool = True) -> TextToImage:
        """What is frozen stays in evaluation mode."""
        super().train(mode)
        self.text_tower.eval()
        self.autoencoder.eval()
        return self

    def reset_buffers(self):
        """Mean and scale of the latents, as the config has them."""
        self.autoencoder.reset_buffers()

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Tokens (B, T); a text that is too long loses its last words, not the end token."""
        from tinyfm.tokenizer import encode_captions  # which made the rows of the tower's training

        if self.tokenizer is None:
            raise ValueError("a text needs a tokenizer: set model.tokenizer, or give tokens")
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows, _ = encode_captions(self.tokenizer, texts, self.config.clip.context_length)
        return torch.from_numpy(rows)

    def encode_text(self, prompts: Prompts) -> Tensor:
        """Prompts -> contexts (B, context_length, D), float32.

        A row of tokens ends in its end token, with which it is filled up here: a context does not
        depend on the longest row of a batch.
        """
        tokens = prompts if isinstance(prompts, Tensor) else self.tokenize(prompts)
        lacking = max(0, self.config.clip.context_length - tokens.size(1))
        tokens = torch.cat((tokens, tokens[:, -1:].expand(-1, lacking)), dim=1)
        return self.text_tower.states(tokens.to(self.text_tower.position.device)).float()

    def null_context(self, negative: Prompts | None = None) -> Tensor | None:
        """What guidance leads away from: given prompts; else None, for the learned; or no words."""
        if negative is None and self.config.diffusion.learned_null:
            return None
        return self.encode_text("" if negative is None else negative)

    def encode_images(self, images: Tensor, generators=None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> latents (B, Z, h, w) of about unit variance, float32.

        The mean of what each may be, or draws, row i by generators[i], a CPU generator.
        """
        z, logvar = (x.float() for x in self.autoencoder.encode(images))
        if generators is not None:
            z = reparameterise(z, logvar, gaussian_noise(generators, z.shape[1:]).to(z.device))
        return self.autoencoder.standardise(z)

    def decode(self, latents: Tensor) -> Tensor:
        """The way back: latents (B, Z, h, w) -> images (B, C, H, W) in [-1, 1], float32."""
        return self.autoencoder.decode(self.autoencoder.restore(latents)).float().clamp(-1, 1)

    def loss(self, batch: dict[str, Tensor], generators: Sequence[torch.Generator]):
        """Diffusion.loss on latents: (loss, metrics).

        batch: "latents" (B, Z, h, w), or "images"; "context" (B, T, D), or "tokens"; where no null
        context is learned, "null_context", or else it is that of an empty text.
        """
        with torch.no_grad():
            z = batch["latents"] if "latents" in batch else self.encode_images(batch["images"])
            context = batch["context"] if "context" in batch else self.encode_text(batch["tokens"])
            null = batch["null_context"] if "null_context" in batch else self.null_context()
        rows = {"images": z, "context": context, "null_context": null}
        return self.diffusion.loss(rows, generators)

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch as data would give it, of zeros, with latents made beforehand."""
        c, side = self.config, self.config.diffusion.image_size
        batch = {"latents": torch.zeros(rows, c.diffusion.in_channels, side, side),
                 "tokens": torch.zeros(rows, c.clip.context_length, dtype=torch.long)}  # fmt: skip
        null = {"null_context": torch.zeros(rows, c.clip.context_length, c.clip.text_width)}
        return batch if c.diffusion.learned_null else batch | null

    @torch.no_grad()
    def generate(self, prompts: Prompts, latents: Tensor | None = None, steps: int = 50,
                 guidance: float = 7.5, sampler: str = "ddim", *, negative: Prompts | None = None,
                 generators: Sequence[torch.Generator] | None = None,
                 size: Sequence[int] | None = None, init_images: Tensor | None = None,
                 mask: Tensor | None = None, upscale: Tensor | None = None,
                 strength: float | None = None) -> Tensor:  # fmt: skip
        """Pictures (B, C, H, W) in [-1, 1], float32, of B prompts; steps to sampler as in ddpm.py.

        latents (B, Z, h, w): the noise to begin with. negative: prompts that guidance leads away
        from. size: (H, W). init_images (B, C, H, W): pictures to begin with, and to keep but where
        mask (B, 1, H, W), if given, is 1; upscale (B, C, h, w): small ones. strength, in (0, 1]:
        the share of the steps that they leave to take; 0.8, or 1 with a mask. One row serves all.
        Row i draws from generators[i], a CPU generator; without them, torch's own seed decides.
        Raises ValueError for what does not fit.
        """
        named = {"latents": latents, "init_images": init_images, "mask": mask, "upscale": upscale}
        form = {"device": self.text_tower.position.device, "dtype": torch.float32}
        given = {name: x.to(**form) for name, x in named.items() if x is not None}
        context, path = self.encode_text(prompts), self.diffusion.path(steps, sampler)
        if generators is None:
            seeds = torch.randint(2**62, (len(context),)).tolist()
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        null = None if guidance == 1 else self.null_context(negative)
        B, against = len(context), 1 if null is None else len(null)
        if not B == len(generators) >= 1 or against not in (1, B):
            counts = f"{B} prompts, {len(generators)} generators and {against} negative prompts"
            raise ValueError(f"there are {counts}; give one of each a picture")
        H, W = picture_size(self.config, B, size, given)
        denoise = self.diffusion.denoiser(context, guidance, null)
        x, path, z = begin(self, given, H, W, path, strength, generators)
        on_x0, on_pictures = corrections(self, given, z)
        fresh = lambda: gaussian_noise(generators, x.shape[1:]).to(x.device)  # noqa: E731
        options = {"variance": self.config.diffusion.variance} if sampler == "ddpm" else {}
        states = SAMPLERS[sampler](corrected(denoise, on_x0), x, path, fresh, **options)
        was_training = self.training
        self.eval()
        try:
            return on_pictures(self.decode(on_x0(deque(states, maxlen=1)[0])))
        finally:
            self.train(was_training)

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> TextToImage:
        """Read a StableDiffusionPipeline folder of diffusers (tinyfm/hub/stable_diffusion.py)."""
        from tinyfm import tokenizer
        from tinyfm.hub import stable_diffusion

        parts = stable_diffusion.Parts(Autoencoder, Diffusion, CLIPConfig, tokenizer.load)
        return stable_diffusion.load(cls, TextToImageConfig, parts, folder, dtype)

    def save_pretrained(self, folder: str, tokenizer=None, overwrite: bool = False) -> None:
        """Write weights, configs and tokenizer in that layout."""
        from tinyfm.hub import stable_diffusion

        stable_diffusion.save(self, folder, tokenizer, overwrite)


# FOLDED: merge this into the module's docstring
# What else a text-to-image model can do, without any more training.
#
# A sampler knows a model only as denoise(x, t, alpha, sigma) -> (x_0, eps). Whoever corrects the
# estimate x_0, and lets eps = (x - alpha x_0) / sigma follow, has a say in what is drawn:
#
#     image-to-image    begin midway, at alpha z + sigma eps of a picture's latent z: the fewer steps
#                       are left, the less can change (SDEdit, Meng et al. 2022)
#     inpainting        x_0 = z wherever the picture is known, so that the rest comes to fit it
#                       (Blended Latent Diffusion, Avrahami et al. 2023)
#     super-resolution  x_0 + E(y) - E(D(x_0)): y is the decoded estimate D(x_0), its means over
#                       blocks of pixels moved to those of a small picture (as ILVR, Choi et al. 2021)
#
# A latent holds a picture only nearly, so what is known of pixels is put back at the end. `model` is
# text2image.py's, and `given` what its `generate` was given: latents, init_images, mask, upscale.
# Letters as there. Left out: denoisers that were trained to see a mask or a small picture.


Correct = Callable[[Tensor], Tensor]  # of estimates x_0 (B, Z, h, w), or of pictures (B, C, H, W)


def corrected(denoise: Callable, correct: Correct) -> Callable:
    """denoise with correct(x_0) in place of x_0, and what is then left of x as noise."""

    def new(x: Tensor, t: float, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        x0 = correct(denoise(x, t, alpha, sigma)[0])
        return x0, (x - alpha * x0) / sigma

    return new


def last_steps(path: Path, strength: float) -> Path:
    """The last int(steps * strength) steps of a path. Raises ValueError if there are none."""
    steps = len(path) - 1
    if not 0 < strength <= 1 or int(steps * strength) < 1:
        allowed = f"above 0, at most 1, and enough for one of {steps} steps"
        raise ValueError(f"strength is {strength}; it must be {allowed}")
    return path[-1 - int(steps * strength) :]


def match_means(images: Tensor, small: Tensor) -> Tensor:
    """images (B, C, H, W) changed so that their means over blocks are small (B or 1, C, h, w).

    The pixels of a block go the same share of their way to white, or to black: so does their mean,
    and none leaves [-1, 1].
    """
    H, W = images.shape[-2:]
    means = F.avg_pool2d(images, (H // small.size(2), W // small.size(3)))
    goal = torch.where(small > means, 1.0, -1.0)
    share = ((small - means) / (goal - means)).nan_to_num()  # 0 / 0 where all is black already
    goal, share = (F.interpolate(x, (H, W)) for x in (goal, share))  # to all pixels of a block
    return torch.lerp(images, goal, share)


def corrections(model: nn.Module, given: dict[str, Tensor], z: Tensor | None,
                ) -> tuple[Correct, Correct]:  # fmt: skip
    """What is known of x_0, and of pictures, by what is given with a picture's latent z."""
    if "upscale" in given:
        small = given["upscale"]

        def correct(x0: Tensor) -> Tensor:
            drawn = model.decode(x0)
            better = model.encode_images(match_means(drawn, small))
            return x0 + better - model.encode_images(drawn)  # what encoding loses cancels out

        return correct, lambda drawn: match_means(drawn, small)
    if "mask" in given:
        images, mask = given["init_images"], given["mask"] > 0.5
        anew = F.max_pool2d(mask.float(), model.config.autoencoder.factor) > 0  # if any pixel is
        return lambda x0: torch.where(anew, x0, z), lambda drawn: torch.where(mask, drawn, images)
    return nn.Identity(), nn.Identity()


def picture_size(config, rows: int, size: Sequence[int] | None,
                 given: dict[str, Tensor]) -> tuple[int, int]:  # fmt: skip
    """H and W of what is to be drawn. Raises ValueError for tensors that do not go with it."""
    a, images, small = config.autoencoder, given.get("init_images"), given.get("upscale")
    if (images is None and "mask" in given) or not (images is None or small is None):
        raise ValueError("a mask needs init_images, and upscale goes with neither; leave one out")
    H, W = size or (2 * [a.image_size] if images is None else images.shape[-2:])
    h, w = (H, W) if small is None else small.shape[-2:]
    C, Z, f = a.in_channels, a.latent_channels, a.factor
    check_images((rows, C, H, W), C, f * config.diffusion.factor)
    shapes = {"latents": (Z, H // f, W // f), "init_images": (C, H, W), "mask": (1, H, W),
              "upscale": (C, h, w)}  # fmt: skip
    for name, x in given.items():
        if name in ("init_images", "upscale") and x.ndim == 4:
            check_images(x.shape, C, 1)
        if x.shape not in ((rows, *shapes[name]), (1, *shapes[name])):
            fits = f"({rows} or 1, {', '.join(map(str, shapes[name]))})"
            raise ValueError(f"{name} of {tuple(x.shape)} must be {fits}; change it, or size")
    if H % h or W % w:
        raise ValueError(f"upscale of {h} x {w} does not divide {H} x {W}; change it, or size")
    return H, W


def begin(model: nn.Module, given: dict[str, Tensor], H: int, W: int, path: Path,
          strength: float | None, generators: Sequence[torch.Generator]) -> tuple:  # fmt: skip
    """(x, path, z): the first x, the way from there, and the latent z of a given picture, or None.

    Row i draws from generators[i]: first of z, then noise.
    """
    images, a = given.get("init_images"), model.config.autoencoder
    if "upscale" in given:
        images = F.interpolate(given["upscale"], (H, W), mode="bilinear")
    if images is None and strength is not None:
        raise ValueError(f"strength is {strength}, but no picture is given to begin with; give one")
    z = None if images is None else model.encode_images(images, generators)
    x = given.get("latents")
    if x is None:
        x = gaussian_noise(generators, (a.latent_channels, H // a.factor, W // a.factor))
    x = x.to(model.text_tower.position.device).expand(len(generators), -1, -1, -1)
    if z is None:
        return x, path, z
    if strength is None:
        strength = 1.0 if "mask" in given else 0.8
    path = last_steps(path, strength)
    if "mask" in given and strength == 1:  # what the mask covers is forgotten
        return x, path, z
    return q_sample(z, x, *path[0][1:]), path, z
