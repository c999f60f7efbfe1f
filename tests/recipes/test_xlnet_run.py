"""The recipe of XLNet: train, resume, fill masks, draw them, classify, measure; and bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import assert_it_resumes, call, rows_of, write_documents, write_labelled_texts

import sample
import train
from tinyfm.calc import __main__ as calc
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.hub import __main__ as hub
from tinyfm.recipes import run_dir
from tinyfm.tokenizer import ByteTokenizer
from tinyfm.xlnet import XLNet, XLNetConfig

BYTES = ByteTokenizer()
SIZES = """--data.tokenizer bytes --data.cache cache --model.vocab-size 257 --model.n-layer 2
--model.n-head 2 --model.d-model 32 --model.context-length 32 --train.batch-size 8
--train.micro-batch-size 4 --train.steps 40 --train.eval-every 20 --train.log-every 1
--data.val-fraction 0.2 --train.dtype float32"""
RUNS = {"plain": (), "long": ("--data.memory", "16", "--data.span", "3", "--model.segments")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, no_forecast) -> Path:
    """A folder with a text of short documents, and a run of each kind."""
    place = tmp_path_factory.mktemp("xlnet")
    write_documents(place / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name, options in RUNS.items():
            words = ["xlnet", "--data.path", "text", *SIZES.split(), *options, "--out", name]
            assert call(train, *words) == 0
    return place


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_it_learns_and_a_run_that_stopped_goes_the_same_way(tmp_path):
    losses = [row["loss"] for row in rows_of("long") if "loss" in row]
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    assert_it_resumes("long", tmp_path / "long", 40)


def test_a_dry_run_and_the_calculator_know_it(capsys):
    assert call(train, "xlnet", "--dry-run") == 0
    assert '"family": "xlnet"' in capsys.readouterr().out
    count = sum(p.numel() for p in run_dir.open_run("plain").model.parameters())
    assert f"{count:,} parameters" in calc.answer(["plain"]).replace("\xa0", " ")


# ---- sample.py -----------------------------------------------------------------------------------


def test_sample_fills_each_mask(capsys):
    assert call(sample, "plain", "--prompt", "the <mask>at sat [MASK]n a mat", "-n", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mask 1:" and lines[4] == "mask 2:"
    shares = [float(line.split()[0]) for line in lines[1:4]]
    assert shares == sorted(shares, reverse=True)
    first = [lines[i].split(maxsplit=1)[1].replace("' '", " ") for i in (1, 5)]
    assert lines[-1] == f"the{first[0]}at sat{first[1]}n a mat"
    # By hand: neither mask is seen, not even by the content stream of the others.
    run = run_dir.open_run("plain")
    ids, guesses = run.run.fill(run.model, BYTES, "the <mask>at sat [MASK]n a mat")
    assert [*guesses] == [4, 11] and ids[4] == ids[11] == ids[0] == BYTES.eot
    tokens = torch.tensor([ids])
    order = torch.zeros_like(tokens)
    order[0, [4, 11]] = 1
    for place, found in guesses.items():
        logits = run.model(tokens, order, torch.tensor([[place]]))[0, 0]
        torch.testing.assert_close(found[:256], logits[:256].softmax(0))
        assert found[BYTES.eot] == 0


def test_sample_draws_the_masks(tmp_path, capsys):
    words = ["long", "--prompt", "the cat", "--masks", "--seed", "3", "--out", tmp_path / "m.png"]
    assert call(sample, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["t", "h", "e", "'", "c", "a", "t"]
    assert sum("#" in line for line in lines) == 7
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no prompt: write [MASK]"),
        (("--prompt", "the cat"), "'the cat' has no mask: write [MASK]"),
        (("--prompt", "[MASK]" * 32), "has 33 tokens with its masks, and the model reads 32"),
        (("--prompt", "[MASK]", "--top-p", "0.5"), "--top-p is not for a run of family xlnet"),
        (("--masks",), "--masks draws 2 to 24 tokens, and the prompt has 0"),
    ],
)
def test_prompts_that_cannot_be_used(words, message, capsys):
    assert call(sample, "plain", *words) == 1
    assert message in capsys.readouterr().err


# ---- other commands ------------------------------------------------------------------------------


def test_the_measures_of_a_run(capsys):
    assert call(evaluate, "plain", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    scores = printed["scores"]
    evaluations = [row for row in rows_of("plain") if "val_loss" in row]
    # The tied head of the untrained model is untrained too.
    assert scores["val_loss"]["untrained"] == pytest.approx(evaluations[0]["val_loss"], rel=1e-5)
    assert scores["val_loss"]["reached"] == pytest.approx(evaluations[-1]["val_loss"], rel=1e-5)
    assert printed["intervals"]["test_loss"]["reached"]["of"].endswith("documents")
    # From left to right, by hand: each token from those of its window, as a GPT reads it.
    opened = run_dir.open_run("plain")
    data = opened.run.open_data()
    bits = 0.0
    with torch.no_grad():
        for batch in data.text.split_batches("test", 1):
            row, mask = batch["tokens"], batch["mask"][0]
            order = torch.arange(row.size(1))[None]
            log_p = opened.model(row, order, order[:, 1:])[0].log_softmax(-1)
            bits -= log_p.gather(1, row[0, 1:, None])[mask].sum().item() / np.log(2)
    expected = bits / data.split("test").utf8_bytes
    assert scores["test_left_to_right_bpb"]["reached"] == pytest.approx(expected, rel=1e-4)


def test_classify_texts_from_a_pretrained_xlnet(tmp_path, capsys):
    table = tmp_path / "t.csv"
    write_labelled_texts(table)
    words = ["--task", "classify", "--data.path", table, "--init-from", "plain", "--adapt", "lora"]
    words += ["--train.steps", "30", "--train.batch-size", "16", "--train.eval-every", "0"]
    assert call(train, "xlnet", *words, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert call(evaluate, tmp_path / "run", "--json") == 0
    accuracy = json.loads(capsys.readouterr().out)["scores"]["test accuracy"]
    assert accuracy["reached"] > 0.8 >= accuracy["before"]
    hub.main([str(tmp_path / "run"), str(tmp_path / "exported")])
    assert "with the code of the classifier" in capsys.readouterr().out


def test_a_run_is_exported(tmp_path, capsys):
    hub.main(["plain", str(tmp_path)])
    assert f'XLNetLMHeadModel.from_pretrained("{tmp_path}")' in capsys.readouterr().out
    theirs = transformers.XLNetLMHeadModel.from_pretrained(tmp_path)
    opened = run_dir.open_run("plain")
    row = torch.tensor([BYTES.encode("the cat sat")])
    hidden = torch.zeros(1, 11, 11)
    hidden[:, :, 4] = 1
    mapping = torch.zeros(1, 1, 11)
    mapping[0, 0, 4] = 1
    order = torch.zeros_like(row)
    order[0, 4] = 1
    with torch.no_grad():
        expected = theirs(row, perm_mask=hidden, target_mapping=mapping).logits
        found = opened.model(row, order, torch.tensor([[4]]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_candidates_by_hand():
    """A model whose head is a bias alone: its candidates are the softmax of the bias."""
    config = XLNetConfig(257, 8, n_layer=1, n_head=1, d_model=4)
    model = XLNet(config)
    with torch.no_grad():
        model.token_embedding.weight.zero_()
        model.head.bias.fill_(-100)
        model.head.bias[[97, 98, 256]] = torch.tensor([1.0, 2.0, 9.0])
    run = run_dir.open_run("plain").run
    _, found = run.fill(model, BYTES, "x [MASK]y")
    expected = torch.tensor([1.0, 2.0]).softmax(0)
    assert found[2][[97, 98]].tolist() == pytest.approx(expected.tolist())
