"""Classifiers for transformers: the body as its family writes it, and the head.

transformers has classifiers, but none that reads features as adapt/heads.py does: the mean over all
tokens, normalised, or a grid of places. (BERT's reads the first token, XLNet's the last one, each
through a further layer.) One of its classes with these weights would run and answer at random. So
the folder holds the code of the classifier too, modeling_tinyfm.py, which transformers reads if it
is called with trust_remote_code=True:

    pipeline("text-classification", "exported", trust_remote_code=True)

Left out: bodies that transformers does not have, and classifiers of several questions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tinyfm.hub import clip, encoder, gpt, layout, xlnet

CODE = "modeling_tinyfm.py"
GRID = 4  # rows and columns of places in the features of a picture, at most: recipes/clip.py
TASKS = {"TinyfmTextClassifier": "text-classification"}
TASKS |= {"TinyfmImageClassifier": "image-classification"}


def text_body(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors of a GPT without its head, as AutoModel names them."""
    config = gpt.resolve(model.config)
    architecture = gpt.choose_architecture(config)
    raw = gpt.write_config(config, architecture)
    del raw["architectures"]
    # modeling_tinyfm.py reads the context by this name, also of BLOOM, whose config has none.
    raw["max_position_embeddings"] = config.context_length
    names, tensors = gpt.their_tensors(model, architecture)
    tensors.pop("lm_head.weight", None)
    # Our states are multiplied by logit_scale, and those of the body are not.
    for ours in ("norm.weight", "norm.bias"):
        if ours in names:
            tensors[names[ours]] = config.logit_scale * tensors[names[ours]]
    tensors = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items()}
    return raw, tensors


def encoder_body(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors of an Encoder without its head, as AutoModel names them."""
    config = replace(encoder.resolve(model.config), objective="mlm")
    model_type = encoder.choose_architecture(config)
    raw = encoder.write_config(config, model_type)
    del raw["architectures"]
    _, tensors = encoder.their_tensors(model, model_type)
    prefix = encoder.ARCHITECTURES[model_type].prefix + "."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    return raw, tensors


def xlnet_body(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors of an XLNet without its head, as AutoModel names them."""
    raw = xlnet.write_config(model.config)
    del raw["architectures"]
    _, tensors = xlnet.their_tensors(model)
    if not model.config.segments:
        tensors |= xlnet.no_segments(model.config)
    prefix = "transformer."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    return raw, tensors


def image_body(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors of the image tower of a CLIP, as AutoModel names them."""
    clip.check_expressible(model.config)
    model = clip.in_rgb(model)
    raw = clip.write_config(model.config, None, warn=False)["vision_config"]
    prefix = "vision_model."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in clip.their_tensors(model).items()
        if name.startswith(prefix)
    }
    return raw, tensors


def padding_id(tokenizer) -> int | None:
    """The id that fills up rows: the token that ends a text, or an encoder's own."""
    if tokenizer is None:
        return None
    return tokenizer.eot if tokenizer.pad is None else tokenizer.pad


def save(model: nn.Module, folder: str | Path, tokenizer=None, overwrite: bool = False) -> str:
    """Write a Classifier (adapt/heads.py) for transformers; return the pipeline's task.

    Raises ValueError for a body that transformers does not have, for several questions, and for a
    folder that holds a model already, unless overwrite.
    """
    if len(model.classes) > 1:
        questions = ", ".join(model.classes)
        raise ValueError(
            f"the classifier answers {len(model.classes)} questions ({questions}); transformers' "
            "classifiers answer one: train one for each with --data.label-columns"
        )
    ((_, names),) = model.classes.items()
    kind = type(model.body).__name__
    others = {}
    if kind == "GPT":
        raw, tensors = text_body(model.body)
        title, auto = "TinyfmTextClassifier", "AutoModelForSequenceClassification"
    elif kind == "Encoder":
        raw, tensors = encoder_body(model.body)
        title, auto = "TinyfmTextClassifier", "AutoModelForSequenceClassification"
    elif kind == "XLNet":
        raw, tensors = xlnet_body(model.body)
        title, auto = "TinyfmTextClassifier", "AutoModelForSequenceClassification"
    elif kind == "CLIP":
        raw, tensors = image_body(model.body)
        title, auto = "TinyfmImageClassifier", "AutoModelForImageClassification"
        others[clip.PROCESSOR] = clip.write_processor(replace(model.config, channels=3))
        tokenizer = None
    else:
        raise ValueError(
            f"no body of transformers is read as this {kind} is; those of a GPT, an Encoder and "
            "an XLNet are, and a CLIP that was trained with --model.stem patch"
        )
    tensors = {f"body.{name}": tensor for name, tensor in tensors.items()}
    tensors |= {f"head.{name}": p for name, p in model.heads[0].named_parameters()}
    code = CODE.removesuffix(".py")
    config = {
        "architectures": [title],
        "model_type": "tinyfm_classifier",
        "auto_map": {
            "AutoConfig": f"{code}.TinyfmClassifierConfig",
            auto: f"{code}.{title}",
        },
        "body": raw,
        "features": model.heads[0].in_features,
        "grid": GRID,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "pad_token_id": padding_id(tokenizer),
    }
    texts = {CODE: Path(__file__).with_name(CODE).read_text(encoding="utf-8")}
    length = getattr(model.config, "context_length", 0) if tokenizer else 0
    layout.write_folder(
        Path(folder), config, tensors, tokenizer, overwrite, others, texts, {"texts": length}
    )
    return TASKS[title]
