"""From next-token logits to text: how a language model is sampled.

A model gives logits (B, V) for the next token; a draw appends one token to each row, and the row
goes back in. Settings shape the distribution before the draw, in this order: repetition penalty,
temperature, top-k, top-p, min-p. Everything random comes from one CPU generator a row, so what row
i becomes depends neither on the other rows nor on the device.

The prompt is read once into a key/value cache; then each token costs one position's work. When a
text outgrows the context, the model sees its latest tokens only (see `visible_from`).

Letters: B batch, T tokens, V vocabulary, L layers, G key/value heads, K head width, S cache slots.
Left out: beam search, speculative decoding. compiled.py makes a CPU write faster.
"""

from __future__ import annotations

import codecs
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# ---- key/value cache ----------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens seen so far, so that a new token costs one position's work.

    Two tensors (B, G, S, K) a layer, allocated once. S is the longest length to come, or the
    attention window if that is shorter: position p then lives in slot p mod S, over the one that
    left the window. Rows of unequal length are padded on the left, `pad` (B,) tells by how much.
    """

    def __init__(self, config, length: int, pad: Tensor):
        self.slots = min(length, config.context_length, config.window or length)
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.device, self.pad = pad.device, pad if bool(pad.any()) else None
        self.length = 0  # positions seen, padding included

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, T, K) of the next T positions; return what they attend over."""
        B, G, T, K = k.shape
        if self.length == 0:
            self.layers.append((k.new_empty(B, G, self.slots, K), v.new_empty(B, G, self.slots, K)))
        past_k, past_v = self.layers[layer]
        if T > 1:
            assert self.length == 0, "a prompt goes into an empty cache"
            kept = torch.arange(max(0, T - self.slots), T, device=self.device)
            past_k[:, :, kept % self.slots] = k[:, :, kept]
            past_v[:, :, kept % self.slots] = v[:, :, kept]
            return k, v
        slot, seen = self.length % self.slots, min(self.length + 1, self.slots)
        past_k[:, :, slot], past_v[:, :, slot] = k[:, :, 0], v[:, :, 0]
        return past_k[:, :, :seen], past_v[:, :, :seen]

    def key_positions(self, T: int) -> Tensor:
        """Position of each key that `update` returns for the next T positions, (T or S,)."""
        if T > 1:
            return torch.arange(T, device=self.device)
        slot = torch.arange(min(self.length + 1, self.slots), device=self.device)
        return self.length - (self.length - slot) % self.slots


# ---- one draw -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int = 200  # stop after this many
    temperature: float = 0.8  # divides the logits; below 1 sharper, 0 = always the likeliest
    top_k: int = 0  # keep the k likeliest tokens; 0 = all
    top_p: float = 1.0  # keep the likeliest tokens that together reach this
    min_p: float = 0.0  # keep those with at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1: tokens already in the text become less likely
    stop_tokens: tuple[int, ...] = ()  # ids that end a text
    seed: int = 0  # row i draws from its own stream (seed, i)

    def __post_init__(self):
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or above"),
            "top_k": (self.top_k >= 0, "0 (off) or above"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "between 0 (off) and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0; 1 is off"),
        }
        for name, (fine, allowed) in limits.items():
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {allowed}")


def penalise_repeats(logits: Tensor, rows: list[list[int]], penalty: float) -> Tensor:
    """Make every token that its row already holds less likely (Keskar et al. 2019, section 4.1)."""
    logits = logits.clone()
    for scores, row in zip(logits, rows):
        seen = torch.tensor(sorted(set(row)), device=logits.device)
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    return logits


