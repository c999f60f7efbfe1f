"""Matplotlib figures that are drawn into a file, on a machine with or without a screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of width x height inches; write it with `save_figure`.

    The canvas is matplotlib's Agg, which needs no window system. Unlike pyplot this changes no
    global state. matplotlib is imported here because it takes a second to load.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of the path's suffix. A PNG notes that we drew it."""
    note = {"Software": "tinyfm"} if str(path).lower().endswith(".png") else None
    figure.savefig(path, dpi=110, metadata=note)
