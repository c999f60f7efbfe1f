"""Examples with labels -> batches: the data of a classifier (adapt/heads.py).

An example is a text or a picture. A task asks one question about it, or several, and a label is the
answer to one: "which package is this code from?", "json". The classes of a question are the labels
that occur in training, in alphabetical order. Row r of step s is sample

    i = s * batch_size + r;   epoch, j = divmod(i, n);   example = chosen[permutation(epoch)[j]]

with n examples to train on. An epoch reads each once, in a random order, and a batch is a pure
function of (seed, step), see order.py. Labels are what costs money. So --data.labels trains on n
examples alone. They are drawn by the seed and stratified: all classes in their proportions, and
one example of each class before any has two.

A share of the user's own examples is held out, half of it for validation, by which choices are
made, and half for test, on which the result is measured. Both are stratified in the same way. A
hash of the content decides which, so that the order of the rows does not matter. Near duplicates
are left out before. The tasks that
need no files have harder splits: files of code (data/packages.py) or fonts (data/scripts.py) that
training has not seen. Examples of one file or font are alike, so their number says too much about
how certain an accuracy is: `clusters` has the file or font of each.

Legend: B batch, T tokens of the longest row, C channels, H W rows and columns, M questions.
Left out: texts larger than memory, missing labels, and several labels for one question.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import dedupe, labelled, packages, ratings
from data.labelled import Passage
from data.report import Report, counted
from data.splits import SPLITS, TEST, TRAIN, VAL
from tinyfm.batches.order import check_val_fraction, hash_order, shuffle
from tinyfm.batches.pair_files import build, open_splits, read_manifest
from tinyfm.batches.prepared import name_of, prepared_folder
from tinyfm.common.config import DataPath, FolderPath, Name, Names, may_change
from tinyfm.tokenizer import ByteTokenizer, Tokenizer

# The values of --data.path that name a task. PICTURES are the tasks of data/scripts.py, which is
# imported where they are read: it loads font libraries, which classifying texts does not need.
TEXTS = ("packages", *ratings.SETS)
PICTURES = ("scripts", "characters")
CLUSTERS = {"products": "reviews", "editorials": "editorials"}
INDEX_MB = 64  # of memory, to recognize duplicates; it is touched only as far as it is needed
FORMAT = 2  # of the splits: a new number prepares all folders again, and old runs do not resume


@dataclass(frozen=True)
class TaskConfig:
    """Which examples to read, and which of their labels to use."""

    # packages, films, products, editorials, tweets, or your own .csv, .tsv or .jsonl of texts; for
    # a model of pictures scripts, characters, a table of their paths, or a folder with a folder for
    # each class
    path: DataPath = "packages"
    # column of a table with the text, or the path of the picture; empty = text, or path or image
    input_column: Name = ""
    # columns of a table with the labels, one for each question
    label_columns: Names = labelled.LABEL_COLUMNS
    # folder with a saved tokenizer, for texts; empty = that of the base run, or bytes
    tokenizer: FolderPath = ""
    labels: int = 0  # training examples to use, in proportion to the classes; 0 = all
    # share of your own examples held out, half for validation and half for test
    val_fraction: float = 0.1
    cache: FolderPath = may_change("data/cache")  # folder for the prepared pictures

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
        check_val_fraction(self.val_fraction)


# ---- which examples ------------------------------------------------------------------------------


def stratified(labels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`order`, sorted so that the first k rows have all classes in their proportions, for every k.

    labels: (n, M). order: (n,), a permutation of the rows. It is sorted by the share of a row's
    class that comes before the row in `order`, which is 0 for the first row of each class. With
    several questions, the smallest of the row's shares counts.
    """
    shares = np.empty(labels.shape)
    for q, column in enumerate(labels.T):
        names = column[order].tolist()
        counts = Counter(names)
        before = Counter()
        own_shares = []
        for name in names:
            own_shares.append(before[name] / counts[name])
            before[name] += 1
        shares[:, q] = own_shares
    return order[np.argsort(shares.min(1), kind="stable")]


