"""The routes under /api/ that only the page uses.

A handler checks the body of a request against a class, has the engine's thread do the work on a
model, and answers in JSON. Drawing answers with server-sent events, one for each step. As in the
rest of the API, a mistake of the client is a BadRequest with a sentence for it.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor

from tinyfm.serve import costs, drawing, run_views, text_views
from tinyfm.serve.engine import Arrivals, call, items
from tinyfm.serve.families import Served, find_run
from tinyfm.serve.guard import Json, read_json
from tinyfm.serve.requests import (
    MOST_STEPS,
    BadRequest,
    check,
    check_length,
    decode_base64,
    read,
    share_to_redraw,
)
from tinyfm.serve.uploads import read_mask, read_picture, to_images, to_pixels, to_png
from tinyfm.text2image import TextToImage

MOST_LOOKED_AT = 100_000  # characters of a text
MOST_WALKED = 32  # pictures of a walk

# ---- requests -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LookRequest:
    """A text to look at."""

    model: str = ""
    text: str

    def __post_init__(self):
        n = len(self.text)
        check(n <= MOST_LOOKED_AT, "text", f"of {n:,} characters", f"at most {MOST_LOOKED_AT:,}")


@dataclass(frozen=True, kw_only=True)
class AttentionRequest(LookRequest):
    layer: int = 0
    head: int = 0


@dataclass(frozen=True, kw_only=True)
class FilmRequest:
    """A picture to draw step by step."""

    model: str = ""
    prompt: str = ""
    steps: int = 20
    guidance: float = 3.0
    sampler: str = "dpm++"
    seed: int = 0
    image: str = ""  # to change: a data URL
    mask: str = ""  # a data URL: white where the image is to be drawn again
    strength: float | None = None

    def __post_init__(self):
        check_length(self.prompt, "prompt")
        check(1 <= self.steps <= MOST_STEPS, "steps", self.steps, f"1 to {MOST_STEPS}")
        check(abs(self.seed) < 2**40, "seed", self.seed, "below 2**40")
        if not self.image and (self.mask or self.strength is not None):
            raise BadRequest("mask and strength change a picture: send image as well", "image")


@dataclass(frozen=True, kw_only=True)
class WalkRequest:
    """Two pictures, data URLs, and how many pictures there are from one to the other."""

    model: str = ""
    first: str
    last: str
    pictures: int = 12

    def __post_init__(self):
        rule = f"2 to {MOST_WALKED}"
        check(2 <= self.pictures <= MOST_WALKED, "pictures", self.pictures, rule)


def handle(kind: type, function: Callable[[Request, Any], Awaitable[Any]]) -> Callable:
    """A handler that reads the body as `kind`, and answers with what `function` returns."""

    @wraps(function)
    async def answer(request: Request) -> Response:
        try:
            given, _ = read(kind, await read_json(request))
            found = await function(request, given)
        except ValueError as error:  # of a lesson or a calculator
            raise BadRequest(str(error)) from error
        return found if isinstance(found, Response) else Json(found)

    return answer


def handle_query(function: Callable[[Request], Any]) -> Callable:
    """A handler of GET. The function may read files, so another thread calls it."""

    @wraps(function)
    async def answer(request: Request) -> Response:
        try:
            found = await anyio.to_thread.run_sync(function, request)
        except (ValueError, OSError) as error:
            raise BadRequest(str(error)) from error
        return found if isinstance(found, Response) else Json(found)

    return answer


# ---- models -------------------------------------------------------------------------------------


def list_models(request: Request) -> list[dict[str, Any]]:
    """The served runs, with the sizes that the page needs for its controls."""
    found = []
    for run in request.app.state.runs.values():
        row = {"id": run.name, "abilities": sorted(run.abilities)}
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


def read_pieces(run: Served, ids: list[int]) -> list[dict[str, Any]]:
    return [text_views.piece(run.tokenizer, i)._asdict() for i in ids]


def read_next(run: Served, ids: list[int]) -> dict[str, Any]:
    logits = text_views.next_logits(run.model, run.tokenizer, ids)
    likeliest = logits.topk(min(text_views.LIKELIEST, len(logits))).indices.tolist()
    data = logits.numpy().astype("<f4").tobytes()
    return {"logits": base64.b64encode(data).decode(), "likeliest": read_pieces(run, likeliest)}


def read_attention(run: Served, ids: list[int], asked: AttentionRequest) -> dict[str, Any]:
    weights = text_views.attention(run.model, ids, asked.layer, asked.head)
    rows = [[round(w, 4) for w in row[: t + 1]] for t, row in enumerate(weights.tolist())]
    return {"weights": rows}


async def find_ids(request: Request, given: LookRequest) -> tuple[Served, list[int]]:
    """(a run that continues texts, the ids that it reads of the text)."""
    run = find_run(request.app.state.runs, given.model, "complete")
    args = (run.tokenizer, given.text, run.front)
    return run, await anyio.to_thread.run_sync(text_views.read_ids, *args)


async def tokens(request: Request, given: LookRequest) -> dict[str, Any]:
    """The tokens of a text: {"tokens": [{"id": 17, "text": "The", "shown": true}, ...]}."""
    run, ids = await find_ids(request, given)
    return {"tokens": await anyio.to_thread.run_sync(read_pieces, run, ids)}


async def next_token(request: Request, given: LookRequest) -> dict[str, Any]:
    """All logits of the next token, as base64 of little-endian float32, and the likeliest ones.

    The page applies temperature and filters to them itself.
    """
    run, ids = await find_ids(request, given)
    return await call(request.app.state.engine, read_next, run, ids)


async def attention(request: Request, given: AttentionRequest) -> dict[str, Any]:
    """The attention weights of one head: row t has those of token t to tokens 0 ... t."""
    run, ids = await find_ids(request, given)
    return await call(request.app.state.engine, read_attention, run, ids, given)


# ---- pictures -----------------------------------------------------------------------------------


def to_url(image: Tensor) -> str:
    """(1, C, H, W) in [-1, 1] -> a PNG as a data URL."""
    return f"data:image/png;base64,{to_png(to_pixels(image)[0])}"


def read_image(run: Served, url: str, param: str) -> Tensor:
    """A picture that the page sent, as the run's autoencoder reads it: (1, C, H, W) in [-1, 1]."""
    config = getattr(run.model, "autoencoder", run.model).config
    data = decode_base64(url, param)
    return to_images(read_picture(data, config.image_size, config.in_channels, param))


