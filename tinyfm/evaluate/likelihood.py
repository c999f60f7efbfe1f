"""Likelihood: how probable a language model finds given texts.

A model gives each text a probability. So it can answer questions without training, by comparing
texts:

    ln p(y | x) = sum_t ln p(y_t | x, y_<t)        of a continuation y after a context x, in nats

Multiple choice takes the most probable continuation: by the total, or, since longer continuations
are less probable, by the mean per token or per byte. Few-shot classification (Brown et al. 2020)
writes labelled examples and a query into one context and compares the labels. The examples are
drawn at random for each query, the same number for each label, because the choice of examples
matters much (Zhao et al. 2021, figure 2). A model prefers some labels whatever the query is.
Contextual calibration (Zhao et al. 2021) divides this preference out: with p_cf(l) the
probabilities after queries without content, q(l) = p(l) / p_cf(l), scaled so that they sum to 1.

A text longer than the context length is read in windows of that length. Each window scores the
`stride` tokens at its end, which no earlier window has scored. A small stride gives every token
more context, a large one is faster. A context too long for the model is cut on its left.

Context and continuation are encoded separately, and a space between them belongs to the
continuation. So all choices follow the same tokens. Where many contexts have the same few endings,
the labels, a model reads each context once and keeps its keys and values (`score_endings`).

Letters: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import files
from data.report import counted
from tinyfm.adapt.soft_prompt import prompt_ids
from tinyfm.evaluate import metrics
from tinyfm.generate import KVCache
from tinyfm.tokenizer import Tokenizer

Rule = Literal["total", "token", "byte"]


@dataclass(frozen=True)
class Score:
    """The log-likelihood of a text, without its context, and the numbers to average it by."""

    log_likelihood: float  # ln p in nats, at most 0
    tokens: int
    bytes: int  # of UTF-8
    greedy: bool  # whether each token is the most likely one: temperature 0 generates this text

    @property
    def perplexity(self) -> float:
        return metrics.perplexity(self.log_likelihood, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return metrics.bits_per_byte(self.log_likelihood, self.bytes)

    def by(self, rule: Rule) -> float:
        """The log-likelihood: in total, or the mean per token or per byte."""
        if rule == "total":
            return self.log_likelihood
        if rule == "token":
            return self.log_likelihood / self.tokens
        return self.log_likelihood / self.bytes


# ---- token ids ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """One row for the model."""

    inputs: tuple[int, ...]  # at most context_length ids
    targets: tuple[int, ...]  # the ids to predict at the last len(targets) positions
    text: int  # number of the text that the window is a part of


def windows(
    context: list[int], ids: list[int], length: int, stride: int, text: int = 0
) -> Iterator[Window]:
    """Cut context + ids into windows of at most `length` inputs; each of `ids` is a target once.

    The first window is as long as possible: it scores all ids among the first length + 1 tokens of
    the whole, and at least `stride` of them. Each later one scores the next `stride` ids, or the
    rest, after as much context as fits. The inputs end one token before the last target. context:
    at least one id. text: the number to give to the windows.
    """
    whole = context + ids
    done = len(context)  # ids before this place are context, or scored
    while done < len(whole):
        end = min(len(whole), max(done + stride, length + 1))
        start = max(0, end - length - 1)
        yield Window(tuple(whole[start : end - 1]), tuple(whole[done:end]), text)
        done = end


@torch.inference_mode()
def score_ids(
    model: Any, pairs: Sequence[tuple[list[int], list[int]]], stride: int = 0, rows: int = 32
) -> list[tuple[float, bool]]:
    """(ln p in nats, greedy) of the second ids of each pair after the first; both at least one id.

    stride: 0 is half of the context. rows: windows that go through the model at once. The model is
    put into evaluation mode. Raises ValueError for an empty context or an impossible stride.
    """
    front = tuple(prompt_ids(model))  # a soft prompt stands before everything that the model reads
    length = model.config.context_length - len(front)
    if not 0 <= stride <= length:
        raise ValueError(f"stride is {stride}; it must be 0 to {length}, the model's context")
    if not all(context for context, _ in pairs):
        raise ValueError("a context is empty; start a new text with the end-of-text token")
    model.eval()
    device = next(model.parameters()).device

    # Windows with equal inputs share a row: the choices of one token after one context, say.
    stride = stride or max(1, length // 2)
    waiting: dict[tuple[int, ...], list[Window]] = {}
    for i, (context, ids) in enumerate(pairs):
        for window in windows(context, ids, length, stride, i):
            waiting.setdefault(window.inputs, []).append(window)

    # Rows of similar length go together. The longest go first: if memory runs out, then at once.
    totals = [0.0] * len(pairs)
    greedy = [True] * len(pairs)
    order = sorted(waiting, key=len, reverse=True)
    for first in range(0, len(order), rows):
        batch = order[first : first + rows]
        # Padding stands on the right, where causal attention does not look.
        longest = len(batch[0])
        padded = [front + inputs + (0,) * (longest - len(inputs)) for inputs in batch]
        h = model.hidden(torch.tensor(padded, device=device))[:, len(front) :]  # (B, T, D)
        for states, inputs in zip(h, batch):
            for window in waiting[inputs]:
                n = len(window.targets)
                logits = model.head(states[len(inputs) - n : len(inputs)]).float()  # (n, V)
                targets = torch.tensor(window.targets, device=device)  # (n,)
                log_p = logits.log_softmax(-1).gather(1, targets[:, None])  # (n, 1)
                totals[window.text] += log_p.cpu().double().sum().item()  # MPS has no float64
                greedy[window.text] &= bool((logits.argmax(-1) == targets).all())
    return list(zip(totals, greedy))


def copy_cache(cache: KVCache) -> KVCache:
    """A cache with the same keys and values, to continue with other tokens."""
    other = copy.copy(cache)
    other.layers = [(keys.clone(), values.clone()) for keys, values in cache.layers]
    return other


@torch.inference_mode()
def score_endings(
    model: Any, contexts: Sequence[list[int]], endings: Sequence[list[int]], rows: int = 32
) -> Tensor:
    """ln p, in nats, of each ending after each context: float64 (contexts, endings).

    These are the values of `score_ids` for all pairs, but each context is read once. A context that
    leaves no room for the longest ending is cut on its left. rows: contexts that go through the
    model at once. The model is put into evaluation mode. Raises ValueError for an empty context or
    ending, and if the longest ending does not fit into the model's context.
    """
    if not all(contexts) or not all(endings):
        raise ValueError("a context or an ending is empty: both need a token")
    front = prompt_ids(model)
    more = max(map(len, endings)) - 1  # tokens of an ending that the model reads
    room = model.config.context_length - len(front) - more
    if room < 1:
        raise ValueError(
            f"the longest ending has {counted(more + 1, 'tokens')}, the model's context only "
            f"{model.config.context_length}: use shorter labels"
        )
    model.eval()
    device = next(model.parameters()).device
    cut = [front + ids[-room:] for ids in contexts]
    order = sorted(range(len(cut)), key=lambda i: len(cut[i]), reverse=True)
    scores = torch.zeros(len(contexts), len(endings), dtype=torch.float64)

    def log_p(state: Tensor, targets: int | list[int]) -> Tensor:
        """ln p of the targets after states (B, D): float64 (B,) or (B, targets), on the CPU."""
        logits = model.head(state).float()
        return logits.log_softmax(-1)[:, targets].cpu().double()

    for first in range(0, len(order), rows):
        # Read the contexts, padded on the left.
        batch = order[first : first + rows]
        T = len(cut[batch[0]])
        pad = torch.tensor([T - len(cut[i]) for i in batch], device=device)  # (B,)
        tokens = torch.tensor([[0] * (T - len(cut[i])) + cut[i] for i in batch], device=device)
        cache = KVCache(model.config, T + more, pad)
        state = model.hidden(tokens, cache)[:, -1]  # (B, D)
        starts = log_p(state, [ending[0] for ending in endings])  # (B, endings)

        # Continue with each ending.
        for j, ending in enumerate(endings):
            total = starts[:, j]  # (B,)
            own = copy_cache(cache)
            for token, target in pairwise(ending):
                state = model.hidden(torch.full_like(tokens[:, :1], token), own)[:, -1]
                total = total + log_p(state, target)
            scores[batch, j] = total
    return scores


# ---- texts --------------------------------------------------------------------------------------


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Ids of both. The context of a text that stands alone is the end-of-text token."""
    kept = context.rstrip()
    space = context[len(kept) :]
    return tokenizer.encode(kept) or [tokenizer.eot], tokenizer.encode(space + continuation)


