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

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tinyfm.autoencoder import Autoencoder
from tinyfm.clip import CLIP
from tinyfm.ddpm import Diffusion, level
from tinyfm.gpt import GPT

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


# FOLDED: merge this into the module's docstring
# Features: what a body trained for something else makes of an example, as one vector.
#
# Pretraining names no classes, yet its states tell many things apart. Where to read them depends on
# the family; the table READERS has an entry for each:
#
#     GPT           states of the last layer, the mean over a text's tokens; padding does not count
#     CLIP          the image tower's states before the projection: of the class token, and of patches
#     Autoencoder   the latents' means
#     Diffusion     the U-Net's middle, looking for noise (Baranchuk et al. 2022; Xiang et al. 2023):
#                   to remove it, one must know what is drawn; none is added, so nothing is random
#
# A picture's features keep where things are, a mean for each place of a coarse grid: R differs from P
# in one place.
#
# Letters: B batch, T tokens, D width of the features, C channels, H W rows and columns, P patches.
# Left out: features of text towers, of several layers at once, of diffusion with a context.


PATCH_GRID, LATENT_GRID, MIDDLE_GRID = 4, 8, 4  # rows and columns of places, at most
NOISE = 0.3  # share of the way to pure noise that the U-Net is told

Batch = dict[str, Tensor]


def in_places(x: Tensor, grid: int) -> Tensor:
    """Channels (B, C, H, W) -> (B, C places), means over grid x grid places, or H x W if fewer."""
    return F.adaptive_avg_pool2d(x, (min(grid, x.size(2)), min(grid, x.size(3)))).flatten(1)


def count_places(rows: int, grid: int) -> int:
    """How many places `in_places` makes of so many rows and columns."""
    return min(grid, rows) ** 2


def read_tokens(gpt: GPT, batch: Batch) -> Tensor:
    """tokens (B, T), of which those count where mask (B, T) is True -> (B, D)."""
    states, real = gpt.hidden(batch["tokens"]).float(), batch["mask"][..., None]
    return (states * real).sum(1) / real.sum(1).clamp(min=1)


def read_patches(clip: CLIP, batch: Batch) -> Tensor:
    """images (B, C, H, W) -> (B, D): the class token's state, then those of the patches."""
    x = clip.image_tower.states(batch["images"])  # (B, P + 1, D of the tower)
    rows = clip.config.image_size // clip.config.patch_size
    patches = rearrange(x[:, 1:], "B (h w) D -> B D h w", h=rows)
    return torch.cat((x[:, 0], in_places(patches, PATCH_GRID)), dim=1)


def read_latents(autoencoder: Autoencoder, batch: Batch) -> Tensor:
    """images (B, C, H, W) -> (B, D): the means of the latents."""
    return in_places(autoencoder.encode(batch["images"])[0], LATENT_GRID)


def read_middle(diffusion: Diffusion, batch: Batch) -> Tensor:
    """images (B, C, H, W) -> (B, D): the way down of the U-Net, without the way up."""
    images = batch["images"]
    share = torch.full((len(images),), NOISE, dtype=torch.double)
    t, alpha, _ = (n.float().to(images.device) for n in level(diffusion.config, share))
    middle, _, _ = diffusion.unet.way_down(alpha[:, None, None, None] * images, t)
    return in_places(middle, MIDDLE_GRID)


class Reader(NamedTuple):
    """How a family gives features."""

    read: Callable[[nn.Module, Batch], Tensor]
    inputs: tuple[str, ...]  # what it needs of a batch
    width: Callable[[Any], int]  # D, from the body's config
    unread: tuple[str, ...]  # modules and parameters of the body on which they do not depend


READERS: dict[type, Reader] = {
    GPT: Reader(read_tokens, ("tokens", "mask"), lambda c: c.d_model, ("head",)),
    CLIP: Reader(
        read_patches, ("images",),
        lambda c: c.image_width * (1 + count_places(c.image_size // c.patch_size, PATCH_GRID)),
        ("image_projection", "text_tower", "text_projection", "logit_scale", "logit_bias"),
    ),
    Autoencoder: Reader(
        read_latents, ("images",),
        lambda c: c.latent_channels * count_places(c.image_size // c.factor, LATENT_GRID),
        ("decoder",),
    ),
    Diffusion: Reader(
        read_middle, ("images",),
        lambda c: c.channels[-1] * count_places(c.image_size // c.factor, MIDDLE_GRID),
        ("unet.up", "unet.norm", "unet.conv_out"),
    ),
}  # fmt: skip


def find_reader(body: nn.Module) -> Reader:
    """Raises ValueError for a body that has none, or that reads a context beside images."""
    if type(body) not in READERS:
        known = ", ".join(kind.__name__ for kind in READERS)
        raise ValueError(f"a {type(body).__name__} gives no features: use one of {known}")
    if width := getattr(body.config, "d_context", 0):
        raise ValueError(
            f"this diffusion model reads a context of width {width} beside images: classify with "
            "one trained on images alone"
        )
    return READERS[type(body)]
