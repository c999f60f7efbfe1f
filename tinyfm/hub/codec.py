"""Codecs in the layout of transformers' EncodecModel, to and from our Codec.

Their encoder and decoder are lists of layers in our order. A convolution is called `conv`, and its
gain and direction `parametrizations.weight.original0` and `original1`; before 2024 files called
them `weight_g` and `weight_v`. Their codebooks are not parameters but buffers, beside the averages
that they followed in training, which are not read.

Left out: the model for 48 kHz, which reads a sound in pieces that overlap.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfm.common.files import MALFORMED, read_json
from tinyfm.hub import layout
from tinyfm.hub.layout import name_pairs, refuse

TITLE = "EncodecModel"
FIELDS = """
rate               sampling_rate
in_channels        audio_channels
width              num_filters
ratios             upsampling_ratios
n_block            num_residual_layers
kernel_size        kernel_size
last_kernel_size   last_kernel_size
block_kernel_size  residual_kernel_size
dilation_growth    dilation_growth_rate
compress           compress
block_shortcut     use_conv_shortcut
n_lstm             num_lstm_layers
causal             use_causal_conv
latent_channels    hidden_size
n_code             codebook_size
"""
DEFAULTS = {  # of transformers, for absent fields
    "sampling_rate": 24_000, "audio_channels": 1, "num_filters": 32, "num_residual_layers": 1,
    "upsampling_ratios": (8, 5, 4, 2), "kernel_size": 7, "last_kernel_size": 7,
    "residual_kernel_size": 3, "dilation_growth_rate": 2, "compress": 2,
    "use_conv_shortcut": True, "num_lstm_layers": 2, "use_causal_conv": True, "hidden_size": 128,
    "codebook_size": 1024, "target_bandwidths": (1.5, 3.0, 6.0, 12.0, 24.0),
}  # fmt: skip
# Their fields -> the value that our model computes, also the one for absent fields.
REQUIRED = {
    "norm_type": "weight_norm",
    "pad_mode": "reflect",
    "trim_right_ratio": 1.0,
    "normalize": False,
    "chunk_length_s": None,
}


# ---- config.json --------------------------------------------------------------------------------


def book_rate(config: Any) -> int:
    """Bits a second of one codebook, as transformers counts them: of whole frames, rounded up."""
    return math.ceil(config.rate / config.hop) * math.ceil(math.log2(config.n_code))


def bandwidth(config: Any) -> float:
    """Thousand bits a second of all codebooks.

    transformers divides it by `book_rate` again and rounds down, so rounding must not lower it.
    """
    value = config.n_book * book_rate(config) / 1000
    if 1000 * value < config.n_book * book_rate(config):
        value = math.nextafter(value, math.inf)
    return value


def read_config(config_cls: type, folder: Path) -> Any:
    """Read config.json: the CodecConfig. Raises ValueError for what it cannot express."""
    raw = read_json(folder / "config.json")
    try:
        model_type = raw.get("model_type") if isinstance(raw, dict) else None
        if model_type != "encodec":
            refuse("model_type", model_type, "encodec")
        if raw.get("chunk_length_s") is not None:
            whole = "null: sounds are read as a whole, as by the models for 24 and 32 kHz"
            refuse("chunk_length_s", raw["chunk_length_s"], whole)
        for field, value in REQUIRED.items():
            if raw.get(field, value) != value:
                refuse(field, raw[field], repr(value))
        raw = DEFAULTS | raw
        if raw.get("codebook_dim") not in (None, raw["hidden_size"]):
            refuse("codebook_dim", raw["codebook_dim"], f"hidden_size, {raw['hidden_size']}")
        raw["upsampling_ratios"] = tuple(raw["upsampling_ratios"])
        one = config_cls(**layout.read_fields(raw, name_pairs(FIELDS, 1), config_cls), n_book=1)
        n_book = int(1000 * raw["target_bandwidths"][-1] // book_rate(one))
        return replace(one, n_book=n_book)
    except MALFORMED as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def write_config(config: Any) -> dict[str, Any]:
    """Return config.json for a CodecConfig. Raises ValueError if n_code is no power of 2."""
    if config.n_code & (config.n_code - 1):
        raise ValueError(
            f"n_code is {config.n_code}; {TITLE} takes powers of 2 alone: train a "
            f"codec with n_code {1 << config.n_code.bit_length()}"
        )
    raw: dict[str, Any] = {"architectures": [TITLE], "model_type": "encodec"} | REQUIRED
    for ours, theirs in name_pairs(FIELDS, 1):
        raw[theirs] = getattr(config, ours)
    return raw | {
        "codebook_dim": config.latent_channels,
        "overlap": None,
        "target_bandwidths": [bandwidth(config)],
    }


# ---- tensors ------------------------------------------------------------------------------------

PARTS = {  # of a convolution
    "gain": "conv.parametrizations.weight.original0",
    "direction": "conv.parametrizations.weight.original1",
    "bias": "conv.bias",
}
UNREAD = re.compile(r"quantizer\.layers\.\d+\.codebook\.(inited|cluster_size|embed_avg)")
PLACES = {"conv1": "block.1", "conv2": "block.3", "shortcut": "shortcut"}  # in a residual block


def their_name(name: str) -> str:
    """Their name for the tensor that we call `name`."""
    if name.startswith("quantizer."):
        return name.replace("codebooks", "layers").replace(".weight", ".codebook.embed")
    network, layer, *inner, part = name.split(".")
    if inner == ["lstm"]:
        return f"{network}.layers.{layer}.lstm.{part}"
    places = [PLACES[place] for place in inner]
    return ".".join([network, "layers", layer, *places, PARTS[part]])


def to_theirs(name: str, tensor: Tensor) -> Tensor:
    """A tensor of ours in their layout: a gain has the dimensions of its weights there."""
    return tensor[:, None, None] if name.endswith(".gain") else tensor


def new_name(name: str) -> str:
    """Return today's name of a tensor in an old file."""
    name = re.sub(r"\.weight_g$", ".parametrizations.weight.original0", name)
    return re.sub(r"\.weight_v$", ".parametrizations.weight.original1", name)


