"""What fills a GPU: the bytes of training and of serving, term by term.

A parameter in training costs its weight, its gradient and the optimizer's numbers. In the usual
recipe of mixed precision that is 2 + 2 + (4 + 4 + 4) = 16 bytes: 16-bit weight and gradient, and in
float32 a master weight and AdamW's two averages. In float32 throughout it is 4 + 4 + (4 + 4), 16
again; Muon keeps one average of a matrix, not two.

ZeRO (Rajbhandari et al. 2020) divides over the d GPUs of data parallelism, in stages: the optimizer
(1), gradients too (2), weights too (3, which is FSDP2). Without stages, and with each, n parameters
take

    16 n,   4 n + 12 n / d,   2 n + 14 n / d,   16 n / d

Activations wait for the backward pass: Korthikanti et al. (2022) count T D (34 + 5 N T / D) bytes a
row for a GPT-3 block, of which fused attention and selective checkpointing drop the second term,
full checkpointing all but the 2 T D that enter. Logits (T x V a row) are kept, and their gradient
made, in float32 before anything is freed.

Bytes are bytes; 1 GB = 10^9 and 1 GiB = 2^30 of them. Letters as in ledgers.py.
Left out: fragmentation, the CUDA context (some 0.5 GB), and communication libraries.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace

from tinyfm.calc.ledgers import Stack
from tinyfm.calc.systems import System
from tinyfm.common.gpus import DTYPE_BYTES

LOGIT_BYTES = 12  # float32: the logits, their log-softmax, and its gradient
UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
         "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}  # fmt: skip
CHECKPOINTS = ("none", "selective", "full")


def read_bytes(text: str) -> int:
    """24GiB or 80GB -> bytes. Raises ValueError for anything else: the unit must be said."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2] not in UNITS or match[1].count(".") > 1 or not float(match[1]):
        raise ValueError(f"{text!r} is no amount of memory; write it as 24GiB or 80GB")
    return int(float(match[1]) * UNITS[match[2]])


