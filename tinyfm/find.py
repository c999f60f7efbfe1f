"""What sample.py asks of a CLIP run: which name fits an image, which images fit a text."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data import pictures
from tinyfm import records
from tinyfm.common import files
from tinyfm.evaluate import zero_shot
from tinyfm.tokenizer import Tokenizer, encode_captions


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


def tell_cut(tokenizer: Tokenizer, texts: Sequence[str], context_length: int) -> None:
    """Say, on stderr, of how many texts a tower of that length does not read the end."""
    _, cut = encode_captions(tokenizer, list(texts), context_length)
    if cut:
        of = f"{cut} of {len(texts)} texts" if len(texts) > 1 else "the text"
        print(f"{of} cut to {context_length} tokens; shorten what matters", file=sys.stderr)


def name_image(opened: records.OpenRun, image_file: str, labels: str) -> None:
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


def find_images(opened: records.OpenRun, prompt: str, n: int, out: str) -> None:
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
    opened: records.OpenRun, image_file: str, labels: str, prompt: str | None, n: int, out: str
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
