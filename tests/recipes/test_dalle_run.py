"""VQ-VAE and DALL-E as commands: the part trained first, resume, sample, judge, and errors."""

import dataclasses
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    assert_equal_weights,
    assert_it_resumes,
    call,
    refusal,
    rows_of,
    write_captioned_pictures,
)
from PIL import Image

import sample
import train
from data import glyphs
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.evaluate import generated, judge
from tinyfm.recipes import dalle, registry, run_dir

VQ = """--model.image-size 8 --model.in-channels 3 --model.channels 8 16 --model.groups 4
--model.n-code 32 --model.latent-channels 4 --optim.lr 1e-2"""
GPT = """--model.n-layer 1 --model.n-head 2 --model.d-model 32 --model.text-vocab-size 257
--model.text-length 8 --data.tokenizer bytes --data.val-images 8 --optim.lr 1e-2"""
COMMON = """--train.batch-size 16 --train.log-every 1 --train.dtype float32 --train.device cpu
--train.no-compile --optim.warmup-steps 5 --data.val-fraction 0.4"""
pytestmark = pytest.mark.usefixtures("no_forecast")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_captioned_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def common(pictures, tmp_path_factory):
    """The options that all runs of this file share: data and training."""
    data = ["--data.path", pictures, "--data.cache", tmp_path_factory.mktemp("cache")]
    return [*COMMON.split(), *data]


@pytest.fixture(scope="module")
def run(common, tmp_path_factory):
    """A complete run, whose VQ-VAE was trained first, by a preset of this file's sizes."""
    folder = tmp_path_factory.mktemp("runs")
    short = ["--train.steps", "30", "--train.eval-every", "0"]
    _, _, part = train.read_arguments(["vq", *VQ.split(), *short])
    usual = dalle.PRESETS["dalle"]
    model = dataclasses.replace(usual.run.model, vq=part.model)
    small = dataclasses.replace(usual, run=dataclasses.replace(usual.run, model=model))
    with pytest.MonkeyPatch.context() as patch:
        parts = dataclasses.replace(registry.find_preset("dalle-vq"), run=part)
        patch.setattr(dalle, "PRESETS", {"dalle": small, "dalle-vq": parts})
        words = ["dalle", *GPT.split(), *common, "--train.steps", 40, "--train.eval-every", 20]
        assert call(train, *words, "--out", folder / "dalle") == 0
    return folder / "dalle"


# ---- train --------------------------------------------------------------------------------------


def test_it_learns_with_the_weights_of_its_part(run):
    rows = [row for row in rows_of(run) if "val_loss" in row]
    assert rows[-1]["val_image_nats"] < 0.6 * rows[0]["val_image_nats"]
    for row in rows:
        loss = row["val_text_nats"] / 8 + row["val_image_nats"] * 7 / 8
        assert row["val_loss"] == pytest.approx(loss, rel=1e-4)
    part = run_dir.open_run(f"{run}-vq")
    assert_equal_weights(run_dir.open_run(str(run)).model.vq, part.model)
    scores = [row for row in rows_of(f"{run}-vq") if "val_loss" in row][-1]
    assert 1 < scores["val_perplexity"] <= 32 and 0 <= scores["val_unused"] < 32


