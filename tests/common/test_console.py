"""The output of a command is not its work: closed streams, readers that go away, code pages."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from tinyfm.common.console import console, fill

# Prints 100 lines, then writes a file: the work.
WORK = """
import sys
from pathlib import Path
from tinyfm.common.console import console, fill
with console() as out:
    for i in range(100):
        print("naïve \\N{SNOWMAN} \\udcff " * 50, flush=True)
        print("progress", file=sys.stderr)
    try:
        input("user: ")
    except EOFError:
        open("first", "w").write("first")
Path("done").write_text(str(out.reader_gone))
"""


def work(tmp_path: Path, shell: str, **environment: str) -> subprocess.CompletedProcess:
    (tmp_path / "work.py").write_text(WORK, encoding="utf-8")
    return subprocess.run(
        ["bash", "-c", shell.replace("WORK", f"{sys.executable} work.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("shell", "gone"),
    [("WORK | head -n 1; exit ${PIPESTATUS[0]}", "True"), ("WORK >&- 2>&- <&-", "False")],
    ids=["head", "closed"],
)
def test_a_reader_that_goes_away_ends_no_work(tmp_path, shell, gone):
    done = work(tmp_path, shell)
    assert done.returncode == 0, done.stderr
    assert b"Error" not in done.stderr and b"Exception" not in done.stderr
    assert (tmp_path / "done").read_text(encoding="utf-8") == gone
    assert (tmp_path / "first").read_text(encoding="utf-8") == "first"  # no output in the file


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_is_utf_8(tmp_path, encoding):
    done = work(tmp_path, "WORK", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8").startswith("naïve ☃ ? naïve")


def test_a_signal_cleans_up_and_keeps_its_status():
    before = signal.getsignal(signal.SIGTERM)
    cleaned = False
    with pytest.raises(SystemExit) as end, console():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned = True
    assert end.value.code == 128 + signal.SIGTERM
    assert cleaned and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("tinyfm.calc --list", 141),
        ("tinyfm.calc sweep --help", 0),
        ("tinyfm.evaluate --help", 141),
        ("tinyfm.hub --help", 0),
        ("tinyfm.adapt compare --help", 0),
    ],
)
def test_a_command_whose_reader_goes_away_reports_no_error(command, status):
    """As in `| head`. Only a command whose result is its output says so, as SIGPIPE would."""
    shell = f"{sys.executable} -m {command} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, timeout=60)
    assert done.stderr == b""
    assert done.returncode == status


def test_help_fits_the_terminal():
    text = """One line:  python x.py

A paragraph of words
over two lines.

  name     what it is, in many more words than fit
  python x.py --flag
"""
    assert fill(text, 30).splitlines() == [
        "One line:  python x.py",
        "",
        "A paragraph of words over two",
        "lines.",
        "",
        "  name     what it is, in many",
        "           more words than fit",
        "  python x.py --flag",
    ]
