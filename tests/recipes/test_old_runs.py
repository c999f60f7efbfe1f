"""Run directories that an earlier version wrote open and sample as they did in that version.

They do not resume: that version split the data in another way.

old_runs.tar.xz was written at commit 3bdccfa, before the code moved into rooms: small data, eleven
half-finished runs (one a family and a way to adapt), and in expected.json what that version sampled
from them and reached when it resumed them.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import call, unpack_old_runs
from PIL import Image

import sample
import train
from data import pictures

NAMES = (
    "gpt", "gpt-lora", "gpt-prompt", "gpt-student", "gpt-chat", "gpt-classify", "clip",
    "clip-classify", "autoencoder", "ddpm", "text2image",
)  # fmt: skip
# Samples that differ on purpose: an autoencoder shows pictures of the test split, which is new.
CHANGED = {"autoencoder": {"mean": 158.15599}}


@pytest.fixture
def old_runs(tmp_path) -> Path:
    return unpack_old_runs(tmp_path)


def sample_run(name: str, words: list[str], capsys) -> dict:
    """What sample.py prints, and the mean of the picture that it draws."""
    capsys.readouterr()
    assert call(sample, f"runs/{name}", *words) == 0
    found = {"stdout": capsys.readouterr().out, "mean": 0.0}
    if "--out" in words:
        with Image.open("out.png") as picture:
            found["mean"] = float(np.array(picture.convert("RGB")).mean())
        os.remove("out.png")
    return found


def check_sample(found: dict, expected: dict) -> None:
    assert found["stdout"].endswith(expected["stdout"])  # after a line about data, if prepared
    assert found["mean"] == pytest.approx(expected.get("mean", 0.0), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_an_old_run_opens_and_says_why_it_does_not_resume(
    name, old_runs, no_forecast, monkeypatch, capsys
):
    monkeypatch.chdir(old_runs)
    monkeypatch.setattr(pictures, "TILE", 1)  # that version did not enlarge its sheets
    expected = json.loads((old_runs / "expected.json").read_text(encoding="utf-8"))[name]
    words = expected["sample"]["words"]
    opened = expected["opened"] | CHANGED.get(name, {})
    check_sample(sample_run(name, words, capsys), opened)
    assert call(train, *expected["words"], "--resume") == 1
    said = capsys.readouterr().err
    for part in (f"runs/{name}", "split by an earlier version", "another --out"):
        assert part in said
    check_sample(sample_run(name, words, capsys), opened)
