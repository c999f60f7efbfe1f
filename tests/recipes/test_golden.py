"""The losses of small runs as they were recorded: a change that is meant to change none shows here.

`PYTHONPATH=. python tests/test_golden.py` records them anew, when one is meant to.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
from test_parallel import FAMILIES, make

STEPS = 40
RECORDED = Path(__file__).parent / "golden.json"


def losses(family: str, out: Path) -> list[float]:
    trainer = make(family, out, steps=STEPS)
    return [trainer.update(step)[0] for step in range(STEPS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_as_recorded(family, tmp_path):
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[family]
    assert losses(family, tmp_path) == pytest.approx(recorded, rel=1e-5)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        found = {family: losses(family, Path(name)) for family in FAMILIES}
    RECORDED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{RECORDED}: {len(found)} runs of {STEPS} steps\n")