def read_given(run: Served, asked: FilmRequest) -> dict[str, Any]:
    """The picture of a request, its mask and its strength, for TextToImage.plan."""
    if not asked.image:
        return {}
    given: dict[str, Any] = {"init_images": read_image(run, asked.image, "image")}
    if asked.mask:
        size = run.model.config.autoencoder.image_size
        given["mask"] = read_mask(decode_base64(asked.mask, "mask"), size, "mask")
    given["strength"] = share_to_redraw(asked.strength, bool(asked.mask))
    return given


def make_film(run: Served, asked: FilmRequest, given: dict) -> Iterator[drawing.Moment]:
    if not isinstance(run.model, TextToImage):
        return drawing.sample_film(run.model, asked.steps, asked.sampler, asked.seed)
    return drawing.prompt_film(
        run.model,
        asked.prompt,
        asked.steps,
        asked.guidance,
        asked.sampler,
        asked.seed,
        **given,
    )


def draw_events(run: Served, asked: FilmRequest, given: dict) -> Iterator[dict[str, Any]]:
    """What the page gets for each moment of a drawing."""
    for moment in make_film(run, asked, given):
        yield {
            "step": moment.step,
            "steps": moment.steps,
            "state": to_url(moment.state),
            "estimate": to_url(moment.estimate),
        }


async def draw(request: Request, given: FilmRequest) -> Response:
    """Draw a picture; each step is an event."""
    state = request.app.state
    run = find_run(state.runs, given.model, "draw", "sample")
    if isinstance(run.model, TextToImage):
        check(bool(given.prompt.strip()), "prompt", given.prompt, "what to draw")
    elif given.image:
        raise BadRequest(f"the run {run.name} draws from noise alone: leave out image", "image")
    pictures = await anyio.to_thread.run_sync(read_given, run, given)
    arrivals = items(state.engine, partial(draw_events, run, given, pictures))
    first = await anext(arrivals, None)  # a mistake is answered before the stream starts
    if first is None:
        raise BadRequest("the drawing was ended: the server is closing", status=503)
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


