"""Published models by name: parameters, FLOPs and activations, counted from their ledgers.

systems.csv holds the sizes of each model, the published number of parameters, and a note where
sources disagree. A family is the function that writes its ledger, with the sizes that all of its
members share.
"""

from __future__ import annotations

import csv
import difflib
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace as Shape

from tinyfm.calc import ledgers
from tinyfm.calc.ledgers import Stack
from tinyfm.calc.network import Network


@dataclass(frozen=True)
class System(Network):
    """A published model. All of its parameters are trained, and none are averaged."""

    name: str
    family: str
    stacks: tuple[Stack, ...]
    shape: dict = field(compare=False)  # the fields of systems.csv, over the family's defaults
    unit: str = "image"
    row: int = 1
    logits: int = 0
    published: str = ""
    trained: int = 0
    note: str = ""
    source: str = ""

    def total(self, quantity: str) -> int:
        """Sum of one quantity of Layer, such as "parameters" or "macs", over the network."""
        return sum(stack.total(quantity) for stack in self.stacks)

    def by_part(self, quantity: str) -> dict[str, int]:
        """The same sum for each part, in the order of the network; parts of 0 are left out."""
        sums: dict[str, int] = {}
        for stack in self.stacks:
            for layer in stack.layers:
                value = stack.n * getattr(layer, quantity)
                sums[layer.part] = sums.get(layer.part, 0) + value
        return {part: value for part, value in sums.items() if value}

    @property
    def parameters(self) -> int:
        return self.total("parameters")

    def parameters_by_part(self) -> dict[str, int]:
        return self.by_part("parameters")

    @property
    def non_embedding(self) -> int:
        """As Kaplan et al. (2020) count: without the tables and an untied head."""
        parts = self.parameters_by_part()
        return self.parameters - parts.get("embedding", 0) - parts.get("head", 0)

    @property
    def active(self) -> int:
        """Parameters that a token passes: without the experts that it is not sent to."""
        return self.parameters - self.parameters_by_part().get("idle experts", 0)

    @property
    def frozen(self) -> dict[str, int]:
        return {}

    @property
    def average(self) -> int:
        return 0

    @property
    def matrices(self) -> int:
        """Numbers in the matrices between hidden states, which Muon updates."""
        idle = self.by_part("vectors").get("idle experts", 0)
        return self.total("weights") - self.by_part("weights").get("head", 0) + idle

    @property
    def largest_block(self) -> int:
        return max(stack.total("parameters") // stack.n for stack in self.stacks)

    def flops_per_row(self, backward: bool = True) -> int:
        """2 a multiply-add; the backward pass multiplies each matrix twice, so 6 in all.

        Attention is counted for all pairs in reach, without a discount for causality.
        """
        return (6 if backward else 2) * self.total("macs")

    def flops_by_part(self) -> dict[str, tuple[int, int]]:
        return {part: (2 * macs, 4 * macs) for part, macs in self.by_part("macs").items()}


# ---- families: the code, and the sizes that all members share -----------------------------------

BASE = {
    "causal": 1, "norm": 2, "norms": 2, "final_norm": 1, "bias": 1, "no_k_bias": 0, "mlp_bias": 1,
    "mlp": "gelu", "head": "tied", "types": 0, "embed_norm": 0, "d_embed": 0, "d_position": 0,
    "projection_bias": 0, "window": 0, "experts": 1, "active": 1, "qk_norm": 0, "relative": 0,
    "relative_biases": 0, "positions": 0,
}  # fmt: skip
PLAIN = {"bias": 0, "mlp_bias": 0}
LLAMA = {**PLAIN, "norm": 1, "mlp": "swiglu", "head": "untied"}
BERT = {"causal": 0, "final_norm": 0, "embed_norm": 1, "head": "pooler", "types": 2}
# Rows of T5's pretraining have sources of 512 tokens and targets of 114. v1.1 gates its MLP by a
# GELU, which has the matrices of SwiGLU.
T5 = {**PLAIN, "norm": 1, "mlp": "relu", "targets": 114, "buckets": 32}
UNET = {
    "attention": (), "depth": (1,) * 9, "cross": 0, "text": 77, "updown": 0, "scale_shift": 0,
    "first": 0, "added": 0, "classes": 0, "blocks": 2, "heads": 1, "d_head": 0, "time": 0,
}  # fmt: skip

FAMILIES = {
    "gpt": (ledgers.transformer, {}),
    "opt": (ledgers.transformer, {"mlp": "relu"}),
    "bloom": (ledgers.transformer, {"embed_norm": 1}),
    "falcon": (ledgers.transformer, PLAIN),
    "llama": (ledgers.transformer, LLAMA),
    "palm": (ledgers.transformer, {**LLAMA, "head": "tied", "norms": 1}),
    "gopher": (ledgers.transformer, {**PLAIN, "norm": 1, "relative": 1}),
    "bert": (ledgers.transformer, BERT),
    "roberta": (ledgers.transformer, {**BERT, "head": "masked", "types": 1}),
    "distilbert": (ledgers.transformer, {**BERT, "head": "none", "types": 0}),
    "electra": (ledgers.transformer, {**BERT, "head": "binary", "projection_bias": 1}),
    "xlnet": (ledgers.transformer, {"causal": 0, "final_norm": 0, "bias": 0, "relative": 1,
                            "relative_biases": 5, "head": "biased"}),
    "transformer": (ledgers.encoder_decoder, {"final_norm": 0, "mlp": "relu", "buckets": 0}),
    "marian": (ledgers.encoder_decoder, {"final_norm": 0, "buckets": 0}),
    "t5": (ledgers.encoder_decoder, T5),
    "t5-v1.1": (ledgers.encoder_decoder, {**T5, "mlp": "swiglu", "head": "untied"}),
    "whisper": (ledgers.whisper, {"no_k_bias": 1, "frames": 1500, "mels": 80}),
    "musicgen": (ledgers.musicgen, {**PLAIN, "streams": 4, "text": 64}),
    "clip": (ledgers.clip, {"causal": 0, "head": "none", "image": 224, "patch_bias": 0}),
    "clip-text": (ledgers.transformer, {"causal": 0, "head": "none"}),
    "vit": (ledgers.vision, {"causal": 0, "image": 224, "patch_bias": 1, "outputs": 1000}),
    "dit": (ledgers.dit, {"causal": 0, "norm": 0, "image": 32, "patch": 2, "channels": 4,
                  "classes": 1000}),
    "unet": (ledgers.unet, UNET),
    "adm": (ledgers.unet, {**UNET, "updown": 1, "scale_shift": 1, "classes": 1000, "inputs": 3,
                   "outputs": 6}),
    "vae": (ledgers.vae, UNET),
    "resnet": (ledgers.resnet, {"image": 224, "outputs": 1000}),
    "mobilenet": (ledgers.mobilenet, {"image": 224, "outputs": 1000}),
}  # fmt: skip

# Units of the data, by the function that writes the ledger; all others read images.
UNITS = {
    ledgers.transformer: "token",
    ledgers.encoder_decoder: "token",
    ledgers.musicgen: "step",
    ledgers.whisper: "segment",
    ledgers.clip: "pair",
}


# ---- the table ----------------------------------------------------------------------------------


def read_option(text: str) -> int | str | tuple[int, ...]:
    """8 -> 8; 320:640 and 320:640: -> (320, 640); 320: -> (320,); anything else stays text."""
    if ":" in text:
        return tuple(int(value) for value in text.split(":") if value)
    return int(text) if text.lstrip("-").isdigit() else text


def read_shape(row: dict[str, str]) -> Shape:
    """The sizes in a row of systems.csv, over the defaults of its family and the usual ratios."""
    columns = (
        "layers", "d_model", "heads", "kv_heads", "d_head", "d_ff", "vocab", "context",
        "positions",
    )  # fmt: skip
    given = {name: row[name] for name in columns if row[name]}
    given |= dict(option.split("=") for option in row["options"].split())
    _, defaults = FAMILIES[row["family"]]
    values = BASE | defaults
    values |= {name: read_option(text) for name, text in given.items()}
    if "d_model" in values:
        D = values["d_model"]
        N = values["heads"]
        values = {"kv_heads": N, "d_head": D // N, "d_ff": 4 * D} | values
    return Shape(**values)


@functools.cache
def rows() -> dict[str, dict[str, str]]:
    """The rows of systems.csv, by name."""
    path = Path(__file__).with_name("systems.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for an error message: the most similar of `names`, or how to list them all."""
    names = list(names)
    name = name.lower()
    near = [other for other in names if other.startswith(f"{name}-")][:3]
    if not near:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if not near:
        return "--list shows all names"
    return f"did you mean {' or '.join(near)}?"


def get(name: str, context: int = 0, layers: int = 0, heads: int = 0) -> System:
    """The system of that name, in the sizes that are not 0 (`resize`).

    context: tokens in a row. Raises ValueError for an unknown name, with the nearest ones, and for
    sizes that it cannot take.
    """
    if name not in rows():
        raise ValueError(f"there is no system {name!r}; {nearest(name, rows())}")
    row = rows()[name]
    if layers or heads:
        row = resize(row, layers, heads)
    if context:
        row = {**row, "context": str(check_context(name, context))}
    family = row["family"]
    ledger, _ = FAMILIES[family]
    c = read_shape(row)
    stacks = tuple(ledger(c))
    unit = UNITS.get(ledger, "image")
    logits = 0
    if any(layer.part == "head" for stack in stacks for layer in stack.layers):
        logits = getattr(c, "targets", c.context) * c.vocab * getattr(c, "streams", 1)
    return System(
        name=name,
        family=family,
        stacks=stacks,
        shape=vars(c),
        unit=unit,
        row=c.context if unit in ("token", "step") else 1,
        logits=logits,
        published=row["published"],
        trained=int(float(row["trained"] or 0)),
        note=row["note"],
        source=row["source"],
    )


def has_blocks_of_one_kind(name: str) -> bool:
    """Whether a system is one stack of Transformer blocks, so that its sizes can be changed."""
    ledger, _ = FAMILIES[rows()[name]["family"]]
    return ledger is ledgers.transformer


def resize(row: dict[str, str], layers: int, heads: int) -> dict[str, str]:
    """The row of a model like this one, with other numbers of blocks and of query heads.

    0 keeps a number. The width grows with the heads, and the MLP with the width. Raises ValueError
    for sizes below 1, or a system that is no stack of Transformer blocks.
    """
    if not has_blocks_of_one_kind(row["name"]):
        raise ValueError(f"{row['name']} has fixed sizes; leave out layers and heads")
    if min(layers, heads) < 0:
        raise ValueError(f"layers {layers} and heads {heads} must be at least 1, or 0 (published)")
    changed = dict(row)
    if layers:
        changed["layers"] = str(layers)
    if heads:
        for name in ("d_model", "d_ff"):
            if row[name]:
                changed[name] = str(round(int(row[name]) * heads / int(row["heads"])))
        if row["kv_heads"]:  # they must divide the query heads
            changed["kv_heads"] = str(math.gcd(heads, int(row["kv_heads"])))
        changed["heads"] = str(heads)
    return changed


def check_context(name: str, context: int) -> int:
    """The context. Raises ValueError if a row of this system cannot have so many tokens."""
    row = rows()[name]
    if not has_blocks_of_one_kind(name):
        raise ValueError(f"{name} has rows of a fixed size; leave out the context")
    most = int(row["positions"] or context)
    if not 1 <= context <= most:
        sizes = f"takes 1 to {most} tokens" if row["positions"] else "takes at least 1 token"
        raise ValueError(f"context {context}: {name} {sizes}")
    return context
