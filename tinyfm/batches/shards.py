"""Documents -> files of token ids: a prepared text in a folder, written once, checked when opened.

    documents -> split into train and val -> token ids, joined by the end-of-text token
              -> FOLDER/{train,val}-00000.bin, ..., manifest.json, tokenizer/

A shard is nothing but little-endian integers (uint16, or uint32 for a large vocabulary), read
through a memory map: a corpus larger than memory costs no more than a small one. The manifest holds
each shard's token count and SHA-256. The folder gets its name when complete: whole or absent.

A split reads EOT document EOT document EOT: the end-of-text token (EOT) stands before each
document, where generation starts, and after each, where it stops.

Left out: several processes, and going on after a kill: data/prepare.py does both with these parts.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.download import sha256_of
from data.report import Report

MIN_DOCUMENTS = 100  # from here on, validation gets whole documents
SHARD_BYTES = 1 << 27  # a shard that has grown to this size is followed by the next
PIECE_CHARS, GROUP_PIECES = 1 << 15, 32  # encoded at a time; their product bounds the memory
VERIFY_TOKENS = 100_000_000  # splits up to this size are read and checked in full when opened


def spool(documents: Iterable[str], path: Path) -> tuple[int, int]:
    """Copy the documents to a file, a JSON string a line; return how many, and their characters.

    They are needed twice after that (to train a tokenizer, to encode): making them again may take
    long, keeping them too much memory.
    """
    count = chars = 0
    with open(path, "w", encoding="utf-8") as file:
        for document in tqdm(documents, "reading", unit=" documents", leave=False, disable=None):
            # UTF-8 cannot hold half a surrogate pair, which a Python string can: it becomes U+FFFD.
            text = document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if text:
                count, chars = count + 1, chars + len(text)
                file.write(json.dumps(text) + "\n")
    return count, chars


def split_documents(
    path: Path, count: int, chars: int, val_fraction: float
) -> Iterator[tuple[str, str]]:
    """Yield ("train" or "val", text) for the `count` documents, `chars` characters, of a spool.

    Many documents: each goes to one side whole, by a hash of its content, so that a growing corpus
    moves none, and equal ones are never on both sides. Few: the last `val_fraction` of all
    characters is held out, which may cut a document in two.
    """
    cut = int(chars * (1 - val_fraction))  # for a single document as in nanoGPT's prepare.py
    with open(path, encoding="utf-8") as file:
        for text in map(json.loads, file):
            if count >= MIN_DOCUMENTS:
                draw = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
                yield ("val" if draw < val_fraction * 2**64 else "train"), text
                continue
            if head := text[:cut]:
                yield "train", head
            if tail := text[cut:]:
                yield "val", tail
            cut = max(0, cut - len(text))


def pieces(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, bool, str]]:
    """Cut long documents at line ends: (split, whether it begins a document, text)."""
    for split, text in documents:
        start = 0
        while start < len(text):
            end = start + PIECE_CHARS
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or end
            yield split, start == 0, text[start:end]
            start = end


def token_dtype(vocab_size: int) -> np.dtype:
    """The smaller of the two integer types that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def groups(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, bool, str]]]:
    """The `pieces`, as many together as are encoded at a time: full ones, or more of short ones."""
    group, chars = [], 0
    for piece in pieces(documents):
        group.append(piece)
        chars += max(64, len(piece[2]))  # the shortest costs something too
        if chars > PIECE_CHARS * (GROUP_PIECES - 1):
            yield group
            group, chars = [], 0
    if group:
        yield group


class Encoded(NamedTuple):
    """What became of a group, by split."""

    ids: dict[str, np.ndarray]  # int64 (T,)
    documents: dict[str, int]  # that begin in it
    utf8_bytes: dict[str, int]
    chars: int  # of all splits


def encode_group(tokenizer, group: list[tuple[str, bool, str]]) -> Encoded:
    """Token ids of a group, an end-of-text token before each document."""
    ids, counts, sizes = ({"train": start(), "val": start()} for start in (list, int, int))
    texts = [text for _, _, text in group]
    for (split, begins, text), encoded in zip(group, tokenizer.encode_batch(texts)):
        ids[split] += [tokenizer.eot] * begins + encoded
        counts[split] += begins
        sizes[split] += len(text.encode("utf-8"))
    arrays = {split: np.array(own, dtype=np.int64) for split, own in ids.items()}
    return Encoded(arrays, counts, sizes, sum(map(len, texts)))


def append(folder: Path, split: str, ids: Iterable[int], vocab_size: int) -> None:
    """Write token ids to the end of the split's last shard, or to a new one if that is full."""
    array = np.asarray(ids, dtype=np.int64)
    if len(array) and not 0 <= array.min() <= array.max() < vocab_size:
        raise ValueError(f"the tokenizer gave an id outside 0..{vocab_size - 1}")
    shards = sorted(folder.glob(f"{split}-*.bin"))
    if not shards or shards[-1].stat().st_size >= SHARD_BYTES:
        shards.append(folder / f"{split}-{len(shards):05d}.bin")
    with open(shards[-1], "ab") as file:
        file.write(array.astype(token_dtype(vocab_size)).tobytes())


