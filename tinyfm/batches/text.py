"""Token shards -> batches: the windows of text that a GPT reads, and their order.

A batch is a pure function of (seed, step), see order.py. So there is no loader state to save, and
a resumed run, or one on another number of machines, sees the same data. Row r of step s is sample

    i = s * batch_size + r;   epoch, j = divmod(i, W)
    start = offset(epoch) + T * permutation(epoch)[j];   row = tokens[start : start + T + 1]

In words: an epoch draws an offset in [0, T), cuts the M training tokens from there on into W
windows, and reads each window once, in a random order. The last token of a window is the first of
the next: a target in one, an input in the other. With `whole`, a window that starts inside a
document moves back to the document's start, if the document fits into a window. So a model of short
documents, of which the end must be counted from the start, sees both.

Validation reads all validation tokens in order and predicts each token but the first exactly once.
So does test, the text that training never looks at: `python -m tinyfm.evaluate RUN` reads it. A
loss in nats per token depends on the tokenizer. Bits per byte of text compare any two models:

    bits per byte = nats per token * predicted tokens / ln 2 / UTF-8 bytes

Legend: B batch, T context length, M training tokens, W windows of an epoch. Left out: a mask
between the documents of a window (as in GPT-2, attention may look across the end-of-text token).
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from data import (
    chorales,
    docs,
    episodes,
    files,
    genome,
    levels,
    molecules,
    passages,
    series,
    shakespeare,
    sounds,
    stdlib,
    tunes,
)
from data.report import Report, counted
from data.splits import HELD_OUT, SPLITS, Document
from tinyfm import tokenizer as tokenizers
from tinyfm.batches.order import ROUNDS, check_val_fraction, permute
from tinyfm.batches.prepared import name_of, prepared_folder, rebuild_hint
from tinyfm.batches.shards import FORMAT, VERIFY_TOKENS, Shards, build, read_manifest
from tinyfm.common.config import DataPath, FolderPath, Name, may_change
from tinyfm.training import checkpoint

# Texts that are no prose, each with a MODALITY (data/modality.py). To add one, add its module.
MODALITIES = {
    "molecules": molecules,
    "genome": genome,
    "tunes": tunes,
    "chorales": chorales,
    "series": series,
    "levels": levels,
    "episodes": episodes,
    "sounds": sounds,
}
SOURCES = {
    "docs": docs,
    "passages": passages,
    "stdlib": stdlib,
    "shakespeare": shakespeare,
    **MODALITIES,
}
LEARNED_TOKENIZERS = (
    "sentencepiece", "sentencepiece-unigram", "bpe", "wordpiece", "wordpiece-cased"
)  # fmt: skip
NAMES = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class TextConfig:
    """Which text to read, and how to turn it into tokens."""

    # docs, passages, stdlib, shakespeare, molecules, genome, tunes, chorales, series, levels,
    # episodes, sounds, your own text file, folder or "glob", or a folder that data/prepare.py made
    path: DataPath = "docs"
    # sentencepiece, sentencepiece-unigram, bpe, wordpiece (in lower case), wordpiece-cased, bytes,
    # characters (for sounds: a token a sample), or a run or folder with a saved tokenizer
    tokenizer: Name = "sentencepiece"
    # share of your own text, or of shakespeare, held out, half for validation and half for test;
    # the other named sources have their own splits
    val_fraction: float = 0.1
    whole: bool = False  # begin each row with a document, if the document fits into it
    cache: FolderPath = may_change("data/cache")  # folder for the prepared shards

    def __post_init__(self):
        # Paths are checked when they are read: a config may be loaded on another machine.
        if not self.path or not self.tokenizer:
            raise ValueError("--data.path and --data.tokenizer must not be empty")
        check_val_fraction(self.val_fraction)


# ---- the order of the windows --------------------------------------------------------------------


def count_windows(n_tokens: int, length: int) -> int:
    """Windows of an epoch: as many as fit with any offset, and at least one."""
    return max(1, (n_tokens - length) // length)


def window_starts(index: np.ndarray, n_tokens: int, length: int, seed: int) -> np.ndarray:
    """First tokens of the windows of samples `index` (int64); a window is `length` + 1 tokens."""
    windows = count_windows(n_tokens, length)
    offsets = min(length, n_tokens - windows * length)  # fewer where a tiny text leaves no room
    starts = np.empty_like(index)
    for epoch in np.unique(index // windows):
        rows = index // windows == epoch
        random = np.random.SeedSequence((seed, int(epoch))).generate_state(ROUNDS + 1, np.uint64)
        offset = int(random[0]) % offsets
        keys = random[1:]
        starts[rows] = offset + length * permute(index[rows] % windows, windows, keys)
    return starts


def back_to_documents(
    starts: np.ndarray, documents: np.ndarray, n_tokens: int, length: int
) -> np.ndarray:
    """The starts of windows, moved back to the starts of their documents where these fit.

    documents: the place of the end-of-text token before each document, int64 (n,).
    """
    number = np.searchsorted(documents, starts, side="right") - 1
    ends = np.append(documents[1:], n_tokens - 1)
    fits = ends[number] - documents[number] <= length
    return np.where(fits, documents[number], starts)


# ---- the prepared text ---------------------------------------------------------------------------


def read_files(path: str, report: Report) -> Iterator[Document]:
    """The documents of the user's files."""
    for name, text in files.named_documents(path, report):
        yield Document(text, name=name)


