"""Quantisation: the weights of a trained model in 8 or 4 bits.

To write a token, a model reads all its weights from memory, and waits for them longer than it
computes (see compiled.py). With fewer bits a weight, it waits less, and takes up less memory. A
weight w becomes a whole number q and a step s that many weights share:

    w is stored as q,    r = s q is used in its place,    s = (largest |w|) / (largest |q|)

This is absmax rounding: the largest of the weights that share a step just fits. The fewer weights
share a step, the smaller their errors. Here

    int8   one step for each row of a matrix, that is, for each output (Dettmers et al. 2022,
           LLM.int8(), section 2.1): q = -127 ... 127, 8 bits a weight
    int4   one step for each group of 32 inputs of an output: q = -8 ... 7. The steps take bits too:
           4 + 16 / 32 = 4.5 bits a weight

Outputs of a layer matter, not its weights. Second-order rounding (GPTQ: Frantar et al. 2023)
chooses q so that the outputs for example inputs change least. For a row w of the matrix W, its
rounded form r, and the example inputs X (n, K), the squared error is a quadratic form:

    |X w' - X r'|^2 = (w - r) H (w - r)',    H = X' X    (K, K)

The weights of a row are rounded one after the other. Those that are not rounded yet, j + 1 ..., are
changed so that they make up for the error of weight j (Frantar et al. 2023, eq. 2; Hassibi and
Stork 1993):

    w_rest = w_rest - (w_j - r_j) / [H_F^-1]_jj  [H_F^-1]_j,rest    F: j and the rest

Every row needs the same inverses, those of the lower right corners H_F. The Cholesky factor of H^-1
holds a row of each (`round_second_order`; the same without this trick: `round_one_by_one`).

What is quantised: the linear layers and the embedding tables, in the models of all families. In
int4, tables and output heads keep 8 bits, because no later layer can make up for an error in the
logits, and a table is not a product. A head that is tied to its table stays so. Convolutions, norms
and biases keep their format.

Letters: O outputs, K inputs, g inputs in a group, G = K / g groups, n example inputs or rows.
Left out: care for inputs that are much larger than the others, which models of billions of weights
need (the outliers of LLM.int8(); AWQ, Lin et al. 2024); quantised activations, caches and training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("int8", "int4")
GROUP = 32  # inputs of an output that share a step in int4
GROUPS = (32, 64, 128)  # those that torch's product can read
DAMPING = 0.01  # share of the mean of H's diagonal that is added to it, as in the paper
KERNEL_WIDTH = 32  # inputs that torch's products read at once, also past the end of a row
LONG = 64  # from so many tokens at once, the obvious product is faster than that of `pack`

# ---- rounding -----------------------------------------------------------------------------------


def as_bfloat16(steps: Tensor) -> Tensor:
    """Steps as bfloat16 can store them. Where all weights are 0, any step will do: 1."""
    steps = steps.bfloat16().float()
    return torch.where(steps == 0, 1.0, steps)


def int8_steps(W: Tensor) -> Tensor:
    """The step of each row of W (O, K): (O, 1)."""
    return as_bfloat16(W.abs().amax(1, keepdim=True) / 127)


def int4_steps(W: Tensor) -> Tensor:
    """The step of each group of W (.., g): (.., 1).

    There is a -8 but no 8. So the step has the sign that turns the weight of the largest magnitude
    into -8 (as in llama.cpp's Q4_0), and no number is left unused.
    """
    largest = W.gather(-1, W.abs().argmax(-1, keepdim=True))
    return as_bfloat16(largest / -8)


def round_int8(W: Tensor, steps: Tensor) -> Tensor:
    return (W / steps).round().clamp(-127, 127)


def round_int4(W: Tensor, steps: Tensor) -> Tensor:
    return (W / steps).round().clamp(-8, 7)


def round_plainly(W: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Weights (O, K) in int4, each rounded to the nearest: whole numbers (O, K), steps (O, G)."""
    groups = W.unflatten(1, (-1, group))  # (O, G, g)
    steps = int4_steps(groups)  # (O, G, 1)
    return round_int4(groups, steps).flatten(1), steps.squeeze(-1)


def damped(H: Tensor) -> Tensor:
    """H with a larger diagonal, so that it has an inverse: some inputs may always be 0."""
    more = DAMPING * H.diagonal().mean()
    return H + torch.where(more > 0, more, 1.0) * torch.eye(len(H), dtype=H.dtype)


def round_one_by_one(W: Tensor, H: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """`round_second_order` as the equation says it: slow, with an inverse for every input."""
    W = W.to(H.dtype).clone()
    H = damped(H)
    q = torch.zeros_like(W)
    steps = W.new_zeros(len(W), W.size(1) // group)
    for j in range(W.size(1)):
        if j % group == 0:
            steps[:, j // group] = int4_steps(W[:, j : j + group]).squeeze(1)
        step = steps[:, j // group]
        q[:, j] = round_int4(W[:, j], step)
        inverse = torch.linalg.inv(H[j:, j:])  # of j and the rest
        error = W[:, j] - step * q[:, j]
        W[:, j + 1 :] -= error[:, None] / inverse[0, 0] * inverse[0, 1:]
    return q, steps


def round_second_order(W: Tensor, H: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Weights (O, K) in int4, rounded for inputs with the products H (K, K): as `round_plainly`.

    With U' U = H^-1, U upper triangular, row j of U is that of [H_F^-1] divided by the root of its
    first element. A group is rounded input by input; then the rest is corrected for all its errors
    at once. The steps of a group come from its corrected weights.
    """
    W = W.to(H.dtype).clone()
    U = torch.linalg.cholesky(torch.linalg.inv(damped(H)), upper=True)
    q = torch.zeros_like(W)
    steps = W.new_zeros(len(W), W.size(1) // group)
    for start in range(0, W.size(1), group):
        end = start + group
        step = int4_steps(W[:, start:end])
        errors = W.new_zeros(len(W), group)
        for j in range(start, end):
            q[:, j : j + 1] = round_int4(W[:, j : j + 1], step)
            error = (W[:, j : j + 1] - step * q[:, j : j + 1]) / U[j, j]  # (O, 1)
            W[:, j + 1 : end] -= error * U[j, j + 1 : end]
            errors[:, j - start] = error[:, 0]
        W[:, end:] -= errors @ U[start:end, end:]
        steps[:, start // group] = step[:, 0]
    return q, steps


def spread(q: Tensor, steps: Tensor) -> Tensor:
    """The weights that whole numbers q (O, K) and their steps (O, G) stand for, float32 (O, K)."""
    return (q.float().unflatten(1, (steps.size(1), -1)) * steps.float()[..., None]).flatten(1)


def output_errors(W: Tensor, q: Tensor, steps: Tensor, H: Tensor) -> Tensor:
    """The squared error (w - r) H (w - r)' of each output, (O,)."""
    difference = W.to(H.dtype) - spread(q, steps).to(H.dtype)
    return (difference @ H * difference).sum(1)


def round_weight(W: Tensor, H: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    """Weights (O, K) in int4: plainly, or of each output the better way if there is an H."""
    q, steps = round_plainly(W, group)
    if H is None:
        return q, steps
    other_q, other_steps = round_second_order(W, H, group)
    # What is best for one weight after the other need not be best for all of them.
    better = output_errors(W, other_q, other_steps, H) < output_errors(W, q, steps, H)
    q = torch.where(better[:, None], other_q, q)
    return q, torch.where(better[:, None], other_steps, steps)


# ---- products -----------------------------------------------------------------------------------


def int8_product(x: Tensor, q: Tensor, steps: Tensor) -> Tensor:
    """x (n, K) -> x W' (n, O), in bfloat16, for a weight in int8."""
    if torch.compiler.is_compiling() and len(x) == 1:
        # A loop over W for the compiler, as in compiled.few_rows_linear, which also says why
        # as_strided: it keeps x in memory.
        row = x[0].float().as_strided((q.size(1),), (1,))
        return ((q * row).sum(-1) * steps)[None].bfloat16()
    return torch._weight_int8pack_mm(x.bfloat16().contiguous(), q, steps)


def int4_product(x: Tensor, packed: Tensor, steps_and_zeros: Tensor, group: int) -> Tensor:
    """x (n, K) -> x W' (n, O), in bfloat16, for a weight in int4 from `pack_weight`.

    O is rounded up to a multiple of 16.
    """
    x = x.bfloat16().contiguous()
    return torch._weight_int4pack_mm_for_cpu(x, packed, group, steps_and_zeros)


# ---- layers -------------------------------------------------------------------------------------


def pack_nibbles(q: Tensor, group: int) -> Tensor:
    """Whole numbers -8 ... 7 (O, K), two in a byte: uint8 (O, K/2).

    In each group, number i has the lower half of a byte, number i + g/2 the upper half.
    """
    low, high = (q + 8).to(torch.uint8).unflatten(1, (-1, 2, group // 2)).unbind(2)
    return (low | high << 4).flatten(1)


def unpack_nibbles(packed: Tensor, group: int) -> Tensor:
    """The inverse of pack_nibbles: int8 (O, K)."""
    halves = packed.unflatten(1, (-1, group // 2))
    return torch.stack((halves & 15, halves >> 4), 2).flatten(1).to(torch.int8) - 8


class Weight(nn.Module):
    """A quantised matrix, which a linear layer and the table tied to it share.

    numbers: int8 (O, K), or uint8 (O, K/2) with two of int4 in a byte. steps: (O, G), G = 1 for
    int8. They are bfloat16 numbers, whatever the format of the model.
    """

    def __init__(self, q: Tensor, steps: Tensor, kind: str):
        super().__init__()
        self.kind = kind
        self.width = q.size(1)
        self.group = self.width // steps.size(1)
        numbers = q.to(torch.int8) if kind == "int8" else pack_nibbles(q, self.group)
        self.register_buffer("numbers", numbers)
        self.register_buffer("steps", steps.bfloat16())

    def integers(self) -> Tensor:
        """The whole numbers, int8 (O, K)."""
        if self.kind == "int8":
            return self.numbers
        return unpack_nibbles(self.numbers, self.group)

    def all(self) -> Tensor:
        """The matrix (O, K) in float32."""
        return spread(self.integers(), self.steps)


def stop_training(module: nn.Module) -> None:
    """Raise ValueError if a quantised layer is called in training."""
    if module.training and torch.is_grad_enabled():
        raise ValueError(
            "a quantised model cannot be trained: its weights are whole numbers. Train the run "
            "that it was made from"
        )


class QuantizedLinear(nn.Module):
    """nn.Linear with a quantised weight: x (.., K) -> (.., O)."""

    def __init__(self, weight: Weight, bias: Tensor | None):
        super().__init__()
        self.quantized = weight
        self.outputs = len(weight.numbers)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.packed: tuple[Tensor, Tensor] | None = None  # see pack

    @property
    def weight(self) -> Tensor:
        return self.quantized.all()

    def forward(self, x: Tensor) -> Tensor:
        """The obvious product, with the weight as plain numbers; or that of `pack`.

        Which of them does not depend on the other rows of a batch: x (B, T, K) with T >= LONG is a
        part of a prompt.
        """
        stop_training(self)
        if self.packed is None or (x.dim() > 2 and x.size(-2) >= LONG):
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        rows = x.reshape(-1, x.size(-1))
        if self.quantized.kind == "int8":
            y = int8_product(rows, *self.packed)
        else:
            y = int4_product(rows, *self.packed, self.quantized.group)[:, : self.outputs]
        y = y.reshape(*x.shape[:-1], self.outputs).to(x.dtype)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(nn.Module):
    """nn.Embedding with a quantised table (V, D) in int8: ids (..) -> rows (.., D)."""

    def __init__(self, table: Weight, dtype: torch.dtype):
        super().__init__()
        self.quantized = table
        self.num_embeddings = len(table.numbers)
        self.register_buffer("zero", torch.zeros((), dtype=dtype))  # the format of the model

    @property
    def weight(self) -> Tensor:
        return self.quantized.all()

    def forward(self, ids: Tensor) -> Tensor:
        stop_training(self)
        rows = self.quantized.numbers[ids].float() * self.quantized.steps[ids].float()
        return rows.to(self.zero.dtype)


# ---- packing ------------------------------------------------------------------------------------


def pack_weight(weight: Weight) -> tuple[Tensor, Tensor]:
    """Numbers and steps as int8_product or int4_product read them."""
    steps = weight.steps.bfloat16()
    if weight.kind == "int8":
        return weight.numbers, steps.flatten()
    missing = -len(steps) % 16  # the kernel computes 16 outputs at once
    q = F.pad(weight.integers().int() + 8, (0, 0, 0, missing))
    steps = F.pad(steps, (0, 0, 0, missing)).T  # (G, O)
    steps_and_zeros = torch.stack((steps, torch.zeros_like(steps)), -1).contiguous()
    return torch._convert_weight_to_int4pack_for_cpu(q, 1), steps_and_zeros


def pack(model: nn.Module) -> None:
    """Let the linear layers of a quantised model use torch's products for CPUs, in place.

    Those read the whole numbers themselves, 1 or 1/2 byte a weight, where the obvious product
    first writes 4 bytes a weight. Inputs and outputs are bfloat16, sums float32. Each row of x is
    computed in the same way, whatever the other rows. On another device, or without a vector unit
    for them, the model stays as it is, and so does a layer whose width is no multiple of 32. A
    layer in int4 takes half a byte a weight more.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return
    for layer in model.modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        weight = layer.quantized
        if weight.numbers.device.type == "cpu" and weight.width % KERNEL_WIDTH == 0:
            layer.packed = pack_weight(weight)


# ---- models -------------------------------------------------------------------------------------


def count_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights and buffers, each counted once; without what `pack` adds."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(each.nbytes for each in {id(each): each for each in tensors}.values())


def input_products(layers: dict[str, nn.Linear], calibrate: Callable[[], object]) -> dict:
    """H = X' X, float64 (K, K), of each layer. X (n, K): the inputs that calibrate() gives it."""
    products = {}
    hooks = []
    for name, layer in layers.items():
        K = layer.in_features
        products[name] = torch.zeros(K, K, dtype=torch.float64)

        def add(_, inputs: tuple[Tensor], H: Tensor = products[name]) -> None:
            X = inputs[0].detach().flatten(0, -2).double().cpu()
            H += X.T @ X

        hooks.append(layer.register_forward_pre_hook(add))
    try:
        with torch.no_grad():
            calibrate()
    finally:
        for hook in hooks:
            hook.remove()
    return products


def is_outer(name: str, model: nn.Module) -> bool:
    """Whether a layer belongs to model.outer: such as an output head, "head" or "head.decoder"."""
    return any(part in getattr(model, "outer", ()) for part in name.split("."))


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(each, QuantizedLinear) for each in model.modules())


def check_layers(model: nn.Module, linear: dict[str, nn.Linear], tables: dict) -> None:
    """Raise ValueError as `quantize` does, before anything is changed."""
    if not linear:
        found = "it is quantised already" if is_quantized(model) else "it has no linear layer"
        raise ValueError(f"this {type(model).__name__} cannot be quantised: {found}")
    for name, layer in (linear | tables).items():
        if hasattr(layer, "lora"):
            raise ValueError(f"{name} has an adapter that is not merged: quantise without it")
        if not layer.weight.isfinite().all():
            raise ValueError(f"{name} has weights that are not finite: they are damaged")


def quantize(
    model: nn.Module,
    kind: str,
    calibrate: Callable[[], object] | None = None,
    group: int = GROUP,
) -> list[str]:
    """Quantise a model's linear layers and embedding tables, in place; it can no longer be trained.

    kind: "int8" or "int4". calibrate: a function that runs the model on example inputs, of which
    many thousand tokens are enough; then int4 is rounded by second order. group: inputs that share
    a step of int4, 32, 64 or 128. Returns the names of the layers that have 8 bits in int4 because
    the groups do not divide their width.

    Raises ValueError for another kind or group, for groups that divide no layer's width, and for a
    model without a layer to quantise, with an adapter that is not merged, or with weights that are
    not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"the kind of quantisation is {kind!r}; use {' or '.join(KINDS)}")
    if group not in GROUPS:
        sizes = ", ".join(map(str, GROUPS))
        raise ValueError(f"the groups have {group} inputs; use one of {sizes}")
    linear = {name: each for name, each in model.named_modules() if type(each) is nn.Linear}
    tables = {name: each for name, each in model.named_modules() if type(each) is nn.Embedding}
    check_layers(model, linear, tables)
    tied = {id(table.weight) for table in tables.values()}
    four = {}
    others = []
    if kind == "int4":
        for name, layer in linear.items():
            if is_outer(name, model) or id(layer.weight) in tied:
                continue
            if layer.in_features % group:
                others.append(name)
            else:
                four[name] = layer
        if not four:
            widths = sorted({linear[name].in_features for name in others})
            raise ValueError(
                f"int4 has groups of {group} inputs, which divide no layer's width ({widths}); "
                "use int8"
            )
    products = input_products(four, calibrate) if calibrate and four else {}

    # One Weight for each matrix, also if it is used twice.
    weights: dict[int, Weight] = {}
    for name, layer in (linear | tables).items():
        W = layer.weight.detach().float()
        if id(layer.weight) in weights:
            continue
        if name in four:
            q, steps = round_weight(W.cpu(), products.get(name), group)
            weight = Weight(q, steps, "int4").to(W.device)
        else:
            steps = int8_steps(W)
            weight = Weight(round_int8(W, steps), steps, "int8")
        weights[id(layer.weight)] = weight
    for name, layer in (linear | tables).items():
        weight = weights[id(layer.weight)]
        if name in linear:
            new = QuantizedLinear(weight, layer.bias)
        else:
            new = QuantizedEmbedding(weight, layer.weight.dtype)
        new._forward_hooks = layer._forward_hooks  # a soft prompt has one on the head
        model.set_submodule(name, new.train(layer.training))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return others
