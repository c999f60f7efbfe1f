"""Heads: classification on top of a model that was pretrained for something else.

Pretraining names no classes, yet the states of a pretrained model (the body) distinguish many
things. A `Reader`, which the recipe of each family supplies, turns an example into one vector of
D features. They are normalised to mean 0 and standard deviation 256 / D, which gives x (D,). So one
learning rate suits all bodies: AdamW moves every weight equally far, whatever D is, and a logit
adds up D of these steps. Each question has a linear head:

    p(class | example) = softmax(W x + b),       loss = mean over heads of -ln p(label)

In training the label has the target probability 0.9, and all classes share the rest (label
smoothing, Szegedy et al. 2016). Without it, W grows on a few examples that are soon fitted: the
classifier becomes confident about them, and no better on others.

With a frozen body this is a linear probe (Alain & Bengio 2017): it measures what the frozen
features encode. If the body is trained too, it is fine-tuning. W and b start at zero: all classes
are equally likely at first, and the data determine the first steps.

The features of a picture are means over the places of a coarse grid, because position matters: R
differs from P in one place.

Letters: B batch, T tokens, D width of the features, M heads, C channels, H W rows and columns.
Left out: regression, several labels for one question, features of several layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

WIDTH = 256  # with this many features, they have a standard deviation of 1
SMOOTHING = 0.1  # probability that the label shares with all classes, in training

Batch = dict[str, Tensor]


# ---- features -----------------------------------------------------------------------------------


class Reader(NamedTuple):
    """How to read features from the body of a family."""

    read: Callable[[nn.Module, Batch], Tensor]  # (body, batch) -> (B, D)
    inputs: tuple[str, ...]  # the fields of a batch that it needs
    width: Callable[[Any], int]  # D, from the body's config
    unread: tuple[str, ...]  # modules and parameters of the body that features do not depend on


def in_places(x: Tensor, grid: int) -> Tensor:
    """Means over a grid of places: (B, C, H, W) -> (B, C * places); at most grid x grid places."""
    size = (min(grid, x.size(2)), min(grid, x.size(3)))
    return F.adaptive_avg_pool2d(x, size).flatten(1)


def count_places(rows: int, grid: int) -> int:
    """The number of places that `in_places` makes of a square of `rows` rows."""
    return min(grid, rows) ** 2


def normalise(x: Tensor) -> Tensor:
    """Features (B, D) with mean 0 and standard deviation WIDTH / D."""
    return F.layer_norm(x, x.shape[1:]) * WIDTH / x.size(1)


def mean_state(gpt: nn.Module, batch: Batch) -> Tensor:
    """A GPT's features: the mean of the last layer's states over the tokens of each text.

    tokens (B, T); mask (B, T) is False for padding, which does not count -> (B, D).
    """
    states = gpt.hidden(batch["tokens"]).float()  # (B, T, D)
    real = batch["mask"][..., None]
    return (states * real).sum(1) / real.sum(1).clamp(min=1)


def freeze_unread(body: nn.Module, reader: Reader) -> None:
    """Freeze the parts of a body that the features do not depend on."""
    # A tied weight appears once, under its first name: that of the token table, which is read.
    for name, parameter in body.named_parameters():
        if any(f".{part}." in f".{name}." for part in reader.unread):
            parameter.requires_grad_(False)


@torch.inference_mode()
def read_rows(
    read: Callable[[nn.Module, Batch], Tensor],
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    at_once: int = 32,
) -> Tensor:
    """The features of rows of token ids, float32 (n, D), on the CPU; long rows lose their end.

    read: such as mean_state. Rows of similar length go through the model together.
    """
    device = next(model.parameters()).device
    cut = [list(row[: model.config.context_length]) for row in rows]
    order = sorted(range(len(cut)), key=lambda i: len(cut[i]))
    found = torch.empty(len(cut), model.config.d_model)
    batches = range(0, len(order), at_once)
    for first in tqdm(batches, "reading", unit=" batches", leave=False, delay=2, disable=None):
        numbers = order[first : first + at_once]
        T = max(1, len(cut[numbers[-1]]))
        tokens = torch.zeros(len(numbers), T, dtype=torch.long, device=device)
        mask = torch.zeros(len(numbers), T, dtype=torch.bool, device=device)
        for i, number in enumerate(numbers):
            own = cut[number]
            tokens[i, : len(own)] = torch.tensor(own, dtype=torch.long, device=device)
            mask[i, : len(own)] = True
        found[numbers] = read(model, {"tokens": tokens, "mask": mask}).cpu()
    return found


# ---- the model ----------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A body, and a linear head for each question.

    classes: {question: its classes}, in the order of the heads and of the columns of the labels.
    reader: how to read features from the body; parts that it does not use are frozen. Raises
    ValueError for a question with fewer than two classes, or a class that is named twice.
    """

    def __init__(self, body: nn.Module, classes: dict[str, Sequence[str]], reader: Reader):
        super().__init__()
        if not classes:
            raise ValueError("classes is empty: there is no question to answer")
        for question, names in classes.items():
            if len(set(names)) < max(2, len(names)):
                shown = ", ".join(names) or "none"
                raise ValueError(f"the classes of {question!r} are {shown}: give two, each once")
        self.body = body
        self.reader = reader
        self.config = body.config
        self.classes = {question: tuple(names) for question, names in classes.items()}
        self.outer = (*body.outer, "heads")  # trained by AdamW, not by Muon
        freeze_unread(body, reader)
        width = reader.width(body.config)
        self.heads = nn.ModuleList(nn.Linear(width, len(names)) for names in classes.values())
        self.reset_parameters()

    @property
    def unit(self) -> str:
        """The unit in which its data are counted: images, or the body's unit."""
        return "image" if "images" in self.reader.inputs else self.body.unit

    def reset_parameters(self):
        """Initialise the heads; the body keeps its weights."""
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def reset_buffers(self):
        """Compute the buffers that are not saved, after the model was built on "meta"."""
        self.body.reset_buffers()

    def check(self, batch: Batch) -> None:
        """Raise ValueError for a batch that the body cannot read."""
        kind = type(self.body).__name__
        missing = [name for name in self.reader.inputs if name not in batch]
        if missing:
            needs, has = ", ".join(self.reader.inputs), ", ".join(batch)
            raise ValueError(f"a {kind} reads {needs}; the batch has {has}, and no {missing[0]}")
        if "images" in self.reader.inputs:
            found = tuple(batch["images"].shape[1:])
            expected = tuple(self.example_batch(1)["images"].shape[1:])
            if found != expected:
                raise ValueError(f"images are {found}, this {kind} takes {expected}")

    def features(self, batch: Batch) -> Tensor:
        """A batch of batches/labelled.py -> (B, D), float32: mean 0, deviation WIDTH / D."""
        self.check(batch)
        return normalise(self.reader.read(self.body, batch).float())

    def forward(self, batch: Batch) -> list[Tensor]:
        """Logits (B, number of classes) of each head, float32."""
        x = self.features(batch)
        return [head(x).float() for head in self.heads]

    def loss(self, batch: Batch, generators=None) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over rows and heads of -ln p(label), in nats; labels: batch["labels"], int64 (B, M).

        In training mode the targets are smoothed by SMOOTHING.
        metrics: the share of rows that each head gets right, as "accuracy QUESTION". Nothing is
        drawn from generators.
        """
        smoothing = SMOOTHING if self.training else 0.0
        losses = []
        accuracies = {}
        for question, z, label in zip(self.classes, self(batch), batch["labels"].unbind(1)):
            losses.append(F.cross_entropy(z, label, label_smoothing=smoothing))
            accuracies[f"accuracy {question}"] = (z.detach().argmax(1) == label).float().mean()
        return torch.stack(losses).mean(), accuracies

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Probabilities (B, number of classes) for each question."""
        return {question: z.softmax(1) for question, z in zip(self.classes, self(batch))}

    def example_batch(self, rows: int) -> Batch:
        """A batch of zeros in the form of the data; texts have the full length."""
        labels = torch.zeros(rows, len(self.classes), dtype=torch.long)
        if "images" in self.reader.inputs:
            return {"images": self.body.example_batch(rows)["images"], "labels": labels}
        tokens = torch.zeros(rows, self.config.context_length, dtype=torch.long)
        real = torch.ones_like(tokens, dtype=torch.bool)
        return {"tokens": tokens, "mask": real, "labels": labels}


@torch.no_grad()
def predictions(
    model: Classifier, batches: Iterable[Batch]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{question: (probabilities (n, number of classes), labels (n,))} over all batches."""
    device = next(model.parameters()).device
    found = []
    labels = []
    for batch in batches:
        found.append(model.predict({name: x.to(device) for name, x in batch.items()}))
        labels.append(batch["labels"])
    truth = torch.cat(labels).cpu().numpy()  # (n, M)
    result = {}
    for i, question in enumerate(model.classes):
        p = torch.cat([part[question] for part in found])
        result[question] = (p.float().cpu().numpy(), truth[:, i])
    return result
