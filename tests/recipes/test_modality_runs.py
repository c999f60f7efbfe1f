"""A GPT on texts that are no prose, from training to its measures."""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SIZES, call

import sample
import tinyfm.evaluate.__main__ as evaluate
import train
from data import molecules, wheels
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


def test_shares_by_hand():
    """Five of six are valid; of these four differ, OCC being CCO; of the four CCC is known."""
    texts = ["CCO", "OCC", "CCC", "CN", "CO", "C("]
    found = modalities.shares(molecules.MODALITY, texts, ["CCC", "CCCC"])
    assert [float(found[name]) for name in ("valid", "unique", "novel")] == [5 / 6, 4 / 5, 3 / 4]
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
