"""U-Nets, autoencoders and VQ-VAEs in the layout of diffusers, to and from ours.

The tables are the content. ..._NAME_TABLE: the names of the places in the network; RESNET,
ATTENTION and TRANSFORMER: the names of the layers at a place. ..._FIELD_TABLE: the names of the
settings in config.json. ..._DEFAULTS: the values that diffusers takes for absent settings. For a
setting that is in no field table, the default is also the only value that ours computes, and any
other value is an error.

scheduler.py has folders of a U-Net with its noise schedule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyfm.common import schema
from tinyfm.common.files import MALFORMED, save_tensors, write_json
from tinyfm.hub import layout
from tinyfm.hub.layout import name_pairs, refuse, translate

WEIGHTS = "diffusion_pytorch_model"  # file name, without .safetensors

# ---- names --------------------------------------------------------------------------------------

UNET_NAME_TABLE = """
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
AUTOENCODER_NAME_TABLE = """
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
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
TRANSFORMER = {
    "norm": "norm",
    "enter": "proj_in",
    "leave": "proj_out",
    "norm1": "transformer_blocks.0.norm1",
    "norm2": "transformer_blocks.0.norm2",
    "norm3": "transformer_blocks.0.norm3",
    "up": "transformer_blocks.0.ff.net.0.proj",
    "down": "transformer_blocks.0.ff.net.2",
    "look_around.q": "transformer_blocks.0.attn1.to_q",
    "look_around.k": "transformer_blocks.0.attn1.to_k",
    "look_around.v": "transformer_blocks.0.attn1.to_v",
    "look_around.out": "transformer_blocks.0.attn1.to_out.0",
    "look_up.q": "transformer_blocks.0.attn2.to_q",
    "look_up.k": "transformer_blocks.0.attn2.to_k",
    "look_up.v": "transformer_blocks.0.attn2.to_v",
    "look_up.out": "transformer_blocks.0.attn2.to_out.0",
}
# Names of attention layers in files from before 2023.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# ---- settings -----------------------------------------------------------------------------------

UNET_FIELD_TABLE = """
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
UNET_DEFAULTS = {
    "sample_size": 32,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "act_fn": "silu",
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "mid_block_scale_factor": 1,
    "resnet_time_scale_shift": "default",
}
UNETS = {  # class of diffusers -> its defaults
    "UNet2DModel": UNET_DEFAULTS
    | {
        "mid_block_type": "UNetMidBlock2D",
        "in_channels": 3,
        "out_channels": 3,
        "add_attention": True,
        "attn_norm_num_groups": None,
        "downsample_type": "conv",
        "upsample_type": "conv",
    },
    "UNet2DConditionModel": UNET_DEFAULTS
    | {
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "in_channels": 4,
        "out_channels": 4,
        "only_cross_attention": False,
        "attention_type": "default",
        "mid_block_only_cross_attention": None,
        "dual_cross_attention": False,
        "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": None,
        "addition_embed_type": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "time_cond_proj_dim": None,
        "timestep_post_act": None,
        "time_embedding_act_fn": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "cross_attention_norm": None,
        "class_embeddings_concat": False,
    },
}