def book_buffers(embed: str, codebook: Tensor) -> dict[str, Tensor]:
    """What stands beside a codebook: averages at which it is in balance."""
    prefix = embed.removesuffix("embed")
    return {
        f"{prefix}inited": torch.ones(1),
        f"{prefix}cluster_size": torch.ones(len(codebook)),
        f"{prefix}embed_avg": codebook.detach().clone(),
    }


# ---- in and out ---------------------------------------------------------------------------------


def load(cls: type, config_cls: type, folder: str | Path, dtype=torch.float32) -> nn.Module:
    """Load the codec of a folder, in evaluation mode, its weights as dtype on the CPU.

    cls and config_cls: Codec and CodecConfig. Raises ValueError if the config cannot be expressed,
    or if the tensors do not fit it.
    """
    folder = Path(folder)
    config = read_config(config_cls, folder)
    stored = {new_name(name): tensor for name, tensor in layout.read_tensors(folder).items()}
    model = layout.build_on_meta(cls, config, folder, len(stored))
    own = dict(model.named_parameters())
    names = {name: their_name(name) for name in own}
    stored = {name: tensor for name, tensor in stored.items() if not UNREAD.fullmatch(name)}
    expected = {names[name]: to_theirs(name, tensor) for name, tensor in own.items()}
    layout.check_tensors(folder, stored, expected)
    weights = {name: stored[names[name]].view_as(tensor) for name, tensor in own.items()}
    layout.assign_weights(model, weights, dtype)
    return model


def save(model: nn.Module, folder: str | Path, overwrite: bool = False) -> None:
    """Write a folder for `load` and for transformers.

    Raises ValueError as write_config does, or if the folder holds a model already, unless
    overwrite.
    """
    raw = write_config(model.config)
    own = dict(model.named_parameters())
    tensors = {their_name(name): to_theirs(name, tensor) for name, tensor in own.items()}
    for name in [name for name in tensors if name.endswith(".embed")]:
        tensors |= book_buffers(name, tensors[name])
    layout.write_folder(Path(folder), raw, tensors, overwrite=overwrite)
