"""Run directories that an earlier version wrote open and sample as they did in that version.

They also resume, unless the data were split in another way by that version.

old_runs.tar.xz was written at commit 3bdccfa, before the code moved into rooms: small data, eleven
half-finished runs (one a family and a way to adapt), and in expected.json what that version sampled
from them and reached when it resumed them.
"""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import call
from PIL import Image

import sample
import train

ARCHIVE = Path(__file__).with_name("old_runs.tar.xz")
NAMES = (
    "gpt", "gpt-lora", "gpt-prompt", "gpt-student", "gpt-chat", "gpt-classify", "clip",
    "clip-classify", "autoencoder", "ddpm", "text2image",
)  # fmt: skip
SPLIT_OTHERWISE = (
    "gpt",
    "gpt-lora",
    "gpt-prompt",
    "gpt-student",
    "gpt-chat",
    "gpt-classify",
    "clip-classify",
)

# What later versions reach on purpose instead, resumed from the same checkpoints. The learning rate
# of these runs falls from the end of the warmup on; at first its fall began with a jump.
CHANGED = {
    "gpt-chat": {"meta": {"val_loss": 3.9565536, "val_bpb": 6.3089528}, "sample": {}},
}


@pytest.fixture
def old_runs(tmp_path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "old_runs"


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
def test_an_old_run_opens_and_resumes_or_says_why_not(
    name, old_runs, no_forecast, monkeypatch, capsys
):
    monkeypatch.chdir(old_runs)
    expected = json.loads((old_runs / "expected.json").read_text(encoding="utf-8"))[name]
    words = expected["sample"]["words"]
    check_sample(sample_run(name, words, capsys), expected["opened"])
    status = call(train, *expected["words"], "--resume")
    if name in SPLIT_OTHERWISE:
        assert status == 1
        said = capsys.readouterr().err
        for part in (f"runs/{name}", "split by an earlier version", "another --out"):
            assert part in said
        check_sample(sample_run(name, words, capsys), expected["opened"])
        return
    assert status == 0
    last = old_runs / "runs" / name / f"step-{expected['meta']['step']:06d}"
    meta = json.loads((last / "meta.json").read_text(encoding="utf-8"))
    changed = CHANGED.get(name, {"meta": {}, "sample": {}})
    assert meta == pytest.approx(expected["meta"] | changed["meta"], rel=1e-4)
    check_sample(sample_run(name, words, capsys), expected["sample"] | changed["sample"])
