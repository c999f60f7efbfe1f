"""Text-to-image as diffusers keeps Stable Diffusion 1: a folder of folders, in and out.

    text_encoder/  a CLIPTextModel of transformers   tokenizer/  CLIP's
    unet/          a UNet2DConditionModel            scheduler/  how noise grows
    vae/           an AutoencoderKL                  model_index.json  which class is where

Each part is read and written by the tables of its own family: hub_clip.py, hub_pipeline.py,
hub_diffusion.py. Here is what no part sees alone: that texts are padded with their end token; and
whether a StableDiffusionPipeline does all that a model of ours does. It knows no learned null
context, no mean of the latents, no flow, and no tokenizer but CLIP's. A folder of such a model has
no model_index.json, and only we read it.

Left out: Stable Diffusion 2, whose texts are padded with another token, and XL; safety checkers;
the image tower of the CLIP that the text tower was trained with.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfm.autoencoder import Autoencoder
from tinyfm.clip import CLIPConfig
from tinyfm.clip_tokenizer import ClipTokenizer
from tinyfm.common.files import MALFORMED, read_json, write_json
from tinyfm.ddpm import Diffusion
from tinyfm.hub import clip as hub_clip
from tinyfm.hub import diffusion as hub_diffusion
from tinyfm.hub import layout
from tinyfm.hub import scheduler as hub_pipeline
from tinyfm.tokenizer import EOT
from tinyfm.tokenizer import load as load_tokenizer

INSIDE = "text_model."  # the text tower's place in a CLIP; transformers 5 leaves it out of a tower
FIELDS = [pair for pair in hub_clip.FIELDS if not pair[1].startswith("vision_config.")]
PARTS = {
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
ABSENT = ("safety_checker", "feature_extractor", "image_encoder")


# ---- the text tower -----------------------------------------------------------------------------


def read_text_config(folder: Path) -> CLIPConfig:
    """A CLIPConfig with a folder's text tower. Raises ValueError for what it cannot express."""
    raw = read_json(folder / "config.json")
    try:
        for field, value in (("model_type", "clip_text_model"), ("quantization_config", None)):
            if raw.get(field) != value:
                layout.refuse(field, raw.get(field), repr(value))
        flat = hub_clip.flatten(raw | {"text_config": raw})
        values = hub_clip.FIXED | layout.take(flat, FIELDS, CLIPConfig)
        inside, width = flat["text_config.intermediate_size"], flat["text_config.hidden_size"]
        if inside != 4 * width:
            layout.refuse("intermediate_size", inside, f"{4 * width}, 4 times the width")
        end = flat["text_config.eos_token_id"]
        if type(end) is not int or end < 0:
            layout.refuse("eos_token_id", end, "one id")
        end = hub_clip.HIGHEST if end == hub_clip.HIGHEST_THERE else end
        return CLIPConfig(**values, end_token=end)
    except MALFORMED as error:
        raise ValueError(f"{folder}: {error}") from error


