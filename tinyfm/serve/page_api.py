"""The routes under /api/ that only the page uses.

A handler checks the body of a request against a dataclass, has the engine's thread do the work on a
model, and answers in JSON. Drawing answers with server-sent events, one for each step. A mistake of
the client is a ValueError, and becomes an answer with status 400 that says what is wrong.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor

from data import pictures
from tinyfm.autoencoder import Autoencoder
from tinyfm.common import schema
from tinyfm.serve import costs, drawing, run_views, text_views
from tinyfm.serve import engine as engines
from tinyfm.serve.engine import Arrivals
from tinyfm.serve.families import Served
from tinyfm.text2image import TextToImage

MOST_CHARACTERS = 100_000  # of a text to look at
MOST_STEPS = 1000  # of a drawing
MOST_WALKED = 32  # pictures of a walk

# ---- requests -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    model: str
    text: str

    def __post_init__(self):
        if len(self.text) > MOST_CHARACTERS:
            raise ValueError(f"the text has {len(self.text)} characters; use {MOST_CHARACTERS}")


@dataclass(frozen=True)
class Attended(Text):
    layer: int = 0
    head: int = 0


@dataclass(frozen=True)
class Drawing:
    model: str
    prompt: str = ""
    steps: int = 20
    guidance: float = 3.0
    sampler: str = "dpm++"
    seed: int = 0
    image: str = ""  # to change: a data URL
    mask: str = ""  # a data URL: white where the image is to be drawn again
    strength: float | None = None

    def __post_init__(self):
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps is {self.steps}; use 1 to {MOST_STEPS}")
        if abs(self.seed) >= 2**40:
            raise ValueError(f"seed is {self.seed}; it must be below 2**40")


@dataclass(frozen=True)
class Walk:
    model: str
    first: str  # data URLs
    last: str
    pictures: int = 9

    def __post_init__(self):
        if not 2 <= self.pictures <= MOST_WALKED:
            raise ValueError(f"pictures is {self.pictures}; use 2 to {MOST_WALKED}")


def answer(kind: type | None, function: Callable[[Request, Any], Awaitable[Any]]) -> Callable:
    """A handler that gives the checked body, or the query, to `function` and answers in JSON."""

    @functools.wraps(function)
    async def handle(request: Request) -> Response:
        try:
            given = request.query_params
            if kind is not None:
                given = schema.check(schema.parse_json(await request.body()), kind, "the body")
            found = await function(request, given)
        except ValueError as error:
            detail = {"message": str(error), "type": "invalid_request_error"}
            return JSONResponse({"error": detail}, status_code=400)
        return found if isinstance(found, Response) else JSONResponse(found)

    return handle


def find_run(request: Request, name: str, *abilities: str) -> Served:
    """The served run of that name. Raises ValueError if there is none with one of the abilities."""
    runs = request.app.state.runs
    if name not in runs:
        raise ValueError(f"there is no run {name!r}; there are {', '.join(runs)}")
    if abilities and not runs[name].abilities & set(abilities):
        raise ValueError(f"{name} cannot {' or '.join(abilities)}: choose another run")
    return runs[name]


# ---- models -------------------------------------------------------------------------------------


async def models(request: Request, given: Any) -> list[dict[str, Any]]:
    """The served runs, with the sizes that the page needs for its controls."""
    found = []
    for run in request.app.state.runs.values():
        row = {"id": run.name, "family": run.family, "abilities": sorted(run.abilities)}
        row["step"] = run.opened.meta.get("step")
        row["parameters"] = sum(p.numel() for p in run.model.parameters())
        config = getattr(run.model, "config", None)
        if "complete" in run.abilities:
            row["layers"] = config.n_layer
            row["heads"] = config.n_head
            row["context"] = config.context_length
        if isinstance(run.model, TextToImage):
            row["flow"] = config.diffusion.prediction == "flow"
        found.append(row)
    return found


# ---- text ---------------------------------------------------------------------------------------


def read_pieces(run: Served, text: str) -> list[dict[str, Any]]:
    ids = text_views.read_ids(run.tokenizer, text)
    return [text_views.piece(run.tokenizer, i)._asdict() for i in ids]


def read_next(run: Served, text: str) -> dict[str, Any]:
    ids = text_views.read_ids(run.tokenizer, text, run.front)
    logits = text_views.next_logits(run.model, run.tokenizer, ids)
    likeliest = logits.topk(min(text_views.LIKELIEST, len(logits))).indices.tolist()
    pieces = [text_views.piece(run.tokenizer, i)._asdict() for i in likeliest]
    data = logits.numpy().astype("<f4").tobytes()
    return {"logits": base64.b64encode(data).decode(), "likeliest": pieces}


def read_attention(run: Served, asked: Attended) -> dict[str, Any]:
    ids = text_views.read_ids(run.tokenizer, asked.text, run.front)
    ids, weights = text_views.attention(run.model, ids, asked.layer, asked.head)
    rows = [[round(w, 4) for w in row[: t + 1]] for t, row in enumerate(weights.tolist())]
    return {"ids": ids, "weights": rows}


async def tokens(request: Request, given: Text) -> dict[str, Any]:
    """The tokens of a text: {"tokens": [{"id": 17, "text": "The", "shown": true}, ...]}."""
    run = find_run(request, given.model, "complete", "embed", "draw")
    return {"tokens": await run_in_threadpool(read_pieces, run, given.text)}


async def next_token(request: Request, given: Text) -> dict[str, Any]:
    """All logits of the next token, as base64 of little-endian float32, and the likeliest ones.

    The page applies temperature and filters to them itself.
    """
    run = find_run(request, given.model, "complete")
    return await engines.call(request.app.state.engine, read_next, run, given.text)


async def attention(request: Request, given: Attended) -> dict[str, Any]:
    """The attention weights of one head: row t has those of token t to tokens 0 ... t."""
    run = find_run(request, given.model, "complete")
    return await engines.call(request.app.state.engine, read_attention, run, given)


# ---- pictures -----------------------------------------------------------------------------------


def to_url(image: Tensor) -> str:
    """(C, H, W) in [-1, 1] -> a PNG as a data URL."""
    levels = ((image.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    pixels = levels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def from_url(url: str, size: int, channels: int) -> Tensor:
    """A data URL of a picture -> (1, C, size, size) in [-1, 1]. Raises ValueError."""
    try:
        content = base64.b64decode(url.partition(",")[2], validate=True)
    except ValueError as error:
        raise ValueError("a picture must be a data URL with base64") from error
    pixels, _ = pictures.decode(io.BytesIO(content), size, channels)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None] / 127.5 - 1


def make_film(run: Served, asked: Drawing) -> Iterator[drawing.Moment]:
    """The moments of a drawing. Pictures of the request are read here, in the engine's thread."""
    model = run.model
    if not isinstance(model, TextToImage):
        return drawing.sample_film(model, asked.steps, asked.sampler, asked.seed)
    if not asked.prompt.strip():
        raise ValueError("say what to draw: the prompt is empty")
    autoencoder = model.config.autoencoder
    given = {}
    if asked.image:
        size = (autoencoder.image_size, autoencoder.in_channels)
        given["init_images"] = from_url(asked.image, *size)
        given["strength"] = asked.strength
        if asked.mask:
            given["mask"] = (from_url(asked.mask, autoencoder.image_size, 1) > 0).float()
    model.tokenizer = run.tokenizer
    return drawing.prompt_film(
        model, asked.prompt, asked.steps, asked.guidance, asked.sampler, asked.seed, **given
    )


