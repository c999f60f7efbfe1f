"""What the config dataclasses share."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def may_change(default: Any) -> Any:
    """A field whose value may differ when a run is resumed.

    Such an option changes where and how fast a run computes, or what it reports, not what it
    computes. All other fields of a run's configs must be the same on resume (recipes/run_dir.py).
    """
    return field(default=default, metadata={"may_change": True})
