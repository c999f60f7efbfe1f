"""What the recipes of picture models share: pictures as data, sheets of pictures as output."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data import captioned, pictures
from data.report import Report, counted
from data.splits import TEST, TRAIN, VAL
from tinyfm.adapt.heads import Classifier, predictions
from tinyfm.batches import labelled
from tinyfm.batches.labelled import TaskConfig, TaskData
from tinyfm.batches.pairs import GLYPHS, ImageConfig, ImageData, PairData
from tinyfm.common import files
from tinyfm.common.seeds import row_generators
from tinyfm.common.sheets import Sheet
from tinyfm.evaluate import zero_shot
from tinyfm.recipes.base import OpenRun, Run, Scores, free_name, write_step_file
from tinyfm.recipes.classify import ClassifyRun
from tinyfm.tokenizer import Tokenizer, encode_captions


class NoTokenizer:
    """For run types without text: a checkpoint needs its config and weights alone."""

    def write_files(self, folder: Path, data: Any) -> None:
        """Add nothing."""

    def read_tokenizer(self, folder: Path) -> None:
        return None


def mean_metrics(run: Run, model: nn.Module, data: Any) -> Scores:
    """Mean of the metrics of model.loss, over the pictures and the noise that val_loss is from."""
    device = next(model.parameters()).device
    rows = run.train.micro_batch_size or run.train.batch_size
    sums = Counter()
    count = 0
    for batch in data.val_batches(rows):
        n = len(next(iter(batch.values())))
        generators = row_generators(run.train.seed, -1, range(count, count + n))
        _, metrics = model.loss({k: v.to(device) for k, v in batch.items()}, generators)
        sums.update({name: n * float(value) for name, value in metrics.items()})
        count += n
    return {name: total / count for name, total in sums.items()}


@dataclass(frozen=True, kw_only=True)
class ImageRun(NoTokenizer, Run):
    """Pretraining on pictures alone."""

    data: ImageConfig = field(default_factory=ImageConfig)

    def open_data(self) -> ImageData:
        m, train = self.model, self.train
        sizes = (m.image_size, m.in_channels)
        return ImageData.load(self.data, *sizes, train.batch_size, train.seed)

    def held_out_images(self, options: Any) -> Tensor:
        """n test pictures, 8 by default, that the --seed of sample.py draws: (n, C, H, W)."""
        test = self.open_data().test
        order = np.random.default_rng(options.sampling.seed).permutation(len(test.labels))
        return test.batch(order[: options.n or 8])["images"]


@dataclass(frozen=True, kw_only=True)
class PictureClassifyRun(NoTokenizer, ClassifyRun):
    """Classification of pictures."""

    data: TaskConfig = field(default_factory=lambda: TaskConfig(path="scripts"))

    SAMPLE_OPTIONS = frozenset({"image"})

    @property
    def channels(self) -> int:
        """Channels of a picture: 1 is grey, 3 is colour."""
        return getattr(self.model, "in_channels", 0) or self.model.channels

    def open_data(self) -> TaskData:
        size, train = self.model.image_size, self.train
        return labelled.pictures(self.data, size, self.channels, train.batch_size, train.seed)

    def show(self, model: Classifier, data: TaskData, folder: Path, step: int) -> str:
        """Draw validation pictures, each with its class and the predicted one."""
        rows, titles = self.guesses(model, data)
        images = data.inputs[VAL][rows].transpose(0, 2, 3, 1)
        write_step_file(
            folder, step, "png", lambda path: pictures.save_grid(images, path, 8, titles)
        )
        return f"--- step {step} finds: " + "; ".join(titles[:3])

    def can_draw(self) -> bool:
        return True

    def measure(self, opened: OpenRun, model: Classifier, data: TaskData, options: Any) -> Scores:
        """Scores on validation and on test. --picture draws what is confused on test, of the first
        question."""
        scores = super().measure(opened, model, data, options)
        if options.picture and model is opened.model:
            found = predictions(model, data.split_batches(TEST, self.train.batch_size))
            question, (probabilities, labels) = next(iter(found.items()))
            names = model.classes[question]
            truth = [names[i] for i in labels.tolist()]
            guesses = [names[i] for i in probabilities.argmax(1).tolist()]
            zero_shot.draw_confusions(data.inputs[TEST], truth, guesses, options.picture)
        return scores

    def read_example(self, opened, options) -> dict[str, Tensor]:
        """The picture of --image as a batch of one."""
        image = only_image(options, "classify")
        pixels = pictures.read(image, self.model.image_size, self.channels)
        images = torch.tensor(pixels.transpose(2, 0, 1)[None])
        return {"images": images / 127.5 - 1}


def only_image(options: Any, purpose: str) -> str:
    """The file of --image. Raises ValueError if it is not one."""
    if len(options.image) > 1:
        raise ValueError(f"--image has {len(options.image)} pictures: give one to {purpose}")
    if not options.image or not options.image[0].strip():
        raise ValueError(f"give the picture to {purpose}: --image FILE")
    return options.image[0]


# ---- parts that are trained first ---------------------------------------------------------------


def training_rows(run: Run) -> int:
    """Number of your own pictures that a run will train on, if all can be read.

    Raises ValueError if there are none, or none with the captions it needs.
    """
    listed = captioned.pairs(run.data.path, Report(), run.data.template)
    splits = captioned.choose_splits(listed, run.data.val_fraction)
    return list(splits.values()).count(TRAIN)


def halve_batch(part: Run) -> Run:
    """A part's run with its batch halved until your own pictures fill two of them.

    Raises ValueError as `training_rows` does.
    """
    if part.data.path in GLYPHS:
        return part
    rows = training_rows(part)
    batch_size = part.train.batch_size
    while batch_size > max(2, rows // 2):
        batch_size //= 2
    return replace(part, train=replace(part.train, batch_size=batch_size))


def check_rows(run: Run) -> None:
    """Raise ValueError if your own pictures do not fill a batch: before any part is trained."""
    if run.data.path in GLYPHS:
        return
    rows = training_rows(run)
    if 2 <= rows < run.train.batch_size:
        advice = f"use --train.batch-size <= {rows}, or add pairs"
        raise ValueError(
            f"{counted(rows, 'training pictures')}, {run.train.batch_size} in a batch: {advice}"
        )


def part_of(run: Run, option: str, usual: Run, model: dict[str, Any], data: dict[str, Any]) -> Run:
    """The run that trains a part of `run`: on the same pictures, device and seed, in OUT-OPTION.

    usual: the preset of the part. model, data: fields that differ from it. A run that is in that
    folder already is resumed, or used as it is if it is complete.
    """
    own = {name: getattr(run.data, name) for name in ("path", "color", "val_fraction", "cache")}
    train = {name: getattr(run.train, name) for name in ("seed", "device", "dtype")}
    out = f"{run.out}-{option}"
    part = replace(
        usual,
        model=replace(usual.model, **model),
        data=replace(usual.data, **own, **data),
        train=replace(usual.train, **train),
        out=out,
        resume=Path(out).exists(),
    )
    return part if run.dry_run else halve_batch(part)


# ---- output -------------------------------------------------------------------------------------


def save_step_sheet(sheet: Sheet, folder: Path, step: int) -> str:
    """Write folder/step-NNNNNN.png; return a line about it."""
    path = write_step_file(folder, step, "png", sheet.save)
    return f"--- step {step}: {sheet.about}: {path}"


def save_sheet(sheet: Sheet, options: Any) -> None:
    """Write the sheet to sample.py's --out, and print what it shows."""
    out = options.out or free_name("sample.png")
    sheet.save(out)
    print(sheet.about, out, sep="\n")


