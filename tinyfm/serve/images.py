"""Drawings: /v1/images/generations and /v1/images/edits.

The engine draws step by step, and between two steps it writes a token of every text. So no text
waits for the end of a drawing. The pictures are those of `sample.py RUN -n N --seed SEED` with the
same options.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from tinyfm.common.seeds import row_generators
from tinyfm.ddpm import Diffusion, gaussian_noise
from tinyfm.serve import engine as engines
from tinyfm.serve.families import Served, find_run, warn_about_texts
from tinyfm.serve.guard import Json, read_json, read_json_or_form, unless_gone
from tinyfm.serve.requests import (
    BadRequest,
    EditRequest,
    ImageRequest,
    decode_base64,
    read,
    share_to_redraw,
)
from tinyfm.serve.uploads import read_mask, read_picture, to_images, to_pixels, to_png
from tinyfm.text2image import TextToImage

SIZE_FACTOR = 4  # a picture may be this many times as high or as wide as those of training

# ---- drawing -------------------------------------------------------------------------------------


def draw_prompts(
    model: TextToImage, prompts: list[str], sampler: str, seed: int, **options: Any
) -> Iterator[Tensor]:
    """The states of the sampler, step by step, and at last the pictures (B, C, H, W) in [-1, 1].

    options: those of TextToImage.generate. Raises ValueError as it does.
    """
    generators = row_generators(seed, 0, range(len(prompts)))
    plan = model.plan(prompts, sampler=sampler, generators=generators, **options)
    states = model.diffusion.sampler_states(
        sampler, plan.denoise, plan.x, plan.path, plan.generators
    )
    for state in states:
        yield state
    yield plan.correct_images(model.decode(plan.correct_x0(state)))


def draw_samples(model: Diffusion, n: int, steps: int, sampler: str, seed: int) -> Iterator[Tensor]:
    """The same without a prompt, for a model of pictures alone: the last state is the pictures."""
    config = model.config
    generators = row_generators(seed, 0, range(n))
    path = model.path(steps, sampler)
    shape = (config.in_channels, config.image_size, config.image_size)
    x = gaussian_noise(generators, shape).to(next(model.parameters()).device)
    return model.sampler_states(sampler, model.denoiser(), x, path, generators)


async def collect(request: Request, function: Any) -> Tensor:
    """What such an iterator yields last, drawn by the engine. Raises BadRequest."""
    arrivals = engines.items(request.app.state.engine, function)

    async def wait() -> Tensor:
        async for state in arrivals:
            found = state
        if arrivals.handle.cancelled:
            raise BadRequest("the drawing was ended: the server is closing", status=503)
        return found

    try:
        return await unless_gone(request, wait())
    except ValueError as error:
        raise BadRequest(str(error)) from error
    finally:
        arrivals.cancel()


def check_size(run: Served, asked: ImageRequest) -> tuple[int, int] | None:
    """The height and width asked for. Raises BadRequest for too large a picture."""
    size = asked.height_and_width()
    if size is None:
        return None
    if not isinstance(run.model, TextToImage):
        raise BadRequest(f"the run {run.name} draws in its own size: leave out size", "size")
    most = SIZE_FACTOR * run.model.config.autoencoder.image_size
    if not 1 <= min(size) <= max(size) <= most:
        raise BadRequest(f"size is {asked.size}; draw at most {most}x{most}", "size")
    return size


async def answer(
    request: Request, run: Served, asked: ImageRequest, warnings: list[str], given: dict[str, Any]
) -> Response:
    """Draw and answer. given: tensors of TextToImage.generate."""
    seed = asked.drawn_seed()
    size = check_size(run, asked)
    if isinstance(run.model, TextToImage):
        if not asked.prompt.strip():
            raise BadRequest("say what to draw, such as: serif latin capital letter q", "prompt")
        warn_about_texts(run, [asked.prompt], warnings)
        options = {"steps": asked.steps, "guidance": asked.guidance, "size": size, **given}
        if asked.negative_prompt:
            options["negative"] = asked.negative_prompt
        prompts = [asked.prompt] * asked.n
        work = partial(draw_prompts, run.model, prompts, asked.sampler, seed, **options)
    else:
        if asked.prompt.strip():
            warnings.append(f"the run {run.name} draws without a prompt: it was not read")
        work = partial(draw_samples, run.model, asked.n, asked.steps, asked.sampler, seed)
    if asked.response_format != "b64_json":
        warnings.append("pictures are sent as b64_json alone, not as the address of a file")
    pixels = to_pixels(await collect(request, work))
    body = {
        "created": int(time.time()),
        "model": run.name,
        "seed": seed,
        "data": [{"b64_json": to_png(image)} for image in pixels],
    }
    if warnings:
        body["warnings"] = warnings
    return Json(body)


# ---- routes --------------------------------------------------------------------------------------


async def generate(request: Request) -> Response:
    """POST /v1/images/generations"""
    asked, warnings = read(ImageRequest, await read_json(request))
    run = find_run(request.app.state.runs, asked.model, "draw", "sample")
    return await answer(request, run, asked, warnings, {})


async def edit(request: Request) -> Response:
    """POST /v1/images/edits"""
    values, files = await read_json_or_form(request, EditRequest, ("image", "mask"))
    # In a form the pictures are files; the request then has the sign "file" in their place.
    asked, warnings = read(EditRequest, values | dict.fromkeys(files, "file"))
    run = find_run(request.app.state.runs, asked.model, "draw")
    sources = {name: files.get(name) for name in ("image", "mask")}
    for name in sources:
        if sources[name] is None and getattr(asked, name):
            sources[name] = decode_base64(getattr(asked, name), name)

    def read_given() -> dict[str, Tensor]:
        config = run.model.config.autoencoder
        size, channels = config.image_size, config.in_channels
        pixels = read_picture(sources["image"], size, channels, "image")
        given = {"init_images": to_images(pixels)}
        if sources["mask"]:
            given["mask"] = read_mask(sources["mask"], size, "mask")
        return given

    given = await anyio.to_thread.run_sync(read_given)
    strength = share_to_redraw(asked.strength, "mask" in given)
    return await answer(request, run, asked, warnings, {**given, "strength": strength})
