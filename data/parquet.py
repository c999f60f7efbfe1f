"""Read a .parquet a few rows at a time, and refuse one that expands without end.

A small file can expand to gigabytes: a column of one value repeated takes a few bytes. The index at
the end of the file says how large each column is, but a forged index may say less. So the headers
of the pages are read too. They are structs of Thrift's compact protocol, of which `read_thrift`
reads the whole numbers. pyarrow, which reads everything else, unpacks a page as a whole.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from data import reading

ROWS = 16  # rows that are in memory at a time
ROW_BYTES = 64  # what a row counts for at least


# ---- Thrift's compact protocol -------------------------------------------------------------------


def read_varint(file: BinaryIO) -> int:
    """A whole number in Thrift's compact protocol: seven bits a byte, the lowest first."""
    number = 0
    for shift in range(0, 70, 7):
        (byte,) = file.read(1)
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise ValueError("a number without an end")


def skip_thrift(file: BinaryIO, kind: int, depth: int = 0) -> int:
    """Read a value of Thrift's compact protocol; return it if it is a whole number, else 0."""
    if depth > 8:
        raise ValueError("nested too deeply")
    if kind in (4, 5, 6):  # whole numbers, in zigzag order: 0, -1, 1, -2 ...
        number = read_varint(file)
        return (number >> 1) ^ -(number & 1)
    if kind in (3, 7):  # a byte, a float
        if not file.read(1 if kind == 3 else 8):
            raise ValueError("it ends within a value")
    elif kind == 8:  # bytes
        file.seek(read_varint(file), os.SEEK_CUR)
    elif kind in (9, 10):  # a list
        (head,) = file.read(1)
        count = head >> 4 if head < 240 else read_varint(file)
        for _ in range(count):
            skip_thrift(file, 3 if head & 15 in (1, 2) else head & 15, depth + 1)
    elif kind == 12:
        read_thrift(file, depth + 1)
    elif kind not in (1, 2):  # true and false, which have no content in a struct
        raise ValueError(f"a value of the unknown kind {kind}")
    return 0


def read_thrift(file: BinaryIO, depth: int = 0) -> dict[int, int]:
    """Read a struct of Thrift's compact protocol: {field: value} of its whole numbers."""
    fields = {}
    field = 0
    while True:
        (head,) = file.read(1)
        if head == 0:
            return fields
        field = field + (head >> 4) if head >> 4 else skip_thrift(file, 4)
        fields[field] = skip_thrift(file, head & 15, depth)


# ---- sizes, and rows -----------------------------------------------------------------------------


def page_bytes(path: Path, column) -> int:
    """The bytes that the pages of a column expand to, as their own headers say.

    The list of columns at the end of a file may say less, and a page is unpacked as a whole.
    """
    offsets = (column.dictionary_page_offset, column.data_page_offset)
    place = min(offset for offset in offsets if offset)
    end = place + column.total_compressed_size
    size = 0
    with open(path, "rb") as file:
        while place < end:
            file.seek(place)
            try:
                fields = read_thrift(file)
            except ValueError:
                break  # damaged: the library will say so
            size += max(0, fields.get(2, 0))  # uncompressed_page_size
            place = file.tell() + max(0, fields.get(3, 0))  # compressed_page_size
    return size


def check_size(file, path: Path, columns: Sequence[str] | None) -> int:
    """The bytes that the columns may expand to. Raises ValueError if they say that it is more."""
    limit = reading.MAX_EXPANSION * path.stat().st_size + reading.FREE_BYTES
    size = ROW_BYTES * file.metadata.num_rows
    for group in range(file.metadata.num_row_groups):
        row_group = file.metadata.row_group(group)
        for i in range(row_group.num_columns):
            column = row_group.column(i)
            if columns is None or column.path_in_schema.split(".")[0] in columns:
                size += max(column.total_uncompressed_size, page_bytes(path, column))
    if size > limit:
        raise ValueError(f"expands more than {reading.MAX_EXPANSION}-fold")
    return limit


def text_bytes(column) -> int:
    """The bytes of a column's values, each as often as it occurs."""
    if not hasattr(column, "dictionary"):
        return column.nbytes
    compute = reading.extra("pyarrow.compute")
    try:
        lengths = compute.binary_length(column.dictionary).take(column.indices)
    except NotImplementedError:  # of numbers, which are small
        return column.nbytes
    return compute.sum(lengths).as_py() or 0


def batches(path: Path, columns: Sequence[str] | None = None) -> Iterator:
    """Yield record batches of a .parquet: `columns`, or all of them.

    Raises ValueError or OSError if it is broken or expands too far.
    """
    parquet = reading.extra("pyarrow.parquet")
    with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        left = check_size(file, path, columns)
        for batch in file.iter_batches(ROWS, columns=columns):
            left -= sum(map(text_bytes, batch.columns)) + ROW_BYTES * len(batch)
            if left < 0:
                raise ValueError(f"expands more than {reading.MAX_EXPANSION}-fold")
            yield batch
