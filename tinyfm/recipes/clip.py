"""The recipe of CLIP: images with captions, or images alone (SimCLR), and classes of images."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from data import pictures, reading
from data.splits import TEST
from tinyfm.adapt.heads import Batch, Reader, count_places, in_places
from tinyfm.batches.labelled import TaskData
from tinyfm.batches.pair_files import Split
from tinyfm.batches.pairs import PairConfig, PairData
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.common import files
from tinyfm.evaluate import zero_shot
from tinyfm.recipes.base import (
    About,
    Answers,
    OpenRun,
    Preset,
    Run,
    Scores,
    free_name,
    write_step_file,
)
from tinyfm.recipes.pictures import (
    PictureClassifyRun,
    only_image,
    spread_rows,
    warn_if_cut,
    warn_if_unseen,
    write_words,
)
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig

# ---- pretraining --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CLIPRun(Run):
    """Align images with text, or images with themselves."""

    model: CLIPConfig = field(default_factory=CLIPConfig)
    data: PairConfig = field(default_factory=PairConfig)

    family: ClassVar[str] = "clip"
    SAMPLE_OPTIONS = frozenset({"prompt", "image", "labels", "n", "out"})
    QUESTIONS = ("task",)
    LOSS_ROWS = 0
    UNTRAINED = ("zero-shot",)
    ABOUT = About(
        task="zero-shot-image-classification",
        use="It compares pictures with texts: it names pictures of the kind that it was trained "
        "on, and finds them by a text.",
        limits="It always gives some name, also to pictures unlike those of its training, such as "
        "photographs.",
    )
    QUICK: ClassVar[int] = 1000  # images that are enough to follow the training

    def build_model(self) -> CLIP:
        return CLIP(self.model)

    def open_data(self) -> PairData:
        m = self.model
        sizes = (m.image_size, m.channels, m.vocab_size, m.context_length)
        return PairData.prepare(self.data, *sizes, self.train.batch_size, self.train.seed)

    def write_files(self, folder: Path, data: PairData) -> None:
        super().write_files(folder, data)
        templates = json.dumps(zero_shot.find_templates(data.train))
        (folder / zero_shot.TEMPLATES).write_text(templates, encoding="utf-8")
        if not self.init_from:  # the words of the base's captions are not known
            write_words(folder, data)

    def get_ready(self, model: CLIP, data: PairData) -> None:
        model.n_pairs = len(data.train.labels)

    def name_images(self, model: CLIP, data: PairData, split: Split, rows: np.ndarray) -> list[str]:
        """The name found for each image of `rows`: zero-shot among the split's names, with four
        captions a name; for SimCLR, which has no texts, the name of the nearest training image."""
        if self.model.loss == "simclr":
            names = data.train.labels
            classes = zero_shot.image_features(model, data.train.images)[None]
            x = zero_shot.image_features(model, split.images[rows])
        else:
            names = sorted(set(split.labels))
            templates = zero_shot.find_templates(split)[:4]
            classes = zero_shot.class_vectors(model, data.tokenizer, names, templates)
            x = zero_shot.embed_images(model, split.images[rows])
        return [names[i] for i in zero_shot.classify(x, classes, model.scale()).tolist()]

    def score(self, model: CLIP, data: PairData) -> Scores:
        """Share of QUICK validation images whose name is found.

        `measure` uses all images of the test splits, and all captions of a name.
        """
        kind = "neighbour" if self.model.loss == "simclr" else "zero_shot"
        labels = data.val.labels
        rows = np.sort(np.random.default_rng(0).permutation(len(labels))[: self.QUICK])
        found = self.name_images(model, data, data.val, rows)
        right = [name == labels[row] for name, row in zip(found, rows)]
        return {f"{kind}_val": sum(right) / len(right)}

    def show(self, model: CLIP, data: PairData, folder: Path, step: int) -> str:
        """Draw validation images with the names found; return the first few."""
        split = data.val
        n = min(48, len(split.labels))
        rows = spread_rows(len(split.labels), n)
        found = self.name_images(model, data, split, rows)
        images = split.images[rows].transpose(0, 2, 3, 1)
        write_step_file(
            folder, step, "png", lambda path: pictures.save_grid(images, path, 8, found)
        )
        pairs = [f"{split.labels[rows[i]]} -> {found[i]}" for i in range(0, n, max(1, n // 3))]
        return f"--- step {step} names: " + "; ".join(pairs[:3])

    def sample_form(self, options: Any) -> tuple[str, frozenset[str]]:
        if options.image:
            return "with --image", self.SAMPLE_OPTIONS - {"n", "out"}
        return "", self.SAMPLE_OPTIONS

    @torch.inference_mode()
    def sample(self, opened: OpenRun, options: Any) -> None:
        """Name --image among --labels, or find n images of the data set for --prompt."""
        if self.model.loss == "simclr":
            raise ValueError("this run learned from images alone: it knows no names or captions")
        if bool(options.image) == bool(options.prompt) or (options.labels and not options.image):
            raise ValueError("give --image FILE with --labels, or --prompt with what to find")
        if not options.adapter:  # an adapter may know further words
            given = read_labels(options.labels) if options.image else [options.prompt]
            warn_if_unseen(opened, given)
        if options.image:
            name_image(opened, only_image(options, "name"), options.labels)
        else:
            out = options.out or free_name("found.png")
            find_images(opened, options.prompt, options.n or 1, out)

    def can_draw(self) -> bool:
        return self.model.loss != "simclr"

    def measure(self, opened: OpenRun, model: CLIP, data: PairData, options: Any) -> Scores:
        """Zero-shot classification, retrieval, and probes of the features.

        --picture draws what the trained model confuses.
        """
        scores, found = zero_shot.clip_scores(model, opened.tokenizer, data)
        if options.picture and found and model is opened.model:
            split, guesses = list(found.items())[-1]
            shown = data.splits[split]
            captions = [own[0] for own in shown.captions]
            zero_shot.draw_confusions(
                shown.images, shown.labels, guesses, options.picture, captions
            )
        return scores

    def baselines(self, data: PairData) -> dict[str, Scores]:
        """The same probes of the raw pixels."""
        raw = {name: zero_shot.pixels(split.images) for name, split in data.splits.items()}
        return {"pixels": zero_shot.by_features(data, raw)}

    def classify_untrained(self, opened: OpenRun, data: TaskData, shots: int) -> Answers:
        """By the names of the classes, in the captions of the training data."""
        if shots:
            raise ValueError("--shots puts examples into a prompt, which CLIP does not read")
        model = opened.model
        names = next(iter(data.classes.values()))
        templates = files.read_record(opened.folder / zero_shot.TEMPLATES, list[str])
        x = zero_shot.embed_images(model, data.inputs[TEST])
        classes = zero_shot.class_vectors(model, opened.tokenizer, names, templates)
        guesses = zero_shot.classify(x, classes, model.scale())
        return Answers(guesses.cpu().numpy(), data.labels[TEST][:, 0], [])


# ---- sample.py ----------------------------------------------------------------------------------


def read_labels(labels: str) -> list[str]:
    """The names in a list with commas, or in a file with one name a line. Raises ValueError."""
    text = labels.replace(",", "\n")
    if os.path.isfile(labels):  # unlike Path.is_file, it takes a list of any length
        try:
            text, replaced = reading.read(Path(labels))
        except ValueError as error:
            raise ValueError(f"{labels} is no list of names ({error}); give one a line") from error
        if replaced:
            raise ValueError(f"{labels} has {replaced} invalid bytes; save it as UTF-8")
    names = [name.strip() for name in text.split("\n") if name.strip()]
    if not names:
        raise ValueError('there is no label: give names, --labels "digit seven, black chess queen"')
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"the labels have {repeated[0]!r} more than once; name each class once")
    return names


def name_image(opened: OpenRun, image_file: str, labels: str) -> None:
    """Print how probable each label is."""
    names = read_labels(labels)
    config = opened.model.config
    image = pictures.read(image_file, config.image_size, config.channels)
    x = zero_shot.embed_images(opened.model, image.transpose(2, 0, 1)[None])
    if len(names) < 2:
        raise ValueError(f"{names[0]!r} is the only label, and no file of labels; give two or more")
    templates = files.read_record(opened.folder / zero_shot.TEMPLATES, list[str])
    captions = [template.replace("{}", name) for template in templates for name in names]
    warn_if_cut(opened.tokenizer, captions, config.context_length)
    classes = zero_shot.class_vectors(opened.model, opened.tokenizer, names, templates)
    p = zero_shot.class_logits(x, classes, opened.model.scale()).softmax(-1)[0]
    values, order = p.sort(descending=True)
    for value, i in zip(values.tolist(), order.tolist()):
        print(f"{value:7.2%}  {names[i]}")


SHOWN = 500  # images between two moves of the progress bar


def embed_all(opened: OpenRun, data: PairData) -> Tensor:
    """Vectors (B, E) of all images of the data, split after split: computed once, then kept."""
    cache = opened.run.data.cache
    kept = zero_shot.vectors_folder(opened.model, data.fingerprint, cache)
    if not kept.exists():
        images = [
            split.images[i : i + SHOWN]
            for split in data.splits.values()
            for i in range(0, len(split.images), SHOWN)
        ]
        parts = tqdm(images, "embedding", unit=f" x {SHOWN} images", leave=False, disable=None)
        vectors = [zero_shot.embed_images(opened.model, part) for part in parts]
        zero_shot.write_vectors(kept, torch.cat(vectors))
    return zero_shot.read_vectors(kept, opened.model)


def find_images(opened: OpenRun, prompt: str, n: int, out: str) -> None:
    """Draw the n images of the run's data set that fit the prompt best, with their scores."""
    warn_if_cut(opened.tokenizer, [prompt], opened.model.config.context_length)
    data = opened.run.open_data()
    splits = data.splits.values()
    y = zero_shot.embed_texts(opened.model, opened.tokenizer, [prompt])
    x = embed_all(opened, data)
    scores, best = (x @ y[0]).topk(min(n, len(x)))
    captions = [own[0] for split in splits for own in split.captions]
    images = np.concatenate([split.images for split in splits])[best.cpu().numpy()]
    images = images.transpose(0, 2, 3, 1)  # (n, H, W, C)
    titles = [f"{s:.3f} {captions[i]}" for s, i in zip(scores.tolist(), best.tolist())]
    if n == 1:
        pictures.save(images[0], out)
    else:
        pictures.save_grid(images, out, min(8, len(images)), titles)
    print("\n".join(titles), out, sep="\n")


