"""Beam search: the likeliest text, looked for along several paths at a time.

Greedy decoding takes the likeliest token at each place. But the likeliest text

    argmax_y  sum_t ln p(y_t | y_1 ... y_{t-1})

may begin with a token that is not, and V^T texts are too many to try. Beam search keeps the best
few, its beams. At each step it continues each of them by each of the V tokens, and of these texts
it again keeps the best. With one beam it is greedy; with V^T it tries all.

A text is a candidate for the answer once it has ended. Each token makes the sum smaller, so short
texts would win. So the candidates are compared by

    score(y) = sum_t ln p(y_t | y_1 ... y_{t-1}) / |y|^a

where |y| counts the tokens with the end token, and a, the length penalty, is 1 for the mean.
(Wu et al. 2016, eq. 14, divide by ((5 + |y|) / 6)^a.) A row has finished when as many texts as
beams have ended, and its best beam would not score better than the worst of these at its length.
That is transformers' default; a larger `a` might still make a longer text the best.

A wide beam does not always write better: what a model thinks likeliest can be empty or repeat
itself (Stahlberg and Byrne 2019, Holtzman et al. 2020). It serves where the source determines the
text, as in translation.

Letters: B rows, n beams of all rows together, V vocabulary.
Left out: sampling among the beams, groups of beams.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tinyfm.generate import KVCache, check_prompts

MOST_BEAMS = 1024  # each keeps the keys and values of a text; more would only fill the memory


@dataclass(frozen=True)
class Beams:
    width: int = 4  # number of beams of each row
    length_penalty: float = 1.0  # exponent of the length by which a text's ln p is divided
    max_new_tokens: int = 200  # largest number of tokens to generate
    stop_tokens: tuple[int, ...] = ()  # ids that end a text

    def __post_init__(self):
        for name in ("width", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.width > MOST_BEAMS:
            raise ValueError(f"{self.width} beams are too many: use at most {MOST_BEAMS}")
        if not abs(self.length_penalty) <= 20:
            raise ValueError(f"length_penalty is {self.length_penalty}; use -20 to 20, 0 for none")


class Row:
    """The beams of one row, best first, and the best texts that have ended."""

    def __init__(self, beams: Beams):
        self.beams = beams
        self.texts: list[list[int]] = [[]]
        self.sums = [0.0]  # of ln p, for each text
        self.length = 0
        self.ended: list[tuple[float, list[int]]] = []  # (score, text), best first

    def advance(self, log_p: Tensor) -> list[tuple[int, int]]:
        """Go on by one token. log_p (beams, V): ln p of each token after each beam, -inf for one
        that no text may have.

        Returns (index of the beam that it continues, token) for each new beam; none at the end.
        """
        width = self.beams.width
        stops = self.beams.stop_tokens
        V = log_p.size(1)
        self.length += 1
        last = self.length == self.beams.max_new_tokens

        # The best texts of one more token. Each beam has one text for each stop token, so of this
        # many at least `width` go on.
        sums = (torch.tensor(self.sums, device=log_p.device)[:, None] + log_p).flatten()
        best = sums.topk(min(max(2, 1 + len(stops)) * width, len(sums)))
        going = []
        for rank, (total, i) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            beam, token = divmod(i, V)
            if total == -math.inf:
                break
            if token in stops or last:
                if rank < width:
                    text = self.texts[beam] + [token] * (token not in stops)
                    self.ended.append((total / self.length**self.beams.length_penalty, text))
            elif len(going) < width:
                going.append((total, beam, token))
        self.ended.sort(key=lambda pair: -pair[0])
        self.ended = self.ended[:width]

        self.texts = [self.texts[beam] + [token] for _, beam, token in going]
        self.sums = [total for total, _, _ in going]
        if len(self.ended) == width and going:
            reachable = self.sums[0] / self.length**self.beams.length_penalty
            if reachable <= self.ended[-1][0]:
                return []
        return [(beam, token) for _, beam, token in going]


@torch.inference_mode()
def beam_search(
    logits: Tensor,
    step: Callable[[Tensor, Tensor], Tensor],
    beams: Beams,
    never: Sequence[int] = (),
) -> list[list[int]]:
    """The best text of each row: token ids, without the stop token.

    logits (B, V): of the first token of each row. step(parents, tokens) -> logits (n, V) of the
    token after each of n texts: text i is text parents[i] of the last call, and then tokens[i].
    never: ids that no text may have. Raises ValueError for logits that are not finite.
    """
    rows = [Row(beams) for _ in logits]
    running = rows
    while True:
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite; its weights are damaged")
        log_p = logits.float().log_softmax(-1)  # (n, V)
        log_p[:, list(never)] = -math.inf
        parents = []
        tokens = []
        going_on = []
        first = 0  # the row's first text
        for row in running:
            n = len(row.texts)
            new = row.advance(log_p[first : first + n])
            parents += [first + beam for beam, _ in new]
            tokens += [token for _, token in new]
            first += n
            if new:
                going_on.append(row)
        if not going_on:
            return [row.ended[0][1] if row.ended else [] for row in rows]
        running = going_on
        device = logits.device
        logits = step(torch.tensor(parents, device=device), torch.tensor(tokens, device=device))


@torch.inference_mode()
def complete(
    model, prompts: list[list[int]], beams: Beams | None = None, never: Sequence[int] = ()
) -> list[list[int]]:
    """Continue each prompt of a GPT; return the new tokens of each row, without the stop token.

    Prompts may differ in length; they are read once, and cached. A text ends at the latest where
    the context does. Raises ValueError as check_prompts does, and for a prompt that fills it.
    """
    beams = beams or Beams()
    check_prompts(prompts, model.config.vocab_size)
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    room = model.config.context_length - longest
    if room < 1:
        problem = f"a prompt has {longest} tokens, and the context {model.config.context_length}"
        raise ValueError(f"{problem}; shorten it, or do without beams: --beams 1")
    beams = replace(beams, max_new_tokens=min(beams.max_new_tokens, room))
    pad = torch.tensor([longest - len(row) for row in prompts], device=device)
    cache = KVCache(model.config, longest + beams.max_new_tokens, pad)
    model.eval()

    def read(tokens: Tensor) -> Tensor:
        return model.head(model.hidden(tokens, cache)[:, -1])

    def step(parents: Tensor, tokens: Tensor) -> Tensor:
        cache.select(parents)
        return read(tokens[:, None])

    padded = [[0] * (longest - len(row)) + row for row in prompts]
    return beam_search(read(torch.tensor(padded, device=device)), step, beams, never)