def hold_out(names: Sequence[Sequence[str]], keys: Sequence[str], val_fraction: float) -> list[str]:
    """The split of each example: VAL or TEST for a share of `val_fraction`, stratified.

    names: the labels of each example. keys: a unique text for each, whose hash decides. At least
    one example is in each split, and training keeps one of each class where that is possible.
    Raises ValueError for fewer than three examples.
    """
    if len(keys) < len(SPLITS):
        count = counted(len(keys), "labelled examples")
        raise ValueError(
            f"{count}, need {len(SPLITS)}, one each for training, validation and test: add some"
        )
    labels = np.array(names)
    by_hash = hash_order([key.encode("utf-8", "replace") for key in keys])
    order = stratified(labels, np.array(by_hash))
    count = min(max(2, round(val_fraction * len(keys))), len(keys) - 1)
    held_out = order[len(keys) - count :]  # the end, as each class starts in front
    held_out = held_out[stratified(labels[held_out], np.arange(count))]
    splits = [TRAIN] * len(keys)
    for rank, i in enumerate(held_out):
        splits[i] = TEST if rank < (count + 1) // 2 else VAL
    return splits


def find_classes(
    path: str, questions: Sequence[str], names: dict[str, Sequence[Sequence[str]]]
) -> dict[str, tuple[str, ...]]:
    """The classes of each question. names: {split: labels of each example}.

    Raises ValueError if there is only one class, or a held-out one without training examples.
    """
    classes = {}
    for q, question in enumerate(questions):
        known = {labels[q] for labels in names[TRAIN]}
        unseen = {labels[q] for split in (VAL, TEST) for labels in names[split]} - known
        if unseen:
            shown = ", ".join(map(repr, sorted(unseen)[:3]))
            if len(unseen) > 3:
                shown += ", ..."
            raise ValueError(
                f"{path}: {counted(len(unseen), 'classes')} of {question!r} held out and not in "
                f"training ({shown}): each needs two examples at least, so add some or remove the "
                "class"
            )
        if len(known) < 2:
            raise ValueError(
                f"{path}: all labels of {question!r} are {min(known)!r}: need two classes"
            )
        classes[question] = tuple(sorted(known))
    return classes


# ---- the data of a task --------------------------------------------------------------------------


class Examples(NamedTuple):
    """The examples of one split."""

    inputs: Any  # a list of n rows of token ids; or images, uint8 (n, C, H, W), on disk
    names: list[Sequence[str]]  # labels of each example, one for each question
    clusters: list[str]  # the file or font of each; of the user's own examples each is alone


