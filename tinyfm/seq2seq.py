"""An encoder-decoder Transformer: from one text to another, as the Transformer began.

A GPT continues a text. Translating a sentence, or writing down how a word sounds, is another task:
a source x_1 ... x_S is given whole, and a target y_1 ... y_T is written. The chain rule factorises
the probability of the target,

    p(y | x) = prod_t p(y_t | x, y_1 ... y_{t-1}),

and training minimises the mean of -ln p(y_t | x, y_1 ... y_{t-1}), in nats per target token. The
encoder reads the source in both directions, as in encoder.py. The decoder is a GPT with one more
sublayer: its queries come from the target so far, its keys and values from the source. So each new
token looks up in the source what it needs (cross-attention). With h the states of the target, and
m those of the source, which leave the encoder:

    h = h + Attention(norm(h))        causal: y_t is predicted from y_1 ... y_{t-1}
    h = h + Attention(norm(h), m)     all of the source
    h = h + MLP(norm(h))

One config expresses several published models:

    the Transformer  Vaswani et al. 2017: sinusoidal positions, LayerNorm after each update, ReLU,
                     embeddings times sqrt(D), one matrix for all embeddings and the head
    Marian           Junczys-Dowmunt et al. 2018: the same with SiLU and a bias for each token;
                     more than a thousand pairs of languages were published as OPUS-MT
    T5               Raffel et al. 2020: positions as a bias of the scores, RMSNorm before each
                     update, no biases, no 1/sqrt(K)
    T5 v1.1          the same with GEGLU (Shazeer 2020) and a head that is not tied; Flan-T5 too

The default is T5 v1.1. The other two papers' forms, where 0 stands for the paper's factor:

    T5    Seq2SeqConfig(mlp="relu", tied=True, logit_scale=0, zero_init=False)
    2017  Seq2SeqConfig(norm="post", norm_kind="layernorm", norm_eps=1e-5, position="sinusoid",
          mlp="relu", bias=True, tied=True, embedding_scale=0, attention_scale=0,
          zero_init=False)

Label smoothing (Szegedy et al. 2016, section 7; Vaswani et al. 2017, section 5.4) trains for a
target of probability 1 - eps, with eps spread evenly over the vocabulary:

    loss_t = (1 - eps) (-ln p(y_t)) + eps/V sum_v (-ln p(v))

It costs likelihood and helps the texts. So evaluation, in which nothing is smoothed, reports nats.

Letters: B batch, S source tokens, T target tokens, D model width, N heads, K head width, F
feed-forward width, V vocabulary, n real tokens of a batch (no padding).
Left out: two vocabularies, and what T5 does in float16 against overflow. beam.py searches for the
likeliest target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tinyfm.encoder import Rows


@dataclass(frozen=True)
class Seq2SeqConfig:
    vocab_size: int = 4096  # number of tokens, of sources and targets alike
    context_length: int = 128  # largest number of tokens of a source, and of a target
    n_layer: int = 4  # blocks of the encoder
    n_decoder_layer: int = 0  # blocks of the decoder; 0 = n_layer
    n_head: int = 4  # attention heads
    d_model: int = 256  # width of the states
    d_head: int = 0  # width of a head; 0 = d_model / n_head
    d_ff: int = 0  # width inside the MLP; 0 = 4 d_model, or 8/3 d_model for geglu
    mlp: Literal["geglu", "relu", "gelu", "silu"] = "geglu"  # nonlinearity of the MLP
    norm: Literal["pre", "post"] = "pre"  # norm before each update, or after it is added
    norm_kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # kind of the norms
    norm_eps: float = 1e-6  # small number added to the variance in each norm
    # A bias of the scores that depends on the distance, or a fixed vector for each position.
    position: Literal["relative", "sinusoid"] = "relative"
    n_bucket: int = 32  # relative: number of buckets that distances are sorted into
    max_distance: int = 128  # relative: this distance and all longer ones share a bucket
    bias: bool = False  # biases in the linear layers and in each LayerNorm
    tied: bool = False  # one matrix for the token embedding and the output head
    head_bias: bool = False  # a bias for each token in the head
    embedding_scale: float = 1.0  # factor of the token embeddings; 0 = sqrt(d_model)
    attention_scale: float = 1.0  # factor of the attention scores; 0 = 1 / sqrt(d_head)
    logit_scale: float = 1.0  # factor of the logits, before head_bias; 0 = 1 / sqrt(d_model)
    label_smoothing: float = 0.1  # probability spread over the vocabulary in training; 0 = none
    dropout: float = 0.0  # share of activations set to zero in training
    zero_init: bool = True  # output projections start at zero, so each update starts as zero
    start_id: int = 0  # token that the decoder reads first
    end_id: int = 1  # token that ends a source and a target
    pad_id: int = 0  # token that fills a row up

    def __post_init__(self):
        self._check_at_least(1, "vocab_size", "context_length", "n_layer", "n_head", "d_model")
        self._check_at_least(0, "n_decoder_layer", "d_head", "d_ff")
        D = self.d_model
        N = self.n_head
        if not self.d_head and D % N:
            nearest = N * max(1, round(D / N))
            problem = f"d_model {D} is not divisible by n_head {N}"
            raise ValueError(f"{problem}; use {nearest} or set d_head")
        if self.position == "sinusoid" and D % 2:
            problem = f"d_model {D} is odd, and a sinusoid has a sine and a cosine"
            raise ValueError(f"{problem}; use {D + 1}, or position relative")
        if self.position == "relative":
            if self.n_bucket < 4 or self.n_bucket % 4:
                problem = f"n_bucket is {self.n_bucket}"
                raise ValueError(f"{problem}; it must be a multiple of 4, such as 32")
            if self.max_distance <= self.n_bucket // 2:
                problem = f"max_distance {self.max_distance} is at most n_bucket / 2"
                raise ValueError(f"{problem}; use more than {self.n_bucket // 2}")
        for name in ("embedding_scale", "attention_scale", "logit_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                problem = f"{name} is {getattr(self, name)}"
                raise ValueError(f"{problem}; it must be finite and at least 0; 1 is off")
        for name in ("label_smoothing", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                problem = f"{name} is {getattr(self, name)}"
                raise ValueError(f"{problem}; it must be at least 0 and below 1")
        for name in ("start_id", "end_id", "pad_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                problem = f"{name} {getattr(self, name)} is not in the vocabulary"
                raise ValueError(f"{problem}, 0 ... {self.vocab_size - 1}; use your tokenizer's id")
        for name, kind in get_type_hints(Seq2SeqConfig).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"{name} is {value!r}; use one of {get_args(kind)}")

    def _check_at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    # What 0 leaves open, computed so that it follows when d_model or n_head changes.

    @property
    def decoder_layers(self) -> int:
        """Number of blocks of the decoder."""
        return self.n_decoder_layer or self.n_layer

    @property
    def K(self) -> int:
        """Width of a head."""
        return self.d_head or self.d_model // self.n_head

    @property
    def F(self) -> int:
        """Width inside the MLP: three matrices of 8/3 D cost as much as two of 4 D."""
        if self.d_ff:
            return self.d_ff
        if self.mlp == "geglu":
            return 32 * math.ceil(self.d_model / 12)  # 8/3 D, rounded up to a multiple of 32
        return 4 * self.d_model

    @property
    def embedding_factor(self) -> float:
        return self.embedding_scale or self.d_model**0.5

    @property
    def attention_factor(self) -> float:
        return self.attention_scale or self.K**-0.5

    @property
    def logit_factor(self) -> float:
        return self.logit_scale or self.d_model**-0.5


# ---- positions ----------------------------------------------------------------------------------


def sinusoids(length: int, width: int) -> Tensor:
    """A vector for each position, float32 (length, width) (Vaswani et al. 2017, section 3.5).

    Frequency i = 0 ... width/2 - 1 is 10000^(-2i/width). The sines come first, then the cosines:
    the paper writes them in turn, but its code and Marian do not. It is the same up to the order of
    the channels.
    """
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angles.sin(), angles.cos()), dim=1).float()


def bucket(distance: Tensor, n: int, max_distance: int, two_sided: bool) -> Tensor:
    """The bucket of each distance, in 0 ... n - 1 (Raffel et al. 2020, section 2.1).

    distance: position of the key minus that of the query, int64. Short distances have a bucket
    each; longer ones share buckets, whose widths grow with the logarithm, up to max_distance. All
    beyond it are in the last one. two_sided: keys after the query have the upper half of the
    buckets; otherwise they are never attended to, and read as distance 0.
    """
    if two_sided:
        n = n // 2
        side = n * (distance > 0)
        distance = distance.abs()
    else:
        side = 0
        distance = -distance.clamp(max=0)
    exact = n // 2  # as many buckets hold one distance each
    share = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    shared = exact + (share * (n - exact)).long()
    return side + torch.where(distance < exact, distance, shared.clamp(max=n - 1))


# ---- layers -------------------------------------------------------------------------------------


def make_norm(config: Seq2SeqConfig) -> nn.Module:
    if config.norm_kind == "layernorm":
        return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(config.d_model, eps=config.norm_eps)


class DistanceBias(nn.Module):
    """T5's positions: a learned number for each head and bucket is added to the scores.

    All layers of an encoder or decoder share one table; cross-attention has none.
    """

    def __init__(self, config: Seq2SeqConfig, two_sided: bool):
        super().__init__()
        self.two_sided = two_sided
        self.max_distance = config.max_distance
        self.table = nn.Embedding(config.n_bucket, config.n_head)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Positions (T,) and (S,) -> what is added to the scores, (1, N, T, S)."""
        distance = key - query[:, None]  # (T, S)
        n = self.table.num_embeddings
        buckets = bucket(distance, n, self.max_distance, self.two_sided)
        return self.table(buckets).permute(2, 0, 1)[None]


