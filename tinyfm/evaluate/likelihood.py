"""Likelihood: how probable a language model finds given texts.

A model gives each text a probability. So it can answer questions without training, by comparing
texts:

    ln p(y | x) = sum_t ln p(y_t | x, y_<t)        of a continuation y after a context x, in nats

Multiple choice takes the most probable continuation: by the total, or, since longer continuations
are less probable, by the mean per token or per byte. Few-shot classification (Brown et al. 2020)
writes labelled examples and a query into one context and compares the labels. A model prefers some
labels whatever the query is. Contextual calibration (Zhao et al. 2021) divides this preference out:
with p_cf(l) the probabilities after queries without content, q(l) = p(l) / p_cf(l), scaled so that
they sum to 1.

A text longer than the context length is read in windows of that length. Each window scores the
`stride` tokens at its end, which no earlier window has scored. A small stride gives every token
more context, a large one is faster. A context too long for the model is cut on its left.

Context and continuation are encoded separately, and a space between them belongs to the
continuation. So all choices follow the same tokens.

Letters: B batch, T tokens, D width, V vocabulary.
Left out: a cache for the context that several continuations share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from data import files
from tinyfm.adapt.soft_prompt import prompt_ids
from tinyfm.evaluate import metrics
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

    The first window is as long as possible. Each later one scores the next `stride` ids, after as
    much context as fits. text: the number to give to the windows.
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
                totals[window.text] += log_p.double().sum().item()
                greedy[window.text] &= bool((logits.argmax(-1) == targets).all())
    return list(zip(totals, greedy))


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


def score_file(model: Any, tokenizer: Tokenizer, path: str, stride: int = 0) -> Score:
    """The sum of the scores of all texts of a file, folder or glob, each from its start.

    Raises ValueError if there is no text.
    """
    scores = score(model, tokenizer, [("", text) for text in files.documents(path)], stride)
    return Score(
        sum(s.log_likelihood for s in scores),
        sum(s.tokens for s in scores),
        sum(s.bytes for s in scores),
        all(s.greedy for s in scores),
    )


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


@dataclass(frozen=True)
class Guess:
    label: str
    probabilities: dict[str, float]  # of each label; they sum to 1
    shots: int  # number of examples in the prompt
    dropped: int  # number of examples that did not fit


def few_shot_prompt(
    tokenizer: Tokenizer, examples: Sequence[tuple[str, str]], query: str, room: int
) -> tuple[str, int]:
    """(prompt, number of its examples): the most examples, (text, label), that fit into `room`
    tokens with the query.

    The first examples are dropped, as the last ones influence the answer most.
    """
    prompt = QUERY.format(text=query)
    shots = 0
    for text, label in reversed(examples):
        longer = EXAMPLE.format(text=text, label=label) + prompt
        if len(tokenizer.encode(longer)) > room:
            break
        prompt = longer
        shots += 1
    return prompt, shots


def classify(
    model: Any,
    tokenizer: Tokenizer,
    examples: Sequence[tuple[str, str]],
    queries: Sequence[str],
    labels: Sequence[str],
    rule: Rule = "total",
    calibrate: bool = False,
) -> list[Guess]:
    """Guess the label of each query from labelled examples, (text, label), without training.

    A query that does not fit even without examples is cut on its left. calibrate: divide out the
    probabilities of the labels after the same examples and a query without content. Raises
    ValueError for fewer than two labels, equal ones, and an example with another label.
    """
    if len(set(labels)) < max(2, len(labels)):
        raise ValueError(f"labels {[*labels]}: give at least two different ones")
    unknown = {label for _, label in examples} - set(labels)
    if unknown:
        raise ValueError(f"an example has the label {min(unknown)!r}, none of {[*labels]}")

    # The prompt and the longest label share the context; the last token of a label is not read.
    words = [f" {label}" for label in labels]
    longest = max(len(tokenizer.encode(word)) for word in words)
    room = model.config.context_length - len(prompt_ids(model)) - (longest - 1)

    def label_log_p(prompts: Sequence[str]) -> Tensor:
        """Log-probabilities of the labels after each prompt, (prompts, labels)."""
        found = choose(model, tokenizer, [(prompt, words) for prompt in prompts])
        values = [[score.by(rule) for score in choice.scores] for choice in found]
        return torch.tensor(values, dtype=torch.float64).log_softmax(-1)

    prompts = [few_shot_prompt(tokenizer, examples, query, room) for query in queries]
    log_p = label_log_p([prompt for prompt, _ in prompts])
    if calibrate:
        # p_cf depends on the examples in the prompt, so it is computed once for each number.
        for shots in {shots for _, shots in prompts}:
            kept = examples[len(examples) - shots :]
            empty = [few_shot_prompt(tokenizer, kept, text, room)[0] for text in NO_CONTENT]
            same = torch.tensor([own == shots for _, own in prompts])
            # The sum over NO_CONTENT does as well as the mean: it scales all labels alike.
            log_p[same] -= label_log_p(empty).logsumexp(0)
    p = log_p.softmax(-1)

    guesses = []
    for row, (_, shots) in zip(p, prompts):
        probabilities = dict(zip(labels, row.tolist()))
        guesses.append(Guess(labels[row.argmax()], probabilities, shots, len(examples) - shots))
    return guesses
