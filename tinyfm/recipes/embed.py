"""Embedders for search: `python train.py encoder|gpt --task embed --init-from RUN`.

The body of the base learns vectors of questions and passages (adapt/embedder.py). Each family's
recipe derives its run type from `EmbedRun` and says how to read features from its body.

In training, MRR@10 is measured among the passages of the validation split, as there are few.
evaluate searches all passages for the questions of the test split: by the vectors, by words (BM25),
and by both joined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data.splits import HELD_OUT, TEST, TRAIN, VAL
from tinyfm import tokenizer
from tinyfm.adapt.embedder import Embedder, EmbedderConfig
from tinyfm.adapt.heads import Batch, Reader, read_rows
from tinyfm.batches.questions import QuestionConfig, QuestionData
from tinyfm.evaluate.metrics import Measured, ratio_of_sums
from tinyfm.recipes.base import About, OpenRun, Run, Scores, write_texts_file
from tinyfm.retrieval import BM25, add_scores, nearest, reciprocal_rank

DEEP = 100  # passages of each ranking that are joined
TOP = 10  # passages that are looked at, in MRR@10
WEIGHTS = (2.0, 5.0, 10.0, 15.0, 20.0, 30.0)  # of a cosine beside a BM25 score, to choose from
SHOWN = 8  # questions in a sample


def read_vectors(
    model: Embedder, rows: Sequence[Sequence[int]], width: int = 0, at_once: int = 32
) -> Tensor:
    """Unit vectors of rows of token ids, float32 (n, width), on the CPU; see read_rows.

    width 0: all D numbers.
    """

    def read(model: Embedder, batch: Batch) -> Tensor:
        return model.read(batch["tokens"], batch["mask"].sum(1))

    found = read_rows(read, model, [row[: model.length] for row in rows], at_once)
    return nn.functional.normalize(found[:, : width or None], dim=1)


def ranks_of(rankings: Sequence[Sequence[int]], right: Sequence[int]) -> np.ndarray:
    """The reciprocal rank of each right passage, float64 (n,)."""
    pairs = zip(rankings, right, strict=True)
    return np.array([reciprocal_rank(ranking, number) for ranking, number in pairs])


class Scored(NamedTuple):
    """What n questions score for all N passages."""

    words: list[np.ndarray]  # BM25's scores (N,), of each question
    cosines: np.ndarray  # (n, N)
    right: list[int]  # the number of the right passage of each

    def ranks(self, bm25: float, cosine: float) -> np.ndarray:
        """Reciprocal ranks (n,) by a sum of both scores with these weights."""
        pairs = zip(self.words, self.cosines, strict=True)
        rankings = [add_scores(bm25 * words, own, cosine, TOP) for words, own in pairs]
        return ranks_of(rankings, self.right)

    def best_weight(self) -> float:
        """The weight of a cosine beside a BM25 score, of WEIGHTS, with the best MRR@10."""
        return max(WEIGHTS, key=lambda weight: self.ranks(1, weight).mean())


def mean_over_articles(values: np.ndarray, articles: Sequence[int | str]) -> Measured:
    """The mean of a value of each question (n,): of its reciprocal rank, say.

    articles: that of each question's passage. Questions on one article are alike, so the interval
    is over articles.
    """
    _, place = np.unique(np.array(articles), return_inverse=True)
    return ratio_of_sums(np.bincount(place, values), np.bincount(place), "articles")


@dataclass(frozen=True, kw_only=True)
class EmbedRun(Run):
    """An embedder. A subclass adds `model` and `trunk_run`, `reader` and `states`."""

    data: QuestionConfig = field(default_factory=QuestionConfig)
    embed: EmbedderConfig = field(default_factory=EmbedderConfig)
    task: str = "embed"

    has_heads: ClassVar[bool] = True
    FACTS = (*Run.FACTS, "embed")
    SAMPLE_OPTIONS = frozenset({"prompt", "n"})
    LOSS_ROWS = 0  # the loss depends on the size of the batch
    trunk_run: ClassVar[type[Run]]  # the family's run type for pretraining
    reader: ClassVar[Reader]  # how to read features from its model
    states: ClassVar[Callable]  # (its model, tokens (B, T), mask (B, T)) -> states (B, T, D)
    ABOUT = About(
        task="feature-extraction",
        use="It gives a text a vector: that of a question is near to those of passages that answer "
        "it.",
        limits="It knows the kind of questions and passages that it was trained on. Search by "
        "words finds names and numbers better; join the two.",
    )

    def __post_init__(self):
        if self.adapt in ("prompt", "head"):
            raise ValueError(
                f"--adapt {self.adapt} is not for --task embed: use full, lora or bias"
            )
        if self.train.batch_size < 2:
            raise ValueError(
                f"--train.batch-size {self.train.batch_size}: the loss compares a question with "
                "the passages of others, so use 2 or more; 64 or more learn better"
            )

    @property
    def base_family(self) -> str:
        return self.trunk_run.family

    def build_model(self) -> Embedder:
        return Embedder(self.trunk_run.build_model(self), self.embed, self.reader, self.states)

    def trunk(self, model: Embedder, base: Run) -> nn.Module:
        return model.body

    def open_data(self) -> QuestionData:
        if not self.data.tokenizer:
            raise ValueError("--task embed starts from a pretrained model: add --init-from RUN")
        own = tokenizer.load(self.data.tokenizer)
        train = self.train
        most = self.model.context_length
        length = min(self.embed.length or most, most)
        return QuestionData(self.data, own, length, train.batch_size, train.seed)

    def get_ready(self, model: Embedder, data: QuestionData) -> None:
        passages = [ids for ids, part in zip(data.passages, data.parts) if part == TRAIN]
        model.heads.count(passages)

    # ---- measures -------------------------------------------------------------------------------

    def nearest_passages(
        self, model: Embedder, data: QuestionData, among: Sequence[int], split: str
    ) -> list[list[int]]:
        """For each question of a split the numbers of the DEEP nearest passages of `among`."""
        x = read_vectors(model, [data.passages[i] for i in among])
        q = read_vectors(model, [row.ids for row in data.splits[split]])
        _, places = nearest(q, x, DEEP)
        return np.array(among)[places.numpy()].tolist()

    def score(self, model: Embedder, data: QuestionData) -> Scores:
        """MRR@10 of the validation questions among the passages of that split."""
        among = [i for i, part in enumerate(data.parts) if part == VAL]
        right = [row.passage for row in data.splits[VAL]]
        return {"val_mrr": ranks_of(self.nearest_passages(model, data, among, VAL), right).mean()}

    def measure(self, opened: OpenRun, model: Embedder, data: QuestionData, options: Any) -> Scores:
        """MRR@10 of the test questions among all passages: by vectors, and joined with BM25.

        The weight of a cosine beside a BM25 score is chosen on the validation questions.
        """
        if not data.splits[TEST]:
            return {}
        index = BM25(data.texts)
        x = read_vectors(model, data.passages)
        found = {}
        for split in HELD_OUT:
            rows = data.splits[split]
            q = read_vectors(model, [row.ids for row in rows])
            words = [index.scores(row.question) for row in rows]
            found[split] = Scored(words, (q @ x.T).numpy(), [row.passage for row in rows])
        weight = found[VAL].best_weight()
        articles = [data.articles[number] for number in found[TEST].right]
        return {
            "test_mrr": mean_over_articles(found[TEST].ranks(0, 1), articles),
            "test_mrr with BM25": mean_over_articles(found[TEST].ranks(1, weight), articles),
            "weight of a cosine": weight,
        }

    def baselines(self, data: QuestionData) -> dict[str, Scores]:
        """The same by words alone."""
        rows = data.splits[TEST]
        if not rows:
            return {}
        index = BM25(data.texts)
        rankings = [index.search(row.question, TOP) for row in rows]
        ranks = ranks_of(rankings, [row.passage for row in rows])
        articles = [data.articles[row.passage] for row in rows]
        return {"BM25": {"test_mrr": mean_over_articles(ranks, articles)}}

    # ---- samples --------------------------------------------------------------------------------

    def show(self, model: Embedder, data: QuestionData, folder: Path, step: int) -> str:
        """Write validation questions, each with the first passage found."""
        among = [i for i, part in enumerate(data.parts) if part == VAL]
        found = self.nearest_passages(model, data, among, VAL)[:SHOWN]
        rows = data.splits[VAL][:SHOWN]
        texts = [f"{row.question}\n{data.texts[own[0]]}" for row, own in zip(rows, found)]
        write_texts_file(folder, step, texts)
        return f"--- step {step} finds for {rows[0].question!r}:\n{data.texts[found[0][0]][:200]}"

    @torch.inference_mode()
    def sample(self, opened: OpenRun, options: Any) -> None:
        """Print which held-out passages of the run's data are nearest to --prompt, with cosines."""
        if not (options.prompt or "").strip():
            raise ValueError('give what to find: --prompt "a question"')
        data = self.open_data()
        among = [i for i, part in enumerate(data.parts) if part in (VAL, TEST)]
        x = read_vectors(opened.model, [data.passages[i] for i in among])
        q = read_vectors(opened.model, [opened.tokenizer.encode(options.prompt)])
        scores, places = nearest(q, x, options.n or 3)
        for score, place in zip(scores[0].tolist(), places[0].tolist()):
            print(f"{score:.3f}  {data.texts[among[place]]}\n")
        print(f"of {len(among):,} held-out passages; search others by python -m tinyfm index")
