"""What the commands share: their output, and their end by a signal.

The output of a command is not its work. A reader may go away (`python train.py | head`), a terminal
may be closed, or know ASCII only: that is no reason to lose hours of training. So inside `console`

    text is written as UTF-8, whatever the system's code page; what cannot be written becomes "?"
    a closed stdout or stderr is replaced by the null device, as a file that is opened later would
    otherwise take its place, and be written to
    text for a reader that has gone away is dropped; a command whose only result is its output
    raises BrokenPipeError instead
    SIGTERM and SIGHUP raise SystemExit, so that temporary files are removed
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

ENDING = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n))


class Output:
    """A stream that drops what nobody reads any more.

    lasting: do so in silence; otherwise the first write that fails raises its error.
    """

    def __init__(self, stream: Any, lasting: bool = True):
        self.stream = stream
        self.lasting = lasting
        self.reader_gone = False

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, work, *arguments) -> None:
        if self.reader_gone:
            return
        try:
            work(*arguments)
        except (OSError, ValueError):  # a broken pipe, a full disk; a closed stream
            self.reader_gone = True
            # What the stream has kept is written when Python ends: then it must not fail.
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)
            if not self.lasting:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def open_closed_streams() -> None:
    """Connect stdin, stdout and stderr to the null device where the caller has closed them."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is not None:
            continue
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)
        stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)


def end(number: int, frame: Any) -> None:
    """A signal handler: the end, in order, with the status that the signal has by itself."""
    raise SystemExit(128 + number)


@contextlib.contextmanager
def console(lasting: bool = True) -> Iterator[Output]:
    """Around a command's main. Yields the stream that stands in for stdout, which is `lasting`."""
    open_closed_streams()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
                previous[number] = signal.signal(number, end)
    out = Output(sys.stdout, lasting)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(Output(sys.stderr)):
            try:
                yield out
            finally:
                out.lasting = True
                out.flush()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_command(main: Callable[[], Any], lasting: bool = False) -> Any:
    """What main returns, for sys.exit. It runs inside `console`.

    A command that is not `lasting` ends quietly when its reader has gone away, with the status of a
    program that SIGPIPE ends.
    """
    status = None
    with console(lasting) as out, contextlib.suppress(BrokenPipeError):
        status = main()
    return 141 if out.reader_gone and not lasting else status


# ---- help ---------------------------------------------------------------------------------------

MIDDLE = 56  # a second column that starts further to the right is none


def fold(line: str, width: int) -> str:
    """A line of two columns, such as "  NAME    what it is"; too long a second one is folded."""
    columns = [gap.end() for gap in re.finditer(r"(?<=\S)  +", line) if gap.end() <= MIDDLE]
    if not columns:
        return line
    return textwrap.fill(line, width, subsequent_indent=" " * columns[-1], break_on_hyphens=False)


def fill(text: str, width: int) -> str:
    """The text with its paragraphs filled to a width. Where a line is indented, lines remain."""
    parts = []
    for part in text.strip().split("\n\n"):
        lines = part.split("\n")
        if any(line.startswith(" ") for line in lines):
            parts.append("\n".join(fold(line, width) for line in lines))
        else:
            parts.append(textwrap.fill(" ".join(lines), width, break_on_hyphens=False))
    return "\n\n".join(parts)
