"""The memory of a GPU in training and in serving, term by term.

In training a parameter costs its weight, its gradient and the optimizer's numbers. In the usual
mixed precision that is 2 + 2 + (4 + 4 + 4) = 16 bytes: weight and gradient in 16 bits, and in
float32 a master weight and AdamW's two averages. In float32 throughout it is 4 + 4 + (4 + 4), again
16. Muon keeps one average for a matrix instead of two.

ZeRO (Rajbhandari et al. 2020) divides these over the d GPUs of data parallelism, in stages: the
optimizer's numbers (stage 1), gradients too (2), weights too (3, which is FSDP2). In stages 0 to 3,
n parameters take

    16 n,   4 n + 12 n / d,   2 n + 14 n / d,   16 n / d

Activations are kept for the backward pass. Korthikanti et al. (2022) count T D (34 + 5 N T / D)
bytes a row for a GPT-3 block. Fused attention and selective checkpointing drop the second term;
full checkpointing keeps only the 2 T D bytes that enter the block. Logits (T x V a row) are kept in
float32, and their gradient is made, before anything is freed: 12 T V bytes a row.

An example: GPT-2's largest size, with n = 1.558e9, D = 1600, N = 25, V = 50,257 and 48 blocks, on
one row of T = 1024 tokens, with dropout.

    weights, gradients, optimizer   16 n                       24.9 GB
    the same on each of 8 GPUs      5.5 n, 3.75 n, 2 n         8.6, 5.8, 3.1 GB in stages 1, 2, 3
    activations of 48 blocks        48 T D (34 + 80)           9.0 GB
    with fused attention            48 T D 34                  2.7 GB
    with full checkpointing         48 T D 2 + T D 34          0.2 GB: one block is computed again
    logits                          12 T V                     0.6 GB

So a GPU of 24 GB cannot train it, whatever is done about activations: the first line exceeds it.
Eight such GPUs can in stage 3: 3.1 + 2.7 + 0.6 GB, and 0.5 GB for weights under way.

1 GB = 10^9 bytes and 1 GiB = 2^30 bytes. Letters as in ledgers.py.
Left out: fragmentation, the CUDA context (about 0.5 GB), and communication libraries.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace

from tinyfm.calc.ledgers import Stack
from tinyfm.calc.network import MeasuredModule, Network
from tinyfm.common.gpus import DTYPE_BYTES

LOGIT_BYTES = 12  # float32: the logits, their log-softmax, and its gradient
UNITS = {
    "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
KEPT = ("bf16", "fp16", "fp32")  # number formats of what training keeps
CHECKPOINTS = ("none", "selective", "full")


def read_bytes(text: str) -> int:
    """24GiB or 80GB -> bytes. Raises ValueError for anything else; a unit is required."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2] not in UNITS or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no amount of memory; write it as 24GiB or 80GB")
    return int(float(match[1]) * UNITS[match[2]])


@dataclass(frozen=True)
class Training:
    """How one GPU trains."""

    rows: int = 1  # micro-batch: rows in a forward pass
    dtype: str = "bf16"  # of weights, gradients and activations
    optimizer: str = "adamw"  # or muon
    checkpoint: str = "none"  # selective: scores are computed again; full: whole blocks are
    fused: bool = True  # attention that never stores its scores (Dao et al. 2022)
    dropout: bool = False

    def __post_init__(self):
        known = {"dtype": KEPT, "optimizer": ("adamw", "muon"), "checkpoint": CHECKPOINTS}
        for name, values in known.items():
            given = getattr(self, name)
            if given not in values:
                raise ValueError(f"{name} is {given!r}; use {' or '.join(values)}")
        if self.rows < 1:
            raise ValueError(f"the micro-batch is {self.rows}; it must be at least 1 row")


