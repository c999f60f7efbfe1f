"""Encoder-decoders in the layout of transformers, to and from our Seq2Seq.

The tables are the content: the names of the modules there, the names of the settings in their
config.json, what each class of transformers fixes, and the values of its other switches that our
Seq2Seq computes too. layout.py reads and writes the files.

Three things are not where one looks for them:

- T5 divides its last states by sqrt(D) if the head is tied, and v1.1 has a head that is not tied.
  transformers 4 reads both from tie_word_embeddings. transformers 5 reads only the division from
  it, writes that as scale_decoder_outputs, and ties a head unless the file holds another one.
- Marian's bias of the logits is a buffer, final_logits_bias, which is 0 in many models.
- T5's first files also hold a bias of distances for cross-attention, which no class uses.

Left out: settings that matter in training only, except the dropout of the states.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfm.common.files import MALFORMED, read_json
from tinyfm.hub import layout
from tinyfm.hub.layout import name_pairs, refuse, translate

# ---- names --------------------------------------------------------------------------------------

# tinyfm                       Marian, Pegasus                          T5
NAME_TABLE = """
token_embedding                model.shared                             shared
encoder.blocks.*.norm1         model.encoder.layers.*.self_attn_layer_norm  encoder.block.*.layer.0.layer_norm
encoder.blocks.*.attention.q   model.encoder.layers.*.self_attn.q_proj      encoder.block.*.layer.0.SelfAttention.q
encoder.blocks.*.attention.k   model.encoder.layers.*.self_attn.k_proj      encoder.block.*.layer.0.SelfAttention.k
encoder.blocks.*.attention.v   model.encoder.layers.*.self_attn.v_proj      encoder.block.*.layer.0.SelfAttention.v
encoder.blocks.*.attention.out model.encoder.layers.*.self_attn.out_proj    encoder.block.*.layer.0.SelfAttention.o
encoder.blocks.*.norm2         model.encoder.layers.*.final_layer_norm      encoder.block.*.layer.1.layer_norm
encoder.blocks.*.mlp.gate      -                                        encoder.block.*.layer.1.DenseReluDense.wi_0
encoder.blocks.*.mlp.up        model.encoder.layers.*.fc1               encoder.block.*.layer.1.DenseReluDense.wi_1
encoder.blocks.*.mlp.down      model.encoder.layers.*.fc2               encoder.block.*.layer.1.DenseReluDense.wo
encoder.distance_bias.table    -                                        encoder.block.0.layer.0.SelfAttention.relative_attention_bias
encoder.norm                   model.encoder.layer_norm                 encoder.final_layer_norm
decoder.blocks.*.norm1         model.decoder.layers.*.self_attn_layer_norm  decoder.block.*.layer.0.layer_norm
decoder.blocks.*.attention.q   model.decoder.layers.*.self_attn.q_proj      decoder.block.*.layer.0.SelfAttention.q
decoder.blocks.*.attention.k   model.decoder.layers.*.self_attn.k_proj      decoder.block.*.layer.0.SelfAttention.k
decoder.blocks.*.attention.v   model.decoder.layers.*.self_attn.v_proj      decoder.block.*.layer.0.SelfAttention.v
decoder.blocks.*.attention.out model.decoder.layers.*.self_attn.out_proj    decoder.block.*.layer.0.SelfAttention.o
decoder.blocks.*.cross_norm    model.decoder.layers.*.encoder_attn_layer_norm  decoder.block.*.layer.1.layer_norm
decoder.blocks.*.cross.q       model.decoder.layers.*.encoder_attn.q_proj   decoder.block.*.layer.1.EncDecAttention.q
decoder.blocks.*.cross.k       model.decoder.layers.*.encoder_attn.k_proj   decoder.block.*.layer.1.EncDecAttention.k
decoder.blocks.*.cross.v       model.decoder.layers.*.encoder_attn.v_proj   decoder.block.*.layer.1.EncDecAttention.v
decoder.blocks.*.cross.out     model.decoder.layers.*.encoder_attn.out_proj decoder.block.*.layer.1.EncDecAttention.o
decoder.blocks.*.norm2         model.decoder.layers.*.final_layer_norm      decoder.block.*.layer.2.layer_norm
decoder.blocks.*.mlp.gate      -                                        decoder.block.*.layer.2.DenseReluDense.wi_0
decoder.blocks.*.mlp.up        model.decoder.layers.*.fc1               decoder.block.*.layer.2.DenseReluDense.wi_1
decoder.blocks.*.mlp.down      model.decoder.layers.*.fc2               decoder.block.*.layer.2.DenseReluDense.wo
decoder.distance_bias.table    -                                        decoder.block.0.layer.0.SelfAttention.relative_attention_bias
decoder.norm                   model.decoder.layer_norm                 decoder.final_layer_norm
head                           lm_head                                  lm_head
"""  # noqa: E501
# Marian's and Pegasus's name of head.bias, which has the shape (1, V) there.
LOGITS_BIAS = "final_logits_bias"
# Stored tensors that are no weights: tables of sinusoids, and a bias that no class of T5 uses.
SINUSOIDS = re.compile(r"\.embed_positions\.weight$")
UNUSED = re.compile(r"\.EncDecAttention\.relative_attention_bias\.weight$")

# ---- settings -----------------------------------------------------------------------------------

# tinyfm         Marian, Pegasus          T5
FIELD_TABLE = """
vocab_size       vocab_size               vocab_size
vocab_size       decoder_vocab_size       -
context_length   max_position_embeddings  n_positions
n_layer          encoder_layers           num_layers
n_decoder_layer  decoder_layers           num_decoder_layers
n_head           encoder_attention_heads  num_heads
n_head           decoder_attention_heads  -
d_model          d_model                  d_model
d_head           -                        d_kv
d_ff             encoder_ffn_dim          d_ff
d_ff             decoder_ffn_dim          -
norm_eps         -                        layer_norm_epsilon
n_bucket         -                        relative_attention_num_buckets
max_distance     -                        relative_attention_max_distance
dropout          dropout                  dropout_rate
start_id         decoder_start_token_id   decoder_start_token_id
end_id           eos_token_id             eos_token_id
pad_id           pad_token_id             pad_token_id
"""
MARIAN_COLUMN = 1
T5_COLUMN = 2


@dataclass(frozen=True)
class Architecture:
    """One class of transformers: which of our models it computes, and how to write them."""

    title: str  # name of the class
    column: int  # its column in the tables
    fixed: dict[str, Any]  # our fields -> the only value that the class computes
    mlp_field: str  # their field for our `mlp`
    mlps: dict[str, str]  # its values -> ours; of several for one of ours, the first is written
    allowed: dict[str, tuple]  # their fields -> values that ours computes; the first is written
    defaults: dict[str, Any] = field(default_factory=dict)  # values that transformers takes

    def fields(self) -> list[tuple[str, str]]:
        """(our name, their name) of each setting."""
        return name_pairs(FIELD_TABLE, self.column)


MARIAN = {
    "norm": "post",
    "norm_kind": "layernorm",
    "norm_eps": 1e-5,
    "position": "sinusoid",
    "bias": True,
    "tied": True,
}
MARIAN_SWITCHES = {
    "tie_word_embeddings": (True,),
    "share_encoder_decoder_embeddings": (True,),
    "is_encoder_decoder": (True,),
    "normalize_before": (False,),
    "normalize_embedding": (False,),
    "add_final_layer_norm": (False,),
    "quantization_config": (None,),
}
MARIAN_MLPS = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu"}
T5 = {
    "norm": "pre",
    "norm_kind": "rmsnorm",
    "position": "relative",
    "bias": False,
    "head_bias": False,
}

# By model_type. A model is saved as the first architecture that can express it.
ARCHITECTURES = {
    "marian": Architecture(
        title="MarianMTModel",
        column=MARIAN_COLUMN,
        fixed=MARIAN,
        mlp_field="activation_function",
        mlps=MARIAN_MLPS,
        allowed=MARIAN_SWITCHES,
        defaults={"dropout": 0.1, "scale_embedding": False},
    ),
    "pegasus": Architecture(
        title="PegasusForConditionalGeneration",
        column=MARIAN_COLUMN,
        fixed=MARIAN | {"norm": "pre"},
        mlp_field="activation_function",
        mlps=MARIAN_MLPS,
        # The published files say how the model was ported, in fields that no class reads.
        allowed={
            "tie_word_embeddings": (True,),
            "is_encoder_decoder": (True,),
            "quantization_config": (None,),
        },
        defaults={"dropout": 0.1, "scale_embedding": False},
    ),
    "t5": Architecture(
        title="T5ForConditionalGeneration",
        column=T5_COLUMN,
        fixed=T5,
        mlp_field="feed_forward_proj",
        mlps={"gated-gelu": "geglu", "relu": "relu", "gelu": "gelu", "silu": "silu"},
        allowed={"is_encoder_decoder": (True,), "quantization_config": (None,)},
        defaults={
            "n_positions": 512,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6,
            "dropout_rate": 0.1,
            "feed_forward_proj": "relu",
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
    ),
}
# The same network as T5 v1.1 under another name. It is read; a model is written as a T5.
ARCHITECTURES["mt5"] = replace(
    ARCHITECTURES["t5"],
    title="MT5ForConditionalGeneration",
    defaults=ARCHITECTURES["t5"].defaults | {"feed_forward_proj": "gated-gelu"},
)
WRITTEN = ("marian", "pegasus", "t5")
OLDER_TITLES = {"T5WithLMHeadModel": "T5ForConditionalGeneration"}

# model_type of classes near to these -> the class, and what our Seq2Seq does not compute of it.
NEAR = {
    "bart": "BartForConditionalGeneration learns its positions and normalises the embeddings",
    "blenderbot": "BlenderbotForConditionalGeneration learns its positions",
    "fsmt": "FSMTForConditionalGeneration has two vocabularies",
    "longt5": "LongT5ForConditionalGeneration attends to near tokens only",
    "m2m_100": "M2M100ForConditionalGeneration has other sinusoids, which start at position 2",
    "mbart": "MBartForConditionalGeneration learns its positions and normalises the embeddings",
    "nllb-moe": "NllbMoeForConditionalGeneration is a mixture of experts",
    "pegasus_x": "PegasusXForConditionalGeneration attends to near tokens only",
    "prophetnet": "ProphetNetForConditionalGeneration predicts several tokens at a time",
    "switch_transformers": "SwitchTransformersForConditionalGeneration is a mixture of experts",
    "umt5": "UMT5ForConditionalGeneration has a bias of distances in each layer",
}


# ---- config.json --------------------------------------------------------------------------------


def find_architecture(raw: dict) -> Architecture:
    """The class of a config.json. Raises ValueError for a class that our Seq2Seq cannot express,
    and for a setting of one that it can."""
    model_type = raw.get("model_type")
    if model_type not in ARCHITECTURES:
        near = f" ({NEAR[model_type]})" if str(model_type) in NEAR else ""
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model_type is {model_type!r}{near}; supported: {known}")
    architecture = ARCHITECTURES[model_type]
    titles = raw.get("architectures") or [architecture.title]
    if not isinstance(titles, list) or OLDER_TITLES.get(titles[0], titles[0]) != architecture.title:
        refuse("architectures", titles, architecture.title)
    for name, values in architecture.allowed.items():
        if raw.get(name, values[0]) not in values:
            refuse(name, raw[name], " or ".join(map(repr, values)))
    return architecture


def divides_by_root(raw: dict) -> bool:
    """Whether a T5 divides its last states by sqrt(D), as transformers 4 or 5 writes it."""
    if raw["model_type"] == "mt5":
        return False
    return raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True))


def read_config(config_cls: type, folder: Path) -> tuple[str, Any]:
    """Read config.json: its model_type and the Seq2SeqConfig, with a tied head and no bias of the
    logits: only the weights show whether they have them.

    Raises ValueError for a setting that Seq2SeqConfig cannot express.
    """
    raw = read_json(folder / "config.json")
    try:
        if not isinstance(raw, dict):
            refuse("config.json", raw, "an object")
        architecture = find_architecture(raw)
        raw = architecture.defaults | raw
        if architecture.column == MARIAN_COLUMN:
            raw["decoder_vocab_size"] = raw.get("decoder_vocab_size") or raw.get("vocab_size")
        else:
            raw["num_decoder_layers"] = raw.get("num_decoder_layers") or raw.get("num_layers")
            raw.setdefault("decoder_start_token_id", raw["pad_token_id"])
        values = architecture.fixed | layout.read_fields(raw, architecture.fields(), config_cls)
        mlp = raw.get(architecture.mlp_field)
        if mlp not in architecture.mlps:
            refuse(architecture.mlp_field, mlp, ", ".join(architecture.mlps))
        values["mlp"] = architecture.mlps[mlp]
        values["tied"] = True
        if architecture.column == MARIAN_COLUMN:
            values["attention_scale"] = 0.0
            values["embedding_scale"] = 0.0 if raw["scale_embedding"] else 1.0
        else:
            values["logit_scale"] = 0.0 if divides_by_root(raw) else 1.0
        return raw["model_type"], config_cls(**values)
    except MALFORMED as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def resolve(config: Any) -> Any:
    """Return the Seq2SeqConfig with the sizes and factors that a 0 stands for."""
    return replace(
        config,
        n_decoder_layer=config.decoder_layers,
        d_head=config.K,
        d_ff=config.F,
        embedding_scale=config.embedding_factor,
        attention_scale=config.attention_factor,
        logit_scale=config.logit_factor,
    )


def needs_of(model_type: str, config: Any) -> dict[str, tuple]:
    """Our fields -> the values that an architecture computes, for a resolved Seq2SeqConfig."""
    architecture = ARCHITECTURES[model_type]
    needs = {name: (value,) for name, value in architecture.fixed.items()}
    needs["mlp"] = tuple(architecture.mlps.values())
    D = config.d_model
    if architecture.column == MARIAN_COLUMN:
        needs["d_head"] = (D // config.n_head,)
        needs["embedding_scale"] = (D**0.5, 1.0)
        needs["attention_scale"] = (config.d_head**-0.5,)
        needs["logit_scale"] = (1.0,)
    else:
        needs["embedding_scale"] = (1.0,)
        needs["attention_scale"] = (1.0,)
        needs["logit_scale"] = (1.0, D**-0.5) if config.tied else (1.0,)
    return needs


def choose_architecture(config: Any) -> str:
    """Return the first model_type that can express a resolved Seq2SeqConfig.

    Raises ValueError if there is none, with the differences from the nearest one.
    """
    misfits = {}
    for model_type in WRITTEN:
        wrong = [
            f"{name} {values[0]!r}, not {getattr(config, name)!r}"
            for name, values in needs_of(model_type, config).items()
            if getattr(config, name) not in values
        ]
        if not wrong:
            return model_type
        misfits[model_type] = wrong
    nearest = min(misfits, key=lambda model_type: len(misfits[model_type]))
    raise ValueError(
        "transformers has no architecture for this model; the nearest, "
        f"{ARCHITECTURES[nearest].title}, needs {'; '.join(misfits[nearest])}"
    )


def write_config(config: Any, model_type: str) -> dict[str, Any]:
    """Return config.json for a resolved Seq2SeqConfig, readable by transformers 4 and 5."""
    architecture = ARCHITECTURES[model_type]
    raw = {"architectures": [architecture.title], "model_type": model_type}
    for ours, theirs in architecture.fields():
        raw[theirs] = getattr(config, ours)
    for name, values in architecture.allowed.items():
        if values[0] is not None:
            raw[name] = values[0]
    theirs = [name for name, ours in architecture.mlps.items() if ours == config.mlp]
    raw[architecture.mlp_field] = theirs[0]
    if architecture.column == MARIAN_COLUMN:
        raw["scale_embedding"] = config.embedding_scale != 1
        raw["attention_dropout"] = config.dropout
        raw["forced_eos_token_id"] = None  # a text may be cut off before its end
    else:
        divides = config.logit_scale != 1
        raw["scale_decoder_outputs"] = divides
        raw["tie_word_embeddings"] = divides
    return raw


# ---- tensors ------------------------------------------------------------------------------------


def names_of(config: Any, model_type: str) -> dict[str, str]:
    """Our modules -> theirs."""
    column = ARCHITECTURES[model_type].column
    names = dict(name_pairs(NAME_TABLE, column))
    if column == MARIAN_COLUMN:
        names["head.bias"] = LOGITS_BIAS
    elif config.mlp != "geglu":
        for tower in ("encoder", "decoder"):
            up = f"{tower}.blocks.*.mlp.up"
            names[up] = names[up].replace("wi_1", "wi")
    return names


def their_tensors(model: nn.Module, model_type: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return {our name: their name} and {their name: tensor}. A tied head is left out: the
    embedding is stored once."""
    own = model.state_dict()
    if model.config.tied:
        del own["head.weight"]
    table = names_of(model.config, model_type)
    names = {name: translate(name, table) for name in own}
    return names, {names[name]: tensor for name, tensor in own.items()}


