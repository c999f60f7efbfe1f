"""Records -> files: pictures with captions in a folder, written once, checked when opened.

    records -> FOLDER/train.images     bytes (B, C, H, W)
               FOLDER/train.tokens     token ids (B, T) of the first captions, uint16 or uint32
               FOLDER/train.json       all captions and labels; the same three for each other split
               FOLDER/manifest.json    shapes, sizes and SHA-256
               FOLDER/tokenizer/

The first two are arrays and nothing else. They are read through a memory map, so that the pictures
may be larger than memory. The folder gets its name when it is complete: it is whole or absent.

Legend: B pictures of a split, T tokens of the longest caption, C channels, H W rows and columns.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
import torch
from tqdm import tqdm

from data import near
from data.download import sha256_of
from data.report import Report, counted
from tinyfm.batches import prepared
from tinyfm.batches.prepared import rebuild_hint
from tinyfm.batches.shards import token_dtype
from tinyfm.common import schema
from tinyfm.common.folders import whole_or_absent
from tinyfm.tokenizer import Tokenizer, encode_captions

if TYPE_CHECKING:  # only then, as it loads Pillow, which classifying texts does not need
    from data.pictures import Record

VERIFY_BYTES = 1 << 30  # files up to this size are read and checked in full when opened

# ---- writing -------------------------------------------------------------------------------------


def file_names(split: str) -> list[str]:
    """The files of a split: images (B, C, H, W), tokens (B, T), and all texts."""
    return [f"{split.replace(' ', '-')}.{kind}" for kind in ("images", "tokens", "json")]


def write_images(
    folder: Path, records: Iterable[Record], splits: tuple[str, ...]
) -> tuple[dict, tuple[int, ...]]:
    """Write the images as they come; return {split: (captions, labels)} and the shape (C, H, W)."""
    texts = {split: ([], []) for split in splits}
    shape = ()
    with contextlib.ExitStack() as stack:
        files = {}
        for split in splits:
            images_file, _, _ = file_names(split)
            files[split] = stack.enter_context(open(folder / images_file, "wb"))
        for record in tqdm(records, "reading", unit=" images", leave=False, disable=None):
            image = record.image.transpose(2, 0, 1)  # (C, H, W)
            files[record.split].write(image.tobytes())
            captions, labels = texts[record.split]
            captions.append(record.captions)
            labels.append(record.label)
            shape = image.shape
    return texts, shape


def write_texts(
    folder: Path, texts: dict, tokenizer: Tokenizer, context_length: int, report: Report
) -> None:
    """Write the tokens of each first caption, and all captions and labels."""
    cut = 0
    for split, (captions, labels) in texts.items():
        firsts = [own[0] for own in captions]
        tokens, cut_here = encode_captions(tokenizer, firsts, context_length)  # (B, T)
        cut += cut_here
        _, tokens_file, texts_file = file_names(split)
        tokens.astype(token_dtype(tokenizer.vocab_size)).tofile(folder / tokens_file)
        content = json.dumps({"captions": captions, "labels": labels})
        (folder / texts_file).write_text(content, encoding="utf-8")
    if cut:
        report.notes.append(f"{counted(cut, 'captions')} cut to {context_length} tokens")


def build(
    folder: Path,
    records: Iterable[Record],
    report: Report,
    splits: tuple[str, ...],
    make_tokenizer: Callable[[list[str]], Tokenizer],
    context_length: int,
) -> None:
    """Make the folder, and print the report.

    `make_tokenizer` is given all captions of "train", the first split. The images of `records`
    have one shape. `report` is filled as the records are read.
    """
    start = time.perf_counter()
    with whole_or_absent(folder) as temporary:
        if temporary is None:  # another process has made it meanwhile
            return
        texts, shape = write_images(temporary, records, splits)
        train_captions, _ = texts["train"]
        tokenizer = make_tokenizer([caption for own in train_captions for caption in own])
        write_texts(temporary, texts, tokenizer, context_length, report)
        tokenizer.save(temporary / "tokenizer")
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        names = [path.relative_to(temporary).as_posix() for path in files]
        manifest = {
            "image": shape,
            "rows": {split: len(labels) for split, (_, labels) in texts.items()},
            "bytes": {name: path.stat().st_size for name, path in zip(names, files)},
            "sha256": {name: sha256_of(path) for name, path in zip(names, files)},
            "report": str(report),
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    print(f"{folder}: {time.perf_counter() - start:.1f} s; pictures: {report}")
    if all(manifest["rows"].values()):
        print(describe_near(open_splits(folder, manifest, token_dtype(tokenizer.vocab_size))))


# ---- reading -------------------------------------------------------------------------------------


class Manifest(TypedDict):
    """What stands in manifest.json; other entries are for people."""

    image: tuple[int, int, int]  # (C, H, W)
    rows: dict[str, int]  # of each split, training first
    bytes: dict[str, int]  # of each file
    sha256: dict[str, str]
    report: str


class Texts(TypedDict):
    """The texts of a split."""

    captions: list[list[str]]  # one or more of each picture
    labels: list[str]


def read_manifest(folder: Path) -> dict:
    """The folder's manifest.

    Raises ValueError if it or a file in its list is damaged, or they contradict each other.
    """
    path = folder / "manifest.json"
    hint = rebuild_hint(folder)
    manifest = prepared.read_manifest(folder, Manifest)
    sizes = manifest["bytes"]
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            raise ValueError(f"{file} has {found} bytes, expected {size}: {hint}")
        if size <= VERIFY_BYTES and sha256_of(file) != manifest["sha256"].get(name):
            raise ValueError(f"{file} was altered since it was written: {hint}")
    if min(manifest["image"]) < 1:
        raise ValueError(f"{path}: image is {manifest['image']}, no (C, H, W): {hint}")
    for split, rows in manifest["rows"].items():
        images, *others = file_names(split)
        fits = sizes.get(images) == rows * math.prod(manifest["image"])
        if not fits or not all(name in sizes for name in others):
            raise ValueError(f"{path}: {rows} rows of {split!r} do not fit its files: {hint}")
    if next(iter(manifest["rows"]), "") != "train":
        raise ValueError(f"{path}: the first split is not 'train': {hint}")
    return manifest


class Split(NamedTuple):
    """The pictures of one split. Row i of each field is about picture i."""

    images: np.ndarray  # uint8 (B, C, H, W), on disk
    tokens: np.ndarray  # uint16 or uint32 (B, T), on disk: the first caption
    groups: np.ndarray  # int64 (B,), equal where first captions are equal, across all splits
    captions: list[list[str]]  # one or more of each picture
    labels: list[str]  # the thing shown, without the manner

    def batch(self, index: np.ndarray) -> dict[str, torch.Tensor]:
        """Rows `index` (int64), with the fields of PairData.batch."""
        tokens = self.tokens[index].astype(np.int64)
        padding = tokens[:, -1:] == tokens  # every row ends with the end-of-text token
        tokens = tokens[:, : 1 + padding.argmax(axis=1).max()]  # up to the longest row's first
        return {
            "images": torch.from_numpy(self.images[index]).float() / 127.5 - 1,
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(self.groups[index]),
        }


def near_training(splits: dict[str, Split]) -> dict[str, int]:
    """How many pictures of each split are near to a training picture of the same label.

    The first split is the training split; data/near.py says what near is.
    """
    train, *others = splits.values()
    counts = [near.count_near(s.images, s.labels, train.images, train.labels) for s in others]
    return dict(zip(list(splits)[1:], counts))


def describe_near(splits: dict[str, Split]) -> str:
    """A line with the counts of `near_training`."""
    counts = near_training(splits)
    parts = [f"{counts[name]:,} of {len(splits[name].labels):,} in {name}" for name in counts]
    return f"nearer than {near.NEAR} to a training picture of the same name: {', '.join(parts)}"


def open_splits(folder: Path, manifest: dict, dtype: np.dtype) -> dict[str, Split]:
    """Map the arrays and read the texts of each split. dtype: of the tokens."""
    splits = {}
    numbers: dict[str, int] = {}  # of each different first caption
    for name, rows in manifest["rows"].items():
        images, tokens, texts = (folder / file for file in file_names(name))
        content = schema.check(schema.parse_json(texts.read_bytes()), Texts, str(texts))
        if len(content["captions"]) != rows or len(content["labels"]) != rows:
            raise ValueError(f"{texts} does not have {rows} rows: {rebuild_hint(folder)}")
        if not all(content["captions"]):
            raise ValueError(f"{texts}: captions has a row without one: {rebuild_hint(folder)}")
        groups = [numbers.setdefault(own[0], len(numbers)) for own in content["captions"]]
        splits[name] = Split(
            np.memmap(images, np.uint8, "r", shape=(rows, *manifest["image"])).view(np.ndarray),
            np.memmap(tokens, dtype, "r").view(np.ndarray).reshape(rows, -1),
            np.array(groups, dtype=np.int64),
            content["captions"],
            content["labels"],
        )
    return splits
