"""The cost of training a module of this repository: memory, FLOPs, and a line that sums them up.

Published systems are counted from closed forms (systems.py). A module is measured instead
(trace.py), and `measured` turns the measurement into a Network, so that memory.py and report.py
treat the two alike. Every function here is given a model; none looks one up by name.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from data.report import counted
from tinyfm.calc import memory, trace
from tinyfm.calc.ledgers import Stack
from tinyfm.calc.memory import Layout, Training
from tinyfm.calc.network import MeasuredModule
from tinyfm.common import device as devices
from tinyfm.common import gpus, units
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig


@dataclass(frozen=True)
class TrainingCost:
    """The cost of training for one process that holds the whole model."""

    parameters: int  # a tied head counts once
    learnt: int  # those that are trained; the others are frozen
    parameter_bytes: int  # float32 weights
    gradient_bytes: int  # float32
    optimizer_bytes: int  # AdamW keeps two float32 numbers a parameter, Muon one
    average_bytes: int  # float32 moving average of the weights, if one is kept
    flops_per_step: int  # forward and backward of the whole batch, 2 a multiply-add; 0 = unknown

    @property
    def state_bytes(self) -> int:
        """All bytes but those of activations."""
        weights = self.parameter_bytes + self.gradient_bytes + self.average_bytes
        return weights + self.optimizer_bytes


def training_cost(model: nn.Module, optim: OptimConfig, batch_size: int) -> TrainingCost:
    """The cost of training `model`, on any device, with batches of batch_size rows.

    FLOPs come from model.flops_per_row(), or are measured with model.example_batch(rows). A model
    with neither has unknown FLOPs: 0.
    """
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    optimizer_bytes, moving_average_bytes = trace.average_bytes(model, optim)
    flops = 0
    if hasattr(model, "flops_per_row"):
        flops = batch_size * model.flops_per_row()
    elif hasattr(model, "example_batch"):
        by_part = trace.count_flops(model, batch_size).values()
        flops = sum(forward + backward for forward, backward in by_part)
    return TrainingCost(
        parameters=sum(p.numel() for p in parameters),
        learnt=sum(p.numel() for p in trained),
        parameter_bytes=sum(p.nbytes for p in parameters),
        gradient_bytes=sum(p.nbytes for p in trained),
        optimizer_bytes=optimizer_bytes,
        average_bytes=moving_average_bytes,
        flops_per_step=flops,
    )


def micro_batch(model: nn.Module, train: TrainConfig, world: int = 1) -> tuple[int, bool]:
    """(rows of a forward pass, whether a step has several), as the trainer divides a batch.

    world: number of processes.
    """
    batch = train.batch_size // world
    takes_whole_batch = getattr(model, "whole_batch", False)
    rows = batch if takes_whole_batch else min(train.micro_batch_size or batch, batch)
    return rows, rows < batch


def processes() -> int:
    """Number of processes that train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def predict_peak(model: nn.Module, optim: OptimConfig, train: TrainConfig) -> tuple[int, str]:
    """(bytes of tensors at the peak of a step, how the step is run in words), as the trainer does.

    The device is the one in `train`. If this machine does not have it, as in a dry run for another
    machine, the CPU is used instead.
    """
    try:
        device = devices.choose_device(train.device)
        dtype = devices.choose_dtype(train.dtype, device)
    except ValueError:
        device = trace.CPU
        dtype = devices.choose_dtype("auto", device)
    rows, several = micro_batch(model, train, processes())
    at_once = min(train.micro_batch_size, rows)
    peak = max(trace.step_bytes(model, optim, rows, several, at_once, device, dtype))
    return (
        peak,
        f"{counted(at_once or rows, 'rows')} at once in {str(dtype).removeprefix('torch.')}",
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of the device in FLOP/s, or None if it is unknown."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    gpu = gpus.by_driver_name(torch.cuda.get_device_name(device))
    if gpu is None or "bf16" not in gpu.peaks:
        return None
    return gpu.peak("bf16")


@dataclass(frozen=True)
class Forecast:
    """What one process needs to train a run."""

    cost: TrainingCost
    peak_bytes: int  # tensors at the peak of a step; 0 = unknown
    how: str  # how a step is run, such as "8 rows at once in bfloat16"
    flops: int  # of all steps; 0 = unknown
    seconds: float  # on this machine, evaluations and checkpoints not counted; 0 = unknown

    def __str__(self) -> str:
        cost = self.cost
        line = f"{cost.parameters:,} parameters"
        if cost.learnt < cost.parameters:
            line += f", {cost.learnt:,} of them trained"
        state = f"{units.size(cost.state_bytes)} for weights, gradients and optimizer"
        if self.peak_bytes:
            line += f"; predicted: a peak of {units.size(self.peak_bytes)} of tensors, {state}"
        else:
            line += f"; {state}, plus activations"
        if self.how:
            line += f", with {self.how}"
        if self.flops:
            line += f"; {self.flops:.3g} FLOP"
        if self.seconds:
            line += f", about {units.duration(self.seconds)}"
        return line


# The part of the speed of a large matrix product that training reaches on a CPU: 0.26 to 0.38 for
# the presets, as benchmarks/README.md records their times. So the predicted time is a rough one.
SHARE_OF_PRODUCT_SPEED = 1 / 3


def forecast(model: nn.Module, optim: OptimConfig, train: TrainConfig) -> Forecast:
    """Predict the cost of training for one process.

    The peak of memory is predicted if the model has example_batch(rows), on the device of `train`.
    The time is predicted if that device is at hand. Raises what the model raises.
    """
    cost = training_cost(model, optim, train.batch_size)
    peak = 0
    how = ""
    if hasattr(model, "example_batch"):
        peak, how = predict_peak(model, optim, train)
    flops = cost.flops_per_step * train.steps
    seconds = 0.0
    with contextlib.suppress(ValueError):  # a device that is not at hand
        device = devices.choose_device(train.device)
        speed = devices.product_speed(device, devices.choose_dtype(train.dtype, device))
        seconds = flops / processes() / (SHARE_OF_PRODUCT_SPEED * speed)
    return Forecast(cost, peak, how, flops, seconds)


def describe(model: nn.Module, optim: OptimConfig, train: TrainConfig) -> str:
    """One line on the cost of training. A failed prediction is reported in it: it stops no run."""
    try:
        return str(forecast(model, optim, train))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"the cost of training cannot be predicted ({reason})"


def data_unit(model: nn.Module) -> tuple[str, int]:
    """(the unit in which the model's data are counted, units in a row), such as ("token", 256)."""
    unit = getattr(model, "unit", "row")
    if unit == "token":
        return unit, model.config.context_length
    return unit, 1


def measured(
    name: str,
    model: nn.Module,
    optim: OptimConfig,
    rows: int = 1,
    accumulate: bool = False,
    at_once: int = 0,
    dtype: torch.dtype = torch.float32,
) -> MeasuredModule:
    """Measure a module, as trained with micro-batches of `rows` rows and products in `dtype`.

    accumulate and at_once are those of trace.step_bytes. The peak of a step is measured for `rows`
    rows and for twice as many, and a line is drawn through the two. The part of it beyond weights,
    gradients and averages counts as activations.
    """
    rows = max(2, rows)  # a contrastive loss needs two rows to compare
    n = sum(p.numel() for p in model.parameters())
    matrices = trace.muon_parameters(model, optim)
    frozen = trace.count_parts(model, frozen=True)
    _, average = trace.average_bytes(model, optim)

    # Memory: weights, gradients and averages; then the line of the peaks.
    training = Training(dtype="fp32", optimizer=optim.optimizer)
    state = memory.state_memory(n, training, Layout(), matrices, sum(frozen.values()))
    held = state.total + average
    peak, update = trace.step_bytes(model, optim, rows, accumulate, at_once, dtype=dtype)
    peak_of_twice, _ = trace.step_bytes(model, optim, 2 * rows, accumulate, at_once, dtype=dtype)

    flops = {
        part: (forward / rows, backward / rows)
        for part, (forward, backward) in trace.count_flops(model, rows).items()
    }
    unit, units_per_row = data_unit(model)
    stacks = ()
    if hasattr(model.config, "n_kv_head"):  # a decoder, which caches keys and values
        config = model.config
        stacks = (Stack((), config.n_layer, cache=2 * config.G * config.K),)
    return MeasuredModule(
        name=name,
        parts=trace.count_parts(model),
        frozen=frozen,
        parameters=n,
        non_embedding=n - table_parameters(model),
        matrices=matrices,
        largest_block=largest_block(model),
        flops=flops,
        average=average,
        fixed_bytes=2 * peak - peak_of_twice - held,
        row_bytes=(peak_of_twice - peak) // rows,
        update_bytes=update - held,
        unit=unit,
        row=units_per_row,
        shape={"window": getattr(model.config, "window", 0)},
        stacks=stacks,
    )


def table_parameters(model: nn.Module) -> int:
    """Parameters of the embedding tables and of the head, a tied one once."""
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    if hasattr(model, "head"):
        tables.append(model.head)
    return sum(p.numel() for p in {p for table in tables for p in table.parameters()})


def largest_block(model: nn.Module) -> int:
    """Parameters of the largest child of an nn.ModuleList; of the model, if it has no such list."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    sizes = [sum(p.numel() for p in block.parameters()) for blocks in lists for block in blocks]
    if not sizes:
        return sum(p.numel() for p in model.parameters())
    return max(sizes)
