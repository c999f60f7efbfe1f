"""Documents -> files of token ids: a prepared text in a folder, written once, checked when opened.

    documents -> split into train and val -> token ids, joined by the end-of-text token
              -> FOLDER/{train,val}-00000.bin, ..., manifest.json, tokenizer/

A shard is an array of little-endian integers (uint16, or uint32 for a large vocabulary) and
nothing else. It is read through a memory map, so that a corpus may be larger than memory. The
manifest lists the token count and SHA-256 of each shard. The folder gets its name when it is
complete, so it is whole or absent.

A split reads EOT document EOT document EOT. The end-of-text token (EOT) stands before each
document, where generation starts, and after each, where it stops.

Left out: several processes, and continuing after a kill. data/prepare.py does both with the
functions of this module.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.download import sha256_of
from data.report import Report
from tinyfm.batches.prepared import rebuild_hint

MIN_DOCUMENTS = 100  # with this many documents or more, validation gets whole ones
SHARD_BYTES = 1 << 27  # a shard of this size is full: the next one is started
PIECE_CHARS, GROUP_PIECES = 1 << 15, 32  # encoded at a time; their product bounds the memory
VERIFY_TOKENS = 100_000_000  # splits up to this size are read and checked in full when opened

Piece = tuple[str, bool, str]  # split, whether it is the start of a document, text


def token_dtype(vocab_size: int) -> np.dtype:
    """The smaller of the two integer types that can store every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# ---- documents -> pieces -------------------------------------------------------------------------


def spool(documents: Iterable[str], path: Path) -> tuple[int, int]:
    """Copy the documents to a file, one JSON string a line; return their number and characters.

    The documents are needed twice, to train a tokenizer and to encode them. Reading them again
    may take long, and keeping them may take too much memory.
    """
    count = 0
    chars = 0
    with open(path, "w", encoding="utf-8") as file:
        for document in tqdm(documents, "reading", unit=" documents", leave=False, disable=None):
            # UTF-8 cannot hold half a surrogate pair, which a Python string can: it becomes U+FFFD.
            text = document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if text:
                count += 1
                chars += len(text)
                file.write(json.dumps(text) + "\n")
    return count, chars


def split_documents(
    path: Path, count: int, chars: int, val_fraction: float
) -> Iterator[tuple[str, str]]:
    """Yield ("train" or "val", text) for the `count` documents, `chars` characters, of a spool.

    Many documents: each is in one split as a whole. The hash of its content decides, so that
    documents added later move none of the others, and equal documents are in the same split. Few
    documents: the last `val_fraction` of all characters is held out, as in nanoGPT's prepare.py
    for a single document. This may cut one document in two.
    """
    train_chars = int(chars * (1 - val_fraction))  # still to come, for few documents
    with open(path, encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)
            if count >= MIN_DOCUMENTS:
                digest = hashlib.sha256(text.encode("utf-8")).digest()
                draw = int.from_bytes(digest[:8], "big")  # uniform in [0, 2**64)
                yield ("val" if draw < val_fraction * 2**64 else "train"), text
                continue
            head = text[:train_chars]
            tail = text[train_chars:]
            if head:
                yield "train", head
            if tail:
                yield "val", tail
            train_chars = max(0, train_chars - len(text))


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
    ids = {"train": [], "val": []}
    documents = {"train": 0, "val": 0}
    utf8_bytes = {"train": 0, "val": 0}
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
    return {"documents": {"train": 0, "val": 0}, "utf8_bytes": {"train": 0, "val": 0}}


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
    documents: Iterable[str],
    report: Report,
    make_tokenizer: Callable[[Iterable[str]], object],
    val_fraction: float,
) -> None:
    """Make the folder, and print how large it is.

    `make_tokenizer` is given the training documents, which it may learn from. `report` is filled
    as `documents` are read. Raises ValueError if there is no text.
    """
    # Imported here because it loads torch: the worker processes of data/prepare.py import this
    # module and do not need torch.
    from tinyfm.common.files import whole_or_absent

    start = time.perf_counter()
    with whole_or_absent(folder) as temporary:
        copy = temporary / "documents.jsonl"
        count, chars = spool(documents, copy)
        if not chars:
            raise ValueError(f"no text for {folder.name}: all documents are empty")
        read_copy = partial(split_documents, copy, count, chars, val_fraction)
        tokenizer = make_tokenizer(text for split, text in read_copy() if split == "train")
        manifest = write_shards(temporary, read_copy(), tokenizer, chars)
        copy.unlink()
        end_shards(temporary, tokenizer, manifest, str(report))
    tokens = sum(shard["tokens"] for split in ("train", "val") for shard in manifest[split])
    megabytes = sum(manifest["utf8_bytes"].values()) / 1e6
    seconds = time.perf_counter() - start
    print(f"{folder}: {megabytes:.1f} MB, {tokens:,} tokens, {seconds:.1f} s; files: {report}")


# ---- reading -------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict:
    """The folder's manifest. Raises ValueError if it is missing or damaged."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        match manifest:
            case {"train": [*_], "val": [*_], "utf8_bytes": {"val": _}, "vocab_size": _}:
                return manifest
        raise ValueError("an entry is missing")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}): {rebuild_hint(folder)}") from error


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
