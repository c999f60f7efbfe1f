"""Runs on sounds: a GPT on samples, a codec, and a MusicGen, whose codec is trained first."""

import dataclasses
import json
import re
import shutil
import wave

import numpy as np
import pytest
import torch
from conftest import (
    SIZES,
    assert_equal_weights,
    assert_it_resumes,
    call,
    refusal,
    rows_of,
)
from debs import hum, install_sounds, wave_file

import sample
import tinyfm.calc.__main__ as calculate
import tinyfm.evaluate.__main__ as evaluate
import train
from data import sounds, waves
from tinyfm.batches import sounds as batches
from tinyfm.musicgen import MusicGenConfig, SoundWriterConfig
from tinyfm.recipes import codec, musicgen, registry, run_dir

pytestmark = pytest.mark.usefixtures("no_forecast")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for runs; the source of sounds has a package of hums."""
    path = tmp_path_factory.mktemp("sounds")
    with pytest.MonkeyPatch.context() as patch:
        install_sounds(patch, path / "packages")
        yield path


# ---- a GPT on samples ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt(folder):
    """A GPT that has read a few windows of hums, a token a sample."""
    options = (*SIZES.split(), "--data.path", "sounds", "--data.tokenizer", "characters")
    cache = ("--data.cache", folder / "cache", "--out", folder / "gpt")
    assert call(train, "gpt", *options, *cache) == 0
    return folder / "gpt"


@pytest.mark.filterwarnings("ignore:past 32 tokens")
def test_a_gpt_on_samples_is_measured_beside_a_markov_model(gpt, capsys, monkeypatch):
    short = dataclasses.replace(sounds.MODALITY, samples=2, longest=1200)
    monkeypatch.setattr(sounds, "MODALITY", short)
    assert call(evaluate, gpt, "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    (markov,) = set(scores["valid"]) - {"reached", "real"}
    assert scores["valid"]["real"] == 1
    assert scores["test_bpb"]["reached"] < scores["test_bpb"]["untrained"]
    assert scores["test_bpb"][markov] < scores["test_bpb"]["untrained"]
    assert markov.startswith("Markov, order ") and int(markov[-1]) <= 3


@pytest.mark.filterwarnings("ignore:past 32 tokens")
def test_a_gpt_continues_a_wave_file(gpt, tmp_path, capsys):
    prompt = tmp_path / "prompt.wav"
    prompt.write_bytes(wave_file(hum(1500)))
    out = tmp_path / "new.wav"
    words = ["--prompt", prompt, "--max-new-tokens", 20, "--temperature", 0, "--out", out]
    assert call(sample, gpt, *words) == 0
    said = capsys.readouterr()
    assert str(out) in said.out and len(said.out) < 300  # the text is not printed
    text = (tmp_path / "new.txt").read_text(encoding="utf-8").strip()
    assert sounds.decode(text)[:1500] == pytest.approx(hum(1500), abs=0.01)
    assert len(text) == 1520
    with wave.open(str(out), "rb") as file:
        assert file.getnframes() == len(text)
    assert (tmp_path / "new.png").is_file()
    assert "no file" in refusal(capsys, sample, gpt, "--prompt", "hello")


def test_only_an_alphabet_has_characters_as_tokens(gpt, capsys):
    words = ["gpt", "--data.tokenizer", "characters", "--data.path", "docs", "--out", gpt / "x"]
    assert "texts with an alphabet (sounds)" in refusal(capsys, train, *words)


# ---- a codec, and a MusicGen ---------------------------------------------------------------------

CODEC = """--model.width 4 --model.ratios 4 5 --model.n-lstm 1 --model.latent-channels 4
--model.n-code 16 --model.n-book 2 --model.windows 64 128 --model.sound-length 800"""
MUSIC = """--model.music.n-layer 1 --model.music.n-head 2 --model.music.d-model 16
--model.music.context-length 21 --optim.muon-lr 0.01"""
COMMON = """--train.batch-size 4 --train.log-every 1 --train.eval-every 10 --train.dtype float32
--train.device cpu --optim.lr 1e-2 --optim.warmup-steps 2"""


@pytest.fixture(scope="module")
def music(folder):
    """A complete run, whose codec was trained first, by a preset of this file's sizes."""
    common = [*COMMON.split(), "--data.cache", folder / "cache"]
    words = ["codec", *CODEC.split(), *COMMON.split(), "--train.steps", "20"]
    _, _, part = train.read_arguments(words)
    usual = musicgen.PRESETS["musicgen"]
    sizes = dataclasses.replace(usual.run.model.music, n_code=16, n_book=2)
    model = dataclasses.replace(usual.run.model, codec=part.model, music=sizes)
    small = dataclasses.replace(usual, run=dataclasses.replace(usual.run, model=model))
    with pytest.MonkeyPatch.context() as patch:
        parts = dataclasses.replace(registry.find_preset("musicgen-codec"), run=part)
        patch.setattr(musicgen, "PRESETS", {"musicgen": small, "musicgen-codec": parts})
        words = ["musicgen", *MUSIC.split(), *common, "--train.steps", 20]
        assert call(train, *words, "--out", folder / "music") == 0
    return folder / "music"


