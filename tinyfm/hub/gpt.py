"""GPT-2, Llama, Mistral and Qwen3 as transformers writes them down, to and from our GPT.

The tables are the content. GPT_NAMES: what a module is called there. GPT_FIELDS: where a setting
stands in config.json. ARCHITECTURES: what each class fixes, and which values of its other switches
our GPT computes too. hub.py reads and writes the files.
Left out: what matters in training only, but for GPT-2's dropout, which works as ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfm.common.files import MALFORMED, read_json
from tinyfm.hub.layout import (
    check_tensors,
    check_tokenizer,
    fill,
    pairs,
    publish,
    read_tensors,
    refuse,
    take,
    translate,
)

# ---- tables -------------------------------------------------------------------------------------

# tinyfm                   GPT-2                          Llama, Mistral, Qwen3
GPT_NAMES = """
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
EXTRAS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")  # stored, yet not learned

GPT_FIELDS = """
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
# The fields of the rotary extension that Llama 3.1 introduced.
LLAMA3_ROPE = """
rope_factor            factor
rope_low_freq_factor   low_freq_factor
rope_high_freq_factor  high_freq_factor
rope_original_context  original_max_position_embeddings
"""


@dataclass(frozen=True)
class Architecture:
    """What a class of transformers computes, in the words of both configs."""

    title: str  # the class
    column: int  # its place in the tables
    fixed: dict[str, Any]  # our fields that it does not leave open
    allowed: dict[str, tuple]  # their fields -> the values we can express; we write the first
    silent: dict[str, Any]  # their fields -> what transformers takes where config.json says nothing
    biases: tuple[str, ...] = ()  # their fields for our `bias`

    def fields(self) -> list[tuple[str, str]]:
        return pairs(GPT_FIELDS, self.column) + [("bias", theirs) for theirs in self.biases]


ROTARY = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu"}  # all but GPT-2
SILU = {"hidden_act": ("silu", "swish"), "quantization_config": (None,)}
SILENT = {"head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
          "rope_theta": 10_000.0}  # fmt: skip

ARCHITECTURES = {  # by their model_type; a model is saved as the first that can express it
    "qwen3": Architecture(
        "Qwen3ForCausalLM", 2, ROTARY | {"qk_norm": True, "bias": False},
        SILU | {"attention_bias": (False,)},
        SILENT | {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096,
                  "use_sliding_window": False, "max_window_layers": 28},
    ),
    "llama": Architecture(
        "LlamaForCausalLM", 2, ROTARY | {"qk_norm": False, "window": 0}, SILU,
        SILENT | {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False},
        ("attention_bias", "mlp_bias"),
    ),
    "mistral": Architecture(
        "MistralForCausalLM", 2, ROTARY | {"qk_norm": False, "bias": False},
        SILU | {"layer_types": (None,), "use_sliding_window": (True,), "max_window_layers": (0,)},
        SILENT | {"num_key_value_heads": 8, "sliding_window": 4096, "use_sliding_window": True,
                  "max_window_layers": 0},
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel", 1,
        {"position": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False,
         "bias": True, "window": 0},
        {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
         "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
         "quantization_config": (None,)},
        {"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
         "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    ),
}  # fmt: skip


# ---- config.json --------------------------------------------------------------------------------


def read_rope(raw: dict, config_cls: type) -> dict[str, Any]:
    """Base and extension of the rotary positions; transformers 4 writes them otherwise than 5."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        refuse("rope_parameters", rope, "an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1))
    by_layer = any(isinstance(value, dict) for value in rope.values())
    if kind not in ("default", "llama3") or share != 1 or by_layer:
        refuse("rope_parameters", rope, "default or llama3, on whole heads, one for all layers")
    context = {"original_max_position_embeddings": raw["max_position_embeddings"]}
    fields = pairs(LLAMA3_ROPE, 1) if kind == "llama3" else []
    rope = {"rope_theta": raw["rope_theta"]} | context | rope
    return take(rope, [("rope_theta", "rope_theta"), *fields], config_cls)


