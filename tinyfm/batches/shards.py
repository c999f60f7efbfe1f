"""Documents -> files of token ids: a prepared text in a folder, written once, checked when opened.

    documents -> no near duplicates -> train, val and test -> token ids, joined by end-of-text
              -> FOLDER/{train,val,test}-00000.bin, ..., manifest.json, tokenizer/

What is held out, and how it is kept apart from training, stands in data/splits.py.

A shard is an array of little-endian integers (uint16, or uint32 for a large vocabulary) and
nothing else. It is read through a memory map, so that a corpus may be larger than memory. The
manifest lists the token count and SHA-256 of each shard. The folder gets its name when it is
complete, so it is whole or absent.

A split reads EOT document EOT document EOT. The end-of-text token (EOT) stands before each
document, where generation starts, and after each, where it stops.

Left out: several processes, and continuing after a kill. data/prepare.py does both with the
functions of this module.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from tqdm import tqdm

from data import dedupe
from data.download import sha256_of
from data.report import Report, counted
from data.splits import (
    HELD_OUT,
    SPLITS,
    TRAIN,
    Document,
    Overlap,
    overlapping,
    share_of,
    split_of,
)
from tinyfm.batches import prepared
from tinyfm.batches.prepared import rebuild_hint
from tinyfm.common.folders import whole_or_absent

FORMAT = 2  # of the folders; 1 had no test text, and near duplicates in validation
MIN_DOCUMENTS = 100  # with this many documents or more, whole ones are held out
GAP_CHARS = 1000  # between the blocks of fewer documents: more than a context is long
INDEX_MB = 64  # of memory, to recognize duplicates; it is touched only as far as it is needed
SHARD_BYTES = 1 << 27  # a shard of this size is full: the next one is started
PIECE_CHARS, GROUP_PIECES = 1 << 15, 32  # encoded at a time; their product bounds the memory
VERIFY_TOKENS = 100_000_000  # splits up to this size are read and checked in full when opened

Piece = tuple[str, bool, str]  # split, whether it is the start of a document, text


def token_dtype(vocab_size: int) -> np.dtype:
    """The smaller of the two integer types that can store every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# ---- documents -> pieces -------------------------------------------------------------------------


def spool(
    documents: Iterable[Document], path: Path, report: Report, near: bool = True
) -> tuple[int, int]:
    """Copy the documents to a file, without near duplicates; return their number and characters.

    near: False leaves out exact duplicates alone.

    A line of the file is JSON, [split, text]. The documents are needed several times, to split
    them, to train a tokenizer and to encode them. Reading them again may take long, and keeping
    them may take too much memory.
    """
    count = 0
    chars = 0
    seen = dedupe.Seen(INDEX_MB)
    repeated = []  # names
    with open(path, "w", encoding="utf-8") as file:
        for document in tqdm(documents, "reading", unit=" documents", leave=False, disable=None):
            # UTF-8 cannot hold half a surrogate pair, which a Python string can: it becomes U+FFFD.
            text = document.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if not text:
                continue
            keys = dedupe.keys_of(text, near)
            if seen.look_up(keys):
                repeated.append(document.name or " ".join(text[:40].split()))
                continue
            seen.add(keys)
            count += 1
            chars += len(text)
            file.write(json.dumps([document.split, text]) + "\n")
    if repeated:
        shown = ", ".join(repeated[:3])
        kind = "near duplicates" if near else "exact duplicates"
        report.notes.append(f"{counted(len(repeated), kind)} left out ({shown}, ...)")
    return count, chars