def weights_of(folder: Path, config: Any, model_type: str) -> tuple[Any, dict[str, Tensor]]:
    """Read the weights of a folder: (the config with what they show, {their name: tensor}).

    Raises ValueError if a copy of a tied tensor is stored that differs.
    """
    stored = layout.read_tensors(folder)
    stored = {name: tensor for name, tensor in stored.items() if not UNUSED.search(name)}
    table = names_of(config, model_type)
    embedding = table["token_embedding"] + ".weight"
    prefix = embedding.removesuffix("shared.weight")
    copies = [f"{prefix}{tower}.embed_tokens.weight" for tower in ("encoder", "decoder")]
    for copy in [*copies, "lm_head.weight"]:
        if copy not in stored:
            continue
        found = stored[copy]
        same = torch.equal(found, stored.setdefault(embedding, found))
        if copy == "lm_head.weight" and not same and config.logit_scale == 1 and prefix == "":
            config = replace(config, tied=False)  # T5 v1.1
            continue
        if not same:
            raise ValueError(f"{folder}: {copy} differs from {embedding}, which it is tied to")
        del stored[copy]
    bias = stored.pop(LOGITS_BIAS, None)
    if bias is not None and bias.any():
        config = replace(config, head_bias=True)
        stored[LOGITS_BIAS] = bias.flatten()
    return config, stored


