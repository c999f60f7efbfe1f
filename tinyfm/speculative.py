"""Speculative decoding: a cheap draft proposes tokens, and the model checks them all in one pass.

To write one token, a GPT reads all its weights from memory; to read five tokens at once takes
little longer. So a draft proposes n tokens x_1 ... x_n, and draws each x_i from its distribution
q_i. One pass of the model over them gives the model's p_1 ... p_{n+1}. Then, from the left
(Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2):

    accept x_i with probability min(1, p_i(x_i) / q_i(x_i))
    at the first refusal, draw a token from max(0, p_i - q_i), scaled to sum to 1, and stop
    if all are accepted, draw one more token from p_{n+1}

Each token then has the distribution p, whatever the draft. For a token x,

    P(x) = q(x) min(1, p(x) / q(x)) + (1 - sum_y min(p(y), q(y))) max(0, p(x) - q(x)) / Z
         = min(p(x), q(x)) + max(0, p(x) - q(x)) = p(x),

as Z = sum_y max(0, p(y) - q(y)) is the probability of a refusal. Only the speed depends on the
draft: if each token is accepted with probability a, a pass writes (1 - a^(n+1)) / (1 - a) tokens on
average (Leviathan et al. 2023, eq. 1). Two drafts:

    NgramDraft   no model: what followed the last few tokens when they occurred before in the text.
                 q gives that token probability 1. Good for code, and for texts about their prompt
                 (Saxena 2023, prompt lookup decoding)
    ModelDraft   a smaller model with the same tokens

Greedy decoding is the case in which p and q give one token probability 1: a proposed token is
accepted if it is the model's own. But a pass over several tokens adds its sums in another order
than passes over one, so that its logits differ in their last digits. Where the two largest logits
are closer than that, `read_plainly` computes them again as generate.stream does. So the text is
that of generate.stream, token by token, in float32 and float64. In half precision the last digits
are too few for that: texts may go another way where two tokens are nearly as likely.

Letters: n proposed tokens, V vocabulary.
Left out: trees of drafts, drafts from the model's own layers, several texts in one pass.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyfm import generate
from tinyfm.batching import RowCache, pack_weights
from tinyfm.generate import KVCache, Sampling, visible_from

DRAFT_TOKENS = 4  # tokens that a draft proposes for one pass
# The two largest logits are in doubt if they differ by less than this number of rounding errors.
DOUBT = 256

# ---- the rule ------------------------------------------------------------------------------------


def accept(
    proposed: list[int], p: Tensor, q: Tensor, generator: torch.Generator
) -> tuple[int, int]:
    """(number of proposed tokens that are accepted, the token that follows them).

    p (n + 1, V): the model's distributions; q (n, V): those from which the n tokens were drawn.
    """
    at = torch.tensor(proposed, dtype=torch.long, device=p.device)[:, None]
    of_model = p[:-1].gather(1, at).flatten().tolist()
    of_draft = q.gather(1, at).flatten().tolist()
    for i, (mine, its) in enumerate(zip(of_model, of_draft)):
        u = torch.rand(1, generator=generator).item()
        if u * its < mine:
            continue
        rest = (p[i] - q[i]).clamp(min=0)
        if not rest.any():  # p and q differ by rounding only
            rest = p[i]
        return i, generate.draw(rest[None], [generator]).item()
    return len(proposed), generate.draw(p[-1:], [generator]).item()


def shape_logits(
    logits: Tensor, tokens: list[int], sampling: Sampling, never: Sequence[int]
) -> Tensor:
    """Logits (n, V) that follow each of the last n tokens, as generate.stream shapes them."""
    if never:
        logits[:, list(never)] = -math.inf
    if sampling.repetition_penalty != 1:
        n = len(logits)
        rows = [tokens[: len(tokens) - n + 1 + i] for i in range(n)]
        logits = generate.penalise_repeats(logits, rows, sampling.repetition_penalty)
    return logits


# ---- reading -------------------------------------------------------------------------------------


class Reader:
    """Reads a text that grows, and whose last tokens may be taken back.

    Their keys and values in the cache are then overwritten. A context that slides is read again.
    """

    def __init__(self, model):
        self.model = model
        self.device = next(model.parameters()).device
        self.start = 0  # first token that the model sees
        self.cache = RowCache(model.config, self.device)

    def read(self, tokens: list[int], n: int) -> Tensor:
        """Logits (n, V) that follow each of the last n tokens.

        Those before the last n must be the same as in earlier calls, as far as these went.
        """
        start = visible_from(len(tokens), self.model.config.context_length)
        if start != self.start:
            self.start = start
            self.cache = RowCache(self.model.config, self.device)
        self.cache.length = min(self.cache.length, len(tokens) - start - n)
        self.cache.drop_unseen()
        unread = tokens[start + self.cache.length :]
        h = self.model.hidden(torch.tensor([unread], device=self.device), self.cache)
        return self.model.head(h[0, -n:])


def read_plainly(model, tokens: list[int], prompt_length: int) -> Tensor:
    """Logits (1, V) that follow the tokens, computed as generate.stream does, to the last digit.

    It reads the prompt at once, or what it saw when its context last slid; then token by token.
    """
    context = model.config.context_length
    start = visible_from(len(tokens), context)
    first = prompt_length
    while visible_from(first, context) < start:
        first += 1
    device = next(model.parameters()).device
    cache = KVCache(model.config, len(tokens) - start, torch.zeros(1, device=device).long())
    pieces = [tokens[start:first], *([token] for token in tokens[first:])]
    for piece in pieces:
        h = model.hidden(torch.tensor([piece], device=device), cache)
    return model.head(h[:, -1])


def find_doubt(logits: Tensor) -> int | None:
    """The first row of logits (n, V) whose two largest are so close that rounding decides."""
    if logits.dtype not in (torch.float32, torch.float64) or logits.size(1) == 1:
        return None
    first, second = logits.topk(2).values.unbind(1)  # (n,) each
    size = first.abs().clamp(min=1)
    close = first - second <= DOUBT * torch.finfo(logits.dtype).eps * size
    return int(close.float().argmax()) if close.any() else None


def packed_twin(model):
    """The same model with the same weights, and a layout for passes over a few tokens on a CPU.

    See batching.pack_weights. The layout takes as much memory as the weights.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    pack_weights(twin)
    return twin


