"""The model card of an exported folder: a README.md with a head that the Hugging Face hub reads.

    ---
    license: "unknown"               the head: YAML, between two lines of dashes. Each value is
    library_name: "transformers"     written as JSON, which is YAML too.
    model-index: [...]               the measured scores
    ---
    # Title
    ## Heading ...                   the sections of Mitchell et al. 2019, Model Cards

recipes/card.py reads the content of a card from the record of a run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyfm.common.files import write_text

NAME = "README.md"
# A card without this line is somebody's own, and is kept.
MARK = "<!-- Written by python -m tinyfm.hub. Delete this line to keep your changes. -->"


@dataclass(frozen=True)
class Card:
    """What a card says. head: names and JSON values; sections: heading -> Markdown."""

    title: str
    head: dict[str, Any]
    sections: dict[str, str]

    def __str__(self) -> str:
        head = [f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in self.head.items()]
        body = [f"## {heading}\n\n{text}\n" for heading, text in self.sections.items()]
        return "\n".join(["---", *head, "---", MARK, f"\n# {self.title}\n", *body])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def model_index(name: str, task: str, data: str, scores: dict[str, float]) -> list[dict]:
    """Measured scores as the hub reads them: {measure: value} on one data set."""
    measured = [{"type": measure, "value": value} for measure, value in scores.items()]
    result = {"task": {"type": task}, "dataset": {"type": data, "name": data}, "metrics": measured}
    return [{"name": name, "results": [result]}]


def write(card: Card, folder: str | Path) -> bool:
    """Write the card into a folder; returns False if a README.md of somebody else is there."""
    path = Path(folder) / NAME
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    write_text(path, str(card))
    return True
