"""U-Nets and autoencoders as diffusers writes them down, to and from ours.

The tables are the content. ..._NAMES: what a place in the network is called there; RESNET,
ATTENTION and TRANSFORMER: its layers. ..._FIELDS: where a setting stands in config.json. The
dictionaries: what diffusers takes where config.json says nothing; of all that is not among the
fields, that is also the only value which ours computes, and any other is refused.
hub_pipeline.py has folders of such folders. Left out: weights in several files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyfm.common.files import MALFORMED, load_tensors, save_tensors, write_json
from tinyfm.hub.layout import check_tensors, fill, pairs, refuse, take, translate

WEIGHTS = "diffusion_pytorch_model"

# ---- names --------------------------------------------------------------------------------------

UNET_NAMES = """
conv_in                    conv_in
time_in                    time_embedding.linear_1
time_out                   time_embedding.linear_2
down.*.blocks.*.res        down_blocks.*.resnets.*
down.*.blocks.*.attention  down_blocks.*.attentions.*
down.*.resample            down_blocks.*.downsamplers.0.conv
middle.res                 mid_block.resnets.0
middle.attention           mid_block.attentions.0
middle_out                 mid_block.resnets.1
up.*.blocks.*.res          up_blocks.*.resnets.*
up.*.blocks.*.attention    up_blocks.*.attentions.*
up.*.resample              up_blocks.*.upsamplers.0.conv
norm                       conv_norm_out
conv_out                   conv_out
"""
AUTOENCODER_NAMES = """
encoder.conv_in            encoder.conv_in
encoder.levels.*.blocks.*  encoder.down_blocks.*.resnets.*
encoder.levels.*.resample  encoder.down_blocks.*.downsamplers.0.conv
encoder.middle.first       encoder.mid_block.resnets.0
encoder.middle.attention   encoder.mid_block.attentions.0
encoder.middle.last        encoder.mid_block.resnets.1
encoder.norm               encoder.conv_norm_out
encoder.conv_out           encoder.conv_out
encoder.quant              quant_conv
decoder.quant              post_quant_conv
decoder.conv_in            decoder.conv_in
decoder.middle.first       decoder.mid_block.resnets.0
decoder.middle.attention   decoder.mid_block.attentions.0
decoder.middle.last        decoder.mid_block.resnets.1
decoder.levels.*.blocks.*  decoder.up_blocks.*.resnets.*
decoder.levels.*.resample  decoder.up_blocks.*.upsamplers.0.conv
decoder.norm               decoder.conv_norm_out
decoder.conv_out           decoder.conv_out
"""
RESNET = {
    "norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2",
    "conv2": "conv2", "skip": "conv_shortcut",
}  # fmt: skip
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
TRANSFORMER = {
    "norm": "norm", "enter": "proj_in", "leave": "proj_out",
    "norm1": "transformer_blocks.0.norm1", "norm2": "transformer_blocks.0.norm2",
    "norm3": "transformer_blocks.0.norm3", "up": "transformer_blocks.0.ff.net.0.proj",
    "down": "transformer_blocks.0.ff.net.2",
    "look_around.q": "transformer_blocks.0.attn1.to_q",
    "look_around.k": "transformer_blocks.0.attn1.to_k",
    "look_around.v": "transformer_blocks.0.attn1.to_v",
    "look_around.out": "transformer_blocks.0.attn1.to_out.0",
    "look_up.q": "transformer_blocks.0.attn2.to_q",
    "look_up.k": "transformer_blocks.0.attn2.to_k",
    "look_up.v": "transformer_blocks.0.attn2.to_v",
    "look_up.out": "transformer_blocks.0.attn2.to_out.0",
}  # fmt: skip
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before 2023

# ---- fields -------------------------------------------------------------------------------------

UNET_FIELDS = """
image_size    sample_size
in_channels   in_channels
out_channels  out_channels
channels      block_out_channels
n_block       layers_per_block
groups        norm_num_groups
norm_eps      norm_eps
dropout       dropout
cos_first     flip_sin_to_cos
time_shift    freq_shift
"""
UNET = {
    "sample_size": 32, "layers_per_block": 2, "norm_num_groups": 32, "norm_eps": 1e-5,
    "dropout": 0.0, "flip_sin_to_cos": True, "freq_shift": 0, "act_fn": "silu",
    "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "class_embed_type": None,
    "num_class_embeds": None, "mid_block_scale_factor": 1, "resnet_time_scale_shift": "default",
}  # fmt: skip
UNETS = {
    "UNet2DModel": UNET | {
        "mid_block_type": "UNetMidBlock2D", "in_channels": 3, "out_channels": 3,
        "add_attention": True, "attn_norm_num_groups": None, "downsample_type": "conv",
        "upsample_type": "conv"},
    "UNet2DConditionModel": UNET | {
        "mid_block_type": "UNetMidBlock2DCrossAttn", "in_channels": 4, "out_channels": 4,
        "only_cross_attention": False, "attention_type": "default",
        "mid_block_only_cross_attention": None, "dual_cross_attention": False,
        "transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": None,
        "addition_embed_type": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
        "time_cond_proj_dim": None, "timestep_post_act": None, "time_embedding_act_fn": None,
        "conv_in_kernel": 3, "conv_out_kernel": 3, "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0, "cross_attention_norm": None,
        "class_embeddings_concat": False},
}  # fmt: skip

AUTOENCODER_FIELDS = """
image_size       sample_size
in_channels      in_channels
in_channels      out_channels
channels         block_out_channels
n_block          layers_per_block
latent_channels  latent_channels
groups           norm_num_groups
attention        mid_block_add_attention
quant_conv       use_quant_conv
quant_conv       use_post_quant_conv
latent_mean      shift_factor
latent_scale     scaling_factor
"""
AUTOENCODER = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
    "latent_channels": 4, "norm_num_groups": 32, "mid_block_add_attention": True,
    "use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": 0.0,
    "scaling_factor": 0.18215, "act_fn": "silu", "latents_mean": None, "latents_std": None,
}  # fmt: skip


# ---- config.json --------------------------------------------------------------------------------


def read_fields(raw: dict, table: str, defaults: dict, config_cls: type) -> dict[str, Any]:
    """The fields of a table by our names. Raises ValueError for what our modules do not compute."""
    fields = pairs(table, 1)
    for field in sorted(defaults.keys() - {theirs for _, theirs in fields}):
        if (raw.get(field, defaults[field]) or None) != (defaults[field] or None):
            refuse(field, raw[field], repr(defaults[field]))
    said = {key: value for key, value in raw.items() if value is not None}
    said = {key: tuple(v) if isinstance(v, list) else v for key, v in said.items()}
    return take(defaults | said, fields, config_cls)


def write_fields(config: Any, table: str, defaults: dict) -> dict[str, Any]:
    return defaults | {theirs: getattr(config, ours) for ours, theirs in pairs(table, 1)}


def read(path: Path, kinds: Iterable[str], parse: Callable, base: Any) -> Any:
    """The config in a file, parse(class, raw, base), if the class is among `kinds`.

    Raises ValueError with the file's name for what cannot be expressed.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))  # schedulers may hold an Infinity
        kind = raw.get("_class_name")
        if kind not in kinds:
            refuse("_class_name", kind, ", ".join(kinds))
        return parse(kind, raw, base)
    except (OSError, *MALFORMED) as error:
        raise ValueError(f"{path}: {error}") from error