def test_both_learn_and_the_codec_becomes_a_part(music):
    rows = [row for row in rows_of(f"{music}-codec") if "val_loss" in row]
    assert rows[-1]["val_loss"] < 0.9 * rows[0]["val_loss"]
    assert 1 <= rows[-1]["val_perplexity"] <= 16 and 0 <= rows[-1]["val_unused"] < 16
    rows = [row for row in rows_of(music) if "val_loss" in row]
    assert rows[-1]["val_loss"] < 0.95 * rows[0]["val_loss"]
    part = run_dir.open_run(f"{music}-codec")
    assert_equal_weights(run_dir.open_run(str(music)).model.codec, part.model)
    assert sorted(path.suffix for path in (music / "samples").iterdir()).count(".wav") == 2


def test_it_resumes_without_its_codec(music, tmp_path):
    shutil.copytree(music, tmp_path / "run")
    assert_it_resumes(str(tmp_path / "run"), tmp_path / "again", 20)


def test_codes_are_encoded_once_as_windows_of_whole_recordings(music, tmp_path, monkeypatch):
    opened = run_dir.open_run(str(music))
    config = dataclasses.replace(opened.run.data, cache=str(tmp_path))
    run = dataclasses.replace(opened.run, data=config)
    for _ in range(2):
        data = run.open_data()
        assert set(data.batch(3)) == {"sounds"}
        run.get_ready(opened.model, data)
        assert len(list(tmp_path.iterdir())) == 3
        # The second time, nothing is encoded.
        monkeypatch.setattr(batches, "encode", lambda codec, recordings: 1 / 0)
    whole = data.batch(3)["codes"]
    assert whole.shape == (4, 2, 20) and whole.dtype == torch.int64
    assert torch.equal(data.batch(3, slice(1, 3))["codes"], whole[1:3])
    first = data.recordings["val"][0]
    codes = opened.model.codec.encode(batches.to_sounds(first))[0]
    assert np.array_equal(data.windows["val"][:, : codes.size(1)], codes.numpy())
    rows = sum(len(batch["codes"]) for batch in data.val_batches(3))
    assert rows == data.windows["val"].shape[1] // 20


def test_a_codec_writes_what_it_rebuilds_beside_the_sound(music, tmp_path, capsys):
    run = f"{music}-codec"
    out = tmp_path / "rebuilt.wav"
    assert call(sample, run, "-n", 2, "--out", out) == 0
    said = capsys.readouterr().out
    assert "codebook 1 of 2" in said and str(out) in said and (tmp_path / "rebuilt.png").is_file()
    prompt = tmp_path / "prompt.wav"
    prompt.write_bytes(wave_file(hum(1510)))
    assert call(sample, run, "--prompt", prompt, "--out", out, "--overwrite") == 0
    samples = waves.read(out.read_bytes(), sounds.RATE) / waves.SCALE
    assert len(samples) == 1510 + 2000 + 1510
    assert samples[:1510] == pytest.approx(hum(1510), abs=1e-4)
    said = capsys.readouterr().out
    assert len(re.findall(r"^ *\d+(?: +\d+){75}$", said, re.MULTILINE)) == 2  # 1510 / 20 frames
    assert "exists" in refusal(capsys, sample, run, "--out", out)
    assert "-n does nothing with --prompt" in refusal(capsys, sample, run, "--prompt", out, "-n", 2)


