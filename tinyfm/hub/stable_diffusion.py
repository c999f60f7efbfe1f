"""Text-to-image in the layout that diffusers has for Stable Diffusion 1, to and from ours.

The folder has one subfolder for each part:

    text_encoder/  a CLIPTextModel of transformers
    tokenizer/     CLIP's tokenizer
    unet/          a UNet2DConditionModel
    scheduler/     the noise schedule
    vae/           an AutoencoderKL

The file model_index.json lists the class of each part.

Each part is read and written with the tables of its family, in clip.py, scheduler.py and
diffusion.py. This module has the rest: it checks that texts are padded with their end token, and it
decides whether a StableDiffusionPipeline computes what our model does. That pipeline has no learned
null context, no mean of the latents, no flow matching, and no tokenizer but CLIP's. The folder of a
model with any of these has no model_index.json, and diffusers does not read it.

Left out: Stable Diffusion 2, which pads texts with another token, and XL; safety checkers; the
image tower of the CLIP that the text tower was trained with.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyfm.common.files import MALFORMED, read_json, write_json
from tinyfm.hub import clip, diffusion, layout, scheduler, tokenizers

PREFIX = "text_model."  # of the text tower's names in a CLIP; transformers 5 drops it for a tower
FIELDS = [(ours, theirs) for ours, theirs in clip.FIELDS if not theirs.startswith("vision_config.")]
END = "<|endoftext|>"  # CLIP's end token
INDEX = {
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
ABSENT = ("safety_checker", "feature_extractor", "image_encoder")  # parts that we never write


class Parts(NamedTuple):
    """The classes of the parts, handed in by the lesson that is made of them."""

    autoencoder: type  # Autoencoder
    diffusion: type  # Diffusion
    clip_config: type  # CLIPConfig
    load_tokenizer: Callable[[Path], Any]


# ---- the text tower -----------------------------------------------------------------------------


def read_text_config(config_cls: type, folder: Path) -> Any:
    """Read a CLIPConfig with the text tower of a folder.

    Raises ValueError for a setting that CLIPConfig cannot express.
    """
    raw = read_json(folder / "config.json")
    try:
        layout.require(raw, {"model_type": "clip_text_model", "quantization_config": None})
        flat = clip.flatten(raw | {"text_config": raw})
        values = clip.FIXED | layout.read_fields(flat, FIELDS, config_cls)
        mlp_width = flat["text_config.intermediate_size"]
        width = flat["text_config.hidden_size"]
        values["text_ff"] = clip.read_mlp_width("intermediate_size", mlp_width, width)
        end = clip.read_end_token("eos_token_id", flat["text_config.eos_token_id"])
        return config_cls(**values, end_token=end)
    except MALFORMED as error:
        raise ValueError(f"{folder}: {error}") from error


def tower_tensors(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Return {their name in a whole CLIP: (our name, tensor)} of the text tower."""
    tensors = {}
    for name, parameter in model.text_tower.named_parameters():
        name = f"text_tower.{name}"
        tensors[layout.translate(name, clip.NAMES)] = (name, parameter)
    return tensors


