"""GPT-2, Llama, Mistral and Qwen3 in the layout of transformers, to and from our GPT.

The tables are the content. NAME_TABLE: the names of the modules there. FIELD_TABLE: the names of
the settings in their config.json. ARCHITECTURES: for each class of transformers, the settings it
fixes and the values of its other switches that our GPT computes too. layout.py reads and writes the
files.

Left out: settings that matter in training only, except GPT-2's dropout, which works as ours does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfm.common.files import MALFORMED, read_json
from tinyfm.hub import layout
from tinyfm.hub.layout import name_pairs, refuse, translate

# ---- tables -------------------------------------------------------------------------------------

# tinyfm                   GPT-2                          Llama, Mistral, Qwen3
NAME_TABLE = """
token_embedding            transformer.wte                model.embed_tokens
position_embedding         transformer.wpe                -
blocks.*.norm1             transformer.h.*.ln_1           model.layers.*.input_layernorm
blocks.*.attention.q       transformer.h.*.attn.c_attn.q  model.layers.*.self_attn.q_proj
blocks.*.attention.k       transformer.h.*.attn.c_attn.k  model.layers.*.self_attn.k_proj
blocks.*.attention.v       transformer.h.*.attn.c_attn.v  model.layers.*.self_attn.v_proj
blocks.*.attention.q_norm  -                              model.layers.*.self_attn.q_norm
blocks.*.attention.k_norm  -                              model.layers.*.self_attn.k_norm
blocks.*.attention.out     transformer.h.*.attn.c_proj    model.layers.*.self_attn.o_proj
blocks.*.norm2             transformer.h.*.ln_2           model.layers.*.post_attention_layernorm
blocks.*.mlp.gate          -                              model.layers.*.mlp.gate_proj
blocks.*.mlp.up            transformer.h.*.mlp.c_fc       model.layers.*.mlp.up_proj
blocks.*.mlp.down          transformer.h.*.mlp.c_proj     model.layers.*.mlp.down_proj
norm                       transformer.ln_f               model.norm
head                       lm_head                        lm_head
"""
# Some files also store buffers: the causal mask, the rotary frequencies. They are not weights.
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")

# tinyfm        GPT-2                Llama, Mistral, Qwen3
FIELD_TABLE = """
vocab_size      vocab_size           vocab_size
context_length  n_positions          max_position_embeddings
n_layer         n_layer              num_hidden_layers
n_head          n_head               num_attention_heads
n_kv_head       -                    num_key_value_heads
d_model         n_embd               hidden_size
d_head          -                    head_dim
d_ff            n_inner              intermediate_size
norm_eps        layer_norm_epsilon   rms_norm_eps
tied            tie_word_embeddings  tie_word_embeddings
dropout         resid_pdrop          -
dropout         embd_pdrop           -
dropout         attn_pdrop           -
"""
# The rotary extension that Llama 3.1 introduced.
ROPE_FIELD_TABLE = """
rope_factor            factor
rope_low_freq_factor   low_freq_factor
rope_high_freq_factor  high_freq_factor
rope_original_context  original_max_position_embeddings
"""
GPT2_COLUMN = 1
LLAMA_COLUMN = 2


@dataclass(frozen=True)
class Architecture:
    """One class of transformers: which of our models it computes, and how to write them."""

    title: str  # name of the class
    column: int  # its column in the tables
    fixed: dict[str, Any]  # our fields -> the only value that the class computes
    allowed: dict[str, tuple]  # their fields -> values that ours computes; the first is written
    defaults: dict[str, Any]  # their fields -> value that transformers takes if the field is absent
    biases: tuple[str, ...] = ()  # their fields that our `bias` sets

    def names(self) -> dict[str, str]:
        """Our modules -> theirs."""
        return dict(name_pairs(NAME_TABLE, self.column))

    def fields(self) -> list[tuple[str, str]]:
        """(our name, their name) of each setting."""
        biases = [("bias", theirs) for theirs in self.biases]
        return name_pairs(FIELD_TABLE, self.column) + biases


ROTARY = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu"}  # all classes but GPT-2
SILU = {"hidden_act": ("silu", "swish"), "quantization_config": (None,)}
LLAMA_DEFAULTS = {
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}

# By model_type. A model is saved as the first architecture that can express it.
ARCHITECTURES = {
    "qwen3": Architecture(
        title="Qwen3ForCausalLM",
        column=LLAMA_COLUMN,
        fixed=ROTARY | {"qk_norm": True, "bias": False},
        allowed=SILU | {"attention_bias": (False,)},
        defaults=LLAMA_DEFAULTS
        | {
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "max_window_layers": 28,
        },
    ),
    "llama": Architecture(
        title="LlamaForCausalLM",
        column=LLAMA_COLUMN,
        fixed=ROTARY | {"qk_norm": False, "window": 0},
        allowed=SILU,
        defaults=LLAMA_DEFAULTS
        | {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False},
        biases=("attention_bias", "mlp_bias"),
    ),
    "mistral": Architecture(
        title="MistralForCausalLM",
        column=LLAMA_COLUMN,
        fixed=ROTARY | {"qk_norm": False, "bias": False},
        allowed=SILU
        | {"layer_types": (None,), "use_sliding_window": (True,), "max_window_layers": (0,)},
        defaults=LLAMA_DEFAULTS
        | {
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "use_sliding_window": True,
            "max_window_layers": 0,
        },
    ),
    "gpt2": Architecture(
        title="GPT2LMHeadModel",
        column=GPT2_COLUMN,
        fixed={
            "position": "learned",
            "norm": "layernorm",
            "mlp": "gelu",
            "qk_norm": False,
            "bias": True,
            "window": 0,
        },
        allowed={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "quantization_config": (None,),
        },
        defaults={
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "attn_pdrop": 0.1,
        },
    ),
}


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


def read_config(config_cls: type, folder: Path) -> tuple[str, Any]:
    """Read config.json: its model_type and the GPTConfig.

    Raises ValueError for a setting that GPTConfig cannot express.
    """
    raw = read_json(folder / "config.json")
    try:
        model_type = raw.get("model_type") if isinstance(raw, dict) else None
        if model_type not in ARCHITECTURES:
            refuse("model_type", model_type, ", ".join(ARCHITECTURES))
        architecture = ARCHITECTURES[model_type]
        for field, values in architecture.allowed.items():
            if raw.get(field, values[0]) not in values:
                refuse(field, raw[field], " or ".join(map(repr, values)))
        raw = architecture.defaults | raw
        values = architecture.fixed | layout.read_fields(raw, architecture.fields(), config_cls)
        if values["position"] == "rope":
            values |= read_rope(raw, config_cls)
        if "sliding_window" in architecture.defaults:
            values["window"] = read_window(raw, config_cls)
        return model_type, config_cls(**values)
    except MALFORMED as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def resolve(config: Any) -> Any:
    """Return the GPTConfig with the sizes that a 0 stands for."""
    return replace(config, n_kv_head=config.G, d_head=config.K, d_ff=config.F)


def choose_architecture(config: Any) -> str:
    """Return the first model_type that can express a resolved GPTConfig.

    Raises ValueError if there is none, with the differences from the nearest one.
    """
    even_head = config.d_model // config.n_head
    misfits = {}
    for model_type, architecture in ARCHITECTURES.items():
        needs = dict(architecture.fixed)
        # In transformers, the heads of these two must divide the width ...
        if model_type in ("llama", "gpt2"):
            needs["d_model"] = even_head * config.n_head
        # ... and GPT-2's heads must fill it.
        if model_type == "gpt2":
            needs |= {"n_kv_head": config.n_head, "d_head": even_head}
        wrong = [
            f"{name} {needed!r}, not {getattr(config, name)!r}"
            for name, needed in needs.items()
            if getattr(config, name) != needed
        ]
        if not wrong:
            return model_type
        misfits[architecture.title] = wrong
    nearest = min(misfits, key=lambda title: len(misfits[title]))
    raise ValueError(
        f"transformers has no architecture for this model; the nearest, {nearest}, "
        f"needs {'; '.join(misfits[nearest])}"
    )


def write_config(config: Any, model_type: str) -> dict[str, Any]:
    """Return config.json for a resolved GPTConfig, readable by transformers 4 and 5."""
    architecture = ARCHITECTURES[model_type]
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
    if "sliding_window" in architecture.defaults:
        raw["sliding_window"] = config.window or None
    if model_type == "qwen3":  # the window covers the layers from max_window_layers on
        raw["use_sliding_window"] = bool(config.window)
        raw["max_window_layers"] = 0 if config.window else config.n_layer
    return raw


# ---- tensors ------------------------------------------------------------------------------------

CONV1D = re.compile(r"\.c_\w+\.weight$")  # GPT-2's matrices, stored as (in, out)


def to_conv1d(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert to GPT-2's layout: q, k and v joined into one c_attn, and every matrix (in, out)
    instead of nn.Linear's (out, in)."""
    stored = {}
    for name, tensor in tensors.items():
        if ".c_attn.k." in name or ".c_attn.v." in name:
            continue  # joined with q
        if ".c_attn.q." in name:
            tensor = torch.cat([tensors[name.replace(".q.", f".{part}.")] for part in "qkv"])
            name = name.replace(".c_attn.q.", ".c_attn.")
        stored[name] = tensor.T if CONV1D.search(name) else tensor
    return stored


