"""The U-Net: a network from an image, and a time, to an image of the same size.

Diffusion (ddpm.py) asks a network to look at a noisy picture x_t and its noise level t, and to name
the noise. It must see details, to place every edge, and the whole, to know what is drawn. The U-Net
(Ronneberger et al. 2015; for diffusion Ho et al. 2020, appendix B) does both:

    down   residual blocks, then half the rows and columns and more channels, level by level
    middle attention: every place of the coarse picture looks at every other
    up     the same back; each block also reads what the way down left at its level

The way across, the skip connection, keeps the details; the way through the bottom sees the whole.
The time enters each residual block as one number a channel, added between its two convolutions:

    h = x + conv(silu(norm(conv(silu(norm(x))) + W silu(emb(t)))))

Most of the work is at full size, most of the weights below. Patches of p x p pixels, made one pixel
of p^2 as many channels, leave 1 / p^2 of the work to the same weights (Luhman & Luhman 2022).

A text enters by cross-attention (Rombach et al. 2022): queries from the places of the picture, keys
and values from the rows of `context`, which is whatever a text encoder gives.

One config expresses DDPM's network (UNet2DModel of diffusers) and Stable Diffusion 1's and 2's
(UNet2DConditionModel); hub_diffusion.py reads and writes their weights.
Letters: B batch, C channels, H W rows and columns, T rows of context or places of an image,
N heads, K head width. Left out: class labels, several Transformer layers at a level, SDXL's extras.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class UNetConfig:
    image_size: int = 32  # rows and columns of a training image; others work too
    in_channels: int = 1  # of an image: 1 grey, 3 colour, or those of a latent
    out_channels: int = 0  # of the prediction; 0 = in_channels
    patch_size: int = 1  # rows and columns of a patch, which becomes one pixel of many channels
    channels: tuple[int, ...] = (32, 64, 128)  # at each level; each has half the rows of the last
    attend: tuple[bool, ...] = (False, False, True)  # levels with attention; the middle has it
    n_block: int = 2  # residual blocks a level on the way down; one more on the way up
    n_head: int = 4  # attention heads
    d_head: int = 0  # width of a head, which gives their number; 0 = channels / n_head
    d_context: int = 0  # width of the context's rows; 0 = no context
    groups: int = 16  # of channels that are normalised together
    norm_eps: float = 1e-5  # added to the variance
    dropout: float = 0.0  # share of activations zeroed in training
    cos_first: bool = True  # order of the time features; False in DDPM
    time_shift: int = 0  # 1 in DDPM: its slowest wave is exactly 1/10,000
    pad_end: bool = False  # halving pads below and right only, as DDPM does; False: all around

    def __post_init__(self):
        for name in ("channels", "attend"):  # a config read from JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        ones = ("image_size", "in_channels", "patch_size", "n_block", "n_head", "groups")
        for name in (*ones, "out_channels", "d_head", "d_context", "time_shift"):
            if (value := getattr(self, name)) < (least := int(name in ones)):
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if not self.channels or len(self.channels) != len(self.attend):
            raise ValueError(f"channels {self.channels}, attend {self.attend}: one value a level")
        for width, attend in zip(self.channels, (*self.attend[:-1], True)):  # the middle attends
            head = ("d_head", self.d_head) if self.d_head else ("n_head", self.n_head)
            for name, part in [("groups", self.groups), head][: 1 + attend]:
                if width < 1 or width % part:
                    raise ValueError(f"{width} channels cannot be divided by {name} {part}")
        if self.channels[0] % 2 or self.channels[0] // 2 <= self.time_shift:
            raise ValueError(f"the first level has {self.channels[0]} channels; use an even number")
        if self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size is {self.patch_size}; it must be a power of two")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        size = (1, self.in_channels, self.image_size, self.image_size)
        check_images(size, self.in_channels, self.factor)

    @property
    def factor(self) -> int:
        """By how much rows and columns shrink to the middle."""
        return self.patch_size * 2 ** (len(self.channels) - 1)

    def heads(self, width: int) -> int:
        """Attention heads at a level of so many channels."""
        return width // self.d_head if self.d_head else self.n_head


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


def time_features(t: Tensor, width: int, shift: int, cos_first: bool) -> Tensor:
    """Times t (B,) as waves (B, width) of frequencies from 1 down to about 1/10,000, in float32.

    Half of them sines and half cosines, as the positions of Vaswani et al. 2017.
    """
    half = width // 2
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(exponent / (half - shift))
    waves = (angle.cos(), angle.sin()) if cos_first else (angle.sin(), angle.cos())
    return torch.cat(waves, dim=-1)


class Downsample(nn.Conv2d):
    """(B, C, H, W) -> (B, C, H/2, W/2): a convolution that moves by two."""

    def __init__(self, width: int, pad_end: bool):
        super().__init__(width, width, 3, stride=2, padding=0 if pad_end else 1)
        self.pad_end = pad_end

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)) if self.pad_end else x)


class Upsample(nn.Conv2d):
    """(B, C, H, W) -> (B, C, 2 H, 2 W): each pixel four times, then a convolution to blend them."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, padding=1)

    def forward(self, x):  # both at once, for 4/9 of the products: a pixel is a stamp of 4 x 4
        stamp = F.pad(self.weight.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))  # (C, C, 5, 5)
        stamp = stamp[:, :, 1:] + stamp[:, :, :-1]  # each pixel twice in a column
        stamp = stamp[..., 1:] + stamp[..., :-1]  # and in a row: (C, C, 4, 4)
        return F.conv_transpose2d(x, stamp, self.bias, stride=2, padding=1)


