"""A decoder-only Transformer language model.

A text is a row of tokens x_1 ... x_T. The model factorises its probability by the chain rule,

    p(x_1 ... x_T) = prod_t p(x_t | x_1 ... x_{t-1}),

and pretraining minimises the mean of -ln p(x_t | x_<t) in nats per token: predict the next token,
on as much text as there is. One network gives all T conditionals in one pass, because position t
attends only to positions <= t. A block adds two refinements to the residual stream h (T, D):

    h = h + Attention(norm(h))     softmax(q k' / sqrt(K)) v: tokens exchange information
    h = h + MLP(norm(h))           each token on its own

One config expresses GPT-2 (Radford et al. 2019: learned positions, LayerNorm, GELU, biases, tied
head), Llama 2 and 3 (Touvron et al. 2023; Dubey et al. 2024: rotary positions, RMSNorm, SwiGLU,
grouped key/value heads), Mistral (Jiang et al. 2023: sliding window) and Qwen3 (Yang et al. 2025:
normalised queries and keys). Our own default is of Qwen3's form, with projections that start at
zero, so what it trains can be loaded wherever Qwen3 can.

Letters: B batch, T tokens, D model width, N query heads, G key/value heads, K head width,
F feed-forward width, V vocabulary, L layers, S cache slots.
Left out: mixture of experts, position interpolation other than Llama 3's. generate.py samples.
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
    vocab_size: int = 4096  # tokens the model knows; a tokenizer is trained to this size
    context_length: int = 256  # longest row of tokens the model sees at once
    n_layer: int = 6  # blocks
    n_head: int = 4  # query heads
    n_kv_head: int = 0  # key/value heads, shared by groups of query heads; 0 = n_head
    d_model: int = 256  # width of the residual stream
    d_head: int = 0  # width of a head; 0 = d_model / n_head
    d_ff: int = 0  # width inside the MLP; 0 = 4 d_model, or 8/3 d_model for swiglu
    mlp: Literal["swiglu", "gelu", "relu2"] = "swiglu"  # nonlinearity of the MLP
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # normalisation before each sublayer
    norm_eps: float = 1e-6  # added to the variance
    qk_norm: bool = True  # RMSNorm on every query and key head
    position: Literal["rope", "learned"] = "rope"  # rotate queries and keys, or add a vector
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    rope_factor: float = 1.0  # Llama 3 context extension: long waves slow down by this; 1 = off
    rope_low_freq_factor: float = 1.0  # ... waves longer than original / this slow down fully
    rope_high_freq_factor: float = 4.0  # ... waves shorter than original / this stay as they are
    rope_original_context: int = 8192  # ... context length before it
    window: int = 0  # attend to this many latest tokens only; 0 = all
    bias: bool = False  # biases in linear layers
    tied: bool = False  # the output head is the token embedding
    dropout: float = 0.0  # share of activations zeroed in training
    zero_init: bool = True  # blocks start as the identity: output projections begin at zero

    def __post_init__(self):
        least = dict.fromkeys(("vocab_size", "context_length", "n_layer", "n_head", "d_model"), 1)
        least |= dict.fromkeys(("n_kv_head", "d_head", "d_ff", "window"), 0)
        for name, n in least.items():
            if getattr(self, name) < n:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {n}")
        D, N, G = self.d_model, self.n_head, self.G
        if not self.d_head and D % N:
            fit = N * max(1, round(D / N))
            raise ValueError(f"d_model {D} is not divisible by n_head {N}; use {fit} or set d_head")
        if N % G:
            raise ValueError(f"n_head {N} is not divisible by n_kv_head {G}; use a divisor of {N}")
        if self.position == "rope" and self.K % 2:
            raise ValueError(f"the head width {self.K} is odd; rotary positions need an even one")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        for name, kind in get_type_hints(GPTConfig).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {get_args(kind)}")

    # The sizes that 0 leaves open. Not stored, so that another d_model or n_head changes them too.

    @property
    def G(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def K(self) -> int:
        return self.d_head or self.d_model // self.n_head

    @property
    def F(self) -> int:
        if self.mlp == "swiglu":  # three matrices of 8/3 D cost as much as two of 4 D
            return self.d_ff or 32 * math.ceil(self.d_model / 12)
        return self.d_ff or 4 * self.d_model


# ---- positions ----------------------------------------------------------------------------------


def rope_frequencies(config: GPTConfig) -> Tensor:
    """Angular frequency of each pair of channels, (K/2,): theta^(-2i/K) (Su et al. 2021, eq. 15).

    With rope_factor > 1, Llama 3.1's extension: waves that are long against the original context
    are slowed by the factor, short ones are kept, and those between are blended.
    """
    exponent = torch.arange(0, config.K, 2, dtype=torch.float32) / config.K
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_factor == 1.0:
        return frequency
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_context * frequency / (2 * math.pi)  # in the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / config.rope_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + K/2) of x (B, N, T, K) by the angles in cos, sin (.., T, K/2).

    Afterwards q . k depends on the two positions only through their distance.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention_mask(query: Tensor, key: Tensor, window: int, pad: Tensor | None) -> Tensor:
    """True where a query position (T,) may look at a key position (S,): (1 or B, 1, T, S).

    Not at the future, not beyond the window, not at padding; but always at itself, so that no
    row of the softmax is empty.
    """
    distance = query[:, None] - key[None, :]  # (T, S)
    allowed = (distance >= 0) & (distance < (window or math.inf))
    if pad is None:
        return allowed[None, None]
    real = key[None, None, :] >= pad[:, None, None]  # (B, 1, S)
    return ((allowed & real) | (distance == 0))[:, None]


# ---- layers -------------------------------------------------------------------------------------


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(width, eps=config.norm_eps)


class Attention(nn.Module):
    """Causal self-attention; N query heads share G key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        N, G, K = config.n_head, config.G, config.K
        self.d_head, self.grouped, self.dropout = K, G != N, config.dropout
        self.q = nn.Linear(config.d_model, N * K, bias=config.bias)
        self.k = nn.Linear(config.d_model, G * K, bias=config.bias)
        self.v = nn.Linear(config.d_model, G * K, bias=config.bias)
        self.out = nn.Linear(N * K, config.d_model, bias=config.bias)
        self.q_norm = nn.RMSNorm(K, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(K, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x, angles):
        """Normalised states (B, T, D) -> queries (B, N, T, K), keys and values (B, G, T, K)."""
        rows = (self.q(x), self.k(x), self.v(x))
        q, k, v = (rearrange(row, "B T (N K) -> B N T K", K=self.d_head) for row in rows)
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # On a CPU the backward pass of attention is several times slower in bfloat16.
            q, k, v = q.float(), k.float(), v.float()
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        return q.to(v.dtype), k.to(v.dtype), v  # autocast norms and rotates in float32

    def mix(self, q, k, v, mask):
        """What each query finds among the values: (B, N, T, K)."""
        with torch.autocast(q.device.type, enabled=False):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and q.size(2) > 1,
                dropout_p=self.dropout if self.training else 0.0, enable_gqa=self.grouped,
            )  # fmt: skip