def load_tower(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Give a TextToImage the text tower of a folder. Raises ValueError if it does not fit."""
    stored = {}
    for name, tensor in layout.read_tensors(folder).items():
        if not name.endswith(clip.BUFFERS):
            stored[PREFIX + name.removeprefix(PREFIX)] = tensor
    tower = tower_tensors(model)
    layout.check_tensors(folder, stored, {name: tensor for name, (_, tensor) in tower.items()})
    weights = {ours: stored[name] for name, (ours, _) in tower.items()}
    layout.assign_weights(model, weights, dtype)


def check_padding(folder: Path, length: int) -> None:
    """Check that a tokenizer pads texts with their end token, to the tower's length.

    Raises ValueError otherwise. A setting that the files do not have is taken to be right.
    """
    names = ("tokenizer_config.json", "special_tokens_map.json")
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    for name in files:
        path = folder / name
        raw = tokenizers.read_object(files, name)
        pad = tokenizers.token_name(raw.get("pad_token"))
        end = tokenizers.token_name(raw.get("eos_token", END))
        if pad not in (None, end):
            raise ValueError(f"{path}: pad_token is {pad!r}; supported: {end!r}, the end token")
        limit = raw.get("model_max_length", length)
        if limit != length:
            raise ValueError(
                f"{path}: model_max_length is {limit}, but the text tower reads {length} tokens; "
                f"set it to {length}"
            )


# ---- in and out ---------------------------------------------------------------------------------


def load(
    cls: type, config_cls: type, parts: Parts, folder: str | Path, dtype=torch.float32
) -> nn.Module:
    """Load the TextToImage of a folder, in evaluation mode, on the CPU, with its tokenizer if any.

    cls and config_cls: TextToImage and TextToImageConfig. Raises ValueError for settings that ours
    cannot express, for weights that do not fit, and for parts that do not fit together.
    """
    folder = Path(folder)
    autoencoder = parts.autoencoder.from_pretrained(folder / "vae", dtype)
    denoiser = parts.diffusion.from_pretrained(folder, dtype)
    clip_config = read_text_config(parts.clip_config, folder / "text_encoder")
    # A published autoencoder may name the size that it was trained at; the U-Net's size counts.
    size = denoiser.config.image_size * autoencoder.config.factor
    autoencoder.config = replace(autoencoder.config, image_size=size)
    config = config_cls(denoiser.config, autoencoder.config, clip_config)

    n_tensors = sum(map(len, (denoiser.state_dict(), autoencoder.state_dict())))
    n_tensors += len(layout.read_tensors(folder / "text_encoder"))
    model = layout.build_on_meta(cls, config, folder, n_tensors)
    model.autoencoder = autoencoder.requires_grad_(False)
    model.diffusion = denoiser
    load_tower(model, folder / "text_encoder", dtype)
    if (folder / "tokenizer").is_dir():
        check_padding(folder / "tokenizer", clip_config.context_length)
        model.tokenizer = parts.load_tokenizer(folder / "tokenizer")
        layout.check_tokenizer(model.tokenizer, clip_config.vocab_size)
    return model


def beyond_stable_diffusion(model: nn.Module, tokenizer: Any) -> list[str]:
    """What the model has that a StableDiffusionPipeline does not compute; empty if it does all."""
    config = model.config.diffusion
    found = []
    if config.prediction == "flow":
        found.append("flow matching")
    if config.learned_null:
        found.append("a learned empty text")
    if model.autoencoder.latent_mean.item() != 0:
        found.append("a mean of the latents")
    if tokenizer is None or tokenizer.bot is None:  # only CLIP's has a start token
        found.append("a tokenizer that is not CLIP's")
    return found


def save(model: nn.Module, folder: str | Path, tokenizer=None, overwrite: bool = False) -> None:
    """Write a folder for `load`, and for diffusers if its pipeline computes the same.

    tokenizer: the model's by default. Raises ValueError if diffusers or transformers cannot
    express a part, if the tokenizer has more ids than the text tower, or if the folder holds a
    model already, unless overwrite.
    """
    folder = Path(folder)
    config = model.config
    tokenizer = tokenizer or model.tokenizer

    # Whatever may be refused comes before the first file is written.
    layout.check_tokenizer(tokenizer, config.clip.vocab_size)
    raw = clip.write_config(config.clip, tokenizer)["text_config"]
    raw |= {"architectures": ["CLIPTextModel"]}
    diffusion.write_unet(config.diffusion)
    diffusion.write_autoencoder(model.autoencoder)
    for part in (folder, *(folder / name for name in ("vae", "unet", "text_encoder"))):
        layout.check_overwrite(part, overwrite)

    diffusion.save_autoencoder(model.autoencoder, folder / "vae", overwrite)
    scheduler.save(model.diffusion, folder, overwrite)
    tensors = {name: tensor for name, (_, tensor) in tower_tensors(model).items()}
    layout.write_folder(folder / "text_encoder", raw, tensors, None, overwrite)

    # The model that is overwritten may have had a tokenizer and an index.
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    (folder / "model_index.json").unlink(missing_ok=True)
    if tokenizer:
        tokenizer.save_pretrained(folder / "tokenizer", captions=config.clip.context_length)
    if not beyond_stable_diffusion(model, tokenizer):
        kind = scheduler.write_scheduler(config.diffusion)["_class_name"]
        index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
        index |= INDEX | {"scheduler": ["diffusers", kind]}
        index |= {name: [None, None] for name in ABSENT}
        write_json(folder / "model_index.json", index)
