"""The losses of each preset, in small, are those that were recorded.

A change that claims to be neutral must leave them as they are. If a change is meant to change them,
`PYTHONPATH=.:tests python tests/recipes/test_golden.py` records them again.

Each preset is trained with its own config except for the sizes, on text and pictures that are made
here and are the same everywhere. Each one learns: losses that stay high would show little.
The optimizer is AdamW, on which machines agree. Muon multiplies in bfloat16, where a difference in
the last bit soon becomes a thousandth of the loss: its first steps are compared, and less closely.
"""

import json
import random
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import call
from PIL import Image

import train

RECORDED = Path(__file__).parent / "golden.json"
TRAIN = """--train.steps 30 --train.eval-every 0 --train.log-every 1 --optim.warmup-steps 3
--train.device cpu --train.dtype float32 --data.val-fraction 0.2 --data.cache cache"""
ADAMW = "--optim.optimizer adamw"
MUON = "--optim.optimizer muon --train.steps 5"
TEXT = f"""{TRAIN} --data.path text.txt --data.tokenizer bytes --model.vocab-size 257
--model.n-layer 1 --model.context-length 32 --train.batch-size 8 --train.micro-batch-size 4
--train.no-compile --optim.lr 2e-3"""
GPU = f"{TEXT} --model.n-head 2 --model.d-model 32"
PICTURES = f"{TRAIN} --data.path pictures --train.batch-size 16"
CLIP = f"""{PICTURES} --data.tokenizer bytes --model.vocab-size 257
--model.image-size 8 --model.channels 3 --model.patch-size 4 --model.image-layer 1
--model.image-width 32 --model.text-layer 1 --model.text-width 32 --model.embed-dim 32
--model.context-length 12 --model.memory 32 --model.memory-after 20 --optim.lr 1e-3"""
PIXELS = f"""{PICTURES} --model.image-size 8 --model.in-channels 3 --model.channels 8 16
--model.groups 4"""
DENOISER = f"""{PICTURES} --autoencoder runs/text2image-autoencoder --clip runs/text2image-clip
--model.diffusion.channels 8 16 --model.diffusion.groups 4 --model.diffusion.n-head 2
--optim.ema-half-life 5"""
SMALL = {  # preset -> options; those with parts find them trained
    "gpt": f"{TEXT} --model.d-model 48",
    "encoder": f"{TEXT} --model.vocab-size 258 --model.d-model 48",  # a row for the mask
    "xlnet": f"{TEXT} --model.n-head 2 --model.d-model 48",
    "seq2seq": f"""{TRAIN} --data.path pairs.tsv --data.tokenizer letters --model.n-layer 1
    --model.d-model 32 --train.batch-size 8 --train.micro-batch-size 4""",
    "clip": CLIP,
    "autoencoder": f"{PIXELS} --model.beta-warmup-steps 10",
    "ddpm": f"""{PIXELS} --model.attend False True --model.n-head 2 --optim.ema-half-life 5
    --optim.lr 8e-3""",
    "vq": f"{PIXELS} --model.n-code 32 --model.dead-after 5",
    "dalle": f"""{PICTURES} --vq runs/vq --data.tokenizer bytes --model.text-vocab-size 257
    --model.n-layer 1 --model.n-head 2 --model.d-model 32 --model.text-length 8""",
    "vision-gpt": f"""{PICTURES} --data.tokenizer bytes --model.image-size 8 --model.channels 3
    --model.patch-size 4 --model.image-layer 1 --model.image-width 32 --model.gpt.vocab-size 258
    --model.gpt.n-layer 1 --model.gpt.d-model 32 --model.gpt.context-length 24 --optim.lr 4e-3""",
    "text2image-autoencoder": f"{PIXELS} --model.latent-channels 2",
    "text2image-clip": f"{CLIP} --model.memory-after 10",
    "text2image": DENOISER,
    "text2image-small-autoencoder": f"{PIXELS} --model.latent-channels 2",
    "text2image-small-clip": CLIP,
    "text2image-small": DENOISER,
    "sweep-1": f"{TEXT} --optim.lr 4e-3",  # the other sizes differ in their width alone
    "sweep-large": TEXT,
    "gpt2-124m": GPU,
    "gpt2-1.5b": f"{GPU} --model.n-layer 2",
    "llama-1b": f"{GPU} --model.d-ff 64 --model.n-kv-head 1",
}
PARTS = {
    "dalle": ("vq",),
    "text2image": ("text2image-autoencoder", "text2image-clip"),
    "text2image-small": ("text2image-autoencoder", "text2image-clip"),
}
BY_MUON = ("gpt", "clip", "ddpm", "text2image")
WORDS = "the model reads a text and says which word of it comes next after these"
INKS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def make_data(folder: Path) -> None:
    """A text of words that often follow one another, words with their letters in reverse, and 60
    captioned pictures of coloured bars."""
    words = WORDS.split()
    draw = random.Random(0).random
    place = 0
    text = []
    while len(text) < 3000:
        text.append(words[place % len(words)])
        place += 1 if draw() < 0.7 else int(draw() * len(words))
    (folder / "text.txt").write_text(" ".join(text), encoding="utf-8")
    lines = ["source\ttarget"]
    for i in range(100):
        word = f"{words[i % len(words)]}{WORDS[i % len(WORDS)].strip()}{words[i * 7 % len(words)]}"
        lines.append(f"{word}\t{word[::-1]}")
    (folder / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    (folder / "pictures").mkdir()
    for i in range(60):
        name = list(INKS)[i % 3]
        picture = np.full((8, 8, 3), 255 - 2 * i, dtype=np.uint8)
        picture[:, 2 * (i % 4)] = INKS[name]
        Image.fromarray(picture).save(folder / "pictures" / f"{i}.png")
        caption = f"{name} {'abcd'[i % 4]}"
        (folder / "pictures" / f"{i}.txt").write_text(caption, encoding="utf-8")


def losses(preset: str, optimizer: str = ADAMW) -> list[float]:
    """Train the small preset in the working directory; return its losses."""
    out = Path("runs", preset if optimizer == ADAMW else f"{preset}-muon")
    words = [*SMALL[preset].split(), *optimizer.split(), "--out", out]
    assert call(train, preset, *words) == 0
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    return [value for row in rows for name, value in row.items() if name.startswith("loss")]


@cache
def recorded() -> dict[str, dict[str, list[float]]]:
    return json.loads(RECORDED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden")
    make_data(path)
    return path


@pytest.fixture
def there(folder, no_forecast, monkeypatch):
    monkeypatch.chdir(folder)


def find_parts(preset: str) -> None:
    """Train the parts of a preset, if its test runs alone."""
    for part in PARTS.get(preset, ()):
        if not Path("runs", part).exists():
            losses(part)


@pytest.mark.parametrize("preset", SMALL)
def test_losses_are_those_recorded(preset, there):
    find_parts(preset)
    assert losses(preset) == pytest.approx(recorded()["adamw"][preset], rel=1e-5)


@pytest.mark.parametrize("preset", BY_MUON)
def test_the_first_steps_of_muon_are_those_recorded(preset, there):
    find_parts(preset)
    assert losses(preset, MUON) == pytest.approx(recorded()["muon"][preset], rel=2e-3)


def test_the_recorded_runs_learn():
    for preset, values in recorded()["adamw"].items():
        assert np.mean(values[-5:]) < 0.8 * values[0], preset


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.chdir(name)
        make_data(Path())
        found = {"adamw": {preset: losses(preset) for preset in SMALL},
                 "muon": {preset: losses(preset, MUON) for preset in BY_MUON}}  # fmt: skip
    RECORDED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{RECORDED}: {len(found['adamw'])} presets\n")
