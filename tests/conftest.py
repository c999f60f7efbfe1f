"""What several test files share: a small real text, and a tiny run trained on it."""

import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

import train

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
