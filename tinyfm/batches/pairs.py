"""Pictures -> batches: with captions for CLIP, without for an autoencoder or a diffusion model.

A picture is (C, H, W) bytes, and a caption is a row of token ids. Both are prepared once, into
files that are nothing but arrays (pair_files.py), and read through a memory map. An epoch reads
each of the M training pictures once, in a random order. Row r of step s is sample

    i = s * batch_size + r;   epoch, j = divmod(i, M);   row = permutation(epoch)[j]

So a batch is a pure function of (seed, step), and any rows of it can be read alone (order.py).

`PairData`: CLIP reads the caption from left to right, so it summarises it at the end-of-text token,
which has seen all of it. The rows of a batch are padded to one length with more of that token,
which changes nothing. A contrastive loss must know which captions are equal, as those are not
negatives of each other: their `labels` are equal.

`ImageData`: the same pictures, in the same files and the same order, without captions. A folder of
images is enough; text files next to them are not read. Each batch has the number of its training
step, for a loss that changes in the course of training.

Legend: B batch, T tokens of the longest row, C channels, H W rows and columns, M training pictures.
Left out: several captions in training (the first is read), and new captions in each epoch.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from data import captioned, episodes
from data.report import Report, counted
from data.splits import SPLITS, TRAIN
from tinyfm import tokenizer as tokenizers
from tinyfm.batches.order import check_val_fraction, fixed_order, shuffle_runs
from tinyfm.batches.pair_files import build, open_splits, read_manifest
from tinyfm.batches.prepared import name_of, prepared_folder
from tinyfm.batches.shards import token_dtype
from tinyfm.batches.text import check_vocabulary, fixed_tokenizer
from tinyfm.common.config import DataPath, FolderPath, Name, Text, may_change
from tinyfm.tokenizer import Tokenizer

GLYPHS = ("glyphs", "letters")  # values of --data.path for data/glyphs.py: all, or Latin alone
EPISODES = "episodes"  # that for data/episodes.py
FORMAT = 2  # of the prepared folders: a new number makes all of them be prepared again


# ---- configs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairConfig:
    """Which pictures and captions to read, and how to turn captions into tokens."""

    # glyphs, letters, or your own: a folder of images, a .csv, a .jsonl or "shards-{000..009}.tar"
    path: DataPath = "glyphs"
    color: bool = False  # paint the glyphs in inks and on papers that their captions name
    # sentencepiece, sentencepiece-unigram, bpe, bytes, or a run or folder with a saved tokenizer
    tokenizer: Name = "sentencepiece"
    template: Text = captioned.TEMPLATE  # caption of an image in a folder named for its subject
    neighbours: int = 1  # similar rows that stay together in a batch, as harder negatives
    # share of your own pictures held out, half for validation and half for test; glyphs, and
    # folders named train, val and test, have their own splits
    val_fraction: float = 0.1
    cache: FolderPath = may_change("data/cache")  # folder for the prepared pictures

    def __post_init__(self):
        if not self.path or not self.tokenizer:
            raise ValueError("--data.path and --data.tokenizer must not be empty")
        if self.neighbours < 1:
            raise ValueError(f"--data.neighbours {self.neighbours}: it must be at least 1")
        check_val_fraction(self.val_fraction)
        if "{}" not in self.template:
            advice = 'write {} where the name belongs, as in "a picture of a {}"'
            raise ValueError(f"--data.template {self.template!r}: {advice}")


@dataclass(frozen=True)
class ImageConfig:
    """Which pictures to read. Captions are not needed and not read."""

    # glyphs, letters, or your own: a folder of images, a .csv or a .jsonl
    path: DataPath = "glyphs"
    color: bool = False  # paint the glyphs in random inks and on random papers
    # share of your own pictures held out, half for validation and half for test; glyphs, and
    # folders named train, val and test, have their own splits
    val_fraction: float = 0.1
    val_images: int = 500  # number of held-out pictures that an evaluation reads
    cache: FolderPath = may_change("data/cache")  # folder for the prepared pictures

    # PairData reads these as well. Bytes are a tokenizer that needs no training, and an empty
    # template means that no captions of the user's pictures are read.
    tokenizer: ClassVar[str] = "bytes"
    template: ClassVar[str] = ""
    neighbours: ClassVar[int] = 1

    def __post_init__(self):
        if not self.path:
            raise ValueError("--data.path must not be empty")
        check_val_fraction(self.val_fraction)
        if self.val_images < 1:
            raise ValueError(f"--data.val-images {self.val_images}: it must be at least 1")


# ---- the prepared pictures -----------------------------------------------------------------------


class Source(NamedTuple):
    """Where pictures come from."""

    name: str
    records: Callable  # records(report=...) reads the pictures
    splits: tuple[str, ...]
    version: str  # changes when the records do


def glyph_source(config: PairConfig | ImageConfig, image_size: int, channels: int) -> Source:
    """The drawings of data/glyphs.py. Raises ValueError for a size or channels they do not have."""
    from data import glyphs  # here, as it loads font libraries, which only the drawings need

    glyph_channels = 3 if config.color else 1
    if (image_size, channels) != (glyphs.SIZE, glyph_channels):
        raise ValueError(
            f"{config.path} are {glyphs.SIZE} x {glyphs.SIZE} pixels of {glyph_channels} (3 with "
            f"--data.color), the model takes {image_size} x {image_size} in {channels}: set "
            f"the model's image-size to {glyphs.SIZE} and its channels to {glyph_channels}"
        )
    letters = config.path == "letters"
    variant = {"color": config.color, "letters": letters}
    return Source(
        f"{config.path}-color" if config.color else config.path,
        partial(glyphs.records, **variant),
        glyphs.LETTER_SPLITS if letters else glyphs.SPLITS,
        glyphs.version(**variant),
    )


def episode_source(config: PairConfig | ImageConfig, image_size: int, channels: int) -> Source:
    """What a robot sees. Raises ValueError for a size or channels that it does not have."""
    size = episodes.SIDE * episodes.TILE
    if (image_size, channels) != (size, 3):
        raise ValueError(
            f"{EPISODES} are {size} x {size} pixels of 3 channels, the model takes {image_size} x "
            f"{image_size} in {channels}: set --model.image-size {size} --model.channels 3"
        )
    version = f"{episodes.version()} pictures of {episodes.PICTURED}"
    return Source(EPISODES, episodes.records, SPLITS, version)


def own_source(config: PairConfig | ImageConfig, image_size: int, channels: int) -> Source:
    """The user's own pictures."""
    if config.color:
        raise ValueError(
            f"--data.color paints glyphs and letters, and not your own pictures in {config.path}: "
            "leave it out"
        )
    options = {"template": config.template, "val_fraction": config.val_fraction}
    return Source(
        name_of(config.path, "pictures"),
        partial(captioned.records, config.path, image_size, channels, **options),
        SPLITS,
        f"{captioned.version(config.path, config.template)} {config.val_fraction}",
    )


