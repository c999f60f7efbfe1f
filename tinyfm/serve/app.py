"""The server's routes: the OpenAI API, and the page.

    app = create_app(runs, engine, Settings())

A handler finds in request.app.state: `runs` {name: Served}, the `engine` (engine.py), and the
`settings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from tinyfm.serve.families import Served

PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class Settings:
    """What the command line decides."""

    host: str = "127.0.0.1"
    api_key: str = ""  # empty: none is needed
    max_body: int = 10_000_000  # bytes of a request


async def list_models(request: Request) -> Response:
    """GET /v1/models: the runs, with what each can do."""
    data = [
        {
            "id": run.name,
            "object": "model",
            "created": 0,
            "owned_by": "tinyfm",
            "family": run.family,
            "abilities": sorted(run.abilities),
        }
        for run in request.app.state.runs.values()
    ]
    return JSONResponse({"object": "list", "data": data})


def create_app(runs: Sequence[Served], engine: Any, settings: Settings | None = None) -> Starlette:
    """The server as an ASGI application."""
    routes = [Route("/v1/models", list_models)]
    if find_spec("tinyfm.serve.page_api"):
        routes += import_module("tinyfm.serve.page_api").routes
    if PAGE.is_dir():
        routes.append(Mount("/", StaticFiles(directory=PAGE, html=True)))
    app = Starlette(routes=routes)
    app.state.runs = {run.name: run for run in runs}
    app.state.engine = engine
    app.state.settings = settings or Settings()
    return app
