"""LoRA adapters in the layout of Hugging Face's peft, for a GPT or a CLIP.

A folder holds adapter_config.json and adapter_model.safetensors. It fits the base that hub/gpt.py
or hub/clip.py writes. Their lora_A and lora_B are A and B here, and the names of the layers are
those of the base's tables. Three kinds of layers differ:

1. GPT-1, GPT-2, BLOOM and Falcon join q, k and v into one layer. One LoRA of theirs is three of
   ours with the same A, each with its rows of B. Three of ours are one of theirs with three times
   the rank,

       A = [A_q; A_k; A_v],    B = [B_q 0 0; 0 B_k 0; 0 0 B_v],

   whose rows are in the order of the joint layer (hub/gpt.py); reading it back leaves out the
   zeros.
2. CLIP's patch embedding is a matrix here and a convolution there: the same numbers in another
   shape.
3. The LoRA of a token table is stored as lora_embedding_A, transposed, and lora_embedding_B. peft
   stores the table itself with them; it must equal the base's.

Rank-stabilised LoRA (Kalajdzievski 2023) has the scale alpha / sqrt(rank) in place of
alpha / rank; it is read as a LoRA with another alpha. A setting of adapter_config.json that our
LoRA does not compute is an error that names the field.
Left out: adapters other than LoRA, whole modules saved with an adapter, other families.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, TypedDict

import regex
import torch
from torch import Tensor, nn

from tinyfm.adapt import AdapterConfig, select, train_only
from tinyfm.adapt.lora import LoRA, adapted_layers, attach, find_layers
from tinyfm.clip import CLIP
from tinyfm.common.files import load_tensors, read_record, save_tensors, write_json
from tinyfm.gpt import GPT
from tinyfm.hub import clip, gpt
from tinyfm.hub.layout import refuse, translate

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model"

# ---- adapter_config.json ------------------------------------------------------------------------

# Fields that are read here, or that may have any value: the tensors show which layers are adapted,
# and the settings of other kinds have no effect unless another field turns that kind on.
KNOWN = """
peft_type bias init_lora_weights r lora_alpha lora_dropout rank_pattern alpha_pattern use_rslora
task_type base_model_name_or_path target_modules exclude_modules layers_to_transform layers_pattern
fan_in_fan_out inference_mode revision auto_mapping peft_version runtime_config
megatron_core qalora_group_size loftq_config eva_config corda_config lora_ga_config
"""
ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Other initialisations, such as pissa, change the base.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}


class AdapterFile(TypedDict, total=False):
    """The fields of adapter_config.json that are read here."""

    r: int
    lora_alpha: float
    lora_dropout: float
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None
    use_rslora: bool | None


def read_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises ValueError for a setting our LoRA does not compute."""
    raw = read_record(folder / CONFIG, AdapterFile)
    try:
        raw = {"bias": "none", "init_lora_weights": True, "lora_dropout": 0.0} | raw
        for field, values in ALLOWED.items():
            if raw.get(field) not in values:
                refuse(field, raw.get(field), " or ".join(map(repr, values)))
        for field in sorted(raw.keys() - {*KNOWN.split()}):
            if raw[field]:
                refuse(field, raw[field], "a LoRA without it")
        for field in ("r", "lora_alpha"):
            if raw.get(field, 0) <= 0:
                refuse(field, raw.get(field), "a number above 0")
        return raw
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


SECONDS = 0.5  # for matching all patterns of a file, which a stranger wrote


class Patterns:
    """rank_pattern or alpha_pattern: values of the layers whose names a pattern matches."""

    def __init__(self, field: str, patterns: dict[str, Any] | None, default: Any):
        """Raises ValueError for a pattern that cannot be read, and for a value of 0 or less."""
        self.field = field
        self.default = default
        self.searched = []
        for pattern, value in (patterns or {}).items():
            if value <= 0:
                refuse(f"{field}.{pattern[:40]}", value, "a number above 0")
            try:
                # This is how peft looks a layer up: the end of its name must match.
                self.searched.append((regex.compile(rf"(.*\.)?({pattern})$"), value))
            except regex.error as error:
                raise ValueError(f"{field} has the pattern {pattern[:40]!r}: {error}") from error
        self.deadline = time.monotonic() + SECONDS

    def value_of(self, module: str) -> Any:
        """A layer's value: that of the first pattern that matches the end of its name.

        Raises ValueError if the patterns take too long.
        """
        for pattern, value in self.searched:
            left = self.deadline - time.monotonic()
            try:
                if left <= 0:
                    raise TimeoutError
                if pattern.match(module, timeout=left):
                    return value
            except TimeoutError:
                raise ValueError(
                    f"{self.field}: its patterns take over {SECONDS} s to match; write the "
                    "names of the layers in their place"
                ) from None
        return self.default


