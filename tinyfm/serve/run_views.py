"""Runs as the page shows them: which there are, their losses and samples, their settings.

A run is known by the name under which `list_runs` lists it, and a sample by the name of its file. A
request can thus reach no other file: what it names is looked up, and no path is built from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinyfm.common import schema
from tinyfm.training.log import METRICS, read_metrics, summary_score

MOST_RUNS = 200
MOST_POINTS = 400  # of a loss curve: more cannot be seen
SAMPLE = re.compile(r"step-(\d+)\.(png|txt)")
TRAINING = 120  # seconds without a new row after which a run is taken to have stopped


def list_runs(folder: Path, named: Iterable[Path]) -> dict[str, Path]:
    """{name: folder} of the named runs, and of those in a folder and the folders in it.

    A run below the folder has its path from there as its name.
    """
    found = {}
    paths = [path.parent for path in folder.glob("*/config.json")]
    paths += [path.parent for path in folder.glob("*/*/config.json")]
    for path in [*named, *sorted(paths)]:
        if not (path / METRICS).is_file() or path in found.values() or len(found) == MOST_RUNS:
            continue
        name = path.name
        if path.is_relative_to(folder):
            name = path.relative_to(folder).as_posix()
        if name not in found:
            found[name] = path
    return found


_kept: dict[Path, tuple[int, list[dict]]] = {}  # {metrics.jsonl: (time of its last change, rows)}


def read_rows(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, read again only when it has changed."""
    path = folder / METRICS
    changed = path.stat().st_mtime_ns
    if path not in _kept or _kept[path][0] != changed:
        _kept[path] = (changed, read_metrics(path))
    return _kept[path][1]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def describe(folder: Path, now: float) -> dict[str, Any]:
    """The settings of a run and what it has reached. now: seconds since 1970.

    Raises ValueError if config.json is not that of a run.
    """
    path = folder / "config.json"
    try:
        record = schema.parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    steps = flatten(record).get("train.steps")
    if not isinstance(steps, int):
        raise ValueError(f"{path} has no train.steps: train.py did not write it")
    rows = read_rows(folder)
    evaluations = [row for row in rows if "val_loss" in row]
    score = summary_score(evaluations[-1]) if evaluations else "val_loss"
    times = [row["time"] for row in rows if "time" in row]
    step = int(rows[-1]["step"]) if rows else 0
    return {
        "preset": str(record.get("preset", "")),
        "family": str(record.get("family", "")),
        "steps": steps,
        "step": step,
        "seconds": times[-1] - times[0] if times else 0,
        "training": bool(times) and step < steps and now - times[-1] < TRAINING,
        "score": score,
        "first": evaluations[0].get(score) if evaluations else None,
        "last": evaluations[-1][score] if evaluations else None,
        "config": {name: str(value) for name, value in flatten(record).items()},
    }


def thin(rows: list[dict], most: int) -> list[dict]:
    """At most about `most` of the rows, spread evenly, and all evaluations."""
    every = max(1, len(rows) // most)
    return [row for i, row in enumerate(rows) if i % every == 0 or "val_loss" in row]


def curves(folder: Path, after: int) -> dict[str, Any]:
    """The losses and scores of a run by step: {"rows": [{"step": 10, "loss": 2.1}, ...]}.

    after: only rows of later steps.
    """
    rows = [row for row in read_rows(folder) if row["step"] > after]
    kept = []
    for row in thin(rows, MOST_POINTS):
        names = [n for n in row if n == "step" or n.startswith(("loss", "val_")) or "_val" in n]
        kept.append({name: row[name] for name in names})
    return {"rows": kept}


def samples(folder: Path) -> list[dict[str, Any]]:
    """The samples that training wrote, by step: [{"step": 100, "file": "step-000100.txt"}]."""
    found = []
    if (folder / "samples").is_dir():
        for path in sorted((folder / "samples").iterdir()):
            match = SAMPLE.fullmatch(path.name)
            if match and path.is_file():
                found.append({"step": int(match[1]), "file": path.name})
    return found


def sample_path(folder: Path, file: str) -> Path:
    """The path of a sample. Raises ValueError for a file that `samples` does not list."""
    if file not in [sample["file"] for sample in samples(folder)]:
        raise ValueError(f"there is no sample {file!r} in this run")
    return folder / "samples" / file
