"""Token shards -> batches: what the GPT reads, and in which order.

A batch is a pure function of (seed, step). So there is no loader state to save, and a resumed run,
or one on another number of machines, sees the same data. Row r of step s is sample

    i = s * batch_size + r;   epoch, j = divmod(i, W)
    start = offset(epoch) + T * permutation(epoch)[j];   row = tokens[start : start + T + 1]

In words: an epoch starts at its own random offset in [0, T), cuts the M training tokens into W
windows, and takes each once, in its own random order. A window's last token is the first of the
next: a target in the one, an input in the other. The permutation is computed for the j that are
asked and never stored (see `permute`), so that a trillion tokens need no index.

Validation reads all val tokens in order and predicts each but the first exactly once. Its loss in
nats per token depends on the tokenizer; in bits per byte of the text, any two models compare:

    bits per byte = nats per token * predicted tokens / ln 2 / UTF-8 bytes

Legend: T context length, M training tokens, W windows of an epoch. Left out: a mask between the
documents of a window (as in GPT-2, attention may look across the end-of-text token).
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import docs, files, shakespeare, stdlib
from data.report import Report
from tinyfm import tokenizer as tokenizers
from tinyfm.batches.order import ROUNDS, permute
from tinyfm.batches.shards import Shards, build, read_manifest, rebuild_hint
from tinyfm.training import checkpoint

SOURCES = {"docs": docs, "stdlib": stdlib, "shakespeare": shakespeare}
LEARNED_TOKENIZERS = ("sentencepiece", "sentencepiece-unigram", "bpe")
FORMAT = 1  # of the prepared folders: with another number, all are built anew


@dataclass(frozen=True)
class TextConfig:
    """Which text to read, and how it becomes tokens."""

    # docs, stdlib, shakespeare, your own text file, folder or "glob", or what data/prepare.py made
    path: str = "docs"
    # sentencepiece, sentencepiece-unigram, bpe, bytes, or a run or folder with a saved tokenizer
    tokenizer: str = "sentencepiece"
    val_fraction: float = 0.1  # share of the text held out for validation
    cache: str = "data/cache"  # folder for the prepared shards

    def __post_init__(self):
        # Whether the paths exist is asked when they are read: a config outlives the machine.
        if not self.path or not self.tokenizer:
            raise ValueError("--data.path and --data.tokenizer must not be empty")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--data.val-fraction {self.val_fraction}: it must be between 0 and 1")


def count_windows(n_tokens: int, length: int) -> int:
    """Windows of an epoch: as many as fit whatever the offset, at least one."""
    return max(1, (n_tokens - length) // length)


def window_starts(index: np.ndarray, n_tokens: int, length: int, seed: int) -> np.ndarray:
    """First tokens of the windows of samples `index` (int64); a window is `length` + 1 tokens."""
    windows = count_windows(n_tokens, length)
    offsets = min(length, n_tokens - windows * length)  # fewer where a tiny text leaves no room
    starts = np.empty_like(index)
    for epoch in np.unique(index // windows):
        rows = index // windows == epoch
        random = np.random.SeedSequence((seed, int(epoch))).generate_state(ROUNDS + 1, np.uint64)
        offset, keys = int(random[0]) % offsets, random[1:]
        starts[rows] = offset + length * permute(index[rows] % windows, windows, keys)
    return starts


def find_source(path: str):
    """Return (name, documents(report=...), version) of a named set or of the user's own files."""
    if path in SOURCES:
        return path, SOURCES[path].documents, SOURCES[path].version()
    name = re.sub(r"[^\w-]+", "-", Path(path).name).strip("-") or "text"
    return name, partial(files.documents, path), files.version(path)


def fixed_tokenizer(name: str) -> tokenizers.Tokenizer | None:
    """The tokenizer that `name` stands for, or None if it is a kind that learns from the text."""
    if name == "bytes":
        return tokenizers.ByteTokenizer()
    if name in LEARNED_TOKENIZERS:
        return None
    if Path(name).is_dir():
        run = any(Path(name).glob("step-*/manifest.json"))
        return tokenizers.load(checkpoint.find(name) if run else name)
    kinds = ", ".join((*LEARNED_TOKENIZERS, "bytes"))
    raise ValueError(f"--data.tokenizer {name!r} is no folder and not one of the kinds {kinds}")


