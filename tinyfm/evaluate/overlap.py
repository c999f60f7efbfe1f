"""How much of the held-out text has training read? The command

    python -m tinyfm.evaluate overlap RUN     what a run holds out, against what it was trained on
    python -m tinyfm.evaluate overlap DATA    the same for docs, passages, stdlib, chats, packages,
                                              films and the like, your text, glyphs, letters, and
                                              your folder of pictures

prints the share of validation and test words that lie in a run of 13 words which training also has;
data/splits.py defines and counts it. A run has also read what the runs before it were trained on:
the one it started from (--init-from), and so on, and its teacher. Each is a line, and so are all
together. Of a chat the answers count. Most are shorter than 13 words, so their share that occurs
word for word in the training text of the runs before stands beside it.

Of pictures it prints how many of each held-out split are near to a training picture of the same
name, see data/near.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.report import Report, counted
from data.splits import HELD_OUT, TRAIN, Overlap, share_of
from tinyfm.adapt.soft_prompt import PromptedData
from tinyfm.batches import chat, labelled, text
from tinyfm.batches.masked import MaskedData
from tinyfm.batches.permuted import PermutedData
from tinyfm.batches.preference import PairData, PromptData
from tinyfm.batches.spans import SpanData
from tinyfm.batches.text_pairs import TextPairData
from tinyfm.tokenizer import ByteTokenizer

PICTURE_SIZE = 32  # rows and columns in which pictures are compared
ANY_VOCABULARY = 1 << 30  # no model is there that would limit it
WITH_TEXTS = (
    chat.ChatData, labelled.TaskData, PairData, PromptData, TextPairData, text.TextData,
)  # fmt: skip
MIN_WORDS = 4  # of an answer; shorter ones, such as "x, y", occur anywhere
NAMES = {"val": "validation", "test": "test"}


# ---- data -> texts -------------------------------------------------------------------------------


def has_pictures(path: str) -> bool:
    """Whether a path is a folder with pictures."""
    from data import captioned, pictures  # here, as texts need no Pillow

    folder = Path(path).expanduser()
    if not folder.is_dir():
        return False
    found = captioned.files_below(folder, Report())
    return any(file.suffix.lower() in pictures.suffixes() for file in found)


def open_named(path: str) -> Any:
    """The data of this name or path; labelled texts and chats only by name.

    Texts are bytes here, except for those that data/prepare.py has encoded.
    """
    tokenizer = ByteTokenizer()
    if path in chat.SOURCES:
        return chat.ChatData(chat.ChatConfig(path), tokenizer, 10_000, batch_size=1, seed=0)
    if path in labelled.TEXTS:
        return labelled.texts(labelled.TaskConfig(path), tokenizer, 10_000, batch_size=1, seed=0)
    if path in ("glyphs", "letters") or has_pictures(path):
        from tinyfm.batches.pairs import GLYPHS, ImageConfig, ImageData

        channels = 1 if path in GLYPHS else 3
        return ImageData.load(ImageConfig(path), PICTURE_SIZE, channels, batch_size=1, seed=0)
    config = text.TextConfig(path)
    if not text.is_prepared(path):
        config = text.TextConfig(path, tokenizer="bytes")
    return text.TextData.prepare(config, ANY_VOCABULARY, 1, batch_size=1, seed=0)


def read_rows(data: Any, split: str) -> Iterator[list[int]]:
    """The token ids of each document, passage, prompt or source of a split, or of each row's
    answers; those of a pair with its prompt."""
    if isinstance(data, chat.ChatData):
        for row in data.split(split).rows:
            yield row.ids[row.trained].tolist()
    elif isinstance(data, labelled.TaskData):
        for ids in data.inputs[split]:
            yield ids.tolist()
    elif isinstance(data, TextPairData):
        for ids in data.splits[split].sources:
            yield ids[:-1].tolist()
    elif isinstance(data, PairData):
        for row in data.splits[split]:
            yield row.chosen[1:-1]
            yield row.rejected[1:-1]
    elif isinstance(data, PromptData):
        for ids in data.splits[split]:
            yield ids[1:]
    else:
        for ids in data.split(split).documents():
            yield ids.tolist()


def read_texts(data: Any, split: str) -> Iterator[str]:
    """The text of each of `read_rows`; answers end with a new line.

    Raises ValueError for pictures.
    """
    if not isinstance(data, WITH_TEXTS) or data.tokenizer is None:
        raise ValueError("overlap compares texts, and these data are pictures")
    for ids in read_rows(data, split):
        texts = [[]]
        for token in ids:
            if token == data.tokenizer.eot:
                texts.append([])
            else:
                texts[-1].append(token)
        yield "\n".join(data.tokenizer.decode(own) for own in texts)


# ---- pictures ------------------------------------------------------------------------------------


def has_images(data: Any) -> bool:
    """Whether these are data of pictures, with or without captions."""
    return hasattr(getattr(data, "train", None), "images")


def measure_images(data: Any) -> tuple[dict[str, int], str]:
    """How many pictures of each held-out split are near to a training picture of the same name, and
    a line about it."""
    from tinyfm.batches import pair_files

    return pair_files.near_training(data.splits), pair_files.describe_near(data.splits)


def plain_data(data: Any) -> Any:
    """The data behind a soft prompt, and the text of which batches hide a part."""
    if isinstance(data, PromptedData):
        data = data.data
    if isinstance(data, (MaskedData, PermutedData, SpanData)):
        data = data.text
    return data


# ---- the shares ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """What training has of one held-out split."""

    split: str  # "validation" or "test"
    units: int  # documents, passages, or rows of conversations
    runs: dict[str, float]  # training text -> share of words in runs that it has
    # Training text of the runs before -> share of answers that it has word for word.
    answers: dict[str, float]


def repeated(answers: list[str], training: list[str]) -> float:
    """The share of answers of MIN_WORDS or more that occur in training text, word for word."""
    long = {" ".join(answer.split()) for answer in answers if len(answer.split()) >= MIN_WORDS}
    read = " ".join(" ".join(training).split())
    return sum(answer in read for answer in long) / max(1, len(long))


def measure(data: Any, trained_on: dict[str, Any]) -> list[Shares]:
    """The shares of each held-out split of `data`.

    trained_on: name -> data whose training split was read; the first are `data` themselves.
    """
    data = plain_data(data)
    trained_on = {name: plain_data(source) for name, source in trained_on.items()}
    is_chat = isinstance(data, chat.ChatData)
    held_out = {split: list(read_texts(data, split)) for split in HELD_OUT}
    overlaps = {split: Overlap(texts) for split, texts in held_out.items()}
    together = {split: np.zeros_like(overlap.found) for split, overlap in overlaps.items()}
    found = {split: Shares(NAMES[split], len(held_out[split]), {}, {}) for split in HELD_OUT}
    for i, (name, source) in enumerate(trained_on.items()):
        kept = []  # the text, to look for answers in it
        for overlap in overlaps.values():
            overlap.found[:] = False
        for text_read in read_texts(source, TRAIN):
            for overlap in overlaps.values():
                overlap.read(text_read)
            if i and is_chat:
                kept.append(text_read)
        for split, overlap in overlaps.items():
            found[split].runs[name] = share_of(overlap.count())
            together[split] |= overlap.found
            if i and is_chat:
                said = [answer for row in held_out[split] for answer in row.split("\n")]
                found[split].answers[name] = repeated(said, kept)
    if len(trained_on) > 1:
        for split, overlap in overlaps.items():
            overlap.found = together[split]
            found[split].runs["all of them"] = share_of(overlap.count())
    return list(found.values())


def describe(shares: list[Shares]) -> str:
    """A line for each split and training text."""
    lines = ["share of held-out words in 13-word runs that training also has"]
    for own in shares:
        for name, share in own.runs.items():
            texts = counted(own.units, "texts")
            line = f"{own.split} ({texts}), training text of {name}: {share:.2%}"
            if name in own.answers:
                line += f"; {own.answers[name]:.1%} of the answers word for word"
            lines.append(line)
    return "\n".join(lines)
