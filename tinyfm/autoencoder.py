"""An autoencoder: pictures to a few numbers, and back.

An encoder compresses a picture x (C, H, W) to a latent z with fewer rows and columns, a decoder
rebuilds the picture, and the loss is the squared error. Such a plain autoencoder leaves gaps: a
point between the latents of two pictures may decode to nothing. A variational autoencoder (Kingma
& Welling 2014) closes them. It maps a picture to a distribution, q(z|x) = N(mean, var), instead of
a point, and keeps all these distributions near N(0, 1). Its loss is the bound of their eq. 3,

    |x - decode(z)|^2 / 2  +  beta KL(q(z|x) || N(0, 1)),      z = mean + sqrt(var) eps
    KL = sum of (mean^2 + var - 1 - ln var) / 2

summed over pixels and over latents, and averaged over pictures; eps is standard normal noise. beta
is the variance of the noise that the model assumes in a pixel: at 0.01, errors of about 0.1 are
expected. It can rise from 0 in a warm-up, because latents that the KL switches off early rarely
recover (Bowman et al. 2016).

Latent diffusion (Rombach et al. 2022) works on z. One config expresses Stable Diffusion's
autoencoder (AutoencoderKL of diffusers); hub/diffusion.py reads and writes its weights.
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

ACTIVE = 0.01  # a latent is active if its mean varies more than this (Burda et al. 2016)
LOGVAR_RANGE = (-30.0, 20.0)  # limits of ln var, as in the published models


@dataclass(frozen=True)
class AutoencoderConfig:
    image_size: int = 32  # rows and columns of a training image; other sizes work too
    in_channels: int = 1  # channels of an image: 1 grey, 3 colour
    channels: tuple[int, ...] = (32, 64, 128)  # width of each level; sizes halve in between
    n_block: int = 1  # residual blocks per level of the encoder; the decoder has one more
    latent_channels: int = 4  # channels of a latent
    groups: int = 16  # number of groups of channels, each of which is normalised together
    attention: bool = True  # attention between all places, in the middle of encoder and decoder
    quant_conv: bool = True  # 1x1 convolutions on both sides of the latent
    variational: bool = True  # noise and KL in the loss; False = a plain autoencoder
    beta: float = 0.01  # weight of the KL; the variance of a pixel's noise
    beta_warmup_steps: int = 0  # training steps in which beta rises from 0
    latent_mean: float = 0.0  # mean of the latents, measured after training
    latent_scale: float = 1.0  # 1 / standard deviation of the latents, measured after training

    def __post_init__(self):
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON has lists
        self._check_at_least(1, "image_size", "in_channels", "n_block", "latent_channels", "groups")
        self._check_at_least(0, "beta", "beta_warmup_steps")
        if self.latent_scale <= 0:
            raise ValueError(f"latent_scale is {self.latent_scale}; it must be above 0")
        if not self.channels:
            raise ValueError("channels is (); give the width of at least one level")
        for width in self.channels:
            if width < 1 or width % self.groups:
                problem = f"{width} channels cannot be divided by groups {self.groups}"
                raise ValueError(f"{problem}; use multiples of {self.groups}")
        side = self.image_size
        check_images((1, self.in_channels, side, side), self.in_channels, self.factor)

    def _check_at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def factor(self) -> int:
        """The factor by which rows and columns shrink from an image to its latent."""
        return 2 ** (len(self.channels) - 1)


def check_images(shape: Sequence[int], channels: int, factor: int) -> None:
    """Check that images (B, C, H, W) have `channels` and that `factor` divides H and W.

    `factor` is a power of two. Raises ValueError if they do not fit.
    """
    _, C, H, W = shape
    if channels != C:
        names = {1: "1 channel (grey)", 3: "3 channels (colour)"}
        found = names.get(C, f"{C} channels")
        needed = names.get(channels, f"{channels} channels")
        raise ValueError(f"the images have {found}, the model takes {needed}; convert the images")
    if H % factor or W % factor:
        halvings = factor.bit_length() - 1
        near_H = factor * max(1, round(H / factor))
        near_W = factor * max(1, round(W / factor))
        advice = f"the nearest size that can is {near_H} x {near_W}"
        raise ValueError(f"images of {H} x {W} cannot be halved {halvings} times; {advice}")


# ---- layers -------------------------------------------------------------------------------------


def make_norm(config: AutoencoderConfig, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.groups, width, eps=1e-6)


class Downsample(nn.Conv2d):
    """(B, C, H, W) -> (B, C, H/2, W/2): a convolution of stride 2, padded below and right only."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, stride=2)

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """(B, C, H, W) -> (B, C, 2 H, 2 W): each pixel is repeated 2 x 2, then convolved.

    The obvious way is

        super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))

    `forward` gives the same result, up to rounding, with 4/9 of the multiplications. Through both
    steps an input pixel contributes to 4 x 4 pixels of the output, with fixed weights; the
    transposed convolution adds these contributions up.
    """

    def __init__(self, width: int):
        super().__init__(width, width, 3, padding=1)

    def forward(self, x):
        """(B, C, H, W) -> (B, C, 2 H, 2 W)"""
        # A pixel of the repeated image contributes to the result by the flipped 3 x 3 kernel. A
        # pixel of x is four of these, so its kernel is the sum of four copies: one in place, one
        # shifted by a row, one by a column, and one by both.
        kernel = F.pad(self.weight.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))  # (C, C, 5, 5)
        kernel = kernel[:, :, 1:] + kernel[:, :, :-1]  # (C, C, 4, 5)
        kernel = kernel[..., 1:] + kernel[..., :-1]  # (C, C, 4, 4)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); the first convolution may change the channels."""

    def __init__(self, config: AutoencoderConfig, c_in: int, c_out: int):
        super().__init__()
        self.norm1 = make_norm(config, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = make_norm(config, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class SelfAttention(nn.Module):
    """x + softmax(q k' / sqrt(C)) v: each place attends to all places, with one head."""

    def __init__(self, config: AutoencoderConfig, width: int):
        super().__init__()
        self.norm = make_norm(config, width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        h = rearrange(self.norm(x), "B C H W -> B 1 (H W) C")
        y = F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))  # (B, 1, H W, C)
        return x + rearrange(self.out(y), "B 1 (H W) C -> B C H W", H=x.size(2))


def make_middle(config: AutoencoderConfig, width: int) -> nn.Module:
    """The layers at the smallest size, in the encoder and in the decoder."""
    first = ResBlock(config, width, width)
    last = ResBlock(config, width, width)
    attention = SelfAttention(config, width) if config.attention else nn.Identity()
    return nn.Sequential(OrderedDict(first=first, attention=attention, last=last))


def make_levels(
    config: AutoencoderConfig, widths: list[int], n_block: int, resample: type[nn.Module]
) -> nn.Module:
    """One level for each width after the first, from the width before it.

    A level is n_block residual blocks, followed by a layer of type `resample` that leads to the
    next level's size; the last level has none.
    """
    levels = []
    for c_in, c_out in pairwise(widths):
        blocks = [ResBlock(config, c_in, c_out)]
        for _ in range(n_block - 1):
            blocks.append(ResBlock(config, c_out, c_out))
        is_last = len(levels) == len(widths) - 2
        step = nn.Identity() if is_last else resample(c_out)
        levels.append(nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks), resample=step)))
    return nn.Sequential(*levels)