def draw_events(run: Served, asked: Drawing) -> Iterator[dict[str, Any]]:
    """What the page gets for each moment of a drawing."""
    for moment in make_film(run, asked):
        yield {
            "step": moment.step,
            "steps": moment.steps,
            "state": to_url(moment.state[0]),
            "estimate": to_url(moment.estimate[0]),
        }


async def draw(request: Request, given: Drawing) -> Response:
    """Draw a picture; each step is an event."""
    run = find_run(request, given.model, "draw", "sample")
    arrivals = engines.items(request.app.state.engine, partial(draw_events, run, given))
    first = await anext(arrivals)  # a mistake is answered before the stream starts
    return StreamingResponse(as_events(first, arrivals), media_type="text/event-stream")


async def as_events(first: Any, arrivals: Arrivals) -> AsyncIterator[str]:
    """Server-sent events. When nobody listens any more, the drawing ends."""
    try:
        yield f"data: {json.dumps(first)}\n\n"
        async for item in arrivals:
            yield f"data: {json.dumps(item)}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        arrivals.cancel()


def walk_between(run: Served, asked: Walk) -> dict[str, list[str]]:
    autoencoder: Any = getattr(run.model, "autoencoder", run.model)
    size = (autoencoder.config.image_size, autoencoder.config.in_channels)
    ends = [from_url(url, *size) for url in (asked.first, asked.last)]
    return {"pictures": [to_url(image) for image in drawing.walk(run.model, *ends, asked.pictures)]}


