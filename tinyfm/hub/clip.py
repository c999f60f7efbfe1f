"""CLIP as transformers writes down its CLIPModel, to and from ours.

The tables are the content: CLIP_NAMES and BLOCK_NAMES, what a module is called there; CLIP_FIELDS,
where a setting stands in config.json. Three things show in no tensor:

1. Pixels. Published models read (pixel - mean) / std with a mean and deviation of their own, which
   stand in the image processor's file. Ours takes images in [-1, 1] and goes on from there, as
   config.image_mean and image_std say, so that no weight is changed. A folder without that file is
   taken to read images in [-1, 1], which is a mean and deviation of 0.5.
2. The end of a text, where the text tower is read: at the first eos_token_id. An id of 2, a slip in
   CLIP's first files, stands for the highest id of a row.
3. The scale. We clamp it, transformers does not: max_scale makes room for what is read, and what
   is written is clamped.

Left out: what matters in training only, folders of one tower, MLPs not 4 times as wide as it.
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
from tinyfm.hub.layout import pairs, refuse, translate

# ---- tables -------------------------------------------------------------------------------------

CLIP_NAMES = """
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
BLOCK_NAMES = """
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
EXTRAS = ".embeddings.position_ids"  # stored, yet not learned


def all_names() -> dict[str, str]:
    """Our modules -> theirs, those of the blocks included."""
    names = {}
    for ours, theirs in pairs(CLIP_NAMES, 1):
        inside = pairs(BLOCK_NAMES, 1) if "*" in ours else []
        names |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in inside} or {ours: theirs}
    return names


NAMES = all_names()

# ours          theirs                                what they take where nothing is said
CLIP_FIELDS = """
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
FIELDS = pairs(CLIP_FIELDS, 1)
DEFAULTS = [json.loads(value) for _, value in pairs(CLIP_FIELDS, 2)]
SILENT = {theirs: value for (_, theirs), value in zip(FIELDS, DEFAULTS)}
SILENT |= {"vision_config.intermediate_size": 3072, "text_config.intermediate_size": 2048,
           "text_config.eos_token_id": 49407}  # fmt: skip
PARTS = ("vision_config", "text_config")
FIXED = {"stem": "patch", "loss": "infonce"}  # ours, which a CLIPModel does not leave open