def score(
    model: Any,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    stride: int = 0,
    rows: int = 32,
) -> list[Score]:
    """The score of each continuation after its context; stride and rows as in score_ids.

    pairs: (context, continuation). Raises ValueError for an empty continuation.
    """
    if not all(continuation for _, continuation in pairs):
        raise ValueError("a continuation is empty: there is nothing to score")
    id_pairs = [encode_pair(tokenizer, *pair) for pair in pairs]
    found = score_ids(model, id_pairs, stride, rows)
    scores = []
    for (_, continuation), (_, ids), (log_p, greedy) in zip(pairs, id_pairs, found):
        size = len(continuation.encode("utf-8", "replace"))
        scores.append(Score(log_p, len(ids), size, greedy))
    return scores


def score_text(model: Any, tokenizer: Tokenizer, text: str, stride: int = 0) -> Score:
    """The score of a whole text, from its start. Raises ValueError if it is empty."""
    return score(model, tokenizer, [("", text)], stride)[0]


def score_files(model: Any, tokenizer: Tokenizer, path: str, stride: int = 0) -> list[Score]:
    """The score of each text of a file, folder or glob, from its start.

    Raises ValueError if there is no text.
    """
    return score(model, tokenizer, [("", text) for text in files.documents(path)], stride)


@torch.inference_mode()
def score_targets(model: Any, batches: Iterable[dict[str, Tensor]]) -> np.ndarray:
    """-ln p in nats of each target of a model's batches, in order: float64 (n,).

    A target is a token after the first of batch["tokens"] (B, T + 1); those where batch["mask"]
    (B, T) is False are left out.
    """
    device = next(model.parameters()).device
    found = []
    for batch in batches:
        tokens = batch["tokens"].to(device)
        logits = model(tokens[:, :-1]).float().flatten(0, 1)  # (B T, V)
        nats = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
        found.append(nats.cpu()[batch["mask"].flatten()])
    return torch.cat(found).double().numpy()


