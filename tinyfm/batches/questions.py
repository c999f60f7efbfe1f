"""Questions, and the passages that answer them -> batches: the data of adapt/embedder.py.

A pair is a question with the passage that answers it: those of BoolQ (data/passages.py), or
{"question", "passage"} a line, from any table that data/tables.py reads. A passage may answer
several questions. All of these are in one split, that of the passage; of your own, a hash of the
passage decides. A question that occurs again is left out, since both passages would answer it.

Mined negatives are passages that have the words of a question and do not answer it: those of the
training split that BM25 ranks highest, without the right one. (Of BoolQ, also without others of its
article: they may answer it too.) They are found once and kept in the cache. A row has `negatives`
of the MINED best: neighbours in the ranking, from a random place on.

Texts longer than the model reads lose their end, and are counted.

Legend: B batch, k negatives a question, T tokens of the longest text of a batch.
Left out: near duplicates of passages, passages larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import passages as boolq
from data.report import Report, counted
from data.splits import SPLITS, TRAIN, VAL
from tinyfm.batches.order import check_val_fraction, fixed_order, shuffle
from tinyfm.batches.preference import read_own, split_by_key
from tinyfm.common.config import DataPath, FolderPath, may_change
from tinyfm.common.folders import temporary_name
from tinyfm.retrieval import BM25
from tinyfm.tokenizer import Tokenizer

QUESTIONS = "questions"
FORMAT = 1  # of the splits, and of the mined negatives
MINED = 20  # negatives that are found for a question, at most
FORM = '{"question": "...", "passage": "..."} a line'


@dataclass(frozen=True)
class QuestionConfig:
    """Which questions and passages to learn from."""

    # questions (of BoolQ), or a file, folder or "glob" of pairs, such as jsonl with
    # {"question": "...", "passage": "..."} a line
    path: DataPath = QUESTIONS
    tokenizer: FolderPath = ""  # folder with a saved tokenizer (default: that of the base run)
    negatives: int = 1  # mined negatives of a question in a batch: passages with its words
    # share of your own passages held out, half for validation and half for test
    val_fraction: float = 0.1
    cache: FolderPath = may_change("data/cache")  # folder for the mined negatives

    def __post_init__(self):
        if not self.path:
            raise ValueError("--data.path must not be empty")
        if not 0 <= self.negatives <= MINED:
            raise ValueError(f"--data.negatives {self.negatives}: it must be from 0 to {MINED}")
        check_val_fraction(self.val_fraction)


# ---- reading -------------------------------------------------------------------------------------


class Pair(NamedTuple):
    question: str
    passage: str


class Source(NamedTuple):
    """Pairs, their splits, and for each passage what it is about: equal if from one article."""

    pairs: list[Pair]
    splits: list[str]
    about: dict[str, str]


def read_pair(fields: dict) -> Pair:
    """A pair from a row of a table. Raises ValueError with the reason if it is none."""
    for name in Pair._fields:
        value = fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"no {name!r} that is a text")
    return Pair(*(fields[name].strip() for name in Pair._fields))


def read_source(config: QuestionConfig, report: Report) -> Source:
    """All pairs. Raises ValueError if there are fewer than two passages."""
    if config.path == QUESTIONS:
        found = list(boolq.questions())
        pairs = [Pair(row.text, row.passage) for row in found]
        about = {pair.passage: boolq.title_of(pair.passage) for pair in pairs}
        report.found = report.used = len(pairs)
        return Source(pairs, [row.split for row in found], about)
    pairs = list(read_own(config.path, read_pair, report))
    if not pairs:
        raise ValueError(f"no pair to learn from in {config.path!r}: {report}; give {FORM}")
    texts = [pair.passage for pair in pairs]
    try:
        splits = split_by_key(texts, config.val_fraction)
    except ValueError as error:
        raise ValueError(f"{config.path!r} has the passages of {error}") from error
    return Source(pairs, splits, {text: text for text in texts})


# ---- mined negatives -----------------------------------------------------------------------------


def mine(
    questions: Sequence[str],
    right: Sequence[int],
    passages: Sequence[str],
    articles: Sequence[int],
    allowed: Sequence[int],
) -> np.ndarray:
    """For each of n questions the passages that BM25 ranks highest: numbers, int64 (n, m).

    right: the number of each question's passage; articles: that of each passage, and passages of
    the right one's are left out. allowed: the passages to search. m is MINED, or fewer where some
    question has not so many.
    """
    index = BM25([passages[i] for i in allowed])
    allowed = np.array(allowed)
    article = np.array(articles)
    searched = article[allowed]
    m = min(MINED, len(allowed) - int(np.bincount(searched).max()))
    found = np.zeros((len(questions), m), dtype=np.int64)
    bar = tqdm(questions, "mining negatives", unit=" questions", leave=False, delay=2, disable=None)
    for row, question in enumerate(bar):
        scores = index.scores(question)
        scores[searched == article[right[row]]] = -np.inf
        found[row] = allowed[np.argsort(-scores, kind="stable")[:m]]
    return found


def read_mined(path: Path, shape: tuple[int, ...], count: int) -> np.ndarray:
    """Negatives from the cache, numbers below `count`. Raises ValueError for a damaged file."""
    try:
        found = np.load(path)
        if found.dtype != np.int64 or found.shape[:1] != shape or found.ndim != 2:
            raise ValueError(f"it has {found.dtype} {found.shape}")
        if found.size and not 0 <= found.min() <= found.max() < count:
            raise ValueError(f"it names passages from {found.min()} to {found.max()}")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it") from error
    return found


# ---- batches -------------------------------------------------------------------------------------


class Row(NamedTuple):
    question: str
    passage: int  # its number
    ids: list[int]  # of the question, cut


def fill_up(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """n rows of ids -> (ids filled up with 0, int64 (n, T); lengths (n,))."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for out, row in zip(ids, rows):
        out[: len(row)] = torch.tensor(row, dtype=torch.long)
    return ids, lengths


