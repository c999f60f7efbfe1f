"""Vectors and what follows from them: /v1/embeddings, /v1/classify and /v1/search.

A GPT, an encoder or an XLNet embeds a text as the mean of its last layer's states, a run of --task
embed as it was trained to, a CLIP by its text tower; all as unit vectors, so that their product is
the cosine. Each text is embedded alone, so its vector does not depend on the others of the request.
A search compares the vector of a text, or of a picture, with those of all pictures of the run's
data, or of the folder that the server was given (`--pictures`). These are embedded at the first
search and kept.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import torch
import torch.nn.functional as F
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from data import captioned, pictures
from data.report import Report
from tinyfm.adapt.embedder import Embedder
from tinyfm.adapt.heads import Classifier, mean_state
from tinyfm.clip import CLIP
from tinyfm.common import files
from tinyfm.evaluate import zero_shot
from tinyfm.serve.engine import Engine, call
from tinyfm.serve.families import Served, find_run, warn_about_texts
from tinyfm.serve.guard import Json, read_json, read_json_or_form, unless_gone
from tinyfm.serve.requests import (
    BadRequest,
    ClassifyRequest,
    EmbeddingRequest,
    SearchRequest,
    decode_base64,
    read,
    texts_or_ids,
)
from tinyfm.serve.uploads import read_picture, to_images, to_png

AT_ONCE = 64  # pictures that are embedded between two tokens of the texts that others wait for

# ---- embeddings ----------------------------------------------------------------------------------


def check_dimensions(run: Served, dimensions: int | None) -> int:
    """The width to cut vectors to, 0 for whole ones: a run of --task embed is trained for several.

    Raises BadRequest for another width than these.
    """
    if dimensions is None or not isinstance(run.model, Embedder):
        return 0
    try:
        run.model.check_width(dimensions)
    except ValueError as error:
        raise BadRequest(f"dimensions: {error}", "dimensions") from error
    return dimensions


def embed_text(run: Served, text: str | list[int], width: int = 0) -> tuple[list[float], int]:
    """(unit vector, number of tokens) of a text. width: see check_dimensions.

    Of a long text a run of --task embed reads the start, as in training. For others, raises
    BadRequest.
    """
    model, tokenizer = run.model, run.tokenizer
    ids = tokenizer.encode(text) if isinstance(text, str) else text
    count = len(ids)
    room = model.config.context_length - len(run.front)
    if isinstance(model, Embedder):
        ids = ids[: model.length]
    if isinstance(model, CLIP):
        room -= 1 + (tokenizer.bot is not None)
    if not 1 <= len(ids) <= room:
        raise BadRequest(
            f"a text of {len(ids)} tokens; the run {run.name} takes 1 to {room}", "input"
        )
    last = tokenizer.vocab_size - 1
    if not 0 <= min(ids) <= max(ids) <= last:
        raise BadRequest(f"an id is not in the vocabulary of {run.name}, 0 to {last}", "input")
    if isinstance(model, CLIP):
        start = [] if tokenizer.bot is None else [tokenizer.bot]
        row = torch.tensor([[*start, *ids, tokenizer.eot]], device=model.logit_scale.device)
        vector = model.encode_text(row)[0]
    elif isinstance(model, Embedder):
        row = torch.tensor([ids], device=next(model.parameters()).device)
        vector = model(row, torch.tensor([len(ids)], device=row.device), width)[0]
    else:
        row = torch.tensor([[*run.front, *ids]], device=next(model.parameters()).device)
        real = torch.ones_like(row, dtype=torch.bool)
        real[:, : len(run.front)] = False  # a soft prompt is not the text
        vector = mean_state(model, {"tokens": row, "mask": real})[0]
    return F.normalize(vector.float(), dim=0).tolist(), count


async def embed(request: Request) -> Response:
    """POST /v1/embeddings"""
    state = request.app.state
    asked, warnings = read(EmbeddingRequest, await read_json(request))
    run = find_run(state.runs, asked.model, "embed")
    texts = texts_or_ids(asked.input, "input")
    cut_to = check_dimensions(run, asked.dimensions)

    async def embed_all() -> list[tuple[list[float], int]]:
        return [await call(state.engine, embed_text, run, text, cut_to) for text in texts]

    found = await unless_gone(request, embed_all())
    width = len(found[0][0])
    if asked.dimensions not in (None, width):
        problem = f"dimensions is {asked.dimensions}; vectors of {run.name} have {width}"
        raise BadRequest(problem, "dimensions")
    if isinstance(run.model, Embedder):
        room = run.model.length
        cut = sum(n > room for _, n in found)
        if cut:
            warnings.append(f"{cut} of {len(texts)} texts were cut to the {room} tokens it reads")
    data = []
    for i, (vector, _) in enumerate(found):
        value: Any = vector
        if asked.encoding_format == "base64":
            value = base64.b64encode(np.array(vector, dtype="<f4").tobytes()).decode("ascii")
        data.append({"object": "embedding", "index": i, "embedding": value})
    tokens = sum(n for _, n in found)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return answer({"object": "list", "data": data, "model": run.name, "usage": usage}, warnings)


def answer(body: dict[str, Any], warnings: list[str]) -> Json:
    return Json(body | {"warnings": warnings} if warnings else body)


# ---- classes -------------------------------------------------------------------------------------


async def choose_name(
    engine: Engine, run: Served, image: np.ndarray, labels: list[str]
) -> dict[str, list[float]]:
    """{"label": probabilities of the labels} of a picture (C, H, W), by a CLIP.

    The labels are embedded template by template, so that others need not wait for all.
    """
    model, tokenizer = run.model, run.tokenizer
    x = await call(engine, zero_shot.embed_images, model, image[None])
    parts = []
    for template in files.read_record(run.opened.folder / zero_shot.TEMPLATES, list[str]):
        own = await call(engine, zero_shot.class_vectors, model, tokenizer, labels, [template])
        parts.append(own)

    def share() -> list[float]:
        return zero_shot.class_logits(x, torch.cat(parts), model.scale()).softmax(-1)[0].tolist()

    return {"label": await call(engine, share)}


def predict(run: Served, batch: dict[str, Tensor]) -> dict[str, list[float]]:
    """{question: probabilities of its classes} of a batch of one, by a classifier."""
    device = next(run.model.parameters()).device
    found = run.model.predict({name: tensor.to(device) for name, tensor in batch.items()})
    return {question: p[0].tolist() for question, p in found.items()}


def text_batch(run: Served, text: str, warnings: list[str]) -> dict[str, Tensor]:
    """A text as a batch of one. Raises BadRequest for an empty one."""
    ids = run.tokenizer.encode(text)
    context = run.model.config.context_length
    if not ids:
        raise BadRequest("input is empty; give the text to classify", "input")
    if len(ids) > context:
        warnings.append(f"the text has {len(ids)} tokens: the model read the first {context}")
    tokens = torch.tensor([ids[:context]])
    return {"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}


def picture_size(model: Any) -> tuple[int, int]:
    """(size, channels) of the pictures that a model reads."""
    config = model.config
    return config.image_size, getattr(config, "in_channels", 0) or config.channels


async def read_pixels(run: Served, image: str, data: bytes | None) -> np.ndarray:
    """The picture of a request as the model reads it, uint8 (H, W, C). Raises BadRequest."""
    source = decode_base64(image, "image") if data is None else data
    return await anyio.to_thread.run_sync(read_picture, source, *picture_size(run.model), "image")


async def classify(request: Request) -> Response:
    """POST /v1/classify"""
    state = request.app.state
    values, sent = await read_json_or_form(request, ClassifyRequest, ("image",))
    asked, warnings = read(ClassifyRequest, values | dict.fromkeys(sent, "file"))
    run = find_run(state.runs, asked.model, "classify")
    reads = run.model.reader.inputs if isinstance(run.model, Classifier) else ("images",)
    needed = "image" if "images" in reads else "input"
    if not getattr(asked, needed):
        raise BadRequest(f"the run {run.name} classifies by {needed}: send that", needed)
    if isinstance(run.model, CLIP):
        if asked.labels is None:
            raise BadRequest("a CLIP chooses among names: give labels", "labels")
        warn_about_texts(run, asked.labels, warnings)
        pixels = await read_pixels(run, asked.image, sent.get("image"))
        classes = {"label": asked.labels}
        work = choose_name(state.engine, run, pixels.transpose(2, 0, 1), asked.labels)
    else:
        if asked.labels is not None:
            warnings.append(f"labels were not read: the run {run.name} has its own classes")
        classes = run.model.classes
        if needed == "image":
            pixels = await read_pixels(run, asked.image, sent.get("image"))
            batch = {"images": to_images(pixels)}
        else:
            batch = await anyio.to_thread.run_sync(text_batch, run, asked.input, warnings)
        work = call(state.engine, predict, run, batch)
    found = await unless_gone(request, work)
    answers = []
    for question, p in found.items():
        best = sorted(zip(p, classes[question]), reverse=True)
        shown = [{"label": name, "probability": value} for value, name in best]
        answers.append({"question": question, "classes": shown})
    return answer({"object": "classification", "model": run.name, "answers": answers}, warnings)


# ---- search --------------------------------------------------------------------------------------


@dataclass
class PictureIndex:
    """Pictures with their captions and vectors."""

    images: list[np.ndarray]  # parts, uint8 (n, C, H, W) each
    captions: list[str]
    vectors: Tensor  # (N, E)

    def image(self, i: int) -> np.ndarray:
        """Picture i, uint8 (H, W, C)."""
        for part in self.images:
            if i < len(part):
                return part[i].transpose(1, 2, 0)
            i -= len(part)
        raise IndexError(i)


def parts_of(images: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The images AT_ONCE at a time."""
    for own in images:
        for i in range(0, len(own), AT_ONCE):
            yield own[i : i + AT_ONCE]


