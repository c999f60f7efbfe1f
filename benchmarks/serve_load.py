"""The server under load:  python benchmarks/serve_load.py runs/gpt [--clients 200] [--seconds 60]

It starts `python -m tinyfm.serve RUN` and sends it clients of five kinds at once:

    writers      ask for texts, whole or as streams, and compare them with those of a quiet server
    slow         read a stream a few bytes at a time
    half-open    send half a request, and nothing more
    cancelling   go away after the first token, 1,000 times in all
    bad          send values, bodies and pages' requests that must be refused

Then it says what was served, how long the writers waited, and how much memory the server took:
before the load, at most, in the middle and at the end of it, and after it. It ends with status 1 if
a text was wrong, something bad was served, or the memory at the end exceeds that in the middle by a
tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["The", "The with statement", "It was", "def ", "Return a", "In this"]
TOKENS = 16  # of each text
PATIENCE = 120.0  # seconds after which an answer is missing

Body = dict[str, object]


@dataclass
class Counts:
    """What the clients met."""

    met: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # of each text that was served
    problems: list[str] = field(default_factory=list)


# ---- one connection ------------------------------------------------------------------------------


def to_request(body: Body | bytes, **headers: str) -> bytes:
    """POST /v1/completions."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {
        "Host": "127.0.0.1",
        "Content-Type": "application/json",
        "Content-Length": str(len(content)),
        "Connection": "close",
    } | headers
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + content


@contextlib.asynccontextmanager
async def connected(port: int):
    """A connection that is closed at the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def exchange(port: int, request: bytes) -> tuple[int, str]:
    """(status, body) of the answer to a request."""
    async with connected(port) as (reader, writer):
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), PATIENCE)
    head, _, body = answer.decode("utf-8", "replace").partition("\r\n\r\n")
    return int(head.split()[1]), body


def text_of(body: str) -> str:
    """The text in a whole answer, or in a stream."""
    if body.startswith("{"):
        return json.loads(body)["choices"][0]["text"]
    events = re.findall(r"^data: (\{.*)$", body, re.MULTILINE)
    chunks = [json.loads(event) for event in events]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk.get("choices"))


# ---- clients -------------------------------------------------------------------------------------


class Load:
    """The clients of one load, and what they have met."""

    def __init__(self, port: int, seconds: float, cancellations: int):
        self.port = port
        self.end = time.monotonic() + seconds
        self.cancellations = cancellations  # that are still to be made
        self.counts = Counts()
        self.expected: dict[str, str] = {}

    def body(self, i: int, stream: bool, tokens: int = TOKENS) -> Body:
        prompt = PROMPTS[i % len(PROMPTS)]
        return {"prompt": prompt, "seed": 1, "max_tokens": tokens, "stream": stream}

    async def learn(self) -> None:
        """Ask for each text alone: what the writers must get."""
        for i, prompt in enumerate(PROMPTS):
            status, body = await exchange(self.port, to_request(self.body(i, False)))
            assert status == 200, body
            self.expected[prompt] = text_of(body)

    async def write(self, i: int) -> None:
        """A writer: one text after the other."""
        while time.monotonic() < self.end:
            i += 1
            body = self.body(i, stream=i % 2 == 0)
            start = time.monotonic()
            status, answer = await exchange(self.port, to_request(body))
            if status == 503:
                self.counts.met["refused"] += 1
                await asyncio.sleep(0.2)
                continue
            self.counts.seconds.append(time.monotonic() - start)
            self.counts.met["served"] += 1
            if status != 200 or text_of(answer) != self.expected[body["prompt"]]:
                self.counts.problems.append(f"a wrong text: {status} {answer[:200]}")

    async def read_slowly(self, i: int) -> None:
        while time.monotonic() < self.end:
            async with connected(self.port) as (reader, writer):
                writer.write(to_request(self.body(i, True, 4 * TOKENS)))
                answer = b""
                while part := await asyncio.wait_for(reader.read(500), PATIENCE):
                    answer += part
                    await asyncio.sleep(0.02)
            if b" 503 " in answer[:20]:
                self.counts.met["refused"] += 1
                await asyncio.sleep(0.2)
            elif b"data: [DONE]" in answer:
                self.counts.met["read slowly"] += 1
            else:
                self.counts.problems.append(f"a stream without an end: {answer[-200:]!r}")

    async def stay_half_open(self, i: int) -> None:
        """Wait until the server lets go, or the load ends."""
        request = to_request(self.body(i, False))
        while time.monotonic() < self.end:
            async with connected(self.port) as (reader, writer):
                writer.write(request[: 40 if i % 2 else -5])
                left = max(0.1, self.end - time.monotonic())
                with contextlib.suppress(asyncio.TimeoutError, ConnectionError):
                    await asyncio.wait_for(reader.read(), left)
                    self.counts.met["let go"] += 1

    async def cancel(self, i: int) -> None:
        """Go away after the first token; the load goes on until that was done often enough."""
        while self.cancellations > 0:
            self.cancellations -= 1
            async with connected(self.port) as (reader, writer):
                writer.write(to_request(self.body(i, True, 10_000)))
                head = await asyncio.wait_for(reader.readline(), PATIENCE)
                if b" 503 " in head:
                    self.cancellations += 1
                    await asyncio.sleep(0.2)
                    continue
                await asyncio.wait_for(reader.readuntil(b"data: "), PATIENCE)
            self.counts.met["cancelled"] += 1

    async def be_bad(self, i: int) -> None:
        large = b'{"prompt": "' + b"a" * 11_000_000 + b'"}'
        requests = [
            to_request(self.body(i, False) | {"n": 10_000}),
            to_request(self.body(i, False) | {"max_tokens": 10**9}),
            to_request(b'{"prompt": "a", "temperature": NaN}'),
            to_request(b'{"prompt": "\xff"}'),
            to_request(b"[" * 100_000),
            to_request(self.body(i, False), Origin="https://evil.example"),
            to_request(self.body(i, False), Host="evil.example"),
            to_request(large),
        ]
        while time.monotonic() < self.end:
            for request in requests:
                status, body = await exchange(self.port, request)
                self.counts.met["bad"] += 1
                if not 400 <= status < 500:
                    self.counts.problems.append(f"a bad request: {status} {body[:200]}")
                await asyncio.sleep(0.2)


async def run_load(port: int, clients: int, seconds: float, cancellations: int) -> Counts:
    """All clients at once. Of ten, six write, and one is of each other kind."""
    load = Load(port, seconds, cancellations)
    await load.learn()
    kinds = [load.cancel, load.read_slowly, load.stay_half_open, load.be_bad] + [load.write] * 6
    load.end = time.monotonic() + seconds
    await asyncio.gather(*(kinds[i % len(kinds)](i) for i in range(clients)))
    return load.counts


# ---- the server ----------------------------------------------------------------------------------


@contextlib.contextmanager
def served(run: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """`python -m tinyfm.serve RUN` and its port; it must end in order."""
    command = [sys.executable, "-m", "tinyfm.serve", run, "--port", "0", "--grace", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            found = re.search(r"serving at http://127.0.0.1:(\d+)", line)
            if found:
                yield process, int(found[1])
                break
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        if status:
            raise SystemExit(f"the server ended with status {status}")
    finally:
        process.kill()


def memory_mib(process: int) -> float:
    """Resident memory of a process (Linux)."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


