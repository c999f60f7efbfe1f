"""An encoder-only Transformer: BERT and its family, which read a text in both directions.

A GPT predicts the next token, so a token's state knows the text before it alone. An encoder reads
the whole text at once: every token attends to every other. The next token would then be no secret,
so other tokens are hidden. Of a text x_1 ... x_T a random set M, 15% of the places, is predicted
(Devlin et al. 2018, section 3.1), from a text x' in which most of them read [MASK]:

    loss = - 1/|M| sum_{i in M} ln p(x_i | x')         in nats per masked token

The states of the last block then describe each token in its context. Classifiers and search read
them (adapt/heads.py). The model writes no texts: p(x_i | x') is no factor of the chain rule, and
this loss cannot be compared with a GPT's.

Only 15% of the tokens teach. ELECTRA (Clark et al. 2020) learns from all of them. A small generator
is trained with the loss above; a token is drawn from its p at each place of M, and the model
itself, the discriminator, says of every token whether it was replaced:

    y_i = 1 if the drawn token differs from x_i, else 0        d_i: the discriminator's logit
    loss = (generator's loss) + 50/T sum_i [ln(1 + exp(d_i)) - y_i d_i]

No gradient flows through the draw, so this is no GAN. The two share their embeddings: the generator
learns fast which tokens are alike. After training the generator is put away.

One config expresses several published models:

    BERT        Devlin et al. 2018: learned positions, segments, LayerNorm after each update
    RoBERTa     Liu et al. 2019: the same; positions start at 2, and padding has none
    DistilBERT  Sanh et al. 2019: half the layers and no segments; adapt/distill.py trains one
    ELECTRA     Clark et al. 2020: as above, with narrow embeddings in the small model
    ModernBERT  Warner et al. 2024: rotary positions, LayerNorm before each update, GEGLU, no
                biases, and in two of three layers attention to near tokens only

The default config has the layout of ModernBERT, without windows: with the norms before the updates,
training needs no warmup of thousands of steps (Xiong et al. 2020).

Padding costs nothing outside of attention, and it changes nothing: see `Rows`.

Letters: B batch, T tokens, D model width, N heads, K head width, F feed-forward width, V
vocabulary, E embedding width, n real tokens of a batch (no padding), P places that are predicted.
Left out: BERT's second loss, whether one sentence follows another (RoBERTa does as well without).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class EncoderConfig:
    vocab_size: int = 4096  # number of tokens the model knows; a tokenizer is trained to this size
    context_length: int = 128  # largest number of tokens the model sees at once
    n_layer: int = 6  # number of blocks
    n_head: int = 4  # attention heads
    d_model: int = 256  # width of the states
    d_ff: int = 0  # width inside the MLP; 0 = 4 d_model, or 8/3 d_model for geglu
    d_embedding: int = 0  # width of the embeddings, projected to d_model; 0 = d_model
    mlp: Literal["geglu", "gelu"] = "geglu"  # nonlinearity of the MLP
    norm: Literal["pre", "post"] = "pre"  # LayerNorm before each update, or after it is added
    norm_eps: float = 1e-5  # small number added to the variance in each norm
    position: Literal["rope", "learned"] = "rope"  # rotary positions, or a learned vector for each
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    window: int = 0  # tokens on either side to attend to, in layers with a window; 0 = no such ones
    window_every: int = 3  # with a window, each window_every-th layer from the first has none
    window_theta: float = 10_000.0  # base of the rotary wavelengths in layers with a window
    # Row of the first position in the table of learned ones. Above 0, padding is not counted.
    first_position: int = 0
    segments: int = 0  # kinds of segments, such as question and answer; 0 = none
    bias: bool = False  # biases in the linear layers and norms
    dropout: float = 0.0  # share of activations set to zero in training
    zero_init: bool = True  # output projections start at zero, so each update starts as zero
    pad_id: int = 0  # token that fills a row up
    objective: Literal["mlm", "electra"] = "mlm"  # predict masked tokens, or find replaced ones
    generator_head: int = 1  # electra: heads of the generator, n_head are the model's; 0 = none
    detection_weight: float = 50.0  # electra: weight of the discriminator's loss

    def __post_init__(self):
        self._check_at_least(1, "vocab_size", "context_length", "n_layer", "n_head", "d_model")
        self._check_at_least(0, "d_ff", "d_embedding", "first_position", "segments", "pad_id")
        self._check_at_least(0, "generator_head", "detection_weight", "window")
        self._check_at_least(1, "window_every")
        if self.d_model % self.n_head:
            nearest = self.n_head * max(1, round(self.d_model / self.n_head))
            problem = f"d_model {self.d_model} is not divisible by n_head {self.n_head}"
            raise ValueError(f"{problem}; use {nearest}")
        if self.position == "rope" and self.K % 2:
            raise ValueError(f"the head width {self.K} is odd; rotary positions need an even one")
        if self.position == "rope" and self.first_position:
            problem = f"first_position is {self.first_position}, and rotary positions have no table"
            raise ValueError(f"{problem}; use position learned, or first_position 0")
        if self.pad_id >= self.vocab_size:
            problem = f"pad_id {self.pad_id} is not in the vocabulary, 0 ... {self.vocab_size - 1}"
            raise ValueError(f"{problem}; use the id with which your tokenizer pads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        for name, kind in get_type_hints(EncoderConfig).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"{name} is {value!r}; use one of {get_args(kind)}")

    def _check_at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    # The sizes that 0 leaves open, computed so that they follow when d_model changes.

    @property
    def K(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_head

    @property
    def E(self) -> int:
        """Width of the embeddings."""
        return self.d_embedding or self.d_model

    @property
    def F(self) -> int:
        """Width inside the MLP: three matrices of 8/3 D cost as much as two of 4 D."""
        if self.d_ff:
            return self.d_ff
        if self.mlp == "geglu":
            return 32 * math.ceil(self.d_model / 12)  # 8/3 D, rounded up to a multiple of 32
        return 4 * self.d_model

    def generator(self) -> EncoderConfig:
        """ELECTRA's generator: fewer heads of the same width, the same layers and embeddings."""
        share = self.generator_head / self.n_head
        return replace(
            self,
            objective="mlm",
            n_head=self.generator_head,
            d_model=self.generator_head * self.K,
            d_ff=max(1, round(share * self.F)),
            d_embedding=self.E,
        )


