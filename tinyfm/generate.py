"""From next-token logits to text: sampling from a language model.

A model gives logits (B, V) for the next token. One token per row is drawn from them and appended to
its row, and the longer rows go back into the model. The settings (`Sampling`) shape the
distribution before the draw, in this order: repetition penalty, temperature, top-k, top-p, min-p.
All randomness comes from one CPU generator per row, so row i depends neither on the other rows nor
on the device.

The obvious way reads the whole text again for each token. Here a prompt is read once, its keys and
values are kept in a cache, and then each token costs the work of one position. When a text outgrows
the context, the model sees only its latest tokens (see `visible_from`).

Letters: B batch, T tokens, V vocabulary, D model width, G key/value heads, K head width, S slots of
the cache.
Nearby: beam.py searches for the likeliest text; compiled.py makes generation on a CPU faster; in
batching.py texts join and leave a batch between two tokens; speculative.py writes several tokens
in one pass.
"""

from __future__ import annotations

import codecs
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int = 200  # largest number of tokens to generate
    temperature: float = 0.8  # divisor of the logits; below 1 sharper, 0 = always the likeliest
    top_k: int = 0  # keep the k likeliest tokens; 0 = all
    top_p: float = 1.0  # keep the fewest likeliest tokens whose probabilities sum to this; 1 = all
    min_p: float = 0.0  # keep tokens with at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # penalty on tokens that are in the text already; 1 = none
    stop_tokens: tuple[int, ...] = ()  # ids that end a text
    seed: int = 0  # seed of the random streams, one per text

    def __post_init__(self):
        rules = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "0 (off) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (off) and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 is off"),
            ("seed", abs(self.seed) < 2**40, "below 2**40"),
        ]
        for name, valid, rule in rules:
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {rule}")


# ---- one draw -----------------------------------------------------------------------------------


def penalise_repeats(logits: Tensor, rows: list[list[int]], penalty: float) -> Tensor:
    """Make all tokens that are in rows[i] less likely in logits[i] (Keskar et al. 2019, 4.1).

    Logits (B, V) above 0 are divided by the penalty, others multiplied by it. A token counts once,
    however often it occurs. The given logits are not changed.
    """
    logits = logits.clone()
    for scores, row in zip(logits, rows):
        seen = torch.tensor(sorted(set(row)), device=logits.device)
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    return logits


# Each filter sets the logits (B, V) of the tokens that it excludes to -inf, so that they have
# probability 0. The likeliest token is never excluded.


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k likeliest tokens of each row, and those as likely as the last of them."""
    smallest = logits.topk(k).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest, -math.inf)


def keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Keep the fewest likeliest tokens of each row whose probabilities sum to at least top_p.

    In order of probability, a token is kept if those before it sum to less than top_p (Holtzman et
    al. 2020). The token that crosses top_p is thus kept. Others become -inf.
    """
    ordered, index = logits.sort(descending=True)
    p = ordered.softmax(-1)
    excluded = p.cumsum(-1) - p >= top_p  # likelier tokens already sum to top_p
    return logits.masked_fill(excluded.scatter(1, index, excluded), -math.inf)


def keep_min_p(logits: Tensor, share: float) -> Tensor:
    """Keep the tokens with at least this share of the probability of their row's likeliest one
    (Nguyen et al. 2024). The others become -inf."""
    p = logits.softmax(-1)
    return logits.masked_fill(p < share * p.amax(-1, keepdim=True), -math.inf)