class ResBlock(nn.Module):
    """Two convolutions around the time, beside a path that changes the channels at most."""

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
    """softmax(q k' / sqrt(K)) v over rows: x (B, T, C) looks at itself, or at a context."""

    def __init__(self, width: int, d_context: int, n_head: int, bias: bool):
        super().__init__()
        self.n_head = n_head
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(d_context, width, bias=bias)
        self.v = nn.Linear(d_context, width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, x, context):
        project = (self.q(x), self.k(context), self.v(context))
        q, k, v = (rearrange(h, "B T (N K) -> B N T K", N=self.n_head) for h in project)
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # slow in bfloat16
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(y, "B N T K -> B T (N K)"))


class SelfAttention(Attention):
    """DDPM's attention: every place of the image looks at every other."""

    def __init__(self, config: UNetConfig, width: int):
        super().__init__(width, width, config.heads(width), bias=True)
        self.norm = nn.GroupNorm(config.groups, width, eps=config.norm_eps)

    def forward(self, x, context):
        h = rearrange(self.norm(x), "B C H W -> B (H W) C")
        h = super().forward(h, h)
        return x + rearrange(h, "B (H W) C -> B C H W", H=x.size(2))


class Transformer(nn.Module):
    """Stable Diffusion's: places look at each other, then at the context, then an MLP (GEGLU)."""

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
        rows = self.norm1(h)
        h = h + self.look_around(rows, rows)
        h = h + self.look_up(self.norm2(h), context)
        value, gate = self.up(self.norm3(h)).chunk(2, dim=-1)
        h = h + self.down(value * F.gelu(gate))  # Shazeer 2020
        return x + self.leave(rearrange(h, "B (H W) C -> B C H W", H=x.size(2)))


# ---- the model ----------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block and, where the level attends, attention after it."""

    def __init__(self, config: UNetConfig, c_in: int, c_out: int, attend: bool):
        super().__init__()
        kind = Transformer if config.d_context else SelfAttention
        self.res = ResBlock(config, c_in, c_out)
        self.attention = kind(config, c_out) if attend else None

    def forward(self, x, emb, context):
        x = self.res(x, emb)
        return x if self.attention is None else self.attention(x, context)


class Level(nn.Module):
    """The blocks that work at one size, and what leads to the next size, if there is one."""

    def __init__(self, blocks: list[Block], resample: nn.Module | None):
        super().__init__()
        self.blocks, self.resample = nn.ModuleList(blocks), resample


