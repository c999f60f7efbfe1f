"""An index of passages or pictures, and search in it (retrieval.py): the commands

    python -m tinyfm index docs runs/index                        # by words: BM25
    python -m tinyfm index docs runs/index --run runs/embedder    # and by the vectors of a model
    python -m tinyfm search runs/index "open a file for writing"
    python -m tinyfm index holiday/ runs/pictures --run runs/clip # pictures, searched by text

An index is a folder: index.json says what it was made of, passages.jsonl has the passages, or the
names and captions of pictures; vectors.safetensors has the vectors, unit vectors (N, E), if a run
was given. They are of one of three kinds:

    a run of --task embed    vectors that were trained for search, whole or cut to --width
    a CLIP                   those of its two towers, which it was trained to compare
    a GPT or an encoder      the mean of the last states, less the mean over all passages;
                             pretraining alone makes poor vectors for search

A search is by both words and vectors for the first kind, by vectors for pictures, and by words for
the rest, unless --by says otherwise. With --approximate an index is also written for faiss
(approximate.py).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.download import sha256_of
from data.report import Report, counted
from tinyfm.adapt import base_hash
from tinyfm.adapt.embedder import Embedder
from tinyfm.adapt.heads import read_rows
from tinyfm.batches.text import find_source
from tinyfm.common import files, folders, schema
from tinyfm.recipes import approximate, registry, run_dir
from tinyfm.recipes.base import OpenRun
from tinyfm.recipes.embed import DEEP, read_vectors
from tinyfm.retrieval import BM25, add_scores, fuse, nearest

WORDS = 150  # of a passage at most
PASSAGES = "passages.jsonl"
RECORD = "index.json"
VECTORS = "vectors"
FAISS = "vectors.faiss"
OURS = {RECORD, PASSAGES, f"{VECTORS}.safetensors", FAISS}
COSINE = 15.0  # weight of a trained vector's cosine beside a BM25 score
BY = ("words", "vectors", "both")
PRETRAINED = ("gpt", "chat", "encoder")


class Record(TypedDict):
    """What index.json says."""

    path: str  # of the documents
    passages: int
    run: str  # whose model made the vectors; "" for none
    weights: str  # the hash of that model's weights and tokenizer
    width: int  # of the vectors; 0 for none
    by: str  # how it is searched unless --by says otherwise
    sha256: dict[str, str]  # of the other files


class Passage(TypedDict):
    """A line of passages.jsonl."""

    name: str  # of its document, and the line there if the document has several passages
    text: str


# ---- vectors -------------------------------------------------------------------------------------


def identity(opened: OpenRun) -> str:
    """What the vectors of a run depend on: hashes of its weights and of its tokenizer."""
    found = [base_hash(opened.model), opened.tokenizer.fingerprint()]
    if isinstance(opened.model, Embedder):  # base_hash leaves out the weights of tokens
        found.append(base_hash(opened.model.heads))
    return "-".join(text[:16] for text in found)


def open_embedder(path: str) -> OpenRun:
    """A run that turns texts into vectors. Raises ValueError for one that does not."""
    opened = run_dir.open_base(path)
    family = opened.run.family
    trained = isinstance(opened.model, Embedder)
    if not trained and family not in (*PRETRAINED, "clip"):
        raise ValueError(
            f"{path} is a run of family {family}: to turn texts into vectors, give a run of "
            "--task embed, of family gpt, chat or encoder, or a CLIP"
        )
    if family == "clip" and opened.run.model.loss == "simclr":
        raise ValueError(f"{path} learned from images alone: give a CLIP that learned captions")
    return opened


def check_width(opened: OpenRun, width: int) -> None:
    """Raise ValueError for a width that vectors of this run do not have. 0 = all numbers."""
    if width and not isinstance(opened.model, Embedder):
        raise ValueError(
            f"--width {width} is for a run of --task embed: vectors of family "
            f"{opened.run.family} cannot be cut"
        )
    if width:
        opened.model.check_width(width)


@torch.inference_mode()
def embed(opened: OpenRun, texts: Sequence[str], width: int = 0) -> Tensor:
    """The vectors of texts, float32 (n, E); long texts lose their end.

    Unit vectors; but of a model that was only pretrained, the mean of the last states.
    """
    if opened.run.family == "clip":
        from tinyfm.evaluate import zero_shot  # here: a search of texts loads no picture models

        return zero_shot.embed_texts(opened.model, opened.tokenizer, texts).float()
    rows = [ids or [opened.tokenizer.eot] for ids in opened.tokenizer.encode_batch(list(texts))]
    if isinstance(opened.model, Embedder):
        return read_vectors(opened.model, rows, width)
    reader = registry.get_preset(opened.run.base_family, "classify").run.reader
    return read_rows(reader.read, opened.model, rows)


def centred(opened: OpenRun, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(unit vectors (N, E), what was subtracted (E,)): the mean, of a pretrained model's states.

    These have a large part in common, which says nothing. Other vectors stay as they are.
    """
    if opened.run.family not in PRETRAINED:
        return vectors, torch.zeros(vectors.size(1))
    mean = vectors.mean(0)
    return F.normalize(vectors - mean, dim=1), mean


