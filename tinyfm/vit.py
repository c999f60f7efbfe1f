"""The two towers of CLIP: Transformers that turn an image, or a text, into one vector.

The image tower is a Vision Transformer (Dosovitskiy et al. 2021): an image is cut into patches, a
patch is a token, and the state of one more token, which belongs to no patch, is the summary. The
text tower reads left to right as a GPT does; its summary is the state at the end token. So the last
block of either computes that one place alone, for a fraction of the work. Both are pre-norm
Transformers with learned positions and biases, as CLIP has them.

`config` is clip.py's CLIPConfig. Letters: B batch, T tokens, P patches, D width of a tower, N
heads, K head width, C channels, H W rows and columns, h w rows and columns of patches.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

# ---- layers -------------------------------------------------------------------------------------


def pick(x, at):
    """Of states (B, T, D) those of places `at` (B,) alone, (B, 1, D); of None, all."""
    return x if at is None else x[torch.arange(len(x), device=x.device), at][:, None]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x, at=None):
        q, k, v = self.q(pick(x, at)), self.k(x), self.v(x)
        q, k, v = (rearrange(y, "B T (N K) -> B N T K", N=self.heads) for y in (q, k, v))
        one, places = self.causal and at is not None, torch.arange(x.size(1), device=x.device)
        mask = places <= at[:, None, None, None] if one else None  # it sees all up to its place
        if x.device.type == "cpu":  # where the backward pass in bfloat16 is several times slower
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal and not one)
        return self.out(rearrange(y, "B N T K -> B T (N K)").to(x.dtype))


class MLP(nn.Module):
    def __init__(self, width: int, activation: str):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.quick = activation == "quick_gelu"

    def forward(self, x):
        x = self.up(x)
        # x sigmoid(1.702 x), in one step: silu(a) = a sigmoid(a)
        return self.down(F.silu(1.702 * x) / 1.702 if self.quick else F.gelu(x))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attention = Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, config.activation)

    def forward(self, x, at=None):
        """States (B, T, D) -> the next; or those of places `at` (B,) alone, (B, 1, D)."""
        x = pick(x, at) + self.attention(self.norm1(x), at)
        return x + self.mlp(self.norm2(x))


class PatchStem(nn.Module):
    """Images (B, C, H, W) -> tokens (B, P, D): a convolution whose steps are as wide as it is,
    which is one product of all pixels of a patch."""

    def __init__(self, config):
        super().__init__()
        self.size = config.patch_size
        self.project = nn.Linear(config.channels * self.size**2, config.image_width, bias=False)

    def forward(self, images):
        p = self.size
        return self.project(rearrange(images, "B C (h p) (w q) -> B (h w) (C p q)", p=p, q=p))


class ConvStem(nn.Module):
    """Images (B, C, H, W) -> tokens (B, P, D): convolutions that halve, to one pixel a patch."""

    def __init__(self, config):
        super().__init__()
        steps, D = config.patch_size.bit_length() - 1, config.image_width
        widths = [config.channels, *(max(8, D >> (steps - i)) for i in range(1, steps + 1))]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)
        )
        self.project = nn.Linear(widths[-1], D, bias=False)

    def forward(self, images):
        x = images.contiguous(memory_format=torch.channels_last)
        for conv in self.convs:
            x = F.gelu(conv(x))
        return self.project(rearrange(x, "B D h w -> B (h w) D"))


class ImageTower(nn.Module):
    """Images (B, C, H, W) -> (B, D): what a class token, put before the patches, has gathered."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, P = config.image_width, (config.image_size // config.patch_size) ** 2
        self.stem = ConvStem(config) if config.stem == "conv" else PatchStem(config)
        self.class_token = nn.Parameter(torch.empty(D))
        self.position = nn.Parameter(torch.empty(P + 1, D))
        self.norm1 = nn.LayerNorm(D, eps=config.norm_eps)
        self.blocks = nn.ModuleList(
            Block(D, config.image_head, False, config) for _ in range(config.image_layer)
        )
        self.norm2 = nn.LayerNorm(D, eps=config.norm_eps)
        self.reset_buffers()

    def reset_buffers(self):
        """The config's mean and deviation are of pixels in [0, 1]; these, of images in [-1, 1]."""
        mean, std = torch.tensor(self.config.image_mean), torch.tensor(self.config.image_std)
        self.register_buffer("mean", (2 * mean - 1)[:, None, None], persistent=False)
        self.register_buffer("std", (2 * std)[:, None, None], persistent=False)

    def states(self, images, at=None):
        """Normalised states (B, P + 1, D) of class token and patches, or of those `at` (B,) alone,
        (B, 1, D)."""
        images = ((images - self.mean) / self.std).to(self.position.dtype)
        x = self.stem(images)  # (B, P, D)
        token = self.class_token.to(x.dtype).expand(len(x), 1, -1)
        x = self.norm1(torch.cat((token, x), dim=1) + self.position)  # (B, P + 1, D)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm2(self.blocks[-1](x, at))

    def forward(self, images):
        first = torch.zeros(len(images), dtype=torch.long, device=images.device)
        return self.states(images, first)[:, 0]
