"""Measures of a CLIP model on pictures with captions: tasks that it was not trained for.

Zero-shot classification. A class is a name. It is put into n templates, such as "serif bold {}" or
"a picture of a {}", and each caption is embedded. For an image x the model gives each of the n M
captions a probability, and the probability of a class is the sum over its captions:

    P(class m | x) ~ sum_k exp(z_km),    z_km = exp(s) x . y_km, as in clip.py

Radford et al. (2021, section 3.1.4) use the mean of a class's caption vectors instead. That does as
well where all templates mean the same. Ours name styles: a picture has one style, and the mean of
four styles is no style at all. Both are measured.

Retrieval compares images with whole captions: is the right one among the k nearest? Probes use the
features of the image tower before the projection: they predict a class from the nearest training
images (k-NN), or by a linear map that is fitted by least squares.

Letters: B images, M classes, n templates, E embedding, D width of the features. All vectors are
unit vectors in float32.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.pictures import save_grid
from data.report import counted
from tinyfm import adapt
from tinyfm.batches.pair_files import Split
from tinyfm.batches.pairs import PairData
from tinyfm.common import files, folders
from tinyfm.evaluate.metrics import Measured, Scores, proportion
from tinyfm.tokenizer import Tokenizer, encode_captions

ROWS = 512  # rows that go through a model or a matrix product at once
MAX_TEMPLATES = 16
RETRIEVAL_IMAGES = 1000  # images, with their captions, among which retrieval searches
PROBED_IMAGES = 2000  # images that the probes classify
TIE = 1e-6  # similarities closer than this are equal
SHOWN = 24  # confusions in the picture
MOST_WORDS = 200_000
# Files of a checkpoint: how training captions are made of names; and their words.
TEMPLATES = "templates.json"
WORDS = "words.json"
# Splits of data/glyphs.py, which loads font libraries.
HELD_OUT_FONTS = "held-out fonts"
HELD_OUT_CHARACTERS = "held-out characters"


# ---- embeddings ---------------------------------------------------------------------------------


@torch.no_grad()
def embed_images(model: Any, images: np.ndarray, encode: Callable | None = None) -> Tensor:
    """uint8 (B, C, H, W) -> (B, E), by `encode`, which defaults to model.encode_image."""
    encode = encode or model.encode_image
    vectors = []
    for i in range(0, len(images), ROWS):
        part = torch.tensor(images[i : i + ROWS]).to(model.logit_scale)  # its device and dtype
        vectors.append(encode(part / 127.5 - 1))
    return torch.cat(vectors)


def image_features(model: Any, images: np.ndarray) -> Tensor:
    """uint8 (B, C, H, W) -> unit vectors (B, D): the output of the tower before the projection.

    The projection drops what the contrastive loss does not need, so for other tasks the features
    before it are better (Chen et al. 2020, section 4.2).
    """
    return F.normalize(embed_images(model, images, model.image_tower).float(), dim=-1)


def vectors_folder(model: Any, fingerprint: str, cache: str) -> Path:
    """The folder that keeps a model's vectors of the images of some data."""
    key = f"{adapt.base_hash(model)}{fingerprint}"
    return Path(cache) / f"vectors-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def write_vectors(folder: Path, vectors: Tensor) -> None:
    """Keep vectors (B, E), unless another process has kept them meanwhile."""
    with folders.whole_or_absent(folder) as new:
        if new:
            files.save_tensors(new, "vectors", {"images": vectors.cpu()})


def read_vectors(folder: Path, model: Any) -> Tensor:
    """The vectors (B, E) that a folder keeps, on the model's device."""
    vectors = files.load_tensors(folder, "vectors")["images"]
    return vectors.to(model.logit_scale.device)