class MLP(nn.Module):
    """Two linear layers around a nonlinearity; SwiGLU (Shazeer 2020) gates one by another."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.kind = config.mlp
        if self.kind == "swiglu":
            self.gate = nn.Linear(config.d_model, config.F, bias=config.bias)
        self.up = nn.Linear(config.d_model, config.F, bias=config.bias)
        self.down = nn.Linear(config.F, config.d_model, bias=config.bias)

    def forward(self, x):
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.kind == "gelu":
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.relu(self.up(x)).square())  # So et al. 2021


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1, self.attention = make_norm(config, config.d_model), Attention(config)
        self.norm2, self.mlp = make_norm(config, config.d_model), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    # Two halves without state, for compiled.py, and the cache between them.
    def begin(self, x, angles):
        return self.attention.project(self.norm1(x), angles)

    def end(self, x, y):
        x = x + self.dropout(self.attention.out(rearrange(y, "B N T K -> B T (N K)")))
        return x + self.dropout(self.mlp(self.norm2(x)))  # (B, T, D)

    def forward(self, x, angles, mask, cache, layer):
        q, k, v = self.begin(x, angles)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        return self.end(x, self.attention.mix(q, k, v, mask))


# ---- the model ----------------------------------------------------------------------------------


class GPT(nn.Module):
    """Tokens (B, T) of int64 in [0, V) -> logits (B, T, V) of the next token."""

    outer = ("token_embedding", "position_embedding", "head")  # tables: AdamW's, not Muon's

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        V, D = config.vocab_size, config.d_model
        self.token_embedding = nn.Embedding(V, D)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.context_length, D)
        self.reset_buffers()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config, D)
        self.head = nn.Linear(D, V, bias=False)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        self.reset_parameters()

    def reset_buffers(self):
        """The rotary angles: not saved, and to be made anew where the model was built on "meta"."""
        if self.config.position == "rope":
            positions = torch.arange(self.config.context_length)
            turns = positions[:, None] * rope_frequencies(self.config)
            self.register_buffer("cos", turns.cos(), persistent=False)  # (context_length, K/2)
            self.register_buffer("sin", turns.sin(), persistent=False)

    def reset_parameters(self):
        """GPT-2's normal(0, 0.02); what writes to the residual stream starts at 0, or smaller."""
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

    def hidden(self, tokens: Tensor, cache=None) -> Tensor:
        """Tokens (B, T) -> normalised states (B, T, D), from which the head reads the logits.

        With a KVCache (generate.py) the tokens continue what it holds. Raises ValueError past
        context_length.
        """
        T, config = tokens.size(1), self.config
        start, pad = (0, None) if cache is None else (cache.length, cache.pad)
        if start + T > config.context_length:
            raise ValueError(f"{start + T} tokens exceed context_length {config.context_length}")
        positions = torch.arange(start, start + T, device=tokens.device)  # (T,)
        mask = None  # plain causal attention, or one token that may look at all the cache returns
        if pad is not None or (T > 1 and 0 < config.window < T):
            keys = positions if cache is None else cache.key_positions(T)
            mask = attention_mask(positions, keys, config.window, pad)
        if pad is not None:
            positions = (positions - pad[:, None]).clamp(min=0)  # (B, T): from each row's start
        x = self.token_embedding(tokens)  # (B, T, D)
        if config.position == "learned":
            x, angles = x + self.position_embedding(positions), None
        else:
            angles = [t[positions].unsqueeze(-3) for t in (self.cos, self.sin)]  # (.., 1, T, K/2)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, mask, cache, layer)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))  # (B, T, V)

    def loss(self, batch: dict[str, Tensor], generator=None) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of -ln p(next token) in nats over batch["tokens"] (B, T + 1).

        Targets where batch["mask"] (B, T) is False do not count; metrics["weight"] is the number
        that do, by which a caller averages over unequal batches. Nothing is drawn from generator.
        """
        tokens = batch["tokens"]
        logits, targets = self(tokens[:, :-1]), tokens[:, 1:]  # (B, T, V), (B, T)
        if "mask" in batch:
            targets = targets.masked_fill(~batch["mask"], -100)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        weight = (targets != -100).sum()
        return loss / weight.clamp(min=1), {"weight": weight}

    def flops_per_row(self) -> int:
        """Forward and backward FLOPs of one row of context_length tokens, 2 a multiply-add.

        6 for every weight of a matrix, once a token, and 12 N K T for the scores and their sums in
        each layer, without a discount for causality (Chowdhery et al. 2022, appendix B).
        """
        c = self.config
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        attention = 12 * c.n_layer * c.n_head * c.K * c.context_length
        return c.context_length * (6 * weights + attention)

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """Rows as data could give them."""
        return {"tokens": torch.zeros(rows, self.config.context_length + 1, dtype=torch.long)}

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> GPT:
        """Read a GPT-2, Llama, Mistral or Qwen3 folder in the Hugging Face layout (hub_gpt.py)."""
        from tinyfm.hub import gpt

        return gpt.load(cls, GPTConfig, folder, dtype)

    def save_pretrained(self, folder: str, tokenizer=None, overwrite: bool = False) -> None:
        """Write weights, config and tokenizer in the Hugging Face layout (hub_gpt.py)."""
        from tinyfm.hub import gpt

        gpt.save(self, folder, tokenizer, overwrite)

    def generate(self, prompts: list[list[int]], sampling=None) -> list[list[int]]:
        """Continue each prompt of token ids; return each row's new tokens (generate.py)."""
        from tinyfm import generate

        return generate.complete(self, prompts, sampling)
