"""GPTs in the layout of transformers, to and from our GPT: folders in, folders out.

gpt_classes.py has the tables: the names of modules and settings of each class, and the values of
its settings that our GPT computes. layout.py reads and writes the files.

Left out: settings that matter in training only, except the dropout of GPT-1 and GPT-2, which works
as ours does.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfm.common.files import MALFORMED, read_json
from tinyfm.hub import layout
from tinyfm.hub.gpt_classes import ARCHITECTURES, NEAR, OTHER_HEADS, ROPE_FIELD_TABLE, Architecture
from tinyfm.hub.layout import name_pairs, refuse, translate

# Some files also store buffers: the causal mask, the rotary frequencies. They are not weights.
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")

# ---- config.json --------------------------------------------------------------------------------


def read_rope(raw: dict, config_cls: type) -> dict[str, Any]:
    """Read the base and the extension of the rotary positions, as transformers 4 or 5 writes them.

    Raises ValueError for extensions other than Llama 3's.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        refuse("rope_parameters", rope, "an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1))
    by_layer = any(isinstance(value, dict) for value in rope.values())
    if kind not in ("default", "llama3") or share != 1 or by_layer:
        refuse("rope_parameters", rope, "default or llama3, on whole heads, one for all layers")
    fields = [("rope_theta", "rope_theta")]
    if kind == "llama3":
        fields += name_pairs(ROPE_FIELD_TABLE, 1)
    defaults = {
        "rope_theta": raw["rope_theta"],
        "original_max_position_embeddings": raw["max_position_embeddings"],
    }
    return layout.read_fields(defaults | rope, fields, config_cls)


def read_window(raw: dict, config_cls: type) -> int:
    """Read the width of the attention window, which all layers must share; 0 for no window."""
    window = layout.read_fields(raw, [("window", "sliding_window")], config_cls)["window"]
    if not raw["use_sliding_window"]:
        window = 0
    if raw.get("layer_types"):
        kinds = set(raw["layer_types"])
    else:
        kinds = set()
        for layer in range(raw["num_hidden_layers"]):
            windowed = window and layer >= raw["max_window_layers"]
            kinds.add("sliding_attention" if windowed else "full_attention")
    if kinds == {"full_attention"}:
        return 0
    if kinds != {"sliding_attention"} or not window:
        refuse("layer_types", sorted(kinds), "one type for all layers")
    return window


def find_architecture(raw: dict) -> Architecture:
    """The class of a config.json and, of its layouts, the one that the settings fit.

    Raises ValueError for a class that our GPT cannot express, and for a setting of one that it can.
    """
    model_type = raw.get("model_type")
    found = [each for each in ARCHITECTURES if each.model_type == model_type]
    if not found:
        near = f" ({NEAR[model_type]})" if str(model_type) in NEAR else ""
        known = dict.fromkeys(each.model_type for each in ARCHITECTURES)
        raise ValueError(f"model_type is {model_type!r}{near}; supported: {', '.join(known)}")
    misfits = []  # of each layout: the fields with values that ours does not compute
    for architecture in found:
        given = architecture.defaults | raw
        allowed = architecture.allowed.items()
        misfits.append(
            [name for name, values in allowed if given.get(name, values[0]) not in values]
        )
    wrong, nearest = min(zip(misfits, found), key=lambda pair: len(pair[0]))
    for name in wrong:
        value = (nearest.defaults | raw)[name]
        refuse(name, value, " or ".join(map(repr, nearest.allowed[name])))
    titles = raw.get("architectures") or []
    if not isinstance(titles, list):
        refuse("architectures", titles, "a list of names of classes")
    for title in titles:
        if str(title).endswith(OTHER_HEADS):
            refuse("architectures", title, f"{nearest.title}, which predicts the next token")
    return nearest


