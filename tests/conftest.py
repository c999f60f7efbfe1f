"""What several test files share: a small real text, a tiny run trained on it, an oracle, ranks."""

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read as torch loads: tests share out the cores

import processes
import torch

import train

ROOT = Path(__file__).parent.parent
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
SIZES = """--data.tokenizer bytes --model.vocab-size 257 --model.n-layer 1 --model.n-head 2
--model.d-model 32 --model.context-length 32 --train.batch-size 4 --train.steps 4
--train.eval-every 2 --train.log-every 1 --train.micro-batch-size 0 --data.val-fraction 0.1"""


def call(module, *arguments: str) -> int:
    """module.main() as `python module.py ARGUMENTS` would run it: its exit status; 1 and the
    message on stderr where main returns one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        try:
            status = module.main()
        except SystemExit as stop:
            status = stop.code
    if isinstance(status, str):
        print(status, file=sys.stderr)
        return 1
    return status or 0


def random_weights(build: Callable[[], torch.nn.Module], matrices: float = 0.1) -> torch.nn.Module:
    """The model that build() makes, for evaluation, with norms and biases made random too: ones
    and zeros, as they begin, would hide that two of them were taken for each other."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.ndim == 1 else matrices))
    return model


def run_two_ranks(script: str, *arguments) -> list[tuple[str, str]]:
    """Run Python code in two processes that find each other; what each wrote to stdout, and to
    stderr with its exit status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join(str(ROOT / name) for name in ("", "tests", "tests/training"))
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "OMP_NUM_THREADS": "1", "PYTHONPATH": path}  # fmt: skip
    with TemporaryDirectory() as folder:
        ranks = [
            processes.start(["-c", script, *arguments], Path(folder), ROOT,
                            {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]  # fmt: skip
        try:
            ended = [f"exit status {rank.wait(100)}\n" for rank in ranks]
            said = [rank.said() for rank in ranks]
            return [(out, err + status) for (out, err), status in zip(said, ended)]
        finally:
            for rank in ranks:
                rank.running.kill()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """What a killed process wrote, the system keeps: only a power cut would tell the difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def no_forecast():
    """What training will cost, said before each run, takes longer than tiny trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.calc, "describe", lambda *arguments: "")
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """20 KB of Python's language reference."""
    path = tmp_path_factory.mktemp("text") / "reference.txt"
    path.write_text("\n".join(map(topics.get, sorted(topics)))[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def options(text, tmp_path_factory) -> list[str]:
    """Command-line options of a run of four steps on that text, without --out."""
    cache = tmp_path_factory.mktemp("cache")
    return [*SIZES.split(), "--data.path", str(text), "--data.cache", str(cache)]


@pytest.fixture(scope="session")
def tiny_run(options, tmp_path_factory) -> Path:
    """The directory of such a run, complete; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert call(train, *options, "--out", out) == 0
    return out