def count_cut(opened: OpenRun, texts: Sequence[str]) -> tuple[int, int]:
    """(how many texts are longer than the model reads, the number of tokens that it reads)."""
    model = opened.model
    most = model.length if isinstance(model, Embedder) else model.config.context_length
    rows = opened.tokenizer.encode_batch(list(texts))
    return sum(len(ids) > most for ids in rows), most


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


def read_pictures(path: str, opened: OpenRun) -> tuple[list[Passage], Tensor]:
    """The pictures of a folder, a table or tars: names with captions, and unit vectors (N, E).

    Raises ValueError if there is none that can be read.
    """
    from data import captioned, pictures  # here: a search of texts loads no picture models
    from tinyfm.evaluate import zero_shot

    config = opened.model.config
    report = Report()
    found: list[Passage] = []
    images = []
    for pair in captioned.pairs(path, report, ""):
        try:
            image, _ = pictures.decode(pair.path, config.image_size, config.channels)
        except ValueError as error:
            report.skip(str(error), str(pair.path))
            continue
        images.append(image.transpose(2, 0, 1))
        found.append({"name": str(pair.path), "text": " ".join(pair.captions)})
    if not found:
        raise ValueError(f"{path} has no picture that can be read: {report}")
    with torch.inference_mode():
        return found, zero_shot.embed_images(opened.model, np.stack(images)).float().cpu()


def check_replaceable(out: Path) -> None:
    """Raise ValueError if a folder has other files than those of an index: they would be lost."""
    others = {path.name for path in out.iterdir()} - OURS
    if others:
        raise ValueError(
            f"{out} also has {min(others)}, which is no part of an index; choose another folder"
        )


def is_index(folder: Path) -> bool:
    """Whether the folder has the files of an index."""
    return (folder / RECORD).is_file() and (folder / PASSAGES).is_file()


def usual_by(opened: OpenRun | None) -> str:
    """How an index with the vectors of this run is best searched."""
    if opened is None or opened.run.family in PRETRAINED:
        return "words"
    return "vectors" if opened.run.family == "clip" else "both"


def read_all(
    path: str, opened: OpenRun | None, words: int, width: int
) -> tuple[list[Passage], dict[str, Tensor]]:
    """The passages of a source, and the tensors of their vectors; {} without a run."""
    if opened and opened.run.family == "clip":
        passages, vectors = read_pictures(path, opened)
        return passages, {"passages": vectors, "mean": torch.zeros(vectors.size(1))}
    passages = read_passages(path, words)
    if opened is None:
        return passages, {}
    texts = [passage["text"] for passage in passages]
    print(f"{counted(len(texts), 'passages')} to read by the model", file=sys.stderr)
    lost, most = count_cut(opened, texts)
    if lost:
        print(
            f"{counted(lost, 'passages')} longer than the {most:,} tokens that the model reads: "
            f"their vectors are of the start; a smaller --words than {words} cuts shorter ones",
            file=sys.stderr,
        )
    vectors, mean = centred(opened, embed(opened, texts, width))
    return passages, {"passages": vectors, "mean": mean}


