"""Serve trained runs over HTTP:  python -m tinyfm.serve runs/gpt runs/chat runs/clip ...

It speaks the API of OpenAI's clients, and shows a page in the browser. Only this machine can reach
it, unless --host says otherwise, which needs a key. README.md in this folder has examples.

    python -m tinyfm.serve runs/gpt runs/chat --open         # and open the page
    python -m tinyfm.serve runs/gpt --adapter runs/lora      # a base with the changes of a LoRA
    python -m tinyfm.serve runs/clip --pictures holiday/     # search your own pictures
    python -m tinyfm.serve runs/gpt --host 0.0.0.0 --api-key SECRET   # for others in the network

Ctrl-C ends it, after the requests that are running.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

import tinyfm.common.startup as startup
from tinyfm import adapt, compiled, quantize
from tinyfm.calc import estimate
from tinyfm.common import device as devices
from tinyfm.common.config import FolderPath, Name, Quantize, RunPaths, Text, Texts
from tinyfm.common.console import run_command
from tinyfm.common.options import parse
from tinyfm.recipes import run_dir

try:
    import uvicorn
    from starlette.applications import Starlette

    from tinyfm.serve.app import create_app
    from tinyfm.serve.engine import Engine
    from tinyfm.serve.families import Served, serve_run
    from tinyfm.serve.guard import PatientProtocol, Settings, is_loopback
except ModuleNotFoundError as error:
    if error.name not in ("uvicorn", "starlette", "anyio"):
        raise
    needed = "tinyfm/serve/requirements.txt"
    sys.exit(f"error: serving needs {error.name}, which is not installed: pip install -r {needed}")

KEY_VARIABLE = "TINYFM_API_KEY"  # an option could be read by every user of the machine
CONNECTIONS = 500  # at once; further ones are refused


@dataclass(frozen=True)
class Options:
    # folders of runs, or of their checkpoints
    runs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN ...")]]
    # address to listen on; 0.0.0.0 is all networks of this machine
    host: Name = "127.0.0.1"
    port: int = 8000  # port to listen on; 0 = any free one
    open: bool = False  # open the page in the browser
    # key that requests need; better set TINYFM_API_KEY, which other users cannot read
    api_key: Text = ""
    allow_origin: Texts = ()  # pages of others that may send requests, such as http://localhost:3000
    adapter: RunPaths = ()  # runs that adapted one of these: use their changes
    pictures: FolderPath = ""  # pictures for a CLIP to search (default: those of its data)
    runs_folder: FolderPath = "runs"  # where the page finds runs to compare, trained or training
    # compile the models that write: the first text waits half a minute, small models gain nothing
    compile: bool = False
    raw: bool = False  # use the weights of the last step, even if averaged ones were kept
    device: Name = "auto"  # device to compute on: cpu, cuda, mps, or auto
    # number format of the weights; bfloat16 needs half the memory and is faster
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Quantize = "none"  # format of the matrices; int8 and int4 take less memory
    max_rows: int = 16  # texts that a run writes at once
    max_waiting: int = 256  # requests that wait for a place; further ones are refused
    max_tokens: int = 32_768  # most tokens of a text
    max_body: int = 10_000_000  # most bytes of a request
    grace: float = 10.0  # seconds that running requests have at the end

    def __post_init__(self):
        for name in ("max_rows", "max_waiting", "max_tokens", "max_body"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is {getattr(self, name)}; use 1 or more")
        if not 0 <= self.port < 65_536:
            raise ValueError(f"--port is {self.port}; use 1 to 65535, or 0 for any free one")
        if not 0 <= self.grace < 3600:
            raise ValueError(f"--grace is {self.grace}; use 0 to 3600 seconds")
        for origin in self.allow_origin:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^A-Z/\s*]+/?", origin):
                raise ValueError(
                    f"--allow-origin is {origin!r}; give scheme, host and port of a page in small "
                    "letters, such as http://localhost:3000"
                )
        if self.pictures and not Path(self.pictures).is_dir():
            raise ValueError(f"--pictures is {self.pictures}, which is no folder; correct the path")


# ---- opening -------------------------------------------------------------------------------------


def open_runs(options: Options) -> list[Served]:
    """The runs, each with the adapters that fit it, on the device. Raises ValueError."""
    if not options.runs:
        raise ValueError("name the runs to serve: python -m tinyfm.serve runs/gpt")
    device = devices.choose_device(options.device)
    dtype = devices.choose_dtype(options.dtype, device)
    opened = [run_dir.open_run(path, options.raw) for path in options.runs]
    for path in options.adapter:
        add_adapter(opened, path)
    served: list[Served] = []
    for path, run in zip(options.runs, opened):
        with contextlib.suppress(ValueError):  # a soft prompt cannot be merged
            adapt.merge(run.model)
        run_dir.quantize_run(run, run.model, options.quantize)
        run.model.to(device, dtype).eval()
        quantize.pack(run.model)
        if run.run.family == "text2image":
            run.model.tokenizer = run.tokenizer
        served.append(serve_run(run, path, {other.name for other in served}))
    if options.pictures and not any("search" in run.abilities for run in served):
        raise ValueError("--pictures needs a run that can search them: name a CLIP too")
    return served


def add_adapter(opened: list, path: str) -> None:
    """Add an adapter to the runs that it fits. Raises ValueError if there is none."""
    problems = []
    for run in opened:
        try:
            run_dir.add_adapters(run, [path])
        except ValueError as error:
            problems.append(str(error))
    if len(problems) == len(opened):
        raise ValueError(f"--adapter {path} fits none of these runs: {problems[0]}")


def start_engine(served: list[Served], options: Options) -> Engine:
    engine = Engine(options.max_rows, options.max_waiting)
    for run in served:
        if "complete" in run.abilities:
            if options.compile:
                compiled.compile_decoding(run.model)
            engine.add(run.name, run.model, run.tokenizer)
    return engine


def choose_settings(options: Options) -> Settings:
    """Raises ValueError for a server that others can reach without a key."""
    key = options.api_key or os.environ.get(KEY_VARIABLE, "")
    if not is_loopback(options.host) and not key:
        raise ValueError(
            f"--host {options.host} lets others reach this server: give it a key, "
            f"{KEY_VARIABLE}=SECRET python -m tinyfm.serve ..., or --api-key SECRET"
        )
    if key and not (key.isascii() and key.isprintable() and key.strip() == key):
        raise ValueError(
            "the key has characters that a header cannot carry; use letters and digits"
        )
    return Settings(
        host=options.host,
        api_key=key,
        allow_origins=tuple(origin.rstrip("/") for origin in options.allow_origin),
        max_tokens=options.max_tokens,
        max_body=options.max_body,
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ValueError if the address cannot be used."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":  # elsewhere this would share the port with another program
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"{host}:{port} cannot be used: {error}; choose another --host, another --port, or "
            "--port 0 for any free one"
        ) from error
    return listening


def url_of(listening: socket.socket) -> str:
    """The address to type into a browser on this machine."""
    host, port = listening.getsockname()[:2]
    ip = ipaddress.ip_address(host)
    if ip.is_unspecified:
        ip = ipaddress.ip_address("127.0.0.1")
    return f"http://[{ip}]:{port}/" if ip.version == 6 else f"http://{ip}:{port}/"


def about_run(folder: Path) -> list[str]:
    """What a run costs to train, and what it reached: two sentences for the page.

    Raises ValueError if config.json is none of a run.
    """
    _, run = run_dir.read_settings(folder / "config.json")
    with torch.device("meta"):
        model = run.build_model()
    return [estimate.describe(model, run.optim, run.train), run_dir.read_verdict(folder)]


# ---- running -------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """Ends in order, with status 0, at the first SIGTERM or Ctrl-C; at a second one at once."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float):
        super().__init__(config)
        self.engine = engine
        self.grace = grace

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        before = {number: signal.signal(number, self.end) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def end(self, number: int, frame: object) -> None:
        """A signal handler: take no more requests, and end the texts that take too long."""
        self.force_exit = self.should_exit
        if not self.should_exit:
            threading.Thread(target=self.engine.close, args=(self.grace,), daemon=True).start()
        self.should_exit = True


def make_config(app: Starlette, grace: float) -> uvicorn.Config:
    """How uvicorn serves the app. grace: seconds that running requests have at the end."""
    for name in ("uvicorn.error", "asyncio"):  # which report each client that goes away
        logging.getLogger(name).setLevel(logging.ERROR)
    return uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(grace) + 5,
    )


def serve(options: Options) -> None:
    """Serve until a signal ends it."""
    settings = choose_settings(options)
    listening = listen(options.host, options.port)
    served = open_runs(options)
    engine = start_engine(served, options)
    app = create_app(served, engine, settings, options.pictures, options.runs_folder, about_run)
    url = url_of(listening)
    for run in served:
        can = ", ".join(sorted(run.abilities)) or "nothing that this server offers"
        print(f"{run.name}: {run.opened.folder}, {can}")
    server = Server(make_config(app, options.grace), engine, options.grace)
    with server.capture_signals():  # from here on: one may come as soon as the line is printed
        print(f"serving at {url}  (Ctrl-C ends it)", flush=True)
        startup.loaded()
        if options.open:
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        server.run(sockets=[listening])


def main() -> int | str:
    try:
        serve(parse(Options, __doc__, "python -m tinyfm.serve"))
    except (ValueError, OSError) as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, lasting=True))
