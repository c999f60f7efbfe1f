"""Pictures with captions -> batches: what CLIP reads, and in which order.

A picture is (C, H, W) bytes and a caption a row of token ids; both are prepared once, into files
that are nothing but arrays, read through a memory map. Row r of step s is sample

    i = s * batch_size + r;   epoch, j = divmod(i, M);   row = permutation(epoch)[j]

with M training pictures: an epoch takes each once, in its own random order, computed by `permute`
of data.py. So a batch is a pure function of (seed, step), whoever asks for which rows of it.

The caption's tokens are followed by the end-of-text token, where a causal text tower has read it
all and its summary is taken; more of that token pads the rows of a batch to one length and changes
nothing. Whoever contrasts pictures must know which captions are the same: their `labels` are equal.

Legend: B batch, T tokens of the longest row, C channels, H W rows and columns. Left out: several
captions in training (the first is read), and captions drawn anew for each epoch.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from data import captioned, glyphs
from data.report import Report
from tinyfm import tokenizer as tokenizers
from tinyfm.batches.order import shuffle, shuffle_runs
from tinyfm.batches.pair_files import build, open_splits, read_manifest
from tinyfm.batches.shards import token_dtype
from tinyfm.batches.text import check_vocabulary, fixed_tokenizer
from tinyfm.tokenizer import Tokenizer

GLYPHS = ("glyphs", "letters")  # what --data.path may name of data/glyphs.py: all, or Latin alone
FORMAT = 1  # of the prepared folders: with another number, all are built anew


@dataclass(frozen=True)
class PairConfig:
    """Which pictures and captions to read, and how captions become tokens."""

    # glyphs, letters, or your own: a folder of images, a .csv, a .jsonl or "shards-{000..009}.tar"
    path: str = "glyphs"
    color: bool = False  # paint the glyphs in inks and on papers that their captions name
    # sentencepiece, sentencepiece-unigram, bpe, bytes, or a run or folder with a saved tokenizer
    tokenizer: str = "sentencepiece"
    template: str = captioned.TEMPLATE  # caption of an image in a folder named for what it shows
    neighbours: int = 1  # rows that stay together in a batch: alike, so hard to tell apart
    val_fraction: float = 0.1  # share of your own pictures held out; glyphs has splits of its own
    cache: str = "data/cache"  # folder for what is prepared

    def __post_init__(self):
        if not self.path or not self.tokenizer:
            raise ValueError("--data.path and --data.tokenizer must not be empty")
        if self.neighbours < 1:
            raise ValueError(f"--data.neighbours {self.neighbours}: it must be at least 1")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--data.val-fraction {self.val_fraction}: it must be between 0 and 1")
        if "{}" not in self.template:
            advice = 'write {} where the name belongs, as in "a picture of a {}"'
            raise ValueError(f"--data.template {self.template!r}: {advice}")


def find_source(config: PairConfig, image_size: int, channels: int):
    """Return (name, records(report=...), its splits, version) of glyphs or the user's own files.

    Raises ValueError for what glyphs are not, as their size is one.
    """
    if config.path in GLYPHS:
        sizes = (glyphs.SIZE, 3 if config.color else 1)
        if (image_size, channels) != sizes:
            raise ValueError(
                f"{config.path} are {glyphs.SIZE} x {glyphs.SIZE} pixels of {sizes[1]} (3 with "
                f"--data.color), the model takes {image_size} x {image_size} in {channels}: set "
                f"the model's image-size to {glyphs.SIZE} and its channels to {sizes[1]}"
            )
        variant = {"color": config.color, "letters": config.path == "letters"}
        name = config.path + "-color" * config.color
        splits = glyphs.LETTER_SPLITS if variant["letters"] else glyphs.SPLITS
        return name, partial(glyphs.records, **variant), splits, glyphs.version(**variant)
    if config.color:
        raise ValueError("--data.color paints glyphs and letters, and not your own pictures")
    own = {"template": config.template, "val_fraction": config.val_fraction}
    records = partial(captioned.records, config.path, image_size, channels, **own)
    version = f"{captioned.version(config.path, config.template)} {config.val_fraction}"
    name = re.sub(r"[^\w-]+", "-", Path(config.path).name).strip("-") or "pictures"
    return name, records, captioned.SPLITS, version


def learn_tokenizer(kind: str, vocab_size: int, report: Report, captions: list[str]) -> Tokenizer:
    """A tokenizer of vocab_size ids, or as many as the captions allow, which the report tells.

    Few different words make few pieces. A model with rows to spare works all the same.
    """
    try:
        return tokenizers.train(kind, captions, vocab_size)
    except ValueError as error:
        most = re.search(r"use at most (\d+)$", str(error))
        if not most:
            raise
        report.notes.append(f"the captions allow {most[1]} tokens, not {vocab_size}")
        return tokenizers.train(kind, captions, int(most[1]))


def prepare_folder(
    config: PairConfig, image_size: int, channels: int, vocab_size: int, context_length: int,
    tokenizer: Tokenizer | None = None,
) -> Path:  # fmt: skip
    """The folder with these pictures and captions; it is built if it does not exist.

    Its name ends with a hash of all that its content depends on. A tokenizer that is given stands
    for the config's.
    """
    fixed = tokenizer or fixed_tokenizer(config.tokenizer)
    if fixed is not None:
        check_vocabulary(fixed, vocab_size)  # now, rather than after reading all pictures
    identity = f"{config.tokenizer} {vocab_size}" if fixed is None else fixed.fingerprint()
    name, records, splits, version = find_source(config, image_size, channels)
    key = json.dumps([FORMAT, version, identity, image_size, channels, context_length])
    folder = Path(config.cache, f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    if folder.exists():
        return folder
    report = Report()
    learn = partial(learn_tokenizer, config.tokenizer, vocab_size, report)
    make_tokenizer = learn if fixed is None else lambda captions: fixed
    build(folder, records(report=report), report, splits, make_tokenizer, context_length)
    return folder


class PairData:
    """Batches of pictures with captions, and `splits`, name -> Split, as a whole: "train", then the
    one that validates the training, then others."""

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
                raise ValueError(f"the split {split!r} has {rows} pictures, need 2: {advice}")
        if (rows := manifest["rows"]["train"]) < batch_size:
            advice = f"use --train.batch-size <= {rows}, or add pairs"
            raise ValueError(f"{rows} training pictures, the batch takes {batch_size}: {advice}")
        self.tokenizer = tokenizers.load(folder / "tokenizer")
        check_vocabulary(self.tokenizer, vocab_size)
        self.batch_size, self.seed = batch_size, seed
        self.neighbours = min(neighbours, manifest["rows"]["train"])
        self.unit, self.units_per_row = "images", 1
        self.splits = open_splits(folder, manifest, token_dtype(self.tokenizer.vocab_size))
        self.train, self.val = list(self.splits.values())[:2]
        content = json.dumps([manifest["image"], manifest["sha256"]])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()
        counts = ", ".join(f"{rows:,} {split}" for split, rows in manifest["rows"].items())
        self.description = f"{folder.name}: {counts} pictures of {tuple(manifest['image'])}"
        if len(set(self.train.groups.tolist())) == 1:
            caption = self.train.captions[0][0]
            warnings.warn(f"all captions are {caption!r}: they teach nothing", stacklevel=2)

    @classmethod
    def prepare(
        cls, config: PairConfig, image_size: int, channels: int, vocab_size: int,
        context_length: int, batch_size: int, seed: int, tokenizer: Tokenizer | None = None,
    ) -> "PairData":  # fmt: skip
        """Open the prepared pictures of `config`, after building them if need be.

        Raises ValueError for sizes that cannot be, or pairs that cannot be found or used.
        """
        if context_length < 2 or image_size < 1 or channels not in (1, 3):
            raise ValueError(
                f"context length {context_length} must be at least 2, image size {image_size} at "
                f"least 1, channels {channels} 1 (grey) or 3 (colour)"
            )
        sizes = (image_size, channels, vocab_size, context_length)
        folder = prepare_folder(config, *sizes, tokenizer)
        return cls(folder, vocab_size, batch_size, seed, config.neighbours)

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """`rows` of the global batch of `step`, R of them:

        {"images": float32 (R, C, H, W) in [-1, 1], "tokens": int64 (R, T), "labels": int64 (R,)}
        with T the longest of these rows, and labels equal where captions are.
        """
        return self.train.batch(self.rows_of(step, rows))

    def rows_of(self, step: int, rows: slice) -> np.ndarray:
        """Which training pictures they are, int64 (R,)."""
        samples = np.arange(self.batch_size, dtype=np.int64)[rows] + step * self.batch_size
        return shuffle_runs(samples, len(self.train.labels), self.seed, self.neighbours)

    def val_batches(self, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """The validation split, `rows` pictures at a time, mixed in an order that never changes.

        What is left over at the end is not read: a contrastive loss is lower in a smaller batch.
        With fewer than `rows` pictures there is one batch, of all.
        """
        size = len(self.val.labels)
        order = shuffle(np.arange(size), size, seed=0)
        for first in range(0, max(1, size - rows + 1), rows):
            yield self.val.batch(order[first : first + rows])

    def metrics(self, loss: float) -> dict[str, float]:
        """Nothing beyond the loss itself."""
        return {}


# FOLDED: merge this into the module's docstring
# Pictures without captions -> batches: what an autoencoder and a diffusion model read.
#
# They are the pictures of pairs.py, in the same files and the same order, of which only the images
# are handed out: a folder of images is enough, and what stands beside them is not read. Each batch
# says of which training step it is, for a loss that changes as training goes on.


@dataclass(frozen=True)
class ImageConfig:
    """Which pictures to read. Their captions do not matter, and need not be there."""

    path: str = "glyphs"  # glyphs, letters, or your own: a folder of images, a .csv or a .jsonl
    color: bool = False  # paint the glyphs in inks and on papers of their own
    val_fraction: float = 0.1  # share of your own pictures held out; glyphs has splits of its own
    val_images: int = 500  # of the pictures held out, how many an evaluation looks at
    cache: str = "data/cache"  # folder for what is prepared

    # What PairData asks of its config beside these: bytes need no training, and without a template
    # no captions are read of one's own pictures.
    tokenizer: ClassVar[str] = "bytes"
    template: ClassVar[str] = ""
    neighbours: ClassVar[int] = 1

    def __post_init__(self):
        if not self.path:
            raise ValueError("--data.path must not be empty")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--data.val-fraction {self.val_fraction}: it must be between 0 and 1")
        if self.val_images < 1:
            raise ValueError(f"--data.val-images {self.val_images}: it must be at least 1")


class ImageData(PairData):
    """Batches of pictures; `splits` as PairData has them."""

    val_images: int

    @classmethod
    def load(
        cls, config: ImageConfig, image_size: int, channels: int, batch_size: int, seed: int
    ) -> "ImageData":
        """Open the prepared pictures of `config`, (channels, image_size, image_size) each, after
        building them if need be. Raises ValueError as PairData.prepare does."""
        bytes_and_end, longest_caption = 257, 256
        sizes = (image_size, channels, bytes_and_end, longest_caption)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "all captions are")  # so they may be
            data = cls.prepare(config, *sizes, batch_size, seed)
        data.val_images = config.val_images
        return data

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """`rows` of the global batch of `step`, R of them:

        {"images": float32 (R, C, H, W) in [-1, 1], "step": int64 ()}
        """
        return {"images": super().batch(step, rows)["images"], "step": torch.tensor(step)}

    def fixed_batches(self, split: str, count: int, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """{"images": ...}, `rows` at a time, of `count` pictures of a split, always the same."""
        size = len(self.splits[split].labels)
        order = shuffle(np.arange(size), size, seed=0)[:count]
        for first in range(0, len(order), rows):
            index = order[first : first + rows]
            yield {"images": self.splits[split].batch(index)["images"]}

    def val_batches(self, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """The first val_images of the validation split, mixed in an order that never changes."""
        return self.fixed_batches(list(self.splits)[1], self.val_images, rows)
