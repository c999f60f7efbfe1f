"""XLNet: a language model that predicts its tokens in any order.

A GPT factorises a text from left to right, so a token is predicted from one side only. BERT reads
both sides, but it sees masks that no text has, and predicts each one as if the others stayed
hidden. XLNet (Yang et al. 2019) keeps the chain rule, which needs no masks, and changes the order:

    ln p(x) = sum_t ln p(x_z(t) | x_z(1) ... x_z(t-1))      for any permutation z of 1 ... T    (3)

In each row z is drawn at random, so a token learns to be predicted from any set of others. The text
itself is not permuted: every token keeps its position, and z only says what may be looked at.

The first tokens of z have next to no context, and teach little. So only the last one in six is
predicted, and the others are given (eq. 5). One number a token says all of this, its order:

    0            the token is given; all tokens may look at it
    1, 2, ...    the tokens that are predicted, in this order

A state that predicts x_i must know the place i, but not the token x_i. A state that others look at
must know both. One state cannot do both jobs, so there are two streams (section 2.3) with the same
weights. The content stream h starts as the embedding of the token, the query stream g as one learnt
vector. In every layer both attend to content states:

    h_i  looks at   order(j) <= order(i)      itself too
    g_i  looks at   order(j) <  order(i)      all but itself; there is a g only where i is predicted

For the sentence "the cat sat on" with the orders 0 2 0 1 (`picture` draws it for any other):

             h looks at            g looks at
             the  cat  sat  on     the  cat  sat  on
    the  0   #    .    #    .
    cat  2   #    #    #    #      #    .    #    #        p(cat | the, sat, on)
    sat  0   #    .    #    .
    on   1   #    .    #    #      #    .    #    .        p(on | the, sat)

Given tokens look at one another, whatever their place in z, as in the authors' code: they are all
known when the first token is predicted. If several tokens have the same order, each is predicted as
if the others stayed hidden: that is how BERT fills masks. With the orders 0, 1, 2, ... the model
reads from left to right, as a GPT does.

Attention knows positions by the distance i - j alone (Dai et al. 2019, section 3.3):

    score(i, j) = [(q_i + u) k_j + (q_i + v) r_(i-j) + (q_i + b) s_ij] / sqrt(K)

with a key r for each distance, a sinusoid times a matrix, and s_ij = one of two vectors: i and j
are in the same segment (a question, its answer), or they are not. u, v and b are learnt.

As no position is absolute, a long text can be read in pieces. A piece also looks at the states of
the piece before, which are kept as memory (Dai et al. 2019, section 3.2) and get no gradient:
see `remember`.

Letters: B batch, T tokens, M tokens in memory, S = M + T keys, P places that are predicted, R = S +
T distances, D model width, N heads, K head width, F feed-forward width, V vocabulary.
Left out: rows that are read backwards (`bi_data`), the largest distance (`clamp_len`),
the same number of keys for all tokens (`same_length`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class XLNetConfig:
    vocab_size: int = 4096  # number of tokens the model knows; a tokenizer is trained to this size
    context_length: int = 128  # tokens of a row in training, and most in a prompt
    n_layer: int = 6  # number of blocks
    n_head: int = 4  # attention heads
    d_model: int = 256  # width of the states
    d_ff: int = 0  # width inside the MLP; 0 = 4 d_model
    norm_eps: float = 1e-12  # small number added to the variance in each norm
    segments: bool = False  # learn whether two tokens are of the same document
    dropout: float = 0.0  # share of activations set to zero in training
    zero_init: bool = True  # output projections start at zero, so each update starts as zero

    def __post_init__(self):
        for name in ("vocab_size", "context_length", "n_layer", "n_head", "d_model"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.d_ff < 0:
            raise ValueError(f"d_ff is {self.d_ff}; it must be at least 0")
        multiple = math.lcm(2, self.n_head)  # the sinusoids are pairs
        if self.d_model % multiple:
            nearest = multiple * max(1, round(self.d_model / multiple))
            problem = f"d_model {self.d_model} is not divisible by 2 and n_head {self.n_head}"
            raise ValueError(f"{problem}; use {nearest}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")

    @property
    def K(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_head

    @property
    def F(self) -> int:
        """Width inside the MLP."""
        return self.d_ff or 4 * self.d_model


# ---- what may be looked at ----------------------------------------------------------------------


def content_mask(order: Tensor) -> Tensor:
    """True where the content stream of i may look at j: order (B, T) -> bool (B, T, T)."""
    return order[:, None, :] <= order[:, :, None]


def query_mask(order: Tensor, places: Tensor) -> Tensor:
    """True where the query stream of a place may look at j: places (B, P) -> bool (B, P, T)."""
    return order[:, None, :] < order.gather(1, places)[:, :, None]


def picture(words: Sequence[str], order: Sequence[int]) -> str:
    """What both streams of each word may look at, drawn as in the text above."""
    ranks = torch.tensor([list(order)])
    h = content_mask(ranks)[0].tolist()
    g = query_mask(ranks, torch.arange(len(words))[None])[0].tolist()
    widths = [max(1, len(word)) for word in words]
    titles = ("h looks at", "g looks at")

    def line_up(cells: Sequence[str]) -> str:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths))
        return line.ljust(len(titles[0]))

    def marks(may_look: Sequence[bool]) -> str:
        return line_up(["#" if may else "." for may in may_look])

    digits = len(str(max(order)))
    blank = " " * (max(widths) + digits + 5)
    columns = line_up(words)
    lines = [
        f"{blank}{titles[0].ljust(len(columns))}     {titles[1]}",
        f"{blank}{columns}     {columns}",
    ]
    for i, word in enumerate(words):
        own = marks(g[i]) if order[i] else ""
        rank = str(order[i]).rjust(digits)
        lines.append(f"{word.ljust(max(widths))}  {rank}   {marks(h[i])}     {own}")
    return "\n".join(line.rstrip() for line in lines)


# ---- relative positions -------------------------------------------------------------------------


def encode_distances(T: int, S: int, width: int, device: torch.device) -> Tensor:
    """Sinusoids of the distances S, S - 1, ..., 1 - T from a query back to a key, (R, width).

    R = S + T. Half of the channels are sines, the other half cosines.
    """
    distances = torch.arange(S, -T, -1, dtype=torch.float32, device=device)
    pairs = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    angles = distances[:, None] / 10_000 ** (pairs / width)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def by_key(x: Tensor, places: Tensor, T: int) -> Tensor:
    """Scores by distance -> scores by key: x (B, N, P, R) -> (B, N, P, S), the obvious way.

    The query at the place i and the key j are S - T + i - j apart, since the last T of the S keys
    are the tokens themselves. That distance is column T - i + j. places (B, P).
    """
    keys = torch.arange(x.size(-1) - T, device=x.device)
    columns = T - places[:, None, :, None] + keys  # (B, 1, P, S)
    return x.gather(-1, columns.expand(-1, x.size(1), -1, -1))


def shift(x: Tensor) -> Tensor:
    """`by_key` for queries at all T places, x (B, N, T, R) -> (B, N, T, S), without an index.

    Row i starts at column T - i: one column earlier than the row before. In memory the rows follow
    one another, R numbers each. So if T numbers are skipped, and the rest is read as rows of R - 1
    numbers, each row starts where it should (Dai et al. 2019, appendix B).
    """
    T, R = x.shape[-2:]
    return x.flatten(-2)[..., T:].unflatten(-1, (T, R - 1))[..., : R - T]


# ---- layers -------------------------------------------------------------------------------------


class View(NamedTuple):
    """Which keys the queries of one stream may look at. It is the same in every layer."""

    places: Tensor | None  # of the queries, (B, P); None: at all T places
    allowed: Tensor | None  # True where a query may look at a key, (B, P, S); None: everywhere
    same: Tensor | None  # True where both are of the same segment, (B, P, S); None: they all are


class Keys(NamedTuple):
    """Keys and values of one layer, which both streams share."""

    k: Tensor  # keys of the content, (B, N, S, K)
    v: Tensor  # values, (B, N, S, K)
    r: Tensor  # keys of the distances, (N, R, K)


class Attention(nn.Module):
    """Attention to content states, by content, distance and segment."""

    def __init__(self, config: XLNetConfig):
        super().__init__()
        D, N, K = config.d_model, config.n_head, config.K
        self.heads = N
        self.q = nn.Linear(D, D, bias=False)
        self.k = nn.Linear(D, D, bias=False)
        self.v = nn.Linear(D, D, bias=False)
        self.r = nn.Linear(D, D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.content_bias = nn.Parameter(torch.empty(N, K))  # u
        self.position_bias = nn.Parameter(torch.empty(N, K))  # v
        if config.segments:
            self.segment_bias = nn.Parameter(torch.empty(N, K))  # b
            self.segment_embedding = nn.Parameter(torch.empty(2, N, K))  # same segment, or not
        self.dropout = nn.Dropout(config.dropout)

    def split(self, x: Tensor) -> Tensor:
        return rearrange(x, "... T (N K) -> ... N T K", N=self.heads)

    def keys(self, states: Tensor, distances: Tensor) -> Keys:
        """Content states (B, S, D), and the sinusoids of the distances (R, D)."""
        k = self.split(self.k(states))
        v = self.split(self.v(states))
        return Keys(k, v, self.split(self.r(distances)))

    def forward(self, x, keys, view):
        """States of one stream (B, P, D) -> their update, (B, P, D)."""
        q = self.split(self.q(x))  # (B, N, P, K)
        content = (q + self.content_bias[:, None]) @ keys.k.mT  # (B, N, P, S)
        position = (q + self.position_bias[:, None]) @ keys.r.mT  # (B, N, P, R)
        S = keys.k.size(-2)
        if view.places is None:
            position = shift(position)
        else:
            position = by_key(position, view.places, position.size(-1) - S)
        scores = content + position
        if view.same is not None:
            kinds = rearrange(self.segment_embedding, "two N K -> N K two")
            segment = (q + self.segment_bias[:, None]) @ kinds  # (B, N, P, 2)
            scores = scores + torch.where(view.same[:, None], segment[..., :1], segment[..., 1:])
        scores = scores / math.sqrt(q.size(-1))
        if view.allowed is None:
            weights = scores.softmax(-1)
        else:
            hidden = ~view.allowed[:, None]  # (B, 1, P, S)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            weights = weights.masked_fill(hidden, 0)  # also if a query may look at nothing
        y = self.dropout(weights) @ keys.v  # (B, N, P, K)
        return self.out(rearrange(y, "B N P K -> B P (N K)"))


class Block(nn.Module):
    """One layer for both streams: attention, then an MLP. The sum after each is normalised."""

    def __init__(self, config: XLNetConfig):
        super().__init__()
        self.attention = Attention(config)
        self.norm1 = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.up = nn.Linear(config.d_model, config.F)
        self.down = nn.Linear(config.F, config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def update(self, x: Tensor, keys: Keys, view: View) -> Tensor:
        """States of one stream (B, P, D) -> (B, P, D)."""
        x = self.norm1(x + self.dropout(self.attention(x, keys, view)))
        inner = self.dropout(F.gelu(self.up(x)))
        return self.norm2(x + self.dropout(self.down(inner)))

    def forward(self, h, g, memory, distances, content_view, query_view):
        """(h (B, T, D), g (B, P, D)) -> the same after this layer; g may be None.

        memory: the content states of earlier tokens that entered this layer, (B, M, D), or None.
        content_view None: h is not needed after this layer, and None is returned for it.
        """
        states = h if memory is None else torch.cat((memory, h), dim=1)  # (B, S, D)
        keys = self.attention.keys(states, distances)
        h = None if content_view is None else self.update(h, keys, content_view)
        if g is not None:
            g = self.update(g, keys, query_view)
        return h, g


# ---- memory -------------------------------------------------------------------------------------


class States(NamedTuple):
    """The states that a forward pass computes."""

    content: Tensor | None  # states of the content stream after the last layer, (B, T, D)
    query: Tensor | None  # states of the query stream after it, (B, P, D)
    inputs: list[Tensor]  # content states that entered each layer, (B, T, D)


def remember(states: States, memory: list[Tensor] | None, most: int) -> list[Tensor]:
    """The memory for the next piece of a text: (B, M, D) for each layer, without gradients.

    These are the last `most` content states that entered the layer, in this piece or in its memory.
    If `most` is the length of the text so far, then reading in pieces gives the states of reading
    at once, where no token may look at a later piece. With fewer, a layer looks back `most` tokens,
    and n layers n times as far.
    """
    if most < 1:
        raise ValueError(f"most is {most}; a memory has at least 1 token, or is None")
    inputs = states.inputs
    if memory is not None:
        inputs = [torch.cat(both, dim=1) for both in zip(memory, inputs)]
    return [x[:, -most:].detach() for x in inputs]


# ---- the model ----------------------------------------------------------------------------------


def places_of(targets: Tensor) -> Tensor:
    """The places of the targets in each row, in order: (B, T) -> (B, P), -1 after the last ones.

    P is the number in the row that has most, and at least 1.
    """
    there = targets != -100
    P = max(1, int(there.sum(1).max()))
    places = (~there).long().argsort(dim=1, stable=True)[:, :P]
    return places.where(there.gather(1, places), -1)


class XLNet(nn.Module):
    """Tokens (B, T) of int64 in [0, V), and their order -> logits (B, P, V) of those predicted."""

    unit = "token"  # what a data set is counted in
    # Tables, the head and learnt vectors: for AdamW, not for Muon.
    outer = (
        "token_embedding", "query_start", "head", "content_bias", "position_bias", "segment_bias",
        "segment_embedding",
    )  # fmt: skip
    one_in = 6  # example_batch predicts one token in so many

    def __init__(self, config: XLNetConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.query_start = nn.Parameter(torch.empty(config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = nn.Linear(config.d_model, config.vocab_size)
        self.head.weight = self.token_embedding.weight
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self):
        """Draw matrices and vectors from a normal with standard deviation 0.02; biases 0, norms 1.

        With zero_init, the matrices that write to the states start at 0.
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "norm" in name:
                nn.init.ones_(p)
            elif self.config.zero_init and name.endswith(("out.weight", "down.weight")):
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=0.02)

    def reset_buffers(self):
        """There are none: the sinusoids are computed for the lengths at hand."""

    # ---- states and predictions ----

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> (B, T, D). Raises ValueError for an id that the table does not have."""
        try:
            return self.token_embedding(tokens)
        except IndexError:  # on a CPU
            last = self.config.vocab_size - 1
            wrong = tokens[(tokens < 0) | (tokens > last)].tolist()
            problem = f"token id {wrong[0]} is not one of the model's, 0 ... {last}"
            raise ValueError(
                f"{problem}; use the tokenizer that the model was trained with"
            ) from None

    def view(
        self,
        T: int,
        M: int,
        places: Tensor | None,
        allowed: Tensor | None,
        mask: Tensor | None,
        segments: Tensor | None,
    ) -> View:
        """The View of a stream. All memory may be looked at, and belongs to segment 0.

        allowed (B, P, T): True where the order lets a query look at a token; None: everywhere.
        """
        if mask is not None:
            allowed = mask[:, None] if allowed is None else allowed & mask[:, None]
            if places is None:  # a token of padding looks at itself, so that its state is a number
                allowed = allowed | torch.eye(T, dtype=torch.bool, device=mask.device)
        if allowed is not None:
            allowed = F.pad(allowed, (M, 0), value=True)
        same = None
        if segments is not None:
            own = segments if places is None else segments.gather(1, places)
            same = own[:, :, None] == F.pad(segments, (M, 0))[:, None]
        return View(places, allowed, same)

    def streams(
        self,
        tokens: Tensor,
        order: Tensor | None = None,
        places: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        memory: list[Tensor] | None = None,
    ) -> States:
        """Run both streams, or without places the content stream alone.

        order (B, T): int64, 0 for given tokens; None: all are given. places (B, P): where queries
        are. mask (B, T): True for real tokens, or None if all are. segments (B, T): a number for
        each; equal ones mean the same segment. memory: of `remember`. With places, the content
        stream ends before the last layer, as nothing would read it afterwards. Raises ValueError
        for ids that the model does not have, and for segments if it has none.
        """
        config = self.config
        if segments is not None and not config.segments:
            raise ValueError("the model was built with segments False: leave the segments out")
        B, T = tokens.shape
        M = 0 if memory is None else memory[0].size(1)
        h = self.dropout(self.embed(tokens))
        distances = encode_distances(T, M + T, config.d_model, h.device).to(h.dtype)
        seen = None if order is None else content_mask(order)
        content_view = self.view(T, M, None, seen, mask, segments)
        g = None
        query_view = None
        if places is not None:
            query_view = self.view(T, M, places, query_mask(order, places), mask, segments)
            g = self.dropout(self.query_start.expand(B, places.size(1), -1))
        inputs = []
        for number, block in enumerate(self.blocks, 1):
            inputs.append(h)
            if places is not None and number == config.n_layer:
                content_view = None
            before = None if memory is None else memory[number - 1]
            h, g = block(h, g, before, distances, content_view, query_view)
        return States(h, g, inputs)

    def hidden(
        self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, T), all given -> content states (B, T, D) after the last layer, 0 at padding.

        Classifiers and search read them (adapt/heads.py). The loss of pretraining does not: there
        the last layer updates queries alone, and learns what suits them.
        """
        states = self.streams(tokens, mask=mask, segments=segments).content
        return states if mask is None else states * mask[..., None]

    def forward(self, tokens, order, places, mask=None, segments=None, memory=None) -> Tensor:
        """Logits (B, P, V) of the tokens at the places; the arguments are those of `streams`."""
        states = self.streams(tokens, order, places, mask, segments, memory)
        return self.head(self.dropout(states.query))

    # ---- loss ----

    def logits_of_targets(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(places of the targets in each row (B, P), logits (B, P, V) there, float32).

        A place is -1, and its logits mean nothing, where a row has fewer targets than another.
        """
        places = batch.get("places")
        if places is None:
            places = places_of(batch["targets"])
        memory = None
        if "before" in batch:
            with torch.no_grad():
                states = self.streams(batch["before"])
            memory = remember(states, None, batch["before"].size(1))
        asked = places.clamp(min=0)
        others = (batch.get("mask"), batch.get("segments"), memory)
        return places, self(batch["tokens"], batch["order"], asked, *others).float()

    def predictions(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(places of the targets in the flat batch (n,), logits (n, V) there, float32)."""
        places, logits = self.logits_of_targets(batch)
        B, T = batch["tokens"].shape
        real = places >= 0
        first = T * torch.arange(B, device=places.device)[:, None]
        return (first + places)[real], logits[real]

    def loss(self, batch: dict[str, Tensor], generators=None) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of -ln p over the targets, in nats; metrics["weight"] is their number.

        batch: "tokens" (B, T), the text; "order" (B, T), int64; "targets" (B, T), the tokens whose
        order is above 0, and -100 elsewhere; "mask" (B, T), True for real tokens, if there is
        padding; "segments" (B, T), if the model has them; "before" (B, M), if there is a memory:
        the tokens in front of the row, which are read first. "places" (B, P), if they are known:
        the places of the targets, and -1 where a row has fewer. (To count them, the CPU would wait
        for a GPU.) Nothing is drawn from the generators.
        """
        places, logits = self.logits_of_targets(batch)
        real = places >= 0
        targets = batch["targets"].gather(1, places.clamp(min=0)).where(real, -100)
        weight = real.sum()
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return total / weight.clamp(min=1), {"weight": weight}

    # ---- for the calculators ----

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch with the shapes and dtypes of real data, without padding and memory."""
        T = self.config.context_length
        tokens = torch.zeros((rows, T), dtype=torch.long)
        places = torch.arange(0, T, self.one_in)
        order = torch.zeros(T, dtype=torch.long)
        order[places] = torch.arange(1, len(places) + 1)
        batch = {
            "tokens": tokens,
            "order": order.expand(rows, T),
            "targets": tokens.where(order > 0, -100),
            "places": places.expand(rows, -1),
        }
        if self.config.segments:
            batch["segments"] = tokens
        return batch

    # ---- published layouts ----

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> XLNet:
        """Read a folder with an XLNetLMHeadModel (hub/xlnet.py)."""
        from tinyfm.hub import xlnet

        return xlnet.load(cls, XLNetConfig, folder, dtype)

    def save_pretrained(self, folder: str, tokenizer=None, overwrite: bool = False) -> None:
        """Write weights, config and tokenizer in the Hugging Face layout (hub/xlnet.py)."""
        from tinyfm.hub import xlnet

        xlnet.save(self, folder, tokenizer, overwrite)