# ---- classification -----------------------------------------------------------------------------

GRID = 4  # rows and columns of places, at most


def patch_states(clip: CLIP, batch: Batch) -> Tensor:
    """States of the image tower before the projection: the class token's, then the patches' means
    over a coarse grid. images (B, C, H, W) -> (B, D)."""
    x = clip.image_tower.states(batch["images"])  # (B, P + 1, width of the tower)
    rows = clip.config.image_size // clip.config.patch_size
    patches = rearrange(x[:, 1:], "B (h w) D -> B D h w", h=rows)
    return torch.cat((x[:, 0], in_places(patches, GRID)), dim=1)


def patch_width(config: CLIPConfig) -> int:
    places = count_places(config.image_size // config.patch_size, GRID)
    return config.image_width * (1 + places)


@dataclass(frozen=True, kw_only=True)
class CLIPClassifyRun(PictureClassifyRun):
    """Classify pictures by a CLIP's image tower."""

    model: CLIPConfig = field(default_factory=CLIPConfig)

    family: ClassVar[str] = "clip-classify"
    trunk_run: ClassVar[type[Run]] = CLIPRun
    reader: ClassVar[Reader] = Reader(
        read=patch_states,
        inputs=("images",),
        width=patch_width,
        unread=("image_projection", "text_tower", "text_projection", "logit_scale", "logit_bias"),
    )


RUNS = (CLIPRun, CLIPClassifyRun)

PRESETS = {
    "clip": Preset(
        "images and captions in one space, on letters and symbols: ten minutes on two cores",
        CLIPRun(
            # A batch alone is soon too easy: further negatives, once weights move slowly.
            model=CLIPConfig(rivals="all", memory=2048, memory_after=1800),
            data=PairConfig(neighbours=16),  # similar pairs in a batch: harder, so it learns more
            optim=OptimConfig(lr=0.0042, muon_lr=0.007, warmup_steps=20, decay_fraction=0.6),
            train=TrainConfig(steps=3000, batch_size=256, eval_every=1000),
        ),
        usual="0.88, as one seed gave",
    ),
}
