"""A GPT on texts that are no prose, from training to its measures."""

import dataclasses
import gzip
import json
import math
import re
from pathlib import Path

import corridor
import numpy as np
import pytest
from conftest import SIZES, call

import sample
import tinyfm.evaluate.__main__ as evaluate
import train
from data import episodes, molecules, series, wheels
from data.splits import TEST, TRAIN, VAL
from tinyfm.recipes import modalities


def learn(folder, path: str, read) -> Path:
    """A run of four steps on a source; read(package, member): the files of its package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wheels, "read", read)
        options = (*SIZES.split(), "--data.cache", folder / "cache", "--out", folder / "run")
        assert call(train, "gpt", "--data.path", path, *options) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A GPT that has read chains of carbon, nitrogen and oxygen."""
    rng = np.random.default_rng(0)
    chains = ["".join(rng.choice(["C", "N", "O", "(C)C", "=C"], size=6)) for _ in range(500)]
    texts = [text for text in chains if not molecules.fault(text)]
    content = gzip.compress("\n".join(["SMILES", *texts, ""]).encode())
    parts = ((TRAIN, "train", 0.0, 0.5), (VAL, "train", 0.5, 0.6), (TEST, "train", 0.6, 0.7))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(molecules, "PARTS", parts)
        folder = tmp_path_factory.mktemp("molecules")
        return learn(folder, "molecules", lambda package, member: content)


def test_evaluate_counts_what_is_valid_beside_the_real_and_a_markov_model(run, capsys):
    assert call(evaluate, run, "--samples", "6", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    columns = set(scores["valid"])
    (markov,) = columns - {"reached", "real"}
    assert columns == set(scores["novel"]) == {"reached", "real", markov}
    assert scores["valid"]["real"] == scores["novel"]["real"] == 1
    assert scores["valid"][markov] > 0.5
    assert scores["test_bpb"][markov] < scores["test_bpb"]["untrained"]
    assert set(scores["test_loss"]) == {"untrained", "reached", markov}


def test_sample_says_what_is_valid(run, tmp_path, capsys):
    out = tmp_path / "found.txt"
    assert call(sample, run, "-n", "3", "--out", out, "--prompt", "CC") == 0
    said = capsys.readouterr()
    assert "3 molecules: " in said.err and " valid" in said.err
    texts = out.read_text(encoding="utf-8").removesuffix("\n").split("\n----\n")
    assert all(text.startswith("CC") for text in texts) and len(texts) == 3
    assert call(sample, run, "--prompt", "CC)", "--beams", "2") == 1
    assert "'CC)' starts no SMILES" in capsys.readouterr().err


def test_shares_by_hand():
    """Five of six are valid; of these four differ, OCC being CCO; of the four CCC is known. Of all
    15 letters 10 are a C."""
    texts = ["CCO", "OCC", "CCC", "CN", "CO", "C("]
    own = dataclasses.replace(
        molecules.MODALITY, describe=lambda text: {"share of C": (text.count("C"), len(text))}
    )
    found = modalities.shares(own, texts, ["CCC", "CCCC"])
    expected = {"valid": 5 / 6, "unique": 4 / 5, "novel": 3 / 4, "share of C": 10 / 15}
    assert {name: float(value) for name, value in found.items()} == expected
    nothing = modalities.shares(molecules.MODALITY, ["C("], ["C"])
    assert [float(value) for value in nothing.values()] == [0, 0, 0]


def test_files_that_are_drawn_are_not_overwritten(run, tmp_path, capsys, monkeypatch):
    def draw(texts, path):
        path.with_suffix(".svg").write_text("\n".join(texts), encoding="utf-8")

    own = dataclasses.replace(molecules.MODALITY, draw=draw, endings=(".svg",))
    own = dataclasses.replace(own, fault=lambda text: "", key=str, copied=None)
    monkeypatch.setattr(molecules, "MODALITY", own)
    monkeypatch.chdir(tmp_path)
    for name in ("sample", "sample-2"):
        assert call(sample, run) == 0
        assert f"{name}.svg" in capsys.readouterr().out
        assert (tmp_path / f"{name}.svg").is_file()
    assert call(sample, run, "--out", "sample.svg") == 1
    assert "sample.svg exists" in capsys.readouterr().err
    assert call(sample, run, "--out", "other.svg") == 0
    assert (tmp_path / "other.txt").is_file()


def test_a_forecast_is_scored_beside_yesterday_and_answers_in_numbers(
    tmp_path, capsys, monkeypatch
):
    rng = np.random.default_rng(0)
    lines = ["0,place", ",".join(["Date", *series.COLUMNS])]
    for hour in range(24 * 70):
        value = 10 + 5 * math.sin(hour / 24 * 2 * math.pi) + rng.normal()
        lines.append(",".join(["1", f"{value:.2f}", *"12345"]))
    found = learn(tmp_path, "series", lambda package, member: "\n".join(lines).encode())
    monkeypatch.setattr(modalities, "FORECASTS", 2)
    monkeypatch.setattr(modalities, "GUESSES", 3)
    monkeypatch.setattr(modalities, "MARKOV_SAMPLES", 2)
    capsys.readouterr()
    assert call(evaluate, found, "--samples", "2", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert set(scores["MASE"]) == {"reached", "as yesterday", "nearest pasts"}
    assert 0.5 < scores["MASE"]["as yesterday"] < 2
    assert scores["MASE"]["reached"] > 0 < scores["weighted quantile loss"]["reached"]
    monkeypatch.chdir(tmp_path)
    hours = " ".join(str(20 + hour % 24) for hour in range(168))
    assert call(sample, found, "-n", "2", "--prompt", hours, "--max-new-tokens", "24") == 0
    said = capsys.readouterr()
    valid = int(re.search(r"2 series: (\d) valid", said.err)[1])
    assert ("hour     10%" in said.out) == (tmp_path / "sample.png").exists() == (valid > 0)
    assert call(sample, found, "--prompt", "5 " * 168) == 1
    assert "the series is constant" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:past 32 tokens")
def test_a_model_plays_episodes_beside_the_expert_and_chance(tmp_path, capsys, monkeypatch):
    corridor.install(monkeypatch)
    monkeypatch.setattr(episodes, "PLAYED", 4)
    monkeypatch.setattr(episodes, "LONGEST", 40)
    monkeypatch.setattr(modalities, "MARKOV_SAMPLES", 2)
    found = learn(tmp_path, "episodes", None)
    capsys.readouterr()
    assert call(evaluate, found, "--samples", "2", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["valid"]["real"] == 1
    for level in episodes.LEVELS:
        row = scores[f"success, {level}"]
        assert set(row) == {"reached", "expert", "random"}
        assert row["reached"] <= row["expert"]
