"""MusicGen: a language model that writes several codes at once, with a delay between them.

A codec (codec.py) turns a sound into frames of Q codes. The codes of a frame depend on one another:
each codebook holds what those before it have left over. So in which order should a GPT write them?
MusicGen (Copet et al. 2023, section 2.2) lets each step write a column, which has a place for each
codebook, and compares patterns of filling the columns. Here Q = 3, c_qt is the code of codebook q
in frame t, and . is an empty place:

    flat        .  c_00   .    .   c_01   .    .   c_02   .    .
                .   .   c_10   .    .   c_11   .    .   c_12   .
                .   .    .   c_20   .    .   c_21   .    .   c_22      T Q steps for T frames

    parallel    .  c_00 c_01 c_02 c_03
                .  c_10 c_11 c_12 c_13
                .  c_20 c_21 c_22 c_23                                 T steps

    delay       .  c_00 c_01 c_02 c_03   .    .
                .   .   c_10 c_11 c_12 c_13   .
                .   .    .   c_20 c_21 c_22 c_23                       T + Q - 1 steps

A step reads the columns so far and writes the next. Codes of one column are drawn without knowing
each other, so the model gives a sound the probability

    p(codes) = product over columns of the product over their codes of p(code | columns before)

- flat: one code a column. This is the chain rule, which leaves nothing out. But a second of sound
  takes Q times as many steps, and the context, which is counted in steps, holds fewer frames.
- parallel: the Q codes of a frame are drawn without knowing each other.
- delay: code q of a frame knows codes 0 ... q - 1 of it. Of the frame before, it does not know the
  codes behind code q: code q + 1 of that frame is in the same column, and the others come later.

In all three, the probabilities of all sounds add up to 1. So the nats of a frame, -ln p over the
number of frames, can be compared.

The network is gpt.py's Transformer with Q tables of embeddings, whose vectors are added, and Q
heads. Positions are sinusoids, added to the embeddings. A block may also attend to a text, whose
states another model computes (T5, in the paper), between its attention and its MLP.

Letters: B batch, T frames or steps, Q codebooks, K codes in each, D model width, N heads, S tokens
of a text.
Left out: the text encoder, guidance, stereo with a codebook for each side, melodies as a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tinyfm.codec import Codec, CodecConfig
from tinyfm.generate import KVCache, Sampling, choose, row_generator
from tinyfm.gpt import Attention, Block, GPTConfig, make_norm

Pattern = Literal["delay", "flat", "parallel"]


@dataclass(frozen=True)
class MusicGenConfig:
    n_code: int = 256  # codes in a codebook
    n_book: int = 4  # codebooks
    context_length: int = 256  # largest number of steps that the model sees at once
    n_layer: int = 4  # number of blocks
    n_head: int = 4  # heads
    d_model: int = 192  # width of the residual stream
    d_ff: int = 0  # width inside the MLP; 0 = 4 d_model
    dropout: float = 0.0  # share of activations set to zero in training
    text: bool = False  # attention to the states of a text
    pattern: Pattern = "delay"  # which codes a step writes

    def __post_init__(self):
        for name, least in (("n_code", 2), ("n_book", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.d_model < 4 or self.d_model % 2:
            raise ValueError(f"d_model is {self.d_model}; sinusoids need an even width from 4")
        if self.pattern not in get_args(Pattern):
            raise ValueError(f"pattern is {self.pattern!r}; use one of {get_args(Pattern)}")
        if self.frames < 1:
            problem = f"context_length is {self.context_length}, too short for a frame"
            raise ValueError(f"{problem}; use at least {count_steps(self.pattern, self.n_book, 1)}")
        _ = self.gpt  # which checks the other fields

    @property
    def frames(self) -> int:
        """Frames that fit into the context."""
        return count_frames(self.pattern, self.n_book, self.context_length)

    @property
    def gpt(self) -> GPTConfig:
        """The config of the blocks. They know no positions: these are added to the embeddings."""
        return GPTConfig(
            vocab_size=self.n_code,
            context_length=self.context_length,
            n_layer=self.n_layer,
            n_head=self.n_head,
            d_model=self.d_model,
            d_ff=self.d_ff,
            mlp="exact-gelu",
            norm="layernorm",
            norm_eps=1e-5,
            norm_bias=True,
            qk_norm=False,
            position="learned",
            dropout=self.dropout,
        )


# ---- pure functions -----------------------------------------------------------------------------


def turns(pattern: Pattern, n_book: int) -> list[tuple[int, int]]:
    """Of each codebook: the step, from 0, that writes its first code, and the steps to the next."""
    if pattern == "delay":
        return [(q, 1) for q in range(n_book)]
    if pattern == "flat":
        return [(q, n_book) for q in range(n_book)]
    return [(0, 1)] * n_book


def count_steps(pattern: Pattern, n_book: int, frames: int) -> int:
    """Steps that write so many frames."""
    first, stride = turns(pattern, n_book)[-1]
    return first + stride * (frames - 1) + 1


def count_frames(pattern: Pattern, n_book: int, steps: int) -> int:
    """Whole frames that so many steps write."""
    first, stride = turns(pattern, n_book)[-1]
    return (steps - 1 - first) // stride + 1


def interleave_slowly(codes: Tensor, empty: int, pattern: Pattern) -> Tensor:
    """The obvious way to `interleave`: one code after the other."""
    B, Q, T = codes.shape
    columns = torch.full((B, Q, 1 + count_steps(pattern, Q, T)), empty)
    for t in range(T):
        for q in range(Q):
            step = {"delay": t + q, "flat": t * Q + q, "parallel": t}[pattern]
            columns[:, q, 1 + step] = codes[:, q, t]
    return columns


def interleave(codes: Tensor, empty: int, pattern: Pattern) -> Tensor:
    """Codes (B, Q, T) -> columns (B, Q, 1 + steps): an empty one, then what each step writes."""
    B, Q, T = codes.shape
    columns = codes.new_full((B, Q, 1 + count_steps(pattern, Q, T)), empty)
    for q, (first, stride) in enumerate(turns(pattern, Q)):
        columns[:, q, 1 + first : 1 + first + stride * T : stride] = codes[:, q]
    return columns


def undo_interleave(written: Tensor, pattern: Pattern) -> Tensor:
    """What each step writes, (B, Q, steps, ...), -> what belongs to each frame, (B, Q, T, ...)."""
    Q = written.size(1)
    T = count_frames(pattern, Q, written.size(2))
    rows = [
        written[:, q, first : first + stride * T : stride]
        for q, (first, stride) in enumerate(turns(pattern, Q))
    ]
    return torch.stack(rows, dim=1)


def flatten(codes: Tensor, n_code: int) -> Tensor:
    """Codes (B, Q, T) -> tokens (B, T Q) for a GPT, frame by frame: code + q K for codebook q."""
    first = n_code * torch.arange(codes.size(1), device=codes.device)  # (Q,)
    return rearrange(codes + first[:, None], "B Q T -> B (T Q)")


def check_codes(codes: Tensor, n_book: int, n_code: int) -> None:
    """Raise ValueError unless these are codes (B, Q, T) of so many codebooks, in [0, K)."""
    if codes.ndim != 3 or codes.size(1) != n_book:
        raise ValueError(f"codes are {tuple(codes.shape)}; they must be (B, {n_book}, frames)")
    if codes.numel() and not (codes.min() >= 0 and codes.max() < n_code):
        wrong = int(codes.min()) if codes.min() < 0 else int(codes.max())
        raise ValueError(f"there is no code {wrong}: the codebooks have 0 to {n_code - 1}")


def sinusoids(length: int, width: int) -> Tensor:
    """A vector for each position, float32 (length, width): cosines, then sines.

    Frequency i = 0 ... width/2 - 1 is 10000^(-i / (width/2 - 1)): the last one is 1/10000.
    """
    table = torch.empty(length, width)
    if table.is_meta:  # shapes alone: arithmetic there loads PyTorch's compiler, for a second
        return table
    half = width // 2
    # In float32 as the published models were trained: at position 2000 the rounding is seen.
    frequency = torch.exp(torch.arange(half).float() * -(math.log(10_000) / (half - 1)))
    angles = torch.arange(length).float()[:, None] * frequency
    return torch.cat((angles.cos(), angles.sin()), dim=1)


# ---- layers -------------------------------------------------------------------------------------


class Text(NamedTuple):
    """A text, as the blocks read it."""

    keys_values: list[tuple[Tensor, Tensor]]  # of each block, (B, N, S, K) each
    mask: Tensor  # True at real tokens, (B, 1, 1, S)


def split_heads(x: Tensor, width: int) -> Tensor:
    """(B, T, D) -> (B, N, T, K), for heads of this width."""
    return rearrange(x, "B T (N K) -> B N T K", K=width)


class MusicBlock(Block):
    """gpt.py's block, and between its two updates attention to a text:

    x = x + Attention(norm1(x))
    x = x + Attention(norm_text(x), text)
    x = x + MLP(norm2(x))
    """

    def __init__(self, config: MusicGenConfig):
        super().__init__(config.gpt)
        if config.text:
            self.norm_text = make_norm(config.gpt, config.d_model)
            self.text = Attention(config.gpt)

    def text_keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """A text's states (B, S, D) -> keys and values, (B, N, S, K) each."""
        K = self.text.d_head
        return split_heads(self.text.k(states), K), split_heads(self.text.v(states), K)

    def forward(self, x, text, cache, layer):
        q, k, v = self.before_attention(x, None)
        if cache is None:
            y = self.attention.attend(q, k, v, None)
        else:
            y = cache.attend(self.attention.attend, layer, q, k, v, None)
        x = x + self.update(self.attention.out(rearrange(y, "B N T K -> B T (N K)")))
        if text is not None:
            q = split_heads(self.text.q(self.norm_text(x)), self.text.d_head)
            y = self.text.attend(q, *text.keys_values[layer], text.mask)
            x = x + self.update(self.text.out(rearrange(y, "B N T K -> B T (N K)")))
        return x + self.update(self.mlp(self.norm2(x)))


