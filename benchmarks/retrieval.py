"""Search: questions of people and the passages with their answers, by words, by vectors, by both.

    python benchmarks/retrieval.py --record                  # trains an embedder for each seed
    python benchmarks/retrieval.py RUN ... [--questions 0]   # measures these runs

The questions are those of BoolQ's test split here (data/passages.py), and all its passages are
searched; the right one is the passage that the question was asked about. BM25 needs no training. A
RUN is of --task embed, or of family gpt or encoder, whose vectors were not trained for search.
Without a RUN, for each seed an encoder is pretrained on the passages and then trained as an
embedder, each for --minutes on this machine; runs are kept in --work, and what is there already is
not run again.

Two ways to join a ranking by vectors with BM25's: by reciprocal ranks, and by adding the scores
(tinyfm/retrieval.py). Their weights are chosen by MRR@10 of the validation questions. Prints MRR@10
and the share of questions whose passage is the first; the difference to BM25 is over the same
questions (a paired bootstrap). Questions on one article are alike, so the intervals are over
articles. For the first embedder, also its widths, and the speed and recall of the approximate
index; all questions are searched together. --record writes the tables into README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import timing
from benchmarks.encoder import TRIAL_STEPS, steps_in, train
from data import passages as source
from data.splits import TEST, VAL
from tinyfm.adapt.embedder import Embedder
from tinyfm.common.device import keep_freed_memory
from tinyfm.evaluate.metrics import proportion
from tinyfm.recipes import approximate
from tinyfm.recipes.embed import DEEP, TOP, Scored, mean_over_articles, ranks_of
from tinyfm.recipes.search import centred, embed, open_embedder
from tinyfm.retrieval import BM25, fuse, nearest

BASE = ("encoder", "--data.path", "passages")
EMBED = ("encoder", "--task", "embed")
# To choose from: weights of the vectors' ranking beside BM25's 1, and what is added to a rank.
RANKS = [
    (share, constant) for share in (0.05, 0.1, 0.2, 0.5, 1.0) for constant in (5.0, 20.0, 60.0)
]
TIMED = 5  # searches, of which the median is shown
Rankings = list[list[int]]


class Asked(NamedTuple):
    """The questions of a split, and what BM25 says of them."""

    texts: list[str]
    right: list[int]  # the number of the right passage of each
    articles: list[str]  # of these passages
    scores: list[np.ndarray]  # of all N passages, for each question
    rankings: Rankings

    def ranks(self) -> np.ndarray:
        """Reciprocal ranks (n,) by BM25 alone."""
        return ranks_of(self.rankings, self.right)


def read_passages() -> list[str]:
    return [document.text for document in source.documents()]


def ask(index: BM25, passages: Sequence[str], split: str, limit: int) -> Asked:
    """The questions of a split, the first `limit` or all, with BM25's scores."""
    number = {text: i for i, text in enumerate(passages)}
    asked = [question for question in source.questions() if question.split == split]
    asked = asked[: limit or None]
    texts = [question.text for question in asked]
    scores = [index.scores(text) for text in texts]
    rankings = [index.search(text, DEEP) for text in texts]
    right = [number[question.passage] for question in asked]
    articles = [source.title_of(question.passage) for question in asked]
    return Asked(texts, right, articles, scores, rankings)


# ---- rankings ------------------------------------------------------------------------------------


def by_ranks(asked: Asked, near: Rankings, share: float, constant: float) -> np.ndarray:
    """Reciprocal ranks (n,) of BM25 and vectors, whose rankings are `near`, joined by their ranks.

    share: the weight of the vectors; constant: what is added to a rank.
    """
    pairs = zip(asked.rankings, near, strict=True)
    joined = [fuse(pair, DEEP, (1.0, share), constant) for pair in pairs]
    return ranks_of(joined, asked.right)


def row(name: str, ranks: np.ndarray, asked: Asked) -> list[str]:
    """The cells of a ranking, from the reciprocal ranks of all questions; compared with BM25."""
    first = proportion(ranks == 1, "questions", asked.articles, "articles")
    more = mean_over_articles(ranks - asked.ranks(), asked.articles)
    difference = f"{more:+.3f} ({more.low:+.3f} to {more.high:+.3f})"
    return [name, str(mean_over_articles(ranks, asked.articles)), str(first), difference]


class Vectors(NamedTuple):
    """Unit vectors of a run: of all passages (N, E), and of the questions of both splits."""

    passages: Tensor
    validation: Tensor
    test: Tensor


def read_vectors(run: str, passages: Sequence[str], validation: Asked, test: Asked) -> Vectors:
    opened = open_embedder(run)
    found, mean = centred(opened, embed(opened, passages))
    asked = []
    for split in (validation, test):
        own = embed(opened, split.texts) - mean
        asked.append(torch.nn.functional.normalize(own, dim=1))
    return Vectors(found, *asked)


