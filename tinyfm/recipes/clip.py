"""What sample.py asks of a CLIP run: which name fits an image, which images fit a text."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from data import pictures
from data.pictures import save_grid
from tinyfm.batches.pairs import PairConfig, PairData
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.common import files
from tinyfm.evaluate import zero_shot
from tinyfm.recipes import base
from tinyfm.recipes.base import Run, tell_cut
from tinyfm.recipes.classify import PictureClassifyRun


def read_labels(labels: str) -> list[str]:
    """The names of a list with commas, or of a file with a name a line. Raises ValueError."""
    text = labels.replace(",", "\n")
    if os.path.isfile(labels):  # unlike Path's, it takes a list of any length
        try:
            text = Path(labels).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{labels} is no text in UTF-8; give a name a line") from error
    names = [name.strip() for name in text.splitlines() if name.strip()]
    if not names:
        raise ValueError('there is no label: give names, --labels "digit seven, black chess queen"')
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the labels have {twice[0]!r} more than once; name each class once")
    return names


def name_image(opened: base.OpenRun, image_file: str, labels: str) -> None:
    """Print how probable each label is."""
    names, config = read_labels(labels), opened.model.config
    image = pictures.read(image_file, config.image_size, config.channels)
    x = zero_shot.embed_images(opened.model, image.transpose(2, 0, 1)[None])
    if len(names) < 2:
        raise ValueError(f"{names[0]!r} is the only label, and no file of them; give two or more")
    templates = files.read_json(opened.folder / opened.run.TEMPLATES)
    captions = [template.replace("{}", name) for template in templates for name in names]
    tell_cut(opened.tokenizer, captions, config.context_length)
    classes = zero_shot.class_vectors(opened.model, opened.tokenizer, names, templates)
    p = zero_shot.class_logits(x, classes, opened.model.scale()).softmax(-1)[0]
    for value, i in zip(*(part.tolist() for part in p.sort(descending=True))):
        print(f"{value:7.2%}  {names[i]}")


def find_images(opened: base.OpenRun, prompt: str, n: int, out: str) -> None:
    """Draw the n images of the run's data set that fit the prompt best, with their scores."""
    tell_cut(opened.tokenizer, [prompt], opened.model.config.context_length)
    splits = opened.run.open_data().splits.values()
    y = zero_shot.embed_texts(opened.model, opened.tokenizer, [prompt])
    x = torch.cat([zero_shot.embed_images(opened.model, split.images) for split in splits])
    best = (x @ y[0]).topk(min(n, len(x)))
    captions = [own[0] for split in splits for own in split.captions]
    images = np.concatenate([split.images for split in splits])[best.indices.cpu().numpy()]
    titles = [f"{s:.3f} {captions[i]}" for s, i in zip(*(part.tolist() for part in best))]
    images = images.transpose(0, 2, 3, 1)
    if n == 1:
        pictures.save(images[0], out)
    else:
        pictures.save_grid(images, out, min(8, len(images)), titles)
    print("\n".join(titles), out, sep="\n")


@torch.inference_mode()
def match(
    opened: base.OpenRun, image_file: str, labels: str, prompt: str | None, n: int, out: str
) -> None:
    """Name the image, or find n images for the prompt. Raises ValueError if neither is asked."""
    if opened.model.config.loss == "simclr":
        raise ValueError("this run learnt from images alone: it knows no names or captions")
    if bool(image_file) == bool(prompt) or (labels and not image_file):
        raise ValueError("give --image FILE with --labels, or --prompt with what to find")
    if image_file:
        name_image(opened, image_file, labels)
    else:
        find_images(opened, prompt, n, out)


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

    def get_ready(self, model: CLIP, data: PairData) -> None:
        model.n_pairs = len(data.train.labels)

    def score(self, model: CLIP, data: PairData) -> dict[str, float]:
        """Share of QUICK images of each held-out split whose name is found among the split's.

        With four captions a name; evaluate.py measures it in full. SimCLR, which has no texts:
        the share of which the nearest training image has the same name.
        """
        scores, simclr = {}, self.model.loss == "simclr"
        if simclr:
            known = zero_shot.image_features(model, data.train.images)[None]
        for name, split in list(data.splits.items())[1:]:
            rows = np.random.default_rng(0).permutation(len(split.labels))[: self.QUICK]
            labels = [split.labels[i] for i in np.sort(rows)]
            images = split.images[np.sort(rows)]
            if simclr:
                x = zero_shot.image_features(model, images)
                near = zero_shot.classify(x, known, model.scale()).tolist()
                right = [data.train.labels[i] == label for i, label in zip(near, labels)]
            else:
                x = zero_shot.embed_images(model, images)
                names, templates = sorted(set(split.labels)), zero_shot.find_templates(split)[:4]
                classes = zero_shot.class_vectors(model, data.tokenizer, names, templates)
                found = zero_shot.classify(x, classes, model.scale()).tolist()
                right = [names[i] == label for i, label in zip(found, labels)]
            key = f"{'neighbour' if simclr else 'zero_shot'} {name}"
            scores[re.sub(r"\W", "_", key)] = sum(right) / len(right)
        return scores

    def show(self, model: CLIP, data: PairData, folder: Path, step: int) -> str:
        """Write a grid of validation images with the names found; return the first few."""
        split, n = data.val, min(48, len(data.val.labels))
        rows = np.linspace(0, len(split.labels) - 1, n).astype(int)
        embed = zero_shot.embed_images
        if self.model.loss == "simclr":
            names, embed = data.train.labels, zero_shot.image_features
            classes = embed(model, data.train.images)[None]
        else:
            names = sorted(set(split.labels))
            templates = zero_shot.find_templates(split)[:4]
            classes = zero_shot.class_vectors(model, data.tokenizer, names, templates)
        x = embed(model, split.images[rows])
        found = [names[i] for i in zero_shot.classify(x, classes, model.scale()).tolist()]
        folder.mkdir(exist_ok=True)
        images = split.images[rows].transpose(0, 2, 3, 1)
        save_grid(images, folder / f"step-{step:06d}.png", 8, found)
        pairs = [f"{split.labels[rows[i]]} -> {found[i]}" for i in range(0, n, max(1, n // 3))]
        return f"--- step {step} names: " + "; ".join(pairs[:3])


@dataclass(frozen=True, kw_only=True)
class CLIPClassifyRun(PictureClassifyRun):
    model: CLIPConfig = field(default_factory=CLIPConfig)

    family: ClassVar[str] = "clip-classify"
    trunk_run: ClassVar[type[Run]] = CLIPRun


def sample_clip(opened: base.OpenRun, options) -> None:
    """Name an image, or find images for a prompt."""
    out = options.out or "found.png"
    match(opened, options.image, options.labels, options.prompt, options.n or 1, out)
