"""Pictures with texts about them -> batches, for a GPT that sees.

A row is a picture and one text: a caption, or a question and its answer.

    END [picture] latin small letter a END
    END [picture] is it bold? yes END

END is the tokenizer's end-of-text token, and a picture takes as many places as the model says. Only
what the model is to write counts in the loss: the caption or the answer, and the END behind it.

The pictures are those of pairs.py, with their splits. Of the glyphs the caption is the name alone,
and the questions are about the rest (data/glyphs.py). Your own pictures have captions alone. Of
the episodes (data/episodes.py) the question is the mission, and the answer an action:

    END [picture] go to the red ball forward END

With `pictures` above 1, pictures and texts alternate (Alayrac et al. 2022, Flamingo). One question
is about all pictures of a row, and half of such rows leave its words out. So the texts of the first
pictures are examples, from which the model has to see what is asked:

    END [picture] serif END [picture] mono END [picture] serif END

A share `compare` of the rows asks whether two pictures are alike, and half of the answers are yes:

    END [picture] [picture] same family? no END

Which pictures and which question a row has is a function of (seed, step). Validation and test read
the captions, or the actions.

Legend: B batch, I pictures of a row, T tokens of a row less one, C channels, H W rows and columns.
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
from tinyfm.batches.order import fixed_order, shuffle_runs
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
    pictures: int = 1  # pictures of a row, each followed by its text
    compare: float = 0.0  # share of the rows that ask whether two glyphs are alike
    val_images: int = 1000  # number of held-out pictures that an evaluation reads

    neighbours: ClassVar[int] = 1  # similar rows in a batch are harder for CLIP alone

    def __post_init__(self):
        super().__post_init__()
        shares = {"questions": self.questions, "compare": self.compare}
        for name, share in shares.items():
            if not 0 <= share < 1:
                raise ValueError(f"--data.{name} {share}: it must be 0 or above, and below 1")
        if sum(shares.values()) > 1:
            both = f"--data.questions {self.questions} and --data.compare {self.compare}"
            raise ValueError(f"{both} are more than all rows: use smaller shares")
        if self.compare and self.path not in GLYPHS:
            raise ValueError(
                f"--data.compare asks about glyphs and letters, not about {self.path}: leave it out"
            )
        if self.pictures < 1:
            raise ValueError(f"--data.pictures {self.pictures}: it must be at least 1")
        if self.val_images < 1:
            raise ValueError(f"--data.val-images {self.val_images}: it must be at least 1")

    @property
    def most_pictures(self) -> int:
        """I: the pictures of a batch's rows. Rows with fewer places for them read the first."""
        return max(self.pictures, 2 if self.compare else 1)


class Question(NamedTuple):
    """What is asked about each of the n pictures of a split."""

    name: str
    prompts: Sequence[str]  # (n,), "" for a caption
    answers: Sequence[str]  # (n,)


