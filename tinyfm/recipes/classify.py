"""Run types of classification: `python train.py PRESET --task classify` is a run of one of these.

Its model is a trunk of the preset's family, as that begins or as --init-from says, and a head for
each question (heads.py). What the classes are is in the data, and then in the run's config.json.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from tyro.conf import Suppress

from data import pictures
from data.labelled import SPLITS
from data.pictures import save_grid
from tinyfm.adapt import heads
from tinyfm.adapt.heads import Batch, Classifier, predictions
from tinyfm.batches import labelled
from tinyfm.batches.labelled import TaskConfig, TaskData
from tinyfm.common import files
from tinyfm.evaluate import likelihood, metrics, zero_shot
from tinyfm.evaluate.metrics import Scores
from tinyfm.recipes import base
from tinyfm.recipes.base import ImageRun, Run, print_shares

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
        return score(model, data.val_batches(self.train.batch_size))

    def guesses(self, model: Classifier, data: TaskData) -> tuple[np.ndarray, list[str]]:
        """Some held-out examples, and what the first head says of each, after what it is."""
        rows = np.linspace(0, len(data.labels[SPLITS[1]]) - 1, self.SHOWN).astype(int)
        found = heads.predictions(model, [data.read(SPLITS[1], rows)])
        (question, (probabilities, labels)), *_ = found.items()
        names = model.classes[question]
        pairs = zip(labels.tolist(), probabilities.argmax(1).tolist())
        return rows, [f"{names[i]} → {names[j]}" for i, j in pairs]


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


@torch.inference_mode()
def classify(opened: base.OpenRun, options) -> None:
    """The classes of the prompt, or of an image, and how probable each is."""
    run, model, reads_text = opened.run, opened.model, opened.tokenizer is not None
    given = options.prompt if reads_text else options.image
    if not (given or "").strip():
        flag = "--prompt TEXT" if reads_text else "--image FILE"
        raise ValueError(f"give what to tell the class of: {flag}")
    device = next(model.parameters()).device
    if reads_text:
        ids = opened.tokenizer.encode(given)[: run.model.context_length]
        tokens = torch.tensor([ids], device=device)
        batch = {"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}
    else:
        image = pictures.read(given, run.model.image_size, run.channels).transpose(2, 0, 1)[None]
        batch = {"images": torch.tensor(image, device=device) / 127.5 - 1}
    for question, found in model.predict(batch).items():
        if len(run.classes) > 1:
            print(f"{question}:")
        print_shares(dict(zip(run.classes[question], found[0].tolist())))


ASKED_TEXTS = 200  # held-out texts whose class a language model is asked


def tell_classes(opened: base.OpenRun, data: TaskData, shots: int = 0) -> Scores:
    """Accuracy and macro-F1 of a task's first question without training: a CLIP compares images
    with the names of classes, a GPT their likelihood, after `shots` labelled examples."""
    model, tokenizer, (train, held_out) = opened.model, opened.tokenizer, SPLITS
    names, truth = next(iter(data.classes.values())), data.labels[held_out][:, 0]
    if opened.run.base_family == "clip":
        templates = files.read_json(opened.folder / opened.run.TEMPLATES)
        x = zero_shot.embed_images(model, data.inputs[held_out])
        classes = zero_shot.class_vectors(model, tokenizer, names, templates)
        guesses = zero_shot.classify(x, classes, model.scale()).cpu().numpy()
    else:
        rows = np.random.default_rng(0).permutation(len(truth))[:ASKED_TEXTS]
        read = lambda split, i: tokenizer.decode(data.inputs[split][i].tolist())  # noqa: E731
        first = data.chosen[:shots]
        shown = [(read(train, i), names[data.labels[train][i, 0]]) for i in first]
        queries = [read(held_out, i) for i in rows]
        found = likelihood.classify(model, tokenizer, shown, queries, names, calibrate=True)
        guesses, truth = np.array([names.index(guess.label) for guess in found]), truth[rows]
    confusion = metrics.confusion_matrix(guesses, truth, len(names))
    return {"accuracy": float((guesses == truth).mean()), "macro_f1": metrics.macro_f1(confusion)}


def score(model: Classifier, batches: Iterable[Batch]) -> dict[str, float]:
    """metrics.classification of each question; where there are several, its name stands behind."""
    found = predictions(model, batches)
    return {
        name + f" {question}" * (len(found) > 1): value
        for question, (probabilities, labels) in found.items()
        for name, value in metrics.classification(probabilities, labels).items()
    }
