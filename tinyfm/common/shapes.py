"""Tensors that have a shape, a dtype and a device, but no memory.

torch has tensors on the device "meta": operations on them give the shapes and dtypes of their
results, and compute nothing. But what a model does may depend on the device: autocast chooses
dtypes by it, attention chooses its kernel. So a Shape is a meta tensor that says it is on another
device. While a ShapesOnly() is entered, operations give Shapes, and real tensors count as such.

torch's own FakeTensorMode does the same for its compiler, checks much more, and takes three times
as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

META = torch.device("meta")
OF_REAL = WeakTensorKeyDictionary()  # a real tensor's Shape, so that all its views share a storage


class Shape(Tensor):
    """A meta tensor that says it is on `device`."""

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device):
        return Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )

    def __init__(self, meta: Tensor, device: torch.device):
        self.meta = meta

    def __repr__(self, **options) -> str:
        return f"Shape({tuple(self.shape)}, {self.dtype}, {self.device})"

    def untyped_storage(self) -> torch.UntypedStorage:
        """Views of one tensor share it, as real ones do."""
        return self.meta.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class ShapesOnly(TorchDispatchMode):
    """While it is entered, operations make no tensor that needs memory."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The result of an operation, as Shapes. Raises what it raises for meta tensors."""
    if torch.Tag.inplace_view in function.tags:  # such as transpose_: changes the Shape itself
        with torch._C._DisableTorchDispatch():
            function(*args, **kwargs)
    seen: dict[int, Shape] = {}
    args = to_meta(args, seen)
    kwargs = {name: to_meta(value, seen) for name, value in kwargs.items()}
    device = kwargs.get("device")
    if device is None and seen:  # numbers may be on the CPU beside tensors on a GPU
        device = max(seen.values(), key=lambda shape: shape.ndim > 0).device
    elif any(argument.name == "device" for argument in function._schema.arguments):
        device = device or torch.device("cpu")
        kwargs["device"] = META
    return from_meta(function(*args, **kwargs), seen, device)


def to_meta(value: Any, seen: dict[int, Shape]) -> Any:
    """An argument with meta tensors for its tensors. seen: their Shapes by id(meta), extended."""
    if isinstance(value, list | tuple):
        return [to_meta(part, seen) for part in value]
    if not isinstance(value, Tensor):
        return value
    if not isinstance(value, Shape):
        if value not in OF_REAL:
            meta = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=META)
            OF_REAL[value] = Shape(meta, value.device)
        value = OF_REAL[value]
    seen[id(value.meta)] = value
    return value.meta


def from_meta(value: Any, seen: dict[int, Shape], device: torch.device) -> Any:
    """A result with Shapes for its tensors: an operation in place returns the one it was given."""
    if isinstance(value, list | tuple):
        return type(value)([from_meta(part, seen, device) for part in value])
    if not isinstance(value, Tensor):
        return value
    return seen[id(value)] if id(value) in seen else Shape(value, device)
