"""A body and its heads: what a pretrained model knows, asked by labels.

A classifier reads an example as one vector of features x (D,) of its body (features.py), brought to
mean 0 and variance 1 over its D numbers, and then divided by D / 256. So one learning rate suits
all bodies: AdamW moves every weight as far, whatever D is, and D of them add up. For each question
that is asked of it, it has a head:

    p(class | example) = softmax(W x + b),       loss = mean over heads of -ln p(the label)

In training the label counts for 0.9, and all classes share the rest (label smoothing, Szegedy et
al. 2016): few examples are soon fitted, and without it W then grows to be sure of them, not to be
right about others.

Trained with the body frozen it is a linear probe (Alain & Bengio 2017): what it reaches the body
knew, as a linear map can find. Trained with the body it is fine-tuning. W and b begin at 0, so that
all classes are equally likely at first, and the first steps are the data's.

Letters: B batch, T tokens, D width of the features, M heads, C channels, H W rows and columns.
Left out: regression, several labels to one question.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfm.evaluate import metrics
from tinyfm.features import Batch, find_reader

WIDTH = 256  # features of which one learning rate is the measure
SMOOTHING = 0.1  # share of a label that all classes get, in training


class Classifier(nn.Module):
    """A body, and a linear head for each question.

    classes: {question: its classes}, in the order of the heads and of the columns of the labels.
    Parts of the body that the features do not read are frozen. Raises ValueError for a body without
    features, and a question with fewer than two classes.
    """

    def __init__(self, body: nn.Module, classes: dict[str, Sequence[str]]):
        super().__init__()
        if not classes:
            raise ValueError("classes is empty: there is no question to answer")
        for question, names in classes.items():
            if len(set(names)) < max(2, len(names)):
                shown = ", ".join(names) or "none"
                raise ValueError(f"the classes of {question!r} are {shown}: give two, each once")
        self.body, self.reader, self.config = body, find_reader(body), body.config
        self.classes = {question: tuple(names) for question, names in classes.items()}
        self.outer = (*body.outer, "heads")  # AdamW's, not Muon's
        unread = tuple(f"{part}." for part in self.reader.unread)
        for name, parameter in body.named_parameters():  # a tied weight has the name that is read
            if f"{name}.".startswith(unread):
                parameter.requires_grad_(False)
        width = self.reader.width(body.config)
        self.heads = nn.ModuleList(nn.Linear(width, len(names)) for names in classes.values())
        self.reset_parameters()

    def reset_parameters(self):
        """The heads alone: the body keeps what it has learnt."""
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def reset_buffers(self):
        """What is not saved, to be made anew where the model was built on "meta"."""
        self.body.reset_buffers()

    def check(self, batch: Batch) -> None:
        """Raise ValueError for a batch that the body cannot read."""
        kind, example = type(self.body).__name__, self.example_batch(1)
        if lacking := [name for name in self.reader.inputs if name not in batch]:
            needs, has = ", ".join(self.reader.inputs), ", ".join(batch)
            raise ValueError(f"a {kind} reads {needs}; the batch has {has}, and no {lacking[0]}")
        if "images" in example and batch["images"].shape[1:] != example["images"].shape[1:]:
            sizes = [tuple(b["images"].shape[1:]) for b in (batch, example)]
            raise ValueError(f"images are {sizes[0]}, this {kind} takes {sizes[1]}")

    def features(self, batch: Batch) -> Tensor:
        """A batch as tasks.py gives it -> (B, D), float32, of mean 0 and deviation WIDTH / D."""
        self.check(batch)
        x = self.reader.read(self.body, batch).float()
        return F.layer_norm(x, x.shape[1:]) * WIDTH / x.size(1)

    def forward(self, batch: Batch) -> list[Tensor]:
        """Logits (B, number of classes) of each head, float32."""
        x = self.features(batch)
        return [head(x).float() for head in self.heads]

    def loss(self, batch: Batch, generators=None) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over rows and heads of -ln p(label), in nats; labels: batch["labels"], int64 (B, M).

        metrics: the share of rows that each head gets right, as "accuracy QUESTION". Nothing is
        drawn from generators.
        """
        losses, shares, smoothing = [], {}, SMOOTHING * self.training
        for question, z, label in zip(self.classes, self(batch), batch["labels"].unbind(1)):
            losses.append(F.cross_entropy(z, label, label_smoothing=smoothing))
            shares[f"accuracy {question}"] = (z.detach().argmax(1) == label).float().mean()
        return torch.stack(losses).mean(), shares

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Probabilities (B, number of classes) for each question."""
        return {question: z.softmax(1) for question, z in zip(self.classes, self(batch))}

    def example_batch(self, rows: int) -> Batch:
        """Rows as data could give them: of zeros, texts of full length."""
        labels = torch.zeros(rows, len(self.classes), dtype=torch.long)
        if "images" in self.reader.inputs:
            return {"images": self.body.example_batch(rows)["images"], "labels": labels}
        tokens = torch.zeros(rows, self.config.context_length, dtype=torch.long)
        real = torch.ones_like(tokens, dtype=torch.bool)
        return {"tokens": tokens, "mask": real, "labels": labels}


# ---- what a model is worth on it ----------------------------------------------------------------


@torch.no_grad()
def predictions(
    model: Classifier, batches: Iterable[Batch]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(probabilities (n, classes), labels (n,)) of each question over all batches."""
    device, found, labels = next(model.parameters()).device, [], []
    for batch in batches:
        found.append(model.predict({name: x.to(device) for name, x in batch.items()}))
        labels.append(batch["labels"])
    truth = torch.cat(labels).cpu().numpy()
    return {
        question: (torch.cat([p[question] for p in found]).float().cpu().numpy(), truth[:, q])
        for q, question in enumerate(model.classes)
    }


def score(model: Classifier, batches: Iterable[Batch]) -> dict[str, float]:
    """metrics.classification of each question; where there are several, its name stands behind."""
    found = predictions(model, batches)
    return {
        name + f" {question}" * (len(found) > 1): value
        for question, (probabilities, labels) in found.items()
        for name, value in metrics.classification(probabilities, labels).items()
    }