def learn_tokenizer(kind: str, vocab_size: int, report: Report, captions: list[str]) -> Tokenizer:
    """A tokenizer with `vocab_size` ids, or with the most that the captions allow.

    Few different words make few pieces. A note in the report says so. A model with spare rows in
    its embedding works as well.
    """
    try:
        return tokenizers.train(kind, captions, vocab_size)
    except ValueError as error:
        largest = re.search(r"use at most (\d+)$", str(error))  # the advice of the tokenizers
        if not largest:
            raise
        report.notes.append(f"the captions allow {largest[1]} tokens, not {vocab_size}")
        return tokenizers.train(kind, captions, int(largest[1]))


def prepare_folder(
    config: PairConfig | ImageConfig,
    image_size: int,
    channels: int,
    vocab_size: int,
    context_length: int,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """The folder with these pictures and captions; it is built if it does not exist.

    A `tokenizer` is used instead of the config's.
    """
    report = Report()
    fixed = tokenizer or fixed_tokenizer(config.tokenizer)
    if fixed is None:
        identity = f"{config.tokenizer} {vocab_size}"
        make_tokenizer = partial(learn_tokenizer, config.tokenizer, vocab_size, report)
    else:
        check_vocabulary(fixed, vocab_size)  # now, rather than after reading all pictures
        identity = fixed.fingerprint()

        def make_tokenizer(captions):
            return fixed  # nothing to learn

    find = own_source
    if config.path in GLYPHS:
        find = glyph_source
    elif config.path == EPISODES:
        find = episode_source
    source = find(config, image_size, channels)
    depends_on = (FORMAT, source.version, identity, image_size, channels, context_length)
    folder = prepared_folder(config.cache, source.name, depends_on)
    if not folder.exists():
        records = source.records(report=report)
        build(folder, records, report, source.splits, make_tokenizer, context_length)
    return folder


# ---- pictures with captions ----------------------------------------------------------------------


class PairData:
    """Batches of pictures with captions.

    splits: {name: Split}, each as a whole. The first is "train", the second validates the training,
    and all others test what was trained.
    """

    def __init__(
        self, folder: Path, vocab_size: int, batch_size: int, seed: int, neighbours: int = 1
    ):
        """Open a prepared folder. Raises ValueError if it is damaged or does not fit the model."""
        if batch_size < 1 or seed < 0:
            raise ValueError(f"batch size {batch_size} must be at least 1, seed {seed} at least 0")
        manifest = read_manifest(folder)
        for split, rows in manifest["rows"].items():
            if rows < 2:
                advice = "add pairs, or change --data.val-fraction"
                count = counted(rows, "pictures")
                raise ValueError(f"the split {split!r} has {count}, need 2: {advice}")
        train_rows = manifest["rows"][TRAIN]
        if train_rows < batch_size:
            advice = f"use --train.batch-size <= {train_rows}, or add pairs"
            raise ValueError(
                f"{counted(train_rows, 'training pictures')}, the batch takes {batch_size}: "
                f"{advice}"
            )
        self.tokenizer = tokenizers.load(folder / "tokenizer")
        check_vocabulary(self.tokenizer, vocab_size)
        self.batch_size = batch_size
        self.seed = seed
        self.neighbours = min(neighbours, train_rows)
        self.unit = "images"
        self.units_per_row = 1
        self.splits = open_splits(folder, manifest, token_dtype(self.tokenizer.vocab_size))
        self.train, self.val, self.test = list(self.splits.values())[:3]
        content = json.dumps([manifest["image"], manifest["rows"], manifest["sha256"]])
        # A run keeps its start, which says by which version the pictures were split.
        self.fingerprint = f"{FORMAT}-{hashlib.sha256(content.encode()).hexdigest()}"
        counts = ", ".join(f"{rows:,} {split}" for split, rows in manifest["rows"].items())
        self.description = f"{folder.name}: {counts} pictures of {tuple(manifest['image'])}"
        if len(set(self.train.groups.tolist())) == 1:
            caption = self.train.captions[0][0]
            warnings.warn(f"all captions are {caption!r}: they teach nothing", stacklevel=2)

    @classmethod
    def prepare(
        cls,
        config: PairConfig | ImageConfig,
        image_size: int,
        channels: int,
        vocab_size: int,
        context_length: int,
        batch_size: int,
        seed: int,
        tokenizer: Tokenizer | None = None,
    ) -> "PairData":
        """Open the pictures of `config`. They are prepared first if they have not been before.

        A `tokenizer` is used instead of the config's. Raises ValueError for impossible sizes, or
        for pairs that cannot be found or used.
        """
        if context_length < 2 or image_size < 1 or channels not in (1, 3):
            raise ValueError(
                f"context length {context_length}, image size {image_size}, channels {channels}: "
                "use a length of at least 2, a size of at least 1, and 1 (grey) or 3 (colour) "
                "channels"
            )
        sizes = (image_size, channels, vocab_size, context_length)
        folder = prepare_folder(config, *sizes, tokenizer)
        return cls(folder, vocab_size, batch_size, seed, config.neighbours)

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """`rows` of the global batch of `step`, B of them:

        {"images": float32 (B, C, H, W) in [-1, 1], "tokens": int64 (B, T), "labels": int64 (B,)}
        with T the longest of these rows, and labels equal where captions are equal.
        """
        return self.train.batch(self.rows_of(step, rows))

    def rows_of(self, step: int, rows: slice) -> np.ndarray:
        """Indices, int64 (B,), of the training pictures in `rows` of the batch of `step`."""
        samples = np.arange(self.batch_size, dtype=np.int64)[rows] + step * self.batch_size
        return shuffle_runs(samples, len(self.train.labels), self.seed, self.neighbours)

    def split(self, name: str) -> str:
        """The name of a split in `splits`; "val" and "test" stand for the second and the third."""
        places = {"val": 1, "test": 2}
        return name if name in self.splits else list(self.splits)[places[name]]

    def val_batches(self, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """The validation split; see `split_batches`."""
        return self.split_batches("val", rows)

    def split_batches(self, name: str, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """A split, `rows` pictures at a time, in a random order that never changes.

        Pictures left over at the end are not read, because a contrastive loss is lower in a smaller
        batch. A split of fewer than `rows` pictures is one batch.
        """
        split = self.splits[self.split(name)]
        order = fixed_order(len(split.labels))
        for first in range(0, max(1, len(order) - rows + 1), rows):
            yield split.batch(order[first : first + rows])

    def metrics(self, loss: float) -> dict[str, float]:
        """No metrics beyond the loss."""
        return {}


# ---- pictures alone ------------------------------------------------------------------------------


class ImageData(PairData):
    """Batches of pictures; `splits` are those of PairData."""

    val_images: int

    @classmethod
    def load(
        cls, config: ImageConfig, image_size: int, channels: int, batch_size: int, seed: int
    ) -> "ImageData":
        """Open the pictures of `config`, each (channels, image_size, image_size).

        They are prepared first if they have not been before. Raises ValueError as PairData.prepare.
        """
        bytes_and_end = 257  # the vocabulary
        longest_caption = 256
        sizes = (image_size, channels, bytes_and_end, longest_caption)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "all captions are")  # they are not used here
            data = cls.prepare(config, *sizes, batch_size, seed)
        data.val_images = config.val_images
        return data

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """`rows` of the global batch of `step`, B of them:

        {"images": float32 (B, C, H, W) in [-1, 1], "step": int64 ()}
        """
        return {"images": super().batch(step, rows)["images"], "step": torch.tensor(step)}

    def fixed_batches(self, split: str, count: int, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """{"images": ...} of `count` pictures of a split, always the same, `rows` at a time."""
        order = fixed_order(len(self.splits[split].labels))[:count]
        for first in range(0, len(order), rows):
            index = order[first : first + rows]
            yield {"images": self.splits[split].batch(index)["images"]}

    def split_batches(self, name: str, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """`val_images` pictures of a split, in an order that never changes."""
        return self.fixed_batches(self.split(name), self.val_images, rows)