def walk_between(run: Served, ends: list[Tensor], n: int) -> dict[str, list[str]]:
    return {"pictures": [to_url(image) for image in drawing.walk(run.model, *ends, n).split(1)]}


async def walk(request: Request, given: WalkRequest) -> dict[str, list[str]]:
    """Pictures on the way from one to another, in the space of latents."""
    state = request.app.state
    run = find_run(state.runs, given.model, "draw", "rebuild")
    ends = []
    for name in ("first", "last"):
        url = getattr(given, name)
        ends.append(await anyio.to_thread.run_sync(read_image, run, url, name))
    return await call(state.engine, walk_between, run, ends, given.pictures)


# ---- runs ---------------------------------------------------------------------------------------


def all_runs(request: Request) -> dict[str, Path]:
    """The runs in the runs folder, and those that are served."""
    state = request.app.state
    served = [run.opened.folder.parent for run in state.runs.values()]
    return run_views.list_runs(Path(state.runs_folder), served)


def named_run(request: Request) -> Path:
    """The folder of ?run=NAME. Raises BadRequest for a name that is not listed."""
    found = all_runs(request)
    name = request.query_params.get("run", "")
    if name not in found:
        raise BadRequest(f"there is no run {name[:100]!r}", "run", 404)
    return found[name]


def describe_runs(request: Request) -> list[dict[str, Any]]:
    """All runs with their settings and scores."""
    described = []
    for name, folder in all_runs(request).items():
        try:
            row = {"name": name, **run_views.describe(folder, time.time())}
        except (ValueError, KeyError, OSError) as error:
            row = {"name": name, "error": str(error)}
        described.append(row)
    return described


def describe_run(request: Request) -> list[str]:
    """What ?run=NAME costs to train, and what it reached, in sentences."""
    return request.app.state.about(named_run(request))


def list_metrics(request: Request) -> dict[str, Any]:
    """The losses of ?run=NAME after step ?after=N."""
    after = request.query_params.get("after", "-1")
    check(bool(re.fullmatch("-?[0-9]{1,15}", after)), "after", after, "a step")
    return run_views.curves(named_run(request), int(after))


def list_samples(request: Request) -> list[dict[str, Any]]:
    """The samples of ?run=NAME by step."""
    return run_views.samples(named_run(request))


def show_sample(request: Request) -> Response:
    """One sample, ?run=NAME&file=FILE: a PNG, or plain text."""
    file = request.query_params.get("file", "")
    path = run_views.sample_path(named_run(request), file)
    kind = "image/png" if path.suffix == ".png" else "text/plain"
    return FileResponse(path, media_type=kind)


# ---- costs --------------------------------------------------------------------------------------


def list_systems(request: Request) -> dict[str, Any]:
    """Published systems and GPUs."""
    return costs.list_systems()


async def calculate(request: Request, given: costs.Job) -> dict[str, Any]:
    """The cost of a job."""
    return costs.calculate(given)


routes = [
    Route("/api/models", handle_query(list_models)),
    Route("/api/tokens", handle(LookRequest, tokens), methods=["POST"]),
    Route("/api/next", handle(LookRequest, next_token), methods=["POST"]),
    Route("/api/attention", handle(AttentionRequest, attention), methods=["POST"]),
    Route("/api/draw", handle(FilmRequest, draw), methods=["POST"]),
    Route("/api/walk", handle(WalkRequest, walk), methods=["POST"]),
    Route("/api/runs", handle_query(describe_runs)),
    Route("/api/about", handle_query(describe_run)),
    Route("/api/metrics", handle_query(list_metrics)),
    Route("/api/samples", handle_query(list_samples)),
    Route("/api/sample", handle_query(show_sample)),
    Route("/api/systems", handle_query(list_systems)),
    Route("/api/costs", handle(costs.Job, calculate), methods=["POST"]),
]
