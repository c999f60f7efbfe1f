"""A dataclass from the command line, and help that fits the terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from tinyfm.common.console import fill


def parse(
    kind: Any, about: str, prog: str, args: Sequence[str] | None = None, default: Any = None
) -> Any:
    """An instance of a dataclass, from the arguments of the command line.

    about: the text above the options in --help; tyro would join its lines. prog: the command, such
    as "python train.py".
    """
    args = sys.argv[1:] if args is None else list(args)
    if {"-h", "--help"} & {*args}:
        width = min(shutil.get_terminal_size().columns, 100)
        print(fill(about, width) + "\n")
    given = {} if default is None else {"default": default}
    return tyro.cli(kind, prog=prog, args=args, description="", **given)