def check_vocabulary(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> None:
    """Raise ValueError if the model has no row for some token; rows to spare do no harm."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}: "
            f"set --model.vocab-size {tokenizer.vocab_size}"
        )


def prepare_folder(config: TextConfig, vocab_size: int) -> Path:
    """The folder with the shards of this text and tokenizer; it is built if it does not exist.

    Its name ends with a hash of all that the tokens depend on: change the text, the tokenizer or
    the split, and it is another folder. One that data/prepare.py made is taken as it is.
    """
    fixed, made = fixed_tokenizer(config.tokenizer), Path(config.path).expanduser()
    if config.path not in SOURCES and (made / "train-00000.bin").is_file():
        if fixed and fixed.fingerprint() != read_manifest(made)["tokenizer"]:
            advice = "leave out --data.tokenizer, it has its own"
            raise ValueError(f"{made} was made with another tokenizer: {advice}")
        return made
    if fixed is None:
        identity = f"{config.tokenizer} {vocab_size}"
        make_tokenizer = partial(tokenizers.train, config.tokenizer, vocab_size=vocab_size)
    else:
        check_vocabulary(fixed, vocab_size)  # now, rather than after hours of encoding
        identity, make_tokenizer = fixed.fingerprint(), lambda sample: fixed
    name, documents, version = find_source(config.path)
    key = json.dumps([FORMAT, version, identity, config.val_fraction])
    folder = Path(config.cache, f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    if not folder.exists():
        report = Report()
        build(folder, documents(report=report), report, make_tokenizer, config.val_fraction)
    return folder


class TextData:
    """Batches of token windows, and the measures of the validation text."""

    def __init__(
        self, folder: Path, vocab_size: int, context_length: int, batch_size: int, seed: int
    ):
        """Open a prepared folder. Raises ValueError if it is damaged or does not fit the model."""
        if min(context_length, batch_size) < 1 or seed < 0:
            raise ValueError(
                f"context length {context_length} and batch size {batch_size} must be at least 1, "
                f"seed {seed} at least 0"
            )
        manifest = read_manifest(folder)
        self.tokenizer = tokenizers.load(folder / "tokenizer")
        if self.tokenizer.fingerprint() != manifest["tokenizer"]:
            raise ValueError(f"{folder / 'tokenizer'} was altered: {rebuild_hint(folder)}")
        check_vocabulary(self.tokenizer, vocab_size)
        self.train, self.val = Shards(folder, "train"), Shards(folder, "val")
        self.context_length, self.batch_size, self.seed = context_length, batch_size, seed
        self.unit, self.units_per_row = "tokens", context_length
        self.val_bytes = manifest["utf8_bytes"]["val"]
        self.val_tokens = len(self.val) - 1  # predicted ones: nothing precedes the first
        shards = manifest["train"] + manifest["val"]
        content = [manifest["tokenizer"], *(shard["sha256"] for shard in shards)]
        self.fingerprint = hashlib.sha256(" ".join(content).encode()).hexdigest()
        self.description = (
            f"{folder.name}: {sum(manifest['utf8_bytes'].values()) / 1e6:.1f} MB of text, "
            f"{len(self.train):,} training and {len(self.val):,} validation tokens"
        )
        for name, split in (("training", self.train), ("validation", self.val)):
            if len(split) <= context_length:
                largest = min(len(self.train), len(self.val)) - 1
                raise ValueError(
                    f"the {name} text has {len(split)} tokens, need > {context_length}: "
                    f"use --model.context-length <= {largest}, or more text"
                )

    @classmethod
    def prepare(
        cls, config: TextConfig, vocab_size: int, context_length: int, batch_size: int, seed: int
    ) -> "TextData":
        """Open the prepared text of `config`, after building it if need be."""
        folder = prepare_folder(config, vocab_size)
        return cls(folder, vocab_size, context_length, batch_size, seed)

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """`rows` of the global batch of `step`: {"tokens": (rows, T + 1) int64}.

        Inputs are tokens[:, :-1], targets tokens[:, 1:]. Only the rows asked for are read.
        """
        index = np.arange(self.batch_size, dtype=np.int64)[rows] + step * self.batch_size
        starts = window_starts(index, len(self.train), self.context_length, self.seed)
        tokens = np.empty((len(index), self.context_length + 1), dtype=np.int64)
        for row, start in zip(tokens, starts):
            row[:] = self.train.read(int(start), len(row))
        return {"tokens": torch.from_numpy(tokens)}

    def val_batches(self, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """All validation text, `rows` windows at a time: {"tokens": (b, T + 1), "mask": (b, T)}.

        Each token but the first is a target once. The last window is moved back to full length;
        its mask is False where a target was counted before.
        """
        length = self.context_length
        starts = np.arange(0, self.val_tokens, length, dtype=np.int64)
        for first in range(0, len(starts), rows):
            wanted = starts[first : first + rows]
            moved = np.minimum(wanted, self.val_tokens - length)
            tokens = np.stack([self.val.read(int(start), length + 1) for start in moved])
            mask = moved[:, None] + np.arange(length) >= wanted[:, None]
            yield {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}

    def metrics(self, nats_per_token: float) -> dict[str, float]:
        """Bits per byte of the validation text from the mean loss over its predicted tokens.

        Predicting the end-of-text tokens counts as cost; they add no bytes.
        """
        return {"val_bpb": nats_per_token * self.val_tokens / math.log(2) / self.val_bytes}
