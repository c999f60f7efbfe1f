"""What all run types have; families.py lists them, and says how to add one."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn
from tyro.conf import Suppress

from tinyfm import tokenizer
from tinyfm.adapt import AdapterConfig
from tinyfm.batches.pairs import ImageConfig, ImageData
from tinyfm.common import sheets
from tinyfm.common.seeds import row_generators
from tinyfm.tokenizer import Tokenizer, encode_captions
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


@dataclass(frozen=True)
class OpenRun:
    run: Run  # its configs
    model: nn.Module
    tokenizer: Tokenizer | None  # of a family that reads text
    folder: Path  # the checkpoint that was read
    meta: dict[str, Any]  # its step and scores
    weights: str  # "ema" or "model"


@dataclass(frozen=True)
class Preset:
    about: str
    run: Run
    usual: str = ""  # what a run of it reaches, as recorded in the README


def tell_cut(tokenizer: Tokenizer, texts: Sequence[str], context_length: int) -> None:
    """Say, on stderr, of how many texts a tower of that length does not read the end."""
    _, cut = encode_captions(tokenizer, list(texts), context_length)
    if cut:
        of = f"{cut} of {len(texts)} texts" if len(texts) > 1 else "the text"
        print(f"{of} cut to {context_length} tokens; shorten what matters", file=sys.stderr)


def print_shares(shares: dict[str, float]) -> None:
    """Names and their probabilities, the likeliest first."""
    for name, share in sorted(shares.items(), key=lambda pair: -pair[1]):
        print(f"{share:.4f}  {name}")


def write_png(sheet: sheets.Sheet, options) -> None:
    out = options.out or "sample.png"
    sheet.save(out)
    print(sheet.about, out, sep="\n")


@dataclass(frozen=True, kw_only=True)
class ImageRun(Run):
    """What all have: pictures in the size of the model; and no text, but for the last."""

    data: ImageConfig = field(default_factory=ImageConfig)

    def open_data(self) -> ImageData:
        m, c = self.model, self.train
        return ImageData.load(self.data, m.image_size, m.in_channels, c.batch_size, c.seed)

    def write_files(self, folder: Path, data: ImageData) -> None:
        """Nothing: config and weights are enough."""

    def read_tokenizer(self, folder: Path) -> None:
        return None

    @property
    def rows_at_once(self) -> int:
        return self.train.micro_batch_size or self.train.batch_size

    def parts_of_loss(self, model: nn.Module, data: ImageData) -> dict[str, float]:
        """Mean of what model.loss measures, over the same pictures and noise as val_loss."""
        device, sums, count = next(model.parameters()).device, Counter(), 0
        for batch in data.val_batches(self.rows_at_once):
            n = len(next(iter(batch.values())))
            generators = row_generators(self.train.seed, -1, range(count, count + n))
            _, metrics = model.loss({k: v.to(device) for k, v in batch.items()}, generators)
            sums.update({name: n * float(value) for name, value in metrics.items()})
            count += n
        return {name: total / count for name, total in sums.items()}

    def save(self, sheet: sheets.Sheet, folder: Path, step: int) -> str:
        """Write folder/step-NNNNNN.png; return a line on it."""
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:06d}.png"
        sheet.save(path)
        return f"--- step {step}: {sheet.about}: {path}"
