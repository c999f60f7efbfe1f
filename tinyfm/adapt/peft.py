"""LoRA adapters in and out: folders in the layout of Hugging Face's peft, for a GPT or a CLIP.

Such a folder holds adapter_config.json and adapter_model.safetensors, and fits the base that
hub_gpt.py or hub_clip.py writes. lora_A and lora_B there are A and B here, and the names of the
layers are those of the base's tables. Three layers differ:

1. GPT-2 joins q, k and v into one c_attn. One LoRA of theirs is three of ours with the same A, each
   with its rows of B. Three of ours are one of theirs with three times the rank,

       A = [A_q; A_k; A_v],    B = [B_q 0 0; 0 B_k 0; 0 0 B_v],

   and what we read back is free of the zeros.
2. CLIP's patches: a product here, a convolution there; the same numbers in another shape.
3. A table of tokens: the two are lora_embedding_A, transposed, and lora_embedding_B. peft keeps the
   table itself beside them, which has to be the base's.

What our LoRA does not compute is refused by the name of its field (peft_config.py). Left out:
adapters of other kinds than LoRA, whole modules saved beside it, other families.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfm.adapt import AdapterConfig, select, train_only
from tinyfm.adapt.lora import LoRA, adapted_layers, attach, find_layers
from tinyfm.clip import CLIP
from tinyfm.common.files import load_tensors, read_json, save_tensors, write_json
from tinyfm.gpt import GPT
from tinyfm.hub import clip, gpt
from tinyfm.hub.layout import pairs, refuse, translate

WEIGHTS = "adapter_model"
TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))")
TABLE = re.compile(r"base_model\.model\.(.+)\.base_layer\.weight")
PART = re.compile(r"(?<=\.c_attn)\.([qkv])$")  # hub_gpt.py's name for a share of GPT-2's c_attn

# ---- names --------------------------------------------------------------------------------------


def their_layers(model: nn.Module) -> dict[str, str]:
    """Our name -> theirs for every layer that can have a LoRA; parts of c_attn as c_attn.q.

    Raises ValueError for a model that transformers cannot express.
    """
    if isinstance(model, GPT):
        kind = gpt.choose_architecture(gpt.resolve(model.config))
        table = dict(pairs(gpt.GPT_NAMES, gpt.ARCHITECTURES[kind].column))
    elif isinstance(model, CLIP) and model.config.stem == "patch":
        table = clip.NAMES
    else:
        raise ValueError(
            f"this {type(model).__name__} has no layout in peft; a GPT has, and a CLIP whose stem "
            "is patch"
        )
    ours = find_layers(model, ".")
    return {name: translate(f"{name}.weight", table).removesuffix(".weight") for name in ours}


# ---- out ----------------------------------------------------------------------------------------


def join(parts: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(A, B) of c_attn from those of some of q, k, v."""
    As, (A, B) = [A for A, _ in parts.values()], next(iter(parts.values()))
    if all(torch.equal(A, other) for other in As):
        none = torch.zeros_like(B)
        return A, torch.cat([parts[p][1] if p in parts else none for p in "qkv"])
    none = B.new_empty(len(B), 0)  # as many rows of zeros
    return torch.cat(As), torch.block_diag(*(parts[p][1] if p in parts else none for p in "qkv"))


def their_loras(model: nn.Module, name: str) -> dict[str, tuple[Tensor, Tensor, LoRA]]:
    """Their name of a layer -> (A, B, our LoRA or one of the three)."""
    names, loras, groups = their_layers(model), {}, {}
    for ours, layer in adapted_layers(model):
        if name in layer.lora:
            lora, theirs = layer.lora[name], names[ours]
            A, B = lora.A.weight.detach(), lora.B.weight.detach()
            A = A.T.contiguous() if isinstance(layer, nn.Embedding) else A
            if f"{theirs}.weight" == clip.PATCHES:
                c = model.config
                A, B = A.unflatten(1, (c.channels, c.patch_size, c.patch_size)), B[..., None, None]
            if part := PART.search(theirs):
                theirs = PART.sub("", theirs)
                groups.setdefault(theirs, {})[part[1]] = (A, B)
                A, B = join(groups[theirs])  # of those found so far
            loras[theirs] = (A, B, lora)
    if not loras:
        raise ValueError(f"the model has no LoRA named {name!r}; adapt or load one first")
    return loras