def find_source(path: str):
    """Return (name, documents(report=...), version) of a named source or of the user's files."""
    if path in SOURCES:
        source = SOURCES[path]
        return path, source.documents, source.version()
    return name_of(path, "text"), partial(read_files, path), files.version(path)


def fixed_tokenizer(name: str, path: str = "") -> tokenizers.Tokenizer | None:
    """The tokenizer of this name, or None for a kind that must first be trained on the text.

    path: the name of the text, for characters. Raises ValueError if `name` is neither a kind nor a
    folder with a tokenizer.
    """
    if name == "bytes":
        return tokenizers.ByteTokenizer()
    if name == "characters":
        alphabets = {name: source.MODALITY.alphabet for name, source in MODALITIES.items()}
        if not alphabets.get(path):
            known = ", ".join(name for name in alphabets if alphabets[name])
            raise ValueError(
                f"--data.tokenizer characters is for texts with an alphabet ({known}): use bytes"
            )
        return tokenizers.CharacterTokenizer(alphabets[path])
    if name in LEARNED_TOKENIZERS:
        return None
    if Path(name).is_dir():
        is_run = any(Path(name).glob("step-*/manifest.json"))
        return tokenizers.load(checkpoint.find(name) if is_run else name)
    kinds = ", ".join((*LEARNED_TOKENIZERS, "bytes", "characters"))
    raise ValueError(
        f"--data.tokenizer {name!r} is no folder and not one of the kinds {kinds}: give one of "
        "these, or a folder with a saved tokenizer"
    )