# ---- drafts --------------------------------------------------------------------------------------


class Draft(Protocol):
    """Proposes tokens for one text."""

    def propose(
        self, tokens: list[int], n: int, sampling: Sampling, generator: torch.Generator
    ) -> tuple[list[int], Tensor]:
        """(up to n next tokens, the distributions (.., V) from which they were drawn)."""


class NgramDraft:
    """Proposes the tokens that followed the last ones when they occurred before in the text.

    The last LONGEST tokens are looked for; if they did not occur before, one token less, and so on.
    The latest place counts.
    """

    LONGEST = 3

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu"):
        self.vocab_size = vocab_size
        self.device = device

    def propose(
        self, tokens: list[int], n: int, sampling: Sampling, generator: torch.Generator
    ) -> tuple[list[int], Tensor]:
        found = find_repeat(tokens, self.LONGEST)
        proposed = tokens[found : found + n]
        at = torch.tensor(proposed, dtype=torch.long, device=self.device)
        return proposed, F.one_hot(at, self.vocab_size).float()


def find_repeat(tokens: list[int], longest: int) -> int:
    """Where the text went on after its last tokens occurred before; its length if they did not."""
    for length in range(min(longest, len(tokens) - 1), 0, -1):
        last = tokens[-length:]
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - 1] == last[-1] and tokens[end - length : end] == last:
                return end
    return len(tokens)


class ModelDraft:
    """Draws the tokens from a smaller model, with the same settings."""

    def __init__(self, model, never: Sequence[int] = ()):
        self.reader = Reader(model)
        self.never = never

    def propose(
        self, tokens: list[int], n: int, sampling: Sampling, generator: torch.Generator
    ) -> tuple[list[int], Tensor]:
        text = list(tokens)
        q = []
        for _ in range(n):
            logits = shape_logits(self.reader.read(text, 1), text, sampling, self.never)
            q.append(generate.distribution(logits, sampling))
            text.append(generate.draw(q[-1], [generator]).item())
        empty = torch.zeros(0, self.reader.model.config.vocab_size, device=self.reader.device)
        return text[len(tokens) :], torch.cat([empty, *q])


