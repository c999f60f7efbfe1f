"""LoRA: a matrix that is not trained, and beside it a product of two thin ones that is.

Hu et al. 2021 found that what a new task changes in a weight W (out, in) has a low rank, so it can
be written as B A with A (rank, in) and B (out, rank), of far fewer numbers (eq. 3):

    h = W x + (alpha / rank) B A x,      B = 0 at the start: nothing is changed before it is trained

Afterwards W + (alpha / rank) B A is one matrix again: an adapted model costs no more than its base.
Two adapters add, whichever tasks they are from, and each can be taken off.

A LoRA is a child of the layer it adapts, and a forward hook adds its product to what the layer
gives. So weights keep their names and values, code that knows the model finds it as it was, and
without the child it is the base, bit for bit. A is a copy of the layer with fewer outputs: that of
a convolution has its stride and padding, that of one which enlarges (unet.py) enlarges, and B is
then a convolution of one pixel. A table of tokens has a thin table beside it: W (V, D) changes by
A B' with A (V, rank).

`config` is adapt.py's AdapterConfig. Left out: DoRA and other products, quantised bases.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterator

from torch import Tensor, nn

NEW = {"lora", "prompt", "heads"}  # names of what an adapter adds: nothing below them is the base's


def below(name: str, *parts: str) -> bool:
    """Whether one of the parts stands between the dots of a name."""
    return not {*parts}.isdisjoint(name.split("."))


# ---- one layer ----------------------------------------------------------------------------------


class LoRA(nn.Module):
    """What is added to the output of a layer: scale B A x, of the shape that the layer gives."""

    def __init__(self, layer: nn.Linear | nn.Conv2d | nn.Embedding, config):
        super().__init__()
        self.config, self.scale = config, config.alpha / config.rank
        W, rank, table = layer.weight, config.rank, isinstance(layer, nn.Embedding)
        self.dropout = nn.Identity() if table else nn.Dropout(config.dropout)  # ids stay whole
        others = [*getattr(layer, "lora", {}).values()]  # a copy of the layer would have them too
        self.A = copy.deepcopy(others[0].A if others else layer)
        thin = (len(W), rank) if table else (rank, *W.shape[1:])
        self.A.weight, self.A.bias = nn.Parameter(W.new_empty(thin)), None
        like = {"bias": False, "device": W.device, "dtype": W.dtype}
        if isinstance(layer, nn.Conv2d):
            self.B = nn.Conv2d(rank, len(W), 1, **like)
        else:
            self.B = nn.Linear(rank, W.size(1) if table else len(W), **like)
        nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))  # as nn.Linear begins
        nn.init.zeros_(self.B.weight)
        self.train(layer.training)  # or evaluation: its dropout

    def forward(self, x):
        return self.scale * self.B(self.A(self.dropout(x)))

    def product(self) -> Tensor:
        """scale B A, of the shape of the layer's weight, in float32."""
        A, B = self.A.weight.float(), self.B.weight.float()
        if isinstance(self.A, nn.Embedding):
            return self.scale * A @ B.T
        return self.scale * (B.flatten(1) @ A.flatten(1)).view(len(B), *A.shape[1:])


def add_products(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """The forward hook of an adapted layer; an adapter that counts 0 costs nothing."""
    return sum((lora(*inputs) for lora in layer.lora.values() if lora.scale), output)


# ---- the layers of a model ----------------------------------------------------------------------


def find_layers(model: nn.Module, targets: str = "", frozen: Collection[str] = ()) -> list[str]:
    """Names of the layers to adapt: those in which the regex is found, or all hidden nn.Linear.

    Without those whose weight's name is in `frozen`: a part that the model uses, and never trains.
    Raises ValueError if there are none, with some that there are.
    """
    kinds = nn.Linear | nn.Conv2d | nn.Embedding
    layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and not below(n, *NEW)}
    layers = {name: m for name, m in layers.items() if f"{name}.weight" not in frozen}
    if targets:
        found = [name for name in layers if re.search(targets, name)]
    else:
        linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
        found = [name for name in linear if not below(name, *getattr(model, "outer", ()))]
    if not found:
        known = ", ".join([*layers][:: max(1, len(layers) // 4)])
        problem = f"targets {targets!r} match no layer" if targets else "there is no hidden matrix"
        raise ValueError(f"{problem}; set targets to a regex for some of {known}")
    return found


def attach(model: nn.Module, layers: dict, name: str) -> None:
    """Give layers, {name of a layer: its config}, a LoRA of that name beside those they have.

    Raises ValueError, and changes nothing, if the name is taken or a rank is beyond a layer's size.
    """
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ValueError(f"an adapter cannot be named {name!r}; use a word of letters and digits")
    for layer, config in layers.items():
        module = model.get_submodule(layer)
        largest = min(len(module.weight), module.weight[0].numel())
        if config.rank > largest:
            raise ValueError(f"rank {config.rank} is beyond {layer}, of rank {largest} itself")
        if name in getattr(module, "lora", ()):
            raise ValueError(f"{layer} has an adapter {name!r} already; choose another name")
    for layer, config in layers.items():
        module = model.get_submodule(layer)
        lora = LoRA(module, config)
        if not hasattr(module, "lora"):
            module.lora = nn.ModuleDict()
            module.lora_hook = module.register_forward_hook(add_products)
        module.lora[name] = lora


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers that have a LoRA, or several."""
    return ((name, m) for name, m in [*model.named_modules()] if hasattr(m, "lora"))


def detach(layer: nn.Module) -> None:
    """Take every LoRA off a layer, which is then as it was."""
    layer.lora_hook.remove()
    del layer.lora, layer.lora_hook


def set_weights(model: nn.Module, weights: dict[str, float]) -> None:
    """Let each LoRA count as often as weights[its name] says, and not at all if it is not there:
    {"a": 1} exchanges, {"a": 1, "b": 0.5} adds, {} is the base. ValueError for unknown names."""
    known = {name for _, layer in adapted_layers(model) for name in layer.lora}
    if unknown := weights.keys() - known:
        raise ValueError(f"there is no adapter {min(unknown)!r}; the model has {sorted(known)}")
    for _, layer in adapted_layers(model):
        for name, lora in layer.lora.items():
            lora.scale = weights.get(name, 0.0) * lora.config.alpha / lora.config.rank
