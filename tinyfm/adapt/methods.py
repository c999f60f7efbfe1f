"""Adaptation: make a trained model do something else by training a small part of it.

Training all weights again ("full") gives a second model as large as the first, and most of that is
not needed. Four ways to train less, all else frozen:

    lora    a product of two thin matrices beside each hidden matrix (lora.py)
    bias    biases and the gains of norms, all that has one axis: BitFit (Ben Zaken et al. 2021)
    head    the last layer alone: a linear probe of what the model knows already
    prompt  rows that are read before the text as if they were tokens (soft_prompt.py)

What lies below a module named `heads`, which a new task brings along, is trained in all of them.

An adapted model's state_dict() is the adapter alone, so its checkpoints are small, and one base
serves many tasks. It must be that base: `base_hash` tells. `merge` makes one plain model of both,
`remove` gives the base back, bit for bit.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyfm.adapt.lora import NEW, adapted_layers, attach, below, detach, find_layers
from tinyfm.adapt.soft_prompt import add_prompt, drop_prompt, prompt_ids
from tinyfm.common import files

METHODS = ("full", "lora", "bias", "head", "prompt")


@dataclass(frozen=True)
class AdapterConfig:
    rank: int = 8  # lora: width between its two matrices
    alpha: float = 8.0  # lora: its product counts alpha / rank
    dropout: float = 0.0  # lora: share of its input zeroed in training
    targets: str = ""  # lora: regex found in names of layers; empty = hidden nn.Linear, "." = all
    prompt_tokens: int = 16  # prompt: rows that stand before a text

    def __post_init__(self):
        for name in ("rank", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"targets {self.targets!r} is not a regex: {error}") from error


# ---- what is trained, and saved -----------------------------------------------------------------


@dataclass
class Adapted:
    """What an adapted model knows of itself, as `model.adapted`; names are of parameters."""

    saved: set[str]  # what state_dict() gives: all that is trained
    frozen: set[str]  # what the base itself did not train
    changed: dict[str, Tensor]  # the base's own values of what is trained in place


def save_adapter_only(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata) -> None:
    """The state-dict hook: nothing of an adapted model is saved, or asked for, but its adapter."""
    for name in [*state] if model.adapted else []:
        if name.removeprefix(prefix) not in model.adapted.saved:
            del state[name]


def find_frozen(model: nn.Module) -> set[str]:
    """Names of the parameters that the base does not train: none, or a part that it only uses."""
    if getattr(model, "adapted", None):
        return model.adapted.frozen
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def select(model: nn.Module, method: str, name: str) -> set[str]:
    """Names of the parameters that a method trains, of which its own are there already."""
    frozen = find_frozen(model)
    own = {n: p for n, p in model.named_parameters() if n not in frozen}
    chosen = {n for n in own if below(n, "heads")}
    if method == "lora":
        chosen |= {n for n in own if f".lora.{name}." in n}
    elif method == "prompt":
        chosen |= {n for n in own if below(n, "prompt")}
    elif method == "bias":
        chosen |= {n for n, p in own.items() if p.ndim == 1}
    elif not chosen:  # head: of a model that was given none for its task, its own
        chosen = {n for n in own if below(n, "head")}
        if not chosen:
            tied = hasattr(model, "head")
            why = "is its token embedding (tied)" if tied else "is not there: it has no `heads`"
            raise ValueError(f"the head of {type(model).__name__} {why}; use lora, bias or full")
    return chosen


def train_only(model: nn.Module, chosen: set[str]) -> None:
    """Freeze all but the chosen parameters, which are what state_dict() gives from now on."""
    if not hasattr(model, "adapted"):
        model.register_state_dict_post_hook(save_adapter_only)
        model.adapted = None
    changed, frozen = model.adapted.changed if model.adapted else {}, find_frozen(model)
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
        if name in chosen and not below(name, *NEW):
            changed[name] = nn.Parameter(p.detach().clone(), requires_grad=False)
    buffers = {name for name, _ in model.named_buffers() if below(name, "heads")}
    model.adapted = Adapted(chosen | buffers, frozen, changed)
    outer = tuple(getattr(model, "outer", ()))
    model.outer = outer if "lora" in outer else (*outer, "lora")  # thin matrices are AdamW's


def apply(
    model: nn.Module, method: str, config: AdapterConfig | None = None, name: str = "default"
) -> None:
    """Adapt a model in place: nothing changes until it is trained. name: of a LoRA.

    Afterwards parameters that are not trained need no gradient, and state_dict() gives what is
    trained only; "full" leaves the model as it is. Call it once the base has its weights. Raises
    ValueError for an unknown method, a second one, and what does not fit the model.
    """
    config = config or AdapterConfig()
    if method not in METHODS:
        raise ValueError(f"the method is {method!r}; use one of {', '.join(METHODS)}")
    if getattr(model, "adapted", None):
        raise ValueError("the model is adapted already; merge or remove that adapter first")
    if method == "lora":
        layers = find_layers(model, config.targets, find_frozen(model))
        attach(model, dict.fromkeys(layers, config), name)
    elif method == "prompt":
        add_prompt(model, config.prompt_tokens)
    if method != "full":
        train_only(model, select(model, method, name))


def freeze(model: nn.Module, pattern: str) -> None:
    """Stop training the parameters in whose names a regex is found. ValueError if it is in none."""
    found = [p for name, p in model.named_parameters() if re.search(pattern, name)]
    if not found:
        some = ", ".join(name for name, _ in [*model.named_parameters()][:4])
        raise ValueError(f"no parameter matches {pattern!r}; there are {some} and others")
    for parameter in found:
        parameter.requires_grad_(False)


def trained(model: nn.Module) -> tuple[int, int]:
    """How many numbers are trained, and how many there are, a tied weight once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, needed in sizes if needed), sum(n for n, _ in sizes)