@torch.no_grad()
def embed_texts(model: Any, tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Captions -> (B, E)."""
    tokens, _ = encode_captions(tokenizer, list(captions), model.config.context_length)
    device = model.logit_scale.device
    lengths = (tokens != tokenizer.eot).sum(1)
    # Sorted by length, captions in one part need little padding.
    order = np.argsort(lengths, kind="stable")
    vectors = []
    for i in range(0, len(order), ROWS):
        rows = order[i : i + ROWS]
        part = tokens[rows, : lengths[rows].max() + 1]
        vectors.append(model.encode_text(torch.from_numpy(part).to(device)))
    return torch.cat(vectors)[torch.from_numpy(np.argsort(order))]  # in the order of the captions


def find_templates(split: Split) -> list[str]:
    """How captions contain their labels, the most common way first: ["sans bold {}", ...]."""
    counts = Counter()
    for captions, label in zip(split.captions, split.labels):
        before, separator, after = captions[0].rpartition(label)
        counts[f"{before}{{}}{after}" if separator else "{}"] += 1
    return [template for template, _ in counts.most_common(MAX_TEMPLATES)]


def class_vectors(
    model: Any, tokenizer: Any, names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """(n, M, E): the vector of each name in each template."""
    vectors = []
    for template in templates:
        captions = [template.replace("{}", name) for name in names]
        vectors.append(embed_texts(model, tokenizer, captions))
    return torch.stack(vectors)


# ---- words that training did not read ------------------------------------------------------------


def words_of(texts: Iterable[str], tokenizer: Tokenizer) -> set[str]:
    """The words of the texts; in small letters if the tokenizer reads capital ones as small."""
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    if tokenizer.encode("A") == tokenizer.encode("a"):
        return {word.lower() for word in words}
    return words


def unseen_words(folder: Path, tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Words of the texts that no training caption has, sorted. folder: the checkpoint of the run.

    None for a run of an earlier version, or one that started from another run: their words are not
    known.
    """
    if not (folder / WORDS).exists():
        return []
    return sorted(words_of(texts, tokenizer) - {*files.read_record(folder / WORDS, list[str])})


# ---- measures: shares from 0 to 1 ---------------------------------------------------------------


def full_precision(measure: Callable) -> Callable:
    """Decorate a measure to compute in float32 under autocast too.

    In bfloat16, vectors that are close to each other would become equal.
    """

    @wraps(measure)
    def measured(x: Tensor, *rest, **options):
        with torch.autocast(x.device.type, enabled=False):
            return measure(x, *rest, **options)

    return measured


def share(
    right: Tensor, unit: str = "images", clusters: Sequence[str] = (), cluster: str = ""
) -> Measured:
    """The share of True in a bool tensor (B,), with its interval; see metrics.proportion."""
    return proportion(right.cpu().numpy(), unit, clusters, cluster)


def clusters_of(name: str, split: Split) -> tuple[list[str], str]:
    """Which images of a split are alike, and the word for it; none in a split of your own images.

    In the glyphs, drawings of one character are alike. An interval over them speaks of other
    characters in the same fonts: the fonts held out are too few for one over fonts.
    """
    if name in (HELD_OUT_CHARACTERS, HELD_OUT_FONTS):
        return split.labels, "characters"
    return [], ""


def number_labels(labels: Sequence[str]) -> tuple[list[str], Tensor]:
    """(the different labels, sorted; the place of each label among them, int64 (B,))."""
    names = sorted(set(labels))
    place = {name: i for i, name in enumerate(names)}
    return names, torch.tensor([place[label] for label in labels])


@full_precision
def class_logits(x: Tensor, classes: Tensor, scale: Tensor) -> Tensor:
    """Images x (B, E), classes (n, M, E) -> (B, M), whose softmax is P(class | image).

    Each of the n M captions has the logit scale x . y; a class's is the ln of the sum of exp over
    its n captions. Logits reach 100, so exp is not to overflow.
    """
    return torch.stack([scale * x @ captions.T for captions in classes]).logsumexp(0)


def classify(x: Tensor, classes: Tensor, scale: Tensor) -> Tensor:
    """The most probable class of each image, int64 (B,)."""
    return torch.cat([class_logits(part, classes, scale).argmax(1) for part in x.split(ROWS)])


@full_precision
def recall(x: Tensor, y: Tensor, owner: Tensor, ks: Sequence[int]) -> Scores:
    """Recall at each k between images x (B, E) and captions y (captions, E).

    owner (captions,): the image of each caption. Image to text: a caption of the image is among its
    k nearest captions. Text to image: the image of the caption is among its k nearest images. A tie
    counts against the model: if it embeds everything alike, it retrieves nothing.
    """
    # Similarity of each image to the nearest of its captions.
    lowest = torch.full((len(x),), -torch.inf, device=x.device)
    best = lowest.scatter_reduce(0, owner, (x[owner] * y).sum(1), "amax")  # (B,)

    # The rank of a right answer is the number of wrong ones that are as near. For an image, the
    # wrong ones are the captions of other images.
    image_ranks = []
    for i in range(0, len(x), ROWS):
        z = x[i : i + ROWS] @ y.T  # (rows, captions)
        rows = torch.arange(i, i + len(z), device=x.device)
        wrong = owner[None, :] != rows[:, None]
        image_ranks.append(((z >= best[rows, None] - TIE) & wrong).sum(1))

    # For a caption, the wrong ones are all images but its own.
    text_ranks = []
    for part, owners in zip(y.split(ROWS), owner.split(ROWS)):
        z = part @ x.T  # (rows, B)
        own = z.gather(1, owners[:, None])
        text_ranks.append((z >= own - TIE).sum(1) - 1)

    ranks = {"image_to_text": torch.cat(image_ranks), "text_to_image": torch.cat(text_ranks)}
    units = {"image_to_text": "images", "text_to_image": "captions"}
    return {f"{way}_at_{k}": share(rank < k, units[way]) for way, rank in ranks.items() for k in ks}


@full_precision
def nearest_neighbours(x: Tensor, train_x: Tensor, train_y: Tensor, k: int = 1) -> Tensor:
    """The most common class among the k nearest of train_x, int64 (B,).

    x (B, D) and train_x (N, D) are unit vectors, and near is a large cosine; train_y (N,) are the
    classes. Of equally common classes, that of the nearest wins. ROWS rows of x at a time.
    """
    found = []
    for part in x.split(ROWS):
        near = train_y[(part @ train_x.T).topk(k).indices]  # (rows, k), the nearest first
        votes = (near[:, :, None] == near[:, None, :]).sum(2)  # (rows, k)
        found.append(near.gather(1, votes.argmax(1, keepdim=True)).squeeze(1))
    return torch.cat(found)


@full_precision
def linear_probe(x: Tensor, train_x: Tensor, train_y: Tensor, ridge: float = 1e-3) -> Tensor:
    """The classes that a linear map with a bias predicts, int64 (B,).

    The map is fitted by least squares to one-hot classes Y, in float64:

        W = (X'X + ridge n I)^-1 X'Y,    X = (train_x, 1), of n rows

    x (B, D), train_x (n, D); train_y (n,) are classes from 0. The class of a row is where (x, 1) W
    is largest. X'Y is summed class by class, because Y is too large where there are many classes.
    """

    def with_one(rows: Tensor) -> Tensor:
        return torch.cat((rows, rows.new_ones(len(rows), 1)), dim=1).double()

    X = with_one(train_x)
    M = int(train_y.max()) + 1
    products = X.new_zeros(M, X.size(1)).index_add(0, train_y, X)  # Y'X: (M, D + 1)
    gram = X.T @ X + ridge * len(X) * torch.eye(X.size(1), dtype=X.dtype, device=X.device)
    weights = torch.linalg.solve(gram, products.T)  # (D + 1, M)
    return torch.cat([(part @ weights).argmax(1) for part in with_one(x).split(ROWS)])


# ---- a model on its data ------------------------------------------------------------------------


def by_name(
    model: Any, tokenizer: Any, data: PairData, x: dict[str, Tensor]
) -> tuple[Scores, dict[str, list[str]]]:
    """Zero-shot accuracy on each test split, and the names that were found.

    x: {split: its image vectors}. The candidates are the names in the split, and then all names of
    the data, among which there are more to confuse. The templates are those of the split's own
    captions, as a person who classifies satellite photos would write "a satellite photo of {}".
    Both ways to combine a class's captions are measured: the sum of their probabilities, and the
    mean of their vectors.
    """
    everything = sorted({name for split in data.splits.values() for name in split.labels})
    scores = {}
    found = {}
    for split in list(data.splits)[2:]:
        templates = find_templates(data.splits[split])
        names, labels = number_labels(data.splits[split].labels)
        all_classes = class_vectors(model, tokenizer, everything, templates)
        own = torch.tensor([everything.index(name) for name in names])
        classes = all_classes[:, own.to(all_classes.device)]
        means = F.normalize(classes.mean(0, keepdim=True), dim=-1)
        guesses = classify(x[split], classes, model.scale()).cpu()
        by_mean = classify(x[split], means, model.scale()).cpu()
        alike = clusters_of(split, data.splits[split])
        right = share(guesses == labels, "images", *alike)
        scores[f"zero-shot, {split}, {counted(len(names), 'names')}"] = right
        right = share(by_mean == labels, "images", *alike)
        scores[f"zero-shot, {split}, mean vectors"] = right
        among_all = classify(x[split], all_classes, model.scale()).cpu()
        right = share(among_all == own[labels], "images", *alike)
        scores[f"zero-shot, {split}, all {counted(len(everything), 'names')}"] = right
        found[split] = [names[i] for i in guesses.tolist()]
    return scores, found


def by_caption(model: Any, tokenizer: Any, data: PairData, x: Tensor) -> Scores:
    """Recall at 1, 5 and 10, both ways, among RETRIEVAL_IMAGES of the first test split.

    x: the vectors of all its images. An image is compared with all of its captions.
    """
    rows = np.random.default_rng(0).permutation(len(data.test.labels))[:RETRIEVAL_IMAGES]
    captions = []
    owner = []
    for i, row in enumerate(rows):
        captions += data.test.captions[row]
        owner += [i] * len(data.test.captions[row])
    y = embed_texts(model, tokenizer, captions)
    x = x[torch.from_numpy(rows).to(x.device)]
    found = recall(x, y, torch.tensor(owner, device=x.device), (1, 5, 10))
    return {f"{name.replace('_', ' ')} of {len(rows):,}": value for name, value in found.items()}


def by_features(data: PairData, x: dict[str, Tensor]) -> Scores:
    """Accuracy of the probes on images of the first test split, among the classes of training.

    x: {split: frozen features} of the training split and the first test split.
    """
    train, _, test = list(data.splits)[:3]
    names, labels = number_labels(data.train.labels)
    place = {name: i for i, name in enumerate(names)}
    order = np.random.default_rng(0).permutation(len(data.test.labels))
    rows = [i for i in order.tolist() if data.test.labels[i] in place][:PROBED_IMAGES]
    device = x[test].device
    truth = torch.tensor([place[data.test.labels[i]] for i in rows], device=device)
    alike, word = clusters_of(test, data.test)
    alike = [alike[i] for i in rows] if alike else []
    scores = {}
    for name, probe in (("nearest neighbour", nearest_neighbours), ("linear", linear_probe)):
        guesses = probe(x[test][rows], x[train], labels.to(device))
        right = share(guesses == truth, "images", alike, word)
        scores[f"{name} on features, {counted(len(names), 'classes')}"] = right
    return scores


def pixels(images: np.ndarray) -> Tensor:
    """Images (B, C, H, W) -> unit vectors (B, C H W) of their pixels, each image minus its mean.

    They stand in for features, as a baseline of the probes.
    """
    x = torch.tensor(images).flatten(1).float()
    return F.normalize(x - x.mean(1, keepdim=True) + 1e-6, dim=-1)  # not 0 for a blank image


def clip_scores(model: Any, tokenizer: Any, data: PairData) -> tuple[Scores, dict[str, list[str]]]:
    """All measures of a CLIP model, and the names found in each held-out split.

    A model that was trained by SimCLR has seen no texts: it gets the probes alone.
    """
    splits = data.splits
    scores = {}
    found = {}
    if model.config.loss != "simclr":
        x = {name: embed_images(model, split.images) for name, split in splits.items()}
        scores, found = by_name(model, tokenizer, data, x)
        scores |= by_caption(model, tokenizer, data, x[data.split("test")])
    probed = {
        name: image_features(model, splits[name].images)
        for name in (next(iter(splits)), data.split("test"))
    }
    return scores | by_features(data, probed), found


def draw_confusions(
    images: np.ndarray,
    names: list[str],
    guesses: list[str],
    path: str,
    captions: list[str] | None = None,
) -> None:
    """Write a grid of wrongly named images, each beside a real image of the name that was guessed.

    images: uint8 (B, C, H, W); names, guesses: the true and the guessed name of each. The image
    beside is one in the same manner, if `captions` show that there is one: a "bold digit one" that
    was taken for a "letter l" stands beside a "bold letter l". Raises ValueError if every name was
    found.
    """
    wrong = [i for i, name in enumerate(names) if guesses[i] != name]
    if not wrong:
        raise ValueError("there is no confusion to draw: every name was found")
    of_name: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        of_name.setdefault(name, []).append(i)
    tiles = []
    titles = []
    for i in np.random.default_rng(0).permutation(wrong)[:SHOWN]:
        guess = guesses[i]
        others = of_name.get(guess, [])
        if captions:
            wanted = captions[i].replace(names[i], guess)
            others = [other for other in others if captions[other] == wanted] or others
        beside = np.full_like(images[i], 128)  # grey, if there is no image of that name
        if others:
            beside = images[others[0]]
        tiles += [images[i], beside]
        titles += [f"is: {names[i]}", f"guess: {guess}"]
    save_grid(np.stack(tiles).transpose(0, 2, 3, 1), path, 8, titles)
