"""Adaptation: make a trained model do something else by training a small part of it.

Training all weights ("full") gives a second model as large as the first, and most of its weights
need no change. Four methods train less and freeze the rest:

    lora    a product of two thin matrices, added to each hidden matrix (lora.py)
    bias    the parameters with one axis: biases and the gains of norms. BitFit (Ben Zaken et al.
            2021) trains biases alone. Our GPT has no biases, so there it is the gains alone
    head    the last layer alone: a linear probe of the model's features
    prompt  vectors that are read before the text as if they were tokens (soft_prompt.py)

A new task brings its own output layers, in a module named `heads` (heads.py). Every method trains
them.

The state_dict() of an adapted model holds the adapter alone. So its checkpoints are small, and one
base serves many tasks. The adapter fits that base only; `base_hash` identifies it. `merge` makes
one plain model of base and adapter, and `remove` restores the base, bit for bit.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfm.adapt.lora import NEW, adapted_layers, attach, below, detach, find_layers
from tinyfm.adapt.soft_prompt import add_prompt, drop_prompt, prompt_ids
from tinyfm.common import files
from tinyfm.common.config import Text

METHODS = ("full", "lora", "bias", "head", "prompt")


@dataclass(frozen=True)
class AdapterConfig:
    rank: int = 8  # LoRA: width between its two matrices
    alpha: float = 8.0  # LoRA: its product is scaled by alpha / rank
    dropout: float = 0.0  # LoRA: share of its input that is zeroed in training
    # LoRA: regex for the names of the layers; empty = hidden nn.Linear layers, "." = all layers
    targets: Text = ""
    prompt_tokens: int = 16  # soft prompt: number of trained vectors before the text

    def __post_init__(self):
        for name in ("rank", "prompt_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"targets {self.targets!r} is not a regex: {error}") from error


# ---- trained and saved parameters ---------------------------------------------------------------


@dataclass
class Adapted:
    """The record of an adaptation, kept as `model.adapted`. Names are those of parameters."""

    saved: set[str]  # the names in state_dict(): all that is trained
    frozen: set[str]  # parameters that the base did not train either
    changed: dict[str, Tensor]  # base values of the parameters that are trained in place


def save_adapter_only(
    model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any
) -> None:
    """State-dict hook: remove everything but the adapter from the state of an adapted model."""
    if not model.adapted:
        return
    for name in [*state]:
        if name.removeprefix(prefix) not in model.adapted.saved:
            del state[name]


def find_frozen(model: nn.Module) -> set[str]:
    """Names of the parameters that the base does not train: those of parts that it only uses."""
    if getattr(model, "adapted", None):
        return model.adapted.frozen
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def select(model: nn.Module, method: str, name: str) -> set[str]:
    """Names of the parameters that a method trains; its LoRA or prompt is in the model already.

    name: of the LoRA. Raises ValueError for "head" if the model has no untied head.
    """
    frozen = find_frozen(model)
    trainable = {n: p for n, p in model.named_parameters() if n not in frozen}
    chosen = {n for n in trainable if below(n, "heads")}
    if method == "lora":
        chosen |= {n for n in trainable if f".lora.{name}." in n}
    elif method == "prompt":
        chosen |= {n for n in trainable if below(n, "prompt")}
    elif method == "bias":
        chosen |= {n for n, p in trainable.items() if p.ndim == 1}
    elif not chosen:  # "head" of a model without `heads`: the model's own head
        chosen = {n for n in trainable if below(n, "head")}
        if not chosen:
            tied = hasattr(model, "head")
            why = "is its token embedding (tied)" if tied else "is not there: it has no `heads`"
            raise ValueError(f"the head of {type(model).__name__} {why}; use lora, bias or full")
    return chosen


def train_only(model: nn.Module, chosen: set[str]) -> None:
    """Freeze all parameters but the chosen ones; state_dict() returns only these from now on."""
    if not hasattr(model, "adapted"):
        model.register_state_dict_post_hook(save_adapter_only)
        model.adapted = None
    changed = model.adapted.changed if model.adapted else {}
    frozen = find_frozen(model)
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
        if name in chosen and not below(name, *NEW):
            changed[name] = nn.Parameter(p.detach().clone(), requires_grad=False)
    buffers = {name for name, _ in model.named_buffers() if below(name, "heads")}
    model.adapted = Adapted(chosen | buffers, frozen, changed)
    outer = tuple(getattr(model, "outer", ()))
    if "lora" not in outer:
        model.outer = (*outer, "lora")  # thin matrices are for AdamW, not for Muon


def apply(
    model: nn.Module, method: str, config: AdapterConfig | None = None, name: str = "default"
) -> None:
    """Adapt a model in place. Its outputs do not change until it is trained.

    Call it once the model has the weights of the base. Afterwards only the parameters of the
    method require gradients, and state_dict() returns only these; "full" leaves the model as it
    is. name: of the LoRA. Raises ValueError for an unknown method, for a model that is adapted
    already, and for a config that does not fit the model.
    """
    config = config or AdapterConfig()
    if method not in METHODS:
        raise ValueError(f"the method is {method!r}; use one of {', '.join(METHODS)}")
    if getattr(model, "adapted", None):
        raise ValueError("the model is adapted already; merge or remove that adapter first")
    if method == "full":
        return
    if method == "lora":
        layers = find_layers(model, config.targets, find_frozen(model))
        attach(model, dict.fromkeys(layers, config), name)
    elif method == "prompt":
        add_prompt(model, config.prompt_tokens)
    train_only(model, select(model, method, name))


def kinds_of_bias(model: nn.Module) -> str:
    """What the method "bias" trains in this model: "biases and gains", "biases" or "gains"."""
    names = [n for n, p in model.named_parameters() if p.ndim == 1 and not below(n, *NEW)]
    biases = any(name.split(".")[-1] == "bias" for name in names)
    gains = any(name.split(".")[-1] != "bias" for name in names)
    return " and ".join(["biases"] * biases + ["gains"] * gains)


def trained(model: nn.Module) -> tuple[int, int]:
    """(number of trained parameters, number of all parameters); a tied weight counts once."""
    everything = sum(p.numel() for p in model.parameters())
    some = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return some, everything


def summary(model: nn.Module) -> str:
    """A line that says how many parameters are trained."""
    some, everything = trained(model)
    share = 100 * some / everything
    return f"trains {some:,} of {everything:,} parameters ({share:.3g}%)"


# ---- back to a plain model ----------------------------------------------------------------------


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """The base's values of the parameters that are trained in place; {} for a plain model."""
    return dict(model.adapted.changed) if getattr(model, "adapted", None) else {}


