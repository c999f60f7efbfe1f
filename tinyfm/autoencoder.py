"""An autoencoder: pictures into few numbers, and back.

An encoder squeezes a picture x (C, H, W) into a latent z of fewer rows and columns, a decoder
rebuilds it, and the loss is the squared error. But between the codes of two pictures there may be
nothing. A variational one (Kingma & Welling 2014) gives a picture a cloud in place of a point,
q(z|x) = N(mean, var), and keeps all clouds near N(0, 1). Its loss is the bound of eq. 3 there,

    |x - decode(z)|^2 / 2  +  beta KL(q(z|x) || N(0, 1)),      z = mean + sqrt(var) eps
    KL = sum of (mean^2 + var - 1 - ln var) / 2

summed over pixels and over latents, and averaged over pictures. beta is the variance of the noise
that a pixel is thought to have: at 0.01, an error of 0.1 is usual. It may rise from 0 in a warm-up,
as latents that the KL switches off early seldom come back (Bowman et al. 2016).

Latent diffusion (Rombach et al. 2022) works on z. A config expresses Stable Diffusion's own
(AutoencoderKL of diffusers); hub_diffusion.py reads and writes its weights.
Letters: B batch, C channels, H W rows and columns, Z latent channels, h w rows and columns of z.
Left out: adversarial and perceptual losses, quantised latents, tiling.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

ACTIVE, LOGVAR_RANGE = 0.01, (-30.0, 20.0)  # Burda et al.'s threshold; the published models' range


@dataclass(frozen=True)
class AutoencoderConfig:
    image_size: int = 32  # rows and columns of a training image; others work too
    in_channels: int = 1  # of an image: 1 grey, 3 colour
    channels: tuple[int, ...] = (32, 64, 128)  # at each level; each has half the rows of the last
    n_block: int = 1  # residual blocks a level in the encoder; one more in the decoder
    latent_channels: int = 4  # Z
    groups: int = 16  # of channels that are normalised together
    attention: bool = True  # in the middle, where every place can look at every other
    quant_conv: bool = True  # 1x1 convolutions on both sides of the latent
    variational: bool = True  # False: a plain autoencoder, no noise and no KL
    beta: float = 0.01  # weight of the KL; the variance of a pixel's noise
    beta_warmup_steps: int = 0  # training steps in which beta rises from 0
    latent_mean: float = 0.0  # of the latents, measured after training; see measure_latents
    latent_scale: float = 1.0  # 1 / their standard deviation

    def __post_init__(self):
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON has lists
        least = dict.fromkeys(("image_size", "in_channels", "n_block", "latent_channels"), 1)
        least |= {"groups": 1, "beta": 0, "beta_warmup_steps": 0}
        for name, n in least.items():
            if getattr(self, name) < n:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {n}")
        if self.latent_scale <= 0:
            raise ValueError(f"latent_scale is {self.latent_scale}; it must be above 0")
        for width in self.channels or (0,):
            if width < 1 or width % self.groups:
                raise ValueError(f"{width} channels cannot be divided by groups {self.groups}")
        C, side = self.in_channels, self.image_size
        check_images((1, C, side, side), C, self.factor)

    @property
    def factor(self) -> int:
        """By how much rows and columns shrink to the latent."""
        return 2 ** (len(self.channels) - 1)


def check_images(shape: Sequence[int], channels: int, factor: int) -> None:
    """Raise ValueError unless images (B, C, H, W) have `channels`, and `factor` divides H and W."""
    _, C, H, W = shape
    if channels != C:
        names = {1: "1 channel (grey)", 3: "3 channels (colour)"}
        found, taken = (names.get(n, f"{n} channels") for n in (C, channels))
        raise ValueError(f"the images have {found}, the model takes {taken}; convert the images")
    if H % factor or W % factor:
        times, near = factor.bit_length() - 1, [factor * max(1, round(n / factor)) for n in (H, W)]
        nearest = f"the nearest size that can is {near[0]} x {near[1]}"
        raise ValueError(f"images of {H} x {W} cannot be halved {times} times; {nearest}")


# ---- layers -------------------------------------------------------------------------------------


def make_norm(config: AutoencoderConfig, width: int) -> nn.Module:
    return nn.GroupNorm(config.groups, width, eps=1e-6)


class Downsample(nn.Conv2d):
    """(B, C, H, W) -> (B, C, H/2, W/2): a convolution that moves by two, padded at the end only."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, stride=2)

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """(B, C, H, W) -> (B, C, 2 H, 2 W): each pixel four times, then a convolution to blend them."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, padding=1)

    def forward(self, x):  # both at once, for 4/9 of the products: a pixel is a stamp of 4 x 4
        stamp = F.pad(self.weight.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))  # (C, C, 5, 5)
        stamp = stamp[:, :, 1:] + stamp[:, :, :-1]
        stamp = stamp[..., 1:] + stamp[..., :-1]  # each pixel twice in a column and in a row
        return F.conv_transpose2d(x, stamp, self.bias, stride=2, padding=1)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); the first convolution may change the channels."""

    def __init__(self, config: AutoencoderConfig, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.conv1 = make_norm(config, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = make_norm(config, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class SelfAttention(nn.Module):
    """x + softmax(q k' / sqrt(C)) v, over all places at once, with one head."""

    def __init__(self, config: AutoencoderConfig, width: int):
        super().__init__()
        self.norm = make_norm(config, width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        h = rearrange(self.norm(x), "B C H W -> B 1 (H W) C")
        y = F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
        return x + rearrange(self.out(y), "B 1 (H W) C -> B C H W", H=x.size(2))


def make_middle(config: AutoencoderConfig, width: int) -> nn.Module:
    """What works at the smallest size, in the encoder and in the decoder."""
    first, last = ResBlock(config, width, width), ResBlock(config, width, width)
    attention = SelfAttention(config, width) if config.attention else nn.Identity()
    return nn.Sequential(OrderedDict(first=first, attention=attention, last=last))


def make_levels(config: AutoencoderConfig, widths: list[int], n: int, resample) -> nn.Module:
    """A level a width after the first: n residual blocks, and what leads to the next size."""
    levels = []
    for c_in, c_out in pairwise(widths):
        blocks = nn.Sequential(*(ResBlock(config, c, c_out) for c in [c_in] + (n - 1) * [c_out]))
        last = len(levels) == len(widths) - 2
        way = nn.Identity() if last else resample(c_out)
        levels.append(nn.Sequential(OrderedDict(blocks=blocks, resample=way)))
    return nn.Sequential(*levels)


# ---- the plain autoencoder ----------------------------------------------------------------------


class Encoder(nn.Module):
    """Images (B, C, H, W) -> (B, Z or 2 Z, h, w)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.channels[0], *config.channels]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.levels = make_levels(config, widths, config.n_block, Downsample)
        self.middle, self.norm = make_middle(config, widths[-1]), make_norm(config, widths[-1])
        out = config.latent_channels * (2 if config.variational else 1)
        self.conv_out = nn.Conv2d(widths[-1], out, 3, padding=1)
        self.quant = nn.Conv2d(out, out, 1) if config.quant_conv else nn.Identity()

    def forward(self, x):
        x = self.norm(self.middle(self.levels(self.conv_in(x))))
        return self.quant(self.conv_out(F.silu(x)))


class Decoder(nn.Module):
    """Latents (B, Z, h, w) -> images (B, C, H, W): the encoder mirrored."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, Z = [config.channels[-1], *reversed(config.channels)], config.latent_channels
        self.quant = nn.Conv2d(Z, Z, 1) if config.quant_conv else nn.Identity()
        self.conv_in = nn.Conv2d(Z, widths[0], 3, padding=1)
        self.middle, self.norm = make_middle(config, widths[0]), make_norm(config, widths[-1])
        self.levels = make_levels(config, widths, config.n_block + 1, Upsample)
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, z):
        z = self.levels(self.middle(self.conv_in(self.quant(z))))
        return self.conv_out(F.silu(self.norm(z)))


# ---- the few lines that make it variational -----------------------------------------------------


def reparameterise(mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """A draw from N(mean, var) through which gradients reach both (Kingma & Welling, 2.4)."""
    return mean + torch.exp(logvar / 2) * eps


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)) of each latent, in nats, in their shape (appendix B there)."""
    return (mean.square() + logvar.exp() - 1 - logvar) / 2


# ---- the model ----------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """encode: images (B, C, H, W) in [-1, 1] -> (mean, logvar), both (B, Z, h, w); decode: back."""

    outer = ()  # no tables: all matrices lie between hidden states

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config, self.encoder, self.decoder = config, Encoder(config), Decoder(config)
        self.reset_buffers()

    def reset_buffers(self):
        """Mean and scale of the latents, as the config has them."""
        self.register_buffer("latent_mean", torch.tensor(self.config.latent_mean))
        self.register_buffer("latent_scale", torch.tensor(self.config.latent_scale))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and ln of the variance. Raises ValueError for what check_images refuses."""
        check_images(images.shape, self.config.in_channels, self.config.factor)
        moments = self.encoder(images.to(self.encoder.conv_in.weight.dtype))
        if not self.config.variational:
            return moments, torch.full_like(moments, LOGVAR_RANGE[0])
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, Z, h, w) -> images (B, C, H, W), not clamped to [-1, 1]."""
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype))

    def standardise(self, z: Tensor) -> Tensor:
        """Latents at about mean 0 and variance 1, as diffusion wants them."""
        return (z - self.latent_mean) * self.latent_scale

    def restore(self, z: Tensor) -> Tensor:
        """The inverse of standardise: what decode takes."""
        return z / self.latent_scale + self.latent_mean

    @torch.no_grad()
    def measure_latents(self, batches: Iterable[Tensor]) -> None:
        """Set latent_mean and latent_scale from pictures (B, C, H, W), batch by batch."""
        count, total, squares = 0, 0.0, 0.0
        for images in batches:
            mean, logvar = (x.double() for x in self.encode(images))
            count, total = count + mean.numel(), total + mean.sum()
            squares = squares + (mean.square() + logvar.exp()).sum()  # E z^2 of each cloud
        if not count:
            raise ValueError("no pictures were given to measure the latents on")
        self.latent_mean.copy_(total / count)
        self.latent_scale.copy_((squares / count - (total / count) ** 2) ** -0.5)

    def loss(self, batch: dict[str, Tensor], generators: Sequence[torch.Generator]):
        """Reconstruction + beta KL of batch["images"] (B, C, H, W), a picture: (loss, metrics).

        Row i draws its noise from generators[i], a CPU generator. beta warms up with batch["step"],
        the training step that a batch belongs to; without one, as in evaluation, it is in full.
        metrics: both terms, and how many latents' means vary with the picture (Burda et al. 2016).
        """
        images, config = batch["images"], self.config
        mean, logvar = (x.float() for x in self.encode(images))
        z, kl = mean, torch.zeros((), device=mean.device)
        if config.variational:
            eps = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
            z = reparameterise(mean, logvar, eps.to(mean.device))
            kl = kl_divergence(mean, logvar).sum() / len(mean)
        reconstruction = (self.decode(z).float() - images).square().sum() / (2 * len(mean))
        beta = config.beta
        if "step" in batch and config.beta_warmup_steps:
            beta = beta * (batch["step"] / config.beta_warmup_steps).clamp(max=1)
        active = (mean.detach().var(dim=0, correction=0) > ACTIVE).sum()
        metrics = {"reconstruction": reconstruction.detach(), "kl": kl.detach(), "active": active}
        return reconstruction + beta * kl, metrics

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch as data would give it, of zeros."""
        side = self.config.image_size
        return {"images": torch.zeros(rows, self.config.in_channels, side, side)}

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> Autoencoder:
        """Read an AutoencoderKL folder of diffusers (hub_diffusion.py)."""
        from tinyfm.hub import diffusion

        return diffusion.load_autoencoder(cls, AutoencoderConfig, folder, dtype)

    def save_pretrained(self, folder: str, overwrite: bool = False) -> None:
        """Write weights and config in the layout of diffusers (hub_diffusion.py)."""
        from tinyfm.hub import diffusion

        diffusion.save_autoencoder(self, folder, overwrite)