def block_types(kind: str, attend: Sequence[bool]) -> dict[str, list[str]]:
    """What diffusers calls the levels: down, and mirrored, up."""
    attention = "Attn" if kind == "UNet2DModel" else "CrossAttn"
    marks = [attention if level else "" for level in attend]
    return {
        "down_block_types": [f"{mark}DownBlock2D" for mark in marks],
        "up_block_types": [f"{mark}UpBlock2D" for mark in reversed(marks)],
    }


def check_types(raw: dict, types: dict[str, list[str]]) -> None:
    for field, expected in types.items():
        if raw.get(field) != expected:
            refuse(field, raw.get(field), repr(expected))


def read_unet(kind: str, raw: dict, config_cls: type) -> Any:
    """A UNetConfig. attention_head_dim is a width in one class, and in the other a number."""
    values = read_fields(raw, UNET_FIELDS, UNETS[kind], config_cls)
    attend = tuple("Attn" in level for level in raw.get("down_block_types") or ())
    check_types(raw, block_types(kind, attend))
    heads, channels = raw.get("attention_head_dim", 8), values["channels"]
    head = {"n_head": 1, "d_head": heads or 0}
    if kind == "UNet2DConditionModel":
        head = {"n_head": heads, "d_context": raw.get("cross_attention_dim", 1280)}
        if isinstance(heads, list):
            widths = {C / n for C, n in zip(channels, heads)}
            if len(widths) != 1 or len(heads) != len(channels):
                refuse("attention_head_dim", heads, "a number, or heads of one width")
            head |= {"n_head": 1, "d_head": int(widths.pop())}
    if (padding := raw.get("downsample_padding", 1)) not in (0, 1):
        refuse("downsample_padding", padding, "0 or 1")
    return config_cls(**values, **head, attend=attend, pad_end=padding == 0)