@dataclass(frozen=True)
class Training:
    """How one GPU trains."""

    rows: int = 1  # micro-batch: rows in a forward pass
    dtype: str = "bf16"  # of weights, gradients and activations
    optimizer: str = "adamw"  # or muon
    checkpoint: str = "none"  # selective: scores are computed twice; full: whole blocks are
    fused: bool = True  # attention that never stores its scores (Dao et al. 2022)
    dropout: bool = False

    def __post_init__(self):
        known = {"dtype": DTYPE_BYTES, "optimizer": ("adamw", "muon"), "checkpoint": CHECKPOINTS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                given = getattr(self, name)
                raise ValueError(f"{name} is {given!r}; use {' or '.join(values)}")
        if self.rows < 1:
            raise ValueError(f"the micro-batch is {self.rows}; it must be at least 1 row")


@dataclass(frozen=True)
class Layout:
    """How a job is spread over GPUs: data x tensor x pipeline."""

    gpus: int = 1
    tensor: int = 1  # each matrix is cut in so many
    pipeline: int = 1  # and the blocks dealt to so many
    zero: int = 0  # what data parallelism shares out: 0 nothing (DDP), 1, 2, 3 (FSDP2)
    sequence: bool = False  # tensor parallelism also divides what lies between the matrices

    def __post_init__(self):
        for name in ("gpus", "tensor", "pipeline"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"ZeRO stage {self.zero}: there are 0 (DDP), 1, 2 and 3 (FSDP2)")
        if self.gpus % (self.tensor * self.pipeline):
            raise ValueError(
                f"{self.gpus} GPUs are not divisible by tensor {self.tensor} x pipeline "
                f"{self.pipeline} = {self.tensor * self.pipeline}; use a multiple of that"
            )

    @property
    def data(self) -> int:
        return self.gpus // (self.tensor * self.pipeline)


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU."""

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0  # averages, a moving one of the weights too, and master weights
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0  # of communication: gathered weights, gradients on their way
    cache: float = 0.0  # keys and values, in serving

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Module:
    """A module of our own, as measure.py found it; the part of a System that is asked here."""

    name: str
    parts: dict[str, int]  # parameters of its top-level submodules
    frozen: dict[str, int]  # and those of them that are not trained: no gradients, no averages
    parameters: int
    non_embedding: int
    matrices: int  # parameters that Muon takes
    largest_block: int
    flops: dict[str, tuple[float, float]]  # of a row, by submodule: forward, backward
    average: int  # bytes of a moving average of the weights, if one is kept
    fixed_bytes: int  # beyond weights, gradients and all averages, a step holds this much
    row_bytes: int  # and this for each row of a micro-batch, logits among them,
    update_bytes: int  # but at least what the update itself takes
    unit: str = "row"
    row: int = 1  # units in a row
    shape: dict = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()  # its blocks, for what they cache in generation
    logits: int = 0
    published: str = ""
    trained: int = 0
    note: str = ""

    @property
    def active(self) -> int:
        return self.parameters

    @property
    def learnt(self) -> int:
        return self.parameters - sum(self.frozen.values())

    def by_part(self, quantity: str = "parameters") -> dict[str, int]:
        return self.parts

    def flops_by_part(self) -> dict[str, tuple[float, float]]:
        return self.flops

    def flops_per_row(self) -> int:
        return round(sum(map(sum, self.flops.values())))


Network = System | Module


# ---- training -----------------------------------------------------------------------------------


def state(parameters: float, training: Training, layout: Layout, matrices: float = 0,
          frozen: float = 0) -> Memory:  # fmt: skip
    """Weights, gradients and optimizer of a GPU (Rajbhandari et al. 2020, section 3.1 and fig. 1):
    of the parameters Muon takes `matrices`, and `frozen` are not trained."""
    share, size = layout.tensor * layout.pipeline, DTYPE_BYTES[training.dtype]
    learnt = parameters - frozen
    averages = 8 * learnt - (4 * matrices if training.optimizer == "muon" else 0)
    master = 4 * learnt if size < 4 else 0
    weights, gradients, optimizer = (
        total / share / (layout.data if layout.zero >= stage else 1)
        for total, stage in ((size * parameters, 3), (size * learnt, 2), (averages + master, 1))
    )
    return Memory(weights, gradients, optimizer)


def kept_by_block(stack: Stack, training: Training, layout: Layout) -> float:
    """Bytes that a block keeps of a row until its backward (Korthikanti et al. 2022, eqs. 1-4)."""
    size, t = DTYPE_BYTES[training.dtype], layout.tensor
    stored = not training.fused and training.checkpoint == "none"
    sums = {name: sum(getattr(layer, name) for layer in stack.layers)
            for name in ("kept", "split", "scores", "masks")}  # fmt: skip
    masks = sums["masks"] if training.dropout else 0
    # Of a score: the softmax; where it is dropped out, a mask and what is left.
    score = size + (1 + size if training.dropout else 0)
    whole = size * sums["kept"] + masks
    return (
        whole / (t if layout.sequence else 1)
        + (size * sums["split"] + (score * sums["scores"] if stored else 0)) / t
    )


def activations(network: Network, training: Training, layout: Layout) -> float:
    """Bytes of a micro-batch's activations, without its logits.

    In a pipeline of p stages the first holds p micro-batches of its n / p blocks: as much as one
    GPU of all n. Raises ValueError for checkpointing of what has no repeated blocks.
    """
    if isinstance(network, Module):
        if training.checkpoint != "none":
            raise ValueError(f"{network.name} has no activation checkpointing; use none")
        return max(network.fixed_bytes + network.row_bytes * training.rows, network.update_bytes)
    kept = [kept_by_block(stack, training, layout) for stack in network.stacks]
    if training.checkpoint != "full":
        per_row = sum(stack.n * each for stack, each in zip(network.stacks, kept))
        return training.rows * per_row
    size, blocks = DTYPE_BYTES[training.dtype], [s for s in network.stacks if s.boundary]
    if not blocks:
        raise ValueError(f"{network.name} has no repeated blocks to checkpoint; use none")
    entering = sum(size * stack.n * stack.boundary for stack in blocks)
    once = sum(each for stack, each in zip(network.stacks, kept) if not stack.boundary)
    again = max(each for stack, each in zip(network.stacks, kept) if stack.boundary)
    return training.rows * (entering / (layout.tensor if layout.sequence else 1) + once + again)


def training_memory(network: Network, training: Training, layout: Layout = Layout()) -> Memory:
    """Bytes of training on the fullest GPU, by term. ValueError for what cannot be laid out."""
    check_layout(network, layout)
    size, block = DTYPE_BYTES[training.dtype], network.largest_block / layout.tensor
    owned = network.learnt / (layout.tensor * layout.pipeline)
    buffers = 0.0
    if layout.data > 1:  # DDP keeps its buckets; FSDP2 gathers this block's weights and the next's
        buffers = size * (owned if not layout.zero else block if layout.zero < 3 else 3 * block)
    frozen = sum(network.frozen.values())
    held = state(network.parameters, training, layout, network.matrices, frozen)
    return replace(
        held, optimizer=held.optimizer + network.average, buffers=buffers,
        activations=activations(network, training, layout),
        logits=LOGIT_BYTES * training.rows * network.logits / layout.tensor,
    )  # fmt: skip


def check_layout(network: Network, layout: Layout) -> None:
    """Raise ValueError if heads or blocks cannot be dealt out evenly."""
    if (layout.tensor, layout.pipeline) == (1, 1):
        return
    heads, layers = (network.shape.get(name) for name in ("heads", "layers"))
    if not heads or not layers:
        raise ValueError(f"{network.name} is no stack of blocks: use tensor 1 and pipeline 1")
    for count, n, what in ((heads, layout.tensor, "heads"), (layers, layout.pipeline, "layers")):
        if count % n:
            raise ValueError(f"{network.name} has {count} {what}, not divisible by {n}")


# ---- serving ------------------------------------------------------------------------------------


def cache_bytes(network: Network, tokens: int, rows: int = 1, dtype: str = "bf16") -> int:
    """Bytes of the keys and values of `rows` texts, 2 L G K numbers a token (Ainslie et al. 2023).

    A window keeps only its tokens; a decoder that looks at an encoder keeps that one's keys too.
    """
    window = network.shape.get("window") or tokens
    numbers = sum(
        stack.n * (stack.cache * min(tokens, window) + stack.cross_cache)
        for stack in network.stacks
    )
    return DTYPE_BYTES[dtype] * rows * numbers


def serving_memory(network: Network, tokens: int, rows: int = 1, dtype: str = "bf16",
                   tensor: int = 1) -> Memory:  # fmt: skip
    """Bytes on each of `tensor` GPUs: weights, and keys and values of rows at full length."""
    check_layout(network, Layout(tensor, tensor))
    weights = DTYPE_BYTES[dtype] * network.parameters / tensor
    return Memory(weights, cache=cache_bytes(network, tokens, rows, dtype) / tensor)


# ---- does it fit? -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """The plainest way that trains within a memory."""

    layout: Layout
    training: Training  # with the largest micro-batch
    memory: Memory

    @property
    def way(self) -> str:
        n, again = self.layout.gpus, self.training.checkpoint == "full"
        how = "one GPU" if n == 1 else f"{'FSDP2' if self.layout.zero else 'DDP'} on {n} GPUs"
        return how + (" with activation checkpointing" if again else "")


def largest_rows(network: Network, budget: float, training: Training, layout: Layout) -> int:
    """Most rows of a micro-batch within `budget` bytes a GPU; 0 if not one fits. Memory is linear
    in the rows, once they are so many that they outweigh the update: two such values tell all."""
    big = 2**20
    one, many, more = (
        training_memory(network, replace(training, rows=n), layout).total for n in (1, big, 2 * big)
    )
    return int((budget - many) // ((more - many) / big) + big) if one <= budget else 0


def fit(network: Network, budget: float, training: Training, gpus: int = 1) -> Fit | None:
    """How to train on `gpus` GPUs of `budget` bytes each, or None if that cannot be done.

    Tried in this order: all on each GPU (DDP), that with checkpointing, sharded (FSDP2), both.
    """
    can = bool([stack for stack in network.stacks if stack.boundary])
    for zero in (0, 3) if gpus > 1 else (0,):
        for checkpoint in ("none", "full") if can else ("none",):
            layout, way = Layout(gpus, zero=zero), replace(training, checkpoint=checkpoint)
            if rows := largest_rows(network, budget, way, layout):
                way = replace(way, rows=rows)
                return Fit(layout, way, training_memory(network, way, layout))
    return None


def fewest_gpus(network: Network, budget: float, training: Training, most: int = 2**20) -> int:
    """Fewest GPUs of `budget` bytes on which it trains at all, sharded if need be; 0 if none do."""
    low, high = 0, 1
    while high <= most and not fit(network, budget, training, high):
        low, high = high, 2 * high
    if high > most:
        return 0
    while high - low > 1:  # low does not do, high does
        middle = (low + high) // 2
        low, high = (low, middle) if fit(network, budget, training, middle) else (middle, high)
    return high
