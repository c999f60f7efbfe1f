"""CLIP: images and texts in one space, learnt from pairs (Radford et al. 2021).

Two towers, a Vision Transformer (Dosovitskiy et al. 2021) and a text Transformer, each turn their
input into a unit vector of E numbers. Trained on pairs, the vectors of an image and of its own
caption come to point the same way, those of an image and another's caption apart:

    z_ij = exp(s) x_i . y_j        similarity of image i and text j, s a learnt log-scale
    loss = (L(z) + L(z')) / 2,     L(z) = -mean_i ln softmax_j(z_ij) at j = i        (InfoNCE)

Each row of z is a classification: which of the B texts belongs to image i? So a class needs no
training, only a name: write names as captions, and an image belongs to the nearest (zero-shot).
Two more losses have the same signature. SigLIP (Zhai et al. 2023) asks of each pair by itself if
it belongs together. SimCLR (Chen et al. 2020) has no captions: the pair is one image, altered
twice at random.

A batch is a problem, not a sum of problems: its rows are each other's wrong answers. There can be
more of them than the batch has, and they can stand for all others: rivals.py.

To save memory, the towers run on `rows_at_once` rows at a time and do so again on the way back
(GradCache, Gao et al. 2021), and z is made a few rows at a time: same loss, same gradients. With
several processes, `gather` brings the other ranks' vectors; gradients flow through it.

One config expresses OpenAI's CLIP models exactly. Our own default has convolutions in front of the
image tower (Xiao et al. 2021), which learns faster from few images.

Letters: B batch, R rows of it, T tokens, P patches, D width of a tower, N heads, E embedding width,
V vocabulary, C channels, H W rows and columns. Left out: the ResNet image towers, and text towers
that look both ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyfm.vit import Block, ImageTower


@dataclass(frozen=True)
class CLIPConfig:
    image_size: int = 32  # rows and columns of an image
    channels: int = 1  # of an image: 1 grey, 3 colour
    patch_size: int = 8  # rows and columns of a patch, one token of the image tower
    stem: Literal["patch", "conv"] = "conv"  # how patches become tokens: one product, or layers
    image_layer: int = 3  # blocks of the image tower
    image_width: int = 128
    image_head: int = 4
    vocab_size: int = 2048  # tokens the text tower knows
    context_length: int = 32  # tokens of a caption, the end token included
    text_layer: int = 2  # blocks of the text tower
    text_width: int = 128
    text_head: int = 4
    embed_dim: int = 128  # width of the space that both share
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    norm_eps: float = 1e-5  # added to the variance
    image_mean: tuple[float, ...] = (0.5,)  # the image tower reads (pixel - mean) / std, of pixels
    image_std: tuple[float, ...] = (0.5,)  # ... in [0, 1]; one number, or one for each channel
    end_token: int = -1  # id that ends a text; -1 = a row's last id, -2 = its highest
    loss: Literal["infonce", "siglip", "simclr"] = "infonce"
    temperature: float = 0.07  # exp(-s) at the start
    max_scale: float = 100.0  # largest exp(s)
    rivals: Literal["batch", "all"] = "batch"  # infonce: what the wrong answers at hand stand for
    memory: int = 0  # infonce: rows of the batches before that are wrong answers too
    memory_after: int = 0  # batches before the memory begins: weights move fast at first
    augment: float = 0.1  # how far training alters an image, 0 = not at all; simclr: at least 1

    def __post_init__(self):
        sizes = ("image_size", "patch_size", "image_layer", "image_width", "image_head",
                 "vocab_size", "text_layer", "text_width", "text_head", "embed_dim")  # fmt: skip
        least = dict.fromkeys(sizes, 1) | dict.fromkeys(("memory", "memory_after", "augment"), 0)
        least |= {"context_length": 2, "end_token": -2}
        for name, n in least.items():
            if getattr(self, name) < n:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {n}")
        for tower in ("image", "text"):
            D, N = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_head")
            if D % N:
                problem = f"{tower}_width {D} is not divisible by {tower}_head {N}"
                raise ValueError(f"{problem}; use {N * max(1, round(D / N))}")
        H, p = self.image_size, self.patch_size
        if H % p:
            problem = f"image_size {H} is not divisible by patch_size {p}"
            raise ValueError(f"{problem}; use {p * max(1, round(H / p))}")
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size is {self.patch_size}; the conv stem needs a power of 2")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; use 1 for grey, 3 for colour images")
        for name in ("image_mean", "image_std"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)  # JSON has lists
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} is {values}; give 1 number, or {self.channels}")
        positive = (self.temperature, self.max_scale, *self.image_std)
        if min(positive) <= 0:
            raise ValueError(f"temperature, max_scale, image_std are {positive}, not all above 0")
        for name, kind in get_type_hints(CLIPConfig).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {get_args(kind)}")


# ---- losses: unit vectors x (R, E) of this rank's rows, y (B, E) of all columns -----------------
#
# ids (R,) and (B,) say what belongs together: where they are equal, and equal captions are.


def softmax_loss(z: Tensor, positive: Tensor) -> Tensor:
    """Sum over rows of z (R, B) of -ln softmax at the positives, shared evenly (InfoNCE)."""
    right = z.masked_fill(~positive, 0).sum(1) / positive.sum(1)  # their mean
    return (z.logsumexp(1) - right).sum()


def sigmoid_loss(z: Tensor, positive: Tensor) -> Tensor:
    """Sum over all pairs of -ln P(together or not), P a sigmoid (SigLIP, algorithm 1)."""
    return -F.logsigmoid(torch.where(positive, z, -z)).sum()


def contrast(loss: Callable, x: Tensor, y: Tensor, x_ids: Tensor, y_ids: Tensor, scale: Tensor,
             bias: Tensor | None = None, skip: Tensor | None = None, margin: Tensor | None = None,
             rows: int = 0) -> Tensor:  # fmt: skip
    """Mean over the R rows of x of `loss`, z and its gradient made `rows` rows at a time.

    skip (R,) is the column each row must not see: itself, where x and y are the same vectors.
    margin (B,), one of each column, is added to the z of what does not belong together.
    """

    def part(x, x_ids, skip):
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 cannot tell neighbours apart
            z = (scale * x) @ y.T  # (rows, B)
        z = z if bias is None else z + bias
        positive = x_ids[:, None] == y_ids
        z = z if margin is None else torch.where(positive, z, z + margin)
        if skip is not None:
            itself = skip[:, None] == torch.arange(len(y), device=y.device)
            z, positive = z.masked_fill(itself, -math.inf), positive & ~itself
        return loss(z, positive)

    if not 0 < rows < len(x):
        return part(x, x_ids, skip) / len(x)
    skips = [None] * math.ceil(len(x) / rows) if skip is None else skip.split(rows)
    parts = zip(x.split(rows), x_ids.split(rows), skips)
    return sum(checkpoint(part, *p, use_reentrant=False) for p in parts) / len(x)


# ---- random views of images ---------------------------------------------------------------------


def augment(images: Tensor, generators: list[torch.Generator], strength: float) -> Tensor:
    """Shift, turn, stretch, shear and shade each image (B, C, H, W) by its own random stream.

    Strength 1 shifts by up to 1/8 of the frame, turns by 15 degrees, stretches by a fifth either
    way, and scales contrast by up to 0.6 to 1.4. The border is repeated outside.
    """
    u = torch.stack([torch.rand(7, generator=g) for g in generators]).to(images.device)
    u = (2 * u - 1) * strength  # (B, 7) in [-strength, strength]
    angle, shear = u[:, 0] * math.radians(15), 0.15 * u[:, 1]
    wide, high = torch.exp(0.2 * u[:, 2]), torch.exp(0.2 * u[:, 3])
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack((cos * wide, (shear - sin) * high, u[:, 4] / 4), dim=1)
    second = torch.stack((sin * wide, cos * high, u[:, 5] / 4), dim=1)
    grid = F.affine_grid(torch.stack((first, second), dim=1), images.shape, align_corners=False)
    moved = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return (moved * (1 + 0.4 * u[:, 6].clamp(-1, 1))[:, None, None, None]).clamp(-1, 1)


# ---- the model ----------------------------------------------------------------------------------


class CLIP(nn.Module):
    """Images (B, C, H, W) in [-1, 1] and tokens (B, T) -> logits (B, B), row i for image i."""

    outer = ()  # the tables too learn faster by Muon: a batch of captions has most words
    whole_batch = True  # the loss compares the rows: the trainer hands over all it has

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.rows_at_once = 0  # in the towers and in z, to save memory; 0 = all
        self.rank, self.gather = 0, lambda rows: rows  # gather: all ranks' rows, in their order
        self.n_pairs = 0  # in the data, for rivals "all"
        self.image_tower = ImageTower(config)
        self.image_projection = nn.Linear(config.image_width, config.embed_dim, bias=False)
        if config.loss != "simclr":
            self.text_tower = TextTower(config)
            self.text_projection = nn.Linear(config.text_width, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        if config.loss == "siglip":
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        if config.memory and config.loss == "infonce":
            self.memory = Memory(config.memory, config.embed_dim, config.memory_after)
        self.reset_parameters()

    def reset_buffers(self):
        """What is not saved, to be made anew where the model was built on "meta"."""
        self.image_tower.reset_buffers()

    def reset_parameters(self):
        """Normal with deviation 1/sqrt(fan-in), smaller the more layers write to the same state."""
        for name, p in self.named_parameters():
            layers = self.config.text_layer if "text" in name else self.config.image_layer
            if name.endswith("bias") and "logit" not in name:
                nn.init.zeros_(p)
            elif "norm" in name:
                nn.init.ones_(p)
            elif p.ndim >= 2 and "embedding" not in name and "position" not in name:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=(p[0].numel() * (2 * layers if last else 1)) ** -0.5)
            elif p.ndim:
                nn.init.normal_(p, std=0.02)

    # ---- embeddings ----

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> unit vectors (B, E)."""
        c = self.config
        expected = (c.channels, c.image_size, c.image_size)
        if images.shape[1:] != expected:
            raise ValueError(f"images are {tuple(images.shape[1:])}, the model takes {expected}")
        return F.normalize(self.image_projection(self.image_tower(images)).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T), each row filled up with its end token -> unit vectors (B, E)."""
        if self.config.loss == "simclr":
            raise ValueError("this model was trained on images alone: it has no text tower")
        return F.normalize(self.text_projection(self.text_tower(tokens)).float(), dim=-1)

    def scale(self) -> Tensor:
        return self.logit_scale.clamp(max=math.log(self.config.max_scale)).exp()

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        return self.scale() * self.encode_image(images) @ self.encode_text(tokens).T  # (B, B)

    # ---- loss ----

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """What data could give: that many images and captions of full length."""
        c, ids = self.config, torch.arange(rows)
        images = torch.zeros(rows, c.channels, c.image_size, c.image_size)
        end = c.end_token if c.end_token >= 0 else 1
        tokens = torch.full((rows, c.context_length), 0 if end else 1)
        tokens[:, -1] = end
        return {"images": images, "tokens": tokens, "labels": ids}

    def in_parts(self, encode: Callable, inputs: Tensor) -> Tensor:
        """encode(inputs), rows_at_once rows at a time, what is between kept for one part only."""
        if not 0 < self.rows_at_once < len(inputs):
            return encode(inputs)
        parts = inputs.split(self.rows_at_once)
        return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in parts])

    def views(self, batch: dict[str, Tensor], generators) -> list[Tensor]:
        """The two sides of the contrast, unit vectors (R, E) each."""
        images, c = batch["images"], self.config
        if c.loss == "simclr":  # in evaluation too, where the streams are the same each time
            strength = max(1.0, c.augment)
            pair = [augment(images, generators, strength) for _ in range(2)]
            return [self.in_parts(self.encode_image, view) for view in pair]
        if self.training and c.augment and generators:
            images = augment(images, generators, c.augment)
        texts = self.in_parts(self.encode_text, batch["tokens"])
        return [self.in_parts(self.encode_image, images), texts]

    def loss(self, batch: dict[str, Tensor], generators=None) -> tuple[Tensor, dict[str, Tensor]]:
        """The contrastive loss of the config, in nats (siglip: per image, summed over texts).

        batch: "images" (R, C, H, W) in [-1, 1], "tokens" (R, T), "labels" (R,), equal where
        captions are. generators: one a row; simclr needs them. Raises ValueError for one row.
        """
        x, y = self.views(batch, generators)
        gather = self.gather if self.training else lambda rows: rows
        all_x, all_y = gather(x), gather(y)
        if len(all_x) < 2:
            raise ValueError("a contrastive loss needs a batch of 2 rows or more: of 1 it is 0")
        rows = self.rows_at_once
        if self.config.loss == "simclr":
            return self.simclr_loss(x, y, all_x, all_y), {}
        ids, all_ids, scale = batch["labels"], gather(batch["labels"]), self.scale()
        if self.config.loss == "siglip":
            bias = self.logit_bias
            return contrast(sigmoid_loss, x, all_y, ids, all_ids, scale, bias, rows=rows), {}
        to_x, to_y, to_ids, margin = all_x, all_y, all_ids, None
        if self.training and self.config.memory:
            to_x, to_y, to_ids = self.memory.joined(all_x, all_y, all_ids)
            self.memory.add(all_x, all_y, all_ids)
        if self.training and (self.config.memory or self.config.rivals == "all"):
            margin = margins(to_ids, self.n_pairs if self.config.rivals == "all" else 0)
        both = {"x_ids": ids, "y_ids": to_ids, "scale": scale, "margin": margin, "rows": rows}
        ways = (x, to_y), (y, to_x)  # which text to an image, which image to a text
        return sum(contrast(softmax_loss, *way, **both) for way in ways) / 2, {}

    def simclr_loss(self, x, y, all_x, all_y):
        """NT-Xent (Chen et al. 2020, eq. 1): a view's partner among all views but itself."""
        ids = torch.arange(len(all_x), device=x.device)
        own = ids if len(all_x) == len(x) else ids.split(len(x))[self.rank]
        rows, columns = torch.cat((x, y)), torch.cat((all_x, all_y))
        return contrast(
            softmax_loss, rows, columns, own.repeat(2), ids.repeat(2), self.scale(),
            skip=torch.cat((own, own + len(ids))), rows=self.rows_at_once,
        )  # fmt: skip

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> CLIP:
        """Read a CLIPModel folder in the Hugging Face layout (hub_clip.py)."""
        from tinyfm.hub import clip

        return clip.load(cls, CLIPConfig, folder, dtype)

    def save_pretrained(self, folder: str, tokenizer=None, overwrite: bool = False) -> None:
        """Write weights, config and tokenizer in the Hugging Face layout (hub_clip.py)."""
        from tinyfm.hub import clip

        clip.save(self, folder, tokenizer, overwrite)


