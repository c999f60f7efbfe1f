"""LoRA: a frozen matrix, and next to it a trained product of two thin matrices.

Hu et al. 2021 (section 4.1) assume that the change that a new task makes to a weight matrix W
(out, in) has a low rank; that training then works so well is their evidence. So the change is
written as B A, with A (rank, in) and B (out, rank), which hold far fewer numbers (eq. 3):

    h = W x + (alpha / rank) B A x,      B = 0 at the start: the model is unchanged before training

After training, W + (alpha / rank) B A is again one matrix: an adapted model costs no more than its
base. Several adapters of one base can be added, and each can be taken off again.

A LoRA is a child module of the layer that it adapts, and a forward hook adds its product to the
output of the layer. So the weights of the base keep their names and values, the code of the model
stays the same, and without the child the model is the base, bit for bit. A is a copy of the layer
with fewer outputs. So the A of a convolution has its stride and padding, and the A of a convolution
that enlarges (unet.py) enlarges too; B is then a convolution with a 1 x 1 kernel. A table of tokens
gets a thin table: W (V, D) changes by A B^T, with A (V, rank) and B (D, rank).

A config is an AdapterConfig (methods.py), of which rank, alpha and dropout are read here.

Left out: DoRA and other products, quantised bases.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

# Parts of parameter names that adaptation adds: a name with one of them is not the base's.
NEW = {"lora", "prompt", "heads"}


def below(name: str, *parts: str) -> bool:
    """Whether one of the parts is an element of a dotted name: below("a.lora.A", "lora")."""
    return not set(parts).isdisjoint(name.split("."))


# ---- one layer ----------------------------------------------------------------------------------


class LoRA(nn.Module):
    """The term that is added to the output of a layer: scale B A x, in the shape of that output."""

    def __init__(self, layer: nn.Linear | nn.Conv2d | nn.Embedding, config: Any):
        """For this layer; config is an AdapterConfig (methods.py)."""
        super().__init__()
        W = layer.weight
        rank = config.rank
        is_table = isinstance(layer, nn.Embedding)
        self.config = config
        self.scale = config.alpha / rank
        self.dropout = nn.Identity() if is_table else nn.Dropout(config.dropout)  # not for ids

        # A is a copy of the layer. If the layer has LoRAs already, a copy of it would contain them,
        # so the A of one of these is copied instead.
        present = [*getattr(layer, "lora", {}).values()]
        self.A = copy.deepcopy(present[0].A if present else layer)
        thin = (len(W), rank) if is_table else (rank, *W.shape[1:])
        self.A.weight = nn.Parameter(W.new_empty(thin))
        self.A.bias = None

        options = {"bias": False, "device": W.device, "dtype": W.dtype}
        if isinstance(layer, nn.Conv2d):
            self.B = nn.Conv2d(rank, len(W), 1, **options)
        elif is_table:
            self.B = nn.Linear(rank, W.size(1), **options)
        else:
            self.B = nn.Linear(rank, len(W), **options)

        nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))  # the default of nn.Linear
        nn.init.zeros_(self.B.weight)
        self.train(layer.training)  # the mode of the layer, for the dropout

    def forward(self, x):
        """scale B A x, in the shape of the layer's output; dropout acts on x, the layer's input."""
        return self.scale * self.B(self.A(self.dropout(x)))

    def product(self) -> Tensor:
        """scale B A as float32, in the shape of the layer's weight.

        The weights of A and B are (rank, in) and (out, rank). A convolution has A (rank, in, rows,
        columns) and B (out, rank, 1, 1). A table (V, D) has A (V, rank) and B (D, rank), and its
        product is A B'.
        """
        A = self.A.weight.float()
        B = self.B.weight.float()
        if isinstance(self.A, nn.Embedding):
            return self.scale * A @ B.T
        return self.scale * (B.flatten(1) @ A.flatten(1)).view(len(B), *A.shape[1:])


def add_products(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """The forward hook of an adapted layer. A LoRA with scale 0 is not computed."""
    for lora in layer.lora.values():
        if lora.scale:
            output = output + lora(*inputs)
    return output


# ---- the layers of a model ----------------------------------------------------------------------


def find_layers(model: nn.Module, targets: str = "", frozen: Collection[str] = ()) -> list[str]:
    """Names of the layers to adapt: those in which the regex `targets` is found.

    Without targets, all hidden nn.Linear layers: those outside of model.outer. frozen: names of
    parameters; a layer whose weight is one of them is left out, as it belongs to a part that the
    model uses but does not train. Raises ValueError, with examples of names, if no layer remains.
    """
    layers = {}
    for name, module in model.named_modules():
        can_have_lora = isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
        if can_have_lora and not below(name, *NEW) and f"{name}.weight" not in frozen:
            layers[name] = module
    if targets:
        found = [name for name in layers if re.search(targets, name)]
    else:
        outer = getattr(model, "outer", ())
        linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
        found = [name for name in linear if not below(name, *outer)]
    if not found:
        known = ", ".join([*layers][:: max(1, len(layers) // 4)])
        problem = f"targets {targets!r} match no layer" if targets else "there is no hidden matrix"
        raise ValueError(f"{problem}; set targets to a regex for some of {known}")
    return found


def attach(model: nn.Module, layers: dict[str, Any], name: str) -> None:
    """Add a LoRA with this name to layers, {name of a layer: its config}.

    Raises ValueError, and changes nothing, if a layer has a LoRA of that name, or a rank exceeds
    the size of its layer.
    """
    # Check everything before anything is changed.
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ValueError(f"an adapter cannot be named {name!r}; use a word of letters and digits")
    for layer_name, config in layers.items():
        layer = model.get_submodule(layer_name)
        largest = min(len(layer.weight), layer.weight[0].numel())
        if config.rank > largest:
            raise ValueError(
                f"rank {config.rank} exceeds {largest}, the rank of {layer_name}; use a lower one"
            )
        if name in getattr(layer, "lora", ()):
            raise ValueError(f"{layer_name} has an adapter {name!r} already; choose another name")
    for layer_name, config in layers.items():
        layer = model.get_submodule(layer_name)
        lora = LoRA(layer, config)
        if not hasattr(layer, "lora"):
            layer.lora = nn.ModuleDict()
            layer.lora_hook = layer.register_forward_hook(add_products)
        layer.lora[name] = lora


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of each layer with at least one LoRA; layers may be detached meanwhile."""
    for name, module in [*model.named_modules()]:
        if hasattr(module, "lora"):
            yield name, module


def detach(layer: nn.Module) -> None:
    """Take every LoRA off a layer, which is then a layer of the base again."""
    layer.lora_hook.remove()
    del layer.lora
    del layer.lora_hook


def set_weights(model: nn.Module, weights: dict[str, float]) -> None:
    """Multiply the product of each LoRA by weights[its name], or by 0 if it is not there.

    {"a": 1} uses a alone, {"a": 1, "b": 0.5} adds half of b, and {} gives the base. Raises
    ValueError for a name that no LoRA of the model has.
    """
    known = {name for _, layer in adapted_layers(model) for name in layer.lora}
    unknown = weights.keys() - known
    if unknown:
        raise ValueError(f"there is no adapter {min(unknown)!r}; the model has {sorted(known)}")
    for _, layer in adapted_layers(model):
        for name, lora in layer.lora.items():
            lora.scale = weights.get(name, 0.0) * lora.config.alpha / lora.config.rank
