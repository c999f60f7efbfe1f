"""A decoder-only Transformer language model.

A text is a sequence of tokens x_1 ... x_T. The chain rule factorises its probability,

    p(x_1 ... x_T) = prod_t p(x_t | x_1 ... x_{t-1}),

and pretraining minimises the mean of -ln p(x_t | x_1 ... x_{t-1}), in nats per token: the model
learns to predict the next token, on as much text as there is. One forward pass gives all T
conditionals, because position t attends only to positions up to t (causal attention).

The model embeds each token as a vector of D numbers, its residual stream. L blocks then add two
updates each to the stream h (T, D); a last norm and a linear head turn it into V logits per token:

    h = h + Attention(norm(h))     softmax(q k' / sqrt(K)) v: tokens exchange information
    h = h + MLP(norm(h))           each token on its own
    logits = head(norm(h))

One config expresses many published models:

    GPT-1          Radford et al. 2018: learned positions, GELU, biases, tied head, LayerNorm behind
                   each sublayer
    GPT-2          Radford et al. 2019: the same with LayerNorm before each sublayer and at the end
    BLOOM          Le Scao et al. 2022: GPT-2 with ALiBi and a norm after the embedding
    Llama 2 and 3  Touvron et al. 2023, Dubey et al. 2024: rotary positions, RMSNorm, SwiGLU,
                   grouped key/value heads
    Mistral        Jiang et al. 2023: the same with a sliding window
    Qwen3          Yang et al. 2025: the same with normalised queries and keys
    Granite        IBM 2024: Llama with four multipliers
    Falcon         Almazrouei et al. 2023: attention and MLP in parallel, LayerNorm, exact GELU
    PaLM           Chowdhery et al. 2022: attention and MLP in parallel, one key/value head, SwiGLU,
                   no biases
    Command R      Cohere 2024: the same with other rotary pairs and scaled logits

GPT-3 (Brown et al. 2020) is GPT-2 in larger sizes, but for the banded sparse attention in every
second layer, whose code was not published.

The default config has the architecture of Qwen3, so its checkpoints can be exported as Qwen3
models. Only the initialisation differs: the projections that write to the stream start at zero.

Letters: B batch, T tokens, D model width, N query heads, G key/value heads, K head width,
F feed-forward width, V vocabulary, L layers, S keys that a query can attend to.
Left out: mixture of experts, position interpolation other than Llama 3's, rotary positions on part
of a head (GPT-J). generate.py samples text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 4096  # number of tokens the model knows; a tokenizer is trained to this size
    context_length: int = 256  # largest number of tokens the model sees at once
    n_layer: int = 6  # number of blocks
    n_head: int = 4  # query heads
    n_kv_head: int = 0  # key/value heads, each shared by a group of query heads; 0 = n_head
    d_model: int = 256  # width of the residual stream
    d_head: int = 0  # width of a head; 0 = d_model / n_head
    d_ff: int = 0  # width inside the MLP; 0 = 4 d_model, or 8/3 d_model for swiglu
    mlp: Literal["swiglu", "gelu", "exact-gelu", "relu2"] = "swiglu"  # nonlinearity of the MLP
    # Norms before attention and MLP, or behind them; or attention and MLP side by side, with one
    # norm for both or with two.
    block: Literal["pre-norm", "post-norm", "parallel", "parallel-two-norms"] = "pre-norm"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # kind of the norms
    norm_eps: float = 1e-6  # small number added to the variance in each norm
    norm_bias: bool = False  # biases in each LayerNorm, even where the linear layers have none
    embed_norm: bool = False  # norm of the embeddings too
    qk_norm: bool = True  # RMSNorm on the queries and keys of each head
    # Rotary positions, a learned vector for each position, or scores that fall with the distance.
    position: Literal["rope", "learned", "alibi"] = "rope"
    # Channels that rotary positions turn together: i and i + d_head/2, or 2i and 2i + 1.
    rope_pairs: Literal["halves", "neighbours"] = "halves"
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    rope_factor: float = 1.0  # slowdown of long rotary waves, for a longer context; 1 = none
    # Waves longer than rope_original_context / rope_low_freq_factor are slowed by rope_factor.
    rope_low_freq_factor: float = 1.0
    # Waves shorter than rope_original_context / rope_high_freq_factor are not slowed.
    rope_high_freq_factor: float = 4.0
    rope_original_context: int = 8192  # context length before the extension by rope_factor
    window: int = 0  # number of latest tokens that a token attends to; 0 = all
    bias: bool = False  # biases in the linear layers
    tied: bool = False  # one matrix for the token embedding and the output head
    embedding_scale: float = 1.0  # factor of the token embeddings
    attention_scale: float = 0.0  # factor of the attention scores; 0 = 1 / sqrt(d_head)
    residual_scale: float = 1.0  # factor of each update that is added to the residual stream
    logit_scale: float = 1.0  # factor of the logits
    dropout: float = 0.0  # share of activations set to zero in training
    zero_init: bool = True  # output projections start at zero, so each block starts as the identity

    def __post_init__(self):
        self._check_at_least(1, "vocab_size", "context_length", "n_layer", "n_head", "d_model")
        self._check_at_least(0, "n_kv_head", "d_head", "d_ff", "window")
        D = self.d_model
        N = self.n_head
        if not self.d_head and D % N:
            nearest = N * max(1, round(D / N))
            problem = f"d_model {D} is not divisible by n_head {N}"
            raise ValueError(f"{problem}; use {nearest} or set d_head")
        if N % self.G:
            problem = f"n_head {N} is not divisible by n_kv_head {self.G}"
            raise ValueError(f"{problem}; use a divisor of {N}")
        if self.position == "rope" and self.K % 2:
            raise ValueError(f"the head width {self.K} is odd; rotary positions need an even one")
        if self.norm_bias and self.norm != "layernorm":
            raise ValueError(f"norm_bias is True, but a {self.norm} has no bias; use layernorm")
        for name in ("embedding_scale", "residual_scale", "logit_scale"):
            if not 0 < getattr(self, name) < math.inf:
                problem = f"{name} is {getattr(self, name)}"
                raise ValueError(f"{problem}; it must be above 0 and finite; 1 is off")
        if not 0 <= self.attention_scale < math.inf:
            problem = f"attention_scale is {self.attention_scale}"
            raise ValueError(f"{problem}; it must be above 0 and finite, or 0 for 1 / sqrt(d_head)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        for name, kind in get_type_hints(GPTConfig).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"{name} is {value!r}; use one of {get_args(kind)}")

    def _check_at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    # The sizes that 0 leaves open. They are computed, not stored, so that they follow when
    # dataclasses.replace changes d_model or n_head.

    @property
    def G(self) -> int:
        """Number of key/value heads."""
        return self.n_kv_head or self.n_head

    @property
    def K(self) -> int:
        """Width of a head."""
        return self.d_head or self.d_model // self.n_head

    @property
    def F(self) -> int:
        """Width inside the MLP: three matrices of 8/3 D cost as much as two of 4 D."""
        if self.d_ff:
            return self.d_ff
        if self.mlp == "swiglu":
            return 32 * math.ceil(self.d_model / 12)  # 8/3 D, rounded up to a multiple of 32
        return 4 * self.d_model


# ---- positions ----------------------------------------------------------------------------------


def slow_long_waves(frequency: Tensor, config: GPTConfig) -> Tensor:
    """Angular frequencies (K/2,) for a context that is rope_factor times longer, as in Llama 3.1.

    Waves that are long compared to the original context are slowed by the factor, short ones are
    kept, and those between are blended.
    """
    low = config.rope_low_freq_factor
    high = config.rope_high_freq_factor
    turns = config.rope_original_context * frequency / (2 * math.pi)  # in the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1 for short waves, 0 for long ones
    return keep * frequency + (1 - keep) * frequency / config.rope_factor


def rope_frequencies(config: GPTConfig) -> Tensor:
    """Angular frequency of each pair of channels, float32 (K/2,) in radians per position.

    Pair i = 0 ... K/2 - 1 has theta^(-2i/K) (Su et al. 2021, eq. 15), with theta = rope_theta. A
    rope_factor other than 1 extends the context by `slow_long_waves`.
    """
    exponent = torch.arange(0, config.K, 2, dtype=torch.float32) / config.K
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_factor == 1.0:
        return frequency
    return slow_long_waves(frequency, config)


def rotary_tables(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of each position and pair, float32 (context_length, K/2)."""
    table = torch.empty(config.context_length, config.K // 2)
    if table.is_meta:  # shapes alone: arithmetic there loads PyTorch's compiler, for a second
        return table, torch.empty_like(table)
    angles = torch.arange(config.context_length)[:, None] * rope_frequencies(config)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + K/2) of x (B, N, T, K): channel i towards channel i + K/2.

    cos, sin: of the angles, (.., T, K/2) each. When the angles of queries and keys are those of
    their positions, q . k depends on the two positions only through their distance.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention_mask(query: Tensor, key: Tensor, window: int, pad: Tensor | None) -> Tensor:
    """True where a query position (T,) may attend to a key position (S,): (1 or B, 1, T, S).

    A query attends to no later key, to none outside the window (0 = no window), and to none of the
    padding: the first pad (B,) positions of each row. It always attends to its own position, so
    that no softmax is over an empty set.
    """
    distance = query[:, None] - key[None, :]  # (T, S)
    allowed = (distance >= 0) & (distance < (window or math.inf))
    if pad is None:
        return allowed[None, None]  # (1, 1, T, S)
    real = key[None, None, :] >= pad[:, None, None]  # (B, 1, S)
    return ((allowed & real) | (distance == 0))[:, None]  # (B, 1, T, S)