def test_it_resumes_without_its_part(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")  # away from the part
    assert_it_resumes(str(tmp_path / "run"), tmp_path / "again", 40)


def test_codes_are_encoded_once(run, tmp_path):
    opened = run_dir.open_run(str(run))
    config = dataclasses.replace(opened.run.data, cache=str(tmp_path))
    data = opened.run.open_data()
    plain = data.batch(3)
    for _ in range(2):
        data.encode_all(opened.model, config)
        assert len(list(tmp_path.iterdir())) == 2  # the two splits that training reads
    batch = data.batch(3)
    assert batch.keys() == {"codes", "tokens"}
    assert batch["codes"].dtype == torch.int64
    assert torch.equal(batch["codes"], opened.model.encode_images(plain["images"]))


def test_a_vq_run_can_be_given(run, common, tmp_path, capsys):
    words = ["dalle", *GPT.split(), *common, "--train.steps", 2, "--vq", f"{run}-vq", "--out"]
    assert call(train, *words, tmp_path / "run") == 0
    assert run_dir.open_run(str(tmp_path / "run")).run.model.vq.n_code == 32
    message = refusal(capsys, train, *words, tmp_path / "x", "--vq", run)
    assert "family dalle, not vq" in message
    message = refusal(capsys, train, *words, tmp_path / "x", "--data.path", "letters")
    assert re.search("letters are 32 x 32 .*--data.color", message)


def test_the_sizes_of_the_part_are_options():
    usual = registry.find_preset("dalle-vq").run
    words = ["dalle", "--model.vq.n-code", "99", "--train.seed", "3", "--data.color"]
    _, _, run = train.read_arguments(words)
    part = run.part_run("vq", usual, {})
    assert (part.model.n_code, part.model.in_channels, part.train.seed) == (99, 3, 3)
    assert part.data.color and part.out == "runs/dalle-vq"


# ---- sample and evaluate ------------------------------------------------------------------------


def test_a_sample_depends_on_its_prompt_and_seed(run, tmp_path, capsys):
    out = tmp_path / "drawn.png"
    sheets = []
    for prompt, seed in (("red a", 0), ("red a", 0), ("blue d", 0), ("red a", 1)):
        words = ["--prompt", prompt, "--seed", seed, "-n", 3, "--top-k", 9, "--out", out]
        assert call(sample, run, *words) == 0
        with Image.open(out) as picture:
            sheets.append(np.array(picture))
    assert "3 pictures\n" in capsys.readouterr().out
    assert np.array_equal(sheets[0], sheets[1])
    assert not np.array_equal(sheets[0], sheets[2])
    assert not np.array_equal(sheets[0], sheets[3])


def test_prompts_that_are_too_long_or_of_unknown_words(run, tmp_path, capsys):
    first = [run, "-n", 1, "--out", tmp_path / "x.png", "--prompt"]
    assert call(sample, *first, "red a tower") == 0
    err = capsys.readouterr().err
    assert "cut to 8 tokens" in err and "no training caption has" in err and "'tower'" in err
    assert call(sample, *first, "red a") == 0
    err = capsys.readouterr().err
    assert "cut" not in err and "no training" not in err
    assert "say what to draw" in refusal(capsys, sample, run)
    assert "--steps is not for" in refusal(capsys, sample, *first, "red a", "--steps", 3)
    assert "guidance is -1.0" in refusal(capsys, sample, *first, "red a", "--guidance", -1)


def test_a_vq_run_shows_pictures_and_their_codes(run, pictures, tmp_path, capsys):
    first = [sample, f"{run}-vq", "--out", tmp_path / "x.png"]
    assert call(*first, "-n", 4) == 0
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.width > sheet.height  # four above four
    assert call(*first, "--image", pictures / "0.png") == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^ *\d+(?: +\d+){3}$", printed, re.MULTILINE)
    assert len(rows) == 2 * 4  # of 4 x 4 codes, twice
    assert "none.png cannot be used" in refusal(capsys, *first, "--image", "none.png")


def test_both_are_evaluated(run, capsys):
    for name in (run, f"{run}-vq"):
        assert call(evaluate, name) == 0
        assert re.search(r"val_loss .*untrained .*reached", capsys.readouterr().out)


def test_the_judge_reads_rebuilt_letters(monkeypatch):
    """Of a VQ-VAE that returns each picture as it is, the same as of the real ones."""
    names = (*judge.CHARACTERS, "latin small letter e with acute")
    network = judge.Judge(judge.JudgeConfig(width=8, features=16), names)
    monkeypatch.setattr(judge, "load_or_train", lambda cache, config: (network, {}))
    prompts = [("sans", name) for name in names[:5]] + [("serif italic", "digit one")]
    split = SimpleNamespace(
        labels=[*(name for _, name in prompts), "greek small letter alpha"],
        captions=[[f"{style} {name}"] for style, name in prompts] + [["sans x"]],
        images=generated.real_drawings([*prompts, ("sans", "digit two")]).numpy(),
    )
    model = SimpleNamespace(
        config=SimpleNamespace(n_book=1, n_code=4),
        parameters=lambda: iter([torch.zeros(1)]),
        encode=lambda images: torch.zeros(len(images), 1, 1, 1, dtype=torch.long),
        decode=lambda codes: generated.as_pixels(split.images[order[: len(codes)]], 1),
    )
    order = [i for i in generated.fixed_order(7).tolist() if i < 6]
    data = SimpleNamespace(splits={"train": None, "val": None, glyphs.HELD_OUT_PAIRS: split})
    config = SimpleNamespace(path="letters", color=False, cache="")
    scores = generated.measure_rebuilt(model, data, config, judge.JudgeConfig())
    for key in ("character", "style"):
        rebuilt = scores[f"held-out pairs, rebuilt: {key}"]
        assert rebuilt == scores[f"held-out pairs, real: {key}"] and rebuilt.n == 6
    assert scores["held-out pairs: perplexity of codebook 0"] == pytest.approx(1)
    config.color = True
    assert generated.measure_rebuilt(model, data, config, judge.JudgeConfig()) == {}
