"""The model card of an export: a head that the hub reads, the run's figures, what is missing."""

import dataclasses
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from conftest import call, unpack_old_runs
from huggingface_hub import ModelCard

from tinyfm.evaluate import __main__ as evaluate
from tinyfm.hub import __main__ as hub
from tinyfm.hub import card as hub_card
from tinyfm.recipes import card
from tinyfm.recipes.base import About
from tinyfm.recipes.run_dir import open_run

PRETRAINED = ["gpt", "clip", "autoencoder", "ddpm", "text2image"]
FAMILIES = [*PRETRAINED, "gpt-classify", "clip-classify", "gpt-lora"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return unpack_old_runs(tmp_path_factory.mktemp("cards")) / "runs"


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_has_a_card_that_the_hub_reads(name, runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    opened = open_run(f"runs/{name}")
    about = opened.run.ABOUT
    text = str(card.describe(opened, "my-export"))
    head = ModelCard(text).data.to_dict()
    assert head["license"] == "unknown"
    assert head["library_name"] == about.library
    assert head.get("pipeline_tag", "") == about.task
    assert head["tags"] == ["tinyfm", opened.run.family]
    for said in (about.use, about.limits, "Not measured on test data", "Licence of the data: "):
        assert said in text
    assert re.search(r"parameters; FLOPs, calculated: [\d.]+e\+\d+\.", text)
    assert str(runs) not in text
    assert ("It started from the run `gpt` (--adapt lora)" in text) == (name == "gpt-lora")


@pytest.mark.parametrize("recipe", [*PRETRAINED, "encoder", "xlnet", "seq2seq"])
def test_every_run_type_says_what_it_is_for(recipe):
    for run_type in import_module(f"tinyfm.recipes.{recipe}").RUNS:
        assert About() != run_type.ABOUT, run_type


def test_the_figures_are_those_that_evaluate_measured(tiny_run, tmp_path, capsys):
    record = tiny_run / "evaluation.json"
    assert call(evaluate, tiny_run, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads(record.read_text(encoding="utf-8")) == printed | {"options": {}}

    out = tmp_path / "exported"
    hub.main([str(tiny_run), str(out), "--watts", "50"])
    found = ModelCard.load(out / "README.md")
    (*_, measured) = [each for each in found.data.eval_results if each.metric_type == "test_bpb"]
    reached = printed["scores"]["test_bpb"]["reached"]
    interval = printed["intervals"]["test_bpb"]["reached"]
    assert measured.metric_value == reached
    assert measured.task_type == "text-generation"
    row = next(line for line in found.text.splitlines() if line.startswith("| test_bpb |"))
    assert f"| {reached:.4g} |" in row
    assert interval["of"] in row
    assert "the trainer's own data, `reference.txt`" in found.text
    assert "Licence of the data: not recorded" in found.text
    assert "a share of 0.1 is held out" in found.text
    assert "kWh, if the computer drew 50 W on average, which is an assumption" in found.text

    # Of another step, or damaged.
    other = printed | {"run": {"step": 3, "weights": "model"}, "options": {}}
    record.write_text(json.dumps(other), encoding="utf-8")
    assert "Not measured on test data" in str(card.describe(open_run(str(tiny_run)), "x"))
    record.write_text("{}", encoding="utf-8")
    assert call(hub, tiny_run, tmp_path / "x") == 1
    error = capsys.readouterr().err
    assert "evaluation.json: intervals is missing; delete the file" in error
    record.unlink()


def test_hours_and_energy_come_from_the_speeds(tiny_run):
    opened = open_run(str(tiny_run))
    rows = (tiny_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, rows) if "tokens_per_s" in row]
    seconds = sum(4 * 32 / row["tokens_per_s"] for row in rows)  # one row of metrics a step
    unit, speeds = card.read_speeds(opened)
    assert (unit, card.units_in_row(opened, unit)) == ("tokens", 32)
    assert card.training_hours(speeds, 4 * 32) == pytest.approx(seconds / 3600)
    with pytest.raises(ValueError, match="--watts is -1"):
        card.describe(opened, "x", watts=-1)


@pytest.mark.parametrize(
    ("name", "unit", "in_row"),
    [("gpt-classify", "texts", 1), ("clip", "images", 1), ("gpt-chat", "tokens", 0)],
)
def test_hours_count_in_the_unit_of_the_data(name, unit, in_row, runs, monkeypatch):
    """A row of a classifier is a text, though its model counts tokens; chats differ in length."""
    monkeypatch.chdir(runs.parent)
    opened = open_run(f"runs/{name}")
    assert card.read_speeds(opened)[0] == unit
    assert card.units_in_row(opened, unit) == in_row
    cost = card.describe_cost(opened, 100)
    assert (f"{unit} in all" in cost) == ("hours of training steps" in cost) == (in_row > 0)


def test_shakespeare_has_no_split_of_its_source(tiny_run):
    opened = open_run(str(tiny_run))
    data = dataclasses.replace(opened.run.data, path="shakespeare")
    opened = dataclasses.replace(opened, run=dataclasses.replace(opened.run, data=data))
    assert "a share of 0.1 is held out" in card.describe_data(opened)
    assert "public domain" in card.describe_data(opened)


def test_a_card_of_somebody_else_is_kept(tmp_path):
    own = hub_card.Card("Mine", {"license": "mit"}, {"Use": "None | at all"})
    assert hub_card.write(own, tmp_path)
    assert hub_card.write(own, tmp_path)  # our own is replaced
    path = tmp_path / "README.md"
    path.write_text(path.read_text(encoding="utf-8").replace(hub_card.MARK, ""), encoding="utf-8")
    assert not hub_card.write(own, tmp_path)
    assert hub_card.table(["a"], [["b|c"]]) == "| a |\n| --- |\n| b\\|c |"
