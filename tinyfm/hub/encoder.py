"""BERT and its family in the layout of transformers, to and from our Encoder.

The tables are the content: the names of the modules there, the names of the settings in their
config.json and, in ARCHITECTURES, what each class of transformers fixes, and the values of its
other switches that our Encoder computes too. layout.py reads and writes the files.

An ELECTRA is two networks, and transformers has a class for each. So a folder holds the
discriminator, and inside of it the folder generator/ holds the generator, if there is one.

BERT's pooler and its head for "does this sentence follow that one" are dropped, with a warning: no
masked word needs them, and RoBERTa is no worse without (Liu et al. 2019, section 4.2).

Left out: settings that matter in training only, except the dropout of all but ModernBERT.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfm.common.files import MALFORMED, read_json
from tinyfm.hub import layout
from tinyfm.hub.layout import name_pairs, refuse, translate

# ---- names --------------------------------------------------------------------------------------

# Modules here and there, after the prefix of the class.
BERT_NAMES = """
embeddings.token_embedding     embeddings.word_embeddings
embeddings.position_embedding  embeddings.position_embeddings
embeddings.segment_embedding   embeddings.token_type_embeddings
embeddings.norm                embeddings.LayerNorm
tower.project                  embeddings_project
tower.blocks.*.attention.q     encoder.layer.*.attention.self.query
tower.blocks.*.attention.k     encoder.layer.*.attention.self.key
tower.blocks.*.attention.v     encoder.layer.*.attention.self.value
tower.blocks.*.attention.out   encoder.layer.*.attention.output.dense
tower.blocks.*.norm1           encoder.layer.*.attention.output.LayerNorm
tower.blocks.*.mlp.up          encoder.layer.*.intermediate.dense
tower.blocks.*.mlp.down        encoder.layer.*.output.dense
tower.blocks.*.norm2           encoder.layer.*.output.LayerNorm
"""
DISTILBERT_NAMES = """
embeddings.token_embedding     embeddings.word_embeddings
embeddings.position_embedding  embeddings.position_embeddings
embeddings.norm                embeddings.LayerNorm
tower.blocks.*.attention.q     transformer.layer.*.attention.q_lin
tower.blocks.*.attention.k     transformer.layer.*.attention.k_lin
tower.blocks.*.attention.v     transformer.layer.*.attention.v_lin
tower.blocks.*.attention.out   transformer.layer.*.attention.out_lin
tower.blocks.*.norm1           transformer.layer.*.sa_layer_norm
tower.blocks.*.mlp.up          transformer.layer.*.ffn.lin1
tower.blocks.*.mlp.down        transformer.layer.*.ffn.lin2
tower.blocks.*.norm2           transformer.layer.*.output_layer_norm
"""
# q, k and v are stored as one matrix, and so are gate and up: see JOINED.
MODERNBERT_NAMES = """
embeddings.token_embedding     embeddings.tok_embeddings
embeddings.norm                embeddings.norm
tower.blocks.*.norm1           layers.*.attn_norm
tower.blocks.*.attention.q     layers.*.attn.Wqkv.0
tower.blocks.*.attention.k     layers.*.attn.Wqkv.1
tower.blocks.*.attention.v     layers.*.attn.Wqkv.2
tower.blocks.*.attention.out   layers.*.attn.Wo
tower.blocks.*.norm2           layers.*.mlp_norm
tower.blocks.*.mlp.gate        layers.*.mlp.Wi.0
tower.blocks.*.mlp.up          layers.*.mlp.Wi.1
tower.blocks.*.mlp.down        layers.*.mlp.Wo
tower.norm                     final_norm
"""
JOINED = {"Wqkv": 3, "Wi": 2}  # matrices of ModernBERT -> number of ours that they consist of

# ELECTRA's two classes.
GENERATOR = "ElectraForMaskedLM"
DISCRIMINATOR = "ElectraForPreTraining"
DISCRIMINATOR_NAMES = {
    "detector.transform": "discriminator_predictions.dense",
    "detector.out": "discriminator_predictions.dense_prediction",
}

# Ends of the names of stored buffers, which are no weights.
BUFFERS = re.compile(r"\.(position_ids|token_type_ids|inv_freq)$")
# BERT's parts for its second loss, with the names that a BertForPreTraining gives them.
SECOND_LOSS = re.compile(r"(^|\.)pooler\.dense\.|^cls\.seq_relationship\.")

# ---- settings -----------------------------------------------------------------------------------

# tinyfm        BERT, RoBERTa, ELECTRA        DistilBERT               ModernBERT
FIELD_TABLE = """
vocab_size      vocab_size                    vocab_size               vocab_size
context_length  max_position_embeddings       max_position_embeddings  max_position_embeddings
n_layer         num_hidden_layers             n_layers                 num_hidden_layers
n_head          num_attention_heads           n_heads                  num_attention_heads
d_model         hidden_size                   dim                      hidden_size
d_ff            intermediate_size             hidden_dim               intermediate_size
norm_eps        layer_norm_eps                -                        norm_eps
segments        type_vocab_size               -                        -
pad_id          pad_token_id                  pad_token_id             pad_token_id
dropout         hidden_dropout_prob           dropout                  -
dropout         attention_probs_dropout_prob  attention_dropout        -
"""
BERT_COLUMN = 1
DISTILBERT_COLUMN = 2
MODERNBERT_COLUMN = 3


@dataclass(frozen=True)
class Architecture:
    """One class of transformers: which of our models it computes, and how to write them."""

    titles: tuple[str, ...]  # names of its classes that are read; the first is written
    prefix: str  # before the names of its modules, all but those of the head
    body: str  # the table of these names
    head: tuple[str, str, str, str]  # names of head.transform, .norm, .decoder and its bias
    column: int  # its column in FIELD_TABLE
    fixed: dict[str, Any]  # our fields -> the only value that the class computes
    allowed: dict[str, tuple]  # their fields -> values that ours computes; the first is written
    defaults: dict[str, Any]  # their fields -> value that transformers takes if the field is absent
    biases: tuple[str, ...] = ()  # their fields that our `bias` sets

    def names(self) -> dict[str, str]:
        """Our modules -> theirs."""
        names = {ours: f"{self.prefix}.{theirs}" for ours, theirs in name_pairs(self.body, 1)}
        ours = ("head.transform", "head.norm", "head.decoder", "head.decoder.bias")
        return names | dict(zip(ours, self.head)) | DISCRIMINATOR_NAMES

    def fields(self) -> list[tuple[str, str]]:
        """(our name, their name) of each setting."""
        pairs = name_pairs(FIELD_TABLE, self.column)
        if self.prefix == "electra":
            pairs.append(("d_embedding", "embedding_size"))
        return pairs + [("bias", theirs) for theirs in self.biases]


POST_NORM = {
    "norm": "post",
    "position": "learned",
    "mlp": "gelu",
    "bias": True,
    "first_position": 0,
    "window": 0,
}
BERT_SWITCHES = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
}
BERT_DEFAULTS = {
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}

# By model_type. A model is saved as the first architecture that can express it.
ARCHITECTURES = {
    "bert": Architecture(
        titles=("BertForMaskedLM", "BertForPreTraining"),
        prefix="bert",
        body=BERT_NAMES,
        head=(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
            "cls.predictions.bias",
        ),
        column=BERT_COLUMN,
        fixed=POST_NORM,
        allowed=BERT_SWITCHES,
        defaults=BERT_DEFAULTS,
    ),
    "roberta": Architecture(
        titles=("RobertaForMaskedLM",),
        prefix="roberta",
        body=BERT_NAMES,
        head=("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
        column=BERT_COLUMN,
        fixed=POST_NORM,
        allowed=BERT_SWITCHES,
        defaults=BERT_DEFAULTS | {"pad_token_id": 1},
    ),
    "distilbert": Architecture(
        titles=("DistilBertForMaskedLM",),
        prefix="distilbert",
        body=DISTILBERT_NAMES,
        head=("vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.bias"),
        column=DISTILBERT_COLUMN,
        fixed=POST_NORM | {"segments": 0, "norm_eps": 1e-12},
        allowed={"activation": ("gelu",), "tie_word_embeddings": (True,)},
        defaults={"pad_token_id": 0, "dropout": 0.1, "attention_dropout": 0.1},
    ),
    "electra": Architecture(
        titles=(GENERATOR, DISCRIMINATOR),
        prefix="electra",
        body=BERT_NAMES,
        head=(
            "generator_predictions.dense",
            "generator_predictions.LayerNorm",
            "generator_lm_head",
            "generator_lm_head.bias",
        ),
        column=BERT_COLUMN,
        fixed=POST_NORM,
        allowed=BERT_SWITCHES,
        defaults=BERT_DEFAULTS | {"embedding_size": 128},
    ),
    "modernbert": Architecture(
        titles=("ModernBertForMaskedLM",),
        prefix="model",
        body=MODERNBERT_NAMES,
        head=("head.dense", "head.norm", "decoder", "decoder.bias"),
        column=MODERNBERT_COLUMN,
        fixed={
            "norm": "pre",
            "position": "rope",
            "mlp": "geglu",
            "segments": 0,
            "first_position": 0,
        },
        allowed={
            "hidden_activation": ("gelu",),
            "classifier_activation": ("gelu",),
            "decoder_bias": (True,),
            "tie_word_embeddings": (True,),
            "quantization_config": (None,),
        },
        defaults={
            "norm_eps": 1e-5,
            "pad_token_id": 50283,
            "norm_bias": False,
            "attention_bias": False,
            "mlp_bias": False,
            "classifier_bias": False,
            "global_rope_theta": 160_000.0,
            "local_rope_theta": 10_000.0,
            "local_attention": 128,
            "global_attn_every_n_layers": 3,
        },
        biases=("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"),
    ),
}


# ---- config.json --------------------------------------------------------------------------------


def read_title(raw: dict, architecture: Architecture) -> str:
    """Read the name of the class. Raises ValueError for one with another head."""
    titles = raw.get("architectures") or [architecture.titles[0]]
    if titles[0] not in architecture.titles:
        refuse("architectures", titles, " or ".join(architecture.titles))
    return titles[0]


def layer_types(n_layer: int, every: int) -> list[str]:
    """ModernBERT's kind of each layer: each every-th, from the first, has no window."""
    return ["sliding_attention" if i % every else "full_attention" for i in range(n_layer)]