def add_group(folder: Path, encoded: Encoded, vocab_size: int, manifest: dict) -> None:
    """Append a group to the shards, and its counts to the manifest."""
    for split, ids in encoded.ids.items():
        append(folder, split, ids, vocab_size)
        manifest["documents"][split] += encoded.documents[split]
        manifest["utf8_bytes"][split] += encoded.utf8_bytes[split]


def begin_manifest() -> dict:
    return {"documents": {"train": 0, "val": 0}, "utf8_bytes": {"train": 0, "val": 0}}


def end_shards(folder: Path, tokenizer, manifest: dict, report: str) -> None:
    """Write the last end-of-text tokens, the tokenizer, and the manifest, now complete."""
    itemsize = token_dtype(tokenizer.vocab_size).itemsize
    for split in manifest["documents"]:
        append(folder, split, [tokenizer.eot], tokenizer.vocab_size)
        manifest[split] = [
            {"file": p.name, "tokens": p.stat().st_size // itemsize, "sha256": sha256_of(p)}
            for p in sorted(folder.glob(f"{split}-*.bin"))
        ]
    tokenizer.save(folder / "tokenizer")
    manifest |= {"tokenizer": tokenizer.fingerprint(), "vocab_size": tokenizer.vocab_size}
    manifest |= {"report": report}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def write_shards(folder: Path, documents: Iterable[tuple[str, str]], tokenizer, chars: int) -> dict:
    """Encode (split, text), `chars` characters in all, to shards; return counts of a manifest."""
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
    """Make the folder. `make_tokenizer` is given the training documents to learn from, if it likes;
    `report` is filled as `documents` are read. Raises ValueError if there is no text.
    """
    from tinyfm.common.files import whole_or_absent

    begin = time.perf_counter()
    with whole_or_absent(folder) as temporary:
        copy = temporary / "documents.jsonl"
        count, chars = spool(documents, copy)
        if not chars:
            raise ValueError(f"no text for {folder.name}: all documents are empty")
        splits = (copy, count, chars, val_fraction)
        tokenizer = make_tokenizer(t for side, t in split_documents(*splits) if side == "train")
        manifest = write_shards(temporary, split_documents(*splits), tokenizer, chars)
        copy.unlink()
        end_shards(temporary, tokenizer, manifest, str(report))
    tokens = sum(shard["tokens"] for split in ("train", "val") for shard in manifest[split])
    megabytes, seconds = sum(manifest["utf8_bytes"].values()) / 1e6, time.perf_counter() - begin
    print(f"{folder}: {megabytes:.1f} MB, {tokens:,} tokens, {seconds:.1f} s; files: {report}")


def rebuild_hint(folder: Path) -> str:
    return f"delete the folder {folder} and make it again"


def read_manifest(folder: Path) -> dict:
    """The folder's manifest. Raises ValueError if it is missing or damaged."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["train"], manifest["val"], manifest["utf8_bytes"]["val"], manifest["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}): {rebuild_hint(folder)}") from error
    return manifest


class Shards:
    """The tokens of one split, as if its files were one array."""

    def __init__(self, folder: Path, split: str):
        """Map the files. Raises ValueError if one is not as it was written."""
        manifest = read_manifest(folder)
        self.folder, self.vocab_size = folder, manifest["vocab_size"]
        self.ends = np.cumsum([entry["tokens"] for entry in manifest[split]])
        self.arrays = [self._open(**entry) for entry in manifest[split]]

    def _open(self, file: str, tokens: int, sha256: str) -> np.ndarray:
        path, dtype = self.folder / file, token_dtype(self.vocab_size)
        hint = rebuild_hint(self.folder)
        size = path.stat().st_size if path.exists() else 0
        if size != tokens * dtype.itemsize:
            expected = tokens * dtype.itemsize
            raise ValueError(f"{path} has {size} bytes, expected {expected}: {hint}")
        array = np.memmap(path, dtype, mode="r").view(np.ndarray)  # plain arrays slice faster
        if len(self) <= VERIFY_TOKENS:
            for position in np.flatnonzero(array >= self.vocab_size)[:1]:
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
        ids, filled = np.empty(count, dtype=np.int64), 0
        shard = int(np.searchsorted(self.ends, start, side="right"))
        while filled < count:
            array = self.arrays[shard]
            begin = start + filled - (int(self.ends[shard]) - len(array))
            part = array[begin : begin + count - filled]
            ids[filled : filled + len(part)] = part
            filled, shard = filled + len(part), shard + 1
        return ids
