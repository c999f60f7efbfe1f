"""The commands `python -m data.NAME`, which show what a source holds.

All have --help, name an error in one line, and end quietly when nobody reads on, as in `| head`.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def drop_output() -> None:
    """Connect stdout to the null device, so that Python's end writes nothing more to it."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def run(name: str, about: str, show: Callable[..., None], argument: str = "") -> NoReturn:
    """Run show(), or show(argument of the command line), and exit.

    name: of the module. about: its docstring. argument: how the usage calls the argument, such as
    "PATH"; in brackets, such as "[PNG]", if it may be left out. The status is 141 if the reader
    went away, as it is for a program that SIGPIPE ends.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m data.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if argument:
        nargs = "?" if argument.startswith("[") else 1
        parser.add_argument("given", metavar=argument.strip("[]"), nargs=nargs)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None: the caller has closed it
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        given = vars(parser.parse_args()).get("given") or ()
        show(*([given] if isinstance(given, str) else given))
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        sys.exit(141)
    except (ValueError, OSError) as error:
        drop_output()
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit()
