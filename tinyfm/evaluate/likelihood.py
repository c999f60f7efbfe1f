"""Scoring: what a language model thinks of texts that are given, rather than what it writes.

A model gives every text a probability, so it can be asked without training, by comparing texts:

    ln p(y | x) = sum_t ln p(y_t | x, y_<t)        of a continuation y after a context x, in nats

Multiple choice takes the most probable continuation: by total, or, as longer ones are always less
probable, per token or per byte. Few-shot classification (Brown et al. 2020) writes labelled
examples and a query into one context and compares the labels. Such a model leans towards some
labels whatever the query; contextual calibration (Zhao et al. 2021) divides that out: with p_cf(l)
the probabilities for queries without content, q(l) = p(l) / p_cf(l), scaled to sum to 1.

A text longer than the context T is read in windows: each sees T tokens and scores those at its end
that no window before has, `stride` of them. A small stride gives every token more context, a large
one is faster. A context too long for the model is cut on its left.

Context and continuation are encoded apart, a space at the border belonging to the latter, so that
all choices follow the same tokens. Letters: B batch, T tokens, D model width, V vocabulary.
Left out: a cache of what several long continuations share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data import files
from tinyfm.adapt.soft_prompt import prompt_ids
from tinyfm.tokenizer import Tokenizer

Rule = Literal["total", "token", "byte"]


@dataclass(frozen=True)
class Score:
    """What a text is worth to a model. All sums are over the scored text, not its context."""

    log_likelihood: float  # ln p in nats, at most 0
    tokens: int
    bytes: int  # of UTF-8
    greedy: bool  # whether each token was the likeliest: temperature 0 writes this text

    @property
    def perplexity(self) -> float:
        """exp of the mean surprise of a token; depends on the tokenizer."""
        return math.exp(-self.log_likelihood / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between any two models."""
        return -self.log_likelihood / math.log(2) / self.bytes

    def by(self, rule: Rule) -> float:
        """The log-likelihood in total, or the mean of a token or of a byte."""
        return self.log_likelihood / {"total": 1, "token": self.tokens, "byte": self.bytes}[rule]


# ---- token ids ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """One forward pass: inputs of at most T ids, and the last of the ids that follow them."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]  # what comes next, of the last positions
    text: int  # which text this is a part of


def windows(
    context: list[int], ids: list[int], length: int, stride: int, text: int = 0
) -> Iterator[Window]:
    """Cut context + ids so that each of `ids` is a target once, after as much as `length` allows.

    The first window is as long as possible; each later one scores the next `stride` ids.
    """
    whole, done = context + ids, len(context)
    while done < len(whole):
        end = min(len(whole), max(done + stride, length + 1))
        start = max(0, end - length - 1)
        yield Window(tuple(whole[start : end - 1]), tuple(whole[done:end]), text)
        done = end


@torch.inference_mode()
def score_ids(
    model, pairs: Sequence[tuple[list[int], list[int]]], stride: int = 0, rows: int = 32
) -> list[tuple[float, bool]]:
    """(ln p in nats, greedy) of each pair's second ids after its first; both at least one id.

    `rows` windows go through the model at once, of similar length, padded on the right, where
    causal attention does not look; equal inputs go once. stride 0 is half the context. The model is
    put into evaluation mode. Raises ValueError for an empty context or an impossible stride.
    """
    front = tuple(prompt_ids(model))  # a soft prompt stands before all that the model reads
    length = model.config.context_length - len(front)
    if not 0 <= stride <= length:
        raise ValueError(f"stride is {stride}; it must be 0 to {length}, all that the model sees")
    if not all(context for context, _ in pairs):
        raise ValueError("a context is empty; begin a new text with the end-of-text token")
    model.eval()
    device = next(model.parameters()).device
    waiting: dict[tuple[int, ...], list[Window]] = {}
    for i, (context, ids) in enumerate(pairs):
        for window in windows(context, ids, length, stride or max(1, length // 2), i):
            waiting.setdefault(window.inputs, []).append(window)
    totals, greedy = [0.0] * len(pairs), [True] * len(pairs)
    order = sorted(waiting, key=len, reverse=True)  # the largest first: if memory ends, at once
    for first in range(0, len(order), rows):
        batch = order[first : first + rows]
        padded = [(*front, *inputs, *[0] * (len(batch[0]) - len(inputs))) for inputs in batch]
        h = model.hidden(torch.tensor(padded, device=device))[:, len(front) :]  # (B, T, D)
        for states, inputs in zip(h, batch):
            for window in waiting[inputs]:
                n = len(window.targets)
                logits = model.head(states[len(inputs) - n : len(inputs)]).float()  # (n, V)
                targets = torch.tensor(window.targets, device=device)
                own = logits.log_softmax(-1).gather(1, targets[:, None])
                totals[window.text] += own.double().sum().item()
                greedy[window.text] &= bool((logits.argmax(-1) == targets).all())
    return list(zip(totals, greedy))


# ---- texts --------------------------------------------------------------------------------------


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list, list]:
    """Ids of both; the end-of-text token is the context of a text that begins."""
    kept = context.rstrip()
    ids = tokenizer.encode(context[len(kept) :] + continuation)
    return tokenizer.encode(kept) or [tokenizer.eot], ids


def score(
    model, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], stride: int = 0, rows: int = 32
) -> list[Score]:
    """Each continuation after its context, as score_ids does it. ValueError if it is empty."""
    if not all(continuation for _, continuation in pairs):
        raise ValueError("a continuation is empty: there is nothing to score")
    ids = [encode_pair(tokenizer, *pair) for pair in pairs]
    sizes = [len(continuation.encode("utf-8", "replace")) for _, continuation in pairs]
    found = score_ids(model, ids, stride, rows)
    return [Score(ln_p, len(i), n, greedy) for (_, i), n, (ln_p, greedy) in zip(ids, sizes, found)]


