"""Published weights in and out: folders in the Hugging Face layout.

Such a folder holds config.json (the architecture and its sizes), the weights, and the tokenizer's
files. The weights are one model.safetensors or, for large models, several files
model-00001-of-00005.safetensors ... with an index. Two codebases hold the same network when three
things agree:

1. Names: `blocks.3.attention.q.weight` here is `model.layers.3.self_attn.q_proj.weight` there. One
   table for each family lists the names and serves both directions.
2. Layout: GPT-2, for example, stores its matrices transposed.
3. Settings that no tensor shows: activation, window, rotary base. A model with one wrong setting
   still runs, but writes nonsense. So a setting that our config cannot express is an error.

This module has the steps that all families share. gpt_classes.py, encoder.py and clip.py have the
tables of their families; diffusion.py, scheduler.py and stable_diffusion.py follow the layout of
diffusers. Names and shapes must match exactly. Pickles are never opened, because a pickle can run
code when it is read.

Left out: downloading, quantised weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tinyfm.common.files import build_shapes, load_tensors, read_record, write_json
from tinyfm.common.folders import TEMPORARY

# ---- names --------------------------------------------------------------------------------------


def name_pairs(table: str, column: int) -> list[tuple[str, str]]:
    """Read a table of names: [(ours, theirs), ...].

    table: one row a line, words separated by spaces; column 0 has our names.
    column: the column with their names. Rows with "-" there are left out.
    """
    rows = [line.split() for line in table.strip().splitlines()]
    return [(row[0], row[column]) for row in rows if row[column] != "-"]


def translate(name: str, names: dict[str, str]) -> str:
    """Return their name for the tensor that we call `name`.

    names: our names -> theirs. Most entries are modules, with * in place of a layer's number; their
    weight and bias keep these two words. An entry may also be the full name of one tensor.
    """
    if name in names:
        return names[name]
    module, leaf = name.rsplit(".", 1)
    theirs = names[re.sub(r"\.\d+", ".*", module)]
    for number in re.findall(r"\.(\d+)", module):
        theirs = theirs.replace("*", number, 1)
    return f"{theirs}.{leaf}"


# ---- config.json --------------------------------------------------------------------------------


def refuse(field: str, value: Any, supported: str) -> NoReturn:
    """Raise ValueError for a setting that our models do not compute."""
    raise ValueError(f"{field} is {value!r}; supported: {supported}")


def require(raw: dict, expected: dict[str, Any]) -> None:
    """Raise ValueError unless each field of `expected` has that value in `raw`."""
    for field, value in expected.items():
        if raw.get(field) != value:
            refuse(field, raw.get(field), repr(value))


def read_fields(raw: dict, fields: Sequence[tuple[str, str]], config_cls: type) -> dict[str, Any]:
    """Read settings from a parsed config.json: {our name: value}.

    fields: (our name, their name) of each setting. Where several of their fields set one of ours,
    their values must agree. A value must have the type of our default; null is read as 0 where our
    default is the integer 0. Raises ValueError otherwise.
    """
    values: dict[str, Any] = {}
    for ours, theirs in fields:
        default = getattr(config_cls, ours)
        value = raw.get(theirs)
        if value is None and type(default) is int and default == 0:
            value = 0
        types = (float, int) if type(default) is float else (type(default),)
        if type(value) not in types:
            refuse(theirs, value, f"a value of type {types[0].__name__}")
        if ours in values and values[ours] != value:
            refuse(theirs, value, f"{values[ours]!r}, as in the other fields for `{ours}`")
        values.setdefault(ours, value)
    return values


# ---- in -----------------------------------------------------------------------------------------


SHARD = re.compile(r"[^/\\]+\.safetensors")  # a file of the same folder


def read_shards(index: Path) -> dict[str, Tensor]:
    """Read the tensors of several files, which an index lists.

    Raises ValueError for a malformed index, and for a tensor that two files hold.
    """
    places = read_record(index, ShardIndex)["weight_map"]
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if not SHARD.fullmatch(shard):
            raise ValueError(f"{index}: weight_map names {shard[:60]!r}, no file of this folder")
        found = load_tensors(index.parent, shard.removesuffix(".safetensors"))
        twice = tensors.keys() & found.keys()
        if twice:
            raise ValueError(
                f"{index.parent}: {shard} and another file both hold {min(twice)}; the files are "
                "of two models: download them again"
            )
        tensors |= found
    return tensors


class ShardIndex(TypedDict):
    """The index of weights in several files."""

    weight_map: dict[str, str]  # tensor -> file


# Files of the same weights in half the bytes stand beside the others, or alone.
VARIANTS = ("", ".fp16", ".bf16")


def read_tensors(folder: Path, name: str = "model") -> dict[str, Tensor]:
    """Read all tensors of a folder, from one file or several, under the names in the files.

    name: of the file, without .safetensors. Raises ValueError for a missing or damaged file, and
    for a pickle.
    """
    for variant in VARIANTS:
        if (folder / f"{name}{variant}.safetensors").is_file():
            return load_tensors(folder, name + variant)
        index = folder / f"{name}.safetensors.index{variant}.json"
        if index.is_file():
            return read_shards(index)
    pickles = [*folder.glob("pytorch_model*.bin"), *folder.glob("diffusion_pytorch_model*.bin")]
    if pickles:
        raise ValueError(
            f"{folder} holds its weights as a pickle, which can run code when it is read; if you "
            "trust its source, convert it with transformers and the class that config.json names: "
            "CLASS.from_pretrained(folder).save_pretrained(new_folder)"
        )
    return load_tensors(folder, name)


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of weights


def check_tensors(folder: Path, stored: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ValueError with the first tensors that are missing, unexpected or of another shape."""
    problems = [f"{name} is missing" for name in expected if name not in stored]
    problems += [f"{name} is unexpected" for name in stored if name not in expected]
    for name, tensor in expected.items():
        if name in stored and stored[name].shape != tensor.shape:
            problems.append(f"{name} is {tuple(stored[name].shape)}, not {tuple(tensor.shape)}")
        elif name in stored and stored[name].dtype not in DTYPES:
            problems.append(f"{name} has numbers of type {stored[name].dtype}")
    if problems:
        raise ValueError(
            f"{folder}: tensors do not fit config.json, {len(problems)} in all: "
            f"{', '.join(problems[:4])}; "
            "the folder is incomplete, or its weights are of another model"
        )


