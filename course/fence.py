"""Limits for a process that runs a student's code.

Python tells an audit hook about every file that is opened for writing, every connection and every
program that is started (PEP 578), and the hook refuses what a lesson does not need. A hook cannot
be taken away again. It stops accidents and simple tricks, but C code can pass it by: to grade
strangers' work, run the grader in a container or as another user.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn")
STARTS += ("os.spawn", "os.startfile", "pty.spawn")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link")
CHANGES += ("os.symlink", "os.truncate", "shutil.rmtree", "shutil.move", "shutil.copyfile")
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
BYTES = 4 << 30  # of memory
FILE_BYTES = 256 << 20  # of one file


def limit(seconds: int) -> None:
    """Limit memory, file sizes and processor time, where the system can (not on Windows)."""
    try:
        import resource
    except ImportError:
        return
    limits = [(resource.RLIMIT_DATA, BYTES), (resource.RLIMIT_FSIZE, FILE_BYTES)]
    limits += [(resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)]
    for kind, most in limits:
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(kind, (most, hard))


def enclose(folder: Path) -> None:
    """From now on refuse to write outside folder and the system's folder of temporary files, to
    start programs, and to connect to other machines."""
    allowed = [os.path.realpath(path) for path in (folder, tempfile.gettempdir(), os.devnull)]

    def is_inside(path) -> bool:
        if isinstance(path, int):  # a file that is open already
            return True
        real = os.path.realpath(os.fsdecode(path))
        return any(real == root or real.startswith(root + os.sep) for root in allowed)

    def refuse(what: str) -> None:
        raise PermissionError(f"a lesson's check may not {what}")

    def hook(event: str, arguments: tuple) -> None:
        if event in STARTS:
            refuse(f"start a program ({event})")
        elif event == "socket.connect" and isinstance(arguments[1], tuple):
            if arguments[1][0] not in ("127.0.0.1", "::1", "localhost"):
                refuse(f"connect to {arguments[1][0]}")
        elif event == "open":
            path, mode, flags = arguments
            writes = bool(flags & WRITE_FLAGS) or any(c in (mode or "") for c in "wax+")
            if writes and not is_inside(path):
                refuse(f"write to {path}")
        elif event in CHANGES and not all(
            is_inside(path) for path in arguments[:2] if isinstance(path, str | bytes | os.PathLike)
        ):
            refuse(f"change {arguments[0]}")

    sys.addaudithook(hook)
