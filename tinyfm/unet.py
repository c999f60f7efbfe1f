"""The U-Net: a network that maps an image and a time to an image of the same size.

A diffusion model (ddpm.py) gives a network a noisy image x_t and its noise level t, and the network
predicts the noise. For this it needs details, to place every edge, and the whole image, to know
what it shows. The U-Net (Ronneberger et al. 2015; for diffusion Ho et al. 2020, appendix B) sees
both:

    down    residual blocks; then half the rows and columns and more channels, level by level
    middle  attention: every position of the coarse image attends to every other
    up      the same levels in reverse order, each with twice the rows and columns of the last;
            each block also reads an output of the same level on the way down

These skip connections carry the details across; the path through the middle sees the whole image.
The time enters each residual block as one number per channel, added between its two convolutions:

    h = x + conv(silu(norm(conv(silu(norm(x))) + W silu(emb(t)))))

Most of the computation is at the full size, most of the weights are at the small sizes. With
patches, each p x p pixels become one pixel with p^2 times the channels: the computation falls to
1 / p^2, with almost the same weights (Luhman & Luhman 2022).

A text enters by cross-attention (Rombach et al. 2022): the queries come from the positions of the
image, the keys and values from the rows of `context`, the output of any text encoder.

One config describes both DDPM's network (UNet2DModel in diffusers) and those of Stable Diffusion 1
and 2 (UNet2DConditionModel); hub/diffusion.py reads and writes their weights.

Letters: B batch, C channels, H W rows and columns, T rows of a context or positions of an image,
E width of a context, N heads, K head width. Left out: class labels, several Transformer layers at
one level, the additions of SDXL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


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


@dataclass(frozen=True)
class UNetConfig:
    image_size: int = 32  # rows and columns of a training image; other sizes work too
    in_channels: int = 1  # channels of an image: 1 grey, 3 colour, or those of a latent
    out_channels: int = 0  # channels of the prediction; 0 = in_channels
    patch_size: int = 1  # rows and columns of a patch, which becomes one pixel of many channels
    channels: tuple[int, ...] = (32, 64, 128)  # width per level; each next level halves the size
    attend: tuple[bool, ...] = (False, False, True)  # attention per level; the middle always has it
    n_block: int = 2  # residual blocks per level on the way down; the way up has one more
    n_head: int = 4  # attention heads
    d_head: int = 0  # width of a head, from which the number of heads follows; 0 = use n_head
    d_context: int = 0  # width of a row of the context; 0 = no context
    groups: int = 16  # groups of channels that are normalised together
    norm_eps: float = 1e-5  # constant added to the variance in a normalisation
    dropout: float = 0.0  # share of activations set to zero in training
    cos_first: bool = True  # cosines before sines in the time features; DDPM has False
    time_shift: int = 0  # shift of the time frequencies; with DDPM's 1 the slowest is 1/10,000
    pad_end: bool = False  # pad only below and right when halving, as DDPM does, not on all sides

    def __post_init__(self):
        for name in ("channels", "attend"):  # a config read from JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

        for name in ("image_size", "in_channels", "patch_size", "n_block", "n_head", "groups"):
            self.check_least(name, 1)
        for name in ("out_channels", "d_head", "d_context", "time_shift"):
            self.check_least(name, 0)

        # Levels: every width must split into groups, and into heads where there is attention.
        if not self.channels or len(self.channels) != len(self.attend):
            values = f"channels {self.channels}, attend {self.attend}"
            raise ValueError(f"{values}: give each one value a level")
        attends = (*self.attend[:-1], True)  # the middle has the last width and always attends
        for width, attend in zip(self.channels, attends):
            self.check_divisible(width, "groups")
            if attend:
                self.check_divisible(width, "d_head" if self.d_head else "n_head")
        half = self.channels[0] // 2
        if self.channels[0] % 2 or half <= self.time_shift:
            problem = f"the first level has {self.channels[0]} channels"
            raise ValueError(f"{problem}; use an even number above {2 * self.time_shift}")

        if self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size is {self.patch_size}; it must be a power of two")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        shape = (1, self.in_channels, self.image_size, self.image_size)
        check_images(shape, self.in_channels, self.factor)

    def check_least(self, name: str, least: int) -> None:
        """Raise ValueError if a field is below `least`."""
        value = getattr(self, name)
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")

    def check_divisible(self, width: int, name: str) -> None:
        """Raise ValueError unless the value of a field divides `width`."""
        value = getattr(self, name)
        if width < 1 or width % value:
            raise ValueError(f"{width} channels cannot be divided by {name} {value}")

    @property
    def factor(self) -> int:
        """Ratio of the rows (and columns) of an image to those of the middle."""
        return self.patch_size * 2 ** (len(self.channels) - 1)

    def heads(self, width: int) -> int:
        """Number of attention heads at a level of `width` channels."""
        return width // self.d_head if self.d_head else self.n_head


# ---- pure functions -----------------------------------------------------------------------------


def time_features(t: Tensor, width: int, shift: int, cos_first: bool) -> Tensor:
    """Encode times t (B,) as waves (B, width), float32.

    Half of them are sines and half are cosines, with frequencies from 1 down to about 1/10,000, as
    the positions of Vaswani et al. (2017, section 3.5).
    """
    half = width // 2
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(exponent / (half - shift))  # (B, width / 2)
    if cos_first:
        waves = (angle.cos(), angle.sin())
    else:
        waves = (angle.sin(), angle.cos())
    return torch.cat(waves, dim=-1)


def repeat_and_convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Repeat every pixel 2 x 2 times, then convolve: (B, C, H, W) -> (B, C, 2 H, 2 W).

    This is the obvious way to enlarge an image; the weight is (C, C, 3, 3).
    """
    return F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, padding=1)


