"""The recipe of encoders: train, resume, fill masks, classify, measure; and what users mistype."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_it_resumes, call, rows_of, write_documents, write_labelled_texts
from transformers import pipeline

import sample
import train
from tinyfm.batches.masked import NOT_PREDICTED
from tinyfm.calc import __main__ as calc
from tinyfm.encoder import Encoder, EncoderConfig
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.hub import __main__ as hub
from tinyfm.recipes import encoder as recipe
from tinyfm.recipes import hidden, run_dir
from tinyfm.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
SIZES = """--data.tokenizer bytes --data.cache cache --model.vocab-size 258 --model.n-layer 1
--model.n-head 2 --model.d-model 32 --model.context-length 32 --train.batch-size 8
--train.micro-batch-size 4 --train.steps 40 --train.eval-every 20 --train.log-every 1
--data.val-fraction 0.2 --train.dtype float32"""
ELECTRA = ("--model.objective", "electra", "--model.detection-weight", "5")
OBJECTIVES = {"mlm": (), "electra": ELECTRA}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, no_forecast) -> Path:
    """A folder with a text of 120 short documents, and a run of each objective."""
    place = tmp_path_factory.mktemp("encoder")
    write_documents(place / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name, options in OBJECTIVES.items():
            words = ["encoder", "--data.path", "text", *SIZES.split(), *options, "--out", name]
            assert call(train, *words) == 0
    return place


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_learns_and_a_run_that_stopped_goes_the_same_way(name, tmp_path):
    rows = rows_of(name)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    scores = [row for row in rows if "val_loss" in row]
    assert scores[-1]["val_accuracy"] > scores[0]["val_accuracy"]
    assert ("val_detection" in scores[0]) == (name == "electra")
    assert_it_resumes(name, tmp_path / name, 40)


def test_a_smaller_model_learns_from_a_trained_one(tmp_path):
    out = tmp_path / "student"
    words = ["encoder", "--data.path", "text", *SIZES.split(), "--teacher", "mlm"]
    words += ["--data.tokenizer", "sentencepiece", "--distil.cosine", "0.1", "--distil.take-layers"]
    words += ["--train.steps", "4", "--train.eval-every", "0", "--out", out]
    assert call(train, *words) == 0
    first = next(row for row in rows_of(out) if "val_loss" in row)
    taught = [row for row in rows_of("mlm") if "val_loss" in row]
    assert first["val_loss"] == pytest.approx(taught[-1]["val_loss"], rel=1e-5)  # its layers
    assert any("loss_with_teacher" in row for row in rows_of(out))


def test_distillation_needs_a_teacher(capsys):
    assert call(train, "encoder", "--distil.take-layers", "--dry-run") == 1
    assert "add --teacher RUN" in capsys.readouterr().err


def test_a_dry_run_and_the_calculator_know_it(capsys):
    assert call(train, "encoder", "--dry-run") == 0
    assert '"family": "encoder"' in capsys.readouterr().out
    opened = run_dir.open_run("mlm")
    count = sum(p.numel() for p in opened.model.parameters())
    assert f"{count:,} parameters" in calc.answer(["mlm"]).replace("\xa0", " ")


# ---- filling masks -------------------------------------------------------------------------------


def test_sample_fills_each_mask(capsys):
    assert call(sample, "mlm", "--prompt", "the [MASK]at sat <mask>n a mat", "-n", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mask 1:" and lines[4] == "mask 2:"
    shares = [float(line.split()[0]) for line in lines[1:4]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    first = [lines[1].split(maxsplit=1)[1], lines[5].split(maxsplit=1)[1]]
    shown = [" " if text == "' '" else text for text in first]
    assert lines[-1] == f"the{shown[0]}at sat{shown[1]}n a mat"
    # More candidates than there are: all ordinary tokens, bytes here.
    assert call(sample, "mlm", "--prompt", "the [MASK]at", "-n", "999") == 0
    assert len(capsys.readouterr().out.splitlines()) == 256 + 1
    # ELECTRA's generator fills them, too.
    assert call(sample, "electra", "--prompt", "the [MASK]at") == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_an_exported_run_fills_masks_as_here(tmp_path, capsys):
    """The pipeline of transformers, with the probabilities of ordinary tokens alone."""
    hub.main(["mlm", str(tmp_path)])
    assert f'pipeline("fill-mask", "{tmp_path}")' in capsys.readouterr().out
    p = torch.zeros(258)
    for entry in pipeline("fill-mask", str(tmp_path), top_k=258)("the [MASK]at sat"):
        p[entry["token"]] = entry["score"]
    opened = run_dir.open_run("mlm")
    _, guesses = opened.run.fill(opened.model, opened.tokenizer, "the [MASK]at sat")
    (found,) = guesses.values()
    p[~torch.from_numpy(opened.run.candidates(opened.tokenizer))] = 0
    torch.testing.assert_close(p / p.sum(), found, atol=1e-5, rtol=1e-4)
    with pytest.raises(SystemExit, match=r"ElectraForPreTraining, needs norm 'post', not 'pre'"):
        hub.main(["electra", str(tmp_path / "electra")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no prompt: write [MASK]"),
        (("--prompt", "the cat"), "'the cat' has no mask: write [MASK]"),
        (("--prompt", "[MASK]" * 32), "has 33 tokens with its masks, and the model reads 32"),
        (("--prompt", "[MASK]", "--top-p", "0.5"), "--top-p is not for a run of family encoder"),
    ],
)
def test_prompts_that_cannot_be_filled(words, message, capsys):
    assert call(sample, "mlm", *words) == 1
    assert message in capsys.readouterr().err


def test_candidates_by_hand():
    """A model whose head is a bias alone: its candidates are the softmax of the bias."""
    config = EncoderConfig(258, 8, n_layer=1, n_head=1, d_model=4)
    model = Encoder(config)
    with torch.no_grad():
        model.embeddings.token_embedding.weight.zero_()
        model.head.decoder.bias.fill_(-100)
        model.head.decoder.bias[[97, 98, 257]] = torch.tensor([1.0, 2.0, 9.0])
    ids, found = recipe.EncoderRun(model=config).fill(model, BYTES, "x [MASK]y")
    assert ids == [BYTES.eot, ord("x"), 257, ord("y")]  # the space belongs to the word
    assert list(found) == [2]
    # The mask itself is no candidate.
    expected = torch.tensor([1.0, 2.0]).softmax(0)
    assert found[2][[97, 98]].tolist() == pytest.approx(expected.tolist())
    assert found[2][257] == 0


def test_a_row_with_its_guesses():
    ids = [*b"a cat"]
    guesses = [NOT_PREDICTED] * 5
    targets = [NOT_PREDICTED] * 5
    targets[1], targets[2] = ord(" "), ord("c")
    guesses[1], guesses[2] = ord(" "), ord("b")
    ids[2] = 257
    assert hidden.with_guesses(BYTES, ids, targets, guesses) == "a [' '][b, not c]at"


# ---- classification ------------------------------------------------------------------------------


@pytest.mark.parametrize("adapt", ["full", "lora", "head"])
def test_classify_texts_from_a_pretrained_encoder(adapt, tmp_path, capsys):
    table = tmp_path / "t.csv"
    write_labelled_texts(table)
    base = "electra" if adapt == "head" else "mlm"
    words = ["--task", "classify", "--data.path", table, "--init-from", base, "--adapt", adapt]
    words += ["--train.steps", "40", "--train.batch-size", "16", "--train.eval-every", "0"]
    assert call(train, "encoder", *words, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert call(evaluate, tmp_path / "run", "--json") == 0
    accuracy = json.loads(capsys.readouterr().out)["scores"]["test accuracy"]
    assert accuracy["reached"] > 0.8 >= accuracy["before"]
    assert call(sample, tmp_path / "run", "--prompt", "7 the cat sat 49") == 0
    assert capsys.readouterr().out.split()[1] in ("a", "b")


def test_a_soft_prompt_is_refused(capsys):
    words = ["--init-from", "mlm", "--adapt", "prompt", "--out", "prompted"]
    assert call(train, "encoder", *words) != 0
    assert re.search(r"use[\s│]+lora, bias or head", capsys.readouterr().err)


def test_features_do_not_depend_on_padding_or_order():
    model = run_dir.open_run("mlm").model
    rows = [BYTES.encode(text) for text in ("the cat", "a", "some log under this tree", "x" * 99)]
    together = hidden.features(model, rows, at_once=4)
    for row, own in zip(rows, together):
        alone = hidden.features(model, [row])[0]
        assert torch.allclose(own, alone, atol=1e-5)
        states = model.hidden(torch.tensor([row[:32]]))[0]
        assert torch.allclose(own, states.mean(0), atol=1e-5)


def test_halves_find_each_other_by_their_features(monkeypatch):
    """With features that are counts of letters, halves of the same letters are nearest."""

    def count(encoder, rows):
        counts = [torch.bincount(torch.as_tensor(row), minlength=256).float() for row in rows]
        return torch.stack(counts)

    monkeypatch.setattr(hidden, "features", count)
    texts = ["aabbaabb", "ccddccdd", "eeffeeff", "gghhaabb"]
    documents = [np.array(BYTES.encode(text)) for text in texts]
    assert hidden.halves_found(None, documents).tolist() == [True, True, True, False]


# ---- measures ------------------------------------------------------------------------------------


def test_the_measures_of_a_run(capsys):
    assert call(evaluate, "mlm", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    scores = printed["scores"]
    assert list(scores)[:4] == ["val_loss", "val_accuracy", "test_loss", "test_accuracy"]
    assert scores["test_loss"]["reached"] < scores["test_loss"]["untrained"]
    assert printed["intervals"]["test_loss"]["reached"]["of"].endswith("documents")
    recorded = [row for row in rows_of("mlm") if "val_loss" in row][-1]
    assert scores["val_loss"]["reached"] == pytest.approx(recorded["val_loss"], rel=1e-5)
    # By hand: nats per hidden token.
    opened = run_dir.open_run("mlm")
    data = opened.run.open_data()
    nats, count = 0.0, 0
    with torch.no_grad():
        for batch in data.split_batches("test", 3):
            log_p = opened.model(batch["tokens"]).log_softmax(-1)
            for row, column in (batch["targets"] != NOT_PREDICTED).nonzero().tolist():
                nats -= float(log_p[row, column, batch["targets"][row, column]])
                count += 1
    assert scores["test_loss"]["reached"] == pytest.approx(nats / count, rel=1e-5)


def test_the_measures_of_electra(capsys):
    assert call(evaluate, "electra", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    names = {"val_loss", "test_loss", "test_detection", "test_generator_loss", "test_accuracy"}
    assert names <= scores.keys()
    assert scores["test_detection"]["reached"] > 0.53


def test_what_is_replaced_is_judged():
    """A discriminator that sees an odd token as replaced, and a generator that always draws one."""
    model = Encoder(
        EncoderConfig(258, 4, n_layer=1, n_head=1, d_model=4, objective="electra")
    ).eval()
    with torch.no_grad():
        model.head.decoder.bias[7] = 1e4  # is always drawn
    model.detect = lambda tokens, mask: torch.where(tokens == 7, 1.0, -1.0)
    tokens = torch.tensor([[257, 1, 257, 4]])
    targets = torch.tensor([[2, -100, 7, -100]])
    batch = {"tokens": tokens, "targets": targets, "mask": torch.ones(1, 4, dtype=torch.bool)}
    found = hidden.guess_hidden(model, [batch])
    assert found.hits.tolist() == [False, True]
    assert found.places.tolist() == [0, 2]
    assert found.nats[1] == pytest.approx(0, abs=1e-6)
    assert F.relu(torch.tensor(found.nats))[0] > 1e3
    judged = recipe.judge_tokens(model, [batch])
    assert judged.replaced.tolist() == [True, False, False, False]  # a hit replaces nothing
    assert judged.logits.tolist() == [1, -1, 1, -1]
    assert judged.detection() == pytest.approx((0.5 + 1 + 1) / 3)  # one replaced, three kept
