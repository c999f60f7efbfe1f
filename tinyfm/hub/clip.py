"""CLIP in the layout of transformers' CLIPModel, to and from our CLIP.

The tables are the content. NAME_TABLE and BLOCK_NAME_TABLE: the names of the modules there.
FIELD_TABLE: the names of the settings in their config.json. Three things show in no tensor:

1. Pixels. Published models read (pixel - mean) / std; mean and std stand in a file of the image
   processor. Our model takes images in [-1, 1] and applies config.image_mean and image_std itself,
   so no weight changes. A folder without that file is taken to read images in [-1, 1], which is a
   mean and a std of 0.5.
2. The end of a text. The text tower is read at the first eos_token_id of a row. An id of 2, an
   error in CLIP's first files, stands for the highest id of the row.
3. The scale. Our model clamps it, transformers does not. max_scale is raised to the scale that is
   read, and the scale that is written is clamped.

A model of grey pictures keeps its one channel. The pipelines of transformers give every model
pictures in RGB, so the command python -m tinyfm.hub writes what `in_rgb` returns.

Left out: settings that matter in training only, folders of one tower.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfm.common.files import MALFORMED, read_json
from tinyfm.hub import layout
from tinyfm.hub.layout import name_pairs, refuse, translate

# ---- names --------------------------------------------------------------------------------------

NAME_TABLE = """
image_tower.stem.project    vision_model.embeddings.patch_embedding
image_tower.class_token     vision_model.embeddings.class_embedding
image_tower.position        vision_model.embeddings.position_embedding.weight
image_tower.norm1           vision_model.pre_layrnorm
image_tower.blocks.*        vision_model.encoder.layers.*
image_tower.norm2           vision_model.post_layernorm
image_projection            visual_projection
text_tower.token_embedding  text_model.embeddings.token_embedding
text_tower.position         text_model.embeddings.position_embedding.weight
text_tower.blocks.*         text_model.encoder.layers.*
text_tower.norm             text_model.final_layer_norm
text_projection             text_projection
logit_scale                 logit_scale
"""
BLOCK_NAME_TABLE = """
norm1          layer_norm1
attention.q    self_attn.q_proj
attention.k    self_attn.k_proj
attention.v    self_attn.v_proj
attention.out  self_attn.out_proj
norm2          layer_norm2
mlp.up         mlp.fc1
mlp.down       mlp.fc2
"""
PATCHES = "vision_model.embeddings.patch_embedding.weight"
BUFFERS = ".embeddings.position_ids"  # end of the names of stored buffers, which are not weights


def all_names() -> dict[str, str]:
    """Our modules -> theirs, including the modules inside the blocks."""
    names = {}
    for ours, theirs in name_pairs(NAME_TABLE, 1):
        if "*" not in ours:
            names[ours] = theirs
            continue
        for our_layer, their_layer in name_pairs(BLOCK_NAME_TABLE, 1):
            names[f"{ours}.{our_layer}"] = f"{theirs}.{their_layer}"
    return names


NAMES = all_names()

# ---- settings -----------------------------------------------------------------------------------

# tinyfm        transformers                          their default, in JSON
FIELD_TABLE = """
image_size      vision_config.image_size              224
channels        vision_config.num_channels            3
patch_size      vision_config.patch_size              32
image_layer     vision_config.num_hidden_layers       12
image_width     vision_config.hidden_size             768
image_head      vision_config.num_attention_heads     12
activation      vision_config.hidden_act              "quick_gelu"
norm_eps        vision_config.layer_norm_eps          1e-5
vocab_size      text_config.vocab_size                49408
context_length  text_config.max_position_embeddings   77
text_layer      text_config.num_hidden_layers         12
text_width      text_config.hidden_size               512
text_head       text_config.num_attention_heads       8
activation      text_config.hidden_act                "quick_gelu"
norm_eps        text_config.layer_norm_eps            1e-5
embed_dim       projection_dim                        512
"""
FIELDS = name_pairs(FIELD_TABLE, 1)
VALUES = [json.loads(value) for _, value in name_pairs(FIELD_TABLE, 2)]
DEFAULTS = {theirs: value for (_, theirs), value in zip(FIELDS, VALUES)}
DEFAULTS |= {
    "vision_config.intermediate_size": 3072,
    "text_config.intermediate_size": 2048,
    "text_config.eos_token_id": 49407,
}
PARTS = ("vision_config", "text_config")
MLP_WIDTHS = {"image_ff": "vision_config", "text_ff": "text_config"}  # of intermediate_size
FIXED = {"stem": "patch", "loss": "infonce"}  # our fields -> the only value CLIPModel computes

PROCESSOR = "preprocessor_config.json"
PROCESSOR_DEFAULTS = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}

# Special values: of our end_token ...
LAST_ID = -1
HIGHEST_ID = -2
# ... and of their eos_token_id.
THEIR_HIGHEST_ID = 2


# ---- config.json and preprocessor_config.json ---------------------------------------------------


def flatten(raw: dict) -> dict[str, Any]:
    """Return config.json with the settings of its two parts as "text_config.vocab_size" etc.,
    and with defaults for absent ones."""
    flat = DEFAULTS | raw
    for part in PARTS:
        fields = raw.get(f"{part}_dict")  # older files have this one, and then it alone counts
        if fields is None:
            fields = raw.get(part)
        for name, value in (fields or {}).items():
            flat[f"{part}.{name}"] = value
    return flat


def read_mlp_width(field: str, mlp_width: Any, width: int) -> int:
    """Return our image_ff or text_ff: the width inside the MLPs, 0 for 4 times that of the tower.

    field: its name there. Raises ValueError if it is no whole number above 0.
    """
    if type(mlp_width) is not int or mlp_width < 1:
        refuse(field, mlp_width, "a whole number above 0")
    return 0 if mlp_width == 4 * width else mlp_width


def read_end_token(field: str, end: Any) -> int:
    """Return our end_token for their eos_token_id; field: its name there."""
    if type(end) is not int or end < 0:
        refuse(field, end, "one id")
    return HIGHEST_ID if end == THEIR_HIGHEST_ID else end


def read_processor(folder: Path) -> dict[str, tuple[float, ...]]:
    """Read our image_mean and image_std from the image processor of a folder; {} without one.

    Equal channels give one number. Raises ValueError if pixels are not scaled by 1/255.
    """
    newer = folder / "processor_config.json"  # of transformers 5
    older = folder / PROCESSOR  # of transformers 4
    raw = read_json(older) if older.is_file() else {}
    if newer.is_file():
        raw = read_json(newer).get("image_processor", raw)
    if not raw:
        return {}
    raw = PROCESSOR_DEFAULTS | raw
    if not raw["do_rescale"] or not math.isclose(raw["rescale_factor"], 1 / 255, rel_tol=1e-3):
        refuse("rescale_factor", raw["rescale_factor"], "1/255, with do_rescale")
    if not raw["do_normalize"]:
        return {"image_mean": (0.0,), "image_std": (1.0,)}
    values = {}
    for name in ("image_mean", "image_std"):
        channels = tuple(raw[name])
        values[name] = channels[:1] if len(set(channels)) == 1 else channels
    return values


def read_config(config_cls: type, folder: Path) -> Any:
    """Read the CLIPConfig of a folder. Raises ValueError for a setting it cannot express."""
    raw = read_json(folder / "config.json")
    try:
        layout.require(raw, {"model_type": "clip", "quantization_config": None})
        raw = flatten(raw)
        values = FIXED | layout.read_fields(raw, FIELDS, config_cls)
        for ours, part in MLP_WIDTHS.items():
            field = f"{part}.intermediate_size"
            values[ours] = read_mlp_width(field, raw[field], raw[f"{part}.hidden_size"])
        field = "text_config.eos_token_id"
        values["end_token"] = read_end_token(field, raw[field])
        return config_cls(**values, **read_processor(folder))
    except MALFORMED as error:
        raise ValueError(f"{folder}: {error}") from error


def write_end_token(config: Any, tokenizer, warn: bool = True) -> int:
    """Return the eos_token_id for config.end_token and the tokenizer that is saved with the model.

    Warns if there is neither, unless warn is False. Raises ValueError for an end token of 2, which
    transformers reads as the highest id.
    """
    if config.end_token == HIGHEST_ID:
        return THEIR_HIGHEST_ID
    if config.end_token == LAST_ID and not tokenizer:
        problem = "without a tokenizer, a text is taken to end at the highest id of its row"
        if warn:  # level 5 is the caller of save_pretrained
            advice = "pass the one the model was trained with"
            warnings.warn(f"{problem}; {advice}", stacklevel=5)
        return THEIR_HIGHEST_ID
    end = tokenizer.eot if config.end_token == LAST_ID else config.end_token
    if end == THEIR_HIGHEST_ID:
        raise ValueError(
            f"end token {end} cannot be written: transformers reads {end} as the highest id of a "
            "row; use a tokenizer whose end token has another id"
        )
    return end


def write_config(config: Any, tokenizer, warn: bool = True) -> dict[str, Any]:
    """Return config.json for a CLIPConfig that transformers can express.

    warn: whether to warn if it does not show where a text ends.
    """
    vision = {"model_type": "clip_vision_model"}
    text = {
        "model_type": "clip_text_model",
        "eos_token_id": write_end_token(config, tokenizer, warn),
        "bos_token_id": tokenizer.bot if tokenizer else None,
        "pad_token_id": tokenizer.eot if tokenizer else None,
    }
    raw = {"architectures": ["CLIPModel"], "model_type": "clip"}
    raw |= {"vision_config": vision, "text_config": text}
    for ours, theirs in FIELDS:
        part, _, field = theirs.rpartition(".")
        target = raw[part] if part else raw
        target[field] = getattr(config, ours)
    for ours, part in MLP_WIDTHS.items():
        mlp_width = getattr(config, ours) or 4 * raw[part]["hidden_size"]
        raw[part]["intermediate_size"] = mlp_width
        raw[part]["projection_dim"] = config.embed_dim  # for programs that load one tower alone
    return raw


def write_processor(config: Any) -> dict[str, Any]:
    """Return preprocessor_config.json: the middle square of a picture, as in our training data."""
    H = config.image_size
    C = config.channels
    mean, std = config.image_mean, config.image_std
    return PROCESSOR_DEFAULTS | {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": C == 3,
        "do_resize": True,
        "size": {"shortest_edge": H},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": H, "width": H},
        "image_mean": list(mean) * (C // len(mean)),  # one number becomes one for each channel
        "image_std": list(std) * (C // len(std)),
    }


# ---- in and out ---------------------------------------------------------------------------------


def their_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return {their name: tensor}, without the memory of negatives, which CLIPModel does not have.

    The patch embedding is a convolution there: (D, C, p, p) instead of (D, C p p).
    """
    config = model.config
    theirs = {
        translate(name, NAMES): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("memory.")
    }
    patch = (config.channels, config.patch_size, config.patch_size)
    theirs[PATCHES] = theirs[PATCHES].unflatten(1, patch)
    return theirs