# ---- in and out ---------------------------------------------------------------------------------


def check_sinusoids(folder: Path, stored: dict[str, Tensor], table: Tensor) -> None:
    """Raise ValueError if a folder stores other vectors of positions than our table of sinusoids.

    They may be stored in half precision."""
    for name, tensor in stored.items():
        same = tensor.shape == table.shape
        if not same or not torch.allclose(tensor.float(), table.float(), rtol=0, atol=5e-3):
            problem = f"{name} is no table of sinusoids"
            raise ValueError(f"{folder}: {problem}; learned positions are not read")


def load(cls: type, config_cls: type, folder: str | Path, dtype=torch.float32) -> nn.Module:
    """Load the Seq2Seq of a folder, in evaluation mode, its weights as dtype on the CPU.

    cls and config_cls: Seq2Seq and Seq2SeqConfig. Raises ValueError if the config cannot be
    expressed, or if the tensors do not fit it.
    """
    folder = Path(folder)
    model_type, config = read_config(config_cls, folder)
    config, stored = weights_of(folder, config, model_type)
    tables = {name: stored.pop(name) for name in list(stored) if SINUSOIDS.search(name)}
    model = layout.build_on_meta(cls, config, folder, len(stored))
    names, expected = their_tensors(model, model_type)
    layout.check_tensors(folder, stored, expected)
    layout.assign_weights(model, {ours: stored[theirs] for ours, theirs in names.items()}, dtype)
    if config.tied:
        model.head.weight = model.token_embedding.weight
    if tables:
        check_sinusoids(folder, tables, model.sinusoids)
    return model