@dataclass(frozen=True)
class Layout:
    """How a job is spread over GPUs: data x tensor x pipeline."""

    gpus: int = 1
    tensor: int = 1  # GPUs that divide each matrix
    pipeline: int = 1  # groups of GPUs that divide the blocks
    zero: int = 0  # what data parallelism divides: 0 nothing (DDP), 1, 2, 3 everything (FSDP2)
    sequence: bool = False  # tensor parallelism also divides the activations between matrices

    def __post_init__(self):
        for name in ("gpus", "tensor", "pipeline"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"ZeRO stage is {self.zero}; use 0 (DDP), 1, 2 or 3 (FSDP2)")
        if self.gpus % (self.tensor * self.pipeline):
            raise ValueError(
                f"--gpus {self.gpus} is not divisible by tensor {self.tensor} x pipeline "
                f"{self.pipeline} = {self.tensor * self.pipeline}; use a multiple of it"
            )

    @property
    def data(self) -> int:
        """GPUs of data parallelism."""
        return self.gpus // (self.tensor * self.pipeline)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on the fullest GPU, by term."""

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0  # its averages, a moving average of the weights, and master weights
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0  # of communication: gathered weights, gradients under way
    cache: float = 0.0  # keys and values, in serving

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


# ---- training -----------------------------------------------------------------------------------


def state_memory(
    parameters: float,
    training: Training,
    layout: Layout,
    matrices: float = 0,
    frozen: float = 0,
) -> MemoryUse:
    """Bytes of weights, gradients and optimizer on one GPU (Rajbhandari et al. 2020, section 3.1).

    Weights and gradients have the dtype of training. The optimizer's numbers are float32: two
    averages of a parameter, or one where Muon updates it; and where the dtype is smaller than
    float32, a master weight. Tensor and pipeline parallelism divide all of it. ZeRO divides the
    optimizer's numbers from stage 1 on, gradients from stage 2 on and weights in stage 3, over the
    layout.data GPUs of data parallelism.

    matrices: parameters that Muon updates. frozen: parameters that are not trained, and so have
    neither gradients nor averages nor a master weight.
    """
    size = DTYPE_BYTES[training.dtype]
    learnt = parameters - frozen
    averages = 8 * learnt
    if training.optimizer == "muon":
        averages -= 4 * matrices
    master = 4 * learnt if size < 4 else 0

    def on_one_gpu(total: float, stage: int) -> float:
        """A GPU's share of `total` bytes, which ZeRO divides from this stage on."""
        copies = layout.data if layout.zero >= stage else 1
        return total / (layout.tensor * layout.pipeline) / copies

    return MemoryUse(
        weights=on_one_gpu(size * parameters, 3),
        gradients=on_one_gpu(size * learnt, 2),
        optimizer=on_one_gpu(averages + master, 1),
    )


def repeated_blocks(network: Network) -> list[Stack]:
    """The stacks that full checkpointing applies to; none for a network without such blocks."""
    return [stack for stack in network.stacks if stack.boundary]


def kept_by_block(stack: Stack, training: Training, layout: Layout) -> float:
    """Bytes of one row that a block keeps for its backward pass, if it is not checkpointed whole.

    Korthikanti et al. 2022, equations 1 to 4.
    """
    size = DTYPE_BYTES[training.dtype]
    kept = sum(layer.kept for layer in stack.layers)
    split = sum(layer.split for layer in stack.layers)
    masks = sum(layer.masks for layer in stack.layers)
    scores = sum(layer.scores for layer in stack.layers)
    score_bytes = 0
    if not training.fused and training.checkpoint == "none":
        score_bytes = size * scores  # the softmax
        if training.dropout:
            score_bytes += (1 + size) * scores  # a mask, and the scores after dropout
    whole = size * kept
    if training.dropout:
        whole += masks
    if layout.sequence:
        whole = whole / layout.tensor
    return whole + (size * split + score_bytes) / layout.tensor


def block_bytes(network: Network, training: Training, layout: Layout) -> tuple[float, float] | None:
    """Bytes of a row that the largest block keeps, with fused and with unfused attention.

    Both are without checkpointing. None if no block repeats.
    """
    blocks = repeated_blocks(network)
    if not blocks:
        return None
    fused = replace(training, checkpoint="none", fused=True)
    unfused = replace(fused, fused=False)
    return (
        max(kept_by_block(block, fused, layout) for block in blocks),
        max(kept_by_block(block, unfused, layout) for block in blocks),
    )