async def embed_pictures(engine: Engine, model: CLIP, images: list[np.ndarray]) -> Tensor:
    """Vectors (N, E) on the model's device."""
    parts = parts_of(images)
    return torch.cat([await call(engine, zero_shot.embed_images, model, part) for part in parts])


def read_folder(folder: str, size: int, channels: int) -> tuple[list[np.ndarray], list[str]]:
    """(the pictures of a folder that can be read, their names). Raises ValueError without any."""
    images = []
    names = []
    for pair in captioned.pairs(folder, Report(), ""):
        try:
            image, _ = pictures.decode(pair.path, size, channels)
        except ValueError:
            continue
        images.append(image.transpose(2, 0, 1))
        names.append(Path(pair.path).name)
    if not images:
        raise ValueError(f"--pictures {folder} has no picture that can be read")
    return [np.stack(images)], names


async def build_index(engine: Engine, run: Served, folder: str) -> PictureIndex:
    """Embed the pictures of a folder, or those of the run's data, whose vectors are kept on disk.

    Raises ValueError and OSError if the data cannot be opened.
    """
    if folder:
        images, names = await anyio.to_thread.run_sync(
            read_folder, folder, *picture_size(run.model)
        )
        return PictureIndex(images, names, await embed_pictures(engine, run.model, images))
    data = await anyio.to_thread.run_sync(run.opened.run.open_data)
    splits = list(data.splits.values())
    images = [split.images for split in splits]
    captions = [own[0] for split in splits for own in split.captions]
    kept = await call(
        engine, zero_shot.vectors_folder, run.model, data.fingerprint, run.opened.run.data.cache
    )
    if kept.exists():
        vectors = await call(engine, zero_shot.read_vectors, kept, run.model)
    else:
        vectors = await embed_pictures(engine, run.model, images)
        await anyio.to_thread.run_sync(zero_shot.write_vectors, kept, vectors)
    return PictureIndex(images, captions, vectors)