def make_plain(model: nn.Module) -> None:
    """Take off LoRAs and prompt; train and save the same parameters as the base did."""
    if not getattr(model, "adapted", None):
        return
    for _, layer in adapted_layers(model):
        detach(layer)
    drop_prompt(model)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in model.adapted.frozen)
    model.outer = tuple(name for name in model.outer if name != "lora")
    model.adapted = None


@torch.no_grad()
def merge(model: nn.Module) -> dict[str, Tensor]:
    """Make the adapter part of the weights: W + scale B A for each LoRA, with its present scale.

    Then the model is a plain one: as fast as the base, and exported like it. Returns the base's
    values of all weights that changed: model.load_state_dict(values, strict=False) restores the
    base, bit for bit. Raises ValueError for an adapter that no weight can hold: a soft prompt, or
    a LoRA on one of two layers with a tied weight.
    """
    if prompt_ids(model):
        raise ValueError("a soft prompt cannot be merged: it is read as text; use remove()")
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    for name, layer in adapted_layers(model):
        if uses.count(id(layer.weight)) > 1:
            raise ValueError(f"{name} cannot be merged: its weight is tied to another layer's")
    before = base_values(model)
    for name, layer in adapted_layers(model):
        W = layer.weight
        before[f"{name}.weight"] = W.detach()
        added = sum(lora.product() for lora in layer.lora.values() if lora.scale)
        W.data = (W.float() + added).to(W.dtype)  # new memory: `before` keeps the old one
    make_plain(model)
    return before


@torch.no_grad()
def remove(model: nn.Module) -> None:
    """Take off every adapter: the weights are the base's, bit for bit. Trained `heads` stay."""
    parameters = dict(model.named_parameters())
    for name, value in base_values(model).items():
        parameters[name].copy_(value)
    make_plain(model)


# ---- adapters in files --------------------------------------------------------------------------


def base_hash(model: nn.Module) -> str:
    """SHA-256, 64 hex digits, of the weights that the model had before it was adapted.

    It covers the names, dtypes, shapes and bytes of the parameters, sorted by name. `heads` are
    left out, and the prefix "body." is removed, so a classifier has the hash of its body.
    """
    base = dict(model.named_parameters()) | base_values(model)
    base = {n.removeprefix("body."): p for n, p in base.items() if not below(n, *NEW)}
    digest = hashlib.sha256()
    for name in sorted(base):
        tensor = base[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_adapter(
    model: nn.Module,
    tensors: dict[str, Tensor],
    method: str,
    config: AdapterConfig | None = None,
    name: str = "default",
    base: str = "",
) -> None:
    """Put an adapter on its base, in place. tensors: the state_dict() that was saved.

    A LoRA is added to those that the model has, under a new name; lora.set_weights sets how much
    each one contributes. base: the base_hash of the weights that the adapter was trained on, to be
    checked. Raises ValueError for another base, for tensors that do not fit, and where `apply`
    does.
    """
    if base:
        own_hash = base_hash(model)
        if own_hash != base:
            raise ValueError(
                f"the adapter was trained on weights of hash {base[:16]}, and this model's is "
                f"{own_hash[:16]}; load it onto the run that it was trained from"
            )
    config = config or AdapterConfig()
    if method == "lora" and any(adapted_layers(model)):
        # One more LoRA: `apply` would refuse a model that is adapted already.
        layers = find_layers(model, config.targets, find_frozen(model))
        attach(model, dict.fromkeys(layers, config), name)
        train_only(model, select(model, method, name))
    else:
        apply(model, method, config, name)
    # The LoRA may have been saved under another name.
    saved_name = re.compile(r"\.lora\.\w+\.")
    tensors = {saved_name.sub(f".lora.{name}.", n): tensor for n, tensor in tensors.items()}
    files.load_model(model, tensors)
