"""Serve a GPT-2 of 124M parameters on a CPU: eight clients over one, and over transformers.

    python benchmarks/serve.py [--tokens 48] [--repeats 2] [--layers 12 --width 768] [--record]

Each server is a process with the same random weights. Clients ask over HTTP, each with another
prompt, for greedy continuations. tinyfm is `tinyfm.serve` as a user starts it, with streams. The
peer is what one writes around a library: an endpoint that calls transformers' `generate`, one
request at a time, on the same HTTP server (Starlette and uvicorn). Printed are, for each number
format:

    tokens per second   of one client and of eight at once, of both; and the ratios
    first token         the milliseconds until a client sees its first token: alone, and while seven
                        others write (median, largest)

All take turns in one run, and times are medians. Needs the packages of tests/requirements.txt.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from timing import by_turns, describe_machine, record

CLIENTS = 8
PROMPT_TOKENS = 32
LATECOMERS = 5  # clients whose first token is timed while others write
FORMATS = ("float32", "bfloat16")

# ---- the servers --------------------------------------------------------------------------------


def tinyfm_app(folder: str, dtype: torch.dtype):
    from tinyfm.gpt import GPT
    from tinyfm.recipes.base import OpenRun
    from tinyfm.recipes.gpt import GPTRun
    from tinyfm.serve.app import create_app
    from tinyfm.serve.engine import Engine
    from tinyfm.serve.families import Served
    from tinyfm.tokenizer import ByteTokenizer

    model = GPT.from_pretrained(folder, dtype=dtype).eval()
    run = GPTRun(model=model.config)
    opened = OpenRun(run, model, ByteTokenizer(), Path(folder), {"step": 0}, "random")
    engine = Engine()
    engine.add("gpt2", model, opened.tokenizer)
    return create_app([Served("gpt2", Path(folder), opened)], engine)


def transformers_app(folder: str, dtype: torch.dtype):
    """An endpoint around `generate`; a lock, as two calls at once would share the same cores."""
    import transformers
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    transformers.logging.disable_progress_bar()
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
    lock = threading.Lock()

    def generate(body: dict) -> list[int]:
        tokens = torch.tensor([body["prompt"]])
        with lock, torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=body["max_tokens"],
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[0, len(body["prompt"]) :].tolist()

    async def complete(request):
        new = await run_in_threadpool(generate, await request.json())
        return JSONResponse({"usage": {"completion_tokens": len(new)}})

    return Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])


APPS = {"tinyfm": tinyfm_app, "transformers": transformers_app}


def serve(name: str, folder: str, dtype: str) -> None:
    """Print the port, then serve until the process is ended."""
    import uvicorn

    app = APPS[name](folder, getattr(torch, dtype))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listening])


@contextmanager
def running(name: str, folder: str, dtype: str):
    """A server in a process; its port."""
    command = [sys.executable, __file__, "--server", name, "--folder", folder, "--dtype", dtype]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(30)


# ---- the clients --------------------------------------------------------------------------------


def ask(port: int, client: int, n: int, stream: bool, on_first=lambda: None) -> int:
    """Let one client ask for n tokens; call on_first at the first; return how many came."""
    prompt = [(client * 31 + i * i) % 256 for i in range(PROMPT_TOKENS)]
    body = {"model": "gpt2", "prompt": prompt, "max_tokens": n, "temperature": 0}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(response.read().decode())
    if not stream:
        return json.loads(response.read())["usage"]["completion_tokens"]
    came = 0
    first = True
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        if first:
            on_first()
            first = False
        usage = json.loads(line[6:]).get("usage")
        if usage:
            came = usage["completion_tokens"]
    connection.close()
    return came


def ask_all(port: int, clients: int, n: int, stream: bool) -> None:
    """Let all clients ask at once, and wait for all."""
    with ThreadPoolExecutor(clients) as pool:
        came = list(pool.map(lambda i: ask(port, i, n, stream), range(clients)))
    if came != [n] * clients:
        raise RuntimeError(f"{came} tokens came, not {n} each")


def first_token_ms(port: int, client: int) -> float:
    times = []
    start = time.perf_counter()
    ask(port, client, 1, True, lambda: times.append(time.perf_counter() - start))
    return 1000 * times[0]


def first_tokens(port: int, n: int) -> tuple[list[float], list[float]]:
    """Milliseconds to the first token: alone, and while seven others write."""
    alone = [first_token_ms(port, 100 + i) for i in range(LATECOMERS)]
    among = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        others = [pool.submit(ask, port, i, n, True) for i in range(CLIENTS - 1)]
        time.sleep(0.1)
        while not any(other.done() for other in others) and len(among) < LATECOMERS:
            among.append(first_token_ms(port, 200 + len(among)))
        for other in others:
            other.result()
    return alone, among


# ---- the comparison -----------------------------------------------------------------------------


def compare(folder: str, dtype: str, n: int, repeats: int) -> str:
    """A row of the table."""
    with running("tinyfm", folder, dtype) as ours, running("transformers", folder, dtype) as peer:
        works = {
            "one": lambda: ask_all(ours, 1, n, True),
            "all": lambda: ask_all(ours, CLIENTS, n, True),
            "peer one": lambda: ask_all(peer, 1, n, False),
            "peer all": lambda: ask_all(peer, CLIENTS, n, False),
        }
        seconds = by_turns(works, repeats)
        alone, among = first_tokens(ours, 3 * n)
    one, many = n / seconds["one"], CLIENTS * n / seconds["all"]
    peer_one, peer_many = n / seconds["peer one"], CLIENTS * n / seconds["peer all"]
    return (
        f"| {dtype} | {one:.0f} | {many:.0f} | {many / one:.1f} | {peer_one:.0f} "
        f"| {peer_many:.0f} | {many / peer_many:.1f} | {statistics.median(alone):.0f} "
        f"| {statistics.median(among):.0f}, {max(among):.0f} |\n"
    )


HEAD = f"""\
| format | one client | {CLIENTS} clients | ratio | transformers, one | {CLIENTS} \
| tinyfm over it | first token, ms | among {CLIENTS - 1} |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each client")
    parser.add_argument("--repeats", type=int, default=2, help="number of timed rounds")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model")
    parser.add_argument("--width", type=int, default=768, help="width of the model, 64 a head")
    parser.add_argument("--record", action="store_true", help="write the table to the README")
    parser.add_argument("--server", choices=APPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=FORMATS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.server:
        serve(options.server, options.folder, options.dtype)
        return
    if options.width < 64 or options.width % 64:
        parser.error(f"--width is {options.width}; use a multiple of 64, the width of a head")

    import transformers

    from tinyfm.gpt import GPT
    from tinyfm.recipes import registry

    torch.manual_seed(0)
    shape = registry.find_preset("gpt2-124m").run.model
    heads = options.width // 64
    shape = replace(shape, n_layer=options.layers, d_model=options.width, n_head=heads)
    title = (
        f"{describe_machine()}, transformers {transformers.__version__}; GPT-2 of "
        f"{options.layers} layers of width {options.width}, {PROMPT_TOKENS} + {options.tokens} "
        "tokens; tokens per second:\n\n"
    )
    print(title + HEAD, end="", flush=True)
    rows = ""
    with TemporaryDirectory() as folder:
        GPT(shape).save_pretrained(folder, overwrite=True)
        for dtype in FORMATS:
            row = compare(folder, dtype, options.tokens, options.repeats)
            print(row, end="", flush=True)
            rows += row
    if options.record:
        record("serve", title + HEAD + rows)


if __name__ == "__main__":
    main()
