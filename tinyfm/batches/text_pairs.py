"""Pairs of a source and a target -> batches: what an encoder-decoder learns from.

A pair is a word and its pronunciation, a sentence and its translation. With the tokens a b c of the
source and x y of the target, a row is

    source    a b c END        what the encoder reads
    inputs    START x y        what the decoder reads
    targets   x y END          what it predicts at each place

A source may have several right targets: several pronunciations. In training one of them is drawn,
each as likely as another; validation loss is that of the first. A guess is right if it is any.

Rows are filled up to the longest of their batch. What is filled up teaches nothing, so rows of like
length are together. In an epoch the rows come in the random order of order.py. That is cut into
pools of POOL batches; the rows of a pool are sorted by length, cut into batches, and these are
shuffled. A batch is still a pure function of (seed, step): only its pool has to be sorted.

This has a price: the rows of a batch are more alike than random ones. And as a loss is the mean
over the targets of a batch, a token of a short row counts more than one of a long row. Published
systems fill batches up to a number of tokens instead.

Legend: B batch, S tokens of the longest source, T tokens of the longest target. Left out: batches
of a number of tokens, and pairs larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from data import text_pairs, translations, words
from data.download import sha256_of
from data.report import Report, counted
from data.splits import SPLITS, TEST, TRAIN, VAL
from tinyfm import tokenizer as tokenizers
from tinyfm.batches.order import check_val_fraction, hash_order, held_out_count, shuffle
from tinyfm.batches.prepared import name_of, prepared_folder, read_manifest, rebuild_hint
from tinyfm.batches.text import LEARNED_TOKENIZERS, NAMES, check_vocabulary, fixed_tokenizer
from tinyfm.common.config import DataPath, FolderPath, Name, may_change
from tinyfm.common.folders import whole_or_absent
from tinyfm.hub.tokenizers import make_spec
from tinyfm.tokenizer import Tokenizer

WORDS = "words"
TRANSLATION = "translation"
SPANS = "spans"
LETTERS = "letters"  # the tokenizer for words
POOL = 32  # batches whose rows are sorted by length together
NOT_PREDICTED = -100  # the target where there is none, as in torch's cross-entropy
FORMAT = 1  # of a prepared folder, and of the splits
PAIRS = "pairs.jsonl"
NEVER_A_LETTER = "\0"
FEWEST_TOKENS = 300  # of a learned vocabulary
PAD = "<pad>"  # stands for START, too
END = "</s>"


@dataclass(frozen=True)
class TextPairConfig:
    """Which pairs to read, and how to turn them into tokens."""

    # words (spelling and sound), translation, spans (of a text, hidden), or your own .tsv, .csv or
    # .jsonl with source and target
    path: DataPath = WORDS
    language: Name = "de"  # translation: from English into this language, such as de, fr or pt_BR
    # spans: the text, as --data.path of gpt: docs, passages, stdlib, your own file or folder
    text: DataPath = "docs"
    # letters (and phones: for words), sentencepiece, sentencepiece-unigram, bpe, wordpiece, bytes,
    # or a run or folder with a tokenizer; empty = letters for words, otherwise sentencepiece
    tokenizer: Name = ""
    hidden: float = 0.15  # spans: share of the tokens to hide
    span_length: float = 3.0  # spans: mean number of tokens of a hidden span
    # share of your own pairs or text held out, half for validation and half for test
    val_fraction: float = 0.1
    cache: FolderPath = may_change("data/cache")  # folder for the prepared pairs

    def __post_init__(self):
        if not self.path or not self.text:
            raise ValueError("--data.path and --data.text must not be empty")
        if not 0 < self.hidden < 1:
            raise ValueError(f"--data.hidden {self.hidden}: it must be between 0 and 1")
        if not self.span_length >= 1:
            raise ValueError(f"--data.span-length {self.span_length}: it must be at least 1")
        check_val_fraction(self.val_fraction)

    @property
    def kind(self) -> str:
        """The tokenizer: `tokenizer`, or what suits the path."""
        return self.tokenizer or (LETTERS if self.path == WORDS else "sentencepiece")


class Manifest(TypedDict):
    """What manifest.json of a prepared folder says."""

    pairs: str  # SHA-256
    tokenizer: str
    report: str


# ---- which pairs ---------------------------------------------------------------------------------


class TextPair(NamedTuple):
    """A source and all its right targets, each once, the usual one first."""

    source: str
    targets: Sequence[str]
    split: str


def read_words(report: Report) -> list[TextPair]:
    """Words, and their phones with a space after each."""
    return [
        TextPair(word.text, [write_phones(own) for own in word.pronunciations], word.split)
        for word in words.rows(report)
    ]


def write_phones(phones: Sequence[str]) -> str:
    """Phones as the text that the tokens of `letters` have: a space after each."""
    return "".join(f"{phone} " for phone in phones)


def read_translations(language: str, report: Report) -> list[TextPair]:
    """Strings of programs."""
    return [
        TextPair(pair.source, [pair.target], pair.split)
        for pair in translations.rows(language, report)
    ]


def read_own(path: str, val_fraction: float, report: Report) -> list[TextPair]:
    """The pairs of a table. A hash of the source decides what is held out.

    Raises ValueError for fewer sources than splits.
    """
    found = text_pairs.rows(path, report)
    sources = list(found)
    if len(sources) < len(SPLITS):
        raise ValueError(
            f"{path} has {counted(len(sources), 'sources')} ({report}), need {len(SPLITS)}, one "
            "each for training, validation and test: add some"
        )
    order = hash_order([source.encode("utf-8", "replace") for source in sources])
    count = min(max(2, held_out_count(len(sources), val_fraction)), len(sources) - 1)
    splits = dict.fromkeys(sources, TRAIN)
    for rank, i in enumerate(order[:count]):
        splits[sources[i]] = TEST if rank < (count + 1) // 2 else VAL
    return [TextPair(source, targets, splits[source]) for source, targets in found.items()]


def find_source(config: TextPairConfig) -> tuple[str, str, Callable[[Report], list[TextPair]]]:
    """(name, version, function that reads the pairs) of a path."""
    path = config.path
    if path == WORDS:
        return WORDS, words.version(), read_words
    if path == TRANSLATION:
        language = config.language
        return (
            f"{TRANSLATION}-{language}",
            translations.version(language),
            lambda report: read_translations(language, report),
        )
    fraction = config.val_fraction
    return (
        name_of(path, "pairs"),
        f"{text_pairs.version(path)} {fraction}",
        lambda report: read_own(path, fraction, report),
    )


# ---- the vocabulary ------------------------------------------------------------------------------


def letters(pairs: Sequence[TextPair], phones: bool) -> Tokenizer:
    """A vocabulary of the letters of the pairs. With `phones`, of the letters of the sources and of
    what stands between the spaces of the targets.

    It is BPE without merges, which knows no other letters; the phones are added tokens.
    """
    texts = [pair.source for pair in pairs]
    targets = [target for pair in pairs for target in pair.targets]
    symbols = sorted({letter for text in (texts if phones else texts + targets) for letter in text})
    said = sorted({own for text in targets for own in text.split()}) if phones else []
    names = [PAD, END, *symbols, *(write_phones([phone]) for phone in said)]
    ids = {name: i for i, name in enumerate(names)}
    model = {"type": "BPE", "vocab": ids, "merges": []}
    spec = make_spec(model, {PAD: 0, END: 1}, decoder={"type": "Fuse"})
    flags = {**spec["added_tokens"][0], "special": False}
    for name in names[2 + len(symbols) :]:
        spec["added_tokens"].append({**flags, "id": ids[name], "content": name})
    return tokenizers.from_spec(spec, END)


def check_end(tokenizer: Tokenizer, end_id: int) -> None:
    """Raise ValueError if the model ends its texts with another token than the tokenizer."""
    if tokenizer.eot != end_id:
        raise ValueError(
            f"the tokenizer ends a text with token {tokenizer.eot}, the model with {end_id}: "
            f"set --model.end-id {tokenizer.eot}"
        )


def check_room(kind: str, vocab_size: int) -> None:
    """Raise ValueError if a vocabulary is too small to be learned: it has all bytes, and more."""
    if kind in LEARNED_TOKENIZERS and vocab_size < FEWEST_TOKENS:
        raise ValueError(
            f"--model.vocab-size {vocab_size} is too small for {kind}: use --model.vocab-size 4096 "
            "--model.context-length 128, say"
        )


def unread(tokenizer: Tokenizer, text: str) -> list[str]:
    """The characters of a text that the tokenizer drops, as `letters` does with unknown ones."""
    if tokenizer.encode(NEVER_A_LETTER):  # it spells any character
        return []
    return [letter for letter in dict.fromkeys(text) if not tokenizer.encode(letter)]


def make_tokenizer(config: TextPairConfig, pairs: Sequence[TextPair], vocab_size: int) -> Tokenizer:
    """The tokenizer of the pairs, trained on both sides of the training pairs if it is learned."""
    training = [pair for pair in pairs if pair.split == TRAIN]
    if config.kind == LETTERS:
        return letters(training, phones=config.path == WORDS)
    if config.kind in LEARNED_TOKENIZERS:
        texts = (text for pair in training for text in (pair.source, *pair.targets))
        return tokenizers.train(config.kind, texts, vocab_size=vocab_size)
    return fixed_tokenizer(config.kind)


# ---- the prepared pairs --------------------------------------------------------------------------


def build(
    folder: Path, config: TextPairConfig, read: Callable[[Report], list[TextPair]], vocab_size: int
) -> None:
    """Make a folder with the pairs, an array of JSON a line, and their tokenizer."""
    start = time.perf_counter()
    with whole_or_absent(folder) as temporary:
        if temporary is None:  # another process has made it meanwhile
            return
        report = Report()
        pairs = read(report)
        tokenizer = make_tokenizer(config, pairs, vocab_size)
        lines = [json.dumps(pair) for pair in pairs]
        (temporary / PAIRS).write_text("\n".join(lines) + "\n", encoding="utf-8")
        tokenizer.save(temporary / "tokenizer")
        manifest = {
            "pairs": sha256_of(temporary / PAIRS),
            "tokenizer": tokenizer.fingerprint(),
            "report": str(report),
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    print(f"{folder}: {report}; {time.perf_counter() - start:.1f} s")


def prepare_folder(config: TextPairConfig, vocab_size: int) -> Path:
    """The folder with these pairs and their tokenizer; it is built if it does not exist."""
    check_room(config.kind, vocab_size)
    identity = f"{config.kind} {vocab_size}"
    if config.kind == LETTERS:
        identity = config.kind
    elif config.kind not in LEARNED_TOKENIZERS:
        fixed = fixed_tokenizer(config.kind)
        check_vocabulary(fixed, vocab_size)
        identity = fixed.fingerprint()
    name, version, read = find_source(config)
    folder = prepared_folder(config.cache, name, (FORMAT, version, identity))
    if not folder.exists():
        build(folder, config, read, vocab_size)
    return folder


def read_pairs(folder: Path) -> list[TextPair]:
    """The pairs of a prepared folder. Raises ValueError if they were altered."""
    path = folder / PAIRS
    if sha256_of(path) != read_manifest(folder, Manifest)["pairs"]:
        raise ValueError(f"{path} was altered: {rebuild_hint(folder)}")
    return [TextPair(*json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- batches -------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """The n pairs of a split as token ids, and as text."""

    sources: list[np.ndarray]  # int64 (S,), with END
    targets: list[list[np.ndarray]]  # int64 (T,), with END, of each right target
    pairs: list[TextPair]


def fill_up(rows: Sequence[np.ndarray], filler: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) of rows of unequal length, both (B, longest); the mask is True at real ids."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, filler, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return ids, mask


def collate(
    sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], start: int
) -> dict[str, Tensor]:
    """B sources and targets, which end with END -> a batch.

    "source" (B, S) int64 and "mask" (B, S), False where a row is filled up; "inputs" (B, T);
    "targets" (B, T), -100 where a row is filled up. What is filled up has the id `start`.
    """
    source, mask = fill_up(sources, start)
    target, real = fill_up(targets, NOT_PREDICTED)
    inputs = np.full_like(target, start)
    inputs[:, 1:] = np.where(real[:, 1:], target[:, :-1], start)
    arrays = {"source": source, "mask": mask, "inputs": inputs, "targets": target}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class TextPairData:
    """Batches of pairs."""

    def __init__(
        self, folder: Path, config: TextPairConfig, model: Any, batch_size: int, seed: int
    ):
        """Open a prepared folder. model: the config of the model, such as a Seq2SeqConfig.

        Pairs that are longer than context_length tokens, END included, are left out and counted.
        Raises ValueError if the folder is damaged or does not fit the model.
        """
        if batch_size < 1 or seed < 0:
            raise ValueError(f"batch size {batch_size} must be at least 1, seed {seed} at least 0")
        context_length = model.context_length
        manifest = read_manifest(folder, Manifest)
        self.tokenizer = tokenizers.load(folder / "tokenizer")
        if self.tokenizer.fingerprint() != manifest["tokenizer"]:
            raise ValueError(f"{folder / 'tokenizer'} was altered: {rebuild_hint(folder)}")
        check_vocabulary(self.tokenizer, model.vocab_size)
        check_end(self.tokenizer, model.end_id)
        self.config = config
        self.start = model.start_id
        self.batch_size = batch_size
        self.seed = seed
        self.unit = "pairs"
        self.units_per_row = 1
        self.splits = {split: Encoded([], [], []) for split in SPLITS}
        left_out = self._encode(read_pairs(folder), context_length)
        for split in SPLITS:
            if not self.splits[split].pairs:
                why = f" ({'; '.join(left_out)})" if left_out else ""
                raise ValueError(f"no pair is left for {NAMES[split]}{why}: add some")
        # Of the training pairs: what their order depends on, and how many right targets each has.
        training = self.splits[TRAIN]
        self.source_lengths = np.array([len(ids) for ids in training.sources])
        self.target_lengths = np.array([len(own[0]) for own in training.targets])
        self.answers = np.array([len(own) for own in training.targets])

        content = f"{manifest['pairs']} {manifest['tokenizer']}"
        self.fingerprint = f"{FORMAT}-{hashlib.sha256(content.encode()).hexdigest()}"
        sizes = [f"{len(self.splits[split].pairs):,} {NAMES[split]}" for split in SPLITS]
        self.description = f"{folder.name}: {sizes[0]}, {sizes[1]} and {sizes[2]} pairs"
        self.description = "; ".join([self.description, *left_out])

    def _encode(self, pairs: list[TextPair], context_length: int) -> list[str]:
        """Fill the splits; returns what was left out, in words."""
        end = self.tokenizer.eot
        sources = self.tokenizer.encode_batch([pair.source for pair in pairs])
        targets = self.tokenizer.encode_batch([text for pair in pairs for text in pair.targets])
        remaining = iter(targets)
        loses_letters = not self.tokenizer.encode(NEVER_A_LETTER)
        too_long = 0
        unknown = 0
        for pair, source in zip(pairs, sources):
            answers = [next(remaining) for _ in pair.targets]
            fitting = [ids for ids in answers if len(ids) < context_length]
            if loses_letters and (pair.source, *pair.targets) != tuple(
                map(self.tokenizer.decode, (source, *answers))
            ):
                unknown += 1
                continue
            if len(source) >= context_length or not fitting:
                too_long += 1
                continue
            split = self.splits[pair.split]
            split.sources.append(np.array([*source, end]))
            split.targets.append([np.array([*ids, end]) for ids in fitting])
            split.pairs.append(pair)
        notes = []
        if too_long:
            notes.append(
                f"{counted(too_long, 'pairs')} left out, longer than --model.context-length "
                f"{context_length} tokens"
            )
        if unknown:
            notes.append(
                f"{counted(unknown, 'pairs')} left out, written with letters that training does "
                "not have"
            )
        return notes

    @classmethod
    def prepare(
        cls, config: TextPairConfig, model: Any, batch_size: int, seed: int
    ) -> TextPairData:
        """Open the pairs of `config`. They are prepared first if they have not been before."""
        folder = prepare_folder(config, model.vocab_size)
        return cls(folder, config, model, batch_size, seed)

    def order(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The training rows of a batch, int64 (B,), and for each which of its targets is drawn."""
        pool, place = divmod(step, POOL)
        size = POOL * self.batch_size
        rows = shuffle(np.arange(size) + pool * size, len(self.answers), self.seed)
        rows = rows[np.lexsort((self.target_lengths[rows], self.source_lengths[rows]))]
        rng = np.random.default_rng((self.seed, pool))
        batch = int(rng.permutation(POOL)[place])
        drawn = (rng.random(size) * self.answers[rows]).astype(np.int64)
        here = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
        return rows[here], drawn[here]

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """`rows` of the global batch of `step`, with the fields of `collate`."""
        training = self.splits[TRAIN]
        found, drawn = self.order(step)
        sources = [training.sources[i] for i in found[rows]]
        targets = [training.targets[i][k] for i, k in zip(found[rows], drawn[rows])]
        return collate(sources, targets, self.start)

    def by_length(self, split: str) -> np.ndarray:
        """The rows of a split, the shortest first, int64 (n,)."""
        own = self.splits[split]
        keys = ([len(ids[0]) for ids in own.targets], [len(ids) for ids in own.sources])
        return np.lexsort(keys)

    def val_batches(self, rows: int) -> Iterator[dict[str, Tensor]]:
        """The validation pairs; see `split_batches`."""
        return self.split_batches(VAL, rows)

    def split_batches(self, split: str, rows: int) -> Iterator[dict[str, Tensor]]:
        """All pairs of a split `by_length`, each once with its first target, `rows` at a time."""
        own = self.splits[split]
        order = self.by_length(split)
        for first in range(0, len(order), rows):
            numbers = order[first : first + rows]
            sources = [own.sources[i] for i in numbers]
            targets = [own.targets[i][0] for i in numbers]
            yield collate(sources, targets, self.start)

    def metrics(self, loss: float) -> dict[str, Any]:
        """No metrics beyond the loss."""
        return {}
