"""The commands `python -m data.NAME`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = sorted(
    path.stem
    for path in (ROOT / "data").glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8") and path.stem not in ("command", "prepare")
)


def shell(command: str) -> subprocess.CompletedProcess:
    """Run a line of bash; its status is that of the first program of a pipe."""
    line = f"{command}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, timeout=60)


@pytest.mark.parametrize("name", NAMES)
def test_help_is_the_docstring_of_the_module(name):
    """One process for each would take seconds; here every module only has to pass its own on."""
    text = (ROOT / "data" / f"{name}.py").read_text(encoding="utf-8")
    assert f'command.run("{name}", __doc__, look' in text


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "naïve.txt"
    path.write_text("naïve ☃ text\n" * 9000, encoding="utf-8")
    return path


def test_a_reader_that_goes_away_is_no_error(text):
    done = shell(f"{sys.executable} -m data.files {text} | true")
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_closed_stdout_is_no_error(text):
    done = shell(f"{sys.executable} -m data.files {text} >&-")
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_errors_and_any_terminal(text):
    done = shell(f"{sys.executable} -m data.files --help")
    assert done.stdout.startswith(b"usage: python -m data.files [-h] PATH")
    assert b"one document a row" in done.stdout
    done = shell(f"{sys.executable} -m data.files nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: no file matches 'nowhere'")
    done = shell(f"PYTHONIOENCODING=ascii {sys.executable} -m data.files {text}")
    assert "1 document, " in done.stdout.decode("utf-8")
    assert "naïve ☃ text" in done.stdout.decode("utf-8")
    assert done.returncode == 0