# FOLDED: merge this into the module's docstring
# More wrong answers than a batch has, for CLIP's InfoNCE (clip.py).
#
# The rows of a batch are each other's wrong answers. They are few and soon easily told apart; then
# there is nothing left to learn from them, though among all M pairs of the data many an image would
# find a wrong text. Two remedies, which go together:
#
#     memory      The vectors of the last N rows stay, as further columns of z that cost no tower a
#                 pass (cross-batch memory, XBM, Wang et al. 2020). They were made by the weights of
#                 some steps ago and have no gradient. While weights move fast they mislead, and the
#                 more so the older: N is a few batches, and the memory may begin `after` so many.
#
#     margin      The loss estimates a softmax over all M from what there is as a sample (Jean et al.
#                 2015). Of n answers, n - 1 are wrong, and each stands for (M - 1) / (n - 1) of all:
#                 ln of that is added to its z.
#
# Letters: B batch, N rows remembered, E embedding width, M pairs in the data, n of them at hand.


class Memory(nn.Module):
    """The last N rows: vectors of both sides (N, E), and ids (N,), -1 where there is none yet.

    All of it are buffers, saved with the weights: a run that goes on has the memory it had.
    """

    def __init__(self, rows: int, width: int, after: int):
        super().__init__()
        self.after = after
        self.register_buffer("x", torch.zeros(rows, width))
        self.register_buffer("y", torch.zeros(rows, width))
        self.register_buffer("ids", torch.full((rows,), -1))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))  # seen so far

    def joined(self, x: Tensor, y: Tensor, ids: Tensor) -> list[Tensor]:
        """Those of a batch (B, E), (B, E), (B,), and below them those remembered, (B + N, ...)."""
        return [torch.cat(pair) for pair in ((x, self.x), (y, self.y), (ids, self.ids))]

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor, ids: Tensor) -> None:
        """A batch, in place of the oldest rows; it leaves none if it comes too early, nor does a
        row that is not finite, of a step that the trainer is about to skip."""
        fine = (x + y).isfinite().all(1) & (self.batches >= self.after)
        ids, x, y = ids.where(fine, -1), x.nan_to_num(), y.nan_to_num()
        for memory, rows in zip((self.x, self.y, self.ids), self.joined(x, y, ids)):
            memory.copy_(rows[: len(memory)])
        self.batches += 1