class QuestionData:
    """Batches of questions with their passages, and with mined negatives."""

    unit = "pairs"
    units_per_row = 1

    def __init__(
        self,
        config: QuestionConfig,
        tokenizer: Tokenizer,
        length: int,
        batch_size: int,
        seed: int,
    ):
        """Read, encode and mine. length: the most tokens of a text.

        Raises ValueError if a split has too few questions, or there are too few negatives.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        report = Report()
        source = read_source(config, report)
        numbers = {text: i for i, text in enumerate(source.about)}
        self.texts = list(source.about)  # of the passages, by number
        known = {name: i for i, name in enumerate(dict.fromkeys(source.about.values()))}
        self.articles = [known[name] for name in source.about.values()]  # of each, a number
        self.parts = [TRAIN] * len(numbers)  # the split of each
        self.splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
        encoded = tokenizer.encode_batch([*self.texts, *(pair.question for pair in source.pairs)])
        rows = [ids[:length] or [tokenizer.eot] for ids in encoded]
        self.passages = rows[: len(numbers)]
        seen = set()
        for pair, split, ids in zip(source.pairs, source.splits, rows[len(numbers) :]):
            number = numbers[pair.passage]
            self.parts[number] = split
            if pair.question.lower() not in seen:
                seen.add(pair.question.lower())
                self.splits[split].append(Row(pair.question, number, ids))
        repeated = len(source.pairs) - len(seen)
        if repeated:
            report.note(f"{counted(repeated, 'questions')} left out, asked before")
        cut = sum(len(ids) > length for ids in encoded)
        if cut:
            report.note(f"{counted(cut, 'texts')} cut to the {length:,} tokens that are read")
        for split in (TRAIN, VAL):
            if len({row.passage for row in self.splits[split]}) < 2:
                raise ValueError(
                    f"{config.path!r} has too few passages ({report}): the {split} split needs "
                    "questions on two, to compare them; give more pairs, or another "
                    "--data.val-fraction"
                )
        content = json.dumps([self.splits, self.texts, self.parts]) + tokenizer.fingerprint()
        self.fingerprint = f"{FORMAT}-{hashlib.sha256(content.encode()).hexdigest()}"
        self.mined = self._mine() if config.negatives else None
        counts = [f"{len(self.splits[split]):,} {split}" for split in SPLITS]
        self.description = (
            f"{config.path}: questions, {', '.join(counts)}, on {len(self.texts):,} passages; "
            f"{report}"
        )

    def _mine(self) -> dict[str, np.ndarray]:
        """{split: numbers of negatives (n, m)}, from the cache if they were found before."""
        rows = [row for split in SPLITS for row in self.splits[split]]
        questions = [row.question for row in rows]
        right = [row.passage for row in rows]
        content = [FORMAT, MINED, questions, right, self.texts, self.parts, self.articles]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        path = Path(self.config.cache, f"negatives-{key}.npy")
        if path.is_file():
            found = read_mined(path, (len(rows),), len(self.texts))
        else:
            allowed = [i for i, split in enumerate(self.parts) if split == TRAIN]
            found = mine(questions, right, self.texts, self.articles, allowed)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_name(path)
            with open(temporary, "wb") as file:
                np.save(file, found)
            os.replace(temporary, path)
        if found.shape[1] < self.config.negatives:
            raise ValueError(
                f"--data.negatives {self.config.negatives}: {self.config.path!r} has only "
                f"{counted(found.shape[1], 'other passages')} in training for some question"
            )
        ends = np.cumsum([len(self.splits[split]) for split in SPLITS])
        return dict(zip(SPLITS, np.split(found, ends[:-1])))

    def collate(self, rows: Sequence[Row], negatives: np.ndarray) -> dict[str, Tensor]:
        """Rows with the numbers of their negatives (B, k) -> a batch, as Embedder.loss reads it."""
        right = np.array([row.passage for row in rows])
        numbers = np.concatenate((right[:, None], negatives), 1)  # (B, 1 + k)
        questions, question_lengths = fill_up([row.ids for row in rows])
        passages, lengths = fill_up([self.passages[i] for i in numbers.flatten()])
        return {
            "questions": questions,
            "question_lengths": question_lengths,
            "passages": passages.unflatten(0, numbers.shape),
            "passage_lengths": lengths.unflatten(0, numbers.shape),
            "ids": torch.from_numpy(numbers),
        }

    def read(self, split: str, index: np.ndarray, start: np.ndarray) -> dict[str, Tensor]:
        """The pairs of a split with these numbers (B,). start (B,) in [0, 1): where in the ranking
        of its negatives each takes its own."""
        k = self.config.negatives
        negatives = np.zeros((len(index), 0), dtype=np.int64)
        if k:
            own = self.mined[split][index]  # (B, m)
            first = (start * (own.shape[1] - k + 1)).astype(np.int64)
            negatives = np.take_along_axis(own, first[:, None] + np.arange(k), 1)
        return self.collate([self.splits[split][i] for i in index], negatives)

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """`rows` of the global batch of `step`."""
        samples = np.arange(self.batch_size, dtype=np.int64)[rows] + step * self.batch_size
        index = shuffle(samples, len(self.splits[TRAIN]), self.seed)
        start = np.random.default_rng((self.seed, step)).random(self.batch_size)[rows]
        return self.read(TRAIN, index, start)

    def val_batches(self, rows: int) -> Iterator[dict[str, Tensor]]:
        return self.split_batches(VAL, rows)

    def split_batches(self, split: str, rows: int) -> Iterator[dict[str, Tensor]]:
        """A split, `rows` pairs at a time, in a random order that never changes.

        What is left over at the end is not read: the loss is lower in a smaller batch. A split of
        fewer than `rows` pairs is one batch, and one of a single pair none.
        """
        size = len(self.splits[split])
        order = fixed_order(size)
        rows = min(rows, size)
        if size < 2:
            return
        for first in range(0, size - rows + 1, rows):
            own = order[first : first + rows]
            yield self.read(split, own, np.zeros(len(own)))

    def metrics(self, loss: float) -> dict[str, float]:
        """No metrics beyond the loss; the recipe has the others."""
        return {}
