"""XLNet in the layout of transformers, to and from our XLNet.

Their matrices of attention have the shape (D, N, K): from D channels to K of each of N heads. Ours
are matrices (N K, D) of a linear layer, or (D, N K) for the output. Their model always has the two
vectors for segments. A model without them is written with vectors of 0, which add nothing.

Left out: settings that matter in training only, except the dropout; the head of a classifier.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfm.common.files import MALFORMED, read_json
from tinyfm.hub import layout
from tinyfm.hub.layout import name_pairs, refuse, translate

TITLE = "XLNetLMHeadModel"
NAMES = """
token_embedding                       transformer.word_embedding
query_start                           transformer.mask_emb
blocks.*.attention.q                  transformer.layer.*.rel_attn.q
blocks.*.attention.k                  transformer.layer.*.rel_attn.k
blocks.*.attention.v                  transformer.layer.*.rel_attn.v
blocks.*.attention.r                  transformer.layer.*.rel_attn.r
blocks.*.attention.out                transformer.layer.*.rel_attn.o
blocks.*.attention.content_bias       transformer.layer.*.rel_attn.r_w_bias
blocks.*.attention.position_bias      transformer.layer.*.rel_attn.r_r_bias
blocks.*.attention.segment_bias       transformer.layer.*.rel_attn.r_s_bias
blocks.*.attention.segment_embedding  transformer.layer.*.rel_attn.seg_embed
blocks.*.norm1                        transformer.layer.*.rel_attn.layer_norm
blocks.*.up                           transformer.layer.*.ff.layer_1
blocks.*.down                         transformer.layer.*.ff.layer_2
blocks.*.norm2                        transformer.layer.*.ff.layer_norm
head                                  lm_loss
"""
FIELDS = """
vocab_size  vocab_size
n_layer     n_layer
n_head      n_head
d_model     d_model
d_ff        d_inner
norm_eps    layer_norm_eps
dropout     dropout
"""
DEFAULTS = {"layer_norm_eps": 1e-12, "dropout": 0.1}  # of transformers, for absent fields
# Their fields -> values that our model computes; the first is written.
ALLOWED = {
    "attn_type": ("bi",),
    "ff_activation": ("gelu",),
    "clamp_len": (-1, 0),
    "same_length": (False,),
    "bi_data": (False,),
    "untie_r": (True,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
}
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What other classes with recurrent or permuted attention compute that XLNet does not.
NEAR = {
    "transfo-xl": "Transformer-XL reads from left to right, with an adaptive softmax",
    "mpnet": "MPNet is permuted too, but has one stream with the masks of BERT",
}


# ---- config.json --------------------------------------------------------------------------------


def read_config(config_cls: type, folder: Path) -> Any:
    """Read config.json: the XLNetConfig.

    XLNet has no longest text. The context is the field context_length, which only we write, or the
    512 tokens of the paper. Raises ValueError for a setting that XLNetConfig cannot express.
    """
    raw = read_json(folder / "config.json")
    try:
        model_type = raw.get("model_type") if isinstance(raw, dict) else None
        if model_type != "xlnet":
            supported = "xlnet"
            if model_type in NEAR:
                supported += f" ({NEAR[model_type]})"
            refuse("model_type", model_type, supported)
        titles = raw.get("architectures") or [TITLE]
        if titles != [TITLE]:
            refuse("architectures", titles, TITLE)
        for field, values in ALLOWED.items():
            if raw.get(field, values[0]) not in values:
                refuse(field, raw[field], " or ".join(map(repr, values)))
        raw = DEFAULTS | raw
        values = layout.read_fields(raw, name_pairs(FIELDS, 1), config_cls)
        width = raw.get("d_head") or values["d_model"] // max(1, values["n_head"])
        if width * values["n_head"] != values["d_model"]:
            refuse(
                "d_head", width, f"d_model / n_head, of {values['d_model']} and {values['n_head']}"
            )
        length = raw.get("context_length", 512)
        if type(length) is not int:
            refuse("context_length", length, "a whole number")
        return config_cls(**values, context_length=length, segments=True)
    except MALFORMED as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def write_config(config: Any) -> dict[str, Any]:
    """Return config.json for an XLNetConfig."""
    raw: dict[str, Any] = {"architectures": [TITLE], "model_type": "xlnet"}
    for ours, theirs in name_pairs(FIELDS, 1):
        raw[theirs] = getattr(config, ours)
    raw |= {field: values[0] for field, values in ALLOWED.items() if values[0] is not None}
    raw |= {"d_inner": config.F, "d_head": config.K, "context_length": config.context_length}
    return raw | {"mem_len": None}  # with use_mems, all states are kept


# ---- tensors ------------------------------------------------------------------------------------


def their_name(name: str) -> str:
    """Their name for the tensor that we call `name`."""
    table = dict(name_pairs(NAMES, 1))
    if ".attention." not in name:
        return translate(name, table)
    # These are parameters there, not layers: rel_attn.q, and not rel_attn.q.weight.
    return translate(name.removesuffix(".weight") + ".weight", table).removesuffix(".weight")


def is_matrix(name: str) -> bool:
    """Whether a tensor of ours is a matrix of attention."""
    return ".attention." in name and name.endswith(".weight")


def to_theirs(name: str, tensor: Tensor, config: Any) -> Tensor:
    """A tensor of ours in their layout."""
    if name == "query_start":
        return tensor[None, None]
    if not is_matrix(name):
        return tensor
    by_width = tensor if name.endswith(".out.weight") else tensor.T  # (D, N K)
    return by_width.unflatten(1, (config.n_head, config.K))


def from_theirs(name: str, tensor: Tensor) -> Tensor:
    """The inverse of to_theirs."""
    if name == "query_start":
        return tensor.flatten()
    if not is_matrix(name):
        return tensor
    by_width = tensor.flatten(1)
    return by_width if name.endswith(".out.weight") else by_width.T


def their_tensors(model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return {our name: their name} and {their name: tensor, in their layout}.

    A tied head is left out: the embedding is stored once.
    """
    own = model.state_dict()
    del own["head.weight"]
    names = {name: their_name(name) for name in own}
    return names, {names[name]: to_theirs(name, own[name], model.config) for name in own}