AUTOENCODER_FIELD_TABLE = """
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
AUTOENCODER_DEFAULTS = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": 0.0,
    "scaling_factor": 0.18215,
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
}
VQ_FIELD_TABLE = """
image_size       sample_size
in_channels      in_channels
in_channels      out_channels
channels         block_out_channels
n_block          layers_per_block
latent_channels  latent_channels
groups           norm_num_groups
attention        mid_block_add_attention
n_code           num_vq_embeddings
"""
# Without scaling_factor and lookup_from_codebook, which do not change what the network computes.
VQ_DEFAULTS = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 3,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "num_vq_embeddings": 256,
    "act_fn": "silu",
    "norm_type": "group",
}


# ---- config.json --------------------------------------------------------------------------------


def read_settings(raw: dict, table: str, defaults: dict, config_cls: type) -> dict[str, Any]:
    """Read the settings of a field table: {our name: value}.

    Raises ValueError if a field outside the table has another value than its default, except that
    all false values (null, 0, false) count as equal.
    """
    fields = name_pairs(table, 1)
    for field in sorted(defaults.keys() - {theirs for _, theirs in fields}):
        if (raw.get(field, defaults[field]) or None) != (defaults[field] or None):
            refuse(field, raw[field], repr(defaults[field]))
    given = {}
    for field, value in raw.items():
        if value is not None:
            given[field] = tuple(value) if isinstance(value, list) else value
    return layout.read_fields(defaults | given, fields, config_cls)


def write_settings(config: Any, table: str, defaults: dict) -> dict[str, Any]:
    """Return the defaults with the settings of a field table as config has them."""
    return defaults | {theirs: getattr(config, ours) for ours, theirs in name_pairs(table, 1)}


def read(path: Path, kinds: Iterable[str], parse: Callable, base: Any) -> Any:
    """Read a config file: parse(class name, raw fields, base), if `kinds` has the class name.

    Raises ValueError with the file's name if the file is unreadable or cannot be expressed.
    """
    try:
        # Not read_json, which refuses Infinity: the file of a scheduler may hold one.
        raw = schema.parse_json(path.read_bytes(), non_finite=True)
        raw = schema.check(raw, dict[str, Any], str(path))
        kind = raw.get("_class_name")
        if kind not in kinds:
            refuse("_class_name", kind, ", ".join(kinds))
        return parse(kind, raw, base)
    except (OSError, *MALFORMED) as error:
        raise ValueError(f"{path}: {error}") from error


def block_types(kind: str, attend: Sequence[bool]) -> dict[str, list[str]]:
    """Return diffusers' names for the levels on the way down and, in reverse order, up."""
    attention = "Attn" if kind == "UNet2DModel" else "CrossAttn"
    marks = [attention if level else "" for level in attend]
    return {
        "down_block_types": [f"{mark}DownBlock2D" for mark in marks],
        "up_block_types": [f"{mark}UpBlock2D" for mark in reversed(marks)],
    }


def read_heads(kind: str, raw: dict, channels: Sequence[int]) -> dict[str, int]:
    """Read the attention settings: our n_head and d_head, and d_context if there is a context.

    The field attention_head_dim is the width of a head in UNet2DModel. In UNet2DConditionModel it
    is, against its name, the number of heads: one number, or one for each level.
    """
    heads = raw.get("attention_head_dim", 8)
    if kind == "UNet2DModel":
        return {"n_head": 1, "d_head": heads or 0}
    d_context = raw.get("cross_attention_dim", 1280)
    if not isinstance(heads, list):
        return {"n_head": heads, "d_context": d_context}
    widths = {C / n for C, n in zip(channels, heads)}
    if len(widths) != 1 or len(heads) != len(channels):
        refuse("attention_head_dim", heads, "a number, or heads of one width")
    return {"n_head": 1, "d_head": int(widths.pop()), "d_context": d_context}


def read_unet(kind: str, raw: dict, config_cls: type) -> Any:
    """Return the UNetConfig for the config.json of a class of UNETS."""
    values = read_settings(raw, UNET_FIELD_TABLE, UNETS[kind], config_cls)
    attend = tuple("Attn" in level for level in raw.get("down_block_types") or ())
    layout.require(raw, block_types(kind, attend))
    heads = read_heads(kind, raw, values["channels"])
    padding = raw.get("downsample_padding", 1)
    if padding not in (0, 1):
        refuse("downsample_padding", padding, "0 or 1")
    return config_cls(**values, **heads, attend=attend, pad_end=padding == 0)