def write_index(
    path: str,
    out: Path,
    run: str = "",
    words: int = WORDS,
    overwrite: bool = False,
    width: int = 0,
    links: bool = False,
) -> int:
    """Make the index of a data source, or of files; returns the number of passages.

    overwrite: replace an index in `out`. width: of the vectors, 0 = whole. links: also write an
    approximate index. Raises ValueError if anything else is there, for a run without vectors, and
    for numbers out of range.
    """
    if words < 1:
        raise ValueError(f"--words is {words}; it must be at least 1")
    if width < 0:
        raise ValueError(f"--width is {width}; it must be at least 1, or 0 for whole vectors")
    if (width or links) and not run:
        option = f"--width {width}" if width else "--approximate"
        raise ValueError(f"{option} is for an index with vectors: add --run RUN")
    if links:
        approximate.load_faiss()  # says at once what is missing
    if out.exists() and not is_index(out):
        raise ValueError(f"{out} exists, and is no index; choose another folder")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} is an index already; choose another folder, or add --overwrite")
    if out.exists():
        check_replaceable(out)
    opened = open_embedder(run) if run else None
    if opened:
        check_width(opened, width)
    passages, tensors = read_all(path, opened, words, width)
    record = Record(
        path=path,
        passages=len(passages),
        run=run,
        weights=identity(opened) if opened else "",
        width=tensors["passages"].size(1) if opened else 0,
        by=usual_by(opened),
        sha256={},
    )
    with folders.whole_or_absent(out, replace=overwrite) as folder:
        lines = [json.dumps(passage, ensure_ascii=False) + "\n" for passage in passages]
        (folder / PASSAGES).write_text("".join(lines), encoding="utf-8")
        if tensors:
            files.save_tensors(folder, VECTORS, tensors)
        if links:
            graph = approximate.build(tensors["passages"])
            share = approximate.measure(graph, tensors["passages"])
            print(
                f"the approximate index finds {share:.1%} of the 10 nearest to a passage",
                file=sys.stderr,
            )
            approximate.write(graph, folder / FAISS)
        record["sha256"] = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
        files.write_json(folder / RECORD, record)
    return len(passages)


# ---- searching -----------------------------------------------------------------------------------


@dataclass
class Index:
    """An index in memory."""

    passages: list[Passage]
    by: str = "words"  # how to search it unless told otherwise
    opened: OpenRun | None = None  # the run that made the vectors
    vectors: Tensor | None = None  # (N, E)
    mean: Tensor | None = None  # (E,)
    links: Any = None  # the approximate index

    @cached_property
    def words(self) -> BM25:
        """The search by words, made when it is first used."""
        return BM25([passage["text"] for passage in self.passages])

    def by_vectors(self, questions: Sequence[str], k: int) -> list[list[int]]:
        """The k nearest passages of each question, by cosine."""
        return self.near(self.read(questions), k)

    @property
    def trained(self) -> bool:
        """Whether its vectors were trained for search; then they may be parts of the model's."""
        return isinstance(self.opened.model, Embedder)

    def read(self, questions: Sequence[str]) -> Tensor:
        """The vectors of questions (Q, E)."""
        asked = embed(self.opened, questions, self.vectors.size(1) if self.trained else 0)
        return F.normalize(asked - self.mean, dim=1)

    def near(self, asked: Tensor, k: int) -> list[list[int]]:
        """The k passages, or about these, that are nearest to each vector (Q, E)."""
        if self.links is not None:
            found = approximate.search(self.links, asked, k)[1].tolist()
            return [[number for number in row if number >= 0] for row in found]
        return nearest(asked, self.vectors, k)[1].tolist()

    def search(self, question: str, k: int, by: str = "words") -> list[int]:
        """The k best passages, or fewer: by words, only those with a word of the question."""
        if by == "words":
            return self.words.search(question, k)
        asked = self.read([question])
        (near,) = self.near(asked, max(k, DEEP))
        if by == "vectors":
            return near[:k]
        known = self.words.search(question, max(k, DEEP))
        if not self.trained:
            return fuse([known, near], k)
        candidates = sorted({*known, *near})
        words = self.words.scores(question)[candidates]
        cosines = (self.vectors[candidates] @ asked[0]).numpy()
        return [candidates[i] for i in add_scores(words, cosines, COSINE, k)]


def check_files(folder: Path, record: Record, names: Sequence[str]) -> None:
    """Raise ValueError if one of these files of an index is gone, or not as it was written."""
    for name in names:
        if name not in record["sha256"]:
            raise ValueError(f"{folder} has no {name}")
        if not (folder / name).is_file() or sha256_of(folder / name) != record["sha256"][name]:
            raise ValueError(f"{folder / name} is gone or was changed")


def read_index(folder: Path) -> tuple[Record, list[Passage]]:
    """The record and the passages. Raises ValueError for a damaged folder, and for another one."""
    if not is_index(folder):
        raise ValueError(f"{folder} is no index: make one, python -m tinyfm index PATH {folder}")
    try:
        record = files.read_record(folder / RECORD, Record)
        check_files(folder, record, [PASSAGES])
        lines = (folder / PASSAGES).read_bytes().splitlines()
        passages = [schema.check(schema.parse_json(line), Passage, PASSAGES) for line in lines]
        if record["by"] not in BY or not passages:
            raise ValueError(f"{counted(len(passages), 'passages')}, by {record['by']!r}")
    except ValueError as error:
        raise ValueError(f"{folder} is damaged: {error}; index again") from error
    return record, passages


