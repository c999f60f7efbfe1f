"""Classification, as all families share it: `python train.py PRESET --task classify`.

The model is a trunk of the preset's family, new or taken from --init-from, with one linear head for
each question (adapt/heads.py). The classes come from the data and are kept in the run's
config.json. Each family's recipe derives its run type from `ClassifyRun` and says how to read
features from its trunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from tyro.conf import Suppress

from data.splits import TEST, VAL
from tinyfm import tokenizer
from tinyfm.adapt.heads import Batch, Classifier, Reader, predictions
from tinyfm.batches import labelled
from tinyfm.batches.labelled import TaskConfig, TaskData
from tinyfm.evaluate import metrics
from tinyfm.recipes.base import (
    About,
    OpenRun,
    Run,
    Scores,
    print_shares,
    warn_if_longer,
    write_texts_file,
)

# Classes for a model that is built before its data are read, as by --dry-run.
PLACEHOLDER = {"label": ("yes", "no")}


@dataclass(frozen=True, kw_only=True)
class ClassifyRun(Run):
    """Classification. A subclass adds `model` and `trunk_run`, `reader` and `read_example`."""

    data: TaskConfig = field(default_factory=TaskConfig)
    task: str = "classify"
    classes: Suppress[dict[str, tuple[str, ...]]] = field(default_factory=dict)

    has_heads: ClassVar[bool] = True
    FACTS = (*Run.FACTS, "classes")
    trunk_run: ClassVar[type[Run]]  # the family's run type for pretraining
    reader: ClassVar[Reader]  # how to read features from its model
    LOSS_ROWS = 0  # small batches of neighbours would be from one file
    SHOWN: ClassVar[int] = 32  # examples in a sheet of guesses
    ABOUT = About(
        task="image-classification",
        use="It says which of its classes an example belongs to, with probabilities.",
        limits="It knows its classes alone, and always gives one of them, whatever the example. "
        "Examples of another kind than its training data have unknown results.",
    )

    def __post_init__(self):
        if self.adapt == "prompt":
            raise ValueError("--adapt prompt is for a model that writes: use lora, bias or head")

    @property
    def base_family(self) -> str:
        return self.trunk_run.family

    def build_model(self) -> Classifier:
        body = self.trunk_run.build_model(self)
        return Classifier(body, self.classes or PLACEHOLDER, self.reader)

    def trunk(self, model: Classifier, base: Run) -> nn.Module:
        return model.body

    def facts_of(self, data: TaskData) -> dict[str, Any]:
        return {"classes": data.classes}

    def score(self, model: Classifier, data: TaskData, split: str = VAL) -> Scores:
        """Accuracy, macro-F1 and calibration error of each question, on a split."""
        batches = data.split_batches(split, self.train.batch_size)
        return score_batches(model, batches, data.unit, data.clusters[split], data.cluster)

    def measure(self, opened: OpenRun, model: nn.Module, data: TaskData, options: Any) -> Scores:
        """The same on validation and on test."""
        scores = {}
        for split, name in ((VAL, "validation"), (TEST, "test")):
            for measure, value in self.score(model, data, split).items():
                scores[f"{name} {measure}"] = value
        return scores

    def guesses(self, model: Classifier, data: TaskData) -> tuple[np.ndarray, list[str]]:
        """Rows of some validation examples, and "true class → predicted class" of each."""
        rows = np.linspace(0, len(data.labels[VAL]) - 1, self.SHOWN).astype(int)
        found = predictions(model, [data.read(VAL, rows)])
        question = next(iter(found))
        probabilities, labels = found[question]
        names = model.classes[question]
        pairs = zip(labels.tolist(), probabilities.argmax(1).tolist())
        return rows, [f"{names[i]} → {names[j]}" for i, j in pairs]

    def read_example(self, opened: OpenRun, options: Any) -> dict[str, Tensor]:
        """The example that sample.py's options name, as a batch of one."""
        raise NotImplementedError

    @torch.inference_mode()
    def sample(self, opened: OpenRun, options: Any) -> None:
        """Print the classes of one example with their probabilities."""
        batch = self.read_example(opened, options)
        device = next(opened.model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        for question, found in opened.model.predict(batch).items():
            if len(self.classes) > 1:
                print(f"{question}:")
            print_shares(dict(zip(self.classes[question], found[0].tolist())))


@dataclass(frozen=True, kw_only=True)
class TextClassifyRun(ClassifyRun):
    """Classification of texts, which the model reads as tokens up to its context length."""

    SAMPLE_OPTIONS = frozenset({"prompt"})
    ABOUT = ClassifyRun.ABOUT._replace(task="text-classification")

    def open_data(self) -> TaskData:
        train = self.train
        own = tokenizer.ByteTokenizer()
        if self.data.tokenizer:
            own = tokenizer.load(self.data.tokenizer)
        length = self.model.context_length
        return labelled.texts(self.data, own, length, train.batch_size, train.seed)

    def show(self, model: Classifier, data: TaskData, folder: Path, step: int) -> str:
        """Write validation texts, each with its class and the predicted one."""
        rows, titles = self.guesses(model, data)
        texts = [data.tokenizer.decode(data.inputs[VAL][i].tolist()) for i in rows]
        write_texts_file(folder, step, [f"{t}\n{text}" for t, text in zip(titles, texts)])
        return f"--- step {step} finds: " + "; ".join(titles[:3])

    def read_example(self, opened: OpenRun, options: Any) -> dict[str, Tensor]:
        """The text of --prompt as a batch of one."""
        if not (options.prompt or "").strip():
            raise ValueError("give the text to classify: --prompt TEXT")
        warn_if_longer(opened, options.prompt)
        ids = opened.tokenizer.encode(options.prompt)[: self.model.context_length]
        tokens = torch.tensor([ids])
        return {"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}


def score_batches(
    model: Classifier,
    batches: Iterable[Batch],
    unit: str = "examples",
    clusters: Sequence[str] = (),
    cluster: str = "",
) -> Scores:
    """metrics.classification of each question, with its name appended if there are several.

    The intervals are over the clusters, see metrics.proportion.
    """
    found = predictions(model, batches)
    scores = {}
    for question, (probabilities, labels) in found.items():
        own = metrics.classification(probabilities, labels, unit, clusters, cluster)
        suffix = f" {question}" if len(found) > 1 else ""
        scores |= {name + suffix: value for name, value in own.items()}
    return scores


def score_untrained(opened: OpenRun, data: TaskData, shots: int = 0) -> Scores:
    """Scores of a model not trained on the task, on the test examples and its first question.

    With shots, also how many examples the prompts had on average, and the share of prompts without.
    """
    guesses, truth, fitted = opened.run.classify_untrained(opened, data, shots)
    classes = len(next(iter(data.classes.values())))
    counted_in = (data.unit, data.clusters[TEST], data.cluster)
    scores = {
        "accuracy": metrics.proportion(guesses == truth, *counted_in),
        "macro_f1": metrics.measured_f1(guesses, truth, classes, *counted_in),
    }
    if shots:
        scores[f"examples that fitted, of {shots}"] = float(np.mean(fitted))
        scores["prompts without an example"] = float(np.mean(np.array(fitted) == 0))
    return scores
