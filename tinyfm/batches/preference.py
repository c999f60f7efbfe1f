"""Pairs of answers, and prompts -> batches: the data of adapt/preference.py.

A pair is a prompt with a better and a worse answer: {"prompt", "chosen", "rejected"} a line, from
any table that data/tables.py reads. Of rated sentences (data/ratings.py), each that its raters
found positive is paired with a negative one of the same split; the prompt is empty. A row is

    EOT prompt | answer EOT

Prompt and answer are encoded separately. So the answer's tokens are those that sampling generates,
and a reward or a loss counts these alone. Rows that do not fit into the context are left out whole:
a cut answer is another answer.

Pairs with the same prompt are in the same split, and a hash of the prompt decides which (of the
better answer, if there is no prompt). Half of what is held out is validation, half is test.

Legend: B batch, T tokens, P tokens of the longest prompt.
Left out: near duplicates of prompts, conversations, pairs larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from data import functions, ratings, reading, tables
from data.report import Report, counted
from data.splits import SPLITS, TEST, TRAIN, VAL
from tinyfm.adapt.preference import Batch, pad_rows
from tinyfm.batches.order import check_val_fraction, hash_order, held_out_count, shuffle
from tinyfm.common.config import DataPath, FolderPath, RunPath, may_change
from tinyfm.common.folders import temporary_name
from tinyfm.tokenizer import Tokenizer

FORMAT = 1  # of the splits
FUNCTIONS = "functions"
SHOWN = 64  # validation prompts that are answered at each evaluation
START_WORDS = 4  # of a rated sentence, which are the prompt for the rest
FORM = '{"prompt": "...", "chosen": "...", "rejected": "..."} a line'


@dataclass(frozen=True)
class PairConfig:
    """Which pairs to learn from."""

    # films, products, editorials or tweets (rated sentences), or a file, folder or "glob" of pairs,
    # such as jsonl with {"prompt": "...", "chosen": "...", "rejected": "..."} a line
    path: DataPath = "films"
    tokenizer: FolderPath = ""  # folder with a saved tokenizer (default: that of the base run)
    # share of your own pairs held out, half for validation and half for test
    val_fraction: float = 0.1
    # folder for the reference's log-probabilities of the answers
    cache: FolderPath = may_change("data/cache")

    def __post_init__(self):
        if not self.path:
            raise ValueError("--data.path must not be empty")
        check_val_fraction(self.val_fraction)


@dataclass(frozen=True)
class PromptConfig:
    """Which prompts to answer, and for which reward."""

    # parses: 1 for a function that Python's compiler accepts; positive: the reward of --data.judge
    reward: Literal["parses", "positive"] = "parses"
    judge: RunPath = ""  # run of --task reward that gives the reward "positive"
    # functions (of Python's standard library), films or other rated sentences, or your own jsonl
    # with {"prompt": "..."} a line; auto = functions to parse, and films for a judge
    path: DataPath = "auto"
    tokenizer: FolderPath = ""  # folder with a saved tokenizer (default: that of the base run)
    # share of your own prompts held out, half for validation and half for test
    val_fraction: float = 0.1

    def __post_init__(self):
        if not self.path:
            raise ValueError("--data.path must not be empty")
        if (self.reward == "positive") != bool(self.judge):
            raise ValueError(
                "--data.reward positive needs --data.judge RUN, a run of --task reward, and "
                "parses takes none"
            )
        check_val_fraction(self.val_fraction)

    @property
    def source(self) -> str:
        """The path, with auto resolved."""
        if self.path != "auto":
            return self.path
        return FUNCTIONS if self.reward == "parses" else "films"


# ---- splits --------------------------------------------------------------------------------------


def split_by_key(keys: Sequence[str], fraction: float) -> list[str]:
    """The split of each of n examples; equal keys are in one split.

    At least one key is validation. Raises ValueError for fewer than two different keys.
    """
    different = sorted(set(keys))
    if len(different) < 2:
        raise ValueError(f"{counted(len(different), 'prompts')}: give two, one of them to hold out")
    contents = [key.encode("utf-8", "replace") for key in different]
    order = [different[i] for i in hash_order(contents)]
    count = held_out_count(len(order), fraction)
    middle = (count + 1) // 2
    splits = dict.fromkeys(order, TRAIN)
    splits |= dict.fromkeys(order[:middle], VAL)
    splits |= dict.fromkeys(order[middle:count], TEST)
    return [splits[key] for key in keys]


def read_own(path: str, read: Callable[[dict], Any], report: Report) -> Iterator[Any]:
    """What `read` makes of each row of the tables that a path names, each once.

    A row for which it raises ValueError is skipped, with the reason.
    """
    seen = set()
    for file in reading.find(path, report):
        for place, fields in tables.records(file, report):
            try:
                found = read(fields)
            except ValueError as error:
                report.skip(str(error), place)
                continue
            if found in seen:
                report.skip("the same as a row before", place)
                continue
            seen.add(found)
            report.used += 1
            yield found


# ---- pairs ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    prompt: str
    chosen: str
    rejected: str


def read_pair(fields: dict) -> Pair:
    """A pair from a row of a table. Raises ValueError with the reason if it is none."""
    for name in Pair._fields:
        value = fields.get(name)
        if value is None:
            more = ': give "" for answers to nothing' if name == "prompt" else ""
            raise ValueError(f"no {name!r}{more}")
        if not isinstance(value, str):
            raise ValueError(f"{name!r} is no text; conversations are not read")
    pair = Pair(*(fields[name] for name in Pair._fields))
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise ValueError("an empty answer")
    if pair.chosen == pair.rejected:
        raise ValueError("chosen equals rejected")
    return pair


def rated_pairs(name: str, report: Report) -> Iterator[tuple[str, Pair]]:
    """(split, pair) of positive and negative sentences of a set, in an order by their hashes."""
    found = [row for row in ratings.rows(name, report) if row.mean]
    order = hash_order([row.text.encode("utf-8", "replace") for row in found])
    for split in SPLITS:
        own = [found[i] for i in order if found[i].split == split]
        positive = [row.text for row in own if row.mean > 0]
        negative = [row.text for row in own if row.mean < 0]
        for better, worse in zip(positive, negative):
            yield split, Pair("", better, worse)


def read_pairs(config: PairConfig, report: Report) -> list[tuple[str, Pair]]:
    """(split, pair) of all that can be used. Raises ValueError if there are fewer than two."""
    if config.path in ratings.SETS:
        return list(rated_pairs(config.path, report))
    pairs = list(read_own(config.path, read_pair, report))
    if not pairs:
        raise ValueError(f"no pair to learn from in {config.path!r}: {report}; give {FORM}")
    try:
        splits = split_by_key([pair.prompt or pair.chosen for pair in pairs], config.val_fraction)
    except ValueError as error:
        raise ValueError(f"{config.path!r} has pairs of {error}") from error
    return list(zip(splits, pairs))


class Row(NamedTuple):
    """The ids of a pair: prompt and better answer, prompt and worse answer; where answers start."""

    chosen: list[int]
    rejected: list[int]
    start: int


def encode_pair(tokenizer: Tokenizer, pair: Pair) -> Row:
    prompt = [tokenizer.eot, *tokenizer.encode(pair.prompt)]
    ends = [[*tokenizer.encode(text), tokenizer.eot] for text in (pair.chosen, pair.rejected)]
    return Row(prompt + ends[0], prompt + ends[1], len(prompt))


class PairData:
    """Batches of pairs: tokens (B, 2, T + 1) and mask (B, 2, T), the better answer first.

    After `add_reference` also "reference", float32 (B, 2).
    """

    unit = "pairs"
    units_per_row = 1

    def __init__(
        self,
        config: PairConfig,
        tokenizer: Tokenizer,
        context_length: int,
        batch_size: int,
        seed: int,
    ):
        """Read and encode. Raises ValueError if nothing to train on, or to validate on, is left."""
        self.config = config
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.references: dict[str, np.ndarray] = {}
        report = Report()
        self.splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
        longest = 0
        lost = 0
        for split, pair in read_pairs(config, report):
            row = encode_pair(tokenizer, pair)
            size = max(len(row.chosen), len(row.rejected))
            longest = max(longest, size)
            if size > context_length:
                lost += 1
                continue
            self.splits[split].append(row)
        if lost:
            report.note(f"{counted(lost, 'pairs')} longer than the context of {context_length}")
        if not self.splits[TRAIN] or not self.splits[VAL]:
            raise ValueError(
                f"{config.path!r} leaves no pair to train or to validate on: the longest has "
                f"{longest} tokens and the context {context_length}; use shorter pairs, or a base "
                "with a longer context"
            )
        content = json.dumps(self.splits) + tokenizer.fingerprint()
        self.fingerprint = f"{FORMAT}-{hashlib.sha256(content.encode()).hexdigest()}"
        counts = [f"{len(self.splits[split]):,} {split}" for split in SPLITS]
        self.description = f"{config.path}: pairs of answers, {', '.join(counts)}; {report}"

    def prompts(self, split: str) -> list[list[int]]:
        """The different prompts of a split."""
        found = [tuple(row.chosen[: row.start]) for row in self.splits[split]]
        return [list(prompt) for prompt in dict.fromkeys(found)]

    def add_reference(self, log_probs: Callable[..., torch.Tensor], base_hash: str) -> None:
        """Compute ln q of all answers, or read it from the cache.

        log_probs: of (tokens (n, T + 1), mask (n, T)), as adapt/preference.py has it. base_hash: of
        the reference's weights. The file's name is a hash of it and of the data.
        """
        key = hashlib.sha256(f"{self.fingerprint} {base_hash}".encode()).hexdigest()[:16]
        path = Path(self.config.cache, f"reference-{key}.npz")
        if path.is_file():
            try:
                with np.load(path) as found:
                    self.references = {split: found[split] for split in SPLITS}
                return
            except (ValueError, OSError, KeyError) as error:
                raise ValueError(f"{path} is damaged ({error}): delete it") from error
        for split, rows in self.splits.items():
            sums = np.zeros((len(rows), 2), dtype=np.float32)
            # Pairs of similar length go together: less padding is read.
            order = sorted(range(len(rows)), key=lambda i, rows=rows: max(map(len, rows[i][:2])))
            for first in range(0, len(rows), 32):
                some = order[first : first + 32]
                batch = self.collate([rows[i] for i in some])
                found = log_probs(*(batch[name].flatten(0, 1) for name in ("tokens", "mask")))
                sums[some] = found.sum(1).view(-1, 2).cpu().numpy()
            self.references[split] = sums
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        with open(temporary, "wb") as file:
            np.savez(file, **self.references)
        os.replace(temporary, path)

    def collate(self, rows: Sequence[Row]) -> Batch:
        answers = [ids for row in rows for ids in (row.chosen, row.rejected)]
        batch = pad_rows(answers, [row.start for row in rows for _ in range(2)], self.tokenizer.eot)
        return {name: tensor.unflatten(0, (-1, 2)) for name, tensor in batch.items()}

    def read(self, split: str, index: Iterable[int]) -> Batch:
        """The pairs of a split with these numbers."""
        index = list(index)
        batch = self.collate([self.splits[split][i] for i in index])
        if self.references:
            batch["reference"] = torch.from_numpy(self.references[split][index])
        return batch

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """`rows` of the global batch of `step`."""
        samples = np.arange(self.batch_size, dtype=np.int64)[rows] + step * self.batch_size
        return self.read(TRAIN, shuffle(samples, len(self.splits[TRAIN]), self.seed))

    def val_batches(self, rows: int) -> Iterator[Batch]:
        return self.split_batches(VAL, rows)

    def split_batches(self, split: str, rows: int) -> Iterator[Batch]:
        """All pairs of a split, `rows` at a time."""
        size = len(self.splits[split])
        for first in range(0, size, rows):
            yield self.read(split, range(first, min(first + rows, size)))

    def metrics(self, loss: float) -> dict[str, float]:
        """No metrics beyond the loss; the recipe has the others."""
        return {}


# ---- prompts -------------------------------------------------------------------------------------


def read_prompt(fields: dict) -> str:
    """The prompt of a row of a table. Raises ValueError with the reason if it has none."""
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise ValueError('no "prompt" that is a text')
    return prompt


def read_prompts(config: PromptConfig, report: Report) -> list[tuple[str, str]]:
    """(split, prompt) of all prompts. Raises ValueError if there are fewer than two."""
    source = config.source
    if source == FUNCTIONS:
        return [(found.split, found.text) for found in functions.documents(report)]
    if source in ratings.SETS:
        starts = {}
        for row in ratings.rows(source, report):
            words = row.text.split()
            if len(words) > START_WORDS:
                starts.setdefault(" ".join(words[:START_WORDS]), row.split)
        return [(split, prompt) for prompt, split in starts.items()]
    prompts = list(read_own(source, read_prompt, report))
    if not prompts:
        raise ValueError(f'no prompt in {source!r}: {report}; give {{"prompt": "..."}} a line')
    try:
        return list(zip(split_by_key(prompts, config.val_fraction), prompts))
    except ValueError as error:
        raise ValueError(f"{source!r} has {error}") from error


class PromptData:
    """Batches of prompts: "prompts", int64 (B, P), filled up on the right, and "lengths" (B,)."""

    unit = "prompts"
    units_per_row = 1

    def __init__(
        self, config: PromptConfig, tokenizer: Tokenizer, room: int, batch_size: int, seed: int
    ):
        """room: the most tokens of a prompt; longer ones are left out.

        Raises ValueError if nothing to train on, or to validate on, is left.
        """
        self.path = config.source
        # The start of a sentence, or of a function, is a part of what is judged.
        self.whole = self.path in (FUNCTIONS, *ratings.SETS)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        report = Report()
        found = read_prompts(config, report)
        self.splits: dict[str, list[list[int]]] = {split: [] for split in SPLITS}
        lost = 0
        for (split, _), ids in zip(found, tokenizer.encode_batch([text for _, text in found])):
            if len(ids) + 1 > room:
                lost += 1
            else:
                self.splits[split].append([tokenizer.eot, *ids])
        if lost:
            report.note(f"{counted(lost, 'prompts')} longer than {counted(room, 'tokens')}")
        # Validation reads the first ones of a split: they are in an order by their hashes.
        for split, rows in self.splits.items():
            self.splits[split] = [rows[i] for i in hash_order([repr(ids).encode() for ids in rows])]
        if not self.splits[TRAIN] or not self.splits[VAL]:
            raise ValueError(
                f"{self.path!r} leaves no prompt to train or to validate on: {report}; give "
                "shorter prompts, or --grpo.max-new-tokens a smaller number"
            )
        content = json.dumps(self.splits) + tokenizer.fingerprint()
        self.fingerprint = f"{FORMAT}-{hashlib.sha256(content.encode()).hexdigest()}"
        counts = [f"{len(self.splits[split]):,} {split}" for split in SPLITS]
        self.description = f"{self.path}: prompts, {', '.join(counts)}; {report}"

    def prompts(self, split: str) -> list[list[int]]:
        return self.splits[split]

    def collate(self, rows: Sequence[list[int]]) -> Batch:
        prompts = pad_rows(rows, [1] * len(rows), self.tokenizer.eot)["tokens"]
        return {"prompts": prompts, "lengths": torch.tensor([len(ids) for ids in rows])}

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """`rows` of the global batch of `step`."""
        samples = np.arange(self.batch_size, dtype=np.int64)[rows] + step * self.batch_size
        own = self.splits[TRAIN]
        return self.collate([own[i] for i in shuffle(samples, len(own), self.seed)])

    def val_batches(self, rows: int) -> Iterator[Batch]:
        """The first SHOWN prompts of validation, `rows` at a time."""
        own = self.splits[VAL][:SHOWN]
        for first in range(0, len(own), rows):
            yield self.collate(own[first : first + rows])

    def metrics(self, loss: float) -> dict[str, float]:
        """No metrics beyond the loss; the recipe has the others."""
        return {}