def check_vocabulary(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> None:
    """Raise ValueError if a token has no row in the model's embedding; spare rows do no harm."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}: "
            f"set --model.vocab-size {tokenizer.vocab_size}"
        )


def check_made_folder(folder: Path, fixed: tokenizers.Tokenizer | None) -> None:
    """Raise ValueError if data/prepare.py made the folder with another tokenizer than `fixed`."""
    if fixed is not None and fixed.fingerprint() != read_manifest(folder)["tokenizer"]:
        raise ValueError(
            f"{folder} was made with another tokenizer: leave out --data.tokenizer, "
            "the folder contains one"
        )


def is_prepared(path: str) -> bool:
    """Whether data/prepare.py made this folder."""
    return path not in SOURCES and Path(path).expanduser().joinpath("train-00000.bin").is_file()


def prepare_folder(config: TextConfig, vocab_size: int) -> Path:
    """The folder with the shards of this text and tokenizer; it is built if it does not exist.

    A folder that data/prepare.py made is used as it is.
    """
    fixed = fixed_tokenizer(config.tokenizer, config.path)
    if is_prepared(config.path):
        made = Path(config.path).expanduser()
        check_made_folder(made, fixed)
        return made
    if fixed is None:
        identity = f"{config.tokenizer} {vocab_size}"
        make_tokenizer = partial(tokenizers.train, config.tokenizer, vocab_size=vocab_size)
    else:
        check_vocabulary(fixed, vocab_size)  # now, rather than after hours of encoding
        identity = fixed.fingerprint()

        def make_tokenizer(documents):
            return fixed  # nothing to learn

    name, documents, version = find_source(config.path)
    depends_on = (FORMAT, version, identity, config.val_fraction)
    folder = prepared_folder(config.cache, name, depends_on)
    if not folder.exists():
        report = Report()
        has_words = config.path not in MODALITIES  # the others leave out duplicates themselves
        found = documents(report=report)
        build(folder, found, report, make_tokenizer, config.val_fraction, has_words)
    return folder


# ---- one split -----------------------------------------------------------------------------------


class Split:
    """The text of one split as token ids: EOT document EOT document EOT."""

    def __init__(self, folder: Path, name: str, tokenizer: tokenizers.Tokenizer, utf8_bytes: int):
        """Raises ValueError if a file was damaged or altered."""
        self.shards = Shards(folder, name)
        self.tokenizer = tokenizer
        self.utf8_bytes = utf8_bytes  # of all documents
        self.predicted = len(self.shards) - 1  # tokens: nothing precedes the first

    def __len__(self) -> int:
        return len(self.shards)

    @cached_property
    def tokens(self) -> np.ndarray:
        """All token ids, int64. For a training text of any size, read parts of `shards`."""
        return self.shards.read(0, len(self))

    @cached_property
    def starts(self) -> np.ndarray:
        """The place of the end-of-text token before each of the n documents, int64 (n,).

        The predicted tokens of document i are those after starts[i], up to and with starts[i + 1].
        """
        return np.flatnonzero(self.tokens == self.tokenizer.eot)[:-1]

    def documents(self) -> Iterator[np.ndarray]:
        """The token ids of each document, without end-of-text tokens: int64 (T,)."""
        for start, end in zip(self.starts, [*self.starts[1:], len(self) - 1]):
            yield self.tokens[start + 1 : end]

    @cached_property
    def bytes(self) -> np.ndarray:
        """The UTF-8 bytes of each document, int64 (n,)."""
        decode = self.tokenizer.decode_bytes
        return np.array([len(decode(ids.tolist())) for ids in self.documents()])

    def bits_per_byte(self, nats_per_token: float) -> float:
        """From the mean loss over the predicted tokens.

        Predicting the end-of-text tokens counts as cost, although they add no bytes.
        """
        return nats_per_token * self.predicted / math.log(2) / self.utf8_bytes


# ---- batches -------------------------------------------------------------------------------------


class TextData:
    """Batches of token windows, and the metrics of the held-out texts."""

    def __init__(
        self, folder: Path, vocab_size: int, context_length: int, batch_size: int, seed: int
    ):
        """Open a prepared folder. Raises ValueError if it is damaged or does not fit the model."""
        if min(context_length, batch_size) < 1 or seed < 0:
            raise ValueError(
                f"context length {context_length} and batch size {batch_size} must be at least 1, "
                f"seed {seed} at least 0"
            )
        self.context_length = context_length
        self.batch_size = batch_size
        self.seed = seed
        self.unit = "tokens"
        self.units_per_row = context_length
        self.whole = False

        manifest = read_manifest(folder)
        self.tokenizer = tokenizers.load(folder / "tokenizer")
        if self.tokenizer.fingerprint() != manifest["tokenizer"]:
            raise ValueError(f"{folder / 'tokenizer'} was altered: {rebuild_hint(folder)}")
        check_vocabulary(self.tokenizer, vocab_size)
        self.splits = {
            name: Split(folder, name, self.tokenizer, manifest["utf8_bytes"][name])
            for name in SPLITS
        }
        self.train = self.splits["train"].shards
        self.val = self.splits["val"].shards

        content = [shard["sha256"] for name in SPLITS for shard in manifest[name]]
        sizes = [str(manifest["utf8_bytes"][name]) for name in SPLITS]
        content = " ".join([manifest["tokenizer"], *content, *sizes])
        # A run keeps its start, which says by which version the data were split.
        self.fingerprint = f"{FORMAT}-{hashlib.sha256(content.encode()).hexdigest()}"
        megabytes = sum(manifest["utf8_bytes"].values()) / 1e6
        sizes = [f"{len(self.splits[name]):,} {NAMES[name]}" for name in SPLITS]
        self.description = (
            f"{folder.name}: {megabytes:.1f} MB of text, {sizes[0]}, {sizes[1]} and {sizes[2]} "
            "tokens"
        )
        self._check_lengths()
        self._check_bytes(folder)

    def _check_bytes(self, folder: Path) -> None:
        """Raise ValueError if a held-out text has not as many bytes as the manifest says.

        Bits per byte rest on this number. It is counted where the tokens give back the text as it
        was: a published tokenizer may change it.
        """
        probe = "A b  \u00e9 e\u0301 \ufb01\n"  # capitals, spaces, composed characters
        with contextlib.suppress(ValueError):  # of one that knows an alphabet, and changes nothing
            if self.tokenizer.decode_bytes(self.tokenizer.encode(probe)) != probe.encode("utf-8"):
                return
        lengths = [len(self.tokenizer.token_bytes(i)) for i in range(self.tokenizer.vocab_size)]
        lengths[self.tokenizer.eot] = 0  # it stands between the documents
        for name in HELD_OUT:
            split = self.splits[name]
            if len(split) > VERIFY_TOKENS:
                continue
            counts = [np.bincount(part, minlength=len(lengths)) for part in split.shards.arrays]
            found = int(sum(counts) @ lengths)
            if found != split.utf8_bytes:
                raise ValueError(
                    f"{folder / 'manifest.json'} says that {NAMES[name]} has {split.utf8_bytes:,} "
                    f"bytes, its tokens have {found:,}: {rebuild_hint(folder)}"
                )

    def _check_lengths(self) -> None:
        """Raise ValueError if training is shorter than one window, or another split is empty."""
        n = len(self.train)
        if n <= self.context_length:
            shorter = f"use --model.context-length <= {n - 1}, or more text"
            advice = shorter if n > 2 else "use more text"  # a row has two tokens at least
            raise ValueError(
                f"the training text has {counted(n, 'tokens')}, need > {self.context_length}: "
                f"{advice}"
            )
        for name, split in self.splits.items():
            if not split.utf8_bytes:
                raise ValueError(
                    f"no text is left for {NAMES[name]}: use more text, or a larger "
                    "--data.val-fraction"
                )

    def split(self, name: str) -> Split:
        """The text of "train", "val" or "test"."""
        return self.splits[name]

    @classmethod
    def prepare(
        cls, config: TextConfig, vocab_size: int, context_length: int, batch_size: int, seed: int
    ) -> "TextData":
        """Open the text of `config`. It is prepared first if it has not been before."""
        folder = prepare_folder(config, vocab_size)
        data = cls(folder, vocab_size, context_length, batch_size, seed)
        data.whole = config.whole
        return data

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """`rows` of the global batch of `step`, B of them: {"tokens": (B, T + 1) int64}.

        Inputs are tokens[:, :-1], targets tokens[:, 1:]. Only these rows are read from disk.
        """
        index = np.arange(self.batch_size, dtype=np.int64)[rows] + step * self.batch_size
        n, length = len(self.train), self.context_length
        starts = window_starts(index, n, length, self.seed)
        if self.whole:
            starts = back_to_documents(starts, self.splits["train"].starts, n, length)
        tokens = np.empty((len(index), self.context_length + 1), dtype=np.int64)  # (B, T + 1)
        for row, start in zip(tokens, starts):
            row[:] = self.train.read(int(start), len(row))
        return {"tokens": torch.from_numpy(tokens)}

    def val_batches(self, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """All validation text, `rows` windows at a time; see `split_batches`."""
        return self.split_batches("val", rows)

    def split_batches(self, name: str, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """All text of a split, `rows` windows at a time: {"tokens": (B, T + 1), "mask": (B, T)}.

        T is the context length, or that of the text if it is shorter.
        Each token but the first is a target once. The last window is moved back to full length,
        and with `whole` others to the start of a document. The mask is False for the targets that
        an earlier window has counted.
        """
        split = self.splits[name]
        length = min(self.context_length, split.predicted)
        starts = []
        places = []  # of the first target, less one, that no earlier window has counted
        place = 0
        while place < split.predicted:
            start = place
            if self.whole:
                one = np.array([place])
                start = int(back_to_documents(one, split.starts, len(split), length)[0])
            starts.append(min(start, split.predicted - length))
            places.append(place)
            place = starts[-1] + length
        for first in range(0, len(starts), rows):
            wanted = np.array(places[first : first + rows])
            moved = np.array(starts[first : first + rows])
            tokens = np.stack([split.shards.read(int(start), length + 1) for start in moved])
            mask = moved[:, None] + np.arange(length) >= wanted[:, None]
            yield {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}

    def metrics(self, nats_per_token: float) -> dict[str, float]:
        """Bits per byte of the validation text, from the mean loss over its predicted tokens."""
        return {"val_bpb": self.splits["val"].bits_per_byte(nats_per_token)}