class Attention(nn.Module):
    """Attention with N heads. Its parts are called one by one: queries come from one text, keys
    and values from the same or another one. Lists of states (n, D) are as in Rows."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        D = config.d_model
        width = config.n_head * config.K
        self.heads = config.n_head
        self.scale = config.attention_factor
        self.dropout = config.dropout
        self.q = nn.Linear(D, width, bias=config.bias)
        self.k = nn.Linear(D, width, bias=config.bias)
        self.v = nn.Linear(D, width, bias=config.bias)
        self.out = nn.Linear(width, D, bias=config.bias)

    def split(self, x: Tensor, rows: Rows) -> Tensor:
        """(n, N K) -> (B, N, T, K)."""
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            x = x.float()  # on a CPU attention trains several times slower in bfloat16
        return rearrange(rows.unpack(x), "B T (N K) -> B N T K", N=self.heads)

    def keys_values(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """States (n, D) -> keys and values, (B, N, S, K) each."""
        return self.split(self.k(x), rows), self.split(self.v(x), rows)

    def forward(self, x, rows, k, v, scores):
        """States (n, D) -> (n, D), read from keys and values. Without dropout:

        weights = (scale * q @ k.mT + scores).softmax(-1)    # (B, N, T, S)
        y = weights @ v

        scores: numbers to add, or True for the keys to attend to; broadcast to (B, N, T, S).
        """
        q = self.split(self.q(x), rows)
        if scores is not None and scores.dtype != torch.bool:
            scores = scores.to(q.dtype)
        with torch.autocast(x.device.type, enabled=False):
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=scores, dropout_p=dropout, scale=self.scale
            )
        return self.out(rows.pack(rearrange(y, "B N T K -> B T (N K)")))


class MLP(nn.Module):
    """Two linear layers around a nonlinearity: (n, D) -> (n, F) -> (n, D).

    GEGLU (Shazeer 2020) multiplies the inner values by the GELU of a third layer, by the tanh
    formula, as in T5 v1.1. The GELU alone is exact.
    """

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.kind = config.mlp
        if self.kind == "geglu":
            self.gate = nn.Linear(config.d_model, config.F, bias=config.bias)
        self.up = nn.Linear(config.d_model, config.F, bias=config.bias)
        self.down = nn.Linear(config.F, config.d_model, bias=config.bias)

    def forward(self, x):
        if self.kind == "geglu":
            return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))
        if self.kind == "relu":
            return self.down(F.relu(self.up(x)))
        if self.kind == "silu":
            return self.down(F.silu(self.up(x)))
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """One layer: attention, in a decoder cross-attention, then an MLP, each added to the states.

    "pre": what a sublayer reads is normalised. "post", as in 2017: the sum is normalised.
    """

    def __init__(self, config: Seq2SeqConfig, decoder: bool):
        super().__init__()
        self.post = config.norm == "post"
        self.norm1 = make_norm(config)
        self.attention = Attention(config)
        if decoder:
            self.cross_norm = make_norm(config)
            self.cross = Attention(config)
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def update(self, x, norm, sublayer):
        """Add what a sublayer, a function of states, makes of x."""
        if self.post:
            return norm(x + self.dropout(sublayer(x)))
        return x + self.dropout(sublayer(norm(x)))

    def forward(self, x, rows, scores, memory=None, layer=0):
        """States (n, D) -> (n, D): the updates by attention, by cross-attention, and by the MLP.

        scores: as in Attention. memory: of a decoder, or None, and then there is no
        cross-attention. It gives the keys and values of the target so far (`extend`) and those of
        the source (`look_up`), whose real tokens alone are attended to (`mask`). layer: the number
        of this block.
        """

        def attend(x):
            k, v = self.attention.keys_values(x, rows)
            if memory is not None:
                k, v = memory.extend(layer, k, v)
            return self.attention(x, rows, k, v, scores)

        def look_up(x):
            return self.cross(x, rows, *memory.look_up(layer, self.cross), memory.mask)

        x = self.update(x, self.norm1, attend)
        if memory is not None:
            x = self.update(x, self.cross_norm, look_up)
        return self.update(x, self.norm2, self.mlp)


class Memory:
    """What the decoder attends to: the source, and the target so far.

    With `keep`, for generation, keys and values stay here: those of the source are computed once,
    and each token of the target is read once.
    """

    def __init__(self, states: Tensor, rows: Rows):
        """states (n, D): of the source, a list as in `rows`."""
        self.states = states
        self.rows = rows
        self.mask = rows.keys  # True for real tokens of the source, (B, 1, 1, S), or None
        self.keep = False
        self.source: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer that are kept
        self.target: list[tuple[Tensor, Tensor]] = []
        self.length = 0  # target tokens kept

    def look_up(self, layer: int, cross: Attention) -> tuple[Tensor, Tensor]:
        """Keys and values of the source, (B, N, S, K) each."""
        if not self.keep:
            return cross.keys_values(self.states, self.rows)
        if layer == len(self.source):
            self.source.append(cross.keys_values(self.states, self.rows))
        return self.source[layer]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the target so far, given those of its latest tokens (B, N, T, K)."""
        if not self.keep:
            return k, v
        if layer == len(self.target):
            self.target.append((k, v))
        else:
            past_k, past_v = self.target[layer]
            self.target[layer] = (torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2))
        return self.target[layer]

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of what is kept: indices (n,), which may repeat."""
        self.source = [(k[rows], v[rows]) for k, v in self.source]
        self.target = [(k[rows], v[rows]) for k, v in self.target]
        if self.mask is not None:
            self.mask = self.mask[rows]


class Tower(nn.Module):
    """The blocks of an encoder or a decoder, their positions, and the norm behind them."""

    def __init__(self, config: Seq2SeqConfig, decoder: bool):
        super().__init__()
        layers = config.decoder_layers if decoder else config.n_layer
        self.blocks = nn.ModuleList(Block(config, decoder) for _ in range(layers))
        if config.position == "relative":
            self.distance_bias = DistanceBias(config, two_sided=not decoder)
        # The states that leave a post-norm block are normalised already.
        self.norm = nn.Identity() if config.norm == "post" else make_norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rows, scores, memory=None):
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, rows, scores, memory, layer)
        return self.dropout(self.norm(x))


# ---- the model ----------------------------------------------------------------------------------


class Seq2Seq(nn.Module):
    """A source (B, S) and what the decoder reads (B, T), int64 -> logits (B, T, V) of the token
    that comes after each of the T."""

    unit = "token"  # what a data set is counted in
    outer = ("token_embedding", "distance_bias", "head")  # tables: for AdamW, not for Muon

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Tower(config, decoder=False)
        self.decoder = Tower(config, decoder=True)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        self.reset_buffers()
        self.reset_parameters()

    def reset_buffers(self):
        """Compute the table of sinusoids, which is not saved; again after a build on "meta"."""
        config = self.config
        if config.position == "sinusoid":
            size = (config.context_length, config.d_model)
            device = self.token_embedding.weight.device
            table = torch.empty(size, device=device) if device.type == "meta" else sinusoids(*size)
            self.register_buffer("sinusoids", table, persistent=False)

    def reset_parameters(self):
        """Draw the weights so that states, scores and logits start with a variance of about 1.

        A matrix that reads n numbers has the standard deviation 1 / sqrt(n). What is not divided
        by sqrt(K) in the scores is divided in the query's matrix (Raffel et al. 2020: their code).
        With zero_init, the matrices that write to the states start at 0. With a tied head that is a
        bad start: the model is then sure that the next token is the one it has just read.
        """
        config = self.config
        D = config.d_model
        for name, p in self.named_parameters():
            if name.endswith("bias") or "distance_bias" in name:
                nn.init.zeros_(p)
            elif p.ndim == 1:
                nn.init.ones_(p)
            elif config.zero_init and name.endswith(("out.weight", "down.weight")):
                nn.init.zeros_(p)
            elif name.endswith("q.weight"):
                nn.init.normal_(p, std=(D * config.K) ** -0.5 / config.attention_factor)
            elif name == "head.weight" or (config.tied and name == "token_embedding.weight"):
                nn.init.normal_(p, std=D**-0.5 / config.logit_factor)
            elif name == "token_embedding.weight":
                nn.init.normal_(p, std=1 / config.embedding_factor)
            else:
                nn.init.normal_(p, std=p.size(1) ** -0.5)

    # ---- states and predictions ----

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Tokens (B, T), the first at position `start` -> (B, T, D).

        Raises ValueError for more than context_length tokens, and for ids outside the vocabulary.
        """
        config = self.config
        end = start + tokens.size(1)
        if end > config.context_length:
            problem = f"{end} tokens exceed context_length {config.context_length}"
            raise ValueError(f"{problem}; shorten the text, or train a model with a longer context")
        try:
            x = self.token_embedding(tokens)
        except IndexError:  # on a CPU
            V = config.vocab_size
            wrong = tokens[(tokens < 0) | (tokens >= V)].tolist()
            problem = f"token id {wrong[0]} is not one of the model's, 0 ... {V - 1}"
            raise ValueError(
                f"{problem}; use the tokenizer that the model was trained with"
            ) from None
        if config.embedding_factor != 1:
            x = config.embedding_factor * x
        if config.position == "sinusoid":
            x = x + self.sinusoids[start:end]
        return x

    def read(self, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Rows]:
        """The states of the real tokens of a source, (n, D), and the Rows they are a list of."""
        if source.numel() == 0:
            raise ValueError(
                f"there is no source in {tuple(source.shape)} tokens; give one at least"
            )
        if mask is not None and not mask.any(1).all():
            row = int((~mask.any(1)).nonzero()[0])
            raise ValueError(f"source {row} is empty; end each source with the end-of-text token")
        rows = Rows(mask, source.shape)
        scores = rows.keys
        if self.config.position == "relative":
            positions = torch.arange(source.size(1), device=source.device)
            scores = self.encoder.distance_bias(positions, positions)  # (1, N, S, S)
            if rows.keys is not None:
                scores = scores.masked_fill(~rows.keys, -math.inf)
        return self.encoder(rows.pack(self.embed(source)), rows, scores), rows

    def encode(self, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """Source tokens (B, S) -> their states (B, S, D), 0 at padding.

        mask (B, S): True for real tokens, or None if all are. Raises ValueError without a source,
        for a row without a real token, and as `embed` does.
        """
        states, rows = self.read(source, mask)
        return rows.unpack(states)

    def remember(self, source: Tensor, mask: Tensor | None = None) -> Memory:
        """Encode the source for the decoder; the arguments are those of `encode`."""
        return Memory(*self.read(source, mask))

    def decode(self, inputs: Tensor, memory: Memory, rows: Rows) -> Tensor:
        """Target tokens (B, T) -> the states (n, D) from which the head predicts the next ones.

        rows: the real tokens among the inputs; behind them there may be padding. The inputs follow
        those that the memory keeps. The states are multiplied by logit_scale: the head is linear.
        """
        start = memory.length
        T = inputs.size(1)
        keys = torch.arange(start + T, device=inputs.device)
        queries = keys[start:]
        x = self.embed(inputs, start)
        scores = (keys <= queries[:, None])[None, None]  # True up to the query, (1, 1, T, S)
        if self.config.position == "relative":
            bias = self.decoder.distance_bias(queries, keys)  # (1, N, T, S)
            scores = bias.masked_fill(~scores, -math.inf)
        x = self.decoder(rows.pack(x), rows, scores, memory)
        if memory.keep:
            memory.length += T
        return x if self.config.logit_factor == 1 else self.config.logit_factor * x

    def forward(self, source, inputs, mask=None) -> Tensor:
        """Logits (B, T, V). inputs (B, T): start_id, then the target but for its last token."""
        rows = Rows(None, inputs.shape)
        return rows.unpack(self.head(self.decode(inputs, self.remember(source, mask), rows)))

    # ---- loss ----

    def loss(self, batch: dict[str, Tensor], generators=None) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the targets of -ln p(target), smoothed in training, in nats.

        batch: "source" (B, S); "inputs" (B, T), start_id and then the target; "targets" (B, T), the
        tokens after the inputs, and -100 at padding; "mask" (B, S), True for real tokens of the
        source. A batch without "mask" has no padding; it spares a GPU a wait. metrics["weight"] is
        the number of targets, and metrics["nats"] the mean without smoothing. Nothing is random but
        dropout: the generators are not used.
        """
        targets = batch["targets"]
        counted = targets != -100
        mask = batch.get("mask")
        real = None
        if mask is not None:
            # Padding behind the last target is not computed: nothing attends to it.
            real = counted.flip(1).cumsum(1).flip(1) > 0
        rows = Rows(real, targets.shape)
        memory = self.remember(batch["source"], mask)
        logits = self.head(self.decode(batch["inputs"], memory, rows)).float()  # (n, V)

        targets = rows.pack(targets)
        weight = counted.sum()
        divisor = weight.clamp(min=1)
        log_p = logits.log_softmax(-1)
        nats = F.nll_loss(log_p, targets, reduction="sum")
        loss = nats
        if self.training and self.config.label_smoothing:
            eps = self.config.label_smoothing
            spread = -log_p.sum(-1).masked_fill(targets == -100, 0).sum()
            loss = (1 - eps) * nats + spread * (eps / self.config.vocab_size)
        loss = loss / divisor
        nats = nats.detach() / divisor
        return loss, {"weight": weight, "nats": nats}

    # ---- generation ----

    def generate(
        self,
        source: Tensor,
        mask: Tensor | None = None,
        sampling=None,
        use_cache: bool = True,
        never: Sequence[int] = (),
    ) -> list[list[int]]:
        """Draw a target for each source (B, S): token ids, without end_id.

        mask: as in `encode`. sampling: a `generate.Sampling`; temperature 0 takes the likeliest
        token. Row i draws from a random stream that depends on the seed and i alone. A target ends
        with end_id, a stop token, or at max_new_tokens; context_length is the limit. never: ids
        that are not drawn. use_cache=False reads the whole target again for each token.
        """
        from tinyfm import generate

        sampling = sampling or generate.Sampling()
        stops = (*sampling.stop_tokens, self.config.end_id)
        steps = min(sampling.max_new_tokens, self.config.context_length)
        generators = [generate.row_generator(sampling.seed, i) for i in range(len(source))]
        inputs = torch.full((len(source), 1), self.config.start_id, device=source.device)
        running = [True] * len(source)
        written: list[list[int]] = [[] for _ in source]
        self.eval()
        with torch.inference_mode():
            memory = self.remember(source, mask)
            memory.keep = use_cache
            for _ in range(steps):
                latest = inputs[:, memory.length :]
                states = self.decode(latest, memory, Rows(None, latest.shape))
                logits = self.head(states.unflatten(0, latest.shape)[:, -1])  # (B, V)
                if never:
                    logits[:, list(never)] = -math.inf
                if sampling.repetition_penalty != 1:
                    logits = generate.penalise_repeats(
                        logits, inputs.tolist(), sampling.repetition_penalty
                    )
                drawn = generate.choose(logits, sampling, generators)  # (B,)
                inputs = torch.cat((inputs, drawn[:, None]), dim=1)
                for i, token in enumerate(drawn.tolist()):
                    running[i] = running[i] and token not in stops
                    if running[i]:
                        written[i].append(token)
                if not any(running):
                    break
        return written

    def search(
        self, source: Tensor, mask: Tensor | None = None, beams=None, never: Sequence[int] = ()
    ) -> list[list[int]]:
        """Find the likeliest target of each source by beam search: token ids, without end_id.

        beams: a `beam.Beams`. The other arguments are those of `generate`.
        """
        from tinyfm import beam

        beams = beams or beam.Beams()
        most = min(beams.max_new_tokens, self.config.context_length)
        stops = (*beams.stop_tokens, self.config.end_id)
        self.eval()
        with torch.inference_mode():
            memory = self.remember(source, mask)
            memory.keep = True

            def read(tokens: Tensor) -> Tensor:
                """Tokens (n,) -> logits (n, V) of the next ones."""
                return self.head(self.decode(tokens[:, None], memory, Rows(None, (len(tokens), 1))))

            def step(parents: Tensor, tokens: Tensor) -> Tensor:
                memory.select(parents)
                return read(tokens)

            first = read(torch.full((len(source),), self.config.start_id, device=source.device))
            beams = replace(beams, max_new_tokens=most, stop_tokens=stops)
            return beam.beam_search(first, step, beams, never)

    # ---- for the calculators ----

    def flops_per_row(self) -> int:
        """FLOPs of one row, forward and backward, with context_length tokens in the source and in
        the target; a multiply-add is 2.

        Each weight of a matrix costs 6 for each token that it reads, and each attention 12 N K for
        each pair of a query and a key (Chowdhery et al. 2022, appendix B).
        """
        config = self.config
        T = config.context_length
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        attentions = sum(isinstance(m, Attention) for m in self.modules())
        return 6 * T * weights + 12 * attentions * config.n_head * config.K * T * T

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch of zeros with the shapes and dtypes of real data, without padding."""
        tokens = torch.zeros(rows, self.config.context_length, dtype=torch.long)
        return {"source": tokens, "inputs": tokens, "targets": tokens}

    # ---- published layouts ----

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> Seq2Seq:
        """Read a folder of a MarianMTModel or a T5ForConditionalGeneration (hub/seq2seq.py)."""
        from tinyfm.hub import seq2seq

        return seq2seq.load(cls, Seq2SeqConfig, folder, dtype)

    def save_pretrained(self, folder: str, tokenizer=None, overwrite: bool = False) -> None:
        """Write weights, config and tokenizer in the Hugging Face layout (hub/seq2seq.py)."""
        from tinyfm.hub import seq2seq

        seq2seq.save(self, folder, tokenizer, overwrite)
