"""A GPT that sees: pictures between the words of a text.

A language model reads vectors, so a picture must become vectors too. The image tower (vit.py) turns
it into P states, one a patch. Two ways bring them to the words:

    prefix   A linear layer maps each state to a vector of the language model's width. These stand
             in the text like tokens, and the blocks attend to them as to all tokens before
             (Liu et al. 2023, LLaVA).
    cross    The text has one token for a picture. Before every n-th block, a new layer lets each
             token attend to the states of the last picture before it (Alayrac et al. 2022,
             Flamingo):

                 h = h + tanh(a) Attention(norm(h), states of the picture)
                 h = h + tanh(b) MLP(norm(h))

             The gates a and b are numbers. At a = b = 0 the language model is as it was without
             pictures. A token before the first picture gets 0 from the attention.

Either way a perceiver resampler can first reduce the P states to R: R learned vectors, the latents,
attend to the states and to each other (Alayrac et al. 2022, section 3.1.1).

In the tokens a picture is a run of `config.image_tokens` times the last id of the vocabulary,
`config.image_id`: the places of its vectors in the prefix way, one place in the cross way. Texts
and pictures may alternate. The attention of the cross way looks at one picture, but the states of
the tokens carry on what earlier ones showed.

Letters: B batch, T tokens, I pictures of a row, P patches, R vectors of a picture (P, or the number
of latents), D width of the language model, E width of the image tower, N heads, K head width,
C channels, H W rows and columns.
Left out: pictures of other sizes, video, the training of the image tower by contrast (clip.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tinyfm.generate import Sampling, complete
from tinyfm.gpt import GPT, MLP, GPTConfig, make_norm
from tinyfm.vit import ImageTower


@dataclass(frozen=True)
class VisionGPTConfig:
    way: Literal["prefix", "cross"] = "prefix"  # pictures as tokens, or by gated cross-attention
    n_latent: int = 0  # latents of the resampler, the vectors of a picture; 0 = one a patch
    resampler_layer: int = 2  # layers of the resampler
    cross_every: int = 1  # blocks from one layer of cross-attention to the next
    gate: float = 0.0  # start of the gates; 0 leaves the language model as it is
    frozen: bool = False  # train what sees alone, and keep the language model
    image_size: int = 32  # rows and columns of a picture
    channels: int = 1  # 1 for grey pictures, 3 for coloured ones
    patch_size: int = 8  # rows and columns of a patch
    stem: Literal["patch", "conv"] = "conv"  # how patches become vectors
    image_layer: int = 4  # blocks of the image tower
    image_head: int = 4  # heads of the image tower and of the resampler
    image_width: int = 128  # width of the image tower
    # The language model, which may be given as a dict. Its last id stands for pictures.
    gpt: GPTConfig = field(
        default_factory=lambda: GPTConfig(
            vocab_size=1024, context_length=64, n_layer=4, n_head=4, d_model=192
        )
    )

    # What the image tower reads as well: no inner width but the usual one, and pixels as they are.
    image_ff = 0
    norm_eps = 1e-5
    activation = "gelu"

    def __post_init__(self):
        if isinstance(self.gpt, dict):  # a config read from JSON
            object.__setattr__(self, "gpt", GPTConfig(**self.gpt))
        rules = [
            ("way", self.way in ("prefix", "cross"), "prefix or cross"),
            ("stem", self.stem in ("patch", "conv"), "patch or conv"),
            ("channels", self.channels in (1, 3), "1 (grey) or 3 (colour)"),
            ("n_latent", self.n_latent >= 0, "0 (none) or above"),
        ]
        sizes = "resampler_layer cross_every image_size patch_size image_layer image_head"
        for name in sizes.split():
            rules.append((name, getattr(self, name) >= 1, "at least 1"))
        for name, valid, rule in rules:
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {rule}")
        if self.image_size % self.patch_size:
            problem = f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}"
            raise ValueError(f"{problem}; use another patch_size")
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size {self.patch_size} is no power of 2; use stem patch")
        if self.image_width < 1 or self.image_width % self.image_head:
            problem = f"image_width {self.image_width} is not divisible by {self.image_head} heads"
            raise ValueError(f"{problem}; use a multiple of image_head")
        if self.image_tokens >= self.gpt.context_length:
            problem = f"a picture takes {self.image_tokens} tokens, and the context has"
            advice = "use larger patches, n_latent, or a longer context"
            raise ValueError(f"{problem} {self.gpt.context_length}; {advice}")

    @property
    def image_mean(self) -> tuple[float, ...]:
        """Mean and deviation of pixels in [0, 1] that leave pixels in [-1, 1] as they are."""
        return (0.5,) * self.channels

    @property
    def image_std(self) -> tuple[float, ...]:
        return (0.5,) * self.channels

    @property
    def image_id(self) -> int:
        """The id that marks the places of pictures in the tokens."""
        return self.gpt.vocab_size - 1

    @property
    def vectors_per_image(self) -> int:
        """R: the number of vectors of one picture."""
        return self.n_latent or (self.image_size // self.patch_size) ** 2

    @property
    def image_tokens(self) -> int:
        """The number of places that a picture takes in the tokens."""
        return self.vectors_per_image if self.way == "prefix" else 1


# ---- the resampler ------------------------------------------------------------------------------


class ResamplerLayer(nn.Module):
    """Latents attend to the states of a picture and to themselves; then an MLP with ReLU.

    x = x + Attention(q = norm(x), k = v = (norm(states), norm(x)))
    x = x + MLP(norm(x))
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_states = nn.LayerNorm(width)
        self.norm1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """Latents x (B, R, E), states (B, P, E) -> the next latents (B, R, E)."""
        latents = self.norm1(x)
        read = torch.cat((self.norm_states(states), latents), dim=1)  # (B, P + R, E)
        q = rearrange(self.q(latents), "B R (N K) -> B N R K", N=self.heads)
        k = rearrange(self.k(read), "B S (N K) -> B N S K", N=self.heads)
        v = rearrange(self.v(read), "B S (N K) -> B N S K", N=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(rearrange(y, "B N R K -> B R (N K)"))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Resampler(nn.Module):
    """States (B, P, E) of pictures -> as many vectors as there are latents, (B, R, E)."""

    def __init__(self, n_latent: int, n_layer: int, width: int, heads: int):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(n_latent, width))
        self.layers = nn.ModuleList(ResamplerLayer(width, heads) for _ in range(n_layer))
        self.norm = nn.LayerNorm(width)

    def forward(self, states: Tensor) -> Tensor:
        x = self.latents.to(states.dtype).expand(len(states), -1, -1)
        for layer in self.layers:
            x = layer(x, states)
        return self.norm(x)


