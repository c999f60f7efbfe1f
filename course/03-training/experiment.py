"""What do Muon, a falling learning rate and an average of the weights each bring?

One small model learns bytes of Python's language reference, with the repository's Trainer: once
with AdamW for all weights, once with Muon for its matrices, both with a rate that falls at the end;
and once more with Muon and a rate that stays at its peak, with a moving average beside it.
"""

import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch

from tinyfm.batches.order import shuffle
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.training.optim import OptimConfig, lr_factor
from tinyfm.training.trainer import TrainConfig, Trainer

LENGTH = 64  # bytes of a row
ROWS = 24
STEPS = 320
EVERY = 20  # steps between two measurements
HALF_LIFE = 15.0  # of the average, in steps
RUNS = {
    "adamw_falling": {"optimizer": "adamw"},
    "muon_falling": {},
    "muon_constant": {"decay_fraction": 0.0, "ema_half_life": HALF_LIFE},
}
LABELS = {
    "adamw_falling": "AdamW, falling rate",
    "muon_falling": "Muon, falling rate",
    "muon_constant": "Muon, constant rate",
    "muon_averaged": "Muon, constant rate, averaged weights",
}
UNITS = dict.fromkeys(LABELS, "nats per byte")
VARIANTS = ("rates x 1", "rates x 0.5", "rates x 2", "rates x 0.25")  # factor on the peak rates


class Topics:
    """Rows of bytes of the topics of help(); each tenth topic is held out."""

    unit = "bytes"
    units_per_row = LENGTH

    def __init__(self, seed: int):
        self.seed = seed
        names = sorted(topics)
        held_out = names[::10]
        learnt = [name for name in names if name not in held_out]
        self.train = self.windows(learnt)  # (M, LENGTH + 1)
        self.val = self.windows(held_out)[::4]

    @staticmethod
    def windows(names: list[str]) -> torch.Tensor:
        text = "\n".join(topics[name] for name in names).encode()
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        return tokens.unfold(0, LENGTH + 1, LENGTH)

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        samples = np.arange(ROWS)[rows] + step * ROWS
        return {"tokens": self.train[shuffle(samples, len(self.train), self.seed)]}


@torch.no_grad()
def val_loss(trainer: Trainer) -> float:
    trainer.model.eval()
    loss, _ = trainer.model.loss({"tokens": trainer.data.val})
    trainer.model.train()
    return loss.item()


def train(name: str, seed: int, factor: float) -> dict[str, list[float]]:
    """Validation loss, every EVERY steps, of the weights and, if there is one, of their average."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(256, LENGTH, n_layer=2, n_head=2, d_model=64))
    rates = {"lr": 3e-3 * factor, "muon_lr": 0.02 * factor}
    optim = OptimConfig(**rates, **RUNS[name])
    settings = TrainConfig(STEPS, ROWS, ROWS // 2, seed, device="cpu", dtype="float32")
    trainer = Trainer(model, Topics(seed), settings, optim, Path())
    curve = [val_loss(trainer)]
    averaged = list(curve)
    said = time.monotonic()
    for step in range(STEPS):
        trainer.update(step)
        if (step + 1) % EVERY == 0:
            curve.append(val_loss(trainer))
            with trainer.averaged():
                averaged.append(val_loss(trainer))
        if time.monotonic() - said > 10:
            said = time.monotonic()
            print(f"{LABELS[name]}: step {step + 1} of {STEPS}, {curve[-1]:.2f} nats", flush=True)
    return {name: curve, "muon_averaged": averaged} if trainer.ema else {name: curve}


def measure(seed: int, variant: str) -> dict:
    factor = float(variant.split()[-1])
    curves = {}
    for name in RUNS:
        curves |= train(name, seed, factor)
    result = {name: curve[-1] for name, curve in curves.items()}
    for name, curve in curves.items():
        result[f"{name}_curve"] = curve
    return result


def draw(figure, results: list[dict]) -> None:
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps = list(range(0, STEPS + 1, EVERY))
    for i, name in enumerate(LABELS):
        for j, result in enumerate(results):
            label = LABELS[name] if j == 0 else None
            dashes = "--" if name == "muon_averaged" else "-"
            curve = result[f"{name}_curve"]
            loss.plot(steps, curve, dashes, color=f"C{i}", label=label, linewidth=1.2)
    loss.set_ylabel("validation loss\n[nats per byte]")
    loss.set_ylim(1.6, 3.0)
    loss.legend(loc="upper right")
    rows = "one line a seed" if len(results) > 1 else "one seed"
    loss.set_title(f"Two optimizers, two schedules, one average ({rows})", loc="left")
    shapes = {"falling": ("C1", {}), "constant": ("C2", {"decay_fraction": 0.0})}
    for label, (colour, options) in shapes.items():
        factors = [lr_factor(step, STEPS, OptimConfig(**options)) for step in range(STEPS)]
        rate.plot(range(STEPS), factors, color=colour, label=label)
    rate.set_ylabel("rate\n[of peak]")
    rate.set_ylim(0, 1.1)
    rate.set_xlim(0, STEPS)
    rate.set_xlabel("training step")
