"""Published weights in and out: folders in the Hugging Face layout.

Such a folder holds config.json (which architecture, which sizes), model.safetensors or, for large
models, model-00001-of-00005.safetensors ... and an index of them, and the tokenizer's files. Two
codebases hold the same network when three things agree:

1. names: `blocks.3.attention.q.weight` here is `model.layers.3.self_attn.q_proj.weight` there. One
   table a family says so, and serves both directions;
2. layout: GPT-2, say, keeps its matrices transposed;
3. what no tensor shows: activation, window, rotary base. One field read wrongly gives a model that
   politely talks nonsense, so what our config cannot express is refused, never ignored.

Here is what all families share; hub_gpt.py has the tables of the GPT, hub_clip.py those of CLIP.
Names and shapes must match exactly. Nothing is unpickled: a pickle can run code when it is read.
`python -m tinyfm.hub runs/gpt exported/` exports a run for transformers and what reads its files.
Left out: downloading, quantised weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tinyfm.common.files import TEMPORARY, load_tensors, read_json, write_json

# ---- names --------------------------------------------------------------------------------------


def pairs(table: str, column: int) -> list[tuple[str, str]]:
    """(ours, theirs) from the text of a table; "-" where they have none."""
    rows = [line.split() for line in table.strip().splitlines()]
    return [(row[0], row[column]) for row in rows if row[column] != "-"]


def translate(name: str, names: dict[str, str]) -> str:
    """Their name of our tensor. `names` is of modules, with * for the number of a layer, and of
    tensors that are called otherwise than weight and bias."""
    if name in names:
        return names[name]
    module, leaf = name.rsplit(".", 1)
    theirs = names[re.sub(r"\.\d+", ".*", module)]
    for number in re.findall(r"\.(\d+)", module):
        theirs = theirs.replace("*", number, 1)
    return f"{theirs}.{leaf}"


# ---- config.json --------------------------------------------------------------------------------


def refuse(field: str, value: Any, supported: str) -> NoReturn:
    raise ValueError(f"{field} is {value!r}; supported: {supported}")


def take(raw: dict, fields: Sequence[tuple[str, str]], config_cls: type) -> dict[str, Any]:
    """The values of `fields`, (ours, theirs), by our names; null is 0 where 0 means a default."""
    values: dict[str, Any] = {}
    for ours, theirs in fields:
        default, value = getattr(config_cls, ours), raw.get(theirs)
        if value is None and default == 0 and type(default) is int:
            value = 0
        kinds = (float, int) if type(default) is float else (type(default),)
        if type(value) not in kinds:
            refuse(theirs, value, f"a value of type {kinds[0].__name__}")
        if values.setdefault(ours, value) != value:
            refuse(theirs, value, f"{values[ours]!r}, as in the other fields for `{ours}`")
    return values


# ---- in -----------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, in one file or several, by the names in there.

    They are views of the files, read when touched. Raises ValueError for a file that is missing or
    damaged, and for a pickle.
    """
    index = folder / "model.safetensors.index.json"
    whole = (folder / "model.safetensors").is_file()
    if not whole and index.is_file():
        tensors = {}
        for shard in sorted(set(read_json(index).get("weight_map", {}).values())):
            tensors |= load_tensors(folder, Path(shard).stem)
        return tensors
    if not whole and any(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{folder} holds its weights as a pickle, which can run code when it is read; if you "
            "trust its source, convert it with transformers and the class that config.json names: "
            "CLASS.from_pretrained(folder).save_pretrained(new_folder)"
        )
    return load_tensors(folder, "model")


def check_tensors(folder: Path, stored: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ValueError with the first names that are missing, unexpected or of another shape."""
    problems = [f"{name} is missing" for name in expected if name not in stored]
    problems += [f"{name} is unexpected" for name in stored if name not in expected]
    problems += [
        f"{name} is {tuple(stored[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(
            f"{folder}: {len(problems)} tensors do not fit config.json: {', '.join(problems[:4])}; "
            "the folder is incomplete, or its weights are of another model"
        )


def fill(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Give a model built on the meta device its weights, as dtype on the CPU, and its buffers.

    `model.reset_buffers()` makes what is not stored. The model is left in evaluation mode.
    """
    # A copy, as the files may change or go while the model lives.
    own = {"dtype": dtype, "copy": True, "memory_format": torch.contiguous_format}
    tensors = {name: tensor.to("cpu", **own) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.reset_buffers()
    model.to(dtype).eval()


# ---- out ----------------------------------------------------------------------------------------


def check_tokenizer(tokenizer, vocab_size: int) -> None:
    """Raise ValueError if a tokenizer has ids that the model does not know."""
    if tokenizer and tokenizer.vocab_size > vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, the model {vocab_size}"
        raise ValueError(f"the tokenizer has {sizes}; pass the one the model was trained with")


def publish(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], tokenizer=None,
            overwrite: bool = False, others: dict[str, Any] | None = None) -> None:  # fmt: skip
    """Write a folder: its weights, its config.json and, if given, tokenizer and other JSON files.

    config.json comes last, so that what a crash leaves behind does not load; other files in the
    folder stay. Raises ValueError if it has a config.json already, unless overwrite.
    """
    if (folder / "config.json").exists() and not overwrite:
        raise ValueError(f"{folder} holds a model already; choose another folder, or overwrite it")
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = config | {"dtype": dtype, "torch_dtype": dtype}  # for transformers 5, and 4
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=TEMPORARY) as name:
        temporary = Path(name)
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
        if tokenizer:
            tokenizer.save_pretrained(temporary)
        for name, content in (others or {}).items():
            write_json(temporary / name, content)
        write_json(temporary / "config.json", config)
        (folder / "config.json").unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)
