"""Rows -> the documents that are kept: the work on a corpus that any process can do.

`batches` reads files from start to end, and gives their rows in batches of 1 MiB. `clean_batch`
does the costly work on a batch: it parses the rows, drops what fails a filter, masks private data,
and makes the keys that recognize duplicates. It depends on nothing but the batch, and opens no
file, so the batches may be cleaned in any order, by any number of processes, on any machine.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import dedupe, reading, tables
from data.filters import Tally, failed, mask

BATCH_BYTES = 1 << 20  # the rows that a worker gets at a time
DOCUMENT_BYTES = 1 << 22  # a longer plain file is cut
CONTINUATION = bytes(range(0x80, 0xC0))  # in UTF-8, the bytes of a character after its first


# ---- files -> batches of rows --------------------------------------------------------------------


def cut_position(piece: bytes) -> int:
    """Where to cut a piece of text: after its last line end, space, or whole UTF-8 character."""
    after_line = piece.rfind(b"\n") + 1  # 0 if there is none
    after_space = piece.rfind(b" ") + 1
    # The last character starts at the last byte that is no continuation. The cut is before it,
    # unless these are not the at most 4 bytes of a character in UTF-8.
    last_character = max(len(piece) - 4, len(piece.rstrip(CONTINUATION)) - 1)
    return after_line or after_space or last_character


def plain_rows(path: Path) -> Iterator[tables.Row]:
    """Yield a plain file in pieces of at most DOCUMENT_BYTES, cut at line ends if possible."""
    with reading.open_file(path) as file:
        start = 0
        rest = b""
        while True:
            piece = rest + file.read(DOCUMENT_BYTES - len(rest))
            if not piece:
                return
            cut = cut_position(piece) if len(piece) == DOCUMENT_BYTES else len(piece)
            name = path.as_posix()
            if start:
                name += f", from byte {start}"
            yield tables.Row(name, "text", piece[:cut])
            if b"\0" in piece[: reading.HEAD_BYTES]:
                return  # a binary file: read no further
            start += cut
            rest = piece[cut:]


def rows_of(path: Path, field: str, notes: Counter[str]) -> Iterator[tables.Row]:
    """The rows of a table, or the pieces of a plain file."""
    if tables.holds_documents(path, field):
        return tables.rows(path, field, notes)
    return tables.to_the_end(path, plain_rows(path))


def batches(paths: list[Path], field: str, notes: Counter[str]) -> Iterator[list[tables.Row]]:
    """The rows of all files, in batches of about BATCH_BYTES. `notes` counts what is odd."""
    batch = []
    size = 0
    for path in paths:
        for row in rows_of(path, field, notes):
            batch.append(row)
            size += len(row.content) + 100  # even an almost empty row has a cost
            if size >= BATCH_BYTES:
                yield batch
                batch = []
                size = 0
    if batch:
        yield batch


# ---- a batch -> the documents that are kept ------------------------------------------------------


class Kept(NamedTuple):
    """A document that passed all filters."""

    name: str
    line: bytes  # of the spool
    chars: int
    keys: np.ndarray  # to recognize duplicates, see dedupe.py


def clean_batch(
    batch: list[tables.Row],
    field: str,
    filters: tuple[str, ...],
    masks: tuple[str, ...],
    near: bool,
) -> tuple[Tally, list[Kept]]:
    """The work of a worker on a batch: parse the rows, drop some, mask private data, make keys."""
    tally = Tally(found=len(batch))
    kept = []
    for row in batch:
        try:
            text, replaced = tables.parse(row, field)
        except ValueError as error:
            tally.drop(str(error), [row.name])
            continue
        if replaced:
            tally.change("with invalid bytes replaced")
        reason = failed(text, filters)
        if reason:
            tally.drop(reason, [row.name])
            continue
        for name in masks:
            text, count = mask(text, name)
            if count:
                tally.change(f"[{name}] masked", count)
        line = json.dumps(["", text], ensure_ascii=False).encode("utf-8") + b"\n"
        kept.append(Kept(row.name, line, len(text), dedupe.keys_of(text, near)))
    return tally, kept