def filter_logits(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Set to -inf what the settings exclude from logits (B, V); the likeliest token stays."""
    if 0 < top_k < logits.size(-1):
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:  # nucleus sampling, Holtzman et al. 2020
        ordered, index = logits.sort(descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # what stands before it already reaches top_p
        logits = logits.masked_fill(beyond.scatter(1, index, beyond), -math.inf)
    if min_p > 0:  # Nguyen et al. 2024
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -math.inf)
    return logits


def choose(logits: Tensor, s: Sampling, generators: list[torch.Generator]) -> Tensor:
    """Draw one token a row, (B,), from logits (B, V); row i uses generators[i] alone.

    Raises ValueError if the largest logit of a row is infinite or not a number.
    """
    largest, likeliest = logits.max(-1)
    if not largest.isfinite().all():
        raise ValueError("the model's logits are not finite; its weights are damaged or diverged")
    if s.temperature == 0:
        return likeliest
    logits = (logits.float() - largest[:, None]) / max(s.temperature, 1e-30)  # at most 0
    logits = filter_logits(logits, s.top_k, s.top_p, s.min_p)
    total = logits.softmax(-1).cumsum(-1)  # (B, V)
    u = torch.stack([torch.rand(1, generator=g) for g in generators]).to(logits.device)  # (B, 1)
    return torch.searchsorted(total, u * total[:, -1:], right=True).squeeze(1)


# ---- one token after the other ------------------------------------------------------------------


def visible_from(n: int, context_length: int) -> int:
    """First token that a text of n tokens still shows the model: the window slides in half steps.

    A step makes all positions new, so what is cached must be computed again; sliding by half a
    context makes that rare.
    """
    hop = max(1, context_length // 2)
    return max(0, math.ceil((n - context_length) / hop)) * hop


def check_prompts(rows: list[list[int]], vocab_size: int) -> None:
    if not rows:
        raise ValueError("there is no prompt; give at least one row of token ids")
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {i} is empty; start a new text with the end-of-text token")
        if not 0 <= min(row) <= max(row) < vocab_size:
            wrong = min(row) if min(row) < 0 else max(row)
            raise ValueError(f"prompt {i} holds the id {wrong}, outside 0 to {vocab_size - 1}")


@torch.inference_mode()
def stream(model, prompts: list[list[int]], sampling: Sampling | None = None,
           use_cache: bool = True) -> Iterator[list[int | None]]:  # fmt: skip
    """Yield the next token of every row, step by step; None for a row that has met a stop token.

    Prompts may differ in length; the model is put into evaluation mode. use_cache=False reads the
    whole text anew for each token: the slow, obvious path to the same tokens. Raises ValueError as
    check_prompts and choose say.
    """
    s, context = sampling or Sampling(), model.config.context_length
    rows = [list(prompt) for prompt in prompts]
    check_prompts(rows, model.config.vocab_size)
    device = model.head.weight.device
    generators = [torch.Generator().manual_seed(s.seed * 1_000_003 + i) for i in range(len(rows))]
    alive, cache, starts = [True] * len(rows), None, []
    model.eval()
    for _ in range(s.max_new_tokens):
        now = [visible_from(len(row), context) for row in rows]
        if any(now) and not any(starts):
            warnings.warn(f"past {context} tokens the model sees the latest only", stacklevel=2)
        if cache is None or now != starts or not use_cache:
            shown, starts = [row[start:] for row, start in zip(rows, now)], now
            longest = max(map(len, shown))
            tokens = [[0] * (longest - len(row)) + row for row in shown]
            pad = torch.tensor([longest - len(row) for row in shown], device=device)
            cache = KVCache(model.config, longest + s.max_new_tokens, pad)
        else:
            tokens = [row[-1:] for row in rows]
        h = model.hidden(torch.tensor(tokens, device=device), cache)  # (B, T, D)
        logits = model.head(h[:, -1])  # (B, V)
        if s.repetition_penalty != 1:
            logits = penalise_repeats(logits, rows, s.repetition_penalty)
        step = choose(logits, s, generators).tolist()
        for i, token in enumerate(step):
            rows[i].append(token)
            alive[i] = alive[i] and token not in s.stop_tokens
        if not any(alive):
            return
        yield [token if on else None for token, on in zip(step, alive)]


def complete(model, prompts: list[list[int]], sampling: Sampling | None = None,
             use_cache: bool = True) -> list[list[int]]:  # fmt: skip
    """Continue each prompt; return the new tokens of each row, without the stop token."""
    rows: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, sampling, use_cache):
        for row, token in zip(rows, step):
            row += [token] if token is not None else []
    return rows


# ---- text ---------------------------------------------------------------------------------------


class TextStream:
    """Bytes of tokens in, printable text out, ended by a stop string.

    Held back is what may still change: an unfinished UTF-8 character, and a tail that could be the
    beginning of a stop string, which may arrive spread over several tokens. Of several stop strings
    that which is complete first counts, so the text does not depend on where tokens begin.
    """

    def __init__(self, stop_strings: Sequence[str] = ()):
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.stop_strings = [stop for stop in stop_strings if stop]
        self.held, self.stopped = "", False

    def feed(self, data: bytes, final: bool = False) -> str:
        """Text that is certain now. After a stop string, or once final, nothing more comes."""
        if self.stopped:
            return ""
        text = self.held + self.decoder.decode(data, final)
        found = [(at + len(s), at) for s in self.stop_strings if (at := text.find(s)) >= 0]
        if found or final:
            self.held, self.stopped = "", True
            return text[: min(found)[1]] if found else text
        heads = [stop[:n] for stop in self.stop_strings for n in range(1, len(stop))]
        keep = len(text) - max((len(head) for head in heads if text.endswith(head)), default=0)
        self.held = text[keep:]
        return text[:keep]


def stream_text(model, tokenizer, prompts: list[str], sampling: Sampling | None = None,
                stop_strings: Sequence[str] = (), front: Sequence[int] = ()
                ) -> Iterator[list[str]]:  # fmt: skip
    """Yield new text of every row as it becomes certain; ends when all rows have stopped.

    The end-of-text token stops a row; an empty prompt starts a new text from it. front: ids that
    stand before every prompt.
    """
    s = sampling or Sampling()
    s = replace(s, stop_tokens=(*s.stop_tokens, tokenizer.eot))
    texts = [TextStream(stop_strings) for _ in prompts]
    ids = [[*front, *(tokenizer.encode(prompt) or [tokenizer.eot])] for prompt in prompts]
    for step in stream(model, ids, s):
        yield [
            text.feed(b"" if token is None else tokenizer.token_bytes(token), token is None)
            for text, token in zip(texts, step)
        ]
        if all(text.stopped for text in texts):
            return
    yield [text.feed(b"", final=True) for text in texts]
