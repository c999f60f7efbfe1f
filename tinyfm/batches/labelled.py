"""Examples with labels -> batches: what a classifier (heads.py) learns from and is measured on.

An example is a text or a picture; a task asks one question of it, or several, and a label is the
answer to one: "which package is this code from?", "json". The classes of a question are the labels
that training has, in the order of the alphabet. Row r of step s is sample

    i = s * batch_size + r;   epoch, j = divmod(i, n);   example = chosen[permutation(epoch)[j]]

with n examples to train on: an epoch takes each once, in its own random order, and a batch is a
pure function of (seed, step). Labels are what costs. So `labels` takes n of them alone, drawn by
the seed and stratified: all classes in their proportions, each once before any is there twice.

Of one's own examples a share is held out, stratified likewise; which ones follows from a hash of
what they are, so that the order of the rows does not matter. The tasks that need no files have a
harder split of their own: files of code (data/packages.py), fonts (data/scripts.py) not seen.

Letters: B batch, T tokens of the longest row, C channels, H W rows and columns, M questions.
Left out: texts larger than memory, labels that are missing or more than one to a question.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import labelled, packages, scripts
from data.labelled import SPLITS, TRAIN, Passage
from data.report import Report
from tinyfm.batches.order import shuffle
from tinyfm.batches.pair_files import build, open_splits, read_manifest
from tinyfm.tokenizer import ByteTokenizer, Tokenizer

TEXTS, PICTURES = ("packages",), scripts.TASKS  # what --data.path may name of data/
FORMAT = 1  # of the prepared folders: with another number, all are built anew


@dataclass(frozen=True)
class TaskConfig:
    """Which examples to read, and which of their labels to use."""

    # packages, or your own .csv, .tsv or .jsonl of texts; for a model of pictures scripts,
    # characters, such a table of paths, or a folder with a folder for each class
    path: str = "packages"
    input_column: str = ""  # of a table: the text's, or the path's; empty = text, or path or image
    label_columns: tuple[str, ...] = labelled.LABEL_COLUMNS  # of a table: one or several
    tokenizer: str = ""  # of texts: a folder with a saved one; else the base's, or bytes
    labels: int = 0  # training examples to use, of all classes alike; 0 = all
    val_fraction: float = 0.1  # share of your own examples held out
    cache: str = "data/cache"  # folder for pictures that are prepared

    def __post_init__(self):
        object.__setattr__(self, "label_columns", tuple(self.label_columns))  # JSON has lists
        columns = self.label_columns
        if not self.path or not columns or len(set(columns)) < len(columns) or "" in columns:
            raise ValueError(
                f"--data.path is {self.path!r}, --data.label-columns {' '.join(columns)!r}: give "
                "a path, and columns, each once"
            )
        if self.labels < 0:
            raise ValueError(f"--data.labels {self.labels}: it must be 0, for all, or above")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--data.val-fraction {self.val_fraction}: it must be between 0 and 1")


# ---- which examples -----------------------------------------------------------------------------


def stratified(labels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`order` (n,), a permutation of the rows of labels (n, M), sorted so that however much of it
    is taken from its beginning has all classes in their proportions; first one of each class."""
    before = np.empty(labels.shape)  # share of a row's class that stands before it
    for q, column in enumerate(labels.T):
        _, classes, counts = np.unique(column[order], return_inverse=True, return_counts=True)
        first = np.repeat(np.cumsum(counts) - counts, counts)  # of its class, class after class
        place = np.empty(len(order))
        place[np.argsort(classes, kind="stable")] = np.arange(len(order)) - first
        before[:, q] = place / counts[classes]
    return order[np.argsort(before.min(1), kind="stable")]


def hold_out(names: Sequence[Sequence[str]], keys: Sequence[str], val_fraction: float) -> list[str]:
    """The split of each example, of labels `names` and told apart by `keys`: that share of them, at
    least one, is held out, and, where it can be, of each class one is not."""
    digests = [hashlib.sha256(key.encode("utf-8", "replace")).digest() for key in keys]
    order = stratified(np.array(names), np.array(sorted(range(len(keys)), key=digests.__getitem__)))
    count = min(max(1, round(val_fraction * len(keys))), len(keys) - 1)
    held_out = set(order[len(keys) - count :].tolist())
    return [SPLITS[i in held_out] for i in range(len(keys))]