def target_modules(adapted: set[str], every: set[str]) -> list[str]:
    """Return the target_modules for the adapted layers, among the names of every layer.

    These are the last words of their names (such as q_proj) if no other layer ends in one of them,
    and otherwise the whole names.
    """
    ends = {name.split(".")[-1] for name in adapted}
    matched = {name for name in every if name.split(".")[-1] in ends}
    return sorted(ends if adapted == matched else adapted)


# ---- names --------------------------------------------------------------------------------------

TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))")
TABLE = re.compile(r"base_model\.model\.(.+)\.base_layer\.weight")


def their_layers(model: nn.Module) -> dict[str, str]:
    """Return {our name: their name} of every layer that can have a LoRA.

    The parts of a joint layer, such as c_attn, are c_attn.q, c_attn.k and c_attn.v. Raises
    ValueError for a model that transformers cannot express.
    """
    if isinstance(model, GPT):
        names = gpt.choose_architecture(gpt.resolve(model.config)).names()
    elif isinstance(model, CLIP) and model.config.stem == "patch":
        names = clip.NAMES
    else:
        raise ValueError(
            f"this {type(model).__name__} has no layout in peft; export the whole model, without "
            "--adapter, or use a GPT, or a CLIP whose stem is patch"
        )
    layers = find_layers(model, ".")
    return {name: translate(f"{name}.weight", names).removesuffix(".weight") for name in layers}


# ---- out ----------------------------------------------------------------------------------------


def joint_layout(model: GPT) -> tuple[list[int], int]:
    """The rows of q, k and v, and the groups in a joint layer: arguments of gpt.join and take."""
    config = gpt.resolve(model.config)
    return gpt.part_rows(config), gpt.groups(gpt.choose_architecture(config), config)


def join(
    parts: dict[str, tuple[Tensor, Tensor]], rows: list[int], groups: int
) -> tuple[Tensor, Tensor]:
    """Return (A, B) of a joint layer from the (A, B) of some of its parts "q", "k" and "v", in
    order."""
    A, B = next(iter(parts.values()))
    every_A = [part_A for part_A, _ in parts.values()]
    shared = all(torch.equal(A, other) for other in every_A)
    # A missing part has rows of zeros: a block without columns, where the blocks stand diagonally.
    columns = len(A) if shared else 0
    every_B = []
    for part, n in zip("qkv", rows):
        every_B.append(parts[part][1] if part in parts else B.new_zeros(n, columns))
    if not shared:
        A = torch.cat(every_A)
        every_B = torch.block_diag(*every_B).split(rows)
    return A, gpt.join(*every_B, groups)