def find_blocks(chars: int, held_out: float) -> dict[str, tuple[int, int]]:
    """The [first, last) character of each split, where few documents are cut into three blocks.

    The blocks are the start, for training, then validation, then test, at the end. Training and
    test are so far apart that no window reads across, as is each from validation.
    """
    train = int(chars * (1 - held_out))
    middle = (train + chars) // 2
    gap = min(GAP_CHARS, (chars - train) // 20)
    return {TRAIN: (0, train), "val": (train + gap, middle), "test": (middle + gap, chars)}


def read_spool(path: Path) -> Iterator[Document]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            split, text = json.loads(line)
            yield Document(text, split)


def split_documents(
    path: Path, count: int, chars: int, held_out: float
) -> Iterator[tuple[str, str]]:
    """Yield (split, text) for the `count` documents, `chars` characters, of a spool.

    Many documents: each is in one split as a whole, which its source or the hash of its content
    decides. Few documents: the last `held_out` of all characters are cut off, as in nanoGPT's
    prepare.py for a single document. Their first half is validation, the second is test, and
    GAP_CHARS before each are left out. This may cut one document into several.
    """
    blocks = find_blocks(chars, held_out)
    start = 0  # of the document, in characters
    for text, split, _ in read_spool(path):
        if split or count >= MIN_DOCUMENTS:
            yield split or split_of(text, held_out), text
            continue
        for split, (first, last) in blocks.items():
            part = text[max(0, first - start) : max(0, last - start)]
            if part:
                yield split, part
        start += len(text)


def measure_overlap(
    read: Callable[[], Iterable[tuple[str, str]]], whole: bool
) -> tuple[dict[str, float], set[int]]:
    """({split: share of its words in runs that training has}, documents to leave out for this).

    read: gives the (split, text) of all documents. whole: whether whole documents are held out, so
    that some may be left out; they are numbered in the order of `read`.
    """
    held_out = [(i, split) for i, (split, _) in enumerate(read()) if split != TRAIN]
    overlap = Overlap(text for split, text in read() if split != TRAIN)
    for split, text in read():
        if split == TRAIN:
            overlap.read(text)
    counts = overlap.count()
    shares = {}
    removed = set()
    for split in HELD_OUT:
        numbers = [i for i, other in held_out if other == split]
        own = counts[[other == split for _, other in held_out]]
        if whole:
            too_many = overlapping(own)
            removed |= {numbers[i] for i in too_many}
            own = np.delete(own, too_many, axis=0)
        shares[split] = share_of(own)
    return shares, removed


def pieces(documents: Iterable[tuple[str, str]]) -> Iterator[Piece]:
    """Cut the (split, text) of long documents into pieces, at ends of lines where possible."""
    for split, text in documents:
        start = 0
        while start < len(text):
            end = start + PIECE_CHARS
            if end < len(text):
                line_end = text.rfind("\n", start, end) + 1  # 0 if there is none
                end = line_end or end
            yield split, start == 0, text[start:end]
            start = end


def groups(documents: Iterable[tuple[str, str]]) -> Iterator[list[Piece]]:
    """Groups of `pieces`, to encode at a time: GROUP_PIECES of full length, or more short ones."""
    group = []
    chars = 0
    for piece in pieces(documents):
        group.append(piece)
        chars += max(64, len(piece[2]))  # even the shortest has a cost
        if chars > PIECE_CHARS * (GROUP_PIECES - 1):
            yield group
            group = []
            chars = 0
    if group:
        yield group


# ---- pieces -> shards ----------------------------------------------------------------------------


class Encoded(NamedTuple):
    """The token ids of a group and its counts; each dict is by split."""

    ids: dict[str, np.ndarray]  # int64 (T,)
    documents: dict[str, int]  # documents that start in the group
    utf8_bytes: dict[str, int]
    chars: int  # of all splits


def encode_group(tokenizer, group: list[Piece]) -> Encoded:
    """Token ids of a group, with an end-of-text token before each document."""
    ids = {split: [] for split in SPLITS}
    documents = dict.fromkeys(SPLITS, 0)
    utf8_bytes = dict.fromkeys(SPLITS, 0)
    texts = [text for _, _, text in group]
    for (split, is_start, text), encoded in zip(group, tokenizer.encode_batch(texts)):
        if is_start:
            ids[split].append(tokenizer.eot)
            documents[split] += 1
        ids[split] += encoded
        utf8_bytes[split] += len(text.encode("utf-8"))
    arrays = {split: np.array(own, dtype=np.int64) for split, own in ids.items()}
    return Encoded(arrays, documents, utf8_bytes, sum(map(len, texts)))


def append(folder: Path, split: str, ids: Iterable[int], vocab_size: int) -> None:
    """Write token ids to the end of the split's last shard, or to a new shard if it is full."""
    array = np.asarray(ids, dtype=np.int64)
    if len(array) and not 0 <= array.min() <= array.max() < vocab_size:
        raise ValueError(f"the tokenizer gave an id outside 0..{vocab_size - 1}")
    shards = sorted(folder.glob(f"{split}-*.bin"))
    if not shards or shards[-1].stat().st_size >= SHARD_BYTES:
        shards.append(folder / f"{split}-{len(shards):05d}.bin")
    with open(shards[-1], "ab") as file:
        file.write(array.astype(token_dtype(vocab_size)).tobytes())


def begin_manifest() -> dict:
    """The counts of a manifest, before the first group."""
    return {
        "format": FORMAT,
        "documents": dict.fromkeys(SPLITS, 0),
        "utf8_bytes": dict.fromkeys(SPLITS, 0),
    }


def add_group(folder: Path, encoded: Encoded, vocab_size: int, manifest: dict) -> None:
    """Append a group to the shards, and add its counts to the manifest."""
    for split, ids in encoded.ids.items():
        append(folder, split, ids, vocab_size)
        manifest["documents"][split] += encoded.documents[split]
        manifest["utf8_bytes"][split] += encoded.utf8_bytes[split]


def end_shards(folder: Path, tokenizer, manifest: dict, report: str) -> None:
    """Write the last end-of-text tokens, the tokenizer, and the completed manifest."""
    itemsize = token_dtype(tokenizer.vocab_size).itemsize
    for split in manifest["documents"]:
        append(folder, split, [tokenizer.eot], tokenizer.vocab_size)
        manifest[split] = [
            {"file": p.name, "tokens": p.stat().st_size // itemsize, "sha256": sha256_of(p)}
            for p in sorted(folder.glob(f"{split}-*.bin"))
        ]
    tokenizer.save(folder / "tokenizer")
    manifest["tokenizer"] = tokenizer.fingerprint()
    manifest["vocab_size"] = tokenizer.vocab_size
    manifest["report"] = report
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def write_shards(folder: Path, documents: Iterable[tuple[str, str]], tokenizer, chars: int) -> dict:
    """Encode (split, text), `chars` characters in all, to shards; return the manifest's counts."""
    manifest = begin_manifest()
    with tqdm(desc="encoding", total=chars, unit_scale=True, leave=False, disable=None) as bar:
        for group in groups(documents):
            encoded = encode_group(tokenizer, group)
            add_group(folder, encoded, tokenizer.vocab_size, manifest)
            bar.update(encoded.chars)
    return manifest


def build(
    folder: Path,
    documents: Iterable[Document],
    report: Report,
    make_tokenizer: Callable[[Iterable[str]], object],
    held_out: float,
    has_words: bool = True,
) -> None:
    """Make the folder, and print how large it is.

    `make_tokenizer` is given the training documents, which it may learn from. `report` is filled
    as `documents` are read. has_words: False if runs of words say nothing about these documents, so
    that neither near duplicates nor overlaps are looked for. Raises ValueError if there is no text.
    """
    start = time.perf_counter()
    with whole_or_absent(folder) as temporary:
        if temporary is None:  # another process has made it meanwhile
            return
        copy = temporary / "documents.jsonl"
        count, chars = spool(documents, copy, report, near=has_words)
        if not chars:
            raise ValueError(f"no text for {folder.name}: all documents are empty")
        read_copy = partial(split_documents, copy, count, chars, held_out)
        shares = {}
        removed = set()
        if has_words:
            shares, removed = measure_overlap(read_copy, whole=count >= MIN_DOCUMENTS)

        def read_kept() -> Iterator[tuple[str, str]]:
            return (pair for i, pair in enumerate(read_copy()) if i not in removed)

        tokenizer = make_tokenizer(text for split, text in read_kept() if split == TRAIN)
        manifest = write_shards(temporary, read_kept(), tokenizer, chars)
        if has_words:
            manifest["overlap"] = shares
        copy.unlink()
        end_shards(temporary, tokenizer, manifest, str(report))
    tokens = sum(shard["tokens"] for split in SPLITS for shard in manifest[split])
    megabytes = sum(manifest["utf8_bytes"].values()) / 1e6
    seconds = time.perf_counter() - start
    sizes = f"{megabytes:.1f} MB, {counted(tokens, 'tokens')}, {seconds:.1f} s"
    print(f"{folder}: {sizes}; files: {report}")
    if has_words:
        print(describe_overlap(manifest, len(removed)))


def describe_overlap(manifest: dict, removed: int) -> str:
    """The line about what is held out, and how much of it training has."""
    parts = []
    for split, name in zip(HELD_OUT, ("validation", "test")):
        documents = manifest["documents"][split]
        share = manifest["overlap"][split]
        parts.append(f"{share:.2%} of {name} ({counted(documents, 'documents')})")
    line = f"in 13-word runs that training also has: {', '.join(parts)}"
    if removed:
        line += f"; left out for having more: {counted(removed, 'documents')}"
    return line


# ---- reading -------------------------------------------------------------------------------------


class ShardEntry(TypedDict):
    """A shard, as the manifest describes it."""

    file: str
    tokens: int
    sha256: str


class Counts(TypedDict):
    """A number for each split."""

    train: int
    val: int
    test: int


class Shares(TypedDict):
    """A share for each split that is held out."""

    val: float
    test: float


class Measured(TypedDict, total=False):
    """What a manifest may lack."""

    overlap: Shares
    settings: dict[str, Any]


class Manifest(Measured):
    """What stands in manifest.json; other entries are for people."""

    format: int
    train: list[ShardEntry]
    val: list[ShardEntry]
    test: list[ShardEntry]
    documents: Counts
    utf8_bytes: Counts
    vocab_size: int
    tokenizer: str
    report: str


def read_manifest(folder: Path) -> dict:
    """The folder's manifest.

    Raises ValueError if it is missing or damaged, or an earlier version made the folder.
    """
    found = prepared.read_manifest(folder)
    made_by = found.get("format", 1)
    if made_by != FORMAT and "vocab_size" in found:
        raise ValueError(
            f"{folder} was split by another version: its format is {made_by!r}, not {FORMAT}, so "
            f"it has no test text; {rebuild_hint(folder)}"
        )
    manifest = prepared.read_manifest(folder, Manifest)
    empty = [split for split in SPLITS if not manifest[split]]
    if empty:
        raise ValueError(
            f"{folder}/manifest.json has no file of {empty[0]}: {rebuild_hint(folder)}"
        )
    return manifest


class Shards:
    """The tokens of one split, as if its files were one array."""

    def __init__(self, folder: Path, split: str):
        """Map the files. Raises ValueError if one was damaged or altered."""
        manifest = read_manifest(folder)
        self.folder = folder
        self.vocab_size = manifest["vocab_size"]
        self.ends = np.cumsum([entry["tokens"] for entry in manifest[split]])
        self.arrays = [self._open(**entry) for entry in manifest[split]]

    def _open(self, file: str, tokens: int, sha256: str) -> np.ndarray:
        path = self.folder / file
        hint = rebuild_hint(self.folder)
        dtype = token_dtype(self.vocab_size)
        size = path.stat().st_size if path.exists() else 0
        expected = tokens * dtype.itemsize
        if size != expected:
            raise ValueError(f"{path} has {size} bytes, expected {expected}: {hint}")
        array = np.memmap(path, dtype, mode="r").view(np.ndarray)  # plain arrays slice faster
        if len(self) > VERIFY_TOKENS:
            return array
        outside = np.flatnonzero(array >= self.vocab_size)
        if len(outside):
            position = outside[0]
            raise ValueError(
                f"{path}: id {array[position]} at byte {position * dtype.itemsize} is not "
                f"below the tokenizer's vocabulary of {self.vocab_size}: {hint}"
            )
        if sha256_of(path) != sha256:
            raise ValueError(f"{path} was altered since it was written: {hint}")
        return array

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as int64, across the borders of files."""
        ids = np.empty(count, dtype=np.int64)
        filled = 0
        shard = int(np.searchsorted(self.ends, start, side="right"))
        while filled < count:
            array = self.arrays[shard]
            shard_start = int(self.ends[shard]) - len(array)
            first = start + filled - shard_start
            part = array[first : first + count - filled]
            ids[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return ids