async def walk(request: Request, given: Walk) -> dict[str, list[str]]:
    """Pictures on the way from one to another, in the space of latents."""
    run = find_run(request, given.model, "draw", "rebuild")
    if not isinstance(run.model, (TextToImage, Autoencoder)):
        raise ValueError(f"{given.model} has no autoencoder, so no latents to walk through")
    return await engines.call(request.app.state.engine, walk_between, run, given)


# ---- runs ---------------------------------------------------------------------------------------


def all_runs(request: Request) -> dict[str, Path]:
    """The runs in the runs folder, and those that are served."""
    state = request.app.state
    folder = Path(getattr(state, "runs_folder", "runs"))
    return run_views.list_runs(folder, [run.opened.folder.parent for run in state.runs.values()])


def named_run(request: Request, query: Any) -> Path:
    found = all_runs(request)
    name = query.get("run", "")
    if name not in found:
        raise ValueError(f"there is no run {name!r}")
    return found[name]


def describe_runs(request: Request) -> list[dict[str, Any]]:
    verdict = getattr(request.app.state, "verdict", None)
    described = []
    for name, folder in all_runs(request).items():
        try:
            row = {"name": name, **run_views.describe(folder, time.time())}
            row["verdict"] = verdict(folder) if verdict else ""
        except (ValueError, KeyError, OSError) as error:
            row = {"name": name, "error": str(error)}
        described.append(row)
    return described


async def runs(request: Request, query: Any) -> list[dict[str, Any]]:
    """All runs with their settings, scores and verdicts."""
    return await run_in_threadpool(describe_runs, request)


async def metrics(request: Request, query: Any) -> dict[str, Any]:
    """The losses of ?run=NAME after step ?after=N."""
    after = int(query.get("after", "-1"))
    return await run_in_threadpool(run_views.curves, named_run(request, query), after)


async def samples(request: Request, query: Any) -> list[dict[str, Any]]:
    """The samples of ?run=NAME by step."""
    return run_views.samples(named_run(request, query))


async def sample(request: Request, query: Any) -> Response:
    """One sample, ?run=NAME&file=FILE: a PNG, or plain text."""
    path = run_views.sample_path(named_run(request, query), query.get("file", ""))
    kind = "image/png" if path.suffix == ".png" else "text/plain"
    return FileResponse(path, media_type=kind)


# ---- costs --------------------------------------------------------------------------------------


async def systems(request: Request, query: Any) -> dict[str, Any]:
    """Published systems and GPUs."""
    return costs.list_systems()


async def calculate(request: Request, given: costs.Job) -> dict[str, Any]:
    """The cost of a job."""
    return costs.calculate(given)


routes = [
    Route("/api/models", answer(None, models)),
    Route("/api/tokens", answer(Text, tokens), methods=["POST"]),
    Route("/api/next", answer(Text, next_token), methods=["POST"]),
    Route("/api/attention", answer(Attended, attention), methods=["POST"]),
    Route("/api/draw", answer(Drawing, draw), methods=["POST"]),
    Route("/api/walk", answer(Walk, walk), methods=["POST"]),
    Route("/api/runs", answer(None, runs)),
    Route("/api/metrics", answer(None, metrics)),
    Route("/api/samples", answer(None, samples)),
    Route("/api/sample", answer(None, sample)),
    Route("/api/systems", answer(None, systems)),
    Route("/api/costs", answer(costs.Job, calculate), methods=["POST"]),
]