def check_draft(model, draft) -> None:
    """Raise ValueError if a draft model has other tokens than the model."""
    mine = model.config.vocab_size
    its = draft.config.vocab_size
    if mine != its:
        raise ValueError(
            f"the draft has {its} tokens, the model {mine}: a draft needs the model's tokenizer; "
            "train one with --data.tokenizer RUN, or use the draft ngram"
        )


# ---- writing -------------------------------------------------------------------------------------


@dataclass
class Counts:
    """How well the drafts did."""

    passes: int = 0  # of the model
    written: int = 0  # tokens
    proposed: int = 0  # by the drafts
    accepted: int = 0  # of those
    doubts: int = 0  # greedy tokens that rounding would have decided, computed again

    def __str__(self) -> str:
        return (
            f"{self.written} tokens in {self.passes} passes; "
            f"{self.accepted} of {self.proposed} proposed tokens were accepted"
        )


@torch.inference_mode()
def write_text(
    model,
    twin,
    draft: Draft,
    prompt: list[int],
    sampling: Sampling,
    generator: torch.Generator,
    never: Sequence[int],
    n_draft: int,
    counts: Counts,
) -> Iterator[int]:
    """Yield the tokens of one text. twin: what reads the proposed tokens, the model or its twin."""
    context = model.config.context_length
    tokens = list(prompt)
    end = len(prompt) + sampling.max_new_tokens
    reader = Reader(twin)
    while len(tokens) < end:
        start = visible_from(len(tokens), context)
        if start and not reader.start:
            warnings.warn(f"past {context} tokens the model sees only the latest", stacklevel=2)

        # Propose, but not beyond the context, which would slide, nor beyond the last token.
        room = min(n_draft, start + context - len(tokens), end - len(tokens) - 1)
        proposed, q = draft.propose(tokens, room, sampling, generator)

        # One pass over the last token and the proposed ones.
        text = tokens + proposed
        logits = shape_logits(reader.read(text, len(proposed) + 1), text, sampling, never)
        counts.passes += 1
        counts.proposed += len(proposed)

        # Where rounding would decide, only what stands before counts, and a plain reading of it.
        doubt = find_doubt(logits) if sampling.temperature == 0 else None
        if doubt is not None:
            proposed = proposed[:doubt]
            q = q[:doubt]
            text = tokens + proposed
            plain = shape_logits(read_plainly(model, text, len(prompt)), text, sampling, never)
            logits = torch.cat([logits[:doubt], plain])
            counts.doubts += 1

        # Accept a beginning of them, and draw the token after it.
        accepted, last = accept(proposed, generate.distribution(logits, sampling), q, generator)
        counts.accepted += accepted
        for token in [*proposed[:accepted], last]:
            tokens.append(token)
            if token in sampling.stop_tokens:
                return
            counts.written += 1
            yield token


def stream(
    model,
    prompts: list[list[int]],
    sampling: Sampling | None = None,
    never: Sequence[int] = (),
    draft=None,
    n_draft: int = DRAFT_TOKENS,
    pack: bool = False,
    counts: Counts | None = None,
) -> Iterator[list[int | None]]:
    """generate.stream with drafts: yield the next token of every row; None for one that stopped.

    The model reads each row alone, and each has its own random stream. draft: a smaller model; None
    means n-grams. n_draft: tokens that are proposed for one pass. pack: take as much memory again,
    for faster passes on a CPU. counts: what the rows add to. Raises ValueError as generate.stream
    and check_draft do, and for n_draft below 1.
    """
    sampling = sampling or Sampling()
    counts = counts or Counts()
    generate.check_prompts(prompts, model.config.vocab_size)
    if n_draft < 1:
        raise ValueError(f"the number of draft tokens is {n_draft}; it must be at least 1")
    if draft is not None:
        check_draft(model, draft)
        draft.eval()
    model.eval()
    twin = packed_twin(model) if pack else model
    texts = []
    for i, prompt in enumerate(prompts):
        if draft is None:
            own = NgramDraft(model.config.vocab_size, next(model.parameters()).device)
        else:
            own = ModelDraft(draft, never)
        generator = generate.row_generator(sampling.seed, i)
        texts.append(
            write_text(model, twin, own, prompt, sampling, generator, never, n_draft, counts)
        )
    for step in zip_longest(*texts):
        yield list(step)
