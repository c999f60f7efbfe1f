"""The dial: what --budget chooses, what it refuses, and that its run is the plain one."""

import csv
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import call

import train
from tinyfm.calc import __main__ as calc
from tinyfm.calc import size_law
from tinyfm.common import files
from tinyfm.recipes import budget, gpt, registry
from tinyfm.recipes.base import Preset
from tinyfm.training.log import read_metrics

WIDTHS = (16, 32, 48)


@pytest.fixture
def swept(text, tmp_path, monkeypatch) -> Preset:
    """The preset gpt, tiny, with a table of a law that prefers the middle width at 50,000 tokens.

    A step takes a minute, as far as the dial can see.
    """
    usual = registry.find_preset("gpt").run
    run = replace(
        usual,
        model=replace(usual.model, vocab_size=257, context_length=32, d_model=32),
        data=replace(usual.data, path=str(text), tokenizer="bytes", cache=str(tmp_path / "cache")),
        train=replace(usual.train, steps=4, batch_size=8, micro_batch_size=0, device="cpu"),
    )
    preset = Preset("tiny", run, sweep="tiny.csv")
    monkeypatch.setitem(gpt.PRESETS, "gpt", preset)
    monkeypatch.setattr(size_law, "FOLDER", tmp_path)
    monkeypatch.setattr(budget, "seconds_per_step", lambda run: 60.0)
    monkeypatch.setattr(budget, "SHOWN", 0.0)
    monkeypatch.chdir(tmp_path)
    rows = []
    middle = flops_per_token(run)
    for width in WIDTHS:
        M = flops_per_token(run.at_width(width))
        for tokens in (10_000, 30_000, 100_000):
            loss = 1 + (M / middle) ** -0.5 + (tokens / 50_000) ** -0.5
            rows.append(size_law.Trained(width, M, tokens, 1e6, loss))
    with (tmp_path / "tiny.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, asdict(rows[0]).keys())
        table.writeheader()
        table.writerows(map(asdict, rows))
    return preset


def flops_per_token(run) -> float:
    with torch.device("meta"):
        return run.build_model().flops_per_row() / run.model.context_length


def test_a_step_is_timed_on_rows_of_zeros(text, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "TIMED", 0.0)
    usual = registry.find_preset("gpt").run
    run = replace(usual.at_width(16), out=str(tmp_path / "none"))
    assert 0 < budget.seconds_per_step(run) < 60
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("words", ["40000 tokens", "50m", "1e11 FLOP"])
def test_the_plan_names_the_plain_command(words, swept, capsys):
    assert call(train, "gpt", "--budget", words, "--train.seed", "3", "--dry-run") == 0
    out = capsys.readouterr().out
    (chosen,) = re.findall(r"width +(\d+) +(\S+) tokens  [\d.]+ \(.* in 90%\)  chosen", out)
    command = re.search(r"without the dial: python train.py (.*)", out).group(1)
    name, _, run = train.read_arguments([*shlex.split(command), "--train.eval-every", "9"])
    assert (name, run.train.seed, run.model.d_model) == ("gpt", 3, int(chosen[0]))
    assert replace(run.at_width(int(chosen[0])), train=run.train).model == run.model
    tokens = run.train.steps * run.train.batch_size * 32
    assert tokens == pytest.approx(float(chosen[1]), rel=0.05)
    if "tokens" in words:
        assert calc.answer(["budget", *words.split()]).splitlines()[0] in out
    if words == "50m":  # the evaluations, a third as dear as training, take some of it
        assert run.train.steps < 50


def test_the_corrected_run_is_the_plain_one_bit_for_bit(swept, monkeypatch, capsys):
    """It was planned for a minute a step, and finds that a step takes less."""

    def first_part(trainer, steps):
        trainer.fit(until=1)
        trainer.fit(until=steps)
        return 45.0, 0.0

    monkeypatch.setattr(budget, "first_part", first_part)
    assert call(train, "gpt", "--budget", "40m", "--out", "dial", "--train.log-every", "7") == 0
    out = capsys.readouterr().out
    planned = int(re.search(r"instead of (\d+)", out).group(1))
    steps = files.read_json(Path("dial/config.json"))["train"]["steps"]
    assert steps > planned >= 20
    (first,) = re.findall(r"([\d.]+) \(.*chosen", out)
    (later,) = re.findall(r"instead of \d+: ([\d.]+) .* bits per byte expected", out)
    assert float(later) < float(first)  # more steps promise more
    assert re.search(r"budget 40m: \d+ s, \d+ expected; [\d.]+ bits per byte, " + later, out)
    rows = read_metrics(Path("dial/metrics.jsonl"))
    assert [row["step"] for row in rows if "val_loss" in row] == [0, -(-steps // 2), steps]
    command = re.search(r"without the dial: python train.py (.*)", out).group(1)
    words = re.sub(r"--train.steps \d+", f"--train.steps {steps}", command)
    assert call(train, *shlex.split(words), "--out", "plain") == 0
    name = f"step-{steps:06d}/model.safetensors"
    assert Path("dial", name).read_bytes() == Path("plain", name).read_bytes()
    assert call(train, "--resume", "--out", "dial") == 0
    assert "the run is complete" in capsys.readouterr().out


def test_other_text_gets_a_size_and_no_loss(swept, tmp_path, text, capsys):
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes()[::-1])
    words = ["gpt", "--budget", "40000 tokens", "--data.path", other, "--dry-run"]
    assert call(train, *words) == 0
    out = capsys.readouterr().out
    assert "no loss is expected" in out and "in 90%" not in out
    assert f"--data.path {other}" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpt", "--budget", "10m", "--model.d-model", "64"], "leave out --model.d-model"),
        (["gpt", "--budget", "10m", "--train.steps", "9"], "leave out --train.steps"),
        (["gpt", "--budget", "10m", "--train.eval-every", "9"], "leave out --train.eval-every"),
        (["gpt", "--budget", "1m"], "1m leaves less than 20 steps of the smallest size"),
        (["gpt", "--budget", "soon"], "'soon'; use 10m"),
        (["gpt", "--gpu", "h100"], "--gpu h100 .*: add --budget"),
        (["gpt", "--budget", "5 dollars", "--gpu", "h100"], "calc optimal"),
        (["molecules", "--budget", "10m"], "molecules as asked has none"),
        (["clip", "--budget", "10m"], "clip as asked has none"),
    ],
)
def test_refused_plans(words, message, swept, capsys):
    assert call(train, *words, "--dry-run") == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_run_that_is_resumed_has_no_budget(swept, capsys):
    words = ["gpt", "--train.steps", "1", "--out", "run"]
    assert call(train, *words) == 0
    assert call(train, "--resume", "--out", "run", "--budget", "10m") == 1
    assert "leave out --budget" in capsys.readouterr().err
