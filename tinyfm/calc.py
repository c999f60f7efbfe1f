"""What a model will cost, before it runs: parameters, FLOPs and bytes of its training.

Counted from the very module that trains, built on the meta device, where tensors have shapes but
no memory. Bytes are of one process that holds everything; GiB = 2^30 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tinyfm.optim import OptimConfig, hidden_matrices
from tinyfm.trainer import TrainConfig


@dataclass(frozen=True)
class TrainingCost:
    parameters: int  # numbers that are learnt; a tied head counts once
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
    n = sum(p.numel() for p in model.parameters())
    hidden = sum(p.numel() for p in hidden_matrices(model)) if optim.optimizer == "muon" else 0
    flops = batch_size * model.flops_per_row()
    optimizer, average = 4 * (2 * n - hidden), 4 * n if optim.ema_half_life else 0
    return TrainingCost(n, 4 * n, 4 * n, optimizer, average, flops)


def describe(model: nn.Module, optim: OptimConfig, train: TrainConfig) -> str:
    cost = training_cost(model, optim, train.batch_size)
    gib = cost.state_bytes / 2**30
    return (
        f"{cost.parameters:,} parameters; {gib:.2f} GiB for weights, gradients and optimizer, "
        f"activations come on top; {cost.flops_per_step / 1e12:.3g} TFLOP a step, "
        f"{cost.flops_per_step * train.steps:.3g} FLOP in all"
    )
