"""What a run is made of: its own training, and that of the runs before it.

A run may have started from another one (--init-from), which may have started from a third, and it
may have learned from a teacher. So it has read the training text of all of these.
"""

from __future__ import annotations

from typing import Any

from tinyfm.recipes import run_dir
from tinyfm.recipes.base import OpenRun


def open_data_of(path: str) -> tuple[OpenRun, Any]:
    """A run and the data that it was trained on. Raises ValueError if they are others today."""
    opened = run_dir.open_run(path)
    data = opened.run.open_data()
    if not run_dir.is_data_of(opened, data):
        raise ValueError(
            f"{path} was trained on other data than {opened.run.data.path} gives today: the files "
            "changed, or an earlier version split them. Train it again"
        )
    return opened, data


def open_training_data(path: str) -> dict[str, Any]:
    """{run: the data it was trained on} of a run, which is the first, and of those before it.

    Raises ValueError as open_data_of does.
    """
    opened, data = open_data_of(path)
    trained_on = {path: data}
    waiting = [opened.run]
    while waiting:
        run = waiting.pop()
        for before in (run.init_from, getattr(run, "teacher", "")):
            if before and before not in trained_on:
                opened, trained_on[before] = open_data_of(before)
                waiting.append(opened.run)
    return trained_on


def open_bases(opened: OpenRun) -> list[OpenRun]:
    """A run, the one that it started from, and so on. Raises ValueError if one is gone."""
    chain = [opened]
    while chain[-1].run.init_from:
        chain.append(run_dir.open_run(chain[-1].run.init_from))
    return chain
