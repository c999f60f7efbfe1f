"""MusicGen's decoder in the layout of transformers' MusicgenForCausalLM, to and from our MusicGen.

Their decoder always has the weights that attend to a text. A model that reads none is written with
weights of 0 there, which add nothing. A published MusicGen is a folder of three models; of these,
this is the decoder.

Left out: stereo; settings that matter in training only, except the dropout of the states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfm.common.files import MALFORMED, read_json
from tinyfm.hub import layout
from tinyfm.hub.layout import name_pairs, refuse, translate

TITLE = "MusicgenForCausalLM"
NAMES = """
code_embeddings.*       model.decoder.embed_tokens.*
blocks.*.norm1          model.decoder.layers.*.self_attn_layer_norm
blocks.*.attention.q    model.decoder.layers.*.self_attn.q_proj
blocks.*.attention.k    model.decoder.layers.*.self_attn.k_proj
blocks.*.attention.v    model.decoder.layers.*.self_attn.v_proj
blocks.*.attention.out  model.decoder.layers.*.self_attn.out_proj
blocks.*.norm_text      model.decoder.layers.*.encoder_attn_layer_norm
blocks.*.text.q         model.decoder.layers.*.encoder_attn.q_proj
blocks.*.text.k         model.decoder.layers.*.encoder_attn.k_proj
blocks.*.text.v         model.decoder.layers.*.encoder_attn.v_proj
blocks.*.text.out       model.decoder.layers.*.encoder_attn.out_proj
blocks.*.norm2          model.decoder.layers.*.final_layer_norm
blocks.*.mlp.up         model.decoder.layers.*.fc1
blocks.*.mlp.down       model.decoder.layers.*.fc2
norm                    model.decoder.layer_norm
heads.*                 lm_heads.*
"""
FIELDS = """
n_code          vocab_size
n_book          num_codebooks
context_length  max_position_embeddings
n_layer         num_hidden_layers
n_head          num_attention_heads
d_model         hidden_size
d_ff            ffn_dim
dropout         dropout
"""
DEFAULTS = {  # of transformers, for absent fields
    "vocab_size": 2048, "num_codebooks": 4, "max_position_embeddings": 2048,
    "num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024, "ffn_dim": 4096,
    "dropout": 0.1,
}  # fmt: skip
# Their fields -> the value that our model computes, also the one for absent fields.
REQUIRED = {"activation_function": "gelu", "audio_channels": 1, "tie_word_embeddings": False}


# ---- config.json --------------------------------------------------------------------------------


def read_config(config_cls: type, folder: Path) -> Any:
    """Read config.json: the MusicGenConfig. Raises ValueError for what it cannot express."""
    raw = read_json(folder / "config.json")
    try:
        model_type = raw.get("model_type") if isinstance(raw, dict) else None
        if model_type == "musicgen":
            part = "musicgen_decoder, a part of this folder: open it in transformers and save"
            refuse("model_type", model_type, f"{part} model.decoder by its save_pretrained")
        if model_type != "musicgen_decoder":
            refuse("model_type", model_type, "musicgen_decoder")
        for field, value in REQUIRED.items():
            if raw.get(field, value) != value:
                refuse(field, raw[field], repr(value))
        values = layout.read_fields(DEFAULTS | raw, name_pairs(FIELDS, 1), config_cls)
        for field in ("pad_token_id", "bos_token_id"):
            if raw.get(field, values["n_code"]) != values["n_code"]:
                refuse(field, raw[field], f"vocab_size, {values['n_code']}")
        return config_cls(**values, text=True)
    except MALFORMED as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def write_config(config: Any) -> dict[str, Any]:
    """Return config.json for a MusicGenConfig. Raises ValueError for a pattern without delay."""
    if config.pattern != "delay":
        refuse("pattern", config.pattern, "'delay', as transformers writes")
    raw: dict[str, Any] = {"architectures": [TITLE], "model_type": "musicgen_decoder"} | REQUIRED
    for ours, theirs in name_pairs(FIELDS, 1):
        raw[theirs] = getattr(config, ours)
    ends = dict.fromkeys(("pad_token_id", "bos_token_id"), config.n_code)
    return raw | ends | {"ffn_dim": config.gpt.F}


# ---- in and out ---------------------------------------------------------------------------------


def their_name(name: str) -> str:
    """Their name for the tensor that we call `name`."""
    return translate(name, dict(name_pairs(NAMES, 1)))


def no_text(config: Any) -> dict[str, Tensor]:
    """The weights that attend to a text, of a model that has none there: 0."""
    D = config.d_model
    tensors = {}
    for i in range(config.n_layer):
        for part in ("q", "k", "v", "out"):
            tensors[their_name(f"blocks.{i}.text.{part}.weight")] = torch.zeros(D, D)
        tensors[their_name(f"blocks.{i}.norm_text.weight")] = torch.ones(D)
        tensors[their_name(f"blocks.{i}.norm_text.bias")] = torch.zeros(D)
    return tensors


def load(cls: type, config_cls: type, folder: str | Path, dtype=torch.float32) -> nn.Module:
    """Load the decoder of a folder, in evaluation mode, its weights as dtype on the CPU.

    cls and config_cls: MusicGen and MusicGenConfig. Raises ValueError if the config cannot be
    expressed, or if the tensors do not fit it.
    """
    folder = Path(folder)
    config = read_config(config_cls, folder)
    stored = layout.read_tensors(folder)
    model = layout.build_on_meta(cls, config, folder, len(stored))
    own = dict(model.named_parameters())
    names = {name: their_name(name) for name in own}
    layout.check_tensors(folder, stored, {names[name]: tensor for name, tensor in own.items()})
    layout.assign_weights(model, {name: stored[names[name]] for name in own}, dtype)
    return model


def save(model: nn.Module, folder: str | Path, overwrite: bool = False) -> None:
    """Write a folder for `load` and for transformers.

    Raises ValueError if the folder holds a model already, unless overwrite.
    """
    tensors = {their_name(name): tensor for name, tensor in model.named_parameters()}
    if not model.config.text:
        tensors |= no_text(model.config)
    layout.write_folder(Path(folder), write_config(model.config), tensors, overwrite=overwrite)
