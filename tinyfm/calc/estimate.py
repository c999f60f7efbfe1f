"""TODO."""

from dataclasses import dataclass

import torch
from torch import nn

from tinyfm.calc import memory
from tinyfm.calc.ledgers import Stack
from tinyfm.calc.memory import Layout, Module, Training
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig


@dataclass(frozen=True)
class TrainingCost:
    """Of one process that holds everything."""

    parameters: int  # a tied head counts once
    learnt: int  # of them; the others are frozen
    parameter_bytes: int  # float32 weights
    gradient_bytes: int  # float32
    optimizer_bytes: int  # AdamW keeps two float32 numbers a parameter, Muon one
    average_bytes: int  # float32 moving average of the weights, if one is kept
    flops_per_step: int  # forward and backward of the whole batch, 2 a multiply-add

    @property
    def state_bytes(self) -> int:
        weights = self.parameter_bytes + self.gradient_bytes + self.average_bytes
        return weights + self.optimizer_bytes


def training_cost(model: nn.Module, optim: OptimConfig, batch_size: int) -> TrainingCost:
    """Cost of training `model`, on any device, with batches of batch_size rows."""
    from tinyfm.calc import trace

    parameters = list(model.parameters())
    weights = sum(p.nbytes for p in parameters)
    gradients = sum(p.nbytes for p in parameters if p.requires_grad)
    optimizer, average = trace.average_bytes(model, optim)
    flops = 0  # where the model neither says nor can be measured
    if hasattr(model, "flops_per_row"):
        flops = batch_size * model.flops_per_row()
    elif hasattr(model, "example_batch"):
        flops = sum(map(sum, trace.count_flops(model, batch_size).values()))
    n = sum(p.numel() for p in parameters)
    learnt = sum(p.numel() for p in parameters if p.requires_grad)
    return TrainingCost(n, learnt, weights, gradients, optimizer, average, flops)


def micro_batch(model: nn.Module, train: TrainConfig, world: int = 1) -> tuple[int, bool]:
    """Rows of a forward pass, and whether a step has several, as the trainer cuts a batch."""
    batch = train.batch_size // world
    whole = getattr(model, "whole_batch", False)
    rows = batch if whole else train.micro_batch_size or batch
    return rows, rows < batch


def predict_peak(model: nn.Module, optim: OptimConfig, train: TrainConfig) -> tuple[int, str]:
    """Bytes of tensors at the peak of a step, as the trainer would run it here; and how, in words.

    Of the device that is asked for; of the CPU, in a dry run for another machine.
    """
    import torch

    from tinyfm.calc import trace
    from tinyfm.common import device as machine

    try:
        device = machine.choose_device(train.device)
        dtype = machine.choose_dtype(train.dtype, device)
    except ValueError:
        device, dtype = trace.CPU, machine.choose_dtype("auto", trace.CPU)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rows, several = micro_batch(model, train, world)
    at_once = train.micro_batch_size
    peak = max(trace.step_bytes(model, optim, rows, several, at_once, device, dtype))
    return peak, f"{at_once or rows} rows at once in {str(dtype).removeprefix('torch.')}"


def describe(model: nn.Module, optim: OptimConfig, train: TrainConfig) -> str:
    """One line on what training will take, for one process; with its peak of memory, if the model
    has example_batch(rows)."""
    try:
        cost = training_cost(model, optim, train.batch_size)
        state = f"{cost.state_bytes / 2**30:.2f} GiB for weights, gradients and optimizer"
        memory = f"{state}, activations come on top"
        if hasattr(model, "example_batch"):
            peak, how = predict_peak(model, optim, train)
            memory = f"a peak of {peak / 2**30:.2f} GiB of tensors predicted for {how}: {state}, "
            memory += f"{(peak - cost.state_bytes) / 2**30:.2f} GiB for activations"
    except Exception as error:  # a forecast is not worth a run
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"what training takes cannot be predicted ({reason})"
    steps = ""
    if cost.flops_per_step:
        steps = f"; {cost.flops_per_step / 1e12:.3g} TFLOP a step, "
        steps += f"{cost.flops_per_step * train.steps:.3g} FLOP in all"
    frozen = cost.parameters - cost.learnt
    trained = f", {cost.learnt:,} of them trained" if frozen else ""
    return f"{cost.parameters:,} parameters{trained}; {memory}{steps}"


def unit_of(model: nn.Module) -> tuple[str, int]:
    """What the model's data are counted in, and how many of it are in a row."""
    if hasattr(model.config, "n_kv_head"):
        return "token", model.config.context_length
    batch = model.example_batch(1)
    if "images" not in batch and "latents" not in batch:
        return "row", 1
    return "pair" if "tokens" in batch else "image", 1


def measured(
    name: str, model: nn.Module, optim: OptimConfig, rows: int = 1, accumulate: bool = False,
    at_once: int = 0, dtype: torch.dtype | None = None,
) -> Module:  # fmt: skip
    """What memory.py asks of a network, of a module of our own; dtype is that of its products.

    The peak of a step is found for `rows` rows of a micro-batch and for twice as many: a line goes
    through the two. What there is beyond weights, gradients and averages counts as activations.
    """
    from torch import nn

    from tinyfm.calc import trace
    from tinyfm.training.optim import hidden_matrices

    n, rows = sum(p.numel() for p in model.parameters()), max(2, rows)  # one has nothing to compare
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    tables += [model.head] if hasattr(model, "head") else []
    outer = {p for table in tables for p in table.parameters()}
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    sizes = [sum(p.numel() for p in block.parameters()) for blocks in lists for block in blocks]
    where = {} if dtype is None else {"dtype": dtype}
    (one, update), (two, _) = (
        trace.step_bytes(model, optim, r, accumulate, at_once, **where) for r in (rows, 2 * rows)
    )
    matrices = sum(p.numel() for p in hidden_matrices(model, optim.kernels) if p.requires_grad)
    frozen = trace.count_parts(model, frozen=True)
    _, average = trace.average_bytes(model, optim)
    plain = Training(dtype="fp32", optimizer=optim.optimizer)
    held = memory.state(n, plain, Layout(), matrices, sum(frozen.values())).total + average
    flops = trace.count_flops(model, rows).items()
    (unit, row), config, cache = unit_of(model), model.config, 0
    if unit == "token":  # a decoder, which generates from keys and values
        cache = 2 * config.G * config.K
    return Module(
        name, trace.count_parts(model), frozen, n, n - sum(p.numel() for p in outer),
        matrices, max(sizes, default=n), {part: (f / rows, b / rows) for part, (f, b) in flops},
        average, fixed_bytes=2 * one - two - held, row_bytes=(two - one) // rows,
        update_bytes=update - held, unit=unit, row=row,
        shape={"window": getattr(config, "window", 0)},
        stacks=(Stack((), config.n_layer, cache=cache),) if cache else (),
    )  # fmt: skip
