"""Read a training state of torch.distributed.checkpoint (DCP) without running code.

DCP stores its index and the counters as pickles, and a pickle may name any function to be called
when it is read. Here only the classes of which an index consists may be named, and only plain
values and tensors in the counters. So a run that somebody else trained can be resumed as safely as
it can be sampled from.

This module loads slowly, as DCP does: import it where it is needed.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from enum import Enum
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

# (module, names) that an index may name. A path is read as one that touches no disk.
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
}  # fmt: skip
PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}


def enum_member(kind: type[Enum], name: str) -> Enum:
    """What some versions of Python write as getattr(kind, name): a member of an enumeration.

    Raises TypeError, ValueError or KeyError for anything else that getattr could fetch.
    """
    if not issubclass(kind, Enum):
        raise ValueError(f"the index takes {name} of {kind}, which is no enumeration")
    return kind[name]


class IndexUnpickler(pickle._Unpickler):
    """An unpickler for DCP's index alone.

    It is derived from the one in Python, because the one in C reserves as much memory as a damaged
    or forged file asks for.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return enum_member
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.partition(".")[0] == "pathlib" and name in PATHS:
            return pathlib.PurePath
        raise ValueError(f"the index names {module}.{name}, which does not belong there")


def read_index(file: BinaryIO) -> Metadata:
    """DCP's index. Raises an Exception, of any kind, for a file that is none."""
    index = IndexUnpickler(file).load()
    if not isinstance(index, Metadata):
        raise ValueError("the file holds no index")
    for place in index.storage_data.values():
        if pathlib.PurePath(place.relative_path).name != place.relative_path:
            raise ValueError(f"the index names {place.relative_path}, a file of another folder")
    return index


class Reader(FileSystemReader):
    """DCP's reader, with `read_index`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(pathlib.Path(self.path) / ".metadata", "rb") as file:
            index = read_index(file)
        if index.storage_meta is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class Planner(DefaultLoadPlanner):
    """DCP's planner, which fills a template; counters are plain values and tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        content = torch.load(value, weights_only=True)
        # DCP unpickles what it is given, without limits. It gets a pickle that was made here.
        own = io.BytesIO()
        torch.save(content, own)
        own.seek(0)
        super().load_bytes(read_item, own)