def margins(ids: Tensor, n_pairs: int) -> Tensor:
    """ln of how many wrong answers each column stands for, (columns,); -inf where it is empty.

    It is 0, one stands for itself, where n_pairs is no more than the answers there are.
    """
    known = ids >= 0
    each = ((n_pairs - 1) / (known.sum() - 1)).clamp(min=1)
    return each.log().where(known, -math.inf)


class TextTower(nn.Module):
    """Tokens (B, T) -> (B, D): the state at the end token, which alone has read the whole text.

    The first, if there are several: a row is filled up with them. Which token that is stands in the
    config; OpenAI's own code took the highest id of a row.
    """

    def __init__(self, config):
        super().__init__()
        D, self.end_token = config.text_width, config.end_token
        self.token_embedding = nn.Embedding(config.vocab_size, D)
        self.position = nn.Parameter(torch.empty(config.context_length, D))
        self.blocks = nn.ModuleList(
            Block(D, config.text_head, True, config) for _ in range(config.text_layer)
        )
        self.norm = nn.LayerNorm(D, eps=config.norm_eps)

    def states(self, tokens, at=None):
        """Normalised states of all tokens (B, T, D), or of those `at` (B,) alone, (B, 1, D)."""
        if tokens.size(1) > len(self.position):
            raise ValueError(f"{tokens.size(1)} tokens exceed context_length {len(self.position)}")
        x = self.token_embedding(tokens) + self.position[: tokens.size(1)]
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1](x, at))

    def forward(self, tokens):
        ends = {-1: tokens[:, -1:], -2: tokens.amax(1, keepdim=True)}
        end = (tokens == ends.get(self.end_token, self.end_token)).int().argmax(1)  # the first
        if type(tokens) is Tensor and not torch.compiler.is_compiling():  # where there are numbers
            tokens = tokens[:, : int(end.max()) + 1]  # no end token sees what fills up the rows
        return self.states(tokens, end)[:, 0]
