"""A Vision Transformer (Dosovitskiy et al. 2021): the image tower of CLIP.

An image is cut into patches, and each patch becomes a token. One more token, the class token, is
put before them; it belongs to no patch, and its state after the last block is the summary of the
image, a vector of D numbers. The blocks are pre-norm Transformer blocks with learned positions and
biases, as CLIP has them:

    h = h + Attention(norm(h))     softmax(q k' / sqrt(K)) v: tokens exchange information
    h = h + MLP(norm(h))           each token on its own

CLIP's text tower (clip.py) is made of the same blocks, but causal, and reads its summary at the end
token. Either tower needs one token's state after the last block, so that block computes only this
state: one query, and the keys and values of all tokens. `at` says which: two texts whose end tokens
stand at positions 3 and 5 have at = (3, 5), and images, with the class token in front, at = (0, 0).

`config` is a CLIPConfig (clip.py). Letters: B batch, T tokens, P patches, D width of a tower,
N heads, K head width, C channels, H W rows and columns, h w rows and columns of patches.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

# ---- layers -------------------------------------------------------------------------------------


def select(x, at):
    """From states (B, T, D), select position at[i] of row i: (B, 1, D). If `at` is None, all."""
    if at is None:
        return x
    rows = torch.arange(len(x), device=x.device)
    return x[rows, at][:, None]


class Attention(nn.Module):
    """Self-attention with N heads; causal: a token attends to no later token."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x, at=None):
        """States (B, T, D) -> (B, T, D); with `at` (B,), only the output at at[i], (B, 1, D)."""
        q = rearrange(self.q(select(x, at)), "B T (N K) -> B N T K", N=self.heads)
        k = rearrange(self.k(x), "B T (N K) -> B N T K", N=self.heads)
        v = rearrange(self.v(x), "B T (N K) -> B N T K", N=self.heads)
        mask = None
        if self.causal and at is not None:  # the single query sees the tokens up to its position
            positions = torch.arange(x.size(1), device=x.device)
            mask = positions <= at[:, None, None, None]  # (B, 1, 1, T)
        if x.device.type == "cpu":
            # On a CPU the backward pass of attention is several times slower in bfloat16.
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(x.device.type, enabled=False):
            is_causal = self.causal and at is None
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
        return self.out(rearrange(y, "B N T K -> B T (N K)").to(x.dtype))


class MLP(nn.Module):
    """Two linear layers around a GELU: (B, T, D) -> (B, T, F) -> (B, T, D); F is 4 D by default.

    "quick_gelu" is OpenAI's approximation x sigmoid(1.702 x).
    """

    def __init__(self, width: int, inner: int, activation: str):
        super().__init__()
        inner = inner or 4 * width
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.quick = activation == "quick_gelu"

    def forward(self, x):
        x = self.up(x)
        if self.quick:
            x = F.silu(1.702 * x) / 1.702  # silu(a) = a sigmoid(a), so this is x sigmoid(1.702 x)
        else:
            x = F.gelu(x)
        return self.down(x)


class Block(nn.Module):
    """One layer of a tower: attention, then an MLP, each added to the states."""

    def __init__(self, width: int, heads: int, inner: int, causal: bool, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attention = Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, inner, config.activation)

    def forward(self, x, at=None):
        """States (B, T, D) -> the next states; with `at` (B,) only those positions', (B, 1, D)."""
        x = select(x, at) + self.attention(self.norm1(x), at)
        return x + self.mlp(self.norm2(x))


# ---- stems: from pixels to tokens ---------------------------------------------------------------


class PatchStem(nn.Module):
    """Images (B, C, H, W) -> tokens (B, P, D): one linear layer over all pixels of a patch.

    It equals a convolution whose stride is the size of its kernel.
    """

    def __init__(self, config):
        super().__init__()
        self.size = config.patch_size
        self.project = nn.Linear(config.channels * self.size**2, config.image_width, bias=False)

    def forward(self, images):
        p = self.size
        return self.project(rearrange(images, "B C (h p) (w q) -> B (h w) (C p q)", p=p, q=p))


class ConvStem(nn.Module):
    """Images (B, C, H, W) -> tokens (B, P, D), by convolutions of stride 2 (Xiao et al. 2021).

    They halve rows and columns until each patch is one pixel.
    """

    def __init__(self, config):
        super().__init__()
        D = config.image_width
        n_conv = config.patch_size.bit_length() - 1  # log2 of the patch size
        widths = [config.channels]
        for later in reversed(range(n_conv)):  # the width doubles with each convolution, up to D
            widths.append(max(8, D >> later))
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, stride=2, padding=1) for c_in, c_out in pairwise(widths)
        )
        self.project = nn.Linear(widths[-1], D, bias=False)

    def forward(self, images):
        x = images.contiguous(memory_format=torch.channels_last)
        for conv in self.convs:
            x = F.gelu(conv(x))
        return self.project(rearrange(x, "B D h w -> B (h w) D"))


# ---- the tower ----------------------------------------------------------------------------------


class ImageTower(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> (B, D): the state of the class token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.image_width
        P = (config.image_size // config.patch_size) ** 2
        self.stem = ConvStem(config) if config.stem == "conv" else PatchStem(config)
        self.class_token = nn.Parameter(torch.empty(D))
        self.position = nn.Parameter(torch.empty(P + 1, D))
        self.norm1 = nn.LayerNorm(D, eps=config.norm_eps)
        self.blocks = nn.ModuleList(
            Block(D, config.image_head, config.image_ff, causal=False, config=config)
            for _ in range(config.image_layer)
        )
        self.norm2 = nn.LayerNorm(D, eps=config.norm_eps)
        self.reset_buffers()

    def reset_buffers(self):
        """Compute the mean and deviation that normalise images in [-1, 1].

        The config gives them for pixels in [0, 1]. They are not saved.
        """
        mean = 2 * np.array(self.config.image_mean, np.float32) - 1
        std = 2 * np.array(self.config.image_std, np.float32)
        for name, values in (("mean", mean), ("std", std)):
            table = torch.tensor(values.tolist())[:, None, None]  # (C, 1, 1)
            self.register_buffer(name, table, persistent=False)

    def states(self, images, at=None):
        """Normalised states (B, P + 1, D) of the class token and the patches.

        With `at` (B,), only the state at position at[i] of row i, (B, 1, D).
        """
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
