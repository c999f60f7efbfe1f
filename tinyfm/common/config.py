"""A helper for the config dataclasses."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def may_change(default: Any) -> Any:
    """A dataclass field whose value may differ when a run is resumed.

    Such an option decides where and how fast a run computes, or how much it reports, but not the
    result. All other fields of a run's configs must have the same values on resume; see
    recipes/run_dir.py, which compares them.
    """
    return field(default=default, metadata={"may_change": True})