def save(model: nn.Module, folder: str | Path, tokenizer=None, overwrite: bool = False) -> None:
    """Write a folder for `load`, for transformers and for tools that read its files.

    The tokenizer puts the end token behind each text. Raises ValueError if no architecture
    expresses the model, if the tokenizer has more ids than the model, or if the folder holds a
    model already, unless overwrite.
    """
    config = resolve(model.config)
    model_type = choose_architecture(config)
    layout.check_tokenizer(tokenizer, config.vocab_size)
    raw = write_config(config, model_type)
    _, tensors = their_tensors(model, model_type)
    if ARCHITECTURES[model_type].column == MARIAN_COLUMN:
        bias = tensors.get(LOGITS_BIAS, model.head.weight.new_zeros(config.vocab_size))
        tensors[LOGITS_BIAS] = bias[None]
        if model_type == "pegasus":  # its class expects the tables of sinusoids in the file
            for tower in ("encoder", "decoder"):
                tensors[f"model.{tower}.embed_positions.weight"] = model.sinusoids.clone()
    elif config.tied and not raw["tie_word_embeddings"]:
        tensors["lm_head.weight"] = model.head.weight.clone()  # transformers 4 ties no such head
    generation = {
        "decoder_start_token_id": config.start_id,
        "eos_token_id": config.end_id,
        "pad_token_id": config.pad_id,
        "max_length": config.context_length,
    }
    others = {"generation_config.json": generation}
    rows = {"captions": config.context_length}
    layout.write_folder(Path(folder), raw, tensors, tokenizer, overwrite, others, rows=rows)