def open_index(folder: Path, by: str = "", run: str = "", links: bool = False) -> Index:
    """Read an index for a search by words, vectors or both; "": as the index says.

    run: where the model of its vectors is, if it was moved. links: use the approximate index.
    Raises ValueError for a folder that is no index or is damaged, and for a model that did not make
    its vectors.
    """
    record, passages = read_index(folder)
    by = by or record["by"]
    index = Index(passages, by)
    if by == "words":
        if run or links:
            option = f"--run {run}" if run else "--approximate"
            raise ValueError(f"{option} is for --by vectors or --by both")
        return index
    if not record["weights"]:
        raise ValueError(f"{folder} has no vectors: index again with --run {run or 'RUN'}")
    if links and FAISS not in record["sha256"]:
        raise ValueError(f"{folder} has no approximate index: index again with --approximate")
    index.opened = open_embedder(run or record["run"])
    if identity(index.opened) != record["weights"]:
        raise ValueError(
            f"{folder} was made by other weights or another tokenizer than those of "
            f"{index.opened.folder}: index again with --run {run or record['run']}"
        )
    try:
        check_files(folder, record, [f"{VECTORS}.safetensors", *([FAISS] if links else [])])
        tensors = files.load_tensors(folder, VECTORS)
        index.mean = tensors["mean"]
        index.vectors = tensors["passages"]
        expected = (len(passages), record["width"])
        if tuple(index.vectors.shape) != expected:
            raise ValueError(f"the vectors are {tuple(index.vectors.shape)}, not {expected}")
        if index.trained:
            index.opened.model.check_width(record["width"])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder} is damaged: {error}; index again") from error
    if links:
        index.links = approximate.read(folder / FAISS, expected)
    return index


# ---- the commands --------------------------------------------------------------------------------


def index_command(words: Sequence[str]) -> None:
    """python -m tinyfm index"""
    parser = argparse.ArgumentParser(
        prog="python -m tinyfm index", description="Make passages or pictures ready for search."
    )
    about = "docs, passages, stdlib, shakespeare, or your own text: a file, a folder or a glob; "
    about += "with a CLIP, a folder of pictures"
    parser.add_argument("path", metavar="PATH", help=about)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the folder to write")
    about = "a run of --task embed, to search by its vectors too; or of family gpt or encoder, or "
    about += "a CLIP, for pictures"
    parser.add_argument("--run", default="", metavar="RUN", help=about)
    about = f"words of a passage, at most; default: {WORDS}"
    parser.add_argument("--words", type=int, default=WORDS, help=about)
    about = "numbers of a vector to keep, one of the run's --embed.widths; default: all"
    parser.add_argument("--width", type=int, default=0, help=about)
    about = "also write an approximate index, for search --approximate (pip install faiss-cpu)"
    parser.add_argument("--approximate", action="store_true", help=about)
    parser.add_argument("--overwrite", action="store_true", help="replace an index in the folder")
    given = parser.parse_args(words)
    n = write_index(
        given.path,
        given.folder,
        given.run,
        given.words,
        given.overwrite,
        given.width,
        given.approximate,
    )
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
    about = "the ranking: by words, by the vectors of a run, or both joined; default: both with "
    about += "the vectors of --task embed, vectors for pictures, words for the rest"
    parser.add_argument("--by", choices=BY, default="", help=about)
    about = "where the run is that made the vectors, if it was moved"
    parser.add_argument("--run", default="", metavar="RUN", help=about)
    about = "use the approximate index; only one that you made, as faiss checks little"
    parser.add_argument("--approximate", action="store_true", help=about)
    given = parser.parse_args(words)
    if given.n < 1:
        raise ValueError(f"-n is {given.n}; it must be at least 1")
    if not given.question.strip():
        raise ValueError('the question is empty: give "what to find"')
    index = open_index(given.folder, given.by, given.run, given.approximate)
    found = index.search(given.question, given.n, index.by)
    if not found:
        print("no passage has a word of it")
    for rank, number in enumerate(found, 1):
        passage = index.passages[number]
        print(f"{rank}. {passage['name']}\n{passage['text']}\n")


COMMANDS = {"index": index_command, "search": search_command}