def from_conv1d(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of to_conv1d."""
    tensors = {}
    for name, tensor in stored.items():
        if CONV1D.search(name):
            tensor = tensor.T
        if ".c_attn." in name:
            for part, chunk in zip("qkv", tensor.chunk(3)):
                tensors[name.replace(".c_attn.", f".c_attn.{part}.")] = chunk
        else:
            tensors[name] = tensor
    return tensors


def their_tensors(model: nn.Module, model_type: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return {our name: their name} and {their name: tensor, in their layout}.

    A tied head is left out: the embedding is stored once. For GPT-2 the parts of c_attn have names
    (c_attn.q) in the first, and are joined in the second.
    """
    own = model.state_dict()
    if model.config.tied:
        del own["head.weight"]
    table = ARCHITECTURES[model_type].names()
    names = {name: translate(name, table) for name in own}
    theirs = {names[name]: tensor for name, tensor in own.items()}
    if model_type == "gpt2":
        theirs = to_conv1d(theirs)
    return names, theirs


# ---- in and out ---------------------------------------------------------------------------------


def load(cls: type, config_cls: type, folder: str | Path, dtype=torch.float32) -> nn.Module:
    """Load the GPT of a folder, in evaluation mode, its weights as dtype on the CPU.

    cls and config_cls: GPT and GPTConfig. Raises ValueError if the config cannot be expressed, or
    if the tensors do not fit it.
    """
    folder = Path(folder)
    model_type, config = read_config(config_cls, folder)
    tensors = layout.read_tensors(folder)
    model = layout.build_on_meta(cls, config, folder, len(tensors))
    names, expected = their_tensors(model, model_type)
    stored = {name: tensor for name, tensor in tensors.items() if not BUFFERS.search(name)}

    # GPT-2 was published without the head, and its names without the prefix "transformer.".
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
    if model_type == "gpt2":
        stored = from_conv1d(stored)
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
    model_type = choose_architecture(config)
    layout.check_tokenizer(tokenizer, config.vocab_size)
    # In training, a text starts after the end token of the one before: it is start and end at once.
    # It also pads: the attention mask tells padding from an end.
    end = tokenizer.eot if tokenizer else None
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    generation = ends | {"max_length": config.context_length}
    raw = write_config(config, model_type) | ends
    _, tensors = their_tensors(model, model_type)
    others = {"generation_config.json": generation} if tokenizer else {}
    layout.write_folder(Path(folder), raw, tensors, tokenizer, overwrite, others)