def spread_rows(count: int, n: int) -> np.ndarray:
    """n row numbers, evenly spread over 0 ... count - 1."""
    return np.linspace(0, count - 1, n).astype(int)


# ---- input --------------------------------------------------------------------------------------


def to_images(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, C) -> (1, C, H, W) in [-1, 1]."""
    return torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1


# ---- prompts ------------------------------------------------------------------------------------


def write_words(folder: Path, data: PairData) -> None:
    """Write WORDS into a checkpoint. Training reads the first caption of each picture."""
    captions = (captions[0] for captions in data.train.captions)
    words = zero_shot.words_of(captions, data.tokenizer)
    if len(words) <= zero_shot.MOST_WORDS:  # with more, hardly a word is new
        files.write_json(folder / zero_shot.WORDS, sorted(words))


def warn_if_unseen(opened: OpenRun, texts: Sequence[str]) -> None:
    """Name on stderr the words of the texts that no caption of the run's training data has."""
    unseen = zero_shot.unseen_words(opened.folder, opened.tokenizer, texts)
    if unseen:
        words = ", ".join(repr(word) for word in unseen)
        print(f"no training caption has {words}", file=sys.stderr)


def warn_if_cut(tokenizer: Tokenizer, texts: Sequence[str], context_length: int) -> None:
    """Say on stderr how many texts are longer than the text tower can read."""
    _, cut = encode_captions(tokenizer, list(texts), context_length)
    if not cut:
        return
    which = f"{cut} of {len(texts)} texts" if len(texts) > 1 else "the text"
    print(f"{which} cut to {context_length} tokens; shorten what matters", file=sys.stderr)
