"""Run types: what binds a family to the trainer.

A run type is a dataclass of configs, each an option on the command line, that knows how to build
its model, open its data, and what to measure and show as it learns. The trainer knows none of them.
Those of pictures are in image_families.py, what all have in run.py. To add a family: its module, a
data set, and its run type, in FAMILIES; presets.py names runs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from data.pictures import save_grid
from tinyfm import generate, zero_shot
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.data import TextConfig, TextData
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.image_families import AutoencoderRun, DDPMRun, TextToImageRun
from tinyfm.pairs import PairConfig, PairData
from tinyfm.run import Run


@dataclass(frozen=True, kw_only=True)
class GPTRun(Run):
    """Pretrain a GPT on text."""

    model: GPTConfig = field(default_factory=GPTConfig)
    data: TextConfig = field(default_factory=TextConfig)

    family: ClassVar[str] = "gpt"

    def build_model(self) -> GPT:
        return GPT(self.model)

    def open_data(self) -> TextData:
        c = self.train
        return TextData.prepare(
            self.data, self.model.vocab_size, self.model.context_length, c.batch_size, c.seed
        )

    def show(self, model: GPT, data: TextData, folder: Path, step: int) -> str:
        """Write two texts from nothing to folder/step-NNNNNN.txt; return one of them."""
        tokenizer, length = data.tokenizer, min(100, model.config.context_length - 1)
        sampling = generate.Sampling(max_new_tokens=length, stop_tokens=(tokenizer.eot,))
        rows = generate.complete(model, [[tokenizer.eot]] * 2, sampling)
        texts = [tokenizer.decode(row) for row in rows]
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:06d}.txt"
        path.write_text("\n----\n".join(texts) + "\n", encoding="utf-8")
        return f"--- step {step} writes: " + " ".join(texts[0].split())[:300]


@dataclass(frozen=True, kw_only=True)
class CLIPRun(Run):
    """Align images with text, or images with themselves."""

    model: CLIPConfig = field(default_factory=CLIPConfig)
    data: PairConfig = field(default_factory=PairConfig)

    family: ClassVar[str] = "clip"
    TEMPLATES: ClassVar[str] = "templates.json"  # how the training captions are made of names
    QUICK: ClassVar[int] = 1000  # images that are enough to follow the training

    def build_model(self) -> CLIP:
        return CLIP(self.model)

    def open_data(self) -> PairData:
        m, c = self.model, self.train
        sizes = (m.image_size, m.channels, m.vocab_size, m.context_length)
        return PairData.prepare(self.data, *sizes, c.batch_size, c.seed)

    def write_files(self, folder: Path, data: PairData) -> None:
        super().write_files(folder, data)
        templates = json.dumps(zero_shot.find_templates(data.train))
        (folder / self.TEMPLATES).write_text(templates, encoding="utf-8")

    def score(self, model: CLIP, data: PairData) -> dict[str, float]:
        """Share of QUICK images of each held-out split whose name is found among the split's.

        With four captions a name; evaluate.py measures it in full. SimCLR, which has no texts:
        the share of which the nearest training image has the same name.
        """
        scores, simclr = {}, self.model.loss == "simclr"
        if simclr:
            known = zero_shot.embed_images(model, data.train.images)
        for name, split in list(data.splits.items())[1:]:
            rows = np.random.default_rng(0).permutation(len(split.labels))[: self.QUICK]
            labels = [split.labels[i] for i in np.sort(rows)]
            x = zero_shot.embed_images(model, split.images[np.sort(rows)])
            if simclr:
                near = zero_shot.classify(x, known).tolist()
                right = [data.train.labels[i] == label for i, label in zip(near, labels)]
            else:
                names, templates = sorted(set(split.labels)), zero_shot.find_templates(split)[:4]
                classes = zero_shot.class_vectors(model, data.tokenizer, names, templates)
                found = zero_shot.classify(x, classes).tolist()
                right = [names[i] == label for i, label in zip(found, labels)]
            key = f"{'neighbour' if simclr else 'zero_shot'} {name}"
            scores[re.sub(r"\W", "_", key)] = sum(right) / len(right)
        return scores

    def show(self, model: CLIP, data: PairData, folder: Path, step: int) -> str:
        """Write a grid of validation images with the names found; return the first few."""
        split, n = data.val, min(48, len(data.val.labels))
        rows = np.linspace(0, len(split.labels) - 1, n).astype(int)
        x = zero_shot.embed_images(model, split.images[rows])
        if self.model.loss == "simclr":
            names = data.train.labels
            classes = zero_shot.embed_images(model, data.train.images)
        else:
            names = sorted(set(split.labels))
            templates = zero_shot.find_templates(split)[:4]
            classes = zero_shot.class_vectors(model, data.tokenizer, names, templates)
        found = [names[i] for i in zero_shot.classify(x, classes).tolist()]
        folder.mkdir(exist_ok=True)
        images = split.images[rows].transpose(0, 2, 3, 1)
        save_grid(images, folder / f"step-{step:06d}.png", 8, found)
        pairs = [f"{split.labels[rows[i]]} -> {found[i]}" for i in range(0, n, max(1, n // 3))]
        return f"--- step {step} names: " + "; ".join(pairs[:3])


RUNS = (GPTRun, CLIPRun, AutoencoderRun, DDPMRun, TextToImageRun)
FAMILIES = {run.family: run for run in RUNS}
