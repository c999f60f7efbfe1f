"""Run types of classification: `python train.py PRESET --task classify` is a run of one of these.

Its model is a trunk of the preset's family, as that begins or as --init-from says, and a head for
each question (heads.py). What the classes are is in the data, and then in the run's config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from tyro.conf import Suppress

from data.labelled import SPLITS
from data.pictures import save_grid
from tinyfm import tokenizer
from tinyfm.adapt import heads
from tinyfm.adapt.heads import Classifier
from tinyfm.autoencoder import AutoencoderConfig
from tinyfm.batches import labelled
from tinyfm.batches.labelled import TaskConfig, TaskData
from tinyfm.clip import CLIPConfig
from tinyfm.ddpm import DiffusionConfig
from tinyfm.gpt import GPTConfig
from tinyfm.image_families import AutoencoderRun, CLIPRun, DDPMRun, ImageRun
from tinyfm.run import Run
from tinyfm.text_families import GPTRun

SOME = {"label": ("yes", "no")}  # what a run is measured with whose data were not read yet


@dataclass(frozen=True, kw_only=True)
class ClassifyRun(Run):
    """Tell classes apart: what all have."""

    data: TaskConfig = field(default_factory=TaskConfig)
    task: str = "classify"
    classes: Suppress[dict[str, tuple[str, ...]]] = field(default_factory=dict)

    facts: ClassVar[tuple[str, ...]] = (*Run.facts, "classes")
    trunk_run: ClassVar[type[Run]]
    SHOWN: ClassVar[int] = 32

    def __post_init__(self):
        if self.adapt == "prompt":
            raise ValueError("--adapt prompt is for a model that writes: use lora, bias or head")

    @property
    def base_family(self) -> str:
        return self.trunk_run.family

    def build_model(self) -> Classifier:
        return Classifier(self.trunk_run.build_model(self), self.classes or SOME)

    def trunk(self, model: Classifier):
        return model.body

    def fit(self, data: TaskData) -> ClassifyRun:
        return replace(self, classes=data.classes)

    def score(self, model: Classifier, data: TaskData) -> dict[str, float]:
        """Accuracy, macro-F1 and calibration error of each question's answers."""
        return heads.score(model, data.val_batches(self.train.batch_size))

    def guesses(self, model: Classifier, data: TaskData) -> tuple[np.ndarray, list[str]]:
        """Some held-out examples, and what the first head says of each, after what it is."""
        rows = np.linspace(0, len(data.labels[SPLITS[1]]) - 1, self.SHOWN).astype(int)
        found = heads.predictions(model, [data.read(SPLITS[1], rows)])
        (question, (probabilities, labels)), *_ = found.items()
        names = model.classes[question]
        pairs = zip(labels.tolist(), probabilities.argmax(1).tolist())
        return rows, [f"{names[i]} → {names[j]}" for i, j in pairs]


@dataclass(frozen=True, kw_only=True)
class GPTClassifyRun(ClassifyRun):
    model: GPTConfig = field(default_factory=GPTConfig)

    family: ClassVar[str] = "gpt-classify"
    trunk_run: ClassVar[type[Run]] = GPTRun

    def open_data(self) -> TaskData:
        m, c, saved = self.model, self.train, self.data.tokenizer
        own = tokenizer.load(saved) if saved else tokenizer.ByteTokenizer()
        return labelled.texts(self.data, own, m.context_length, c.batch_size, c.seed)

    def show(self, model: Classifier, data: TaskData, folder: Path, step: int) -> str:
        """Write some held-out texts with their classes, and what was found; return the first."""
        rows, pairs = self.guesses(model, data)
        texts = [data.tokenizer.decode(data.inputs[SPLITS[1]][i].tolist()) for i in rows]
        folder.mkdir(exist_ok=True)
        lines = [f"{pair}\n{text}" for pair, text in zip(pairs, texts)]
        path = folder / f"step-{step:06d}.txt"
        path.write_text("\n----\n".join(lines) + "\n", encoding="utf-8")
        return f"--- step {step} finds: " + "; ".join(pairs[:3])


@dataclass(frozen=True, kw_only=True)
class PictureClassifyRun(ClassifyRun):
    """What those of pictures have."""

    data: TaskConfig = field(default_factory=lambda: TaskConfig(path="scripts"))

    write_files, read_tokenizer = ImageRun.write_files, ImageRun.read_tokenizer

    @property
    def channels(self) -> int:
        """Of a picture."""
        return getattr(self.model, "in_channels", 0) or self.model.channels

    def open_data(self) -> TaskData:
        size, c = self.model.image_size, self.train
        return labelled.pictures(self.data, size, self.channels, c.batch_size, c.seed)

    def show(self, model: Classifier, data: TaskData, folder: Path, step: int) -> str:
        """Draw some held-out pictures with their classes, and what was found."""
        rows, pairs = self.guesses(model, data)
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:06d}.png"
        save_grid(data.inputs[SPLITS[1]][rows].transpose(0, 2, 3, 1), path, 8, pairs)
        return f"--- step {step} finds: " + "; ".join(pairs[:3])


@dataclass(frozen=True, kw_only=True)
class CLIPClassifyRun(PictureClassifyRun):
    model: CLIPConfig = field(default_factory=CLIPConfig)

    family: ClassVar[str] = "clip-classify"
    trunk_run: ClassVar[type[Run]] = CLIPRun


@dataclass(frozen=True, kw_only=True)
class AutoencoderClassifyRun(PictureClassifyRun):
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)

    family: ClassVar[str] = "autoencoder-classify"
    trunk_run: ClassVar[type[Run]] = AutoencoderRun


@dataclass(frozen=True, kw_only=True)
class DDPMClassifyRun(PictureClassifyRun):
    model: DiffusionConfig = field(default_factory=DiffusionConfig)

    family: ClassVar[str] = "ddpm-classify"
    trunk_run: ClassVar[type[Run]] = DDPMRun