def save_adapter(model: nn.Module, folder: str | Path, base_name: str, name: str = "default",
                 overwrite: bool = False) -> None:  # fmt: skip
    """Write the LoRA of a name, at the weight it has, for peft and what reads its files.

    base_name: folder or name of the base, as exported. Raises ValueError if the model has no such
    LoRA or no layout, or if the folder has an adapter already, unless overwrite.
    """
    folder, loras = Path(folder), their_loras(model, name)
    if (folder / CONFIG).exists() and not overwrite:
        raise ValueError(f"{folder} holds an adapter already; choose another, or overwrite it")
    every = {PART.sub("", theirs) for theirs in their_layers(model).values()}
    ranks = {module: len(A) for module, (A, _, _) in loras.items()}
    alphas = {module: lora.scale * ranks[module] for module, (_, _, lora) in loras.items()}
    rank, alpha = min(ranks.values()), min(alphas.values())
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if isinstance(model, GPT) else None,
        "base_model_name_or_path": base_name, "inference_mode": True, "bias": "none",
        "r": rank, "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "lora_alpha": alpha, "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "lora_dropout": next(iter(loras.values()))[2].config.dropout,
        "target_modules": target_modules({*loras}, every),
        "fan_in_fan_out": any(".c_" in module for module in loras),
    }  # fmt: skip
    stored = {}
    for module, (A, B, lora) in loras.items():
        form = "lora_embedding_{}" if isinstance(lora.A, nn.Embedding) else "lora_{}.weight"
        for letter, tensor in (("A", A), ("B", B)):
            stored[f"base_model.model.{module}.{form.format(letter)}"] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # written last: what a crash leaves does not load
    save_tensors(folder, WEIGHTS, stored)
    write_json(folder / CONFIG, config)


# ---- in -----------------------------------------------------------------------------------------