def summary(model: nn.Module) -> str:
    some, all_ = trained(model)
    return f"trains {some:,} of {all_:,} parameters ({100 * some / all_:.3g}%)"


# ---- back to a plain model ----------------------------------------------------------------------


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """The base's own values of the parameters that are trained in place."""
    return dict(model.adapted.changed) if getattr(model, "adapted", None) else {}


def make_plain(model: nn.Module) -> None:
    """Take off what an adapter added; all is saved again, and trained as the base was."""
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
    """Make the adapter part of the weights, W + scale B A for each LoRA, as weighted now.

    The model is a plain one then, as fast as before, and exports as such. Returns the weights that
    it had: model.load_state_dict(them, strict=False) is the base again, bit for bit. Raises
    ValueError for what no weight can hold: a soft prompt, or a LoRA on one side of a tied weight.
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
        W.data = (W.float() + added).to(W.dtype)  # in memory of its own
    make_plain(model)
    return before


@torch.no_grad()
def remove(model: nn.Module) -> None:
    """Take every adapter off: the base again, bit for bit, under the heads that there are."""
    parameters = dict(model.named_parameters())
    for name, value in base_values(model).items():
        parameters[name].copy_(value)
    make_plain(model)


# ---- adapters in files --------------------------------------------------------------------------


def base_hash(model: nn.Module) -> str:
    """SHA-256 of the weights that the model had before it was adapted, as 64 hex digits.

    Over names, types, shapes and bytes, in the order of the names; without `heads`, and the same
    for a model that is the `body` of another.
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
    model: nn.Module, tensors: dict[str, Tensor], method: str,
    config: AdapterConfig | None = None, name: str = "default", base: str = "",
) -> None:  # fmt: skip
    """Put an adapter that was saved, as state_dict() gave it, onto its base, in place.

    A LoRA goes beside those that are there, under a name of its own; lora.set_weights says how much
    each counts. base: the base_hash that the adapter was trained on, checked if given. Raises
    ValueError for another base, tensors that do not fit, and what `apply` refuses.
    """
    if base and (own := base_hash(model)) != base:
        raise ValueError(
            f"the adapter was trained on weights of hash {base[:16]}, and this model's is "
            f"{own[:16]}; load it onto the run that it was trained from"
        )
    config = config or AdapterConfig()
    if method == "lora" and any(adapted_layers(model)):
        layers = find_layers(model, config.targets, find_frozen(model))
        attach(model, dict.fromkeys(layers, config), name)
        train_only(model, select(model, method, name))
    else:
        apply(model, method, config, name)
    own_name = re.compile(r"\.lora\.\w+\.")
    tensors = {own_name.sub(f".lora.{name}.", n): tensor for n, tensor in tensors.items()}
    files.load_model(model, tensors)