def score_text(model, tokenizer: Tokenizer, text: str, stride: int = 0) -> Score:
    """A whole text from its beginning. Raises ValueError if it is empty."""
    return score(model, tokenizer, [("", text)], stride)[0]


def score_file(model, tokenizer: Tokenizer, path: str, stride: int = 0) -> Score:
    """Texts of a file, folder or glob, each from its beginning, added up. ValueError if none."""
    scores = score(model, tokenizer, [("", text) for text in files.documents(path)], stride)
    sums = [sum(getattr(s, name) for s in scores) for name in ("log_likelihood", "tokens", "bytes")]
    return Score(*sums, all(s.greedy for s in scores))


# ---- choices ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    best: int  # place of the continuation that was chosen
    scores: tuple[Score, ...]  # of all


def choose(
    model, tokenizer: Tokenizer, questions: Sequence[tuple[str, Sequence[str]]],
    rule: Rule = "total",
) -> list[Choice]:  # fmt: skip
    """The likeliest of each question's continuations after its context."""
    pairs = [(context, choice) for context, choices in questions for choice in choices]
    scores, chosen = iter(score(model, tokenizer, pairs)), []
    for _, choices in questions:
        own = tuple(next(scores) for _ in choices)
        chosen.append(Choice(max(range(len(own)), key=lambda i: own[i].by(rule)), own))
    return chosen


# ---- few-shot classification --------------------------------------------------------------------

EXAMPLE = "Text: {text}\nLabel: {label}\n\n"
QUERY = "Text: {text}\nLabel:"
NO_CONTENT = ("N/A", "[MASK]", "")  # Zhao et al. 2021, section 5


@dataclass(frozen=True)
class Guess:
    label: str
    probabilities: dict[str, float]  # of each label; they sum to 1
    shots: int  # examples that the prompt had room for
    dropped: int  # examples that it had not


def few_shot_prompt(
    tokenizer: Tokenizer, examples: Sequence[tuple[str, str]], query: str, room: int
) -> tuple[str, int]:
    """A prompt of at most `room` tokens, and how many examples, (text, label), it has room for: the
    last ones, which count most."""
    prompt, shots = QUERY.format(text=query), 0
    for text, label in reversed(examples):
        longer = EXAMPLE.format(text=text, label=label) + prompt
        if len(tokenizer.encode(longer)) > room:
            break
        prompt, shots = longer, shots + 1
    return prompt, shots


def classify(
    model, tokenizer: Tokenizer, examples: Sequence[tuple[str, str]], queries: Sequence[str],
    labels: Sequence[str], rule: Rule = "total", calibrate: bool = False,
) -> list[Guess]:  # fmt: skip
    """Guess the label of each query from labelled examples, (text, label), without training.

    A query that has no room even without examples is cut on its left. calibrate divides out what
    the model expects of a query without content after the same examples. Raises ValueError if
    there are less than two labels, or an example has another.
    """
    if len(set(labels)) < max(2, len(labels)):
        raise ValueError(f"labels {[*labels]}: give at least two different ones")
    if strange := {label for _, label in examples} - set(labels):
        raise ValueError(f"an example has the label {min(strange)!r}, none of {[*labels]}")
    words = [f" {label}" for label in labels]
    room = model.config.context_length - len(prompt_ids(model))
    room -= max(len(tokenizer.encode(word)) for word in words) - 1  # the last one is never read

    def ask(prompts: Sequence[str]) -> Tensor:
        """Log-probabilities of the labels, (prompts, labels)."""
        found = choose(model, tokenizer, [(prompt, words) for prompt in prompts])
        values = [[score.by(rule) for score in choice.scores] for choice in found]
        return torch.tensor(values, dtype=torch.float64).log_softmax(-1)

    prompts = [few_shot_prompt(tokenizer, examples, query, room) for query in queries]
    log_p = ask([prompt for prompt, _ in prompts])
    for shots in {shots for _, shots in prompts} if calibrate else ():
        kept = examples[len(examples) - shots :]
        empty = [few_shot_prompt(tokenizer, kept, text, room)[0] for text in NO_CONTENT]
        same = torch.tensor([own == shots for _, own in prompts])
        log_p[same] -= ask(empty).logsumexp(0)  # of the sum, as a mean scales all labels alike
    p = log_p.softmax(-1)
    return [
        Guess(labels[row.argmax()], dict(zip(labels, row.tolist())), shots, len(examples) - shots)
        for row, (_, shots) in zip(p, prompts)
    ]
