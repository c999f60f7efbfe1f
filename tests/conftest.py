"""Shared by several test files: a small real text, a tiny run trained on it, two ranks."""

import json
import os
import shutil
import signal
import socket
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch loads; tests run in parallel

import numpy as np
import processes
import torch
from PIL import Image

import train
from tinyfm.common import files
from tinyfm.training.log import Logbook

ROOT = Path(__file__).parent.parent
INKS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
DRAW = Logbook.draw
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
SIZES = """--data.tokenizer bytes --model.vocab-size 257 --model.n-layer 1 --model.n-head 2
--model.d-model 32 --model.context-length 32 --train.batch-size 4 --train.steps 4
--train.eval-every 2 --train.log-every 1 --train.micro-batch-size 0 --data.val-fraction 0.1"""


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "try all wrong answers of the course, not a few"
    parser.addoption("--all-wrong-answers", action="store_true", help=about)


def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores: tests wait for processes that they start, and for the disk."""
    return 1 + len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def call(module, *arguments: str) -> int:
    """Run module.main() as `python module.py ARGUMENTS` would, and return its exit status.

    If main returns a message, it goes to stderr and the status is 1.
    """
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


def refusal(capsys, module, *arguments) -> str:
    """The message of a command that fails."""
    assert call(module, *arguments) == 1
    return capsys.readouterr().err


def unpack_old_runs(folder: Path) -> Path:
    """Unpack the runs of an earlier version; return their folder."""
    with tarfile.open(ROOT / "tests" / "recipes" / "old_runs.tar.xz") as archive:
        # Python 3.11.3 and older have no filters.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        archive.extractall(folder)
    return folder / "old_runs"


def random_weights(build: Callable[[], torch.nn.Module], matrices: float = 0.1) -> torch.nn.Module:
    """The model that build() makes, in evaluation mode, with random norms and biases too.

    Their initial ones and zeros would hide a mistake that exchanges two of them.
    """
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.ndim == 1 else matrices))
    return model


def count_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def assert_equal_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Both models have tensors of the same names, equal bit for bit."""
    tensors = ours.state_dict()
    expected = theirs.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normally distributed numbers, always the same for one shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generators(n: int, seed: int = 0) -> list[torch.Generator]:
    """n generators with different seeds, one per row of a batch."""
    return [torch.Generator().manual_seed(100 * seed + i) for i in range(n)]


def rows_of(run: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_documents(folder: Path) -> None:
    """Write 120 short texts, of words that follow one another in few ways."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    sentence = "the cat sat on a mat and the dog ran to some log under this tree"
    words = sentence.split()
    for i in range(120):
        starts = draw.integers(len(words), size=6)
        runs = [" ".join(words[start : start + 4]) for start in starts]
        (folder / f"{i}.txt").write_text(f"{i} " + ", ".join(runs), encoding="utf-8")


def write_labelled_texts(path: Path) -> None:
    """Write a table of 60 short texts of two classes, which differ in their words."""
    lines = ["text,label"]
    for i in range(60):
        lines.append(f"{i} {'the cat sat' if i % 2 else 'some log'} {i * i},{'ab'[i % 2]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_captioned_pictures(folder: Path) -> None:
    """Write 60 pictures of 8 x 8 pixels with captions such as "red a": a bar in one of the INKS, at
    one of four places, on one of five papers. No two are near to each other."""
    for i in range(60):
        picture = np.full((8, 8, 3), 255 - 8 * (i // 12), dtype=np.uint8)
        name = list(INKS)[i % 3]
        picture[:, 2 * (i % 4)] = INKS[name]
        Image.fromarray(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{name} {'abcd'[i % 4]}", encoding="utf-8")


def assert_it_resumes(run: str, out: Path, steps: int) -> None:
    """A run of so many steps that is resumed half-way ends with the same losses and weights."""
    shutil.copytree(run, out)
    shutil.rmtree(out / f"step-{steps:06}")
    (out / "latest").write_text(f"step-{steps // 2:06}\n", encoding="utf-8")
    assert call(train, "--resume", "--out", out) == 0
    losses, again = ([row["loss"] for row in rows_of(o) if "loss" in row] for o in (run, out))
    assert again == losses
    weights = files.load_tensors(Path(run, f"step-{steps:06}"))
    resumed = files.load_tensors(out / f"step-{steps:06}")
    assert weights.keys() == resumed.keys()
    assert all(weight.equal(resumed[key]) for key, weight in weights.items())


def edit_json(path: Path, **fields) -> None:
    """Change fields of a JSON file; the value `...` removes a field."""
    content = json.loads(path.read_text(encoding="utf-8")) | fields
    content = {name: value for name, value in content.items() if value is not ...}
    path.write_text(json.dumps(content), encoding="utf-8")


def start_two_ranks(script: str, folder: Path, *arguments) -> list[processes.Process]:
    """Start Python code in two processes that find each other. Their output goes to `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "tests", "tests/training")),
    }
    ranks = []
    for rank in range(2):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(processes.start(["-c", script, *arguments], folder, ROOT, environment))
    return ranks


def run_two_ranks(script: str, *arguments) -> list[tuple[str, str]]:
    """Run Python code in two processes that find each other.

    Returns for each process its stdout, and its stderr followed by its exit status.
    """
    with TemporaryDirectory() as folder:
        ranks = start_two_ranks(script, Path(folder), *arguments)
        try:
            statuses = [rank.wait(100) for rank in ranks]
            results = []
            for rank, status in zip(ranks, statuses):
                out, err = rank.said()
                results.append((out, f"{err}exit status {status}\n"))
            return results
        finally:
            for rank in ranks:
                rank.running.kill()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """The system keeps what a killed process wrote: fsync matters only when the power fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_drawing():
    """To draw the loss takes longer than tiny trainings. Processes of their own do draw it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Logbook, "draw", lambda self: None)
        yield


@pytest.fixture
def drawing(monkeypatch):
    """Trainings of this test draw the loss."""
    monkeypatch.setattr(Logbook, "draw", DRAW)


@pytest.fixture(scope="module")
def no_forecast():
    """What training will cost, said before each run, takes longer than tiny trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinyfm.calc.estimate.describe", lambda *arguments: "")
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """20 KB of Python's language reference."""
    path = tmp_path_factory.mktemp("text") / "reference.txt"
    path.write_text("\n".join(map(topics.get, sorted(topics)))[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> Path:
    """A folder of prepared data for all processes of this test run: docs take twenty seconds."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder inside that of the run
        base = base.parent
    return base / "prepared"


@pytest.fixture(scope="session")
def options(text, tmp_path_factory) -> list[str]:
    """Command-line options of a run of four steps on that text, without --out."""
    cache = tmp_path_factory.mktemp("cache")
    return [*SIZES.split(), "--data.path", str(text), "--data.cache", str(cache)]


@pytest.fixture(scope="session")
def tiny_run(options, tmp_path_factory) -> Path:
    """The directory of a complete run with these options. Tests must not change it."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert call(train, *options, "--out", out) == 0
    return out