# ---- gated cross-attention ----------------------------------------------------------------------


class GatedCrossBlock(nn.Module):
    """Tokens attend to the last picture before them, then an MLP; a gate weighs each update."""

    def __init__(self, config: GPTConfig, image_width: int):
        super().__init__()
        D = config.d_model
        NK = config.n_head * config.K
        self.heads = config.n_head
        self.norm1 = make_norm(config, D)
        self.q = nn.Linear(D, NK, bias=False)
        self.k = nn.Linear(image_width, NK, bias=False)
        self.v = nn.Linear(image_width, NK, bias=False)
        self.out = nn.Linear(NK, D, bias=False)
        self.norm2 = make_norm(config, D)
        self.mlp = MLP(config)
        self.attention_gate = nn.Parameter(torch.empty(1))
        self.mlp_gate = nn.Parameter(torch.empty(1))

    def keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Of the pictures' vectors (B, I, R, E): (B, N, I R, K) each. They depend on no text."""
        k = rearrange(self.k(states), "B I R (N K) -> B N (I R) K", N=self.heads)
        v = rearrange(self.v(states), "B I R (N K) -> B N (I R) K", N=self.heads)
        return k, v

    def forward(
        self,
        x: Tensor,
        states: Tensor,
        last: Tensor,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Stream x (B, T, D) -> the next one. states (B, I, R, E): the pictures' vectors.

        last (B, T): number of the last picture before each token, from 0, and -1 for none. kept:
        what `keys_and_values` returned for the same states, where more than one call reads them.
        """
        # In training they are computed here: a block that is sharded has its weights only while
        # its forward pass runs.
        keys, values = kept or self.keys_and_values(states)
        R = states.size(2)
        q = rearrange(self.q(self.norm1(x)), "B T (N K) -> B N T K", N=self.heads)
        image = torch.arange(keys.size(2), device=x.device) // R  # the picture of each key
        blind = last[:, :, None] < 0  # (B, T, 1)
        mask = (image == last[:, :, None]) | blind  # (B, T, I R); no softmax is over an empty set
        y = F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype), mask[:, None])
        y = self.out(rearrange(y, "B N T K -> B T (N K)")).masked_fill(blind, 0)
        x = x + self.attention_gate.tanh() * y
        return x + self.mlp_gate.tanh() * self.mlp(self.norm2(x))


# ---- the model ----------------------------------------------------------------------------------


class Sight:
    """The pictures of a batch as the language model reads them, encoded once.

    It counts the places of pictures in the tokens that it has read, so that later tokens can
    continue earlier ones, as they do with a KVCache.
    """

    def __init__(self, model: VisionGPT, images: Tensor):
        """images (B, I, C, H, W) in [-1, 1]. Raises ValueError for other shapes."""
        self.model = model
        self.n_image = images.size(1) if images.ndim == 5 else 0
        states = model.encode_images(images)  # (B, I, R, E)
        self.seen = torch.zeros(len(states), dtype=torch.long, device=states.device)
        self.last = self.seen[:, None]  # (B, T): see GatedCrossBlock
        if model.config.way == "prefix":
            self.vectors = rearrange(model.project(states), "B I R D -> B (I R) D")
        else:
            self.states = states
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # see `keep`

    def keep(self) -> None:
        """Compute the keys and values of the pictures once, for all tokens that will come."""
        if self.model.config.way == "cross":
            found = (block.keys_and_values(self.states) for block in self.model.cross)
            self.kept = dict(enumerate(found))

    def check(self, tokens: Tensor) -> None:
        """Raise ValueError if the next tokens (B, T) have more pictures than there are.

        Training does not ask: it would wait for the device, and its batches are made to fit.
        """
        config = self.model.config
        most = int((self.seen + (tokens == config.image_id).sum(1)).max())
        if most > self.n_image * config.image_tokens:
            raise ValueError(
                f"a text has {most} places of pictures, and there are "
                f"{self.n_image} pictures of {config.image_tokens} places: give each its places"
            )

    def embed(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings x (B, T, D) of tokens (B, T), with the vectors of pictures in their places."""
        config = self.model.config
        is_place = tokens == config.image_id
        count = self.seen[:, None] + is_place.cumsum(1)  # (B, T)
        self.seen = count[:, -1]
        self.last = count - 1  # in the cross way, where a picture has one place
        if config.way == "cross":
            return x
        index = (count - 1).clamp(min=0)[:, :, None].expand(-1, -1, x.size(2))
        return torch.where(is_place[:, :, None], self.vectors.gather(1, index).to(x.dtype), x)

    def before_block(self, x: Tensor, layer: int) -> Tensor:
        """The stream x (B, T, D) as the block number `layer` of the language model gets it."""
        config = self.model.config
        if config.way == "prefix" or layer % config.cross_every:
            return x
        number = layer // config.cross_every
        return self.model.cross[number](x, self.states, self.last, self.kept.get(number))


class Reader(nn.Module):
    """A VisionGPT beside given pictures, as generate.py reads a language model."""

    def __init__(self, model: VisionGPT, images: Tensor):
        super().__init__()
        self.config = model.config.gpt
        self.gpt = model.gpt
        self.sight = Sight(model, images)
        self.sight.keep()

    def hidden(self, tokens: Tensor, cache) -> Tensor:
        if cache.length == 0:  # a text is read from its start
            self.sight.seen = torch.zeros_like(self.sight.seen)
        self.sight.check(tokens)
        return self.gpt.hidden(tokens, cache, self.sight)

    def head(self, states: Tensor) -> Tensor:
        logits = self.gpt.head(states)
        logits[:, -1] = float("-inf")  # the id of pictures is never written
        return logits


class VisionGPT(nn.Module):
    """Tokens (B, T) and pictures -> logits (B, T, V) of the next token."""

    unit = "pair"  # one row of a batch: pictures and their text
    outer = (*GPT.outer, "class_token", "position", "latents")
    images_per_row = 1  # of the data; for example_batch and FLOPs

    def __init__(self, config: VisionGPTConfig):
        super().__init__()
        self.config = config
        E, D = config.image_width, config.gpt.d_model
        self.image_tower = ImageTower(config)
        if config.n_latent:
            sizes = (config.n_latent, config.resampler_layer, E, config.image_head)
            self.resampler = Resampler(*sizes)
        if config.way == "prefix":
            self.project = nn.Linear(E, D)
        else:
            n_cross = len(range(0, config.gpt.n_layer, config.cross_every))
            self.cross = nn.ModuleList(GatedCrossBlock(config.gpt, E) for _ in range(n_cross))
        self.reset_parameters()
        self.gpt = GPT(config.gpt)  # which draws its own weights
        if config.frozen:
            self.gpt.requires_grad_(False)
        self.train()

    def reset_parameters(self):
        """Draw the weights of what sees: biases 0, norms 1, tables with deviation 0.02.

        A matrix has deviation 1 / sqrt(inputs): with the 0.02 of the language model, narrow
        resamplers hardly learned. Convolutions keep PyTorch's start. Matrices that write
        to a stream start at 0, but for the cross-attention, whose gates do that: if both were 0,
        neither would have a gradient.
        """
        for name, p in self.named_parameters():
            last = name.rpartition(".")[2]
            if last == "bias":
                nn.init.zeros_(p)
            elif last in ("attention_gate", "mlp_gate"):
                nn.init.constant_(p, self.config.gate)
            elif last in ("class_token", "position", "latents"):
                nn.init.normal_(p, std=0.02)
            elif p.ndim == 1:
                nn.init.ones_(p)
            elif name.endswith(("out.weight", "down.weight")) and not name.startswith("cross"):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                nn.init.normal_(p, std=p.size(1) ** -0.5)

    def train(self, mode: bool = True) -> VisionGPT:
        """Set the mode; a frozen language model stays in evaluation mode."""
        super().train(mode)
        if self.config.frozen:
            self.gpt.eval()
        return self

    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures (B, I, C, H, W) in [-1, 1] -> their vectors (B, I, R, E).

        Raises ValueError for no picture, or pictures of other channels or another size.
        """
        c = self.config
        if images.ndim != 5 or not images.size(1):
            shape = tuple(images.shape)
            raise ValueError(f"pictures of shape {shape}; give (rows, pictures, {c.channels}, "
                             f"{c.image_size}, {c.image_size}) with at least one")  # fmt: skip
        if tuple(images.shape[2:]) != (c.channels, c.image_size, c.image_size):
            found = "{} channels, {} x {} pixels".format(*images.shape[2:])
            raise ValueError(f"a picture has {found}; the model reads {c.channels} channels, "
                             f"{c.image_size} x {c.image_size}: convert it")  # fmt: skip
        B = len(images)
        states = self.image_tower.states(images.flatten(0, 1))[:, 1:]  # without the class token
        if c.n_latent:
            states = self.resampler(states)
        return rearrange(states, "(B I) R E -> B I R E", B=B)

    def hidden(self, tokens: Tensor, images: Tensor | None = None) -> Tensor:
        """Tokens (B, T), and pictures (B, I, C, H, W) or None for text alone -> states (B, T, D).

        Raises ValueError for more places of pictures in the tokens than there are pictures.
        """
        if images is None:
            if bool((tokens == self.config.image_id).any()):
                raise ValueError("the text has a place for a picture, but there is none: give it")
            return self.gpt.hidden(tokens)
        sight = Sight(self, images)
        sight.check(tokens)
        return self.gpt.hidden(tokens, None, sight)

    def forward(self, tokens: Tensor, images: Tensor | None = None) -> Tensor:
        return self.gpt.head(self.hidden(tokens, images))  # (B, T, V)

    def loss(self, batch: dict[str, Tensor], generators=None) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of -ln p(next token), in nats, over batch["tokens"] (B, T + 1).

        batch["images"] (B, I, C, H, W); targets where batch["mask"] (B, T) is False do not count,
        and no place of a picture does. metrics["weight"]: the number of targets that count.
        """
        tokens = batch["tokens"]
        counted = tokens[:, 1:] != self.config.image_id
        if "mask" in batch:
            counted = counted & batch["mask"]
        sight = Sight(self, batch["images"])
        return self.gpt.loss({"tokens": tokens, "mask": counted}, sight=sight)

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch with the shapes and dtypes of real data: pictures, then a text of zeros."""
        c = self.config
        n_image = self.images_per_row
        tokens = torch.zeros(rows, c.gpt.context_length + 1, dtype=torch.long)
        tokens[:, : n_image * c.image_tokens] = c.image_id
        return {
            "images": torch.zeros(rows, n_image, c.channels, c.image_size, c.image_size),
            "tokens": tokens,
        }

    # ---- writing ----

    def place_images(self, parts: Sequence[Sequence[int] | None]) -> list[int]:
        """The tokens of texts (ids) and pictures (None) in a row.

        Raises ValueError if the context cannot hold them, or an id is outside the vocabulary.
        """
        c = self.config
        n_image = sum(part is None for part in parts)
        row: list[int] = []
        for part in parts:
            row += [c.image_id] * c.image_tokens if part is None else list(part)
        if len(row) > c.gpt.context_length:
            problem = f"{n_image} pictures of {c.image_tokens} tokens and the text take {len(row)}"
            raise ValueError(
                f"{problem}, and the context holds {c.gpt.context_length}: leave out pictures"
            )
        return row

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        images: Tensor,
        sampling: Sampling | None = None,
        use_cache: bool = True,
        never: Sequence[int] = (),
    ) -> list[list[int]]:
        """Continue each prompt, made by `place_images`; return the new tokens of each row.

        images (B, I, C, H, W): those of each row, in order. They are encoded once, and their keys
        and values are kept. never: ids that are not written. A text ends with the context at the
        latest. Raises ValueError as `hidden` does.
        """
        sampling = sampling or Sampling()
        if len(images) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts, pictures of {len(images)}: give each its own"
            )
        room = self.config.gpt.context_length - max(map(len, prompts), default=0)
        if room < sampling.max_new_tokens:
            raise ValueError(
                f"the longest prompt leaves {room} tokens of the context, and max_new_tokens is "
                f"{sampling.max_new_tokens}: use at most {room}, or a shorter prompt"
            )
        self.eval()
        return complete(Reader(self, images), prompts, sampling, use_cache, never)
