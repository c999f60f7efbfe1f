"""python -m tinyfm: the index of commands, and the list of runs."""

import shutil
import sys

import pytest
from matplotlib.image import imread

from tinyfm import __main__ as index


def call(*words: str) -> int | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tinyfm", *words])
        return index.main()


def test_the_index_names_every_command(capsys):
    assert call() == 0
    printed = capsys.readouterr().out
    for command in ("train.py", "sample.py", "evaluate", "adapt", "hub", "calc", "data/prepare.py"):
        assert command in printed
    assert "no command 'walk'" in call("walk")


def test_runs_are_listed_and_drawn(tiny_run, tmp_path, capsys):
    for name in ("a", "b"):
        shutil.copytree(tiny_run, tmp_path / name)
    other = tmp_path / "a model of others"
    other.mkdir()
    (other / "config.json").write_text("{}", encoding="utf-8")
    broken = shutil.copytree(tiny_run, tmp_path / "c")
    (broken / "config.json").write_text('{"preset": "gpt"}', encoding="utf-8")
    picture = tmp_path / "runs.png"
    assert call("runs", str(tmp_path), "--plot", str(picture)) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert all("4 of 4" in line and "val_bpb" in line and " -> " in line for line in lines)
    assert "c/config.json is not read" in printed.err.replace("\\", "/")
    assert imread(picture).min() < 0.5
    empty = call("runs", str(other))
    assert "no run in" in empty and "python train.py" in empty
