"""Files that are safe to share and survive a kill: JSON and safetensors, never a pickle.

A file is written under another name, its bytes are forced onto the disk, and then it is renamed.
A file system carries out a rename completely or not at all. ("All File Systems Are Not Created
Equal", Pillai et al., OSDI 2014, shows what goes wrong if one of the steps is left out.)

A pickle can run code when it is read. A safetensors file holds names and numbers only, and nothing
here falls back to a pickle.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from tinyfm.common import schema
from tinyfm.common.folders import temporary_name

# The errors that reading a file raises if a value in it is missing, too large or of a wrong type.
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that may be NaN
BUFFER_BYTES = 1 << 30  # of tables that a model computes and no file stores, at most
MALFORMED = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError)


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found or trusted. The message names it, and the fix."""


# ---- text --------------------------------------------------------------------------------------


def fsync(path: Path) -> None:
    """Force a file's bytes, or a folder's list of names, out of memory onto the disk."""
    if os.name == "nt":
        return  # Windows opens no folders, and syncs only what was opened for writing
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a small file: a reader sees all of the old text or all of the new."""
    temporary = temporary_name(path)
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file with a value of plain types.

    Raises TypeError for other types, such as an array's scalar, and ValueError for NaN or infinity.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, largest: int = schema.JSON_BYTES) -> Any:
    """Read a UTF-8 JSON file; `schema.check` compares the value with what it should be.

    largest: limit of the file's size in bytes. Raises CheckpointError if the file is missing, no
    regular file, larger, or no JSON as `schema.parse_json` reads it.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")
        with open(path, "rb") as file:
            content = file.read(largest + 1)
        if len(content) > largest:
            raise ValueError(f"it has more than {largest:,} bytes")
        return schema.parse_json(content)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}; restore it") from error


def read_record(path: Path, kind: Any) -> Any:
    """Read a JSON file with a value of that kind: a type, such as dict[str, float].

    Raises CheckpointError if it cannot be read, and ValueError with the file and the field for a
    value of another kind.
    """
    return schema.check(read_json(path), kind, str(path))


# ---- sizes ---------------------------------------------------------------------------------------


class WithoutInit(TorchFunctionMode):
    """Leaves tensors as they are instead of drawing initial values.

    On the device "meta" there is nothing to draw, and PyTorch would load its compiler to do so.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def build_shapes(build: Callable[[], nn.Module], n_tensors: int) -> nn.Module:
    """The model that `build` makes, on the device "meta": shapes without memory.

    With these a config is compared with the weights beside it before anything large is allocated.
    n_tensors: number of tensors in those weights. Raises ValueError if the model has far more
    parameters than that, or tables that are too large.
    """
    most = 100 + 2 * n_tensors  # a tied weight is stored once
    count = 0

    def limit(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ValueError(f"the config has far more layers than its {n_tensors} weights")

    hook = register_module_parameter_registration_hook(limit)
    try:
        with torch.device("meta"), WithoutInit():
            model = build()
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"no model has the sizes in the config: {reason}") from error
    finally:
        hook.remove()
    size = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if size > BUFFER_BYTES:
        raise ValueError(f"the config needs {size / 2**30:.0f} GiB of tables besides the weights")
    return model


# ---- weights -----------------------------------------------------------------------------------


def _store_once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep one name for each memory: the first. An embedding may also be the output layer.

    Nothing is lost, because the model that loads the tensors shares the memory too; see
    `load_model`.
    """
    kept = {}
    for name, tensor in tensors.items():
        # An empty tensor has the address 0; its name stands in for it.
        place = (tensor.data_ptr() or name, tensor.dtype, tensor.shape, tensor.stride())
        kept.setdefault(place, (name, tensor.detach().contiguous()))
    return dict(kept.values())


def save_tensors(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """Write folder/NAME.safetensors. Tensors that share memory are stored once."""
    save_file(_store_once(tensors), folder / f"{name}.safetensors", {"format": "pt"})


def load_tensors(folder: str | Path, name: str = "model") -> dict[str, Tensor]:
    """Read folder/NAME.safetensors onto the CPU.

    Raises CheckpointError if it is missing, malformed, of another format, or has a NaN in it.
    """
    path = Path(folder) / f"{name}.safetensors"
    try:
        tensors = load_file(path, device="cpu")
        for key, tensor in tensors.items():
            if tensor.dtype in NUMBERS and tensor.isnan().any():
                raise ValueError(f"{key} holds NaN, which is no number")
        return tensors
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        problem = f"{path} is not a readable safetensors file: {error}"
        advice = "restore it; a pickle (torch.save) is never opened here: convert it first"
        raise CheckpointError(f"{problem}; {advice}") from error


def kind_of(tensor: Tensor) -> str:
    """What a tensor's numbers are, whatever their precision: "real", "complex" or "integer"."""
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "integer"


def check_fits(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless these are all tensors of the model.

    A tied weight, which shares the memory of another, may be missing if the other is present. The
    message has the first names that are missing, unexpected, or of another shape or kind.
    """
    own = model.state_dict(keep_vars=True)
    filled = {id(own[name]) for name in own.keys() & tensors.keys()}
    problems = [f"{name} is unexpected" for name in tensors if name not in own]
    for name, tensor in own.items():
        if name not in tensors:
            if id(tensor) not in filled:
                problems.append(f"{name} is missing")
        elif tensors[name].shape != tensor.shape:
            problems.append(f"{name} is {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
        elif kind_of(tensors[name]) != kind_of(tensor):
            problems.append(f"{name} has {kind_of(tensors[name])} numbers, not {kind_of(tensor)}")
    if problems:
        problem = f"weights do not fit the model, {len(problems)} in all: {', '.join(problems[:3])}"
        raise ValueError(f"{problem}; build the model from the config saved with them")


def load_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into a model: all of them, or none if there is an error.

    Raises ValueError as `check_fits`.
    """
    check_fits(model, tensors)
    model.load_state_dict(tensors, strict=False)
