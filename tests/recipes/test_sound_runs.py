"""Runs on sounds: a GPT on samples."""

import dataclasses
import json
import wave

import pytest
from conftest import SIZES, call, refusal
from debs import hum, install_sounds, wave_file

import sample
import tinyfm.evaluate.__main__ as evaluate
import train
from data import sounds

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