def test_music_is_written_and_continued(music, tmp_path, capsys):
    prompt = tmp_path / "prompt.wav"
    prompt.write_bytes(wave_file(hum(1510)))
    heard = []
    for seed, more in ((0, []), (0, []), (1, []), (0, ["--prompt", prompt])):
        out = tmp_path / f"{len(heard)}.wav"
        assert call(sample, music, "-n", 2, "--seed", seed, "--out", out, *more) == 0
        heard.append(waves.read(out.read_bytes(), sounds.RATE))
        assert len(heard[-1]) == 2 * 20 * 20 + 2000
    assert np.array_equal(heard[0], heard[1]) and not np.array_equal(heard[0], heard[2])
    assert not np.array_equal(heard[0], heard[3])
    assert "3.png" in capsys.readouterr().out
    assert "no file" in refusal(capsys, sample, music, "--prompt", "hello")


def test_a_flat_model_writes_as_many_frames(music, tmp_path):
    """20 of two codes each, in 40 steps, with the codec of the other run."""
    words = ["musicgen", "--codec", f"{music}-codec", *MUSIC.replace("21", "40").split()]
    words += [*COMMON.split(), "--data.cache", music.parent / "cache", "--train.steps", 4]
    words += ["--model.music.pattern", "flat", "--out", tmp_path / "flat"]
    assert call(train, *words) == 0
    losses = [row["loss"] for row in rows_of(tmp_path / "flat") if "loss" in row]
    assert losses[-1] < losses[0] < 2.9  # ln 16 = 2.77
    out = tmp_path / "flat.wav"
    assert call(sample, tmp_path / "flat", "-n", 1, "--out", out) == 0
    assert len(waves.read(out.read_bytes(), sounds.RATE)) == 20 * 20
    assert out.with_suffix(".png").is_file()


def test_both_are_evaluated_beside_baselines(music, capsys):
    assert call(evaluate, f"{music}-codec", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    distance = scores["spectral distance, dB"]
    assert distance["reached"] < distance["untrained"]
    assert distance["mu-law, 8 bits"] < distance["mu-law, 2 bits"]
    assert scores["signal to noise, dB"]["mu-law, 8 bits"] > 30
    assert scores["bits a second"]["reached"] == 2 * 4 * 400
    assert scores["bits a second, 1 of 2 codebooks"]["reached"] == 4 * 400
    assert 0 <= scores["codes of codebook 1 without use"]["reached"] < 16
    assert call(evaluate, music, "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    (markov,) = set(scores["test_frame_nats"]) - {"untrained", "reached"}
    assert markov.startswith("Markov")
    for column, nats in scores["test_frame_nats"].items():
        assert nats == pytest.approx(2 * scores["test_loss"][column])
    assert scores["test_loss"]["reached"] < scores["test_loss"]["untrained"]


def test_wrong_sizes_of_a_codec_or_a_music_model(capsys):
    words = ["codec", "--out", "x", "--model.rate", 16000]
    assert "use --model.rate 8000" in refusal(capsys, train, *words)
    with pytest.raises(ValueError, match="music has n_book 3, the codec 4"):
        SoundWriterConfig(MusicGenConfig(n_book=3))


def test_the_calculator_knows_both(capsys):
    for name in ("codec", "musicgen"):
        assert call(calculate, name) == 0
        assert "FLOP" in capsys.readouterr().out


def test_measures_by_hand():
    """Half of a sound is 6.02 dB off, in each tone and as noise."""
    sound = torch.from_numpy(hum(4000)).float()[None, None]
    assert codec.signal_to_noise(sound, sound / 2) == pytest.approx(20 * np.log10(2), abs=1e-3)
    assert codec.spectral_distance(sound, sound) == 0
    loud = 1000 * sound  # next to which the floor is nothing
    assert codec.spectral_distance(loud, loud / 2) == pytest.approx(20 * np.log10(2), abs=0.1)
