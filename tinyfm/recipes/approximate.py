"""An approximate index: the nearest vectors without comparing with all, by faiss.

Exact search multiplies a question with all N vectors. HNSW (Malkov and Yashunin 2018) links each
vector to a few near ones, and some to far ones. A search walks along the links towards the question
and looks at a small part of the vectors. It may miss some of the nearest; the share that it finds
is its recall. For some ten thousand vectors exact search takes milliseconds and is enough.

faiss (Johnson et al. 2019) is needed for this alone: `pip install faiss-cpu`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyfm.retrieval import nearest

LINKS = 32  # of a vector, in each layer
WIDE = 128  # candidates that a search keeps, at least
ASKED = 200  # vectors whose neighbours are searched to measure the recall
INSTALL = "an approximate index needs faiss: pip install faiss-cpu"


def load_faiss() -> Any:
    """The library, with as many threads as torch has. Raises ValueError if it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError(INSTALL) from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def build(vectors: Tensor) -> Any:
    """An HNSW index of unit vectors (N, E), float32; products are compared."""
    faiss = load_faiss()
    index = faiss.IndexHNSWFlat(vectors.size(1), LINKS, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors.numpy())
    return index


def search(index: Any, questions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(products, numbers) of about the k nearest vectors to each question (Q, E): (Q, k) each.

    The number is -1 where the links lead to fewer than k.
    """
    k = min(k, index.ntotal)
    index.hnsw.efSearch = max(WIDE, k)
    scores, numbers = index.search(questions.numpy(), k)
    return torch.from_numpy(scores), torch.from_numpy(numbers)


def recall(index: Any, vectors: Tensor, questions: Tensor, k: int = 10) -> float:
    """The share of the k nearest vectors of each question that the index finds."""
    exact = nearest(questions, vectors, k)[1].tolist()
    found = search(index, questions, k)[1].tolist()
    shares = [len({*a} & {*b}) / len(a) for a, b in zip(exact, found, strict=True)]
    return float(np.mean(shares))


def measure(index: Any, vectors: Tensor) -> float:
    """`recall` for some of the vectors themselves, at equal distances in their order."""
    step = max(1, len(vectors) // ASKED)
    return recall(index, vectors, vectors[::step])


def write(index: Any, path: Path) -> None:
    load_faiss().write_index(index, str(path))


def read(path: Path, shape: tuple[int, ...]) -> Any:
    """Read an index of vectors of this shape (N, E).

    Raises ValueError for a file that is none. Read files of your own alone: faiss does not check
    all that it reads.
    """
    faiss = load_faiss()
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is no index of faiss: index again") from error
    if (index.ntotal, index.d) != tuple(shape):
        found = (index.ntotal, index.d)
        raise ValueError(f"{path} has vectors of shape {found}, not {tuple(shape)}: index again")
    return index
