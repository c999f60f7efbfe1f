"""Processes that need not load PyTorch first: copies of one that has, made in milliseconds.

`python WORDS` takes seconds until its first own line, most of them for torch. Here a server loads
what is not ours, once; its copies become `python WORDS`, import our own files from where they
stand, and run. Where a system has no such server (Windows), each process starts by itself.
"""

import multiprocessing
import os
import runpy
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

METHODS = multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")
CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed.checkpoint", "tyro", "einops", "PIL.Image"]
)


def become(words: Sequence[str], cwd: str, env: dict[str, str], outputs: tuple[str, str]) -> None:
    """What `python WORDS` does in that folder."""
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    first, sys.argv = words[0], list(words[words[0] == "-m" :])
    sys.path[:0] = [cwd, *env.get("PYTHONPATH", "").split(os.pathsep)]
    if first == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        runpy.run_path(first, run_name="__main__")


class Process(NamedTuple):
    running: multiprocessing.Process
    outputs: tuple[Path, Path]  # what it writes to stdout and to stderr

    def said(self) -> tuple[str, str]:
        return tuple(path.read_text(encoding="utf-8") for path in self.outputs)

    def wait(self, seconds: float) -> int:
        """Its exit status, once it has ended; TimeoutError, and its end, if it has not by then."""
        self.running.join(seconds)
        if self.running.is_alive():
            self.running.kill()
            raise TimeoutError(f"no end after {seconds} s: {self.said()}")
        return self.running.exitcode

    def wait_for(self, text: str, seconds: float) -> None:
        """Until it says so on stdout, or has ended."""
        end = time.monotonic() + seconds
        while text not in self.said()[0] and self.running.is_alive() and time.monotonic() < end:
            time.sleep(0.02)


def start(words: Sequence[str], folder: Path, cwd: Path, env: dict[str, str]) -> Process:
    """Start `python WORDS`; what it writes goes to files in `folder`."""
    name = uuid.uuid4().hex
    outputs = tuple(folder / f"{name}.{kind}" for kind in ("out", "err"))
    for path in outputs:
        path.touch()
    names = tuple(map(str, outputs))
    words = [str(word) for word in words]
    running = CONTEXT.Process(target=become, args=(words, str(cwd), {**os.environ, **env}, names))
    running.start()
    return Process(running, outputs)
