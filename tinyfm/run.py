"""What all run types have; families.py lists them, and says how to add one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn
from tyro.conf import Suppress

from tinyfm import tokenizer
from tinyfm.adapt import AdapterConfig
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run type adds `model` and `data` configs, build_model, open_data and show."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    out: str = ""  # run directory; runs/PRESET if not given
    resume: bool = False  # go on from the last checkpoint in it
    dry_run: bool = False  # print the config and what it costs, and stop
    task: str = ""  # classify, or chat: rather than pretrain, learn this
    init_from: str = ""  # a run to begin from: its base, of which it has weights, sizes, tokenizer
    # what to train of it: all, low-rank changes, biases and norms, the head, or soft prompts
    adapt: Literal["full", "lora", "bias", "head", "prompt"] = "full"
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    base_hash: Suppress[str] = ""  # of the weights it began from

    family: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ("model", "data", "optim", "train")
    facts: ClassVar[tuple[str, ...]] = ("init_from", "base_hash", "adapt", "adapter")  # if given
    needs: ClassVar[dict[str, str]] = {}  # runs its model is made of: option -> preset

    @property
    def base_family(self) -> str:
        """Of the run it may begin from."""
        return self.family

    def trunk(self, model: nn.Module) -> nn.Module:
        """The part of the model that its base is."""
        return model

    def fit(self, data: Any) -> Run:
        """The run with what only the data can tell of the model, such as classes."""
        return self

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
