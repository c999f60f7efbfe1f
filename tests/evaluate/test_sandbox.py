"""The sandbox: code of a model that forks, fills the disk, prints without end or never returns."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinyfm.evaluate import sandbox

MISSING = sandbox.missing()
can_run = pytest.mark.skipif(bool(MISSING), reason=MISSING)
COLUMN = int(platform.machine() == "aarch64")  # of the numbers of calls
RAW = "import ctypes\nassert ctypes.CDLL(None).syscall({}, 0, 0, 0, 0) != -1"  # past Python

HARMFUL = {
    "leaves early": "import sys; sys.exit(0)",
    "leaves at once": "import os; os._exit(0)",
    "forks": "import os\nos.fork()",
    "starts threads": "import _thread\n_thread.start_new_thread(print, ())",
    "becomes a shell": "import os; os.execv('/bin/sh', ['sh'])",
    "kills its parent": "import os; os.kill(os.getppid(), 9)",
    "kills all": "import os; os.kill(-1, 9)",
    "leaves its group": "import os; os.setsid()",
    "reads the home folder": "import os; os.listdir(os.path.expanduser('~'))",
    "reads a file": "open('/etc/passwd').read()",
    "writes a file": "open(NEW, 'w').write('x')",
    "writes where it was started": "open('x', 'w')",
    "deletes": "import os; os.remove(MINE)",
    "opens a socket": "import _socket; _socket.socket()",
    "loads another module": "import socketserver",
    "reads what is typed": "assert input()",
    "sleeps": "import time; time.sleep(1000)",
    "takes memory": f"bytearray({sandbox.MEMORY})",
    "calls itself": "def f(): return f()\nf()",
    "lifts a limit": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (100, 100))",
    "traces its parent": RAW.format((101, 117)[COLUMN]),
    "calls memory broken": RAW.format((28, 233)[COLUMN]),
    "forks past Python": RAW.format((57, 220)[COLUMN]),
}


@can_run
@pytest.mark.parametrize("code", HARMFUL.values(), ids=HARMFUL.keys())
def test_harm_is_refused(code, tmp_path):
    file = tmp_path / "mine"
    file.write_text("mine", encoding="utf-8")
    code = code.replace("MINE", repr(str(file))).replace("NEW", repr(str(tmp_path / "new")))
    assert sandbox.run(code, 1) == "failed"
    assert [*tmp_path.iterdir()] == [file]


@can_run
@pytest.mark.parametrize(
    "code",
    [
        "while True: print('x' * 10_000)",
        "import os\nwhile True: [os.write(n, b'x' * 10_000) for n in range(4)]",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
    ],
)
def test_what_never_ends_is_killed(code, monkeypatch):
    monkeypatch.setattr(sandbox, "CLOCK", 1)
    start = time.monotonic()
    assert sandbox.run(code, 1) == "too slow"
    assert time.monotonic() - start < 30


@can_run
def test_honest_code_passes_and_a_wrong_answer_fails(capfd, monkeypatch):
    monkeypatch.setenv("SECRET", "password")
    honest = """
import collections, dataclasses, hashlib, heapq, itertools, math, random, re, string
from typing import List

@dataclasses.dataclass
class Point:
    x: float

assert Point(1.0).x + math.pi > 4 and hashlib.md5(b"").hexdigest()
print([random.random() for _ in range(100)], collections.Counter("abc"))
import os
assert "SECRET" not in os.environ and "HOME" not in os.environ
"""
    assert sandbox.run(honest) == "passed"
    assert sandbox.run(honest + "assert 1 + 1 == 3") == "failed"
    assert sandbox.run(RAW.format(sandbox.ALLOWED["getpid"][COLUMN])) == "passed"
    assert sandbox.run("this is no Python") == "failed"
    assert sandbox.run("x = '\ud800'") in ("passed", "failed")  # a model may write half a character
    assert capfd.readouterr() == ("", "")


@can_run
def test_a_child_does_not_outlive_a_parent_that_is_killed(tmp_path):
    script = f"""
import runpy
box = runpy.run_path({sandbox.__file__!r})
box["run"]("while True: pass", 50)
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    found = []
    while not found:
        assert parent.poll() is None, "it ended without a child"
        time.sleep(0.01)
        found = children.read_text(encoding="utf-8").split()
    parent.kill()
    parent.wait()
    for _ in range(500):
        if not Path(f"/proc/{found[0]}").exists() or is_dead(found[0]):
            return
        time.sleep(0.01)
    os.kill(int(found[0]), signal.SIGKILL)
    pytest.fail("the child goes on")


def is_dead(number: str) -> bool:
    """Whether a process has ended, and only waits to be counted by its parent."""
    try:
        return Path(f"/proc/{number}/stat").read_text(encoding="utf-8").split()[2] == "Z"
    except OSError:
        return True


def test_nothing_is_run_where_the_filter_is_not(monkeypatch):
    monkeypatch.setattr(sandbox, "run", lambda code: "failed")
    monkeypatch.setattr(sandbox.sys, "platform", "linux")
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "x86_64")
    assert "seccomp" in sandbox.missing()
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    assert "riscv64" in sandbox.missing()


@pytest.mark.parametrize("machine", sandbox.PROCESSORS)
def test_what_the_filter_says_of_each_call(machine, monkeypatch):
    """All calls below 600, by a machine that does as linux/filter.h says."""
    monkeypatch.setattr(sandbox.platform, "machine", lambda: machine)
    steps = [*sandbox.struct.iter_unpack("HBBI", sandbox.filter_program())]
    column = [*sandbox.PROCESSORS].index(machine)
    allowed = {row[column] for row in sandbox.ALLOWED.values()}

    def verdict(number: int, processor: int) -> int:
        loaded = place = 0
        while True:
            code, if_equal, if_not, value = steps[place]
            place += 1
            if code == sandbox.RETURN:
                return value
            if code == sandbox.LOAD:
                loaded = {0: number, 4: processor}[value]
            else:
                place += if_equal if loaded == value else if_not

    for number in [*range(600), 0x40000000 + 1]:
        expected = sandbox.ALLOW if number in allowed else sandbox.REFUSE
        assert verdict(number, sandbox.PROCESSORS[machine]) == expected
    assert verdict(1, 0x40000003) == sandbox.KILL  # a call by the rules of 32 bits