# ---- the plain autoencoder ----------------------------------------------------------------------


class Encoder(nn.Module):
    """Images (B, C, H, W) -> latents (B, Z, h, w), or (B, 2 Z, h, w): means and ln var."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.channels[0], *config.channels]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.levels = make_levels(config, widths, config.n_block, Downsample)
        self.middle = make_middle(config, widths[-1])
        self.norm = make_norm(config, widths[-1])
        out = config.latent_channels * (2 if config.variational else 1)
        self.conv_out = nn.Conv2d(widths[-1], out, 3, padding=1)
        self.quant = nn.Conv2d(out, out, 1) if config.quant_conv else nn.Identity()

    def forward(self, x):
        x = self.middle(self.levels(self.conv_in(x)))
        return self.quant(self.conv_out(F.silu(self.norm(x))))


class Decoder(nn.Module):
    """Latents (B, Z, h, w) -> images (B, C, H, W): the encoder in reverse order."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.channels[-1], *reversed(config.channels)]
        Z = config.latent_channels
        self.quant = nn.Conv2d(Z, Z, 1) if config.quant_conv else nn.Identity()
        self.conv_in = nn.Conv2d(Z, widths[0], 3, padding=1)
        self.middle = make_middle(config, widths[0])
        self.norm = make_norm(config, widths[-1])
        self.levels = make_levels(config, widths, config.n_block + 1, Upsample)
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, z):
        x = self.levels(self.middle(self.conv_in(self.quant(z))))
        return self.conv_out(F.silu(self.norm(x)))


# ---- the variational part -----------------------------------------------------------------------


