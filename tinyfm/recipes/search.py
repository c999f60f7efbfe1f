"""An index of passages, and search in it (retrieval.py): the commands

    python -m tinyfm index docs runs/index                        # by words: BM25
    python -m tinyfm index docs runs/index --run runs/encoder     # and by the vectors of a model
    python -m tinyfm search runs/index "open a file for writing"
    python -m tinyfm search runs/index "open a file for writing" --by both

An index is a folder: index.json says what it was made of, passages.jsonl has the passages, and
vectors.safetensors has the vectors, if a run was given. The vector of a passage is the mean of the
model's last states, less the mean over all passages, scaled to length 1: (N, E). Pretraining alone
makes poor vectors for search (benchmarks/README.md), so a search is by words unless --by says
otherwise.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch.nn.functional as F
from torch import Tensor

from data.report import Report, counted
from tinyfm.adapt import base_hash
from tinyfm.adapt.heads import read_rows
from tinyfm.batches.text import find_source
from tinyfm.common import files, folders, schema
from tinyfm.recipes import registry, run_dir
from tinyfm.recipes.base import OpenRun
from tinyfm.retrieval import BM25, fuse, nearest

WORDS = 150  # of a passage at most
PASSAGES = "passages.jsonl"
RECORD = "index.json"
VECTORS = "vectors"
DEEP = 100  # passages of each ranking that are fused
BY = ("words", "vectors", "both")


class Record(TypedDict):
    """What index.json says."""

    path: str  # of the documents
    passages: int
    run: str  # whose model made the vectors; "" for none
    weights: str  # the hash of that model's weights and tokenizer


class Passage(TypedDict):
    """A line of passages.jsonl."""

    name: str  # of its document, and the line there if the document has several passages
    text: str


# ---- vectors -------------------------------------------------------------------------------------


def identity(opened: OpenRun) -> str:
    """What the vectors of a run depend on: the hash of its weights and of its tokenizer."""
    return f"{base_hash(opened.model)[:16]}-{opened.tokenizer.fingerprint()[:16]}"


def open_embedder(path: str) -> OpenRun:
    """A run that turns texts into vectors. Raises ValueError for one that does not."""
    opened = run_dir.open_base(path)
    if opened.run.family not in ("gpt", "chat", "encoder"):
        raise ValueError(
            f"{path} is a run of family {opened.run.family}: to turn texts into vectors, give a "
            "run of family gpt, chat or encoder"
        )
    return opened


def embed(opened: OpenRun, texts: Sequence[str]) -> Tensor:
    """The mean of the last states of each text, float32 (n, D); long texts lose their end."""
    reader = registry.get_preset(opened.run.base_family, "classify").run.reader
    rows = [opened.tokenizer.encode(text) or [opened.tokenizer.eot] for text in texts]
    return read_rows(reader.read, opened.model, rows)


# ---- making an index -----------------------------------------------------------------------------


def cut(text: str, words: int) -> list[tuple[int, str]]:
    """[(first line, piece)] of a text, in pieces of at most so many words, split at spaces."""
    starts = [found.start() for found in re.finditer(r"\S+", text)][::words]
    stops = [*starts[1:], len(text)]
    pieces = []
    line = 1
    last = 0
    for start, stop in zip(starts, stops):
        line += text.count("\n", last, start)
        last = start
        pieces.append((line, text[start:stop].strip()))
    return pieces


def read_passages(path: str, words: int) -> list[Passage]:
    """The documents of a data source or of your files, in pieces. Raises ValueError without any."""
    report = Report()
    _, documents, _ = find_source(path)
    found: list[Passage] = []
    for document in documents(report=report):
        name = document.name or f"document {report.used}"
        pieces = cut(document.text, words)
        for line, piece in pieces:
            place = f"{name}, from line {line:,}" if len(pieces) > 1 else name
            found.append({"name": place, "text": piece})
    if not found:
        raise ValueError(f"{path} has no text to search: {report}")
    return found


def check_replaceable(out: Path) -> None:
    """Raise ValueError if a folder has other files than those of an index: they would be lost."""
    others = {path.name for path in out.iterdir()} - {RECORD, PASSAGES, f"{VECTORS}.safetensors"}
    if others:
        raise ValueError(
            f"{out} also has {min(others)}, which is no part of an index; choose another folder"
        )


def is_index(folder: Path) -> bool:
    """Whether the folder has the files of an index."""
    return (folder / RECORD).is_file() and (folder / PASSAGES).is_file()


def write_index(
    path: str, out: Path, run: str = "", words: int = WORDS, overwrite: bool = False
) -> int:
    """Make the index of a data source, or of files; returns the number of passages.

    overwrite: replace an index in `out`. Raises ValueError if anything else is there, for a run
    without vectors, and for words below 1.
    """
    if words < 1:
        raise ValueError(f"--words is {words}; it must be at least 1")
    if out.exists() and not is_index(out):
        raise ValueError(f"{out} exists, and is no index; choose another folder")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} is an index already; choose another folder, or add --overwrite")
    if out.exists():
        check_replaceable(out)
    opened = open_embedder(run) if run else None
    passages = read_passages(path, words)
    record = Record(path=path, passages=len(passages), run=run, weights="")
    tensors = {}
    if opened:
        record["weights"] = identity(opened)
        print(f"{counted(len(passages), 'passages')} to read by the model", file=sys.stderr)
        vectors = embed(opened, [passage["text"] for passage in passages])
        tensors["mean"] = vectors.mean(0)
        tensors["passages"] = F.normalize(vectors - tensors["mean"], dim=1)
    with folders.whole_or_absent(out, replace=overwrite) as folder:
        lines = [json.dumps(passage, ensure_ascii=False) + "\n" for passage in passages]
        (folder / PASSAGES).write_text("".join(lines), encoding="utf-8")
        if tensors:
            files.save_tensors(folder, VECTORS, tensors)
        files.write_json(folder / RECORD, record)
    return len(passages)


# ---- searching -----------------------------------------------------------------------------------


@dataclass
class Index:
    """An index in memory."""

    passages: list[Passage]
    words: BM25
    opened: OpenRun | None = None  # the run that made the vectors
    vectors: Tensor | None = None  # (N, E)
    mean: Tensor | None = None  # (E,)

    def by_vectors(self, questions: Sequence[str], k: int) -> list[list[int]]:
        """The k nearest passages of each question, by cosine."""
        asked = F.normalize(embed(self.opened, questions) - self.mean, dim=1)
        _, numbers = nearest(asked, self.vectors, k)
        return numbers.tolist()

    def search(self, question: str, k: int, by: str = "words") -> list[int]:
        """The k best passages, or fewer: by words, only those with a word of the question."""
        if by == "words":
            return self.words.search(question, k)
        (near,) = self.by_vectors([question], max(k, DEEP))
        if by == "vectors":
            return near[:k]
        return fuse([self.words.search(question, max(k, DEEP)), near], k)


def open_index(folder: Path, vectors: bool = False, run: str = "") -> Index:
    """Read an index, with its vectors or without. run: where their model is, if it was moved.

    Raises ValueError for a folder that is no index or is damaged, and for a model that did not make
    its vectors.
    """
    if not is_index(folder):
        raise ValueError(f"{folder} is no index: make one, python -m tinyfm index PATH {folder}")
    try:
        record = files.read_record(folder / RECORD, Record)
        lines = (folder / PASSAGES).read_bytes().splitlines()
        passages = [schema.check(schema.parse_json(line), Passage, PASSAGES) for line in lines]
    except ValueError as error:
        raise ValueError(f"{folder} is damaged: {error}; index again") from error
    if len(passages) != record["passages"]:
        problem = f"{folder / PASSAGES} has {len(passages)} passages, not {record['passages']}"
        raise ValueError(f"{problem}: index again")
    index = Index(passages, BM25([passage["text"] for passage in passages]))
    if not vectors:
        return index
    if not record["weights"]:
        raise ValueError(f"{folder} has no vectors: index again with --run {run or 'RUN'}")
    index.opened = open_embedder(run or record["run"])
    if identity(index.opened) != record["weights"]:
        raise ValueError(
            f"{folder} was made by other weights or another tokenizer than those of "
            f"{index.opened.folder}: index again with --run {run or record['run']}"
        )
    tensors = files.load_tensors(folder, VECTORS)
    index.mean = tensors["mean"]
    index.vectors = tensors["passages"]
    if len(index.vectors) != len(passages):
        raise ValueError(f"{folder} has {len(index.vectors)} vectors: index again")
    return index


# ---- the commands --------------------------------------------------------------------------------


def index_command(words: Sequence[str]) -> None:
    """python -m tinyfm index"""
    parser = argparse.ArgumentParser(
        prog="python -m tinyfm index", description="Make passages ready for search."
    )
    about = "docs, passages, stdlib, shakespeare, or your own text: a file, a folder or a glob"
    parser.add_argument("path", metavar="PATH", help=about)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the folder to write")
    about = "a run of family gpt or encoder, to search by its vectors too"
    parser.add_argument("--run", default="", metavar="RUN", help=about)
    about = f"words of a passage, at most; default: {WORDS}"
    parser.add_argument("--words", type=int, default=WORDS, help=about)
    parser.add_argument("--overwrite", action="store_true", help="replace an index in the folder")
    given = parser.parse_args(words)
    n = write_index(given.path, given.folder, given.run, given.words, given.overwrite)
    print(f"{counted(n, 'passages')} in {given.folder}")
    print(f'next: python -m tinyfm search {given.folder} "what to find"')


def search_command(words: Sequence[str]) -> None:
    """python -m tinyfm search"""
    parser = argparse.ArgumentParser(
        prog="python -m tinyfm search", description="Find the passages that answer a question."
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="an index")
    parser.add_argument("question", metavar="TEXT", help="what to find")
    parser.add_argument("-n", type=int, default=5, help="number of passages to print; default: 5")
    about = "the ranking: by words (the default), by the vectors of a run, or both joined"
    parser.add_argument("--by", choices=BY, default="words", help=about)
    about = "where the run is that made the vectors, if it was moved"
    parser.add_argument("--run", default="", metavar="RUN", help=about)
    given = parser.parse_args(words)
    if given.n < 1:
        raise ValueError(f"-n is {given.n}; it must be at least 1")
    if not given.question.strip():
        raise ValueError('the question is empty: give "what to find"')
    if given.run and given.by == "words":
        raise ValueError(f"--run {given.run} is for --by vectors or --by both")
    index = open_index(given.folder, given.by != "words", given.run)
    found = index.search(given.question, given.n, given.by)
    if not found:
        print("no passage has a word of it")
    for rank, number in enumerate(found, 1):
        passage = index.passages[number]
        print(f"{rank}. {passage['name']}\n{passage['text']}\n")


COMMANDS = {"index": index_command, "search": search_command}