def read_windows(raw: dict) -> dict[str, Any]:
    """Read which of ModernBERT's layers have a window, as transformers 4 or 5 writes it.

    Raises ValueError unless each n-th layer from the first, of num_hidden_layers, has none.
    """
    every = raw["global_attn_every_n_layers"]
    kinds = raw.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != raw["num_hidden_layers"]:
            refuse("layer_types", kinds, f"a list of {raw['num_hidden_layers']} kinds")
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        every = full[1] if len(full) > 1 else len(kinds)
        if kinds != layer_types(len(kinds), every):
            refuse("layer_types", kinds, "full_attention in each n-th layer from the first")
    elif type(every) is not int or every < 1:
        refuse("global_attn_every_n_layers", every, "a whole number of 1 or more")
    if every == 1:
        return {"window": 0}
    width = raw["local_attention"]
    if type(width) is not int or width < 2:
        refuse("local_attention", width, "a whole number of 2 or more")
    return {"window": width // 2, "window_every": every}


def read_thetas(raw: dict) -> dict[str, Any]:
    """Read the bases of ModernBERT's rotary positions, as transformers 4 or 5 writes them.

    Raises ValueError for an extended context.
    """
    thetas = {}
    for ours, kind, older in (
        ("rope_theta", "full_attention", "global_rope_theta"),
        ("window_theta", "sliding_attention", "local_rope_theta"),
    ):
        rope = (raw.get("rope_parameters") or {}).get(kind) or {}
        if rope.get("rope_type", "default") != "default" or raw.get("rope_scaling"):
            refuse("rope_parameters", rope or raw["rope_scaling"], "the rope_type default")
        thetas[ours] = rope.get("rope_theta", raw[older])
        if type(thetas[ours]) not in (int, float):
            refuse(older, thetas[ours], "a number")
    return thetas


def read_config(config_cls: type, folder: Path) -> tuple[str, Any]:
    """Read config.json: its model_type and the EncoderConfig, without a generator.

    Raises ValueError for a setting that EncoderConfig cannot express.
    """
    raw = read_json(folder / "config.json")
    try:
        model_type = raw.get("model_type") if isinstance(raw, dict) else None
        if model_type not in ARCHITECTURES:
            refuse("model_type", model_type, ", ".join(ARCHITECTURES))
        architecture = ARCHITECTURES[model_type]
        title = read_title(raw, architecture)
        for field, values in architecture.allowed.items():
            if raw.get(field, values[0]) not in values:
                refuse(field, raw[field], " or ".join(map(repr, values)))
        raw = architecture.defaults | raw
        values = architecture.fixed | layout.read_fields(raw, architecture.fields(), config_cls)
        if model_type == "roberta":
            values["first_position"] = values["pad_id"] + 1
            values["context_length"] -= values["first_position"]
        if model_type == "modernbert":
            values |= read_windows(raw) | read_thetas(raw)
        if title == DISCRIMINATOR:
            values |= {"objective": "electra", "generator_head": 0}
        return model_type, config_cls(**values)
    except MALFORMED as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def resolve(config: Any) -> Any:
    """Return the EncoderConfig with the sizes that a 0 stands for."""
    return replace(config, d_ff=config.F, d_embedding=config.E)


def needs_of(model_type: str, config: Any) -> dict[str, Any]:
    """Our fields -> the value that an architecture needs, for a resolved EncoderConfig."""
    needs = dict(ARCHITECTURES[model_type].fixed)
    if model_type in ("bert", "roberta", "electra"):
        needs["segments"] = max(1, config.segments)
    if model_type == "roberta":
        needs["first_position"] = config.pad_id + 1
    if model_type == "electra":
        return needs
    return needs | {"d_embedding": config.d_model}


def class_name(model_type: str, config: Any) -> str:
    """The class of transformers that computes a model."""
    if config.objective == "electra":
        return DISCRIMINATOR
    return ARCHITECTURES[model_type].titles[0]


def choose_architecture(config: Any) -> str:
    """Return the first model_type that can express a resolved EncoderConfig.

    Raises ValueError if there is none, with the differences from the nearest one.
    """
    misfits = {}
    for model_type in ARCHITECTURES:
        if config.objective == "electra" and model_type != "electra":
            continue
        wrong = [
            f"{name} {needed!r}, not {getattr(config, name)!r}"
            for name, needed in needs_of(model_type, config).items()
            if getattr(config, name) != needed
        ]
        if not wrong:
            return model_type
        misfits[class_name(model_type, config)] = wrong
    nearest = min(misfits, key=lambda title: len(misfits[title]))
    raise ValueError(
        f"transformers has no architecture for this model; the nearest, {nearest}, "
        f"needs {'; '.join(misfits[nearest])}"
    )


def write_config(config: Any, model_type: str) -> dict[str, Any]:
    """Return config.json for a resolved EncoderConfig, readable by transformers 4 and 5."""
    architecture = ARCHITECTURES[model_type]
    raw = {"architectures": [class_name(model_type, config)], "model_type": model_type}
    for ours, theirs in architecture.fields():
        raw[theirs] = getattr(config, ours)
    for field, values in architecture.allowed.items():
        if values[0] is not None:
            raw[field] = values[0]
    if model_type == "roberta":
        raw["max_position_embeddings"] += config.first_position
    if model_type == "modernbert":
        every = config.window_every if config.window else 1
        bases = {"full_attention": config.rope_theta, "sliding_attention": config.window_theta}
        raw["local_attention"] = 2 * config.window or 128
        # transformers 4 reads the first three, transformers 5 the others.
        raw["global_attn_every_n_layers"] = every
        raw["global_rope_theta"] = config.rope_theta
        raw["local_rope_theta"] = config.window_theta
        raw["layer_types"] = layer_types(config.n_layer, every)
        raw["rope_parameters"] = {
            kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()
        }
    return raw


# ---- tensors ------------------------------------------------------------------------------------


def join(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put together what ModernBERT stores as one: "Wqkv.0", "Wqkv.1" and "Wqkv.2" as "Wqkv"."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        joined = re.sub(r"\.(Wqkv|Wi)\.\d\.", r".\1.", name)
        stored[joined] = torch.cat((stored[joined], tensor)) if joined in stored else tensor
    return stored


def part(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of join."""
    tensors = {}
    for name, tensor in stored.items():
        module, leaf = name.rsplit(".", 1)
        n = JOINED.get(module.rsplit(".", 1)[-1])
        if n is None:
            tensors[name] = tensor
            continue
        for i, chunk in enumerate(tensor.chunk(n)):
            tensors[f"{module}.{i}.{leaf}"] = chunk
    return tensors


def in_one_network(own: dict[str, Tensor], generator: bool) -> dict[str, str]:
    """Our names of the tensors of one network -> the names that they have in an Encoder of it.

    An ELECTRA with a generator is two: embeddings, tower and detector; embeddings, generator and
    head. A tied decoder is left out: the embedding is stored once.
    """
    two = any(name.startswith("generator.") for name in own)
    left_out = ("tower.", "detector.") if generator else ("generator.",)
    if two and not generator:
        left_out += ("head.",)
    return {
        name: re.sub(r"^generator\.", "tower.", name)
        for name in own
        if name != "head.decoder.weight" and not name.startswith(left_out)
    }


def their_tensors(
    model: nn.Module, model_type: str, generator: bool = False
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return {our name: their name} and {their name: tensor, in their layout}.

    generator: those of an ELECTRA's generator. For ModernBERT the parts of Wqkv and Wi have names
    (Wqkv.0) in the first, and are joined in the second.
    """
    own = model.state_dict()
    table = ARCHITECTURES[model_type].names()
    names = {
        name: translate(canonical, table)
        for name, canonical in in_one_network(own, generator).items()
    }
    theirs = {names[name]: own[name] for name in names}
    return names, join(theirs) if model_type == "modernbert" else theirs


def weights_of(folder: Path, model_type: str) -> dict[str, Tensor]:
    """Read the weights of a folder: those of our Encoder, under the names in transformers.

    Raises ValueError if a tied tensor is stored twice and differs.
    """
    architecture = ARCHITECTURES[model_type]
    stored = {}
    for name, tensor in layout.read_tensors(folder).items():
        # The first files of BERT have TensorFlow's names of the two weights of a norm.
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        stored[name.replace("LayerNorm.beta", "LayerNorm.bias")] = tensor
    stored = {name: tensor for name, tensor in stored.items() if not BUFFERS.search(name)}
    dropped = sorted(name for name in stored if SECOND_LOSS.search(name))
    if dropped:  # level 4 is the caller of from_pretrained
        warnings.warn(
            f"{folder}: {', '.join(dropped)} are dropped: they say whether one sentence follows "
            "another, which no masked word needs",
            stacklevel=4,
        )
    stored = {name: tensor for name, tensor in stored.items() if name not in dropped}

    # The decoder may be stored too; then it must equal what it is tied to.
    embedding = architecture.names()["embeddings.token_embedding"] + ".weight"
    *_, decoder, bias = architecture.head
    for copy, original in ((f"{decoder}.weight", embedding), (f"{decoder}.bias", bias)):
        if copy == original or copy not in stored:
            continue
        found = stored.pop(copy)
        if not torch.equal(found, stored.setdefault(original, found)):
            raise ValueError(f"{folder}: {copy} differs from {original}, which it is tied to")
    return stored


# ---- in and out ---------------------------------------------------------------------------------


def read_generator(config_cls: type, folder: Path, config: Any) -> Any:
    """The EncoderConfig of an ELECTRA with the generator that is in its folder.

    Raises ValueError if the two do not fit each other.
    """
    _, generator = read_config(config_cls, folder / "generator")
    whole = replace(config, generator_head=generator.n_head)
    if resolve(whole.generator()) != resolve(replace(generator, generator_head=generator.n_head)):
        raise ValueError(f"{folder / 'generator'}: its sizes are not those of a generator for it")
    return whole


def load(cls: type, config_cls: type, folder: str | Path, dtype=torch.float32) -> nn.Module:
    """Load the Encoder of a folder, in evaluation mode, its weights as dtype on the CPU.

    cls and config_cls: Encoder and EncoderConfig. An ELECTRA's generator is loaded if it is in the
    folder generator/. Raises ValueError if the config cannot be expressed, or if the tensors do not
    fit it.
    """
    folder = Path(folder)
    model_type, config = read_config(config_cls, folder)
    networks = {False: folder}  # is it the generator? -> its folder
    if config.objective == "electra" and (folder / "generator" / "config.json").is_file():
        networks[True] = folder / "generator"
        config = read_generator(config_cls, folder, config)
    stored = {which: weights_of(path, model_type) for which, path in networks.items()}
    model = layout.build_on_meta(cls, config, folder, sum(map(len, stored.values())))
    weights: dict[str, Tensor] = {}
    for which, path in networks.items():
        names, expected = their_tensors(model, model_type, which)
        layout.check_tensors(path, stored[which], expected)
        found = part(stored[which]) if model_type == "modernbert" else stored[which]
        for ours, theirs in names.items():
            if not torch.equal(weights.setdefault(ours, found[theirs]), found[theirs]):
                raise ValueError(f"{path}: {theirs} differs from the discriminator's: it is shared")
    layout.assign_weights(model, weights, dtype)
    if hasattr(model, "head"):
        model.head.decoder.weight = model.embeddings.token_embedding.weight
    return model


def save(model: nn.Module, folder: str | Path, tokenizer=None, overwrite: bool = False) -> None:
    """Write a folder for `load`, for transformers and for tools that read its files.

    Raises ValueError if no architecture expresses the model, if the tokenizer has more ids than the
    model, or if the folder holds a model already, unless overwrite.
    """
    folder = Path(folder)
    config = resolve(model.config)
    model_type = choose_architecture(config)
    layout.check_tokenizer(tokenizer, config.vocab_size)
    configs = {False: config}
    if hasattr(model, "generator"):
        configs[True] = resolve(config.generator())
    rows = {"texts": config.context_length}
    for generator, own in configs.items():
        _, tensors = their_tensors(model, model_type, generator)
        raw = write_config(own, model_type)
        path = folder / "generator" if generator else folder
        layout.write_folder(path, raw, tensors, tokenizer, overwrite, rows=rows)
