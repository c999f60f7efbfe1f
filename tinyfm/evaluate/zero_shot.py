"""What a CLIP model knows without having been taught it: measures on pictures with captions.

A class is a name. It is put into n templates, "serif bold {}" or "a picture of a {}", and each
caption is embedded. The model says how probable each of the n M captions is for an image x; a class
is as probable as its captions together, whichever of them it was:

    P(class m | x) ~ sum_k exp(z_km),    z_km = exp(s) x . y_km, as in clip.py

Radford et al. (2021, section 3.1.4) take the mean of a class's vectors instead. Where templates are
but ways to say the same, that does as well; ours name styles, a picture has one of them, and the
mean of four styles is no style at all.

Retrieval asks the same of whole captions: is the right one among the k nearest of all? Probes use
the image tower alone, what it gives before the projection: the class of the nearest training images
(k-NN), or a linear map from features to classes, fitted by least squares.

Letters: B images, M classes, n templates, E embedding width. Vectors are unit vectors of float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.pictures import save_grid
from tinyfm.batches.pair_files import Split
from tinyfm.batches.pairs import PairData
from tinyfm.evaluate.metrics import SHOWN, Scores
from tinyfm.tokenizer import encode_captions

ROWS = 512  # through a tower at once
MAX_TEMPLATES = 16


@torch.no_grad()
def embed_images(model, images: np.ndarray, encode: Callable | None = None) -> Tensor:
    """uint8 (B, C, H, W) -> (B, E), by the model's encode_image if nothing else is given."""
    like, encode = model.logit_scale, encode or model.encode_image
    parts = (torch.tensor(images[i : i + ROWS]) for i in range(0, len(images), ROWS))
    return torch.cat([encode(part.to(like) / 127.5 - 1) for part in parts])


def image_features(model, images: np.ndarray) -> Tensor:
    """uint8 (B, C, H, W) -> unit vectors (B, D) before the projection. What the contrast has no use
    for, the projection drops: for other tasks they are better (Chen et al. 2020, section 4.2)."""
    return F.normalize(embed_images(model, images, model.image_tower).float(), dim=-1)


@torch.no_grad()
def embed_texts(model, tokenizer, captions: Sequence[str]) -> Tensor:
    """Captions -> (B, E); short ones first, so that few rows are filled up."""
    tokens, _ = encode_captions(tokenizer, list(captions), model.config.context_length)
    device, lengths = model.logit_scale.device, (tokens != tokenizer.eot).sum(1)
    order, vectors = np.argsort(lengths, kind="stable"), []
    for i in range(0, len(order), ROWS):
        rows = order[i : i + ROWS]
        cut = tokens[rows, : lengths[rows].max() + 1]
        vectors.append(model.encode_text(torch.from_numpy(cut).to(device)))
    return torch.cat(vectors)[torch.from_numpy(np.argsort(order))]


def find_templates(split: Split) -> list[str]:
    """How captions are made of labels, the commonest ways first: ["sans bold {}", ...]."""
    ways = Counter()
    for captions, label in zip(split.captions, split.labels):
        before, label_, after = captions[0].rpartition(label)
        ways[f"{before}{{}}{after}" if label_ else "{}"] += 1
    return [way for way, _ in ways.most_common(MAX_TEMPLATES)]