# ---- the model ----------------------------------------------------------------------------------


class MusicGen(nn.Module):
    """Columns of codes (B, Q, T), int64 in [0, K], K for no code -> logits (B, Q, T, K) of the next
    column."""

    unit = "sound"  # what a data set is counted in
    outer = ("code_embeddings", "heads")  # tables: for AdamW, not for Muon

    def __init__(self, config: MusicGenConfig):
        super().__init__()
        self.config = config
        Q, K, D = config.n_book, config.n_code, config.d_model
        self.code_embeddings = nn.ModuleList(nn.Embedding(K + 1, D) for _ in range(Q))
        self.reset_buffers()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(MusicBlock(config) for _ in range(config.n_layer))
        self.norm = make_norm(config.gpt, D)
        self.heads = nn.ModuleList(nn.Linear(D, K, bias=False) for _ in range(Q))
        self.reset_parameters()

    def reset_buffers(self):
        """Compute the sinusoids, which are not saved."""
        table = sinusoids(self.config.context_length, self.config.d_model)
        self.register_buffer("positions", table, persistent=False)

    def reset_parameters(self):
        """Draw the weights as gpt.py does: what writes to the residual stream starts at 0."""
        for name, p in self.named_parameters():
            if name.endswith(("bias", "out.weight", "down.weight")):
                nn.init.zeros_(p)
            elif p.ndim == 1:
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=0.02)

    def prepare_text(self, states: Tensor, mask: Tensor | None = None) -> Text:
        """A text's states (B, S, D) of another model, mask (B, S) True at real tokens -> Text.

        Raises ValueError if the model reads no texts, or for another width.
        """
        D = self.config.d_model
        if not self.config.text:
            raise ValueError("the model reads no texts; build it with text=True")
        if states.ndim != 3 or states.size(-1) != D:
            raise ValueError(f"the text is {tuple(states.shape)}; it must be (B, tokens, {D})")
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return Text([block.text_keys_values(states) for block in self.blocks], mask[:, None, None])

    def hidden(self, columns: Tensor, text: Text | None = None, cache=None) -> Tensor:
        """Columns (B, Q, T) -> normalised states (B, T, D), from which the heads compute logits.

        With a KVCache (generate.py), they continue those whose keys and values it holds. Raises
        ValueError if there are more than context_length columns, cached ones included.
        """
        T = columns.size(2)
        start = 0 if cache is None else cache.length
        if start + T > self.config.context_length:
            problem = f"{start + T} steps exceed context_length {self.config.context_length}"
            raise ValueError(f"{problem}; shorten the sound, or train with a longer context")
        parts = [embed(columns[:, q]) for q, embed in enumerate(self.code_embeddings)]
        x = sum(parts) + self.positions[start : start + T]  # (B, T, D)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, text, cache, layer)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def forward(self, columns: Tensor, text: Text | None = None, cache=None) -> Tensor:
        states = self.hidden(columns, text, cache)
        return torch.stack([head(states) for head in self.heads], dim=1)  # (B, Q, T, K)

    def loss(self, batch: dict[str, Tensor], generators=None) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of -ln p(code), in nats, over batch["codes"] (B, Q, T), each given the columns
        before its own. Nothing is random but dropout.

        metrics, without gradients: "frame_nats", the nats of a frame, the sum over its codes. What
        each pattern leaves out of them stands at the top.
        """
        codes = batch["codes"]
        if type(codes) is Tensor:  # fake tensors, as of the calculators, have no values to read
            check_codes(codes, self.config.n_book, self.config.n_code)
        pattern = self.config.pattern
        columns = interleave(codes, self.config.n_code, pattern)
        logits = self(columns[..., :-1])  # (B, Q, steps, K), of the columns from 1
        logits = undo_interleave(logits, pattern)  # (B, Q, T, K)
        loss = F.cross_entropy(logits.float().flatten(0, 2), codes.flatten())
        return loss, {"frame_nats": self.config.n_book * loss.detach()}

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch of zeros with the shapes and dtypes of real data."""
        c = self.config
        return {"codes": torch.zeros(rows, c.n_book, c.frames, dtype=torch.long)}

    @torch.no_grad()
    def generate(
        self,
        prompts: Tensor,
        frames: int,
        sampling: Sampling | None = None,
        text: Text | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Continue sounds: codes (B, Q, t), t may be 0, -> codes (B, Q, t + frames).

        sampling: its temperature, top_k, top_p and min_p shape the draws. generators: B CPU
        generators, by default those that sampling.seed gives; row i uses only generators[i]. The
        model is put into evaluation mode. Raises ValueError for codes that do not fit, and for
        sounds longer than the context.
        """
        sampling = sampling or Sampling()
        config = self.config
        B, Q, K = len(prompts), config.n_book, config.n_code
        check_codes(prompts, Q, K)
        if generators is None:
            generators = [row_generator(sampling.seed, i) for i in range(B)]
        known = prompts.size(2)
        if frames < 1 or config.frames < known + frames:
            raise ValueError(
                f"{known} frames and {frames} new ones: write at least 1, and have at most "
                f"{config.frames} in all, as the context holds"
            )
        self.eval()
        # Codes that are not known yet are -1, so that a code is drawn where the columns have -1.
        columns = interleave(F.pad(prompts, (0, frames), value=-1), K, config.pattern)
        steps = columns.size(2) - 1
        pad = torch.zeros(B, dtype=torch.long, device=prompts.device)
        cache = KVCache(config.gpt, steps, pad)
        _, stride = turns(config.pattern, Q)[0]
        start = 0
        for step in range(stride * known + 1, steps + 1):
            logits = self(columns[..., start:step], text, cache)[:, :, -1]  # (B, Q, K)
            start = step
            for q in range(Q):
                if columns[0, q, step] == -1:
                    columns[:, q, step] = choose(logits[:, q], sampling, list(generators))
        return undo_interleave(columns[..., 1:], config.pattern)

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> MusicGen:
        """Read a MusicgenForCausalLM folder of transformers (hub/musicgen.py)."""
        from tinyfm.hub import musicgen

        return musicgen.load(cls, MusicGenConfig, folder, dtype)

    def save_pretrained(self, folder: str, overwrite: bool = False) -> None:
        """Write weights and config in the layout of transformers (hub/musicgen.py)."""
        from tinyfm.hub import musicgen

        musicgen.save(self, folder, overwrite)


# ---- with a codec -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoundWriterConfig:
    music: MusicGenConfig = field(default_factory=MusicGenConfig)  # the language model
    codec: CodecConfig = field(default_factory=CodecConfig)  # the codec whose codes it writes

    def __post_init__(self):
        for name, kind in (("music", MusicGenConfig), ("codec", CodecConfig)):
            if isinstance(getattr(self, name), dict):  # a config read from JSON
                object.__setattr__(self, name, kind(**getattr(self, name)))
        for name in ("n_code", "n_book"):
            theirs, ours = getattr(self.codec, name), getattr(self.music, name)
            if theirs != ours:
                raise ValueError(f"music has {name} {ours}, the codec {theirs}; give both the same")


class SoundWriter(nn.Module):
    """A MusicGen and a frozen codec: from nothing, or the start of a sound, to a sound."""

    unit = MusicGen.unit
    outer = MusicGen.outer

    def __init__(self, config: SoundWriterConfig):
        super().__init__()
        self.config = config
        self.codec = Codec(config.codec).requires_grad_(False)
        self.music = MusicGen(config.music)
        self.train()

    def train(self, mode: bool = True) -> SoundWriter:
        """Set the mode of the language model; the frozen codec stays in evaluation mode."""
        super().train(mode)
        self.codec.eval()
        return self

    def loss(self, batch: dict[str, Tensor], generators=None) -> tuple[Tensor, dict[str, Tensor]]:
        """MusicGen's loss of batch["codes"] (B, Q, T), or of the codes of batch["sounds"]."""
        if "sounds" in batch:
            batch = {"codes": self.codec.encode(batch["sounds"])}
        return self.music.loss(batch)

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch of zeros with the fields of a real one whose sounds are already encoded."""
        return self.music.example_batch(rows)

    @torch.no_grad()
    def generate(
        self,
        starts: Tensor,
        frames: int,
        sampling: Sampling | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Continue sounds (B, C, T) in [-1, 1] by so many frames; T may be 0. -> (B, C, samples).

        Arguments and errors are those of MusicGen.generate. What was given is decoded too.
        """
        prompts = starts.new_zeros(len(starts), self.config.codec.n_book, 0, dtype=torch.long)
        if starts.size(2):
            prompts = self.codec.encode(starts)
        return self.codec.decode(self.music.generate(prompts, frames, sampling, None, generators))
