"""Files that are safe to share and to be killed over: JSON and safetensors, never a pickle.

A file is replaced whole: written under another name, its bytes forced onto the disk, then renamed,
which a file system does wholly or not at all ("All File Systems Are Not Created Equal", Pillai et
al., OSDI 2014: what breaks without a step). A pickle can run code when it is read; safetensors
holds names and numbers, and nothing here falls back to a pickle.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TEMPORARY = ".tmp-"  # prefix of whatever is being written or removed
# What a value ends in that is of another type than it should be, too large, or not there.
MALFORMED = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found or trusted: what, where, and what to do."""


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
    """Replace a small file: whoever reads it sees all of the old text or all of the new."""
    beside = path.with_name(TEMPORARY + path.name)
    beside.write_text(text, encoding="utf-8")
    fsync(beside)
    os.replace(beside, path)
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file. Plain types only: TypeError for an array scalar, ValueError for NaN."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a UTF-8 JSON file. Raises CheckpointError: missing, malformed, NaN, or a key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice in one object")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}; restore it") from error


# ---- folders -----------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_or_absent(folder: Path) -> Iterator[Path]:
    """A temporary folder to write to, which is given its name if nothing goes wrong."""
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():  # else another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- weights -----------------------------------------------------------------------------------


def _store_once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of several names for one memory (an embedding that is also the output layer) keep the first.

    Nothing is lost: the model that loads them shares that memory itself, see `load_model`.
    """
    kept = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr() or name, tensor.dtype, tensor.shape, tensor.stride())
        kept.setdefault(place, (name, tensor.detach().contiguous()))
    return dict(kept.values())


def save_tensors(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """Write NAME.safetensors; tensors that share memory are stored once."""
    save_file(_store_once(tensors), folder / f"{name}.safetensors", {"format": "pt"})


def load_tensors(folder: str | Path, name: str = "model") -> dict[str, Tensor]:
    """Read NAME.safetensors onto the CPU. Raises CheckpointError: missing, foreign or malformed."""
    path = Path(folder) / f"{name}.safetensors"
    try:
        return load_file(path, device="cpu")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        problem = f"{path} is not a readable safetensors file: {error}"
        advice = "restore it; a pickle (torch.save) is never opened here, convert it first"
        raise CheckpointError(f"{problem}; {advice}") from error


def load_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into a model, before DDP or FSDP2 wraps it; all or none.

    A name may be missing if the model keeps it in the memory of one that is there, as tied weights.
    Raises ValueError with the first names that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    filled = {own[name].data_ptr() for name in own.keys() & tensors.keys()}
    problems = [f"{name} is unexpected" for name in tensors if name not in own]
    for name, tensor in own.items():
        if name not in tensors and tensor.data_ptr() not in filled:
            problems.append(f"{name} is missing")
        elif name in tensors and tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
            problems.append(f"{name} is {shapes}")
    if problems:
        problem = f"{len(problems)} weights do not fit the model: {', '.join(problems[:3])}"
        raise ValueError(f"{problem}; build the model from the config saved with them")
    model.load_state_dict(tensors, strict=False)