def find_classes(
    path: str, questions: Sequence[str], names: dict[str, Sequence[Sequence[str]]]
) -> dict[str, tuple[str, ...]]:
    """The classes of each question. names: {split: labels of each example}.

    Raises ValueError if there is but one, or one that training does not have.
    """
    classes = {}
    for q, question in enumerate(questions):
        known, asked = ({labels[q] for labels in names[split]} for split in SPLITS)
        if unseen := asked - known:
            shown = ", ".join(map(repr, sorted(unseen)[:3])) + ", ..." * (len(unseen) > 3)
            raise ValueError(
                f"{path}: {len(unseen)} classes of {question!r} are in what is held out, and not "
                f"in training ({shown}): each needs two examples at least, or is no class"
            )
        if len(known) < 2:
            raise ValueError(f"{path}: all labels of {question!r} are {min(known)!r}: need two")
        classes[question] = tuple(sorted(known))
    return classes


# ---- the data of a task -------------------------------------------------------------------------


class Examples(NamedTuple):
    """One split."""

    inputs: Any  # a list of n rows of token ids; or images, uint8 (n, C, H, W), on disk
    names: list[Sequence[str]]  # labels of each, one for each question


class TaskData:
    """Batches of a task, from what `texts` or `pictures` reads."""

    def __init__(
        self, config: TaskConfig, questions: Sequence[str], splits: dict[str, Examples],
        batch_size: int, seed: int, about: str, content: str, tokenizer: Tokenizer | None = None,
    ):  # fmt: skip
        """about: what was read, in words; content: a hash of it. Raises ValueError for labels that
        make no task, and more of them asked for than there are."""
        if batch_size < 1 or seed < 0:
            raise ValueError(f"batch size {batch_size} must be at least 1, seed {seed} at least 0")
        names = {split: examples.names for split, examples in splits.items()}
        self.classes = find_classes(config.path, questions, names)
        self.inputs = {split: examples.inputs for split, examples in splits.items()}
        self.labels = {split: self.numbered(names[split]) for split in SPLITS}  # int64 (n, M)
        self.tokenizer, self.batch_size, self.seed = tokenizer, batch_size, seed
        self.unit, self.units_per_row = "texts" if tokenizer else "images", 1
        found = len(self.labels[TRAIN])
        if config.labels > found:
            raise ValueError(f"--data.labels {config.labels}: there are {found} training examples")
        order = stratified(self.labels[TRAIN], np.random.default_rng(seed).permutation(found))
        self.chosen = np.sort(order[: config.labels or found])
        self.fingerprint = hashlib.sha256(f"{content} {self.classes}".encode()).hexdigest()
        train, val = (f"{len(self.labels[split]):,}" for split in SPLITS)
        used = f"{len(self.chosen):,} of {train}" if config.labels else train
        parts = [f"{config.path}: {used} training and {val} held-out {self.unit}", about]
        for question, line in self.baselines().items():
            guess = f"by chance {line['chance']:.1%}, by the commonest {line['commonest']:.1%}"
            parts.append(f"{question}: {len(self.classes[question])} classes, right {guess}")
        self.description = "; ".join(parts)

    def numbered(self, names: Sequence[Sequence[str]]) -> np.ndarray:
        """The place of each label among its classes."""
        places = [{name: i for i, name in enumerate(own)} for own in self.classes.values()]
        rows = [[place[label] for place, label in zip(places, labels)] for labels in names]
        return np.array(rows, dtype=np.int64)

    def baselines(self) -> dict[str, dict[str, float]]:
        """What needs no model: shares of held-out labels of each question that are right by
        "chance", and by always saying the class that is the "commonest" in training."""
        lines = {}
        for q, (question, names) in enumerate(self.classes.items()):
            commonest = np.bincount(self.labels[TRAIN][:, q]).argmax()
            share = float((self.labels[SPLITS[1]][:, q] == commonest).mean())
            lines[question] = {"chance": 1 / len(names), "commonest": share}
        return lines

    def read(self, split: str, index: np.ndarray) -> dict[str, Tensor]:
        """Rows `index` (int64) of a split, B of them, with "labels" (B, M) int64, and either
        "tokens" (B, T) int64 and "mask" (B, T), True where a token is one of the text;
        or "images", float32 (B, C, H, W) in [-1, 1]."""
        labels = torch.from_numpy(self.labels[split][index])
        if self.tokenizer is None:
            images = torch.from_numpy(self.inputs[split][index]).float() / 127.5 - 1
            return {"images": images, "labels": labels}
        rows = [self.inputs[split][i] for i in index]
        tokens = np.full((len(rows), max(map(len, rows))), self.tokenizer.eot, dtype=np.int64)
        mask = np.arange(tokens.shape[1]) < np.array([[len(row)] for row in rows])
        tokens[mask] = np.concatenate(rows)
        return {
            "tokens": torch.from_numpy(tokens),
            "mask": torch.from_numpy(mask),
            "labels": labels,
        }

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """`rows` of the global batch of `step`, as `read` returns them."""
        samples = np.arange(self.batch_size, dtype=np.int64)[rows] + step * self.batch_size
        return self.read(TRAIN, self.chosen[shuffle(samples, len(self.chosen), self.seed)])

    def val_batches(self, rows: int) -> Iterator[dict[str, Tensor]]:
        """All that is held out, `rows` examples at a time, in one order, each once."""
        for first in range(0, size := len(self.labels[SPLITS[1]]), rows):
            yield self.read(SPLITS[1], np.arange(first, min(first + rows, size)))

    def metrics(self, loss: float) -> dict[str, float]:
        """Nothing beyond the loss itself; see heads.score."""
        return {}