def rows_of(name: str, vectors: Vectors, validation: Asked, test: Asked) -> list[list[str]]:
    """The rows of a run: its vectors alone, and joined with BM25 in both ways.

    The weights are chosen on validation.
    """
    held_out = (vectors.validation @ vectors.passages.T).numpy()
    cosines = (vectors.test @ vectors.passages.T).numpy()
    chosen = Scored(validation.scores, held_out, validation.right)
    found = Scored(test.scores, cosines, test.right)

    near = nearest(vectors.validation, vectors.passages, DEEP)[1].tolist()
    share, constant = max(RANKS, key=lambda both: by_ranks(validation, near, *both).mean())
    near = nearest(vectors.test, vectors.passages, DEEP)[1].tolist()
    joined = by_ranks(test, near, share, constant)
    weight = chosen.best_weight()
    return [
        row(f"vectors of {name}", found.ranks(0, 1), test),
        row(f"BM25 and {name}: 1 / ({constant:g} + rank), weight {share:g}", joined, test),
        row(f"BM25 + {weight:g} cosine of {name}", found.ranks(1, weight), test),
    ]


# ---- smaller and faster --------------------------------------------------------------------------


def compare_widths(vectors: Vectors, widths: Sequence[int], test: Asked) -> list[str]:
    """A table of MRR@10 and of the approximate index, by the width of the vectors."""
    lines = [
        "| width | bytes a passage | MRR@10 | exact, ms a question | approximate | recall at 10 |",
        "|---|---|---|---|---|---|",
    ]
    for width in widths:
        parts = [torch.nn.functional.normalize(v[:, :width], dim=1) for v in vectors]
        passages, _, asked = (part.contiguous() for part in parts)
        links = approximate.build(passages)
        works = {
            "exact": partial(nearest, asked, passages, TOP),
            "approximate": partial(approximate.search, links, asked, TOP),
        }
        times = timing.by_turns(works, TIMED)
        exact, walked = (f"{1000 * taken / len(asked):.2f}" for taken in times.values())
        share = approximate.recall(links, passages, asked, TOP)
        found = ranks_of(nearest(asked, passages, TOP)[1].tolist(), test.right).mean()
        lines.append(
            f"| {width} | {4 * width:,} | {found:.3f} | {exact} | {walked} | {share:.3f} |"
        )
    return lines


# ---- training ------------------------------------------------------------------------------------


def train_embedder(work: Path, minutes: float, seed: int, more: Sequence[str]) -> str:
    """An encoder and then an embedder, trained for so many minutes each."""
    own = ("--train.seed", str(seed), "--train.eval-every", "0")
    trial = train(work / "trial-base", *BASE, *own, "--train.steps", str(TRIAL_STEPS))
    steps = str(steps_in(minutes, trial))
    base = train(work / f"base-{seed}", *BASE, *own, "--train.steps", steps)
    start = (*EMBED, "--init-from", str(base.resolve()), *own, *more)
    trial = train(work / "trial-embedder", *start, "--train.steps", str(TRIAL_STEPS))
    steps = str(steps_in(minutes, trial))
    return str(train(work / f"embedder-{seed}", *start, "--train.steps", steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    about = "a run of --task embed, or of family gpt or encoder; default: train --seeds embedders"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=about)
    parser.add_argument("--seeds", type=int, default=3, help="number of embedders to train")
    parser.add_argument("--minutes", type=float, default=5, help="of each training")
    parser.add_argument("--work", default="runs/retrieval-benchmark", help="folder of the runs")
    parser.add_argument("--questions", type=int, default=0, help="the first so many; 0 = all")
    parser.add_argument("--record", action="store_true", help="write the tables into README.md")
    given, more = parser.parse_known_args()
    if given.questions < 0 or given.seeds < 0:
        parser.error("--questions and --seeds must be at least 0")
    keep_freed_memory()
    passages = read_passages()  # says at once what is missing
    work = Path(given.work)
    runs = given.runs
    head = timing.describe_machine()
    if not runs and given.seeds:
        work.mkdir(parents=True, exist_ok=True)
        runs = [train_embedder(work, given.minutes, seed, more) for seed in range(given.seeds)]
        head += f"; {given.minutes:g} minutes for the encoder, and as many for the embedder"
    start = time.perf_counter()
    index = BM25(passages)
    made = time.perf_counter()
    test = ask(index, passages, TEST, given.questions)
    validation = ask(index, passages, VAL, given.questions)
    searching = timing.seconds_of(lambda: [index.search(text, TOP) for text in test.texts])
    rows = [[*row("BM25", test.ranks(), test)[:-1], ""]]
    more_lines: list[str] = []
    for run in runs:
        vectors = read_vectors(run, passages, validation, test)
        rows += rows_of(Path(run).name, vectors, validation, test)
        model = open_embedder(run).model
        if isinstance(model, Embedder) and not more_lines:
            more_lines = ["", f"The vectors of {Path(run).name}, cut:", ""]
            more_lines += compare_widths(vectors, model.widths, test)
    head += f"; {len(test.texts):,} questions, {len(passages):,} passages; "
    head += f"BM25's index took {made - start:.1f} s, a question "
    head += f"{1000 * searching / len(test.texts):.1f} ms"
    lines = ["| ranking | MRR@10 | first | MRR@10 over BM25's |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    text = "\n".join([head, "", *lines, *more_lines]) + "\n"
    print(text)
    if given.record:
        timing.record("retrieval", text)


if __name__ == "__main__":
    main()