def class_vectors(model, tokenizer, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(n, M, E): each name in each template."""
    ways = [[template.replace("{}", name) for name in names] for template in templates]
    return torch.stack([embed_texts(model, tokenizer, captions) for captions in ways])


# ---- measures: shares of 1 ----------------------------------------------------------------------


def exactly(measure: Callable) -> Callable:
    """Compare vectors in full precision under autocast too: bfloat16 makes neighbours equal."""

    @wraps(measure)
    def measured(x: Tensor, *rest, **options):
        with torch.autocast(x.device.type, enabled=False):
            return measure(x, *rest, **options)

    return measured


@exactly
def class_logits(x: Tensor, classes: Tensor, scale: Tensor) -> Tensor:
    """(B, M) of x (B, E) and classes (n, M, E): their softmax is how probable each class is."""
    return torch.stack([scale * x @ captions.T for captions in classes]).logsumexp(0)


def classify(x: Tensor, classes: Tensor, scale: Tensor) -> Tensor:
    """The most probable class (B,) of each of x (B, E)."""
    return torch.cat([class_logits(part, classes, scale).argmax(1) for part in x.split(ROWS)])


def numbered(labels: Sequence[str]) -> tuple[list[str], Tensor]:
    """The different labels in order, and the number of each label among them, (B,)."""
    names = sorted(set(labels))
    place = {name: i for i, name in enumerate(names)}
    return names, torch.tensor([place[label] for label in labels])


@exactly
def recall(x: Tensor, y: Tensor, owner: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Recall at k between images x (B, E) and captions y; owner (captions,) is a caption's image.

    Image to text: one of the image's own captions is among its k nearest. Text to image: the
    caption's image is among its k nearest. A tie counts against the model.
    """
    own = torch.full((len(x),), -torch.inf, device=x.device)
    best = own.scatter_reduce(0, owner, (x[owner] * y).sum(1), "amax")  # of an image's captions
    ranks = {"image_to_text": [], "text_to_image": []}
    for i in range(0, len(x), ROWS):
        z, rows = x[i : i + ROWS] @ y.T, torch.arange(i, min(i + ROWS, len(x)), device=x.device)
        others = owner[None, :] != rows[:, None]
        ranks["image_to_text"].append(((z >= best[rows, None] - 1e-6) & others).sum(1))
    for part, of in zip(y.split(ROWS), owner.split(ROWS)):
        z = part @ x.T
        own = z.gather(1, of[:, None])
        ranks["text_to_image"].append((z >= own - 1e-6).sum(1) - 1)
    ranks = {way: torch.cat(parts) for way, parts in ranks.items()}
    return {f"{way}_at_{k}": share(rank < k) for way, rank in ranks.items() for k in ks}


def share(right: Tensor) -> float:
    return right.float().mean().item()


@exactly
def nearest_neighbours(x: Tensor, train_x: Tensor, train_y: Tensor, k: int = 1) -> Tensor:
    """The class (B,) that most of the k nearest of train_x have, the nearer winning a tie."""
    found = []
    for part in x.split(ROWS):
        near = train_y[(part @ train_x.T).topk(k).indices]  # (rows, k)
        votes = (near[:, :, None] == near[:, None, :]).sum(2)
        found.append(near.gather(1, votes.argmax(1, keepdim=True)).squeeze(1))
    return torch.cat(found)


@exactly
def linear_probe(x: Tensor, train_x: Tensor, train_y: Tensor, ridge: float = 1e-3) -> Tensor:
    """The class (B,) by least squares from features, and 1, to one-hot classes.

    W = (X'X + ridge n I)^-1 X'Y; the one-hot Y of many classes is never built.
    """

    def with_one(rows):
        return torch.cat((rows, rows.new_ones(len(rows), 1)), dim=1).double()

    X, M = with_one(train_x), int(train_y.max()) + 1
    products = X.new_zeros(M, X.size(1)).index_add(0, train_y, X)  # (M, E + 1) = Y'X
    gram = X.T @ X + ridge * len(X) * torch.eye(X.size(1), dtype=X.dtype, device=X.device)
    weights = torch.linalg.solve(gram, products.T)
    return torch.cat([(part @ weights).argmax(1) for part in with_one(x).split(ROWS)])


RETRIEVAL_IMAGES = 1000  # among which a caption has to find its own, and the reverse
PROBED_IMAGES = 2000  # of which the class is told from features


def by_name(model, tokenizer, data: PairData, x: dict[str, Tensor]) -> tuple[Scores, dict]:
    """Top-1 among all names of each held-out split, and what was found in each.

    The templates are those of the split's own captions: that a text says "bold italic" is known
    beforehand of such pictures, as "a satellite photo" would be. Beside it, with the mean vector of
    a name's captions (zero_shot.py).
    """
    scores, found = {}, {}
    for split in list(data.splits)[1:]:
        templates = find_templates(data.splits[split])
        names, labels = numbered(data.splits[split].labels)
        classes = class_vectors(model, tokenizer, names, templates)
        means = nn.functional.normalize(classes.mean(0, keepdim=True), dim=-1)
        guesses = classify(x[split], classes, model.scale()).cpu()
        by_mean = classify(x[split], means, model.scale()).cpu()
        scores[f"zero-shot, {split}, {len(names):,} names"] = share(guesses == labels)
        scores[f"zero-shot, {split}, mean vectors"] = share(by_mean == labels)
        found[split] = [names[i] for i in guesses.tolist()]
    return scores, found


def by_caption(model, tokenizer, data: PairData, x: Tensor) -> Scores:
    """Recall at 1, 5 and 10 in the validation split, both ways, with all captions of an image."""
    rows = np.random.default_rng(0).permutation(len(data.val.labels))[:RETRIEVAL_IMAGES]
    own = [data.val.captions[i] for i in rows]
    owner = torch.tensor([i for i, captions in enumerate(own) for _ in captions], device=x.device)
    captions = [caption for captions in own for caption in captions]
    y = embed_texts(model, tokenizer, captions)
    found = recall(x[torch.from_numpy(rows).to(x.device)], y, owner, (1, 5, 10))
    return {f"{name.replace('_', ' ')} of {len(rows):,}": value for name, value in found.items()}


def by_features(data: PairData, x: dict[str, Tensor], what: str) -> Scores:
    """Classes of validation images that training shows, from frozen features."""
    train, val = list(data.splits)[:2]
    names, labels = numbered(data.train.labels)
    place = {name: i for i, name in enumerate(names)}
    order = np.random.default_rng(0).permutation(len(data.val.labels))
    rows = [i for i in order.tolist() if data.val.labels[i] in place][:PROBED_IMAGES]
    truth = torch.tensor([place[data.val.labels[i]] for i in rows], device=x[val].device)
    inputs = (x[val][rows], x[train], labels.to(x[val].device))
    probes = {"nearest neighbour": nearest_neighbours, "linear": linear_probe}
    return {
        f"{name} on {what}, {len(names):,} classes": share(probe(*inputs) == truth)
        for name, probe in probes.items()
    }


def pixels(images: np.ndarray) -> Tensor:
    """Images (B, C, H, W) as unit vectors, the mean taken away."""
    x = torch.tensor(images).flatten(1).float()
    return nn.functional.normalize(x - x.mean(1, keepdim=True) + 1e-6, dim=-1)


def clip_scores(run, model, tokenizer, data: PairData) -> tuple[Scores, dict]:
    splits, scores, found = data.splits, {}, {}
    if run.model.loss != "simclr":
        x = {name: embed_images(model, split.images) for name, split in splits.items()}
        scores, found = by_name(model, tokenizer, data, x)
        scores |= by_caption(model, tokenizer, data, x[list(splits)[1]])
    probed = {name: image_features(model, splits[name].images) for name in [*splits][:2]}
    return scores | by_features(data, probed, "features"), found


def draw_confusions(data: PairData, found: dict[str, list[str]], path: str) -> None:
    """A grid of images of the last split that were taken for something else: truth, then guess."""
    split, guesses = data.splits[list(found)[-1]], found[list(found)[-1]]
    wrong = [i for i, label in enumerate(split.labels) if guesses[i] != label]
    rows = np.random.default_rng(0).permutation(wrong)[:SHOWN]
    if not len(rows):
        raise ValueError("there is no confusion to draw: every name was found")
    titles = [f"{split.labels[i]} → {guesses[i]}" for i in rows]
    save_grid(split.images[rows].transpose(0, 2, 3, 1), path, 6, titles)