def alibi_slopes(n_head: int) -> Tensor:
    """How fast the scores of each head fall with the distance, float32 (N,), per position.

    For N a power of 2 these are 2^(-8i/N) for i = 1 ... N (Press et al. 2022). Other N take the
    slopes of the next smaller power of 2, then those between them: the first, third, ... of twice
    as many heads.
    """
    n = 1 << (n_head.bit_length() - 1)  # largest power of 2 that is at most N
    steps = [*range(1, n + 1)]
    steps += [i + 0.5 for i in range(n_head - n)]
    return torch.tensor([2 ** (-8 * step / n) for step in steps])


def alibi_scores(query: Tensor, key: Tensor, mask: Tensor, slopes: Tensor) -> Tensor:
    """What ALiBi adds to the attention scores, (1 or B, N, T, S): -slope x distance (Press et al.
    2022), and -inf where the mask (1 or B, 1, T, S) is False. query (T,), key (S,): positions."""
    distance = query[:, None] - key[None, :]  # (T, S)
    return torch.where(mask, -slopes[:, None, None] * distance, -math.inf)


# ---- layers -------------------------------------------------------------------------------------


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias or config.norm_bias)
    return nn.RMSNorm(width, eps=config.norm_eps)


class Attention(nn.Module):
    """Causal self-attention; N query heads share G key/value heads (Ainslie et al. 2023).

    The block calls its parts one by one: `project`, then `attend`, then the layer `out`.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        N, G, K = config.n_head, config.G, config.K
        self.d_head = K
        self.grouped = G != N
        self.dropout = config.dropout
        self.scale = config.attention_scale or None  # None is 1 / sqrt(K)
        self.neighbours = config.rope_pairs == "neighbours"
        self.q = nn.Linear(config.d_model, N * K, bias=config.bias)
        self.k = nn.Linear(config.d_model, G * K, bias=config.bias)
        self.v = nn.Linear(config.d_model, G * K, bias=config.bias)
        self.out = nn.Linear(N * K, config.d_model, bias=config.bias)
        self.q_norm = nn.RMSNorm(K, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(K, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x, angles):
        """Normalised states (B, T, D) -> queries (B, N, T, K), keys and values (B, G, T, K).

        angles: cos and sin of the rotary angles, (.., T, K/2) each, or None without rotary ones.
        Head n has the channels n K ... (n + 1) K - 1 of its layer. Queries and keys are normalised
        per head, then rotated; values are neither.
        """
        q = rearrange(self.q(x), "B T (N K) -> B N T K", K=self.d_head)
        k = rearrange(self.k(x), "B T (G K) -> B G T K", K=self.d_head)
        v = rearrange(self.v(x), "B T (G K) -> B G T K", K=self.d_head)
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # On a CPU the backward pass of attention is several times slower in bfloat16.
            q, k, v = q.float(), k.float(), v.float()
        q = self.q_norm(q)
        k = self.k_norm(k)
        if angles is not None:
            if self.neighbours:
                # Su et al. pair (2i, 2i + 1). Moved to (i, i + K/2): q . k is a sum, in any order.
                q = rearrange(q, "B N T (pair two) -> B N T (two pair)", two=2)
                k = rearrange(k, "B G T (pair two) -> B G T (two pair)", two=2)
            q = rotate(q, *angles)
            k = rotate(k, *angles)
        return q.to(v.dtype), k.to(v.dtype), v  # autocast normalises and rotates in float32

    def attend(self, q, k, v, mask):
        """Mean of the values, weighted by how well their keys match the query: (B, N, T, K).

        The formula, for G = N and without dropout:

            weights = (q @ k.mT / sqrt(K)).masked_fill(~mask, -inf).softmax(-1)    # (B, N, T, S)
            return weights @ v

        Otherwise query head n reads key/value head n // (N / G). A mask of None means causal
        attention for several queries, and no mask for a single one: the latest token may attend to
        all keys of the cache. A mask of numbers (ALiBi's) is added to the scores. A config may set
        another factor, `scale`, than 1 / sqrt(K). Dropout, in training only, sets a share of the
        weights to zero.
        """
        if torch.is_autocast_enabled(q.device.type):
            with torch.autocast(q.device.type, enabled=False):
                return self.attend(q, k, v, mask)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and q.size(2) > 1,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=self.grouped,
        )


class MLP(nn.Module):
    """Two linear layers around a nonlinearity: (B, T, D) -> (B, T, F) -> (B, T, D).

    SwiGLU (Shazeer 2020) multiplies the inner values by a gate, computed by a third layer.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.kind = config.mlp
        if self.kind == "swiglu":
            self.gate = nn.Linear(config.d_model, config.F, bias=config.bias)
        self.up = nn.Linear(config.d_model, config.F, bias=config.bias)
        self.down = nn.Linear(config.F, config.d_model, bias=config.bias)

    def forward(self, x):
        """Apply down to the inner values. What these are depends on the kind:

        swiglu: SiLU of the gate, times up. gelu: GELU of up, by the tanh formula of GPT-1 and
        GPT-2. exact-gelu: GELU by the normal distribution. relu2: ReLU of up, squared.
        """
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.kind == "gelu":
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        if self.kind == "exact-gelu":
            return self.down(F.gelu(self.up(x)))  # Hendrycks and Gimpel 2016
        return self.down(F.relu(self.up(x)).square())  # So et al. 2021


class Block(nn.Module):
    """One layer of the Transformer: attention, then an MLP, each added to the stream (pre-norm).

    x = x + Attention(norm1(x))
    x = x + MLP(norm2(x))
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1 = make_norm(config, config.d_model)
        self.attention = Attention(config)
        self.norm2 = make_norm(config, config.d_model)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.residual_scale = config.residual_scale

    def update(self, y):
        """What a sublayer's output y adds to the stream: after dropout, times residual_scale."""
        y = self.dropout(y)
        return y if self.residual_scale == 1 else self.residual_scale * y

    # The parts before and after attention depend on nothing but their inputs, so compiled.py can
    # compile them; the cache stands between them.

    def before_attention(self, x, angles):
        """Stream (B, T, D) -> queries (B, N, T, K), keys and values (B, G, T, K)."""
        return self.attention.project(self.norm1(x), angles)

    def after_attention(self, x, y):
        """Stream x (B, T, D), output y (B, N, T, K) of attention -> the next stream (B, T, D).

        Two updates are added, each by way of `update`: the heads of y side by side, through the
        layer `out`; then the MLP of the normalised stream, which contains the first one already.
        """
        y = rearrange(y, "B N T K -> B T (N K)")
        x = x + self.update(self.attention.out(y))
        return x + self.update(self.mlp(self.norm2(x)))

    def forward(self, x, angles, mask, cache, layer):
        q, k, v = self.before_attention(x, angles)
        if cache is None:
            y = self.attention.attend(q, k, v, mask)
        else:
            y = cache.attend(self.attention.attend, layer, q, k, v, mask)
        return self.after_attention(x, y)


class PostNormBlock(Block):
    """The stream itself is normalised, behind each sum (Vaswani et al. 2017, GPT-1).

    x = norm1(x + Attention(x))
    x = norm2(x + MLP(x))
    """

    def before_attention(self, x, angles):
        return self.attention.project(x, angles)

    def after_attention(self, x, y):
        y = rearrange(y, "B N T K -> B T (N K)")
        x = self.norm1(x + self.update(self.attention.out(y)))
        return self.norm2(x + self.update(self.mlp(x)))


class ParallelBlock(Block):
    """Attention and MLP read the same stream, so that they can be computed at the same time (Wang
    and Komatsuzaki 2021, GPT-J).

    x = x + Attention(norm1(x)) + MLP(norm1(x))    parallel: PaLM, Falcon-7B, Command R
    x = x + Attention(norm1(x)) + MLP(norm2(x))    parallel-two-norms: Falcon-40B
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        if config.block == "parallel":
            self.norm2 = None

    def after_attention(self, x, y):
        y = rearrange(y, "B N T K -> B T (N K)")
        norm = self.norm1 if self.norm2 is None else self.norm2
        return x + self.update(self.attention.out(y)) + self.update(self.mlp(norm(x)))


BLOCKS = {
    "pre-norm": Block,
    "post-norm": PostNormBlock,
    "parallel": ParallelBlock,
    "parallel-two-norms": ParallelBlock,
}


# ---- the loss -----------------------------------------------------------------------------------


def is_plain(head: nn.Module) -> bool:
    """True if a head is one product with its matrix: no adapter and no hook changes it."""
    return type(head) is nn.Linear and not head._forward_hooks


class ChunkedLoss(torch.autograd.Function):
    """Sum of -ln p(target) from the last states and the head's matrix, a few tokens at a time.

    The logits of all tokens and their gradient can need more memory than the whole network. But
    both are sums over tokens: with p = softmax(W s), a token adds -ln p[target] to the loss, and

        d loss / d logits = p - onehot(target)

    So the forward pass computes a chunk's gradients too, adds them up, and drops its logits. The
    backward pass only multiplies by the gradient of what follows, which is a single number.
    """

    @staticmethod
    def forward(ctx, states, weight, targets, chunk):
        """states (n, D), weight (V, D), targets (n,) with -100 for those that do not count."""
        d_states = torch.empty_like(states)
        d_weight = torch.zeros_like(weight)
        dtype = states.dtype
        if torch.is_autocast_enabled(states.device.type):
            dtype = torch.get_autocast_dtype(states.device.type)
        W = weight.to(dtype)
        total = torch.zeros((), device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            parts = zip(states.split(chunk), targets.split(chunk), d_states.split(chunk))
            for s, target, d_s in parts:
                s = s.to(dtype)
                log_p = (s @ W.mT).float().log_softmax(-1)  # (chunk, V)
                total += F.nll_loss(log_p, target, reduction="sum")  # ignores -100
                counts = (target != -100).float()[:, None]
                d_logits = log_p.exp_()
                d_logits.scatter_add_(1, target.clamp(min=0)[:, None], -counts)
                d_logits = d_logits.mul_(counts).to(dtype)
                d_s.copy_(d_logits @ W)
                d_weight += d_logits.mT @ s
        ctx.save_for_backward(d_states, d_weight)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        d_states, d_weight = ctx.saved_tensors
        return gradient * d_states, gradient * d_weight, None, None


# ---- the model ----------------------------------------------------------------------------------


class GPT(nn.Module):
    """Tokens (B, T) of int64 in [0, V) -> logits (B, T, V) of the next token."""

    unit = "token"  # what a data set is counted in
    outer = ("token_embedding", "position_embedding", "head")  # tables: for AdamW, not for Muon
    logits_at_once = 1 << 25  # the loss holds no more logits than these at a time (ChunkedLoss)

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        V, D = config.vocab_size, config.d_model
        self.token_embedding = nn.Embedding(V, D)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.context_length, D)
        self.embed_norm = make_norm(config, D) if config.embed_norm else nn.Identity()
        self.reset_buffers()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(BLOCKS[config.block](config) for _ in range(config.n_layer))
        # The stream that leaves a post-norm block is normalised already.
        self.norm = nn.Identity() if config.block == "post-norm" else make_norm(config, D)
        self.head = nn.Linear(D, V, bias=False)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        self.reset_parameters()

    def reset_buffers(self):
        """Compute the tables of rotary angles, or the slopes of ALiBi.

        They are not saved. A model that was built on the "meta" device must call this again once
        its weights have memory.
        """
        if self.config.position == "rope":
            cos, sin = rotary_tables(self.config)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        if self.config.position == "alibi":
            self.register_buffer("slopes", alibi_slopes(self.config.n_head), persistent=False)

    def reset_parameters(self):
        """Draw the weights as GPT-2 does: normal with standard deviation 0.02, biases 0, norms 1.

        The matrices that write to the residual stream start at 0, or without zero_init at
        0.02 / sqrt(2 L), as 2 L of them add up.
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim == 1:
                nn.init.ones_(p)
            elif name.endswith(("out.weight", "down.weight")):
                std = 0.0 if self.config.zero_init else 0.02 / math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(p, std=std)
            else:
                nn.init.normal_(p, std=0.02)

    def hidden(self, tokens: Tensor, cache=None, sight=None) -> Tensor:
        """Tokens (B, T) -> normalised states (B, T, D), from which the head computes the logits.

        The states are multiplied by logit_scale: the head is linear, so that scales the logits.
        With a KVCache (generate.py), the tokens continue those whose keys and values it holds.
        With a Sight (vision_gpt.py), they are read beside pictures.
        Raises ValueError if there are more than context_length tokens, cached ones included.
        """
        config = self.config
        T = tokens.size(1)
        start, pad = (0, None) if cache is None else (cache.length, cache.pad)
        if start + T > config.context_length:
            problem = f"{start + T} tokens exceed context_length {config.context_length}"
            raise ValueError(f"{problem}; shorten the text, or train a model with a longer context")
        positions = torch.arange(start, start + T, device=tokens.device)  # (T,)

        # A mask is built only where plain causal attention is not enough. Rows that attend one by
        # one, each over another cache (batching.py), see no padding.
        mask = None
        padded = pad is not None and not cache.one_by_one
        alibi = config.position == "alibi"
        if alibi or padded or (T > 1 and (start > 0 or 0 < config.window < T)):
            keys = positions if cache is None else cache.key_positions(T)
            mask = attention_mask(positions, keys, config.window, pad)
            if alibi:
                mask = alibi_scores(positions, keys, mask, self.slopes)

        # Positions count from the first token of each row that is not padding. (Distances, on which
        # ALiBi depends, stay the same.)
        if pad is not None:
            positions = (positions - pad[:, None]).clamp(min=0)  # (B, T)
        x = self.token_embedding(tokens)  # (B, T, D)
        if config.embedding_scale != 1:
            x = config.embedding_scale * x
        if sight is not None:
            x = sight.embed(x, tokens)
        angles = None
        if config.position == "learned":
            x = x + self.position_embedding(positions)
        elif config.position == "rope":
            cos = self.cos[positions].unsqueeze(-3)  # (1, T, K/2), or (B, 1, T, K/2) with padding
            sin = self.sin[positions].unsqueeze(-3)
            angles = (cos, sin)

        # The blocks.
        x = self.dropout(self.embed_norm(x))
        for layer, block in enumerate(self.blocks):
            if sight is not None:
                x = sight.before_block(x, layer)
            x = block(x, angles, mask, cache, layer)
        if cache is not None:
            cache.length += T
        x = self.norm(x)
        return x if config.logit_scale == 1 else config.logit_scale * x

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))  # (B, T, V)

    def loss(
        self, batch: dict[str, Tensor], generators=None, sight=None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of -ln p(next token), in nats, over batch["tokens"] (B, T + 1).

        The first T tokens are the input, the last T the targets. Targets where batch["mask"] (B, T)
        is False do not count; if none counts, the loss is 0. metrics["weight"] is the number of
        targets that count; a caller needs it to average over unequal batches. The logits are
        float32 in the loss, whatever the dtype of the model. The generators are not used: nothing
        in the loss is random but dropout. sight: pictures beside the tokens, see `hidden`.
        """
        tokens = batch["tokens"]
        states = self.hidden(tokens[:, :-1], sight=sight)  # (B, T, D)
        targets = tokens[:, 1:]  # (B, T)
        if "mask" in batch:
            targets = targets.masked_fill(~batch["mask"], -100)  # cross_entropy ignores -100
        states = states.flatten(0, 1)
        targets = targets.flatten()
        chunk = max(1, self.logits_at_once // self.config.vocab_size)
        if len(targets) > chunk and torch.is_grad_enabled() and is_plain(self.head):
            loss = ChunkedLoss.apply(states, self.head.weight, targets, chunk)
        else:
            logits = self.head(states)  # (B T, V)
            loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        weight = (targets != -100).sum()
        return loss / weight.clamp(min=1), {"weight": weight}

    def flops_per_row(self) -> int:
        """FLOPs of one row of context_length tokens, forward and backward; a multiply-add is 2.

        Each weight of a matrix costs 6 per token, and each layer 12 N K T per token for the
        attention scores and the weighted sums, without a discount for causality (Chowdhery et al.
        2022, appendix B).
        """
        config = self.config
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        attention = 12 * config.n_layer * config.n_head * config.K * config.context_length
        return config.context_length * (6 * weights + attention)

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch of zeros with the shapes and dtypes of real data."""
        return {"tokens": torch.zeros(rows, self.config.context_length + 1, dtype=torch.long)}

    def generate(self, prompts: list[list[int]], sampling=None) -> list[list[int]]:
        """Continue each prompt of token ids; return the new tokens of each row (generate.py)."""
        from tinyfm import generate

        return generate.complete(self, prompts, sampling)

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> GPT:
        """Read a folder in the Hugging Face layout, of a class that hub/gpt.py lists."""
        from tinyfm.hub import gpt

        return gpt.load(cls, GPTConfig, folder, dtype)

    def save_pretrained(self, folder: str, tokenizer=None, overwrite: bool = False) -> None:
        """Write weights, config and tokenizer in the Hugging Face layout (hub/gpt.py)."""
        from tinyfm.hub import gpt

        gpt.save(self, folder, tokenizer, overwrite)