def enlarge(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute repeat_and_convolve(x, weight, bias) with 4/9 of the products.

    What does a single pixel of value 1 add to the result? In one dimension, with weights (a b c),
    it becomes two copies, and each copy leaves the weights in reverse order around its place:

        places of the result    .   1   2   .
        copy at place 1         c   b   a
        copy at place 2             c   b   a
        together                c  b+c a+b  a

    So each pixel adds a stamp of 4 numbers, and the next pixel adds its own two places further on.
    In two dimensions the stamp is 4 x 4: instead of 9 products for each of the 4 new pixels, 16 in
    all. Here the weights are added first, and one transposed convolution of stride 2 puts the
    stamps in their places.
    """
    stamp = F.pad(weight.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))  # (C, C, 5, 5)
    stamp = stamp[:, :, 1:] + stamp[:, :, :-1]  # both copies in a column: (C, C, 4, 5)
    stamp = stamp[..., 1:] + stamp[..., :-1]  # both copies in a row: (C, C, 4, 4)
    return F.conv_transpose2d(x, stamp, bias, stride=2, padding=1)


# ---- layers -------------------------------------------------------------------------------------


class Downsample(nn.Conv2d):
    """(B, C, H, W) -> (B, C, H/2, W/2): a convolution of stride 2."""

    def __init__(self, width: int, pad_end: bool):
        super().__init__(width, width, 3, stride=2, padding=0 if pad_end else 1)
        self.pad_end = pad_end

    def forward(self, x):
        if self.pad_end:
            x = F.pad(x, (0, 1, 0, 1))
        return super().forward(x)


class Upsample(nn.Conv2d):
    """(B, C, H, W) -> (B, C, 2 H, 2 W): repeat every pixel 2 x 2 times, then convolve."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, padding=1)

    def forward(self, x):
        return enlarge(x, self.weight, self.bias)


class ResBlock(nn.Module):
    """x (B, c_in, H, W), emb (B, 4 channels[0]) -> (B, c_out, H, W).

    Two convolutions, with the time added between them, and a skip connection around both. The skip
    is a 1 x 1 convolution if the number of channels changes.
    """

    def __init__(self, config: UNetConfig, c_in: int, c_out: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, c_in, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(4 * config.channels[0], c_out)
        self.norm2 = nn.GroupNorm(config.groups, c_out, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h  # (B, c_out, H, W)


# ---- attention ----------------------------------------------------------------------------------


class Attention(nn.Module):
    """softmax(q k' / sqrt(K)) v: rows x (B, T, C) attend to the rows of a context (B, T', E).

    In self-attention the context is x.
    """

    def __init__(self, width: int, d_context: int, n_head: int, bias: bool):
        super().__init__()
        self.n_head = n_head
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(d_context, width, bias=bias)
        self.v = nn.Linear(d_context, width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, x, context):
        q = rearrange(self.q(x), "B T (N K) -> B N T K", N=self.n_head)
        k = rearrange(self.k(context), "B T (N K) -> B N T K", N=self.n_head)
        v = rearrange(self.v(context), "B T (N K) -> B N T K", N=self.n_head)
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # Attention in bfloat16 is slow on a CPU.
            q = q.float()
            k = k.float()
            v = v.float()
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(q, k, v)  # (B, N, T, K)
        return self.out(rearrange(y, "B N T K -> B T (N K)"))


class SelfAttention(Attention):
    """DDPM's attention, (B, C, H, W) -> the same shape: every position attends to every other.

    The context is ignored.
    """

    def __init__(self, config: UNetConfig, width: int):
        super().__init__(width, width, config.heads(width), bias=True)
        self.norm = nn.GroupNorm(config.groups, width, eps=config.norm_eps)

    def forward(self, x, context):
        h = rearrange(self.norm(x), "B C H W -> B (H W) C")
        h = super().forward(h, h)
        return x + rearrange(h, "B (H W) C -> B C H W", H=x.size(2))


class Transformer(nn.Module):
    """Stable Diffusion's attention, (B, C, H, W) -> the same shape.

    The positions attend to each other, then to the context (B, T, E); then an MLP follows, gated by
    GELU (GEGLU, Shazeer 2020).
    """

    def __init__(self, config: UNetConfig, width: int):
        super().__init__()
        n_head = config.heads(width)
        self.norm = nn.GroupNorm(config.groups, width, eps=1e-6)
        self.enter = nn.Conv2d(width, width, 1)
        self.norm1 = nn.LayerNorm(width)
        self.look_around = Attention(width, width, n_head, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.look_up = Attention(width, config.d_context, n_head, bias=False)
        self.norm3 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 8 * width)
        self.down = nn.Linear(4 * width, width)
        self.leave = nn.Conv2d(width, width, 1)

    def forward(self, x, context):
        h = rearrange(self.enter(self.norm(x)), "B C H W -> B (H W) C")

        # Self-attention.
        rows = self.norm1(h)
        h = h + self.look_around(rows, rows)

        # Cross-attention.
        h = h + self.look_up(self.norm2(h), context)

        # MLP.
        value, gate = self.up(self.norm3(h)).chunk(2, dim=-1)  # each (B, H W, 4 C)
        h = h + self.down(value * F.gelu(gate))

        return x + self.leave(rearrange(h, "B (H W) C -> B C H W", H=x.size(2)))


# ---- the model ----------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block, followed by attention if the level attends."""

    def __init__(self, config: UNetConfig, c_in: int, c_out: int, attend: bool):
        super().__init__()
        self.res = ResBlock(config, c_in, c_out)
        self.attention = None
        if attend:
            kind = Transformer if config.d_context else SelfAttention
            self.attention = kind(config, c_out)

    def forward(self, x, emb, context):
        x = self.res(x, emb)
        if self.attention is not None:
            x = self.attention(x, context)
        return x


class Level(nn.Module):
    """The blocks of one size; `resample` leads to the next size, if there is one."""

    def __init__(self, blocks: list[Block], resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


class UNet(nn.Module):
    """x_t (B, C, H, W), times t (B,) or (), context (B, T, E) -> prediction (B, C, H, W).

    config.factor must divide H and W.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        first = config.channels[0]
        last = config.channels[-1]
        d_time = 4 * first
        area = config.patch_size**2
        self.time_in = nn.Linear(first, d_time)
        self.time_out = nn.Linear(d_time, d_time)
        self.conv_in = nn.Conv2d(area * config.in_channels, first, 3, padding=1)
        levels = list(enumerate(zip(config.channels, config.attend)))

        # The way down. `skips` lists the channels of each output that the way up will read.
        c = first
        skips = [c]
        down = []
        for i, (width, attend) in levels:
            blocks = []
            for _ in range(config.n_block):
                blocks.append(Block(config, c, width, attend))
                c = width
                skips.append(c)
            halve = None
            if i < len(levels) - 1:
                halve = Downsample(c, config.pad_end)
                skips.append(c)
            down.append(Level(blocks, halve))
        self.down = nn.ModuleList(down)

        # The middle.
        self.middle = Block(config, last, last, True)
        self.middle_out = ResBlock(config, last, last)

        # The way up.
        up = []
        for i, (width, attend) in reversed(levels):
            blocks = []
            for _ in range(config.n_block + 1):
                blocks.append(Block(config, c + skips.pop(), width, attend))
                c = width
            up.append(Level(blocks, Upsample(c) if i > 0 else None))
        self.up = nn.ModuleList(up)

        self.norm = nn.GroupNorm(config.groups, first, eps=config.norm_eps)
        c_out = config.out_channels or config.in_channels
        self.conv_out = nn.Conv2d(first, area * c_out, 3, padding=1)
        self.reset_parameters()

    def reset_buffers(self):
        """Do nothing: there are no buffers. time_features computes its waves from t."""

    def reset_parameters(self):
        """Set all biases, the end of each residual path and the output to 0 (Ho et al. 2020).

        The other weights keep the initial values that their PyTorch layers gave them.
        """
        zeros = ("bias", "conv2.weight", "attention.out.weight", "leave.weight", "conv_out.weight")
        for name, p in self.named_parameters():
            if name.endswith(zeros):
                nn.init.zeros_(p)

    def check(self, x_t: Tensor, context: Tensor | None) -> None:
        """Raise ValueError if the network cannot take these inputs."""
        check_images(x_t.shape, self.config.in_channels, self.config.factor)
        width = self.config.d_context
        if width and context is None:
            raise ValueError("this model needs a context (B, T, d_context), but none was given")
        if context is not None and (context.ndim != 3 or context.size(-1) != width):
            taken = f"(B, T, {width})" if width else "none"
            raise ValueError(f"the context is {tuple(context.shape)}; this model takes {taken}")

    def way_down(
        self, x_t: Tensor, t: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Run the way down and the middle.

        Returns the output of the middle (B, channels[-1], h, w), the skip connections in the order
        in which they were made, and the embedded time (B, 4 channels[0]).
        """
        config = self.config
        dtype = self.conv_in.weight.dtype

        # Time. One t serves all images.
        waves = time_features(
            t.expand(len(x_t)), config.channels[0], config.time_shift, config.cos_first
        )
        emb = F.silu(self.time_out(F.silu(self.time_in(waves.to(dtype)))))

        # Patches -> pixels of many channels.
        h = self.conv_in(F.pixel_unshuffle(x_t.to(dtype), config.patch_size))

        skips = [h]
        for level in self.down:
            for block in level.blocks:
                h = block(h, emb, context)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)
        h = self.middle_out(self.middle(h, emb, context), emb)
        return h, skips, emb

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Raises ValueError for a size, channels or a context that the model does not take."""
        self.check(x_t, context)
        if context is not None:
            context = context.to(self.conv_in.weight.dtype)
        h, skips, emb = self.way_down(x_t, t, context)
        for level in self.up:
            for block in level.blocks:
                h = block(torch.cat((h, skips.pop()), dim=1), emb, context)
            if level.resample is not None:
                h = level.resample(h)
        y = self.conv_out(F.silu(self.norm(h)))
        return F.pixel_shuffle(y, self.config.patch_size)  # (B, C, H, W)

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> UNet:
        """Read a UNet2DModel or UNet2DConditionModel folder of diffusers; see hub/diffusion.py."""
        from tinyfm.hub import diffusion

        return diffusion.load_unet(cls, UNetConfig, folder, dtype)

    def save_pretrained(self, folder: str, overwrite: bool = False) -> None:
        """Write weights and config in the layout of diffusers; see hub/diffusion.py."""
        from tinyfm.hub import diffusion

        diffusion.save_unet(self, folder, overwrite)
