"""python -m tinyfm.evaluate overlap: held-out text that a run, or a run before it, has read."""

import json
import random
import re

import numpy as np
import pytest
from conftest import SIZES, call
from PIL import Image

import train
from data import splits
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.evaluate import overlap

NEW = [*SIZES.split(), "--data.val-fraction", "0.4", "--model.context-length", "128"]
TUNED = NEW[NEW.index("--train.batch-size") : -2]  # without the sizes, which the base gives


def articles(seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(10_000)}" for _ in range(40)) for _ in range(120)]


def write(folder, texts: list[str]) -> str:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("overlap")


@pytest.fixture(scope="module")
def base(folder, no_forecast):
    """A run on 120 articles."""
    path = write(folder / "texts", articles(0))
    words = ["--data.path", path, "--data.cache", folder / "cache", "--out", folder / "base"]
    assert call(train, "gpt", *NEW, *words) == 0
    return folder / "base"


def test_a_run_is_compared_with_the_text_of_the_run_it_started_from(base, folder, capsys):
    """The second run holds out texts that quote the first run's training text, all in 20 words."""
    read = [text for text in articles(0) if splits.split_of(text, 0.4) == "train"]
    quoting = []
    for i, text in enumerate(articles(1)):
        quotes = (" ".join([*text.split(), *other.split()[:20]]) for other in read[i % 20 :])
        held = splits.split_of(text, 0.4) != "train"
        quoting.append(
            next(q for q in quotes if splits.split_of(q, 0.4) != "train") if held else text
        )
    path = write(folder / "more", quoting)
    out = folder / "tuned"
    words = ["--data.path", path, "--data.cache", folder / "cache", "--init-from", base]
    assert call(train, "gpt", *TUNED, *words, "--out", out) == 0
    capsys.readouterr()

    assert call(evaluate, "overlap", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [own["split"] for own in found] == ["validation", "test"]
    for own in found:
        assert own["units"] > 10
        assert own["runs"][str(out)] == 0
        assert own["runs"][str(base)] == pytest.approx(20 / 60)
        assert own["runs"]["all of them"] == pytest.approx(20 / 60)
    assert call(evaluate, "overlap", out) == 0
    said = capsys.readouterr().out
    assert f"training text of {base}: 33.33%" in said


def test_held_out_answers_are_looked_for_in_the_base_text(base, folder, capsys):
    read = [text for text in articles(0) if splits.split_of(text, 0.4) == "train"]
    answers = [" ".join(text.split()[:8]) for text in read[:30]]  # too short for runs of 13 words
    answers += [" ".join(text.split()[:8]) for text in articles(2)[:30]]
    talks = []
    for answer in answers:
        said = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": answer}]
        talks.append(json.dumps({"messages": said}))
    (folder / "talks.jsonl").write_text("\n".join(talks), encoding="utf-8")
    out = folder / "chat"
    words = ["--task", "chat", "--data.path", folder / "talks.jsonl", "--init-from", base]
    assert call(train, "gpt", *TUNED, *words, "--out", out) == 0
    capsys.readouterr()
    assert call(evaluate, "overlap", out, "--json") == 0
    for own in json.loads(capsys.readouterr().out):
        assert own["runs"][str(base)] == 0
        assert 0.2 < own["answers"][str(base)] < 0.8


def test_a_named_text_is_compared_with_its_own_training(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    path = write(folder / "named", articles(3))
    assert call(evaluate, "overlap", path) == 0
    assert "validation (" in (said := capsys.readouterr().out) and "0.00%" in said


def test_pictures_near_to_training_pictures_of_their_name_are_counted(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for i in range(20):
        pixels = np.random.default_rng(i // 2).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        (tmp_path / "own" / "cat").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "own" / "cat" / f"{i}.png")
    assert call(evaluate, "overlap", "own") == 0
    said = capsys.readouterr().out
    assert re.search(r"nearer than 0.02 .* 0 of \d+ in val, 0 of \d+ in test", said)
    assert call(evaluate, "overlap", "own", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"val": 0, "test": 0}


def test_what_cannot_be_compared_is_refused(base, folder, capsys):
    added = folder / "texts" / "added.txt"
    added.write_text(articles(4)[0], encoding="utf-8")
    assert call(evaluate, "overlap", base) == 1
    said = capsys.readouterr().err
    assert str(base) in said and "other data" in said
    assert call(evaluate, base, "--json") == 0
    said = capsys.readouterr().err
    assert "warning" in said and "other data" in said
    added.unlink()
    assert call(evaluate, base, "--json") == 0
    assert "other data" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="are pictures"):
        list(overlap.read_texts(object(), "val"))
