"""Running code that a model wrote: a child process that can compute, and nothing else.

Such code may do anything: start processes until the machine stands still, fill the disk, print
without end, never return, read your files and send them away. So it runs in a child process

    with no secrets    an empty environment, no file of its parent open, stdin closed
    with limits        seconds of the processor and of the clock, bytes of memory, no file written
    behind a filter    the kernel refuses all calls but those in ALLOWED (seccomp, mode 2)
    that never stays   its group is killed at the end, and it dies with its parent

The filter is the wall; the rest is for what it lets through. What is left of a process behind it
can take memory, read the clock, and read and write files that are already open: the null device
and the pipe of its result. It cannot open a file, start a process or a thread, send a signal,
reach a network, or lift a limit. The filter comes down after Python has started and the modules in
MODULES are loaded, because a later import would have to open a file: code that imports another
module fails.

Not protected: the seconds and bytes that the limits allow, and the kernel itself, whose faults no
filter hides. Nor is the verdict: the code runs in the process that says whether its tests passed,
so code that looks for it can claim success. Code that just ends early fails.

It needs Linux on x86-64 or ARM64. Elsewhere nothing is run: `missing` says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import platform
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
from typing import Literal

Outcome = Literal["passed", "failed", "too slow"]

SECONDS = 5  # of the processor
CLOCK = 4  # seconds of the clock for each of them: other processes may be running
MEMORY = 1 << 29  # bytes of addresses
# What solutions of exercises use. Modules that these need are loaded with them.
MODULES = (
    "array", "bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "enum",
    "fractions", "functools", "hashlib", "heapq", "itertools", "json", "math", "numbers",
    "operator", "random", "re", "statistics", "string", "textwrap", "time", "traceback",
    "typing",
)  # fmt: skip

# ---- the filter ---------------------------------------------------------------------------------

# Numbers of the calls that remain, by processor, and the kernel's number for the processor. Not
# madvise: a process of root can tell the kernel with it that memory is broken, also memory that
# other processes read, such as the pages of the C library (MADV_HWPOISON).
ALLOWED = {
    "read": (0, 63),
    "write": (1, 64),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "mremap": (25, 216),
    "getpid": (39, 172),
    "exit": (60, 93),
    "gettimeofday": (96, 169),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "clock_gettime": (228, 113),
    "exit_group": (231, 94),
    "getrandom": (318, 278),
}
PROCESSORS = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
# Instructions of the kernel's filter machine (linux/filter.h): load a word of the call, compare and
# jump, return.
LOAD = 0x20
JUMP_IF_EQUAL = 0x15
RETURN = 0x06
KILL = 0x80000000  # what a filter returns (linux/seccomp.h)
REFUSE = 0x00050001  # the call fails with EPERM
ALLOW = 0x7FFF0000


def filter_program() -> bytes:
    """The filter: a call of another processor kills, one that is not in ALLOWED fails."""
    machine = platform.machine()
    column = [*PROCESSORS].index(machine)
    numbers = [row[column] for row in ALLOWED.values()]
    steps = [
        (LOAD, 0, 0, 4),  # the processor; 4 is its place in the description of a call
        (JUMP_IF_EQUAL, 1, 0, PROCESSORS[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),  # the number of the call
    ]
    for i, number in enumerate(numbers):
        steps.append((JUMP_IF_EQUAL, len(numbers) - i, 0, number))  # to the last step
    steps += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


class Filter(ctypes.Structure):
    """sock_fprog of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def control_process(*arguments: object) -> None:
    """Call prctl. Raises OSError if the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(*arguments) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def close_filter() -> None:
    """From here on, this thread and what it starts can make the calls in ALLOWED alone."""
    steps = filter_program()
    program = Filter(len(steps) // 8, steps)
    control_process(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    control_process(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0)


# ---- the child ----------------------------------------------------------------------------------


def limit(seconds: int) -> None:
    """Set the limits of this process, which it cannot lift again."""
    import resource  # Windows has none

    bounds = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for name, bound in bounds.items():
        resource.setrlimit(name, (bound, bound))


def child() -> None:
    """Run the code of the job on stdin; write the job's word to stdout if it ends without error."""
    control_process(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    job = json.loads(sys.stdin.read())
    if os.getppid() != job["parent"]:  # it died before it could take this process along
        return
    for name in MODULES:
        importlib.import_module(name)
    importlib.import_module("hashlib").md5(b"").hexdigest()  # loads what it needs at first use

    # The result goes to a pipe that print does not know; other output to the null device.
    result = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    limit(job["seconds"])
    close_filter()
    with contextlib.suppress(BaseException):
        exec(compile(job["code"], "code", "exec"), {"__name__": "__main__"})
        os.write(result, job["word"].encode())
    os._exit(0)


# ---- the parent ---------------------------------------------------------------------------------


def missing() -> str:
    """Why code cannot be run here; "" where it can."""
    found = f"{platform.system()} on {platform.machine()}"
    if sys.platform != "linux" or platform.machine() not in PROCESSORS:
        return f"it is run on Linux alone, on x86-64 or ARM64, and this is {found}"
    if struct.calcsize("P") != 8:
        return "it is run by a Python of 64 bits alone"
    outcome = run("")
    if outcome != "passed":
        return (
            f"an empty program did not pass on this {found} ({outcome}): its kernel may refuse the "
            "filter (seccomp)"
        )
    return ""


def run(code: str, seconds: int = SECONDS) -> Outcome:
    """Run code in a child process; "passed" if it ends without an error.

    seconds: of the processor, at least 1. Call it only where `missing` is empty.
    """
    word = secrets.token_hex(16)
    # A program that is linked with a library in an unusual folder needs this to start.
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as job:
        told = {"word": word, "parent": os.getpid(), "code": code, "seconds": seconds}
        json.dump(told, job)
        job.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", __file__],
            stdin=job,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept,
            cwd="/",
            start_new_session=True,
        )
        try:
            # A pipe that is full stops its writer. So the output is read after the end, and only
            # as many bytes as the word has.
            process.wait(CLOCK * seconds)
            passed = process.stdout.read(len(word)) == word.encode()
            if not passed and process.returncode == -signal.SIGKILL:
                return "too slow"
            return "passed" if passed else "failed"
        except subprocess.TimeoutExpired:
            return "too slow"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


if __name__ == "__main__":
    child()