def activation_bytes(network: Network, training: Training, layout: Layout) -> float:
    """Bytes of a micro-batch's activations, without its logits.

    In a pipeline of p stages the first one holds p micro-batches of n / p blocks each: as much as
    one GPU with all n blocks. Raises ValueError for checkpointing of a network without repeated
    blocks.
    """
    if isinstance(network, MeasuredModule):
        if training.checkpoint != "none":
            raise ValueError(f"{network.name} has no activation checkpointing; use none")
        return max(network.fixed_bytes + network.row_bytes * training.rows, network.update_bytes)
    kept = [kept_by_block(stack, training, layout) for stack in network.stacks]
    if training.checkpoint != "full":
        per_row = sum(stack.n * each for stack, each in zip(network.stacks, kept))
        return training.rows * per_row

    # Full checkpointing: the inputs of all blocks, the other layers, and one block computed again.
    size = DTYPE_BYTES[training.dtype]
    blocks = repeated_blocks(network)
    if not blocks:
        raise ValueError(f"{network.name} has no repeated blocks to checkpoint; use none")
    entering = sum(size * stack.n * stack.boundary for stack in blocks)
    if layout.sequence:
        entering = entering / layout.tensor
    once = sum(each for stack, each in zip(network.stacks, kept) if not stack.boundary)
    again = max(each for stack, each in zip(network.stacks, kept) if stack.boundary)
    return training.rows * (entering + once + again)


def training_memory(network: Network, training: Training, layout: Layout = Layout()) -> MemoryUse:
    """Memory of training. Raises ValueError if the network cannot be laid out like this."""
    check_layout(network, layout)
    frozen = sum(network.frozen.values())
    state = state_memory(network.parameters, training, layout, network.matrices, frozen)
    return replace(
        state,
        optimizer=state.optimizer + network.average,
        buffers=buffer_bytes(network, training, layout),
        activations=activation_bytes(network, training, layout),
        logits=LOGIT_BYTES * training.rows * network.logits / layout.tensor,
    )


def buffer_bytes(network: Network, training: Training, layout: Layout) -> float:
    """Bytes of data parallelism's communication."""
    if layout.data == 1:
        return 0.0
    size = DTYPE_BYTES[training.dtype]
    block = network.largest_block / layout.tensor
    if layout.zero == 0:  # DDP: all gradients once more, in buckets
        return size * (network.learnt / (layout.tensor * layout.pipeline))
    if layout.zero < 3:  # the gradients of one block
        return size * block
    return size * (3 * block)  # FSDP2: weights of this block and the next, gradients of one


def check_layout(network: Network, layout: Layout) -> None:
    """Raise ValueError if heads or blocks cannot be divided evenly."""
    if layout.tensor == 1 and layout.pipeline == 1:
        return
    heads = network.shape.get("heads")
    layers = network.shape.get("layers")
    if not heads or not layers:
        raise ValueError(f"{network.name} is no stack of blocks: use tensor 1 and pipeline 1")
    if heads % layout.tensor:
        raise ValueError(f"{network.name} has {heads} heads, not divisible by {layout.tensor}")
    if layers % layout.pipeline:
        raise ValueError(f"{network.name} has {layers} layers, not divisible by {layout.pipeline}")


# ---- serving ------------------------------------------------------------------------------------


def cache_bytes(network: Network, tokens: int, rows: int = 1, dtype: str = "bf16") -> int:
    """Bytes of the keys and values of `rows` texts, 2 L G K numbers a token (Ainslie et al. 2023).

    Each of the stack.n blocks of a stack keeps stack.cache numbers for each of `tokens` tokens of a
    row. With a window only its tokens are kept. A decoder that reads an encoder also keeps the keys
    and values of the encoder's output: stack.cross_cache numbers for each row, however long.
    """
    window = network.shape.get("window") or tokens
    numbers = sum(
        stack.n * (stack.cache * min(tokens, window) + stack.cross_cache)
        for stack in network.stacks
    )
    return DTYPE_BYTES[dtype] * rows * numbers


