"""The fields of the config dataclasses, which are also the options of the command line.

tyro makes an option of each field; the comment beside it is its help. It calls the values of all
texts STR. So the kinds of text that a field may hold have names here:

    init_from: RunPath = ""  # start from this run       --init-from RUN   start from this run
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

import tyro


def may_change(default: Any) -> Any:
    """A dataclass field whose value may differ when a run is resumed.

    Such an option decides where and how fast a run computes, or how much it reports, but not the
    result. All other fields of a run's configs must have the same values on resume; see
    recipes/run_dir.py, which compares them.
    """
    return field(default=default, metadata={"may_change": True})


# ---- what help calls the values ------------------------------------------------------------------

EMPTY = ("", "''", "None")


def usual(default: str) -> str:
    """What stands behind the help of an option; nothing if the default is empty."""
    return "" if default in EMPTY else f"(default: {default})"


def named(metavar: str) -> Any:
    """How help calls the value of an option."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=usual)


RunPath = Annotated[str, named("RUN")]  # a run's folder, or a checkpoint in it
DataPath = Annotated[str, named("PATH")]  # the name of a data set, or a file, folder or glob
FilePath = Annotated[str, named("FILE")]
FilePaths = Annotated[tuple[str, ...], named("FILE ...")]
PicturePath = Annotated[str, named("PNG")]
FolderPath = Annotated[str, named("FOLDER")]
NewFolder = Annotated[str, tyro.conf.arg(metavar="FOLDER")]  # which must be given
Address = Annotated[str, named("ADDRESS")]  # of a machine and its port
Text = Annotated[str, named("TEXT")]
Name = Annotated[str, named("NAME")]
GivenRun = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
GivenRuns = tyro.conf.Positional[Annotated[tuple[str, ...], named("RUN ...")]]
MaybeText = Annotated[str | None, named("TEXT")]
MaybeInt = Annotated[int | None, named("INT")]
MaybeFloat = Annotated[float | None, named("FLOAT")]
Texts = Annotated[tuple[str, ...], named("TEXT ...")]
Names = Annotated[tuple[str, ...], named("NAME ...")]
DataPaths = Annotated[tuple[str, ...], named("PATH ...")]
Numbers = Annotated[tuple[int, ...], named("INT ...")]
RunPaths = Annotated[tuple[str, ...], named("RUN ...")]

# int4-gptq: int4 by second-order rounding, for which the run's training data are read
Quantize = Literal["none", "int8", "int4", "int4-gptq"]