class UNet(nn.Module):
    """x_t (B, C, H, W), t (B,) steps, context (B, T, E) -> prediction (B, C, H, W).

    H and W must be divisible by config.factor.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        first, last, d_time = config.channels[0], config.channels[-1], 4 * config.channels[0]
        area, c_out = config.patch_size**2, config.out_channels or config.in_channels
        self.time_in, self.time_out = nn.Linear(first, d_time), nn.Linear(d_time, d_time)
        self.conv_in = nn.Conv2d(area * config.in_channels, first, 3, padding=1)
        levels = list(zip(config.channels, config.attend))
        c, kept, down, up = first, [first], [], []  # kept: channels of what the way up will read
        for i, (width, attend) in enumerate(levels):
            blocks = []
            for _ in range(config.n_block):
                blocks.append(Block(config, c, width, attend))
                c = width
                kept.append(c)
            halve = Downsample(c, config.pad_end) if i < len(levels) - 1 else None
            kept += [c] if halve else []
            down.append(Level(blocks, halve))
        self.down = nn.ModuleList(down)
        self.middle, self.middle_out = Block(config, last, last, True), ResBlock(config, last, last)
        for i, (width, attend) in reversed(list(enumerate(levels))):
            blocks = []
            for _ in range(config.n_block + 1):
                blocks.append(Block(config, c + kept.pop(), width, attend))
                c = width
            up.append(Level(blocks, Upsample(c) if i else None))
        self.up = nn.ModuleList(up)
        self.norm = nn.GroupNorm(config.groups, first, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(first, area * c_out, 3, padding=1)
        self.reset_parameters()

    def reset_buffers(self):
        """There are none: the waves of the time are computed from t, in float32 in any model."""

    def reset_parameters(self):
        """torch's weights, but biases, all residual paths and the output start at 0 (Ho et al.)."""
        silent = ("bias", "conv2.weight", "attention.out.weight", "leave.weight", "conv_out.weight")
        for name, p in self.named_parameters():
            if name.endswith(silent):
                nn.init.zeros_(p)

    def check(self, x_t: Tensor, context: Tensor | None) -> None:
        """Raise ValueError if the network cannot take these inputs."""
        check_images(x_t.shape, self.config.in_channels, self.config.factor)
        width = self.config.d_context
        if width and context is None:
            raise ValueError("this model needs a context (B, T, d_context): none was given")
        if context is not None and (context.ndim != 3 or context.size(-1) != width):
            taken = f"(B, T, {width})" if width else "none"
            raise ValueError(f"the context is {tuple(context.shape)}; this model takes {taken}")

    def way_down(self, x_t: Tensor, t: Tensor, context: Tensor | None = None) -> tuple:
        """(the middle (B, C, h, w), what the way up will read, the time (B, 4 C))."""
        c, dtype = self.config, self.conv_in.weight.dtype
        waves = time_features(t.expand(len(x_t)), c.channels[0], c.time_shift, c.cos_first)
        emb = F.silu(self.time_out(F.silu(self.time_in(waves.to(dtype)))))
        h = self.conv_in(F.pixel_unshuffle(x_t.to(dtype), c.patch_size))
        kept = [h]
        for level in self.down:
            for block in level.blocks:
                h = block(h, emb, context)
                kept.append(h)
            if level.resample is not None:
                h = level.resample(h)
                kept.append(h)
        return self.middle_out(self.middle(h, emb, context), emb), kept, emb

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Raises ValueError for sizes, channels or a context that the model does not take."""
        self.check(x_t, context)
        context = None if context is None else context.to(self.conv_in.weight.dtype)
        h, kept, emb = self.way_down(x_t, t, context)
        for level in self.up:
            for block in level.blocks:
                h = block(torch.cat((h, kept.pop()), dim=1), emb, context)
            h = h if level.resample is None else level.resample(h)
        y = self.conv_out(F.silu(self.norm(h)))
        return F.pixel_shuffle(y, self.config.patch_size)  # (B, C, H, W)

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> UNet:
        """Read a UNet2DModel or UNet2DConditionModel folder of diffusers (hub_diffusion.py)."""
        from tinyfm.hub import diffusion

        return diffusion.load_unet(cls, UNetConfig, folder, dtype)

    def save_pretrained(self, folder: str, overwrite: bool = False) -> None:
        """Write weights and config in the layout of diffusers (hub_diffusion.py)."""
        from tinyfm.hub import diffusion

        diffusion.save_unet(self, folder, overwrite)