def write_unet(config: Any) -> dict[str, Any]:
    """config.json of a UNetConfig. Raises ValueError where diffusers cannot express it."""
    if config.patch_size > 1:
        raise ValueError(f"patch_size is {config.patch_size}; diffusers has none: train with 1")
    kind = "UNet2DConditionModel" if config.d_context else "UNet2DModel"
    raw = write_fields(config, UNET_FIELDS, UNETS[kind]) | block_types(kind, config.attend)
    raw["out_channels"] = config.out_channels or config.in_channels
    raw["downsample_padding"] = 0 if config.pad_end else 1
    attended = [C for C, attend in zip(config.channels, config.attend) if attend]
    widths = {C // config.heads(C) for C in [*attended, config.channels[-1]]}
    if config.d_context:
        heads = [C // config.d_head for C in config.channels] if config.d_head else config.n_head
        raw |= {"attention_head_dim": heads, "cross_attention_dim": config.d_context}
    elif config.n_head == 1 and not config.d_head:
        raw["attention_head_dim"] = None
    elif len(widths) == 1:
        raw["attention_head_dim"] = widths.pop()
    else:
        raise ValueError(f"UNet2DModel has heads of one width, not {sorted(widths)}; set d_head")
    return {"_class_name": kind} | raw


def autoencoder_types(levels: int) -> dict[str, list[str]]:
    kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    return {field: levels * [kind] for field, kind in kinds.items()}


def read_autoencoder(kind: str, raw: dict, config_cls: type) -> Any:
    """An AutoencoderConfig."""
    values = read_fields(raw, AUTOENCODER_FIELDS, AUTOENCODER, config_cls)
    check_types(raw, autoencoder_types(len(values["channels"])))
    return config_cls(**values)


def write_autoencoder(model: nn.Module) -> dict[str, Any]:
    config = model.config
    if not config.variational:
        raise ValueError("diffusers has no plain autoencoder; train one with variational True")
    raw = write_fields(config, AUTOENCODER_FIELDS, AUTOENCODER)
    raw |= {"shift_factor": model.latent_mean.item(), "scaling_factor": model.latent_scale.item()}
    return {"_class_name": "AutoencoderKL"} | raw | autoencoder_types(len(config.channels))


# ---- tensors ------------------------------------------------------------------------------------


def all_names(places: str, attention: dict[str, str]) -> dict[str, str]:
    """Our modules -> theirs: the layers of each place."""
    names = {}
    for ours, theirs in pairs(places, 1):
        parts = RESNET if ".resnets." in theirs else attention if ".attentions." in theirs else {}
        names |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in parts.items()} or {ours: theirs}
    return names


def unet_names(config: Any) -> dict[str, str]:
    return all_names(UNET_NAMES, TRANSFORMER if config.d_context else ATTENTION)


def autoencoder_names() -> dict[str, str]:
    return all_names(AUTOENCODER_NAMES, ATTENTION)


def load_weights(cls: type, config: Any, names: dict, folder: Path, dtype) -> nn.Module:
    """The model of a config with a folder's weights, in evaluation mode, on the CPU."""
    with torch.device("meta"):  # shapes only: the weights take memory once, when they are read
        model = cls(config)
    theirs = {name: translate(name, names) for name, _ in model.named_parameters()}
    expected = {theirs[name]: p for name, p in model.named_parameters()}
    stored = {}
    for name, tensor in load_tensors(folder, WEIGHTS).items():
        name = re.sub(rf"\.({'|'.join(OLD)})\.", lambda found: f".{OLD[found[1]]}.", name)
        if name in expected and expected[name].ndim == 4 and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # Stable Diffusion 2 has linear layers for 1x1
        stored[name] = tensor
    check_tensors(folder, stored, expected)
    fill(model, {name: stored[theirs[name]] for name in theirs}, dtype)
    return model


def save_weights(model: nn.Module, raw: dict, names: dict, folder: Path, overwrite: bool) -> None:
    """Write a folder; config.json last, so that what a crash leaves behind does not load."""
    path = folder / "config.json"
    if path.exists() and not overwrite:
        raise ValueError(f"{folder} holds a model already; choose another folder, or overwrite it")
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    tensors = {translate(name, names): p for name, p in model.named_parameters()}
    save_tensors(folder, WEIGHTS, tensors)
    write_json(path, raw)


# ---- in and out ---------------------------------------------------------------------------------


def load_unet(cls: type, config_cls: type, folder: str | Path, dtype=torch.float32) -> nn.Module:
    """The U-Net in a folder. Raises ValueError for what ours cannot express, or does not fit."""
    folder = Path(folder)
    config = read(folder / "config.json", UNETS, read_unet, config_cls)
    return load_weights(cls, config, unet_names(config), folder, dtype)


def save_unet(model: nn.Module, folder: str | Path, overwrite: bool = False) -> None:
    raw, names = write_unet(model.config), unet_names(model.config)
    save_weights(model, raw, names, Path(folder), overwrite)


def load_autoencoder(cls: type, config_cls: type, folder: str | Path, dtype) -> nn.Module:
    """The autoencoder in a folder. Raises ValueError as load_unet does."""
    folder = Path(folder)
    config = read(folder / "config.json", ["AutoencoderKL"], read_autoencoder, config_cls)
    return load_weights(cls, config, autoencoder_names(), folder, dtype)


def save_autoencoder(model: nn.Module, folder: str | Path, overwrite: bool = False) -> None:
    """Raises ValueError for a plain autoencoder: AutoencoderKL is variational."""
    save_weights(model, write_autoencoder(model), autoencoder_names(), Path(folder), overwrite)
