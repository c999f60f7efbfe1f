"""What a run is made of: its own training, and that of the runs before it.

A run may have started from another one (--init-from), which may have started from a third, and it
may have learned from a teacher. So it has read the training text of all of these.
"""

from __future__ import annotations

from typing import Any

from tinyfm.recipes import run_dir
from tinyfm.recipes.base import OpenRun


def open_data_of(opened: OpenRun, path: str) -> Any:
    """The data that the run at `path` was trained on.

    Raises ValueError if they are others today, and ValueError or OSError if they are gone.
    """
    data = opened.run.open_data()
    if not run_dir.is_data_of(opened, data):
        raise ValueError(
            f"{path} was trained on other data than {opened.run.data.path} gives today: the files "
            "changed, or an earlier version split them. Train it again"
        )
    return data


def open_training_data(path: str) -> dict[str, Any]:
    """{run: the data it was trained on} of a run, which is the first, and of those before it.

    Raises as open_data_of does.
    """
    trained_on = {}
    waiting = [path]
    while waiting:
        path = waiting.pop(0)
        if path not in trained_on:
            opened = run_dir.open_run(path)
            trained_on[path] = open_data_of(opened, path)
            before = (opened.run.init_from, getattr(opened.run, "teacher", ""))
            waiting += [name for name in before if name]
    return trained_on


def open_bases(opened: OpenRun) -> list[OpenRun]:
    """A run, the one that it started from, and so on.

    Raises ValueError if one is gone, or has other weights than when the next started from it.
    """
    chain = [opened]
    while chain[-1].run.init_from:
        run = chain[-1].run
        try:
            chain.append(run_dir.open_same_base(run))
        except ValueError as error:
            raise ValueError(f"{run.init_from}: {error}") from error
    return chain