# ---- multiple choice ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    best: int  # place of the chosen continuation
    scores: tuple[Score, ...]  # of all continuations


def choose(
    model: Any,
    tokenizer: Tokenizer,
    questions: Sequence[tuple[str, Sequence[str]]],
    rule: Rule = "total",
) -> list[Choice]:
    """Choose the most probable continuation of each question, (context, continuations)."""
    pairs = [(context, choice) for context, choices in questions for choice in choices]
    scores = iter(score(model, tokenizer, pairs))
    chosen = []
    for _, choices in questions:
        own = tuple(next(scores) for _ in choices)
        best = max(range(len(own)), key=lambda i: own[i].by(rule))
        chosen.append(Choice(best, own))
    return chosen


# ---- few-shot classification --------------------------------------------------------------------

EXAMPLE = "Text: {text}\nLabel: {label}\n\n"
QUERY = "Text: {text}\nLabel:"
NO_CONTENT = ("N/A", "[MASK]", "")  # Zhao et al. 2021, section 5

Example = tuple[str, str]  # text, label


@dataclass(frozen=True)
class Guess:
    label: str
    probabilities: dict[str, float]  # of each label; they sum to 1
    shots: int  # number of examples in the prompt


def draw_examples(pool: Sequence[Example], shots: int, rng: np.random.Generator) -> list[Example]:
    """`shots` examples of the pool, each once, in random order: as many of one label as of another.

    Where `shots` is no multiple of the number of labels, some labels, drawn at random, have one
    more. A label that runs out has fewer.
    """
    piles: dict[str, list[Example]] = {}  # label -> its examples
    for example in pool:
        piles.setdefault(example[1], []).append(example)
    shuffled = []
    for i in rng.permutation(len(piles)):
        pile = [*piles.values()][i]
        shuffled.append([pile[j] for j in rng.permutation(len(pile))[:shots]])
    # Take one of each pile, then a second one, and so on.
    drawn = [example for layer in zip_longest(*shuffled) for example in layer if example]
    return [drawn[j] for j in rng.permutation(min(shots, len(drawn)))]