class TaskData:
    """Batches of a task. `texts` and `pictures`, below, read its examples."""

    def __init__(
        self,
        config: TaskConfig,
        questions: Sequence[str],
        splits: dict[str, Examples],
        batch_size: int,
        seed: int,
        about: str,
        content: str,
        tokenizer: Tokenizer | None = None,
    ):
        """about: a report of the reading, for the description; content: a hash of the examples;
        tokenizer: None for pictures.

        Raises ValueError for labels that make no task, or if config.labels are more than there are.
        """
        if batch_size < 1 or seed < 0:
            raise ValueError(f"batch size {batch_size} must be at least 1, seed {seed} at least 0")
        names = {split: examples.names for split, examples in splits.items()}
        self.classes = find_classes(config.path, questions, names)
        self.inputs = {split: examples.inputs for split, examples in splits.items()}
        self.clusters = {split: examples.clusters for split, examples in splits.items()}
        # What a cluster is, where there are any.
        self.cluster = CLUSTERS.get(config.path, "files" if tokenizer else "fonts")
        self.labels = {split: self.numbered(names[split]) for split in SPLITS}  # int64 (n, M)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.unit = "texts" if tokenizer else "images"
        self.units_per_row = 1

        # The training examples to use.
        found = len(self.labels[TRAIN])
        if config.labels > found:
            raise ValueError(
                f"--data.labels {config.labels} of {counted(found, 'training examples')}: use at "
                f"most {found}"
            )
        order = stratified(self.labels[TRAIN], np.random.default_rng(seed).permutation(found))
        self.chosen = np.sort(order[: config.labels or found])

        digest = hashlib.sha256(f"{content} {self.classes}".encode()).hexdigest()
        self.fingerprint = f"{FORMAT}-{digest}"  # which version of the code split the examples
        self.description = self.describe(config, about)

    def numbered(self, names: Sequence[Sequence[str]]) -> np.ndarray:
        """The index of each label among the classes of its question, int64 (n, M)."""
        places = [{name: i for i, name in enumerate(own)} for own in self.classes.values()]
        rows = [[place[label] for place, label in zip(places, labels)] for labels in names]
        return np.array(rows, dtype=np.int64)

    def baselines(self) -> dict[str, dict[str, float]]:
        """Accuracies without a model, on the test labels of each question: "chance", of a random
        class; "commonest", of always the class that is most common in training."""
        lines = {}
        for q, (question, names) in enumerate(self.classes.items()):
            commonest = np.bincount(self.labels[TRAIN][:, q]).argmax()
            share = float((self.labels[TEST][:, q] == commonest).mean())
            lines[question] = {"chance": 1 / len(names), "commonest": share}
        return lines

    def describe(self, config: TaskConfig, about: str) -> str:
        """The line that train.py prints about the data."""
        total = len(self.labels[TRAIN])
        used = f"{len(self.chosen):,} of {total:,}" if config.labels else f"{total:,}"
        val = len(self.labels[VAL])
        test = counted(len(self.labels[TEST]), f"test {self.unit}")
        counts = f"{used} training, {val:,} validation and {test}"
        parts = [f"{config.path}: {counts}", about]
        for question, line in self.baselines().items():
            classes = counted(len(self.classes[question]), "classes")
            parts.append(
                f"{question}: {classes}, accuracy by chance "
                f"{line['chance']:.1%}, of always the most common class {line['commonest']:.1%}"
            )
        return "; ".join(parts)

    def read(self, split: str, index: np.ndarray) -> dict[str, Tensor]:
        """Rows `index` (int64) of a split, B of them. "labels": int64 (B, M), and

        for texts "tokens", int64 (B, T), and "mask", bool (B, T), False where a row is padded;
        for pictures "images", float32 (B, C, H, W) in [-1, 1].
        """
        labels = torch.from_numpy(self.labels[split][index])
        if self.tokenizer is None:
            images = torch.from_numpy(self.inputs[split][index]).float() / 127.5 - 1
            return {"images": images, "labels": labels}
        rows = [self.inputs[split][i] for i in index]
        tokens = np.full((len(rows), max(map(len, rows))), self.tokenizer.eot, dtype=np.int64)
        mask = np.arange(tokens.shape[1]) < np.array([[len(row)] for row in rows])  # (B, T)
        tokens[mask] = np.concatenate(rows)
        return {
            "tokens": torch.from_numpy(tokens),
            "mask": torch.from_numpy(mask),
            "labels": labels,
        }

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """`rows` of the global batch of `step`, with the fields of `read`."""
        samples = np.arange(self.batch_size, dtype=np.int64)[rows] + step * self.batch_size
        return self.read(TRAIN, self.chosen[shuffle(samples, len(self.chosen), self.seed)])

    def val_batches(self, rows: int) -> Iterator[dict[str, Tensor]]:
        """The validation examples; see `split_batches`."""
        return self.split_batches(VAL, rows)

    def split_batches(self, split: str, rows: int) -> Iterator[dict[str, Tensor]]:
        """All examples of a split, each once and in the same order, `rows` at a time."""
        size = len(self.labels[split])
        for first in range(0, size, rows):
            yield self.read(split, np.arange(first, min(first + rows, size)))

    def metrics(self, loss: float) -> dict[str, float]:
        """No metrics beyond the loss; the classifier's are those of heads.score."""
        return {}


# ---- texts ---------------------------------------------------------------------------------------


def without_near(rows: Sequence[labelled.Row], report: Report) -> list[labelled.Row]:
    """Leave out texts that are nearly one before: the two could be in two splits."""
    seen = dedupe.Seen(INDEX_MB)
    kept = []
    for number, row in enumerate(rows, 1):
        reason = dedupe.add_new(seen, row.source)
        if reason:
            report.skip(f"{reason} of a text before", f"text {number}")
            report.used -= 1
            continue
        kept.append(row)
    return kept


def read_passages(config: TaskConfig, report: Report) -> tuple[Sequence[str], list[Passage]]:
    """The questions of a task of texts, and its passages."""
    if config.path == "packages":
        return ("package",), packages.examples(report)
    if config.path in ratings.SETS:
        return ("sentiment",), ratings.examples(config.path, report)
    questions = config.label_columns
    rows = labelled.text_rows(config.path, report, config.input_column, questions)
    rows = without_near(rows, report)
    names = [row.labels for row in rows]
    sources = [row.source for row in rows]
    splits = hold_out(names, sources, config.val_fraction)
    return questions, [
        Passage(row.source, row.labels, split, source=row.source)
        for row, split in zip(rows, splits)
    ]


