"""Search: questions of people and the passages with their answers, by words, by vectors, by both.

    python benchmarks/retrieval.py [RUN ...] [--questions 0] [--record]

The questions are those of BoolQ's test split here (data/passages.py), and all its passages are
searched; the right one is the passage that the question was asked about. BM25 needs no training.
Each RUN, of family gpt or encoder, gives vectors: the mean of its last states, not trained for
search; and joined with BM25 by reciprocal ranks. Prints MRR@10 and the share of questions whose
passage is the first, with intervals over questions; the difference of the joined ranking to BM25 is
over the same questions. --record writes the table into README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import timing
from data import passages as source
from data.splits import TEST
from tinyfm.evaluate.metrics import bootstrap, proportion, ratio_of_sums
from tinyfm.recipes.search import DEEP, embed, open_embedder
from tinyfm.retrieval import BM25, fuse, nearest, reciprocal_rank

Rankings = list[list[int]]


def read(limit: int) -> tuple[list[str], list[str], list[int]]:
    """(passages, questions of the test split, the number of the right passage of each)."""
    texts = [document.text for document in source.documents()]
    number = {text: i for i, text in enumerate(texts)}
    asked = [question for question in source.questions() if question.split == TEST]
    asked = asked[: limit or None]
    return texts, [q.text for q in asked], [number[q.passage] for q in asked]


def by_vectors(run: str, texts: Sequence[str], questions: Sequence[str]) -> Rankings:
    """The DEEP nearest passages of each question, by the vectors of a run."""
    opened = open_embedder(run)
    found = embed(opened, texts)
    mean = found.mean(0)
    asked = F.normalize(embed(opened, questions) - mean, dim=1)
    return nearest(asked, F.normalize(found - mean, dim=1), DEEP)[1].tolist()


def row(name: str, rankings: Rankings, right: list[int], base: np.ndarray | None) -> list[str]:
    """The cells of a ranking; base: the reciprocal ranks of BM25, to compare with."""
    ranks = ranks_of(rankings, right)
    first = proportion(ranks == 1, "questions")
    more = ""
    if base is not None:
        low, high = bootstrap(ranks - base, np.ones(len(ranks)))
        more = f"{(ranks - base).mean():+.3f} ({low:+.3f} to {high:+.3f})"
    return [name, str(ratio_of_sums(ranks, np.ones(len(ranks)), "questions")), str(first), more]


def ranks_of(rankings: Rankings, right: list[int]) -> np.ndarray:
    """The reciprocal rank of each right passage, float64 (n,)."""
    pairs = zip(rankings, right, strict=True)
    return np.array([reciprocal_rank(ranking, number) for ranking, number in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run of family gpt or encoder")
    parser.add_argument("--questions", type=int, default=0, help="the first so many; 0 = all")
    parser.add_argument("--record", action="store_true", help="write the table into README.md")
    given = parser.parse_args()
    if given.questions < 0:
        parser.error(f"--questions is {given.questions}; it must be at least 0")
    texts, questions, right = read(given.questions)
    start = time.perf_counter()
    index = BM25(texts)
    made = time.perf_counter()
    by_words = [index.search(question, DEEP) for question in questions]
    searched = time.perf_counter()
    base = ranks_of(by_words, right)
    rows = [row("BM25", by_words, right, None)]
    for run in given.runs:
        own = by_vectors(run, texts, questions)
        rows.append(row(f"vectors of {Path(run).name}", own, right, base))
        both = [fuse(pair, DEEP) for pair in zip(by_words, own, strict=True)]
        rows.append(row(f"BM25 and {Path(run).name}", both, right, base))
    head = f"{timing.describe_machine()}; {len(questions):,} questions, {len(texts):,} passages; "
    head += f"BM25's index took {made - start:.1f} s, a question "
    head += f"{1000 * (searched - made) / len(questions):.1f} ms"
    lines = ["| ranking | MRR@10 | first | MRR@10 over BM25's |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    text = "\n".join([head, "", *lines]) + "\n"
    print(text)
    if given.record:
        timing.record("retrieval", text)


if __name__ == "__main__":
    main()