def their_loras(model: nn.Module, name: str) -> dict[str, tuple[Tensor, Tensor, LoRA]]:
    """Return {their name of a layer: (A, B, our LoRA)} for the LoRA of a name.

    For a joint layer, A and B are joined, and our LoRA is that of one of the three parts. Raises
    ValueError if there is none of that name.
    """
    names = their_layers(model)
    loras = {}
    joint = {}  # their name of a joint layer -> {part: (A, B)}
    for ours, layer in adapted_layers(model):
        if name not in layer.lora:
            continue
        lora = layer.lora[name]
        theirs = names[ours]
        A = lora.A.weight.detach()
        B = lora.B.weight.detach()
        if isinstance(layer, nn.Embedding):
            A = A.T.contiguous()
        if f"{theirs}.weight" == clip.PATCHES:
            config = model.config
            A = A.unflatten(1, (config.channels, config.patch_size, config.patch_size))
            B = B[..., None, None]
        part = gpt.PART.search(theirs)
        if part:
            theirs = gpt.PART.sub("", theirs)
            parts = joint.setdefault(theirs, {})
            parts[part[1]] = (A, B)
            A, B = join(
                parts, *joint_layout(model)
            )  # those found so far; the last one completes it
        loras[theirs] = (A, B, lora)
    if not loras:
        raise ValueError(f"the model has no LoRA named {name!r}; adapt or load one first")
    return loras


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    base_name: str,
    name: str = "default",
    overwrite: bool = False,
) -> None:
    """Write the LoRA of a name for peft and for tools that read its files.

    base_name: folder or name of the exported base. The LoRA is written with its present scale.
    Raises ValueError if the model has no LoRA of that name or no layout in peft, or if the folder
    holds an adapter already, unless overwrite.
    """
    folder = Path(folder)
    loras = their_loras(model, name)
    if (folder / CONFIG).exists() and not overwrite:
        raise ValueError(f"{folder} holds an adapter already; choose another, or overwrite it")

    # The config: one rank and one alpha, and patterns for the layers that have others.
    every = {gpt.PART.sub("", theirs) for theirs in their_layers(model).values()}
    ranks = {module: len(A) for module, (A, _, _) in loras.items()}
    alphas = {module: lora.scale * ranks[module] for module, (_, _, lora) in loras.items()}
    rank = min(ranks.values())
    alpha = min(alphas.values())
    _, _, first_lora = next(iter(loras.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if isinstance(model, GPT) else None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "lora_dropout": first_lora.config.dropout,
        "target_modules": target_modules({*loras}, every),
        "fan_in_fan_out": any(".c_" in module for module in loras),  # GPT-2's matrices
    }

    # The tensors.
    stored = {}
    for module, (A, B, lora) in loras.items():
        prefix = f"base_model.model.{module}"
        if isinstance(lora.A, nn.Embedding):
            stored[f"{prefix}.lora_embedding_A"] = A
            stored[f"{prefix}.lora_embedding_B"] = B
        else:
            stored[f"{prefix}.lora_A.weight"] = A
            stored[f"{prefix}.lora_B.weight"] = B

    # The config is written last, so a folder that a crash left incomplete does not load.
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    save_tensors(folder, WEIGHTS, stored)
    write_json(folder / CONFIG, config)


# ---- in -----------------------------------------------------------------------------------------


def read_factors(folder: Path, known: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Read the tensors of an adapter: {their name of a layer: {"A": ..., "B": ...}}.

    known: their name of a layer -> weight, for every layer of the model. Raises ValueError for any
    other tensor, except a token table that equals the model's.
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
        module = match[1]
        if match.re is TENSOR:
            layers.setdefault(module, {})[match[2] or match[3]] = tensor
        elif not torch.equal(tensor, known[module]):
            raise ValueError(f"{folder}: {key} is not the model's: it was trained on another base")
    for module, factors in layers.items():
        if len(factors) < 2:
            raise ValueError(f"{folder}: {module} has only lora_{next(iter(factors))}")
    return layers


def our_loras(model: nn.Module, folder: Path) -> dict[str, tuple[Tensor, Tensor, AdapterConfig]]:
    """Return {our name of a layer: (A, B, config)} for the adapter in a folder.

    A is (rank, in) and B (out, rank). Raises ValueError if a shape does not fit the model.
    """
    raw = read_config(folder)
    try:
        ranks = Patterns("rank_pattern", raw.get("rank_pattern"), raw["r"])
        alphas = Patterns("alpha_pattern", raw.get("alpha_pattern"), raw["lora_alpha"])
        return find_loras(model, folder, raw, ranks, alphas)
    except ValueError as error:
        where = "" if str(folder) in str(error) else f"{folder / CONFIG}: "
        raise ValueError(f"{where}{error}") from error


def find_loras(
    model: nn.Module, folder: Path, raw: dict[str, Any], ranks: Patterns, alphas: Patterns
) -> dict[str, tuple[Tensor, Tensor, AdapterConfig]]:
    """`our_loras`, with the settings of the folder."""
    names = their_layers(model)
    weights = {
        gpt.PART.sub("", theirs): model.get_submodule(ours).weight for ours, theirs in names.items()
    }
    layers = read_factors(folder, weights)
    loras = {}
    for ours, theirs in names.items():
        part = gpt.PART.search(theirs)
        module = gpt.PART.sub("", theirs)
        if module not in layers:
            continue
        A = layers[module]["A"].flatten(1)
        B = layers[module]["B"].flatten(1)
        rank = ranks.value_of(module)
        scale = alphas.value_of(module) / (rank**0.5 if raw.get("use_rslora") else rank)

        # Check the shapes: those of the layer, or of its three parts.
        W = weights[module].flatten(1)
        if isinstance(model.get_submodule(ours), nn.Embedding):
            W = W.T
        d_out, d_in = W.shape
        if part:
            d_out = sum(gpt.part_rows(model.config))
        expected = ((rank, d_in), (d_out, rank))
        shapes = (tuple(A.shape), tuple(B.shape))
        if shapes != expected:
            raise ValueError(f"{folder}: {module} has A, B of {shapes}, not {expected}")

        # Take the rows of one part of a joint layer, without the zeros of `join`.
        if part:
            untrained = not B.any()
            B = gpt.take(part[1], B, *joint_layout(model))
            used = B.any(0) | untrained
            if not used.any():
                continue
            A = A[used]
            B = B[:, used]
        # The scale stays the same when the rank shrinks; here it is alpha / rank.
        config = AdapterConfig(len(A), scale * len(A), raw["lora_dropout"])
        loras[ours] = (A, B, config)
    return loras


@torch.no_grad()
def load_adapter_folder(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Attach the LoRA of a folder to its base, in place, under the given name.

    As after adapt.apply, only this LoRA is trained and saved. Raises ValueError for a pickle, for
    settings our LoRA does not compute, and for tensors that do not fit; then the model is
    unchanged.
    """
    loras = our_loras(model, Path(folder))
    attach(model, {ours: config for ours, (_, _, config) in loras.items()}, name)
    train_only(model, select(model, "lora", name))
    for ours, (A, B, _) in loras.items():
        lora = model.get_submodule(ours).lora[name]
        A = A.T if isinstance(lora.A, nn.Embedding) else A.view_as(lora.A.weight)
        lora.A.weight.copy_(A)
        lora.B.weight.copy_(B.view_as(lora.B.weight))