def reparameterise(mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """A draw from N(mean, var), with gradients for both (Kingma & Welling 2014, section 2.4).

    All three have one shape, and so has the result. eps: standard normal noise.
    """
    return mean + torch.exp(logvar / 2) * eps


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)) in nats, element by element (appendix B there).

    mean, logvar = ln var, and the result have one shape.
    """
    return (mean.square() + logvar.exp() - 1 - logvar) / 2


def count_active(means: Tensor) -> Tensor:
    """The number of active latents, int64: those whose mean varies from picture to picture.

    means (B, Z, h, w): the means of the latents of B pictures. A latent, one of Z h w, is active if
    the variance of its mean over the B pictures (divided by B) is above ACTIVE.
    """
    return (means.var(dim=0, correction=0) > ACTIVE).sum()


# ---- the model ----------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to latents (B, Z, h, w), by encode, and back, by decode."""

    unit = "image"  # what a data set is counted in
    outer = ()  # Muon trains the first and last layers too (see training/optim.py)

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.reset_buffers()

    def reset_buffers(self):
        """Set the mean and scale of the latents to those of the config."""
        self.register_buffer("latent_mean", torch.tensor(self.config.latent_mean))
        self.register_buffer("latent_scale", torch.tensor(self.config.latent_scale))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) in [-1, 1] -> mean and ln var of the latents, (B, Z, h, w) each.

        The encoder gives 2 Z channels: the means, then ln var, which is clamped to LOGVAR_RANGE.
        A plain autoencoder's encoder gives Z means, and ln var is the lower limit everywhere: the
        variance is almost 0. Images are converted to the dtype of the weights. Raises ValueError
        as check_images does.
        """
        check_images(images.shape, self.config.in_channels, self.config.factor)
        moments = self.encoder(images.to(self.encoder.conv_in.weight.dtype))
        if not self.config.variational:
            return moments, torch.full_like(moments, LOGVAR_RANGE[0])
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, Z, h, w) -> images (B, C, H, W), not clamped to [-1, 1]."""
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype))

    def rebuild(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> the same decoded from the means of their latents."""
        return self.decode(self.encode(images)[0])

    def standardise(self, z: Tensor) -> Tensor:
        """Latents with about mean 0 and variance 1, as diffusion needs them."""
        return (z - self.latent_mean) * self.latent_scale

    def restore(self, z: Tensor) -> Tensor:
        """The inverse of standardise: latents for decode."""
        return z / self.latent_scale + self.latent_mean

    @torch.no_grad()
    def measure_latents(self, batches: Iterable[Tensor]) -> None:
        """Set latent_mean and latent_scale from pictures, given in batches (B, C, H, W).

        They become the mean of all latents z, a single number, and 1 / their standard deviation. A
        latent is a draw from N(mean, var), so its square is mean^2 + var on average. Sums are in
        float64. Batches may have different sizes. Raises ValueError if there are none.
        """
        count = 0
        total = 0.0
        squares = 0.0
        for images in batches:
            mean, logvar = (x.double() for x in self.encode(images))
            count += mean.numel()
            total = total + mean.sum()
            squares = squares + (mean.square() + logvar.exp()).sum()  # E z^2 = mean^2 + var
        if not count:
            raise ValueError("there are no pictures to measure the latents on; give at least one")
        self.latent_mean.copy_(total / count)
        self.latent_scale.copy_((squares / count - (total / count) ** 2) ** -0.5)

    def loss(
        self, batch: dict[str, Tensor], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction + beta KL of batch["images"] (B, C, H, W), the mean over pictures.

        Both terms are sums over a picture: of |x - decode(z)|^2 / 2 over pixels, of the KL over
        latents. Row i draws its noise eps, in the shape (Z, h, w), from generators[i], a CPU
        generator. A plain autoencoder draws none: z is the mean, and the KL is 0. beta rises from 0
        to its full value in beta_warmup_steps, in proportion to batch["step"], the training step, a
        tensor; without a step, as in evaluation, it has its full value.

        metrics, without gradients: "reconstruction" and "kl", the two terms, and "active", the
        number of active latents in this batch.
        """
        config = self.config
        images = batch["images"]
        mean, logvar = (x.float() for x in self.encode(images))  # (B, Z, h, w) each
        z = mean
        kl = torch.zeros((), device=mean.device)
        if config.variational:
            eps = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
            z = reparameterise(mean, logvar, eps.to(mean.device))
            kl = kl_divergence(mean, logvar).sum() / len(mean)
        reconstruction = (self.decode(z).float() - images).square().sum() / (2 * len(mean))
        beta = config.beta
        if "step" in batch and config.beta_warmup_steps:
            beta = beta * (batch["step"] / config.beta_warmup_steps).clamp(max=1)
        active = count_active(mean.detach())
        metrics = {"reconstruction": reconstruction.detach(), "kl": kl.detach(), "active": active}
        return reconstruction + beta * kl, metrics

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch of zeros with the shapes and dtypes of real data."""
        side = self.config.image_size
        return {"images": torch.zeros(rows, self.config.in_channels, side, side)}

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> Autoencoder:
        """Read an AutoencoderKL folder of diffusers (hub/diffusion.py)."""
        from tinyfm.hub import diffusion

        return diffusion.load_autoencoder(cls, AutoencoderConfig, folder, dtype)

    def save_pretrained(self, folder: str, overwrite: bool = False) -> None:
        """Write weights and config in the layout of diffusers (hub/diffusion.py)."""
        from tinyfm.hub import diffusion

        diffusion.save_autoencoder(self, folder, overwrite)