def read_config(config_cls: type, folder: Path) -> tuple[Architecture, Any]:
    """Read config.json: its architecture and the GPTConfig.

    Raises ValueError for a setting that GPTConfig cannot express.
    """
    raw = read_json(folder / "config.json")
    try:
        if not isinstance(raw, dict):
            refuse("config.json", raw, "an object")
        architecture = find_architecture(raw)
        for older, newer in architecture.aliases.items():
            if older in raw:
                raw.setdefault(newer, raw[older])
        raw = architecture.defaults | raw
        values = architecture.fixed | layout.read_fields(raw, architecture.fields(), config_cls)
        if values["position"] == "rope":
            values |= read_rope(raw, config_cls)
        if architecture.has_window():
            values["window"] = read_window(raw, config_cls)
        if architecture.model_type == "granite":
            for name in ("attention_multiplier", "logits_scaling"):
                if not raw[name] > 0:
                    refuse(name, raw[name], "a number above 0")
            values["logit_scale"] = 1 / values["logit_scale"]  # it divides the logits
        return architecture, config_cls(**values)
    except MALFORMED as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def resolve(config: Any) -> Any:
    """Return the GPTConfig with the sizes that a 0 stands for, and one value where two mean the
    same."""
    return replace(
        config,
        n_kv_head=config.G,
        d_head=config.K,
        d_ff=config.F,
        norm_bias=config.norm == "layernorm" and (config.bias or config.norm_bias),
        rope_pairs=config.rope_pairs if config.position == "rope" else "halves",
        attention_scale=0.0 if config.attention_scale == config.K**-0.5 else config.attention_scale,
    )


def choose_architecture(config: Any) -> Architecture:
    """Return the first architecture that can express a resolved GPTConfig.

    Raises ValueError if there is none, with the differences from the nearest one.
    """
    misfits = []
    for architecture in ARCHITECTURES:
        wrong = [
            f"{name} {needed!r}, not {getattr(config, name)!r}"
            for name, needed in architecture.needs(config.d_model, config.n_head).items()
            if getattr(config, name) != needed
        ]
        if not wrong:
            return architecture
        misfits.append(wrong)
    wrong, nearest = min(zip(misfits, ARCHITECTURES), key=lambda pair: len(pair[0]))
    raise ValueError(
        f"transformers has no architecture for this model; the nearest, {nearest.title}, "
        f"needs {'; '.join(wrong)}"
    )


def write_config(config: Any, architecture: Architecture) -> dict[str, Any]:
    """Return config.json for a resolved GPTConfig, readable by transformers 4 and 5."""
    model_type = architecture.model_type
    raw = {"architectures": [architecture.title], "model_type": model_type}
    for ours, theirs in architecture.fields():
        raw[theirs] = getattr(config, ours)
    for field, values in architecture.allowed.items():
        if values[0] is not None:
            raw[field] = values[0]
    if config.position == "rope":
        scaling = None
        if config.rope_factor != 1:
            fields = name_pairs(ROPE_FIELD_TABLE, 1)
            scaling = {theirs: getattr(config, ours) for ours, theirs in fields}
            scaling["rope_type"] = "llama3"
        base = {"rope_theta": config.rope_theta}
        # transformers 4 reads the first two, transformers 5 the third.
        raw |= base
        raw["rope_scaling"] = scaling
        raw["rope_parameters"] = base | (scaling or {"rope_type": "default"})
    if architecture.has_window():
        raw["sliding_window"] = config.window or None
    if model_type == "qwen3":  # the window covers the layers from max_window_layers on
        raw["use_sliding_window"] = bool(config.window)
        raw["max_window_layers"] = 0 if config.window else config.n_layer
    if model_type == "granite":
        raw["attention_multiplier"] = config.attention_scale or config.K**-0.5
        raw["logits_scaling"] = 1 / config.logit_scale
    return raw


# ---- tensors ------------------------------------------------------------------------------------

CONV1D = re.compile(r"\.c_\w+\.weight$")  # matrices of GPT-1 and GPT-2, stored as (in, out)
# In the tables, the parts of a layer that holds queries, keys and values in one matrix.
PART = re.compile(r"(?<=c_attn|_value)\.([qkv])\b")


def groups(architecture: Architecture, config: Any) -> int:
    """The number of groups in a joint matrix: see join."""
    return config.G if "query_key_value" in architecture.names()["blocks.*.attention.q"] else 1