def read_pairs(folder: Path, known: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Their name of a layer -> {"A": ..., "B": ...}; known: their name -> weight of every layer.

    Raises ValueError for any other tensor, but a table that is the model's.
    """
    if not (folder / f"{WEIGHTS}.safetensors").exists() and (folder / f"{WEIGHTS}.bin").exists():
        raise ValueError(
            f"{folder} holds its adapter as a pickle, which can run code when it is read; if you "
            "trust its source, load it with peft and save it again"
        )
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(folder, WEIGHTS).items():
        match = TENSOR.fullmatch(key) or TABLE.fullmatch(key)
        if not match or match[1] not in known:
            raise ValueError(f"{folder}: {key} is of no layer of this model that can have a LoRA")
        if match.re is TENSOR:
            layers.setdefault(match[1], {})[match[2] or match[3]] = tensor
        elif not torch.equal(tensor, known[match[1]]):
            raise ValueError(f"{folder}: {key} is not the model's: it was trained on another base")
    for module, pair in layers.items():
        if len(pair) < 2:
            raise ValueError(f"{folder}: of {module} only lora_{next(iter(pair))} is there")
    return layers


def our_loras(model: nn.Module, folder: Path) -> dict[str, tuple[Tensor, Tensor, AdapterConfig]]:
    """Our name of a layer -> (A, B, config). Raises ValueError where a shape does not fit."""
    raw, names, loras = read_config(folder), their_layers(model), {}
    weights = {PART.sub("", name): model.get_submodule(n).weight for n, name in names.items()}
    layers = read_pairs(folder, weights)
    for ours, theirs in names.items():
        part, module = PART.search(theirs), PART.sub("", theirs)
        if module not in layers:
            continue
        A, B = (layers[module][letter].flatten(1) for letter in "AB")
        rank = by_pattern(raw.get("rank_pattern"), module, raw["r"])
        alpha = by_pattern(raw.get("alpha_pattern"), module, raw["lora_alpha"])
        W = weights[module].flatten(1)
        out, inside = W.T.shape if isinstance(model.get_submodule(ours), nn.Embedding) else W.shape
        shapes, fit = (A.shape, B.shape), ((rank, inside), (3 * out if part else out, rank))
        if shapes != fit:
            raise ValueError(f"{folder}: {module} has A, B of {[*map(tuple, shapes)]}, not {fit}")
        if part:
            untrained, B = not B.any(), B.chunk(3)["qkv".index(part[1])]
            used = B.any(0) | untrained  # without the zeros of `join`
            if not used.any():
                continue
            A, B = A[used], B[:, used]
        loras[ours] = (A, B, AdapterConfig(len(A), alpha / rank * len(A), raw["lora_dropout"]))
    return loras


@torch.no_grad()
def load_adapter_folder(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Put the LoRA in a folder onto its base, in place, under a name of its own.

    As after adapt.apply, it alone is trained and saved. Raises ValueError for a pickle, for what
    our LoRA does not compute, and for tensors that do not fit the model, which stays as it was.
    """
    loras = our_loras(model, Path(folder))
    attach(model, {ours: config for ours, (_, _, config) in loras.items()}, name)
    train_only(model, select(model, "lora", name))
    for ours, (A, B, _) in loras.items():
        lora = model.get_submodule(ours).lora[name]
        A = A.T if isinstance(lora.A, nn.Embedding) else A.view_as(lora.A.weight)
        lora.A.weight.copy_(A)
        lora.B.weight.copy_(B.view_as(lora.B.weight))


# FOLDED: merge this into the module's docstring
# adapter_config.json of Hugging Face's peft: what of it our LoRA computes; the rest is refused.


CONFIG = "adapter_config.json"

# Fields with a say here, or none: which layers are meant shows in the tensors, and the settings of
# other kinds count for nothing unless a field that turns them on is set.
KNOWN = """
peft_type bias init_lora_weights r lora_alpha lora_dropout rank_pattern alpha_pattern
task_type base_model_name_or_path target_modules exclude_modules layers_to_transform layers_pattern
fan_in_fan_out inference_mode revision auto_mapping peft_version runtime_config
megatron_core qalora_group_size loftq_config eva_config corda_config lora_ga_config
"""
ALLOWED = {  # some ways to begin, such as pissa, change the base
    "peft_type": ("LORA",), "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}  # fmt: skip


def target_modules(found: set[str], every: set[str]) -> list[str]:
    """What says which layers are adapted: the ends of their names, or their names where an end is
    also that of another."""
    ends = {name.split(".")[-1] for name in found}
    return sorted(ends if found == {n for n in every if n.split(".")[-1] in ends} else found)


def by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value for a layer: of the first pattern that ends its name, as peft looks them up."""
    found = (v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises ValueError for what our LoRA does not compute."""
    raw = read_json(folder / CONFIG)
    try:
        if not isinstance(raw, dict):
            refuse("the file", raw, "an object")
        raw = {"bias": "none", "init_lora_weights": True, "lora_dropout": 0.0} | raw
        for field, values in ALLOWED.items():
            if raw.get(field) not in values:
                refuse(field, raw.get(field), " or ".join(map(repr, values)))
        for field in sorted(raw.keys() - {*KNOWN.split()}):
            if raw[field]:
                refuse(field, raw[field], "a LoRA without it")
        for field, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
            if type(raw.get(field)) not in kinds or raw[field] <= 0:
                refuse(field, raw.get(field), "a number above 0")
        return raw
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