def read_window(raw: dict, config_cls: type) -> int:
    """Width of the attention window, which all layers must share; 0 for none."""
    window = take(raw, [("window", "sliding_window")], config_cls)["window"]
    window = window if raw["use_sliding_window"] else 0
    kinds = {
        "sliding_attention" if window and layer >= raw["max_window_layers"] else "full_attention"
        for layer in range(raw["num_hidden_layers"])
    }
    kinds = set(raw.get("layer_types") or kinds)
    if kinds == {"full_attention"}:
        return 0
    if kinds != {"sliding_attention"} or not window:
        refuse("layer_types", sorted(kinds), "one type for all layers")
    return window


def read_config(config_cls: type, folder: Path) -> tuple[str, Any]:
    """The model_type and GPTConfig of a folder. Raises ValueError for what it cannot express."""
    raw = read_json(folder / "config.json")
    try:
        model_type = raw.get("model_type") if isinstance(raw, dict) else None
        if model_type not in ARCHITECTURES:
            refuse("model_type", model_type, ", ".join(ARCHITECTURES))
        architecture = ARCHITECTURES[model_type]
        for field, values in architecture.allowed.items():
            if raw.get(field, values[0]) not in values:
                refuse(field, raw[field], " or ".join(map(repr, values)))
        raw = architecture.silent | raw
        values = architecture.fixed | take(raw, architecture.fields(), config_cls)
        if values["position"] == "rope":
            values |= read_rope(raw, config_cls)
        if "sliding_window" in architecture.silent:
            values["window"] = read_window(raw, config_cls)
        return model_type, config_cls(**values)
    except MALFORMED as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def resolve(config: Any) -> Any:
    """The GPTConfig with the sizes that 0 leaves open."""
    return replace(config, n_kv_head=config.G, d_head=config.K, d_ff=config.F)


def choose_architecture(config: Any) -> str:
    """The first model_type for a resolved GPTConfig. Raises ValueError if none can express it."""
    misfits = {}
    for model_type, architecture in ARCHITECTURES.items():
        needs, even = dict(architecture.fixed), config.d_model // config.n_head
        if model_type in ("llama", "gpt2"):  # in transformers their heads must divide the width,
            needs["d_model"] = even * config.n_head
        if model_type == "gpt2":  # and these fill it
            needs |= {"n_kv_head": config.n_head, "d_head": even}
        has = {name: getattr(config, name) for name in needs}
        wrong = [f"{n} {needs[n]!r}, not {has[n]!r}" for n in needs if needs[n] != has[n]]
        if not wrong:
            return model_type
        misfits[architecture.title] = wrong
    nearest = min(misfits, key=lambda title: len(misfits[title]))
    raise ValueError(
        f"transformers has no architecture for this model; the nearest, {nearest}, "
        f"needs {'; '.join(misfits[nearest])}"
    )


def write_config(config: Any, model_type: str) -> dict[str, Any]:
    """config.json of a resolved GPTConfig, for transformers 4 and 5."""
    architecture = ARCHITECTURES[model_type]
    raw = {"architectures": [architecture.title], "model_type": model_type}
    raw |= {theirs: getattr(config, ours) for ours, theirs in architecture.fields()}
    allowed = architecture.allowed.items()
    raw |= {field: values[0] for field, values in allowed if values[0] is not None}
    if config.position == "rope":
        scaling = None
        if config.rope_factor != 1:
            scaling = {theirs: getattr(config, ours) for ours, theirs in pairs(LLAMA3_ROPE, 1)}
            scaling["rope_type"] = "llama3"
        base = {"rope_theta": config.rope_theta}
        raw |= base | {"rope_scaling": scaling}  # for 4
        raw["rope_parameters"] = base | (scaling or {"rope_type": "default"})  # for 5
    if "sliding_window" in architecture.silent:
        raw["sliding_window"] = config.window or None
    if model_type == "qwen3":  # its window covers the layers from max_window_layers on
        raw["use_sliding_window"] = bool(config.window)
        raw["max_window_layers"] = 0 if config.window else config.n_layer
    return raw


