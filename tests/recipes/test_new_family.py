"""A family is added from outside the package, by one registry entry: see bigram.py."""

import json

import pytest
from conftest import ROOT, call

import sample
import train
from tinyfm.calc import __main__ as calc
from tinyfm.common import files
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.recipes import registry


@pytest.fixture
def bigram(monkeypatch, text, tmp_path) -> list[str]:
    """The registry with the new family; options of a run on a small text."""
    monkeypatch.setattr(registry, "RECIPES", (*registry.RECIPES, "bigram"))
    monkeypatch.chdir(tmp_path)
    return ["bigram", "--data.path", str(text), "--data.cache", "cache", "--out", "run"]


def losses() -> list[float]:
    with open("run/metrics.jsonl", encoding="utf-8") as lines:
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_every_command_knows_it(bigram, tmp_path, capsys):
    # Train; half of the run, then the rest.
    assert call(train, *bigram) == 0
    whole, weights = losses(), files.load_tensors("run/step-000100")
    said = capsys.readouterr().out
    assert "val_bpb: " in said and "no usual value" in said
    assert whole[-1] < whole[0] - 0.4
    (tmp_path / "run").rename(tmp_path / "first")
    assert call(train, *bigram) == 0
    (tmp_path / "run" / "latest").write_text("step-000050\n", encoding="utf-8")
    for name in ("step-000100/manifest.json", "step-000100/model.safetensors"):
        (tmp_path / "run" / name).unlink()
    for path in sorted((tmp_path / "run/step-000100").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "run/step-000100").rmdir()
    assert call(train, *bigram, "--resume") == 0
    again = files.load_tensors("run/step-000100")
    assert losses() == whole
    assert all(weights[name].equal(again[name]) for name in weights)
    # Sample, evaluate, count.
    assert call(sample, "run", "--prompt", "Th") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Th")
    assert call(sample, "run", "--steps", "3") == 1
    assert "--steps is not for a run of family bigram" in capsys.readouterr().err
    assert call(evaluate, "run", "--json") == 0
    row = json.loads(capsys.readouterr().out)["scores"]["val_bpb"]
    assert row["reached"] < 5 < row["untrained"]
    assert "66,049 parameters" in calc.answer(["run"]).replace("\xa0", " ")
    assert "66,049 parameters" in calc.answer(["bigram"])
    assert call(train, "bigram", "--dry-run") == 0
    assert "66,049 parameters" in capsys.readouterr().out


def test_the_readme_shows_it():
    code = (ROOT / "tests/recipes/bigram.py").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"```python\n{code}```" in readme