def texts(
    config: TaskConfig, tokenizer: Tokenizer, context_length: int, batch_size: int, seed: int
) -> TaskData:
    """The task for a model that reads up to context_length tokens; longer texts lose their end.

    Raises ValueError for a task of pictures, and as data/labelled.py and TaskData do.
    """
    if config.path in PICTURES:
        raise ValueError(f"{config.path} are pictures, the model reads text: {', '.join(TEXTS)}")
    report = Report()
    questions, passages = read_passages(config, report)
    encoded = tokenizer.encode_batch([passage.text for passage in passages])
    cut = sum(len(ids) > context_length for ids in encoded)
    if cut:
        report.notes.append(f"{cut:,} cut to {context_length} tokens")
    content = hashlib.sha256()
    splits = {split: Examples([], [], []) for split in SPLITS}
    for ids, passage in zip(encoded, passages):
        kept = ids[:context_length]
        splits[passage.split].inputs.append(np.array(kept, dtype=np.int64))
        splits[passage.split].names.append(passage.labels)
        splits[passage.split].clusters.append(passage.source)
        content.update(repr((kept, passage.labels, passage.split)).encode())
    digest = f"{content.hexdigest()} {tokenizer.fingerprint()}"
    return TaskData(config, questions, splits, batch_size, seed, str(report), digest, tokenizer)


# ---- pictures ------------------------------------------------------------------------------------


def prepare_pictures(config: TaskConfig, image_size: int, channels: int) -> Path:
    """The folder with the pictures of a task; it is built if it does not exist."""
    report = Report()
    if config.path in PICTURES:
        from data import scripts  # here, as it loads font libraries

        name = config.path
        version = scripts.version(config.path)
        records = scripts.records(config.path, image_size, channels, report)
    else:
        rows = labelled.picture_rows(config.path, report, config.input_column, config.label_columns)
        splits = labelled.folder_splits(config.path, rows)
        given = set(splits) - {""}
        # What your folders hold out comes first: training loses the pictures that are near to it.
        order = sorted(range(len(rows)), key=lambda i: not splits[i])
        rows = [rows[i] for i in order]
        splits = [splits[i] for i in order]
        # Draw what they do not say.
        free = [row for row, split in zip(rows, splits) if not split]
        drawn = [TRAIN] * len(free)
        if given != {VAL, TEST}:
            keys = [f"{row.labels} {Path(row.source).name}" for row in free]
            drawn = hold_out([row.labels for row in free], keys, config.val_fraction)
        drawn = [TRAIN if split in given else split for split in drawn]
        splits[len(rows) - len(free) :] = drawn
        name = name_of(config.path, "pictures")
        version = f"{labelled.version(rows)} {config.val_fraction}"
        records = labelled.records(rows, splits, image_size, channels, report)
    folder = prepared_folder(config.cache, name, (FORMAT, version, image_size, channels))
    if not folder.exists():
        # The captions are the labels. Their tokens are not used: bytes need no training.
        build(folder, records, report, SPLITS, lambda captions: ByteTokenizer(), context_length=256)
    return folder


def pictures(
    config: TaskConfig, image_size: int, channels: int, batch_size: int, seed: int
) -> TaskData:
    """The task for a model of pictures (channels, image_size, image_size).

    Raises ValueError for a task of texts, and as data/labelled.py and TaskData do.
    """
    if config.path in TEXTS:
        raise ValueError(
            f"{config.path} are texts, the model reads {' or '.join(PICTURES)}, or your own "
            "pictures: give one of these as --data.path"
        )
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
            f"{config.path}: too few pictures for training, validation and test: "
            f"{manifest['report']}"
        )
    found = open_splits(folder, manifest, np.dtype(np.uint16))
    splits = {}
    for name, split in found.items():
        # The caption after the labels is the font, if the source has one.
        rows = enumerate(split.captions)
        clusters = [own[len(questions)] if own[len(questions) :] else str(i) for i, own in rows]
        splits[name] = Examples(split.images, split.captions, clusters)
    content = json.dumps([manifest["image"], manifest["rows"], manifest["sha256"]])
    return TaskData(config, questions, splits, batch_size, seed, manifest["report"], content)