def build_on_meta(cls: type, config: Any, folder: Path, n_tensors: int) -> nn.Module:
    """Build a model that has shapes but no memory, so that its weights are allocated only once,
    when they are read.

    Raises ValueError if the config of the folder has sizes far from those of its n_tensors weights.
    """
    try:
        return build_shapes(lambda: cls(config), n_tensors)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def assign_weights(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Give a model from `build_on_meta` its weights, as dtype on the CPU, and its buffers.

    `model.reset_buffers()` computes the buffers that files do not store. The model is left in
    evaluation mode.
    """
    own = {}
    for name, tensor in tensors.items():
        # A copy, because the files may change or be deleted while the model lives.
        own[name] = tensor.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    model.load_state_dict(own, strict=False, assign=True)
    model.reset_buffers()
    model.to(dtype).eval()


# ---- out ----------------------------------------------------------------------------------------


def check_tokenizer(tokenizer, vocab_size: int) -> None:
    """Raise ValueError if a tokenizer (or None) has more ids than the model."""
    if tokenizer and tokenizer.vocab_size > vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, the model {vocab_size}"
        raise ValueError(f"the tokenizer has {sizes}; pass the one the model was trained with")


# Names of files with a model's weights or settings; those of others must not be replaced silently.
OWNED = ("config.json", "model_index.json", "*.safetensors", "*.safetensors.index.json", "*.bin")
# Files of a tokenizer, which would change what another one in the folder means.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "bytes.json", "chat_template.jinja",
)  # fmt: skip


def check_overwrite(folder: Path, overwrite: bool) -> None:
    """Raise ValueError if a folder is a file or, unless overwrite, holds a model's files."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder to write the model into")
    if overwrite:
        return
    found = sorted(path.name for pattern in OWNED for path in folder.glob(pattern))
    if found:
        raise ValueError(
            f"{folder} holds a model already ({found[0]}); choose another folder, or overwrite it"
        )


def write_folder(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    tokenizer=None,
    overwrite: bool = False,
    others: dict[str, Any] | None = None,
    texts: dict[str, str] | None = None,
    rows: dict[str, int] | None = None,
) -> None:
    """Write a folder: weights, config.json and, if given, the tokenizer and further files.

    others: {file name: content as JSON}. texts: {file name: content}. rows: how the tokenizer makes
    rows, as its save_pretrained takes it. config.json is moved into place last, so a folder that a
    crash left incomplete does not load. Files of no model are kept. Raises ValueError if the folder
    holds a model already, unless overwrite.
    """
    check_overwrite(folder, overwrite)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    # transformers 5 reads dtype, transformers 4 reads torch_dtype.
    config = config | {"dtype": dtype, "torch_dtype": dtype}
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=TEMPORARY) as name:
        temporary = Path(name)
        # Write all files there.
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
        if tokenizer:
            tokenizer.save_pretrained(temporary, **(rows or {}))
        for name, content in (texts or {}).items():
            (temporary / name).write_text(content, encoding="utf-8")
        for name, content in (others or {}).items():
            write_json(temporary / name, content)
        write_json(temporary / "config.json", config)
        # Remove what the new files would contradict, then move these into place, config.json last.
        (folder / "config.json").unlink(missing_ok=True)
        if tokenizer:
            for name in TOKENIZER_FILES:
                (folder / name).unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