LUMA = (0.299, 0.587, 0.114)  # the share of red, green and blue in grey (ITU-R BT.601, and Pillow)


def in_rgb(model: nn.Module) -> nn.Module:
    """A CLIP of colour pictures that sees them as a CLIP of grey pictures sees them in grey.

    Its patch embedding W reads W (0.299 R + 0.587 G + 0.114 B). In a grey picture R = G = B, and
    the three shares add up to 1. A CLIP of colour pictures is returned as it is.
    """
    if model.config.channels == 3:
        return model
    colored = type(model)(replace(model.config, channels=3))
    weights = model.state_dict()
    grey = weights["image_tower.stem.project.weight"]  # (D, p p)
    weights["image_tower.stem.project.weight"] = torch.cat([share * grey for share in LUMA], dim=1)
    colored.load_state_dict(weights)
    return colored.train(model.training)


def load(cls: type, config_cls: type, folder: str | Path, dtype=torch.float32) -> nn.Module:
    """Load the CLIP of a folder, in evaluation mode, its weights as dtype on the CPU.

    cls and config_cls: CLIP and CLIPConfig. Raises ValueError if the config cannot be expressed, or
    if the tensors do not fit it.
    """
    folder = Path(folder)
    config = read_config(config_cls, folder)
    tensors = layout.read_tensors(folder)
    model = layout.build_on_meta(cls, config, folder, len(tensors))
    stored = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    layout.check_tensors(folder, stored, their_tensors(model))
    weights = {
        name: stored[translate(name, NAMES)].reshape(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    layout.assign_weights(model, weights, dtype)
    scale = model.logit_scale.double().exp().item()
    model.config = replace(config, max_scale=max(config.max_scale, scale))
    return model


def check_expressible(config: Any) -> None:
    """Raise ValueError, with the options to train with, if CLIPModel does not compute the model."""
    wrong = [
        f"{name} {needed!r}, not {getattr(config, name)!r}"
        for name, needed in FIXED.items()
        if getattr(config, name) != needed
    ]
    if wrong:
        options = " ".join(f"--model.{name} {needed}" for name, needed in FIXED.items())
        raise ValueError(
            f"transformers has no such model; its CLIPModel needs {'; '.join(wrong)}: train with "
            f"{options}"
        )


def save(model: nn.Module, folder: str | Path, tokenizer=None, overwrite: bool = False) -> None:
    """Write a folder for `load`, for transformers and for tools that read its files.

    Raises ValueError if CLIPModel cannot express the model, if the tokenizer has more ids than the
    model, or if the folder holds a model already, unless overwrite.
    """
    config = model.config
    check_expressible(config)
    layout.check_tokenizer(tokenizer, config.vocab_size)
    raw = write_config(config, tokenizer)
    tensors = their_tensors(model)
    tensors["logit_scale"] = tensors["logit_scale"].clamp(max=math.log(config.max_scale))
    others = {PROCESSOR: write_processor(config)}
    rows = {"captions": config.context_length}
    layout.write_folder(Path(folder), raw, tensors, tokenizer, overwrite, others, rows=rows)