def tower_tensors(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Their name in a CLIP -> ours, and the tensor."""
    named = ((f"text_tower.{name}", p) for name, p in model.text_tower.named_parameters())
    return {layout.translate(name, hub_clip.NAMES): (name, p) for name, p in named}


def fill_tower(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    stored = {
        INSIDE + name.removeprefix(INSIDE): t for name, t in layout.read_tensors(folder).items()
    }
    stored = {name: t for name, t in stored.items() if not name.endswith(hub_clip.EXTRAS)}
    tower = tower_tensors(model)
    layout.check_tensors(folder, stored, {name: p for name, (_, p) in tower.items()})
    layout.fill(model, {ours: stored[name] for name, (ours, _) in tower.items()}, dtype)


def check_padding(folder: Path, length: int) -> None:
    """Raise ValueError unless texts are filled up with their end token, to the tower's length."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        raw = read_json(folder / name) if (folder / name).is_file() else {}
        pad, end = raw.get("pad_token"), raw.get("eos_token", EOT)
        pad, end = (t["content"] if isinstance(t, dict) else t for t in (pad, end))
        if pad not in (None, end):
            raise ValueError(f"{folder / name}: pad_token is {pad!r}; supported: {end!r}, the end")
        if (limit := raw.get("model_max_length", length)) != length:
            problem = f"model_max_length is {limit}, but the text tower reads {length}"
            raise ValueError(f"{folder / name}: {problem} tokens; set it to {length}")


# ---- in and out ---------------------------------------------------------------------------------


def load(cls: type, config_cls: type, folder: str | Path, dtype=torch.float32) -> nn.Module:
    """The TextToImage in a folder, in evaluation mode, on the CPU, with its tokenizer if there.

    Raises ValueError for what ours cannot express, for weights that do not fit, and for parts that
    do not fit together.
    """
    folder = Path(folder)
    autoencoder = Autoencoder.from_pretrained(folder / "vae", dtype)
    diffusion = Diffusion.from_pretrained(folder, dtype)
    clip = read_text_config(folder / "text_encoder")
    # A published autoencoder may name the size that it was trained at, another than the U-Net's.
    size = diffusion.config.image_size * autoencoder.config.factor
    autoencoder.config = replace(autoencoder.config, image_size=size)
    config = config_cls(diffusion.config, autoencoder.config, clip)
    with torch.device("meta"):
        model = cls(config)
    model.autoencoder, model.diffusion = autoencoder.requires_grad_(False), diffusion
    fill_tower(model, folder / "text_encoder", dtype)
    if (folder / "tokenizer").is_dir():
        check_padding(folder / "tokenizer", clip.context_length)
        model.tokenizer = load_tokenizer(folder / "tokenizer")
        layout.check_tokenizer(model.tokenizer, clip.vocab_size)
    return model


def write_index(model: nn.Module, tokenizer: Any, scheduler: str) -> dict[str, Any] | None:
    """model_index.json; None if a StableDiffusionPipeline is not what the model is."""
    c = model.config.diffusion
    own = c.learned_null or c.prediction == "flow" or model.autoencoder.latent_mean.item()
    if own or not isinstance(tokenizer, ClipTokenizer):
        return None
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    index |= PARTS | {"scheduler": ["diffusers", scheduler]}
    return index | {name: [None, None] for name in ABSENT}


def save(model: nn.Module, folder: str | Path, tokenizer=None, overwrite: bool = False) -> None:
    """Write a folder for `load`, and for diffusers if its pipeline can do the same.

    Raises ValueError for what diffusers' parts cannot express, or for a folder with a model.
    """
    folder, c, tokenizer = Path(folder), model.config, tokenizer or model.tokenizer
    layout.check_tokenizer(tokenizer, c.clip.vocab_size)
    raw = hub_clip.write_config(c.clip, tokenizer)["text_config"]
    raw |= {"architectures": ["CLIPTextModel"]}
    hub_diffusion.write_unet(c.diffusion)  # raises what it has to before anything is written
    hub_diffusion.save_autoencoder(model.autoencoder, folder / "vae", overwrite)
    hub_pipeline.save(model.diffusion, folder, overwrite)
    tensors = {name: p for name, (_, p) in tower_tensors(model).items()}
    layout.publish(folder / "text_encoder", raw, tensors, None, overwrite)
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)  # of a model overwritten, as the index
    (folder / "model_index.json").unlink(missing_ok=True)
    if tokenizer:
        tokenizer.save_pretrained(folder / "tokenizer")
        path = folder / "tokenizer" / "tokenizer_config.json"
        write_json(path, read_json(path) | {"model_max_length": c.clip.context_length})
    scheduler = hub_pipeline.write_scheduler(c.diffusion)["_class_name"]
    if index := write_index(model, tokenizer, scheduler):
        write_json(folder / "model_index.json", index)