def head_width(config: Any) -> int | None:
    """Return the width of every head of a UNet2DModel; None for one head as wide as its level.

    Raises ValueError if the widths differ.
    """
    if config.n_head == 1 and not config.d_head:
        return None
    attended = [C for C, attend in zip(config.channels, config.attend) if attend]
    attended.append(config.channels[-1])  # the middle
    widths = {C // config.heads(C) for C in attended}
    if len(widths) > 1:
        raise ValueError(f"UNet2DModel has heads of one width, not {sorted(widths)}; set d_head")
    return widths.pop()


def write_unet(config: Any) -> dict[str, Any]:
    """Return config.json of a UNetConfig. Raises ValueError if diffusers cannot express it."""
    if config.patch_size > 1:
        raise ValueError(
            f"patch_size is {config.patch_size}; diffusers' U-Nets have no patches: train with "
            "--model.patch-size 1"
        )
    kind = "UNet2DConditionModel" if config.d_context else "UNet2DModel"
    raw = write_settings(config, UNET_FIELD_TABLE, UNETS[kind]) | block_types(kind, config.attend)
    raw["out_channels"] = config.out_channels or config.in_channels
    raw["downsample_padding"] = 0 if config.pad_end else 1
    if config.d_context:
        heads = config.n_head
        if config.d_head:
            heads = [C // config.d_head for C in config.channels]
        raw |= {"attention_head_dim": heads, "cross_attention_dim": config.d_context}
    else:
        raw["attention_head_dim"] = head_width(config)
    return {"_class_name": kind} | raw


def autoencoder_types(levels: int) -> dict[str, list[str]]:
    """Return diffusers' names for the levels of an autoencoder."""
    return {
        "down_block_types": levels * ["DownEncoderBlock2D"],
        "up_block_types": levels * ["UpDecoderBlock2D"],
    }


def read_autoencoder(kind: str, raw: dict, config_cls: type) -> Any:
    """Return the AutoencoderConfig for the config.json of an AutoencoderKL, the only `kind`."""
    values = read_settings(raw, AUTOENCODER_FIELD_TABLE, AUTOENCODER_DEFAULTS, config_cls)
    layout.require(raw, autoencoder_types(len(values["channels"])))
    return config_cls(**values)


def write_autoencoder(model: nn.Module) -> dict[str, Any]:
    """Return config.json of an Autoencoder. Raises ValueError for a plain one.

    Mean and scale of the latents are those of the model's buffers: they are measured after
    training, and the config may have other values.
    """
    config = model.config
    if not config.variational:
        raise ValueError("diffusers has no plain autoencoder; train one with variational True")
    raw = write_settings(config, AUTOENCODER_FIELD_TABLE, AUTOENCODER_DEFAULTS)
    raw["shift_factor"] = model.latent_mean.item()
    raw["scaling_factor"] = model.latent_scale.item()
    return {"_class_name": "AutoencoderKL"} | raw | autoencoder_types(len(config.channels))


def read_vq(kind: str, raw: dict, config_cls: type) -> Any:
    """Return the VQConfig for the config.json of a VQModel, the only `kind`."""
    values = read_settings(raw, VQ_FIELD_TABLE, VQ_DEFAULTS, config_cls)
    layout.require(raw, autoencoder_types(len(values["channels"])))
    width = raw.get("vq_embed_dim")
    if width not in (None, values["latent_channels"]):
        refuse("vq_embed_dim", width, f"latent_channels, {values['latent_channels']}")
    return config_cls(**values)


def write_vq(config: Any) -> dict[str, Any]:
    """Return config.json of a VQConfig. Raises ValueError for several codebooks."""
    if config.n_book > 1:
        raise ValueError(
            f"n_book is {config.n_book}; diffusers' VQModel has one codebook: train with "
            "--model.n-book 1"
        )
    raw = write_settings(config, VQ_FIELD_TABLE, VQ_DEFAULTS)
    return {"_class_name": "VQModel"} | raw | autoencoder_types(len(config.channels))


# ---- tensors ------------------------------------------------------------------------------------


def all_names(places: str, attention: dict[str, str]) -> dict[str, str]:
    """Our modules -> theirs: for each place of a name table, the layers at that place."""
    names = {}
    for ours, theirs in name_pairs(places, 1):
        if ".resnets." in theirs:
            layers = RESNET
        elif ".attentions." in theirs:
            layers = attention
        else:
            names[ours] = theirs
            continue
        for our_layer, their_layer in layers.items():
            names[f"{ours}.{our_layer}"] = f"{theirs}.{their_layer}"
    return names


def unet_names(config: Any) -> dict[str, str]:
    """Our modules -> theirs, for a U-Net."""
    return all_names(UNET_NAME_TABLE, TRANSFORMER if config.d_context else ATTENTION)


def autoencoder_names() -> dict[str, str]:
    """Our modules -> theirs, for an autoencoder."""
    return all_names(AUTOENCODER_NAME_TABLE, ATTENTION)


def vq_names() -> dict[str, str]:
    """Our modules -> theirs, for a VQ-VAE."""
    return autoencoder_names() | {"quantizer.codebooks.*": "quantize.embedding"}


def new_name(name: str) -> str:
    """Return today's name of a tensor in an old file."""
    return re.sub(rf"\.({'|'.join(OLD)})\.", lambda match: f".{OLD[match[1]]}.", name)


def load_weights(cls: type, config: Any, names: dict, folder: Path, dtype) -> nn.Module:
    """Build the model of a config and load a folder's weights; evaluation mode, on the CPU.

    names: our modules -> theirs. Raises ValueError for weights that do not fit.
    """
    tensors = layout.read_tensors(folder, WEIGHTS)
    model = layout.build_on_meta(cls, config, folder, len(tensors))
    theirs = {name: translate(name, names) for name, _ in model.named_parameters()}
    expected = {theirs[name]: parameter for name, parameter in model.named_parameters()}
    stored = {}
    for name, tensor in tensors.items():
        name = new_name(name)
        # Stable Diffusion 2 has linear layers in place of 1x1 convolutions.
        if name in expected and expected[name].ndim == 4 and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        stored[name] = tensor
    layout.check_tensors(folder, stored, expected)
    layout.assign_weights(model, {name: stored[theirs[name]] for name in theirs}, dtype)
    return model


def save_weights(model: nn.Module, raw: dict, names: dict, folder: Path, overwrite: bool) -> None:
    """Write the weights of a model, and raw as config.json.

    config.json is written last, so a folder that a crash left incomplete does not load. Raises
    ValueError if the folder has a config.json already, unless overwrite.
    """
    layout.check_overwrite(folder, overwrite)
    path = folder / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    tensors = {translate(name, names): tensor for name, tensor in model.named_parameters()}
    save_tensors(folder, WEIGHTS, tensors)
    write_json(path, raw)


# ---- in and out ---------------------------------------------------------------------------------


def load_unet(cls: type, config_cls: type, folder: str | Path, dtype=torch.float32) -> nn.Module:
    """Load the U-Net of a folder, in evaluation mode, its weights as dtype on the CPU.

    cls and config_cls: UNet and UNetConfig. Raises ValueError if the config cannot be expressed, or
    if the tensors do not fit it.
    """
    folder = Path(folder)
    config = read(folder / "config.json", UNETS, read_unet, config_cls)
    return load_weights(cls, config, unet_names(config), folder, dtype)


def save_unet(model: nn.Module, folder: str | Path, overwrite: bool = False) -> None:
    """Write a folder for `load_unet` and diffusers. Raises ValueError as write_unet does, or if the
    folder holds a model already, unless overwrite."""
    raw = write_unet(model.config)
    save_weights(model, raw, unet_names(model.config), Path(folder), overwrite)


def load_autoencoder(
    cls: type, config_cls: type, folder: str | Path, dtype=torch.float32
) -> nn.Module:
    """Load the autoencoder of a folder. Arguments and errors as for `load_unet`."""
    folder = Path(folder)
    config = read(folder / "config.json", ["AutoencoderKL"], read_autoencoder, config_cls)
    return load_weights(cls, config, autoencoder_names(), folder, dtype)


def save_autoencoder(model: nn.Module, folder: str | Path, overwrite: bool = False) -> None:
    """Write a folder for `load_autoencoder` and diffusers. Raises ValueError for a plain
    autoencoder, as AutoencoderKL is variational, or if the folder holds a model already, unless
    overwrite."""
    save_weights(model, write_autoencoder(model), autoencoder_names(), Path(folder), overwrite)


def load_vq(cls: type, config_cls: type, folder: str | Path, dtype=torch.float32) -> nn.Module:
    """Load the VQ-VAE of a folder. Arguments and errors as for `load_unet`."""
    folder = Path(folder)
    config = read(folder / "config.json", ["VQModel"], read_vq, config_cls)
    return load_weights(cls, config, vq_names(), folder, dtype)


def save_vq(model: nn.Module, folder: str | Path, overwrite: bool = False) -> None:
    """Write a folder for `load_vq` and diffusers. Raises ValueError for several codebooks, or if
    the folder holds a model already, unless overwrite."""
    save_weights(model, write_vq(model.config), vq_names(), Path(folder), overwrite)
