"""python -m tinyfm.evaluate on a language model: losses of both held-out texts, with intervals."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import call, random_weights

from data.splits import HELD_OUT
from tinyfm import adapt
from tinyfm.adapt.soft_prompt import PromptedData, prompt_ids
from tinyfm.batches.chat import ChatConfig
from tinyfm.batches.text import TextConfig
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.evaluate import likelihood, metrics
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes.base import Run
from tinyfm.recipes.gpt import ChatRun, GPTRun
from tinyfm.tokenizer import ByteTokenizer
from tinyfm.training.trainer import TrainConfig

CONFIG = GPTConfig(vocab_size=257, context_length=32, n_layer=1, n_head=2, d_model=16)


@pytest.fixture
def run(tmp_path):
    """A run on 150 documents of unequal length."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(150):
        words = [f"w{n}" for n in rng.integers(1000, size=rng.integers(8, 60))]
        (folder / f"{i}.txt").write_text(" ".join(words), encoding="utf-8")
    data = TextConfig(str(folder), "bytes", val_fraction=0.4, cache=str(tmp_path / "cache"))
    return GPTRun(model=CONFIG, data=data, train=TrainConfig(batch_size=4))


def test_losses_of_a_gpt_are_those_of_documents(run):
    data = run.open_data()
    model = random_weights(lambda: GPT(CONFIG))
    with torch.no_grad():
        scores = run.losses(model, data)
    for name in HELD_OUT:
        split = data.split(name)
        # The mean over all targets, as the trainer computes it.
        total = weight = 0.0
        for batch in data.split_batches(name, 3):
            loss, found = model.loss(batch)
            total += loss.item() * float(found["weight"])
            weight += float(found["weight"])
        assert scores[f"{name}_loss"] == pytest.approx(total / weight, rel=1e-5)
        assert scores[f"{name}_bpb"] == pytest.approx(split.bits_per_byte(total / weight), rel=1e-5)
        assert scores[f"{name}_bpb"].n == len(split.starts) >= 20

        # Each document by itself: the windows that hold its targets, and no other targets.
        nats = likelihood.score_targets(model, data.split_batches(name, 3))
        assert len(nats) == split.predicted
        first, second = split.starts[3:5]
        batches = []
        done = 0
        for batch in data.split_batches(name, 1):
            mask = batch["mask"].clone()
            place = done + np.arange(int(mask.sum()))
            mask[batch["mask"]] = torch.from_numpy((place >= first) & (place < second))
            batches.append({**batch, "mask": mask})
            done += len(place)
        own = likelihood.score_targets(model, batches)
        assert own.tolist() == pytest.approx(nats[first:second].tolist(), rel=1e-5)
        bits = np.add.reduceat(nats, split.starts) / math.log(2)
        expected = metrics.bootstrap(bits, split.bytes)
        interval = scores[f"{name}_bpb"].low, scores[f"{name}_bpb"].high
        assert interval == pytest.approx(expected, rel=1e-5)


def test_losses_of_a_chat_are_those_of_conversations(tmp_path):
    """Also of those that continue in another row."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(60):
        talk = []
        for _ in range(rng.integers(1, 4)):
            words = [f"w{n}" for n in rng.integers(1000, size=rng.integers(1, 8))]
            talk.append({"role": "user", "content": "and now?"})
            talk.append({"role": "assistant", "content": " ".join(words)})
        lines.append(json.dumps({"messages": talk}))
    (tmp_path / "talks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    ByteTokenizer().save(tmp_path / "bytes")
    config = ChatConfig(str(tmp_path / "talks.jsonl"), str(tmp_path / "bytes"), val_fraction=0.8)
    model_config = replace(CONFIG, context_length=64)
    run = ChatRun(model=model_config, data=config, train=TrainConfig(batch_size=4))
    data = run.open_data()
    model = random_weights(lambda: GPT(model_config))
    with torch.no_grad():
        scores = run.losses(model, data)
        for name in HELD_OUT:
            split = data.split(name)
            total = sum(
                model.loss(batch)[0].item() * int(batch["mask"].sum())
                for batch in data.split_batches(name, 1)
            )
            loss = scores[f"{name}_loss"]
            assert loss == pytest.approx(total / split.predicted, rel=1e-5)
            assert scores[f"{name}_bpb"] == pytest.approx(split.bits_per_byte(loss), rel=1e-5)
            assert 20 <= loss.n < len(split.rows) and loss.about == f"{loss.n} conversations"
            nats = likelihood.score_targets(model, data.split_batches(name, 3))
            bits = np.add.reduceat(nats, split.starts) / math.log(2)
            own = scores[f"{name}_bpb"]
            assert (own.low, own.high) == pytest.approx(metrics.bootstrap(bits, split.bytes))


@pytest.mark.parametrize("rows, batches", [(8, 13), (0, 2)])
def test_a_loss_has_its_interval_over_small_batches_if_rows_stand_alone(rows, batches, monkeypatch):
    x = torch.linspace(0, 1, 100)

    class Data:
        def val_batches(self, size):
            return self.split_batches("val", size)

        def split_batches(self, name, size):
            return ({"x": part} for part in x.split(size))

        def metrics(self, loss):
            return {}

    model = torch.nn.Linear(1, 1)
    model.loss = lambda batch, generators: (batch["x"].mean(), {})
    monkeypatch.setattr(Run, "LOSS_ROWS", rows)
    scores = Run(train=TrainConfig(batch_size=64)).losses(model, Data())
    for name in HELD_OUT:
        own = scores[f"{name}_loss"]
        assert own == pytest.approx(0.5) and own.n == batches
        assert math.isnan(own.low) == (batches < 10)


def test_a_soft_prompt_is_read_before_both_held_out_texts(run):
    data = run.open_data()
    model = random_weights(lambda: GPT(CONFIG))
    adapt.apply(model, "prompt", adapt.AdapterConfig(prompt_tokens=3))
    prompted = PromptedData(data, prompt_ids(model))
    for name in HELD_OUT:
        for batch, plain in zip(prompted.split_batches(name, 4), data.split_batches(name, 4)):
            assert batch["tokens"][:, :3].tolist() == [[257, 258, 259]] * len(batch["tokens"])
            assert torch.equal(batch["tokens"][:, 3:], plain["tokens"])
            assert batch["mask"].sum() == plain["mask"].sum()


def test_the_command_prints_intervals(tiny_run, tmp_path, capsys):
    assert call(evaluate, tiny_run, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    meta = printed["run"]
    for name in ("val_loss", "val_bpb"):
        assert printed["scores"][name]["reached"] == pytest.approx(meta[name], rel=1e-4)
    assert printed["scores"]["test_bpb"]["reached"] < printed["scores"]["test_bpb"]["untrained"]
    assert printed["intervals"]["test_bpb"]["reached"]["of"] == "1 document"
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"The {'with ' * i} statement", encoding="utf-8")
    assert call(evaluate, tiny_run, "--text", folder, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    for name, row in printed["scores"].items():
        interval = printed["intervals"][name]["reached"]
        assert interval["low"] < row["reached"] < interval["high"], name
        assert interval["n"] == 12
    assert call(evaluate, tiny_run, "--text", folder) == 0
    assert "12 documents)" in capsys.readouterr().out
    (folder / "1.txt").rename(tmp_path / "one.txt")
    assert call(evaluate, tiny_run, "--text", tmp_path / "one.txt") == 0
    assert "1 document: too few for an interval" in capsys.readouterr().out