class Indexes:
    """The index of each run, built at its first search."""

    def __init__(self, engine: Engine, folder: str = ""):
        self.engine = engine
        self.folder = folder  # of pictures to search, instead of each run's data
        self.tasks: dict[str, asyncio.Task[PictureIndex]] = {}

    async def get(self, run: Served) -> PictureIndex:
        """The index of a run. The work on it goes on if a search that waits for it is cancelled."""
        task = self.tasks.get(run.name)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = asyncio.create_task(build_index(self.engine, run, self.folder))
            self.tasks[run.name] = task
        await asyncio.wait({task})
        return task.result()


def find_nearest(index: PictureIndex, vector: Tensor, n: int) -> tuple[list[float], list[int]]:
    """(cosines, numbers) of the n pictures that are nearest to a vector (E,)."""
    scores, best = (index.vectors @ vector).topk(min(n, len(index.vectors)))
    return scores.tolist(), best.tolist()


async def search(request: Request) -> Response:
    """POST /v1/search"""
    state = request.app.state
    values, sent = await read_json_or_form(request, SearchRequest, ("image",))
    asked, warnings = read(SearchRequest, values | dict.fromkeys(sent, "file"))
    run = find_run(state.runs, asked.model, "search")
    embed_query: tuple[Callable, ...]
    if asked.image:
        pixels = await read_pixels(run, asked.image, sent.get("image"))
        embed_query = (zero_shot.embed_images, run.model, pixels.transpose(2, 0, 1)[None])
    else:
        warn_about_texts(run, [asked.query], warnings)
        embed_query = (zero_shot.embed_texts, run.model, run.tokenizer, [asked.query])

    async def find_them() -> tuple[PictureIndex, list[float], list[int]]:
        index = await state.indexes.get(run)
        vector = (await call(state.engine, *embed_query))[0]
        return index, *await call(state.engine, find_nearest, index, vector, asked.n)

    try:
        index, scores, best = await unless_gone(request, find_them())
    except (ValueError, OSError) as error:
        raise BadRequest(f"the pictures of {run.name} cannot be searched: {error}") from error
    data = [
        {
            "index": i,
            "score": score,
            "caption": index.captions[i],
            "image": f"data:image/png;base64,{to_png(index.image(i))}",
        }
        for score, i in zip(scores, best)
    ]
    return answer({"object": "list", "model": run.name, "data": data}, warnings)
