"""The server's routes: the API that OpenAI's clients speak, and the page.

    app = create_app(runs, engine, Settings())

A handler finds in request.app.state: `runs` {name: Served}, the `engine` (engine.py), the
`settings`, and the `indexes` of pictures. It raises BadRequest for what it does not serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Mount, Route
from starlette.staticfiles import StaticFiles

from tinyfm.serve import completions, images, page_api, vectors
from tinyfm.serve.engine import Busy, Engine
from tinyfm.serve.families import Served, find_run
from tinyfm.serve.guard import Guard, Json, Settings, error_response, is_api
from tinyfm.serve.requests import BadRequest

PAGE = Path(__file__).parent / "page"


# ---- which runs there are ------------------------------------------------------------------------


def describe(run: Served) -> dict[str, Any]:
    return {
        "id": run.name,
        "object": "model",
        "created": 0,
        "owned_by": "tinyfm",
        "family": run.family,
        "abilities": sorted(run.abilities),
    }


async def list_models(request: Request) -> Response:
    """GET /v1/models: the runs, with what each can do."""
    runs = request.app.state.runs.values()
    return Json({"object": "list", "data": [describe(run) for run in runs]})


async def show_model(request: Request) -> Response:
    """GET /v1/models/NAME"""
    return Json(describe(find_run(request.app.state.runs, request.path_params["name"])))


# ---- what goes wrong -----------------------------------------------------------------------------


async def answer_bad_request(request: Request, error: BadRequest) -> Response:
    return error_response(error)


async def answer_busy(request: Request, error: Busy) -> Response:
    return error_response(BadRequest(f"the server is busy: {error}", status=503))


async def answer_unknown(request: Request, error: HTTPException) -> Response:
    """No such path, or not by this method."""
    path = request.url.path[:200]
    headers = error.headers or {}
    problem = f"there is no {request.method} {path}; GET /v1/models lists the runs"
    if "Allow" in headers:
        problem = f"{path} is not for {request.method}: use {headers['Allow']}"
    answer = error_response(BadRequest(problem, status=error.status_code))
    answer.headers.update(headers)
    return answer


async def answer_nobody(request: Request, error: ClientDisconnect) -> Response:
    """The client has gone away: nobody reads this."""
    return Response(status_code=499)


async def answer_failure(request: Request, error: Exception) -> Response:
    """A fault of the server. The reason goes to its log, not to the client."""
    return error_response(BadRequest("the server failed; its log has the reason", status=500))


HANDLERS = {
    BadRequest: answer_bad_request,
    Busy: answer_busy,
    HTTPException: answer_unknown,
    ClientDisconnect: answer_nobody,
    Exception: answer_failure,
}


# ---- the application -----------------------------------------------------------------------------


class PageFiles(Mount):
    """The files of the page, at all paths but those of the API: a wrong method there is a 405."""

    def matches(self, scope: Any) -> tuple[Match, Any]:
        if is_api(scope["path"]):
            return Match.NONE, {}
        return super().matches(scope)


ROUTES = [
    Route("/v1/models", list_models),
    Route("/v1/models/{name:path}", show_model),
    Route("/v1/completions", completions.complete, methods=["POST"]),
    Route("/v1/chat/completions", completions.answer_chat, methods=["POST"]),
    Route("/v1/embeddings", vectors.embed, methods=["POST"]),
    Route("/v1/classify", vectors.classify, methods=["POST"]),
    Route("/v1/search", vectors.search, methods=["POST"]),
    Route("/v1/images/generations", images.generate, methods=["POST"]),
    Route("/v1/images/edits", images.edit, methods=["POST"]),
]


def create_app(
    runs: Sequence[Served],
    engine: Engine,
    settings: Settings | None = None,
    pictures: str = "",
    runs_folder: str = "runs",
    about: Callable[[Path], list[str]] = lambda folder: [],
) -> Starlette:
    """The server as an ASGI application. The engine has the text models among the runs already.

    pictures: a folder to search, instead of the data of each CLIP. runs_folder: where the page
    finds runs to compare. about: what the page says of the run in a folder, in sentences.
    """
    settings = settings or Settings()
    page = PageFiles("/", StaticFiles(directory=PAGE, html=True))
    app = Starlette(
        routes=[*ROUTES, *page_api.routes, page],
        middleware=[Middleware(Guard, settings=settings)],
        exception_handlers=HANDLERS,
    )
    app.router.redirect_slashes = False
    app.state.runs = {run.name: run for run in runs}
    app.state.engine = engine
    app.state.settings = settings
    app.state.runs_folder = runs_folder
    app.state.about = about
    app.state.indexes = vectors.Indexes(engine, pictures)
    return app
