"""Python processes that start in milliseconds, because PyTorch is already loaded.

`python WORDS` needs seconds before it runs its first line, most of them to load torch. Here a
server process loads torch and other libraries once. It then makes copies of itself, and each copy
does what `python WORDS` would do. The project's own files are loaded by the copy, from the given
folder. On a system without such a server (Windows), every process starts from scratch.
"""

import multiprocessing
import os
import runpy
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

METHODS = multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")
LIBRARIES = ["torch", "torch._dynamo", "torch.distributed.checkpoint", "tyro", "einops"]
LIBRARIES += ["PIL.Image", "matplotlib.figure", "matplotlib.backends.backend_agg"]
CONTEXT.set_forkserver_preload(LIBRARIES)
# Code of torchrun whose ranks are forked: they have torch loaded already.
TORCHRUN = """
import sys
from torch.distributed.run import main
main(["--run-path", "--start-method", "fork", *sys.argv[1:]])
"""

# To start a process also asks all others whether they have ended. Two threads that ask at once
# would both read the one message that says how, and the second would find nothing: status 255.
ONE_ASKS = threading.Lock()


def become(words: Sequence[str], cwd: str, env: dict[str, str], outputs: tuple[str, str]) -> None:
    """Do what `python WORDS` does in the folder `cwd`. outputs: files for stdout and stderr."""
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = [cwd, *env.get("PYTHONPATH", "").split(os.pathsep)]
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


class Process(NamedTuple):
    running: multiprocessing.Process
    outputs: tuple[Path, Path]  # the files that receive its stdout and stderr

    def said(self) -> tuple[str, str]:
        """Its stdout and stderr so far."""
        return tuple(path.read_text(encoding="utf-8") for path in self.outputs)

    def wait(self, seconds: float) -> int:
        """Wait for its end and return its exit status. Kills it and raises TimeoutError if late."""
        if not connection.wait([self.running.sentinel], seconds):
            self.running.kill()
            raise TimeoutError(f"no end after {seconds} s: {self.said()}")
        with ONE_ASKS:
            self.running.join()
            return self.running.exitcode

    def is_alive(self) -> bool:
        with ONE_ASKS:
            return self.running.is_alive()

    def wait_for(self, text: str, seconds: float) -> None:
        """Wait until `text` is in its stdout, or it has ended, or the time is up."""
        end = time.monotonic() + seconds
        while text not in self.said()[0] and self.is_alive() and time.monotonic() < end:
            time.sleep(0.02)


def start(words: Sequence[str], folder: Path, cwd: Path, env: dict[str, str]) -> Process:
    """Start `python WORDS` in the folder `cwd`. Its output goes to files in `folder`."""
    name = uuid.uuid4().hex
    outputs = tuple(folder / f"{name}.{kind}" for kind in ("out", "err"))
    for path in outputs:
        path.touch()
    names = tuple(map(str, outputs))
    words = [str(word) for word in words]
    running = CONTEXT.Process(target=become, args=(words, str(cwd), {**os.environ, **env}, names))
    with ONE_ASKS:
        running.start()
    return Process(running, outputs)