# ---- tensors ------------------------------------------------------------------------------------


def to_conv1d(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's layout: q, k, v joined into c_attn, and the (out, in) of nn.Linear as (in, out)."""
    stored = {}
    for name, tensor in tensors.items():
        if ".c_attn.q." in name:
            tensor = torch.cat([tensors[name.replace(".q.", f".{part}.")] for part in "qkv"])
        name = name.replace(".c_attn.q.", ".c_attn.")
        if ".c_attn.k." not in name and ".c_attn.v." not in name:
            stored[name] = tensor.T if re.search(r"\.c_\w+\.weight$", name) else tensor
    return stored


def from_conv1d(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of to_conv1d."""
    tensors = {}
    for name, tensor in stored.items():
        tensor = tensor.T if re.search(r"\.c_\w+\.weight$", name) else tensor
        parts = zip("qkv", tensor.chunk(3)) if ".c_attn." in name else [("", tensor)]
        for part, share in parts:
            tensors[name.replace(".c_attn.", f".c_attn.{part}.")] = share
    return tensors


def their_tensors(model: nn.Module, model_type: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Our name -> theirs, and their name -> tensor; a tied head is stored as the embedding."""
    own = model.state_dict()
    if model.config.tied:
        del own["head.weight"]
    table = dict(pairs(GPT_NAMES, ARCHITECTURES[model_type].column))
    names = {name: translate(name, table) for name in own}
    theirs = {names[name]: tensor for name, tensor in own.items()}
    return names, to_conv1d(theirs) if model_type == "gpt2" else theirs


# ---- in and out ---------------------------------------------------------------------------------


def load(cls: type, config_cls: type, folder: str | Path, dtype=torch.float32) -> nn.Module:
    """The GPT in a folder, in evaluation mode, its weights as dtype on the CPU.

    Raises ValueError where the config cannot be expressed, or the tensors do not fit it.
    """
    folder = Path(folder)
    model_type, config = read_config(config_cls, folder)
    with torch.device("meta"):  # shapes only: the weights take memory once, when they are read
        model = cls(config)
    names, expected = their_tensors(model, model_type)
    stored = {n: t for n, t in read_tensors(folder).items() if not EXTRAS.search(n)}
    embedding = names["token_embedding.weight"]
    base = embedding.split(".")[0] + "."
    if not any(name.startswith(base) for name in stored):  # saved without the head, as GPT-2 was
        stored = {n if n == "lm_head.weight" else base + n: t for n, t in stored.items()}
    if config.tied and embedding in stored:
        head = stored.pop("lm_head.weight", stored[embedding])
        if not torch.equal(head, stored[embedding]):
            raise ValueError(f"{folder}: lm_head.weight differs from the embedding it is tied to")
    check_tensors(folder, stored, expected)
    theirs = from_conv1d(stored) if model_type == "gpt2" else stored
    fill(model, {name: theirs[names[name]] for name in names}, dtype)
    if config.tied:
        model.head.weight = model.token_embedding.weight
    return model


def save(model: nn.Module, folder: str | Path, tokenizer=None, overwrite: bool = False) -> None:
    """Write a folder for `load`, transformers and the tools that read its files.

    Raises ValueError if no architecture expresses the model, and as hub.publish does.
    """
    config = resolve(model.config)
    model_type = choose_architecture(config)
    check_tokenizer(tokenizer, config.vocab_size)
    end = tokenizer.eot if tokenizer else None  # a text begins, as in training, after another's end
    raw = write_config(config, model_type) | {"bos_token_id": end, "eos_token_id": end}
    _, tensors = their_tensors(model, model_type)
    publish(Path(folder), raw, tensors, tokenizer, overwrite)
