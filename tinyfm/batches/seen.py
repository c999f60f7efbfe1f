"""Pictures with texts about them -> batches, for a GPT that sees.

A row is a picture and one text: a caption, or a question and its answer.

    END picture ... picture latin small letter a END
    END picture ... picture is it bold? yes END

END is the tokenizer's end-of-text token, and a picture takes as many places as the model says. Only
what the model is to write counts in the loss: the caption or the answer, and the END behind it.

The pictures are those of pairs.py, with their splits. Of the glyphs the caption is the name alone,
and the questions are about the rest (data/glyphs.py). Your own pictures have captions alone. Of
the episodes (data/episodes.py) the question is the mission, and the answer an action:

    END picture ... picture go to the red ball forward END

Which picture and which question a row has is a function of (seed, step). Validation and test read
the captions, or the actions.

Legend: B batch, T tokens of a row less one, C channels, H W rows and columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from data.report import counted
from data.splits import TRAIN
from tinyfm.batches.chat import Row, collate
from tinyfm.batches.order import fixed_order
from tinyfm.batches.pair_files import Split
from tinyfm.batches.pairs import EPISODES, GLYPHS, PairConfig, PairData
from tinyfm.batches.text import fixed_tokenizer
from tinyfm.common.config import DataPath

CAPTION = "caption"


@dataclass(frozen=True)
class SeenConfig(PairConfig):
    """Which pictures to read, and how many questions to ask about them."""

    # glyphs, letters, episodes (what a robot sees, and what it does), or your own: a folder of
    # images, a .csv, a .jsonl or "shards-{000..009}.tar"
    path: DataPath = "glyphs"
    questions: float = 0.25  # share of the rows that ask a question; the others are captions
    val_images: int = 1000  # number of held-out pictures that an evaluation reads

    neighbours: ClassVar[int] = 1  # similar rows in a batch are harder for CLIP alone

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.questions < 1:
            raise ValueError(
                f"--data.questions {self.questions}: it must be 0 or above, and below 1"
            )
        if self.val_images < 1:
            raise ValueError(f"--data.val-images {self.val_images}: it must be at least 1")


class Question(NamedTuple):
    """What is asked about each of the n pictures of a split."""

    name: str
    prompts: Sequence[str]  # (n,), "" for a caption
    answers: Sequence[str]  # (n,)


def questions_of(path: str, split: Split) -> list[Question]:
    """The questions about the pictures of a split; the first one is what the data are for."""
    nothing = [""] * len(split.labels)
    firsts = [own[0] for own in split.captions]
    if path == EPISODES:
        return [Question("action", firsts, [own[1] for own in split.captions])]
    if path not in GLYPHS:
        return [Question(CAPTION, nothing, firsts)]
    from data import glyphs  # here, as it loads font libraries, which only the drawings need

    found = [glyphs.answers(*pair) for pair in zip(firsts, split.labels)]
    asked = [
        Question(text, [text] * len(found), [answers[text] for answers in found])
        for text in found[0]
    ]
    return [Question(CAPTION, nothing, split.labels), *asked]


def spaced(prompt: str, answer: str) -> str:
    """An answer as it is written behind its question: with a space between them."""
    return f" {answer}" if prompt else answer


def commonest(question: Question) -> str:
    """The answer that most pictures have."""
    return Counter(question.answers).most_common(1)[0][0]


class SeenData(PairData):
    """Batches of pictures, each with a caption or with a question and its answer.

    questions: {split: its questions}, the same ones in each split.
    """

    config: SeenConfig
    image: list[int]  # the places of a picture
    room: int  # tokens for the text of a row, END not counted
    questions: dict[str, list[Question]]

    @classmethod
    def load(cls, config: SeenConfig, model: Any, batch_size: int, seed: int) -> SeenData:
        """Open the pictures of `config`, as a model reads them: `model` is a VisionGPTConfig.

        They are prepared first if they have not been before. Raises ValueError as PairData.prepare
        does, and if a question leaves no room for its answer.
        """
        length = model.gpt.context_length - model.image_tokens
        ids = model.gpt.vocab_size - 1  # the last one is for pictures
        fixed = fixed_tokenizer(config.tokenizer)
        if fixed and fixed.vocab_size > ids:
            needed = fixed.vocab_size + 1
            raise ValueError(
                f"the tokenizer has {fixed.vocab_size} tokens, the model {ids + 1} with one for "
                f"pictures: set --model.gpt.vocab-size {needed}; for --init-from a GPT, train that "
                f"with --model.vocab-size {needed}"
            )
        sizes = (model.image_size, model.channels, ids, length)
        data = cls.prepare(config, *sizes, batch_size, seed)
        data.config = config
        data.image = [model.image_id] * model.image_tokens
        data.room = length - 1
        data.questions = {
            name: questions_of(config.path, split) for name, split in data.splits.items()
        }
        data._encode(model.gpt.context_length)
        return data

    def _encode(self, context_length: int) -> None:
        """Keep the token ids of each different text."""
        texts = set()
        for asked in self.questions.values():
            for question in asked:
                for prompt, answer in zip(question.prompts, question.answers):
                    texts |= {prompt, spaced(prompt, answer)}
        known = sorted(texts)
        self.ids = dict(zip(known, self.tokenizer.encode_batch(known)))
        for question in self.questions[TRAIN]:
            longest = max(question.prompts, key=lambda prompt: len(self.ids[prompt]))
            used = len(self.ids[longest])
            if used >= self.room:
                raise ValueError(
                    f"the question {longest!r} has {counted(used, 'tokens')}, and beside a picture "
                    f"the context has room for {self.room}: set --model.gpt.context-length "
                    f"{context_length + used + 1 - self.room} or more"
                )

    @property
    def longest(self) -> int:
        """The most tokens that a text has, END included."""
        return min(max(map(len, self.ids.values())), self.room) + 1

    def row(self, prompt: str, answer: str) -> Row:
        """The token ids of a picture with this text, cut to the context."""
        end = self.tokenizer.eot
        start = [end, *self.image, *self.ids[prompt]]
        written = self.ids[spaced(prompt, answer)][: self.room - len(self.ids[prompt])]
        ids = np.array([*start, *written, end])
        return Row(ids, np.arange(len(ids)) >= len(start))

    def read(self, split: str, index: np.ndarray, kinds: np.ndarray) -> dict[str, Tensor]:
        """The pictures `index` (B,) of a split, each with the question number kinds[i]:

        {"images": float32 (B, 1, C, H, W) in [-1, 1], "tokens": int64 (B, T + 1),
         "mask": bool (B, T), True for the targets that count}
        """
        asked = [self.questions[split][kind] for kind in kinds]
        rows = [self.row(q.prompts[i], q.answers[i]) for i, q in zip(index, asked)]
        images = self.splits[split].batch(index)["images"][:, None]
        return {"images": images, **collate(rows, self.tokenizer.eot)}

    def kinds_of(self, step: int) -> np.ndarray:
        """The number of the question of each row of the global batch of `step`, int64 (B,)."""
        others = len(self.questions[TRAIN]) - 1
        draw = np.random.default_rng((self.seed, step)).random(self.batch_size)
        share = self.config.questions
        if not others or not share:
            return np.zeros(self.batch_size, dtype=np.int64)
        return np.where(draw < share, 1 + (draw / share * others).astype(np.int64), 0)

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """`rows` of the global batch of `step`, with the fields of `read`."""
        return self.read(TRAIN, self.rows_of(step, rows), self.kinds_of(step)[rows])

    def split_batches(self, name: str, rows: int) -> Iterator[dict[str, Tensor]]:
        """`val_images` pictures of a split with the first question, in an order that never
        changes."""
        split = self.split(name)
        order = fixed_order(len(self.splits[split].labels))[: self.config.val_images]
        for first in range(0, len(order), rows):
            index = order[first : first + rows]
            yield self.read(split, index, np.zeros(len(index), dtype=np.int64))