class Comparison:
    """A question about two pictures of a split: are they alike? Its answer is yes or no."""

    def __init__(self, name: str, values: Sequence[str]):
        """values (n,): equal for pictures that are alike."""
        self.name = name
        _, self.groups, self.counts = np.unique(values, return_inverse=True, return_counts=True)
        self.starts = np.cumsum(self.counts) - self.counts
        self.order = np.argsort(self.groups, kind="stable")  # of the pictures, group by group
        self.places = np.argsort(self.order)  # of each picture in that order

    def partners(self, index: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Another picture for each of `index` (B,), int64.

        draws (B, 2), in [0, 1): below 0.5 the first asks for a picture that is alike, and the
        second chooses one, each as likely. Where none is left to choose, it is one of the others.
        """
        group = self.groups[index]
        start, count = self.starts[group], self.counts[group]
        unlike = len(self.groups) - count
        is_alike = (draws[:, 0] < 0.5) & (count > 1) | (unlike == 0)
        # In the order as a ring, the rest of the group stands behind a picture, or all that are
        # unlike stand behind its group.
        turn = self.places[index] - start + 1 + (draws[:, 1] * (count - 1)).astype(np.int64)
        beyond = start + count + (draws[:, 1] * unlike).astype(np.int64)
        place = np.where(is_alike, start + turn % count, beyond % len(self.groups))
        return self.order[place]

    def has_like(self, index: np.ndarray) -> np.ndarray:
        """Whether another picture is alike, bool (B,). Where it is so, half of the answers are
        yes."""
        return self.counts[self.groups[index]] > 1

    def answer(self, one: int, other: int) -> str:
        return "yes" if self.groups[one] == self.groups[other] else "no"


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


def comparisons_of(split: Split) -> list[Comparison]:
    """The questions about two glyphs of a split."""
    from data import glyphs  # here, as it loads font libraries, which only the drawings need

    found = [glyphs.compared(own[0], name) for own, name in zip(split.captions, split.labels)]
    return [Comparison(name, [values[name] for values in found]) for name in found[0]]


def spaced(prompt: str, answer: str) -> str:
    """An answer as it is written behind its question: with a space between them."""
    return f" {answer}" if prompt else answer


def commonest(answers: Sequence[str]) -> str:
    """The answer that most pictures have."""
    return Counter(answers).most_common(1)[0][0]


class Said(NamedTuple):
    """The text behind a picture."""

    prompt: str  # "" for a caption, or where examples say what is asked
    answer: str

    def __str__(self) -> str:
        return self.prompt + spaced(*self)


class Exam(NamedTuple):
    """What is asked about n pictures of a split."""

    images: np.ndarray  # uint8 (n, I, C, H, W)
    texts: list[list[str]]  # (n, I): behind each picture; the last one is to be continued
    answers: list[str]  # (n,), what is right


class SeenData(PairData):
    """Batches of pictures, each with a caption or with a question and its answer.

    questions, comparisons: {split: those about it}, the same ones in each split. Their number is
    the place in the first list, and behind it in the second.
    """

    config: SeenConfig
    image: list[int]  # the places of a picture
    room: int  # tokens for the text of a picture, END not counted
    questions: dict[str, list[Question]]
    comparisons: dict[str, list[Comparison]]

    @classmethod
    def load(cls, config: SeenConfig, model: Any, batch_size: int, seed: int) -> SeenData:
        """Open the pictures of `config`, as a model reads them: `model` is a VisionGPTConfig.

        They are prepared first if they have not been before. Raises ValueError as PairData.prepare
        does, and if a picture or a question leaves no room for its answer.
        """
        context, most = model.gpt.context_length, config.most_pictures
        length = context // most - model.image_tokens  # the pictures share the context evenly
        if length < 2:
            raise ValueError(
                f"{counted(most, 'pictures')} of {model.image_tokens} tokens leave no room for "
                f"texts in a context of {context}: set --model.gpt.context-length "
                f"{most * (model.image_tokens + 2)} or more, or fewer --data.pictures"
            )
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
        data.comparisons = {
            name: comparisons_of(split) if config.compare else []
            for name, split in data.splits.items()
        }
        data._encode(context)
        return data

    def _encode(self, context_length: int) -> None:
        """Keep the token ids of each different text."""
        texts = set()
        for asked in self.questions.values():
            for question in asked:
                for said in map(Said, question.prompts, question.answers):
                    texts |= {said.prompt, spaced(*said), said.answer}
        prompts_of = [question.prompts for question in self.questions[TRAIN]]
        for comparison in self.comparisons[TRAIN]:
            texts |= {comparison.name, " yes", " no"}
            prompts_of.append([comparison.name])
        known = sorted(texts)
        self.ids = dict(zip(known, self.tokenizer.encode_batch(known)))
        for prompts in prompts_of:
            longest = max(prompts, key=lambda prompt: len(self.ids[prompt]))
            used = len(self.ids[longest])
            if used >= self.room:
                short = self.config.most_pictures * (used + 1 - self.room)
                raise ValueError(
                    f"the question {longest!r} has {counted(used, 'tokens')}, and beside a picture "
                    f"the context has room for {self.room}: set --model.gpt.context-length "
                    f"{context_length + short} or more"
                )

    @property
    def longest(self) -> int:
        """The most tokens that a text has, END included."""
        return min(max(map(len, self.ids.values())), self.room) + 1

    @property
    def names(self) -> list[str]:
        """The questions and the comparisons, by their numbers."""
        return [asked.name for asked in (*self.questions[TRAIN], *self.comparisons[TRAIN])]

    # ---- rows -----------------------------------------------------------------------------------

    def said(self, split: str, index: np.ndarray, kind: int, told: bool) -> list[Said | None]:
        """The texts behind the pictures `index` (I,) of a row, None for no text.

        kind: number of the question or comparison. told: whether the question is written.
        """
        asked = self.questions[split]
        if kind < len(asked):
            question = asked[kind]
            shown = index[: self.config.pictures]
            return [Said(question.prompts[i] if told else "", question.answers[i]) for i in shown]
        comparison = self.comparisons[split][kind - len(asked)]
        return [None, Said(comparison.name, comparison.answer(*index[:2]))]

    def row(self, texts: Sequence[Said | None]) -> Row:
        """The token ids of pictures with these texts, each cut to its room."""
        end = self.tokenizer.eot
        ids, trained = [end], [False]
        for said in texts:
            start, written = self.image, []
            if said:
                prompt = self.ids[said.prompt]
                start = [*self.image, *prompt]
                written = [*self.ids[spaced(*said)][: self.room - len(prompt)], end]
            ids += [*start, *written]
            trained += [False] * len(start) + [True] * len(written)
        return Row(np.array(ids), np.array(trained))

    def read(
        self, split: str, index: np.ndarray, kinds: np.ndarray, told: np.ndarray
    ) -> dict[str, Tensor]:
        """The pictures `index` (B, I) of a split, each row with the question number kinds[i], in
        words where told[i]:

        {"images": float32 (B, I, C, H, W) in [-1, 1], "tokens": int64 (B, T + 1),
         "mask": bool (B, T), True for the targets that count}
        """
        rows = [self.row(self.said(split, *each)) for each in zip(index, kinds, told)]
        images = self.splits[split].batch(index.reshape(-1))["images"].unflatten(0, index.shape)
        return {"images": images, **collate(rows, self.tokenizer.eot)}

    # ---- training -------------------------------------------------------------------------------

    def rows_of(self, step: int, rows: slice) -> np.ndarray:
        """Indices, int64 (B, pictures), of the training pictures in `rows` of the batch of `step`.

        An epoch shows each picture once.
        """
        samples = np.arange(self.batch_size, dtype=np.int64)[rows] + step * self.batch_size
        samples = samples[:, None] * self.config.pictures + np.arange(self.config.pictures)
        return shuffle_runs(samples, len(self.train.labels), self.seed, self.neighbours)

    def kinds_of(self, step: int) -> np.ndarray:
        """What each row of the global batch of `step` asks: the number of a question or comparison,
        int64 (B,)."""
        draws = np.random.default_rng((self.seed, step)).random(self.batch_size)
        questions, comparisons = self.questions[TRAIN][1:], self.comparisons[TRAIN]
        shares = [self.config.questions / len(questions) for _ in questions]
        shares += [self.config.compare / len(comparisons) for _ in comparisons]
        kinds = 1 + np.searchsorted(np.cumsum(shares), draws, side="right")
        return np.where(kinds > len(shares), 0, kinds)

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """`rows` of the global batch of `step`, with the fields of `read`."""
        kinds = self.kinds_of(step)[rows]
        draws = np.random.default_rng((self.seed, step, 1)).random((self.batch_size, 3))[rows]
        told = (kinds == 0) | (self.config.pictures == 1) | (draws[:, 2] < 0.5)
        index = self.rows_of(step, rows)
        spare = self.config.most_pictures - self.config.pictures
        index = np.pad(index, ((0, 0), (0, spare)), mode="edge")
        for kind, comparison in enumerate(self.comparisons[TRAIN], len(self.questions[TRAIN])):
            own = kinds == kind
            index[own, 1] = comparison.partners(index[own, 0], draws[own, :2])
        return self.read(TRAIN, index, kinds, told)

    # ---- validation and test --------------------------------------------------------------------

    def split_batches(self, name: str, rows: int) -> Iterator[dict[str, Tensor]]:
        """`val_images` pictures of a split with the first question, in an order that never
        changes."""
        split = self.split(name)
        order = fixed_order(len(self.splits[split].labels))[: self.config.val_images]
        for first in range(0, len(order), rows):
            index = order[first : first + rows, None]
            kinds = np.zeros(len(index), dtype=np.int64)
            yield self.read(split, index, kinds, np.ones(len(index), dtype=bool))

    def asked(self, split: str, kind: int, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """(the pictures, int64 (n, I), that question number `kind` is about; what is right).

        rows (n,): one picture of each. A comparison's other picture is always the same.
        """
        index = rows[:, None]
        number = kind - len(self.questions[split])
        if number >= 0:
            comparison = self.comparisons[split][number]
            draws = np.random.default_rng(0).random((len(comparison.groups), 2))
            index = np.stack((rows, comparison.partners(rows, draws[rows])), axis=1)
        return index, [self.said(split, own, kind, True)[-1].answer for own in index]

    def exam(self, split: str, kind: int, rows: np.ndarray, shots: int = 0) -> Exam:
        """What is asked about the pictures `rows` (n,) of a split by question number `kind`.

        shots: training pictures with their answers in front, in place of the question's words.
        """
        index, answers = self.asked(split, kind, rows)
        images = self.splits[split].images[index]
        texts = []
        for own in index:
            *before, last = self.said(split, own, kind, not shots)
            texts.append([*("" for _ in before), last.prompt])
        if shots:
            n = len(self.splits[split].labels)
            random = np.random.default_rng(0)
            index = random.integers(len(self.train.labels), size=(n, shots))[rows]
            images = np.concatenate((self.train.images[index], images), axis=1)
            for own, text in zip(index, texts):
                text[:0] = map(str, self.said(TRAIN, own, kind, False))
        return Exam(images, texts, answers)