# ---- texts, pictures ----------------------------------------------------------------------------


def texts(
    config: TaskConfig, tokenizer: Tokenizer, context_length: int, batch_size: int, seed: int
) -> TaskData:
    """The task for a model that reads up to context_length tokens; what is longer loses its end.

    Raises ValueError for a task of pictures, and as data/labelled.py and TaskData do.
    """
    if config.path in PICTURES:
        raise ValueError(f"{config.path} are pictures, the model reads text: {' or '.join(TEXTS)}")
    report, questions = Report(), ("package",)
    if config.path in TEXTS:
        passages = packages.examples(report)
    else:
        questions = config.label_columns
        rows = labelled.text_rows(config.path, report, config.input_column, questions)
        names, own = [row.labels for row in rows], [row.source for row in rows]
        splits = hold_out(names, own, config.val_fraction)
        passages = [Passage(*row, split) for row, split in zip(rows, splits)]
    encoded = tokenizer.encode_batch([passage.text for passage in passages])
    cut = sum(len(ids) > context_length for ids in encoded)
    if cut:
        report.notes.append(f"{cut:,} cut to {context_length} tokens")
    content, splits = hashlib.sha256(), {split: Examples([], []) for split in SPLITS}
    for ids, passage in zip(encoded, passages):
        splits[passage.split].inputs.append(np.array(ids[:context_length], dtype=np.int64))
        splits[passage.split].names.append(passage.labels)
        content.update(repr((ids[:context_length], *passage[1:])).encode())
    digest = f"{content.hexdigest()} {tokenizer.fingerprint()}"
    return TaskData(config, questions, splits, batch_size, seed, str(report), digest, tokenizer)


def prepare_pictures(config: TaskConfig, image_size: int, channels: int) -> Path:
    """The folder with the pictures of a task; it is built if it does not exist."""
    report = Report()
    if config.path in PICTURES:
        version, name = scripts.version(config.path), config.path
        records = scripts.records(config.path, image_size, channels, report)
    else:
        rows = labelled.picture_rows(config.path, report, config.input_column, config.label_columns)
        keys = [f"{row.labels} {Path(row.source).name}" for row in rows]
        splits = hold_out([row.labels for row in rows], keys, config.val_fraction)
        version = f"{labelled.version(rows)} {config.val_fraction}"
        name = re.sub(r"[^\w-]+", "-", Path(config.path).name).strip("-") or "pictures"
        records = labelled.records(rows, splits, image_size, channels, report)
    key = json.dumps([FORMAT, version, image_size, channels])
    folder = Path(config.cache, f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    if not folder.exists():  # the labels are what is said of a picture, in bytes
        build(folder, records, report, SPLITS, lambda captions: ByteTokenizer(), 256)
    return folder


def pictures(
    config: TaskConfig, image_size: int, channels: int, batch_size: int, seed: int
) -> TaskData:
    """The task for a model of pictures (channels, image_size, image_size).

    Raises ValueError for a task of texts, and as data/labelled.py and TaskData do.
    """
    if config.path in TEXTS:
        raise ValueError(f"{config.path} are texts, the model reads {' or '.join(PICTURES)}")
    if image_size < 1 or channels not in (1, 3):
        raise ValueError(f"image size {image_size}, channels {channels}: use 1 (grey) or 3")
    questions = config.label_columns
    if config.path in PICTURES:
        questions = (config.path.removesuffix("s"),)
    elif Path(config.path).expanduser().is_dir():
        questions = labelled.LABEL_COLUMNS
    folder = prepare_pictures(config, image_size, channels)
    manifest = read_manifest(folder)
    if not all(manifest["rows"].values()):
        raise ValueError(
            f"{config.path}: too few pictures for training and held out: {manifest['report']}"
        )
    found = open_splits(folder, manifest, np.dtype(np.uint16))
    splits = {name: Examples(split.images, split.captions) for name, split in found.items()}
    content = json.dumps([manifest["image"], manifest["sha256"]])
    return TaskData(config, questions, splits, batch_size, seed, manifest["report"], content)