PROCESSOR = "preprocessor_config.json"
SILENT_PROCESSOR = {
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
LAST, HIGHEST, HIGHEST_THERE = -1, -2, 2  # of our end_token; of their eos_token_id


# ---- config.json and preprocessor_config.json ---------------------------------------------------


def flatten(raw: dict) -> dict[str, Any]:
    """config.json with the settings of its two parts as "text_config.vocab_size" and so on."""
    flat = SILENT | raw
    for part in PARTS:
        fields = raw.get(f"{part}_dict")  # in older files; where it is, the other does not count
        fields = raw.get(part) if fields is None else fields
        flat |= {f"{part}.{name}": value for name, value in (fields or {}).items()}
    return flat


def read_processor(folder: Path) -> dict[str, tuple[float, ...]]:
    """Our image_mean and image_std as the image processor of a folder has them, if it has one."""
    paths = (folder / "processor_config.json", folder / PROCESSOR)  # transformers 5; and 4
    newer, older = (read_json(path) if path.is_file() else {} for path in paths)
    if not (raw := newer.get("image_processor", older)):
        return {}
    raw = SILENT_PROCESSOR | raw
    if not raw["do_rescale"] or not math.isclose(raw["rescale_factor"], 1 / 255, rel_tol=1e-3):
        refuse("rescale_factor", raw["rescale_factor"], "1/255, with do_rescale")
    if not raw["do_normalize"]:
        return {"image_mean": (0.0,), "image_std": (1.0,)}
    values = {name: tuple(raw[name]) for name in ("image_mean", "image_std")}
    return {name: v[:1] if len(set(v)) == 1 else v for name, v in values.items()}


def read_config(config_cls: type, folder: Path) -> Any:
    """The CLIPConfig of a folder. Raises ValueError for what it cannot express."""
    raw = read_json(folder / "config.json")
    try:
        for field, value in (("model_type", "clip"), ("quantization_config", None)):
            if raw.get(field) != value:
                refuse(field, raw.get(field), repr(value))
        raw = flatten(raw)
        values = FIXED | layout.take(raw, FIELDS, config_cls)
        for part in PARTS:
            inside, width = raw[f"{part}.intermediate_size"], raw[f"{part}.hidden_size"]
            if inside != 4 * width:
                refuse(f"{part}.intermediate_size", inside, f"{4 * width}, 4 times the width")
        end = raw["text_config.eos_token_id"]
        if type(end) is not int or end < 0:
            refuse("text_config.eos_token_id", end, "one id")
        values["end_token"] = HIGHEST if end == HIGHEST_THERE else end
        return config_cls(**values, **read_processor(folder))
    except MALFORMED as error:
        raise ValueError(f"{folder}: {error}") from error


def find_end(config: Any, tokenizer) -> int:
    """The eos_token_id that stands for config.end_token and the tokenizer a model is saved with."""
    if config.end_token == HIGHEST:
        return HIGHEST_THERE
    if config.end_token == LAST and not tokenizer:
        problem = "without a tokenizer, a text is taken to end at the highest id of its row"
        warnings.warn(f"{problem}; pass the one the model was trained with", stacklevel=5)
        return HIGHEST_THERE
    end = tokenizer.eot if config.end_token == LAST else config.end_token
    if end == HIGHEST_THERE:
        raise ValueError(f"end token {end} cannot be written: transformers reads {end} otherwise")
    return end


def write_config(config: Any, tokenizer) -> dict[str, Any]:
    """config.json of a CLIPConfig that transformers can express."""
    raw = {"architectures": ["CLIPModel"], "model_type": "clip"}
    raw["vision_config"] = {"model_type": "clip_vision_model"}
    raw["text_config"] = {
        "model_type": "clip_text_model",
        "eos_token_id": find_end(config, tokenizer),
        "bos_token_id": tokenizer and tokenizer.bot,
        "pad_token_id": tokenizer and tokenizer.eot,
    }
    for ours, theirs in FIELDS:
        part, _, field = theirs.rpartition(".")
        (raw[part] if part else raw)[field] = getattr(config, ours)
    for part in PARTS:
        raw[part]["intermediate_size"] = 4 * raw[part]["hidden_size"]
        raw[part]["projection_dim"] = config.embed_dim  # for who loads a tower by itself
    return raw


def write_processor(config: Any) -> dict[str, Any]:
    """preprocessor_config.json: the middle square of a picture, as pairs are read in training."""
    H, mean, std = config.image_size, config.image_mean, config.image_std
    return SILENT_PROCESSOR | {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": config.channels == 3,
        "do_resize": True, "size": {"shortest_edge": H}, "resample": 3,  # bicubic
        "do_center_crop": True, "crop_size": {"height": H, "width": H},
        "image_mean": list(mean) * (config.channels // len(mean)),
        "image_std": list(std) * (config.channels // len(std)),
    }  # fmt: skip


# ---- in and out ---------------------------------------------------------------------------------


def their_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors by their names, but a memory; the patch embedding is a convolution there."""
    own, c = model.state_dict().items(), model.config
    theirs = {translate(n, NAMES): tensor for n, tensor in own if not n.startswith("memory.")}
    theirs[PATCHES] = theirs[PATCHES].unflatten(1, (c.channels, c.patch_size, c.patch_size))
    return theirs


def load(cls: type, config_cls: type, folder: str | Path, dtype=torch.float32) -> nn.Module:
    """The CLIP in a folder, in evaluation mode, its weights as dtype on the CPU.

    Raises ValueError where the config cannot be expressed, or the tensors do not fit it.
    """
    folder = Path(folder)
    config = read_config(config_cls, folder)
    with torch.device("meta"):  # shapes only: the weights take memory once, when they are read
        model = cls(config)
    stored = {n: t for n, t in layout.read_tensors(folder).items() if not n.endswith(EXTRAS)}
    layout.check_tensors(folder, stored, their_tensors(model))
    own = model.state_dict().items()
    layout.fill(model, {n: stored[translate(n, NAMES)].reshape(t.shape) for n, t in own}, dtype)
    largest = max(config.max_scale, model.logit_scale.double().exp().item())
    model.config = replace(config, max_scale=largest)
    return model


def save(model: nn.Module, folder: str | Path, tokenizer=None, overwrite: bool = False) -> None:
    """Write a folder for `load`, transformers and the tools that read its files.

    Raises ValueError if CLIPModel cannot express the model, and as hub.publish does.
    """
    config = model.config
    has = {name: getattr(config, name) for name in FIXED}
    if wrong := [f"{n} {FIXED[n]!r}, not {has[n]!r}" for n in FIXED if FIXED[n] != has[n]]:
        raise ValueError(f"transformers has no such model; its CLIPModel needs {'; '.join(wrong)}")
    layout.check_tokenizer(tokenizer, config.vocab_size)
    raw, tensors = write_config(config, tokenizer), their_tensors(model)
    tensors["logit_scale"] = tensors["logit_scale"].clamp(max=math.log(config.max_scale))
    others = {PROCESSOR: write_processor(config)}
    layout.publish(Path(folder), raw, tensors, tokenizer, overwrite, others)
