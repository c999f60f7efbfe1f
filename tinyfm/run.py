"""What all run types have; families.py lists them, and says how to add one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from tinyfm import tokenizer
from tinyfm.optim import OptimConfig
from tinyfm.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run type adds `model` and `data` configs, build_model, open_data and show."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    out: str = ""  # run directory; runs/PRESET if not given
    resume: bool = False  # go on from the last checkpoint in it
    dry_run: bool = False  # print the config and what it costs, and stop

    family: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ("model", "data", "optim", "train")
    needs: ClassVar[dict[str, str]] = {}  # runs its model is made of: option -> preset

    def write_files(self, folder: Path, data: Any) -> None:
        """Add to a checkpoint what its model needs beside weights, here the tokenizer."""
        data.tokenizer.save(folder)

    def read_tokenizer(self, folder: Path) -> tokenizer.Tokenizer | None:
        """That of a checkpoint; None for a family that reads no text."""
        return tokenizer.load(folder)

    def score(self, model: nn.Module, data: Any) -> dict[str, float]:
        """Numbers beside the validation loss, at each evaluation; the first sums up the run, unless
        it is a part of that loss, named val_loss_..."""
        return {}

    def get_ready(self, model: nn.Module, data: Any) -> None:
        """Once the model has its weights, before training or evaluation: what data need of it."""