# ---- rows with padding --------------------------------------------------------------------------


class Rows:
    """The real tokens of a batch (B, T) as one list, and back.

    Texts differ in length, and the shorter ones of a batch are filled up. Norms, MLPs and
    projections act on each token alone, so they are given the list (n, D) of real tokens. Only
    attention needs the rows, and there no token attends to padding.
    """

    def __init__(self, mask: Tensor | None, shape: tuple[int, int]):
        """mask: True for real tokens (B, T), or None if all are."""
        self.shape = shape
        self.index = None  # places of the listed tokens in the flat batch, (n,)
        self.real = 0  # so many of these are real, the first ones
        self.keys = None  # True for tokens to attend to, (B, 1, 1, T)
        known = type(mask) is Tensor  # fake tensors, as of the calculators, have no values to read
        if known and not mask.all():
            flat = mask.flatten()
            self.index = flat.nonzero()[:, 0]
            self.real = len(self.index)
            self.keys = mask[:, None, None]
            if mask.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
                # For bfloat16 a CPU compiles each matrix product for its n, which takes longer than
                # the product. Some padding makes n a multiple of 128, so that few n occur.
                padding = (~flat).nonzero()[: -self.real % 128, 0]
                self.index = torch.cat((self.index, padding))

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (n, D)."""
        x = x.flatten(0, 1)
        return x if self.index is None else x[self.index]

    def unpack(self, x: Tensor) -> Tensor:
        """(n, D) -> (B, T, D), 0 at padding."""
        if self.index is not None:
            empty = x.new_zeros(math.prod(self.shape), x.size(1))
            x = empty.index_copy(0, self.index[: self.real], x[: self.real])
        return x.unflatten(0, self.shape)


# ---- positions ----------------------------------------------------------------------------------


def rotary_tables(config: EncoderConfig, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of each position and pair, float32 (context_length, K/2).

    Pair i turns by theta^(-2i/K) at each position (Su et al. 2021, eq. 15).
    """
    table = torch.empty(config.context_length, config.K // 2)
    if table.is_meta:  # shapes alone: arithmetic there loads PyTorch's compiler, for a second
        return table, torch.empty_like(table)
    exponent = torch.arange(0, config.K, 2, dtype=torch.float32) / config.K
    positions = torch.arange(config.context_length, dtype=torch.float32)
    angles = positions[:, None] / theta**exponent
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + K/2) of x (B, N, T, K) by angles with cos, sin (T, K/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Reach(NamedTuple):
    """What a layer's tokens attend to, and how positions are read."""

    allowed: Tensor | None  # True where a token may attend to another, (B or 1, 1, T or 1, T)
    angles: tuple[Tensor, Tensor] | None  # cos and sin of the rotary angles, (T, K/2) each


def near(T: int, window: int, keys: Tensor | None, device: torch.device) -> Tensor:
    """True for the real tokens at a distance of at most `window`: bool (B or 1, 1, T, T).

    keys: True for real tokens, (B, 1, 1, T), or None if all are. A token always attends to itself,
    padding too, so that no softmax is over an empty set.
    """
    positions = torch.arange(T, device=device)
    distance = (positions[:, None] - positions).abs()[None, None]  # (1, 1, T, T)
    allowed = distance <= window
    if keys is not None:
        allowed = (allowed & keys) | (distance == 0)
    return allowed


# ---- layers -------------------------------------------------------------------------------------


def make_norm(config: EncoderConfig, width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


class Embeddings(nn.Module):
    """Tokens (B, T) -> (B, T, E): vectors of token, position and segment, added and normalised."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.E)
        if config.position == "learned":
            rows = config.first_position + config.context_length
            self.position_embedding = nn.Embedding(rows, config.E)
        if config.segments:
            self.segment_embedding = nn.Embedding(config.segments, config.E)
        self.norm = make_norm(config, config.E)
        self.dropout = nn.Dropout(config.dropout)

    def positions(self, tokens: Tensor) -> Tensor:
        """Rows of the position table: (T,), or (B, T) where padding is not counted."""
        first = self.config.first_position
        if not first:
            return torch.arange(tokens.size(1), device=tokens.device)
        real = tokens != self.config.pad_id
        return real.cumsum(1) * real + first - 1  # padding has the row before the first

    def forward(self, tokens, segments=None):
        """segments (B, T): the kind of segment of each token; without them, 0 for all."""
        config = self.config
        x = self.token_embedding(tokens)
        if config.position == "learned":
            x = x + self.position_embedding(self.positions(tokens))
        if config.segments:
            if segments is None:
                segments = torch.zeros_like(tokens)
            x = x + self.segment_embedding(segments)
        return self.dropout(self.norm(x))


class Attention(nn.Module):
    """Self-attention with N heads: a token attends to the real tokens of its row, or near ones."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        D = config.d_model
        self.heads = config.n_head
        self.dropout = config.dropout
        self.q = nn.Linear(D, D, bias=config.bias)
        self.k = nn.Linear(D, D, bias=config.bias)
        self.v = nn.Linear(D, D, bias=config.bias)
        self.out = nn.Linear(D, D, bias=config.bias)

    def forward(self, x, rows, reach):
        """States (n, D) -> (n, D), by Rows and a Reach. Without dropout:

        weights = (q @ k.mT / sqrt(K)).masked_fill(~allowed, -inf).softmax(-1)  # (B, N, T, T)
        y = weights @ v
        """
        q = rearrange(rows.unpack(self.q(x)), "B T (N K) -> B N T K", N=self.heads)
        k = rearrange(rows.unpack(self.k(x)), "B T (N K) -> B N T K", N=self.heads)
        v = rearrange(rows.unpack(self.v(x)), "B T (N K) -> B N T K", N=self.heads)
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # On a CPU the backward pass of attention is several times slower in bfloat16.
            q, k, v = q.float(), k.float(), v.float()
        if reach.angles is not None:
            q = rotate(q, *reach.angles).to(v.dtype)
            k = rotate(k, *reach.angles).to(v.dtype)
        with torch.autocast(x.device.type, enabled=False):
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=reach.allowed, dropout_p=dropout)
        return self.out(rows.pack(rearrange(y, "B N T K -> B T (N K)")))


class MLP(nn.Module):
    """Two linear layers around a GELU: (n, D) -> (n, F) -> (n, D).

    GEGLU (Shazeer 2020) multiplies the inner values by a gate, computed by a third layer.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.gated = config.mlp == "geglu"
        if self.gated:
            self.gate = nn.Linear(config.d_model, config.F, bias=config.bias)
        self.up = nn.Linear(config.d_model, config.F, bias=config.bias)
        self.down = nn.Linear(config.F, config.d_model, bias=config.bias)

    def forward(self, x):
        if self.gated:
            return self.down(F.gelu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """One layer of the encoder: attention, then an MLP, each added to the states.

    "post", as in 2017: the sum is normalised. "pre": what is read is normalised. The embeddings are
    normalised already, so the first block reads them as they are, unless they were projected.
    """

    def __init__(self, config: EncoderConfig, layer: int):
        super().__init__()
        self.post = config.norm == "post"
        self.windowed = config.window > 0 and layer % config.window_every > 0
        normalised = layer == 0 and not self.post and config.d_model == config.E
        self.norm1 = nn.Identity() if normalised else make_norm(config, config.d_model)
        self.attention = Attention(config)
        self.norm2 = make_norm(config, config.d_model)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rows, reach):
        if self.post:
            x = self.norm1(x + self.dropout(self.attention(x, rows, reach)))
            return self.norm2(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(self.attention(self.norm1(x), rows, reach))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Tower(nn.Module):
    """Embeddings (B, T, E) -> states (B, T, D), 0 at padding."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        D = config.d_model
        if config.E != D:
            self.project = nn.Linear(config.E, D, bias=config.bias)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        if config.norm == "pre":
            self.norm = make_norm(config, D)
        self.reset_buffers()

    def reset_buffers(self):
        """Compute the tables of rotary angles, which are not saved."""
        config = self.config
        if config.position == "rope":
            for kind, theta in (("full", config.rope_theta), ("near", config.window_theta)):
                cos, sin = rotary_tables(config, theta)
                self.register_buffer(f"{kind}_cos", cos, persistent=False)
                self.register_buffer(f"{kind}_sin", sin, persistent=False)

    def reaches(self, rows: Rows, T: int, device: torch.device) -> tuple[Reach, Reach | None]:
        """The Reach of layers without a window, and of those with one."""
        config = self.config
        full_angles = None
        near_angles = None
        if config.position == "rope":
            full_angles = (self.full_cos[:T], self.full_sin[:T])
            near_angles = (self.near_cos[:T], self.near_sin[:T])
        full = Reach(rows.keys, full_angles)
        if not config.window:
            return full, None
        return full, Reach(near(T, config.window, rows.keys, device), near_angles)

    def forward(self, x, mask=None):
        """mask (B, T): True for real tokens, or None if all are."""
        config = self.config
        rows = Rows(mask, x.shape[:2])
        full, windowed = self.reaches(rows, x.size(1), x.device)
        x = rows.pack(x)  # (n, E)
        if config.d_model != config.E:
            x = self.project(x)  # (n, D)
        for block in self.blocks:
            x = block(x, rows, windowed if block.windowed else full)
        if config.norm == "pre":
            x = self.norm(x)
        return rows.unpack(x)


class MaskedHead(nn.Module):
    """States (..., D) -> logits (..., V) of the token there, by the tied token embedding."""

    def __init__(self, config: EncoderConfig, embedding: nn.Embedding):
        super().__init__()
        self.transform = nn.Linear(config.d_model, config.E, bias=config.bias)
        self.norm = make_norm(config, config.E)
        self.decoder = nn.Linear(config.E, config.vocab_size)
        self.decoder.weight = embedding.weight

    def forward(self, x):
        return self.decoder(self.norm(F.gelu(self.transform(x))))


class Detector(nn.Module):
    """States (..., D) -> logits (...) of "this token was replaced"."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.transform = nn.Linear(config.d_model, config.d_model)
        self.out = nn.Linear(config.d_model, 1)

    def forward(self, x):
        return self.out(F.gelu(self.transform(x)))[..., 0]


# ---- ELECTRA's draw -----------------------------------------------------------------------------


@torch.no_grad()
def draw(logits: Tensor, u: Tensor) -> Tensor:
    """A token for each row of logits (P, V), drawn by a number u (P,) in [0, 1): (P,).

    Token v is drawn if p(0) + ... + p(v - 1) <= u < p(0) + ... + p(v).
    """
    below = logits.float().softmax(-1).cumsum(-1)  # (P, V)
    return (below <= u[:, None] * below[:, -1:]).sum(-1).clamp(max=logits.size(-1) - 1)


def uniform(shape: tuple[int, int], generators: list[torch.Generator]) -> Tensor:
    """Numbers in [0, 1), (B, T); row i is drawn from generators[i], a CPU generator."""
    B, T = shape
    if generators is None or len(generators) != B:
        found = len(generators or [])
        raise ValueError(
            f"the electra loss draws tokens: pass {B} generators, 1 a row, not {found}"
        )
    return torch.stack([torch.rand(T, generator=g) for g in generators])


# ---- the model ----------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Tokens (B, T) of int64 in [0, V) -> logits (B, T, V) of the token at each place."""

    unit = "token"  # what a data set is counted in
    # Tables and heads: for AdamW, not for Muon.
    outer = ("token_embedding", "position_embedding", "segment_embedding", "head", "detector")
    share = 0.15  # of the tokens that the data let the model predict; for example_batch and FLOPs

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.tower = Tower(config)
        reader = config  # of the masked tokens
        if config.objective == "electra":
            self.detector = Detector(config)
            if config.generator_head:
                reader = config.generator()
                self.generator = Tower(reader)
        if config.objective == "mlm" or config.generator_head:
            self.head = MaskedHead(reader, self.embeddings.token_embedding)
        self.reset_parameters()

    def reset_buffers(self):
        """Compute the tables of rotary angles, after the model was built on "meta"."""
        for module in self.modules():
            if isinstance(module, Tower):
                module.reset_buffers()

    def reset_parameters(self):
        """Draw the weights as BERT does: normal with standard deviation 0.02, biases 0, norms 1.

        With zero_init, the matrices that write to the states start at 0.
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim == 1:
                nn.init.ones_(p)
            elif self.config.zero_init and name.endswith(("attention.out.weight", "down.weight")):
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=0.02)

    # ---- states and predictions ----

    def embed(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """Tokens (B, T) -> (B, T, E). Raises ValueError for what the tables have no row for."""
        config = self.config
        T = tokens.size(1)
        if config.context_length < T:
            problem = f"{T} tokens exceed context_length {config.context_length}"
            raise ValueError(f"{problem}; shorten the text, or train a model with a longer context")
        if segments is not None and not config.segments:
            raise ValueError("the model was built with segments 0: leave the segments out")
        try:
            return self.embeddings(tokens, segments)
        except IndexError:  # on a CPU
            self.check_ids("token id", tokens, config.vocab_size)
            self.check_ids("segment", segments, config.segments)
            raise

    @staticmethod
    def check_ids(kind: str, ids: Tensor | None, n: int) -> None:
        """Raise ValueError for a number that is not in 0 ... n - 1."""
        wrong = [] if ids is None else ids[(ids < 0) | (ids >= n)].tolist()
        if wrong:
            problem = f"{kind} {wrong[0]} is not one of the model's, 0 ... {n - 1}"
            raise ValueError(f"{problem}; use the tokenizer that the model was trained with")

    def hidden(
        self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, T) -> states (B, T, D) after the last block, 0 at padding.

        mask (B, T): True for real tokens, or None if all are. segments (B, T): the kind of segment
        of each token. Raises ValueError for a text longer than context_length, and for ids that the
        model does not have.
        """
        return self.tower(self.embed(tokens, segments), mask)

    def reader(self) -> Tower:
        """The tower whose states predict masked tokens: ELECTRA's generator, or the only one.

        Raises ValueError for a published discriminator, which has none.
        """
        if not hasattr(self, "head"):
            raise ValueError(
                "this ELECTRA has no generator, so it predicts no tokens: fine-tune it "
                "(--init-from RUN --task classify), load the folder of the generator, or train one "
                "too (--model.generator-head 1)"
            )
        return self.generator if hasattr(self, "generator") else self.tower

    def forward(self, tokens, mask=None, segments=None) -> Tensor:
        """Logits (B, T, V) of the token at each place; the arguments are those of `hidden`."""
        states = self.reader()(self.embed(tokens, segments), mask)
        return self.head(states)

    def detect(self, tokens, mask=None, segments=None) -> Tensor:
        """ELECTRA: logits (B, T) of "this token was replaced"."""
        return self.detector(self.hidden(tokens, mask, segments))

    # ---- loss ----

    def target_states(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(places of the targets in the flat batch (P,), the states from which they are predicted).

        Only these states (P, D) go through the head. It has a fifth of the weights of BERT-base,
        and its logits are V numbers a token: at all places it would cost a fifth of a step, and
        most of the memory.
        """
        places = batch.get("places")
        if places is None:
            places = (batch["targets"].flatten() != -100).nonzero()[:, 0]
        x = self.embed(batch["tokens"], batch.get("segments"))
        states = self.reader()(x, batch.get("mask"))
        return places, states.flatten(0, 1)[places]

    def predictions(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(places of the targets in the flat batch (P,), logits (P, V) there, float32)."""
        places, states = self.target_states(batch)
        return places, self.head(states).float()

    def loss(self, batch: dict[str, Tensor], generators=None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the objective, in nats.

        batch: "tokens" (B, T), the text with masks put in; "targets" (B, T), the hidden tokens, and
        -100 where none is predicted; "mask" (B, T), True for real tokens, if there is padding;
        "segments" (B, T), if the model has them. "places" (P,), where the targets are in the flat
        batch, spares a GPU a wait, and so does a batch without "mask".

        mlm: the mean of -ln p over the targets; metrics["weight"] is their number. electra: see
        `electra_loss`, which draws from the generators, one of the CPU for each row.
        """
        if self.config.objective == "electra":
            return self.electra_loss(batch, generators)
        places, logits = self.predictions(batch)
        targets = batch["targets"].flatten()[places]
        weight = torch.tensor(len(places), device=logits.device)
        total = F.cross_entropy(logits, targets, reduction="sum")
        return total / weight.clamp(min=1), {"weight": weight}

    def electra_loss(self, batch, generators) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of two means: of the generator's loss over the targets of a row, and of the
        discriminator's over its real tokens, times detection_weight.

        At the places of the targets the discriminator reads tokens that `draw` takes from the
        generator's logits, by numbers (B, T) of `uniform`; elsewhere it reads the text. A drawn
        token that is the right one has replaced nothing. Rows weigh as many as they have real
        tokens, metrics["weight"] in all. So a batch may be cut anywhere: two means over the whole
        batch would each need a weight.
        """
        tokens, targets, mask = batch["tokens"], batch["targets"], batch.get("mask")
        B, T = tokens.shape
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        length = real.sum(1)  # (B,)

        # The generator.
        places, logits = self.predictions(batch)
        hidden_tokens = targets.flatten()[places]
        nats = F.cross_entropy(logits, hidden_tokens, reduction="none")  # (P,)
        count = (targets != -100).sum(1).clamp(min=1)  # (B,)
        total = (nats * (length / count)[places // T]).sum()

        # Its draws. A draw that hits the hidden token has replaced nothing.
        u = uniform((B, T), generators).to(tokens.device).flatten()[places]
        original = torch.where(targets == -100, tokens, targets).flatten()
        drawn = original.index_copy(0, places, draw(logits, u)).view(B, T)
        replaced = drawn != original.view(B, T)

        # The discriminator.
        d = self.detect(drawn, mask, batch.get("segments")).float()  # (B, T)
        bce = F.binary_cross_entropy_with_logits(d, replaced.float(), reduction="none")
        total = total + self.config.detection_weight * (bce * real).sum()
        weight = length.sum()
        return total / weight.clamp(min=1), {"weight": weight}

    # ---- for the calculators ----

    def flops_per_row(self) -> int:
        """FLOPs of one row of context_length tokens, forward and backward; a multiply-add is 2.

        Each weight of a matrix costs 6 per token that it reads, and each layer 12 D T per token for
        attention. The head of masked tokens reads `share` of them.
        """
        T = self.config.context_length
        total = 0.0
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                tokens = self.share * T if name.startswith("head.") else T
                total += 6 * tokens * module.weight.numel()
            elif isinstance(module, Tower):
                total += 12 * T * T * module.config.n_layer * module.config.d_model
        return round(total)

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch with the shapes and dtypes of real data, without padding."""
        shape = (rows, self.config.context_length)
        n = math.prod(shape)
        places = torch.arange(0, n, max(1, n // max(1, round(self.share * n))))
        targets = torch.full((n,), -100)
        targets[places] = 0
        tokens = torch.zeros(shape, dtype=torch.long)
        return {"tokens": tokens, "targets": targets.view(shape), "places": places}

    # ---- published layouts ----

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> Encoder:
        """Read a BERT, RoBERTa, DistilBERT, ELECTRA or ModernBERT folder (hub/encoder.py)."""
        from tinyfm.hub import encoder

        return encoder.load(cls, EncoderConfig, folder, dtype)

    def save_pretrained(self, folder: str, tokenizer=None, overwrite: bool = False) -> None:
        """Write weights, config and tokenizer in the Hugging Face layout (hub/encoder.py)."""
        from tinyfm.hub import encoder

        encoder.save(self, folder, tokenizer, overwrite)