def join(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """The rows of q, k and v in one matrix, group by group: those of q, then of k, then of v.

    GPT-2 has a single group. BLOOM and Falcon have one for each key/value head, so that a group
    holds its query heads, its key and its value.
    """
    parts = [part.unflatten(0, (groups, -1)) for part in (q, k, v)]
    return torch.cat(parts, 1).flatten(0, 1)


def part_rows(config: Any) -> list[int]:
    """The rows of q, k and v."""
    return [config.n_head * config.K, config.G * config.K, config.G * config.K]


def take(part: str, joint: Tensor, rows: list[int], groups: int) -> Tensor:
    """The rows of "q", "k" or "v" in a matrix that `join` made. rows: how many each of them has."""
    sizes = [n // groups for n in rows]
    parts = joint.unflatten(0, (groups, -1)).split(sizes, 1)
    return parts["qkv".index(part)].flatten(0, 1)


def to_theirs(tensors: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """Convert named tensors to the layout of files: parts joined in n groups, Conv1D transposed."""
    stored = {}
    for name, tensor in tensors.items():
        part = PART.search(name)
        if part and part[1] != "q":
            continue  # joined with q
        if part:
            tensor = join(*(tensors[PART.sub(f".{each}", name)] for each in "qkv"), n)
            name = PART.sub("", name)
        stored[name] = tensor.T if CONV1D.search(name) else tensor
    return stored


def from_theirs(stored: dict[str, Tensor], names: list[str], rows: list[int], n: int) -> dict:
    """The inverse of to_theirs: the tensors of these names. rows: those of q, k and v."""
    tensors = {}
    for name in names:
        part = PART.search(name)
        theirs = PART.sub("", name)
        tensor = stored[theirs]
        if CONV1D.search(theirs):
            tensor = tensor.T
        if part:
            tensor = take(part[1], tensor, rows, n)
        tensors[name] = tensor
    return tensors


def their_tensors(
    model: nn.Module, architecture: Architecture
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return {our name: their name} and {their name: tensor, in their layout}.

    A tied head is left out: the embedding is stored once. The parts of a joint matrix have names
    (c_attn.q) in the first, and are joined in the second.
    """
    own = model.state_dict()
    if model.config.tied:
        del own["head.weight"]
    table = architecture.names()
    names = {name: translate(name, table) for name in own}
    theirs = {names[name]: tensor for name, tensor in own.items()}
    return names, to_theirs(theirs, groups(architecture, model.config))


# ---- in and out ---------------------------------------------------------------------------------


def load(cls: type, config_cls: type, folder: str | Path, dtype=torch.float32) -> nn.Module:
    """Load the GPT of a folder, in evaluation mode, its weights as dtype on the CPU.

    cls and config_cls: GPT and GPTConfig. Raises ValueError if the config cannot be expressed, or
    if the tensors do not fit it.
    """
    folder = Path(folder)
    architecture, config = read_config(config_cls, folder)
    tensors = layout.read_tensors(folder)
    model = layout.build_on_meta(cls, config, folder, len(tensors))
    names, expected = their_tensors(model, architecture)
    stored = {name: tensor for name, tensor in tensors.items() if not BUFFERS.search(name)}

    # GPT-2 and others were published without the head, and their names without "transformer.".
    embedding = names["token_embedding.weight"]
    prefix = embedding.split(".")[0] + "."
    if not any(name.startswith(prefix) for name in stored):
        stored = {
            name if name == "lm_head.weight" else prefix + name: tensor
            for name, tensor in stored.items()
        }

    # A tied head may be stored too; then it must equal the embedding.
    if config.tied and embedding in stored:
        head = stored.pop("lm_head.weight", stored[embedding])
        if not torch.equal(head, stored[embedding]):
            raise ValueError(f"{folder}: lm_head.weight differs from the embedding it is tied to")

    layout.check_tensors(folder, stored, expected)
    n = groups(architecture, config)
    stored = from_theirs(stored, list(names.values()), part_rows(config), n)
    layout.assign_weights(model, {ours: stored[theirs] for ours, theirs in names.items()}, dtype)
    if config.tied:
        model.head.weight = model.token_embedding.weight
    return model


def save(model: nn.Module, folder: str | Path, tokenizer=None, overwrite: bool = False) -> None:
    """Write a folder for `load`, for transformers and for tools that read its files.

    Raises ValueError if no architecture expresses the model, if the tokenizer has more ids than the
    model, or if the folder holds a model already, unless overwrite.
    """
    config = resolve(model.config)
    architecture = choose_architecture(config)
    layout.check_tokenizer(tokenizer, config.vocab_size)
    # In training, a text starts after the end token of the one before: it is start and end at once.
    # It also pads: the attention mask tells padding from an end.
    end = tokenizer.eot if tokenizer else None
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    generation = ends | {"max_length": config.context_length}
    raw = write_config(config, architecture) | ends
    _, tensors = their_tensors(model, architecture)
    others = {"generation_config.json": generation} if tokenizer else {}
    layout.write_folder(Path(folder), raw, tensors, tokenizer, overwrite, others)