def few_shot_prompt(
    tokenizer: Tokenizer, examples: Sequence[Example], query: str, room: int
) -> tuple[str, list[Example]]:
    """(prompt, its examples): those of the examples that fit into `room` tokens with the query.

    The last example is tried first. One that does not fit is left out, and the next is tried.
    """
    prompt = QUERY.format(text=query)
    kept: list[Example] = []
    for text, label in reversed(examples):
        longer = EXAMPLE.format(text=text, label=label) + prompt
        if len(tokenizer.encode(longer)) <= room:
            prompt = longer
            kept.insert(0, (text, label))
    return prompt, kept


def classify(
    model: Any,
    tokenizer: Tokenizer,
    pool: Sequence[Example],
    queries: Sequence[str],
    labels: Sequence[str],
    shots: int = 0,
    seed: int = 0,
    rule: Rule = "total",
    calibrate: bool = False,
) -> list[Guess]:
    """Guess the label of each query without training, after `shots` examples of the pool.

    They are drawn for each query, by the seed and the number of the query, and as many are used as
    the context holds. A query that does not fit even alone is cut on its left. calibrate: divide
    out the probabilities of the labels after the same examples and a query without content. Raises
    ValueError for fewer than two labels, equal ones, an example with another label, and shots
    without a pool.
    """
    if len(set(labels)) < max(2, len(labels)):
        raise ValueError(f"labels {[*labels]}: give at least two different ones")
    unknown = {label for _, label in pool} - set(labels)
    if unknown:
        raise ValueError(f"an example has the label {min(unknown)!r}, none of {[*labels]}")
    if shots < 0 or (shots and not pool):
        raise ValueError(f"{shots} shots from {len(pool)} examples: give examples, and 0 or more")

    # The prompt and the longest label share the context; the last token of a label is not read.
    words = [f" {label}" for label in labels]
    endings = [tokenizer.encode(word) for word in words]
    room = model.config.context_length - len(prompt_ids(model)) - (max(map(len, endings)) - 1)
    sizes = {
        "total": [1] * len(words),
        "token": [len(ids) for ids in endings],
        "byte": [len(word.encode("utf-8", "replace")) for word in words],
    }

    def label_log_p(prompts: Sequence[str]) -> Tensor:
        """Log-probabilities of the labels after each prompt, (prompts, labels)."""
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        found = score_endings(model, tokenizer.encode_batch([*place]), endings)
        values = found / torch.tensor(sizes[rule], dtype=torch.float64)
        return values.log_softmax(-1)[[place[prompt] for prompt in prompts]]

    prompts = []
    kept = []  # the examples of each prompt
    for i, query in enumerate(queries):
        drawn = draw_examples(pool, shots, np.random.default_rng((seed, i))) if shots else []
        prompt, own = few_shot_prompt(tokenizer, drawn, query, room)
        prompts.append(prompt)
        kept.append(own)
    log_p = label_log_p(prompts)
    if calibrate:
        empty = [
            few_shot_prompt(tokenizer, own, text, room)[0] for own in kept for text in NO_CONTENT
        ]
        p_cf = label_log_p(empty).unflatten(0, (len(queries), len(NO_CONTENT)))
        # The sum over NO_CONTENT does as well as the mean: it scales all labels alike.
        log_p = log_p - p_cf.logsumexp(1)
    guesses = []
    for row, own in zip(log_p.softmax(-1), kept):
        probabilities = dict(zip(labels, row.tolist()))
        guesses.append(Guess(labels[row.argmax()], probabilities, len(own)))
    return guesses