async def watch(process: int, found: list[float]) -> None:
    """Add the memory of a process to a list, every half second."""
    while True:
        found.append(memory_mib(process))
        await asyncio.sleep(0.5)


async def measure(process: int, port: int, options: argparse.Namespace) -> tuple[Counts, list]:
    memory: list[float] = []
    watching = asyncio.create_task(watch(process, memory))
    counts = await run_load(port, options.clients, options.seconds, options.cancellations)
    watching.cancel()
    return counts, memory


def describe(counts: Counts, memory: list[float], after: float) -> list[str]:
    ordered = sorted(counts.seconds)
    median, slowest = ordered[len(ordered) // 2], ordered[-1]
    middle = memory[len(memory) // 2]
    met = ", ".join(f"{number:,} {name}" for name, number in sorted(counts.met.items()))
    return [
        met,
        f"a text of {TOKENS} tokens took {median:.2f} s (median), {slowest:.2f} s (slowest)",
        f"memory: {memory[0]:.0f} MiB at first, {max(memory):.0f} at most, {middle:.0f} in the "
        f"middle, {memory[-1]:.0f} at the end, {after:.0f} after",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", metavar="RUN", help="run of a GPT to serve")
    parser.add_argument("--clients", type=int, default=200, help="clients at once; default: 200")
    parser.add_argument("--seconds", type=float, default=60, help="length; default: 60")
    parser.add_argument("--cancellations", type=int, default=1000, help="in all; default: 1000")
    options = parser.parse_args()
    if options.clients < 5 or options.seconds <= 0:
        parser.error("use --clients 5 or more, the fifth of which writes, and --seconds above 0")
    with served(options.run) as (process, port):
        counts, memory = asyncio.run(measure(process.pid, port, options))
        time.sleep(2)
        after = memory_mib(process.pid)
    print("\n".join(describe(counts, memory, after)))
    if memory[-1] > 1.1 * memory[len(memory) // 2]:
        counts.problems.append("the memory grows")
    print("\n".join(counts.problems[:20]) or "no wrong text, nothing bad served, memory flat")
    return 1 if counts.problems else 0


if __name__ == "__main__":
    sys.exit(main())