def filter_logits(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Apply the filters that are on to logits (B, V), in this order; see Sampling."""
    if 0 < top_k < logits.size(-1):
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_nucleus(logits, top_p)
    if min_p > 0:
        logits = keep_min_p(logits, min_p)
    return logits


def find_likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(the largest logit, its token) of each row, (B,) each, from logits (B, V).

    Raises ValueError if the largest logit of a row is infinite or not a number.
    """
    largest, likeliest = logits.max(-1)
    if not largest.isfinite().all():
        raise ValueError("the model's logits are not finite; its weights are damaged or diverged")
    return largest, likeliest


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities (B, V) of the next token, from its logits (B, V).

    p = softmax(logits / temperature), filtered. Temperature 0 gives the likeliest token
    probability 1. Raises ValueError as `find_likeliest` does.
    """
    largest, likeliest = find_likeliest(logits)
    if sampling.temperature == 0:
        return F.one_hot(likeliest, logits.size(-1)).float()
    logits = logits.float() - largest[:, None]  # at most 0
    logits = logits / max(sampling.temperature, 1e-30)
    return filter_logits(logits, sampling.top_k, sampling.top_p, sampling.min_p).softmax(-1)


def draw(p: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Draw one token per row, (B,), in proportion to p (B, V), by inverse transform sampling.

    It is the first token whose cumulative probability exceeds u, a number from
    torch.rand(1, generator=generators[i]).
    """
    total = p.cumsum(-1)  # (B, V)
    u = torch.stack([torch.rand(1, generator=g) for g in generators]).to(p.device)  # (B, 1)
    return torch.searchsorted(total, u * total[:, -1:], right=True).squeeze(1)


def choose(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """Draw one token per row, (B,), from logits (B, V); row i uses only generators[i].

    Temperature 0 takes the likeliest token. Raises ValueError as `find_likeliest` does.
    """
    if sampling.temperature == 0:
        return find_likeliest(logits)[1]
    return draw(distribution(logits, sampling), generators)


# ---- key/value cache ----------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens seen so far, so that a new token costs one position's work.

    Each layer has two tensors (B, G, S, K), allocated once. S is the final length of the text, or
    the attention window if that is shorter: position p is then stored in slot p mod S, in place of
    a position that has left the window. Rows of unequal length are padded on the left; pad (B,) is
    the number of padding tokens in each row.
    """

    one_by_one = False  # all rows attend at once

    def __init__(self, config, length: int, pad: Tensor):
        self.slots = min(length, config.context_length, config.window or length)
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.device = pad.device
        self.pad = pad if bool(pad.any()) else None  # None lets attention run without a mask
        self.length = 0  # positions seen, padding included

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, T, K) of the next T positions; return the keys and values to attend to.

        Those are (B, G, T, K) for a prompt, which goes into an empty cache. For one later token
        they are the filled slots, (B, G, up to S, K).
        """
        B, G, T, K = k.shape
        if self.length == 0:
            keys = k.new_empty(B, G, self.slots, K)
            values = v.new_empty(B, G, self.slots, K)
            self.layers.append((keys, values))
        past_k, past_v = self.layers[layer]
        if T > 1:
            assert self.length == 0, "a prompt goes into an empty cache"
            kept = torch.arange(max(0, T - self.slots), T, device=self.device)
            past_k[:, :, kept % self.slots] = k[:, :, kept]
            past_v[:, :, kept % self.slots] = v[:, :, kept]
            return k, v
        slot = self.length % self.slots
        filled = min(self.length + 1, self.slots)
        past_k[:, :, slot] = k[:, :, 0]
        past_v[:, :, slot] = v[:, :, 0]
        return past_k[:, :, :filled], past_v[:, :, :filled]

    def attend(self, attend, layer: int, q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
        """attend(q, keys, values, mask) over what `update` returns for k, v: (B, N, T, K)."""
        return attend(q, *self.update(layer, k, v), mask)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the batch: indices (B',), which may repeat or leave out some."""
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]
        if self.pad is not None:
            self.pad = self.pad[rows]

    def key_positions(self, T: int) -> Tensor:
        """Position of each key that `update` returns for the next T positions, (T or up to S,)."""
        if T > 1:
            return torch.arange(T, device=self.device)
        slot = torch.arange(min(self.length + 1, self.slots), device=self.device)
        return self.length - (self.length - slot) % self.slots


# ---- many tokens --------------------------------------------------------------------------------


def visible_from(n: int, context_length: int) -> int:
    """Index of the first token that the model sees of a text of n tokens.

    0 while the text fits into the context. Then the context slides forward in steps of half its
    length (rounded down, at least 1), only as far as needed. Each step changes the position of
    every token, so the cache must be computed again; long steps make that rare.
    """
    step = max(1, context_length // 2)
    return max(0, math.ceil((n - context_length) / step)) * step


def check_prompts(rows: list[list[int]], vocab_size: int) -> None:
    """Raise ValueError if there is no prompt, an empty one, or an id outside the vocabulary."""
    if not rows:
        raise ValueError("there is no prompt; give at least one row of token ids")
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {i} is empty; start a new text with the end-of-text token")
        for token in (min(row), max(row)):
            if not 0 <= token < vocab_size:
                problem = f"prompt {i} holds the id {token}, outside 0 to {vocab_size - 1}"
                raise ValueError(f"{problem}; use the tokenizer that the model was trained with")


def row_generator(seed: int, index: int) -> torch.Generator:
    """The random stream of text number `index`."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


@torch.inference_mode()
def stream(
    model,
    prompts: list[list[int]],
    sampling: Sampling | None = None,
    use_cache: bool = True,
    never: Sequence[int] = (),
    generators: list[torch.Generator] | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every row, step by step; None for a row that has met a stop token.

    Prompts may differ in length. The model is put into evaluation mode. use_cache=False reads the
    whole text again for each token: the slow, obvious way to the same tokens. never: ids that are
    not drawn, such as those without a token (`Tokenizer.without_token`). generators: one for each
    row, in place of those that sampling.seed gives. Raises ValueError as check_prompts and choose
    do.
    """
    sampling = sampling or Sampling()
    context = model.config.context_length
    device = next(model.parameters()).device
    rows = [list(prompt) for prompt in prompts]
    check_prompts(rows, model.config.vocab_size)
    if generators is None:
        generators = [row_generator(sampling.seed, i) for i in range(len(rows))]
    running = [True] * len(rows)
    cache = None
    starts: list[int] = []  # first token of each row that is in the cache
    model.eval()
    for _ in range(sampling.max_new_tokens):
        # Tokens to read: the latest one if the rest is cached, else all that fit into the context.
        new_starts = [visible_from(len(row), context) for row in rows]
        if any(new_starts) and not any(starts):
            warnings.warn(f"past {context} tokens the model sees only the latest", stacklevel=2)
        if cache is None or new_starts != starts or not use_cache:
            starts = new_starts
            visible = [row[start:] for row, start in zip(rows, starts)]
            longest = max(map(len, visible))
            tokens = [[0] * (longest - len(row)) + row for row in visible]
            pad = torch.tensor([longest - len(row) for row in visible], device=device)
            cache = KVCache(model.config, longest + sampling.max_new_tokens, pad)
        else:
            tokens = [row[-1:] for row in rows]

        # One draw per row.
        h = model.hidden(torch.tensor(tokens, device=device), cache)  # (B, T, D)
        logits = model.head(h[:, -1])  # (B, V)
        if never:
            logits[:, list(never)] = -math.inf
        if sampling.repetition_penalty != 1:
            logits = penalise_repeats(logits, rows, sampling.repetition_penalty)
        drawn = choose(logits, sampling, generators).tolist()

        # Rows that have stopped grow on, unseen, until all have stopped.
        for i, token in enumerate(drawn):
            rows[i].append(token)
            running[i] = running[i] and token not in sampling.stop_tokens
        if not any(running):
            return
        yield [token if runs else None for token, runs in zip(drawn, running)]


def complete(
    model,
    prompts: list[list[int]],
    sampling: Sampling | None = None,
    use_cache: bool = True,
    never: Sequence[int] = (),
) -> list[list[int]]:
    """Continue each prompt; return the new tokens of each row, without the stop token."""
    rows: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, sampling, use_cache, never):
        for row, token in zip(rows, step):
            if token is not None:
                row.append(token)
    return rows


# ---- text ---------------------------------------------------------------------------------------


class StopString:
    """Finds a string in a text that is read character by character (Knuth, Morris and Pratt 1977).

    matched: length of the longest end of the text so far that is a start of the string. After a
    character that does not continue it, the next shorter such end is tried, from a table. So a text
    costs time in proportion to its length, whatever the length of the string.
    """

    def __init__(self, text: str):
        self.text = text
        self.matched = 0
        # shorter[n]: length of the longest start of the string that is also an end of its first n
        # characters, and shorter than these.
        self.shorter = [0, 0]
        for char in text[1:]:
            n = self.shorter[-1]
            while n and text[n] != char:
                n = self.shorter[n]
            self.shorter.append(n + (text[n] == char))

    def read(self, char: str) -> bool:
        """Read one more character; returns whether the text now ends with the string."""
        n = self.matched
        while n and self.text[n] != char:
            n = self.shorter[n]
        self.matched = n + (self.text[n] == char)
        return self.matched == len(self.text)


class TextStream:
    """Turns the bytes of tokens into text that can be printed at once, up to a stop string.

    It holds back text that may still change: an unfinished UTF-8 character, and an end that could
    be the start of a stop string, which may be spread over several tokens. If there are several
    stop strings, the one that is complete first counts, so the text does not depend on where the
    tokens are cut.
    """

    def __init__(self, stop_strings: Sequence[str] = ()):
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.stops = [StopString(stop) for stop in stop_strings if stop]
        self.held = ""
        self.stopped = False

    def feed(self, data: bytes, final: bool = False) -> str:
        """Return the text that is now certain.

        A stop string ends the stream, and so does `final`; later calls return an empty string.
        """
        if self.stopped:
            return ""
        new = self.decoder.decode(data, final)
        text = self.held + new

        # A stop string ends the text before it.
        for end, char in enumerate(new, len(self.held) + 1):
            found = [len(stop.text) for stop in self.stops if stop.read(char)]
            if found:
                self.held = ""
                self.stopped = True
                return text[: end - max(found)]
        if final:
            self.held = ""
            self.stopped = True
            return text

        # Hold back the longest end of the text that is the start of a stop string.
        certain = len(text) - max((stop.matched for stop in self.stops), default=0)
        self.held = text[certain:]
        return text[:certain]


def stream_text(
    model,
    tokenizer,
    prompts: list[str],
    sampling: Sampling | None = None,
    stop_strings: Sequence[str] = (),
    front: Sequence[int] = (),
    write: Callable[..., Iterator[list[int | None]]] = stream,
) -> Iterator[list[str]]:
    """Yield the new text of every row as soon as it is certain, until all rows have stopped.

    The end-of-text token stops a row; an empty prompt starts a new text from it. front: ids to put
    before every prompt. write: what yields the tokens, `stream` or speculative.py's.
    """
    sampling = sampling or Sampling()
    sampling = replace(sampling, stop_tokens=(*sampling.stop_tokens, tokenizer.eot))
    texts = [TextStream(stop_strings) for _ in prompts]
    ids = []
    for prompt in prompts:
        ids.append([*front, *(tokenizer.encode(prompt) or [tokenizer.eot])])
    never = tokenizer.without_token(model.config.vocab_size)
    for step in write(model, ids, sampling, never=never):
        pieces = []
        for text, token in zip(texts, step):
            if token is None:
                pieces.append(text.feed(b"", final=True))
            else:
                pieces.append(text.feed(tokenizer.token_bytes(token)))
        yield pieces
        if all(text.stopped for text in texts):
            return
    yield [text.feed(b"", final=True) for text in texts]