def no_segments(config: Any) -> dict[str, Tensor]:
    """The vectors for segments that a model without them has there: 0."""
    N, K = config.n_head, config.K
    tensors = {}
    for i in range(config.n_layer):
        prefix = f"transformer.layer.{i}.rel_attn"
        tensors[f"{prefix}.seg_embed"] = torch.zeros(2, N, K)
        tensors[f"{prefix}.r_s_bias"] = torch.zeros(N, K)
    return tensors


# ---- in and out ---------------------------------------------------------------------------------


def load(cls: type, config_cls: type, folder: str | Path, dtype=torch.float32) -> nn.Module:
    """Load the XLNet of a folder, in evaluation mode, its weights as dtype on the CPU.

    cls and config_cls: XLNet and XLNetConfig. Raises ValueError if the config cannot be expressed,
    or if the tensors do not fit it.
    """
    folder = Path(folder)
    config = read_config(config_cls, folder)
    stored = layout.read_tensors(folder)
    model = layout.build_on_meta(cls, config, folder, len(stored))
    names, expected = their_tensors(model)

    # The tied head may be stored too; then it must equal the embedding.
    embedding = names["token_embedding.weight"]
    if embedding in stored:
        head = stored.pop("lm_loss.weight", stored[embedding])
        if not torch.equal(head, stored[embedding]):
            raise ValueError(f"{folder}: lm_loss.weight differs from {embedding}: it is tied to it")

    layout.check_tensors(folder, stored, expected)
    weights = {ours: from_theirs(ours, stored[theirs]) for ours, theirs in names.items()}
    layout.assign_weights(model, weights, dtype)
    model.head.weight = model.token_embedding.weight
    return model


def save(model: nn.Module, folder: str | Path, tokenizer=None, overwrite: bool = False) -> None:
    """Write a folder for `load`, for transformers and for tools that read its files.

    Raises ValueError if the tokenizer has more ids than the model, or if the folder holds a model
    already, unless overwrite.
    """
    config = model.config
    layout.check_tokenizer(tokenizer, config.vocab_size)
    # In training, a text starts after the end token of the one before. That token also pads.
    end = tokenizer.eot if tokenizer else None
    raw = write_config(config) | dict.fromkeys(ENDS, end)
    _, tensors = their_tensors(model)
    if not config.segments:
        tensors |= no_segments(config)
    layout.write_folder(Path(folder), raw, tensors, tokenizer, overwrite)