def serving_memory(
    network: Network, tokens: int, rows: int = 1, dtype: str = "bf16", tensor: int = 1
) -> MemoryUse:
    """Memory on each of `tensor` GPUs: weights, and the cache of `rows` texts of full length."""
    check_layout(network, Layout(tensor, tensor))
    weights = DTYPE_BYTES[dtype] * network.parameters / tensor
    return MemoryUse(weights, cache=cache_bytes(network, tokens, rows, dtype) / tensor)


# ---- does it fit? -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A way to train within a given memory, with the largest micro-batch."""

    layout: Layout
    training: Training
    memory: MemoryUse

    @property
    def way(self) -> str:
        """In words: "FSDP2 on 8 GPUs with activation checkpointing"."""
        n = self.layout.gpus
        if n == 1:
            how = "one GPU"
        elif self.layout.zero:
            how = f"FSDP2 on {n} GPUs"
        else:
            how = f"DDP on {n} GPUs"
        if self.training.checkpoint == "full":
            how += " with activation checkpointing"
        return how


def largest_rows(network: Network, budget: float, training: Training, layout: Layout) -> int:
    """Largest micro-batch, in rows, within `budget` bytes a GPU; 0 if not even one row fits.

    Once the activations outweigh the update, memory is linear in the rows. So two large values
    determine the line.
    """

    def total(rows: int) -> float:
        return training_memory(network, replace(training, rows=rows), layout).total

    if total(1) > budget:
        return 0
    many = 2**20
    at_many = total(many)
    per_row = (total(2 * many) - at_many) / many
    return int((budget - at_many) // per_row + many)


def plan_training(
    network: Network, budget: float, training: Training, gpus: int = 1
) -> Plan | None:
    """The simplest way to train on `gpus` GPUs of `budget` bytes each; None if there is none.

    Tried in this order: the whole model on each GPU (DDP), the same with activation checkpointing,
    a sharded model (FSDP2), both.
    """
    stages = (0, 3) if gpus > 1 else (0,)
    checkpoints = ("none", "full") if repeated_blocks(network) else ("none",)
    for zero in stages:
        for checkpoint in checkpoints:
            layout = Layout(gpus, zero=zero)
            way = replace(training, checkpoint=checkpoint)
            rows = largest_rows(network, budget, way, layout)
            if rows:
                way = replace(way, rows=rows)
                return Plan(layout, way, training_memory(network, way, layout))
    return None


def fewest_gpus(network: Network, budget: float, training: Training, most: int = 2**20) -> int:
    """Fewest GPUs of `budget` bytes that can train it in any of these ways; 0 if `most` cannot."""
    low = 0  # too few
    high = 1
    while high <= most and not plan_training(network, budget, training, high):
        low = high
        high = 2 * high
    if high > most:
        return 0
    while high - low > 1:  # `low` GPUs are too few, `high` are enough
        middle = (low + high) // 2
        if plan_training(network, budget, training, middle):
            high = middle
        else:
            low = middle
    return high


@dataclass(frozen=True)
class Fit:
    """Whether a network can be trained on GPUs of a given memory, and how."""

    gpus: int  # that there are
    plan: Plan | None  # on these; None if they are too few
    fewest_gpus: int  # that are enough; 0 = no number of them is
    fewest_plan: Plan | None  # on the fewest
    row_bytes: float  # activations and logits of one row, checkpointed where possible


def check_fit(network: Network, budget: float, training: Training, gpus: int) -> Fit:
    """Whether the network can be trained on `gpus` GPUs of `budget` bytes each."""
    checkpoint = "full" if repeated_blocks(network) else "none"
    one_row = training_memory(network, replace(training, rows=1, checkpoint=checkpoint))
    fewest = fewest_gpus(network, budget, training)
    return Fit(
        gpus=gpus,
        plan=plan_training(network, budget, training, gpus) if fewest else None,
        fewest_gpus=fewest,
        fewest_plan=plan_training(network, budget, training, fewest) if fewest else None,
        row_bytes=one_row.activations + one_row.logits,
    )
