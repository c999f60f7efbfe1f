"""The autoencoder and diffusion as commands: train, resume, sample, evaluate, and their errors."""

import json
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image
from PIL.Image import open as open_image

import sample
import train
from data import captioned
from data.report import Report
from tinyfm.autoencoder import Autoencoder
from tinyfm.batches.pairs import ImageConfig, ImageData
from tinyfm.common import files, sheets
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.recipes import registry, run_dir
from tinyfm.training.log import read_metrics

STEPS = 50
SIZES = {
    "autoencoder": """autoencoder --model.image-size 8 --model.in-channels 3 --model.channels 8 16
    --model.groups 4 --model.latent-channels 2 --model.beta-warmup-steps 10 --optim.lr 1e-2""",
    "vq": """vq --model.image-size 8 --model.in-channels 3 --model.channels 8 16 --model.groups 4
    --model.latent-channels 4 --model.n-code 32 --model.dead-after 5 --optim.lr 1e-2""",
    "ddpm": """ddpm --model.image-size 8 --model.patch-size 1 --model.in-channels 3
    --model.channels 8 16 --model.groups 4 --model.attend False True --model.n-head 2
    --optim.lr 1e-2 --optim.ema-half-life 5""",
}
COMMON = """--train.batch-size 16 --train.eval-every 25 --train.log-every 1 --train.dtype float32
--optim.warmup-steps 5 --train.device cpu --data.val-fraction 0.4"""
FAMILIES = [*SIZES]
pytestmark = pytest.mark.usefixtures("no_forecast")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """80 pictures without captions: a dark bar at one of eight places, on paper of any colour."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(80):
        picture = np.broadcast_to(random.integers(150, 256, 3), (8, 8, 3)).astype(np.uint8)
        picture[:, i % 8] = random.integers(0, 40)
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def arguments(pictures, tmp_path_factory):
    """{family: command-line options of a small run}, without --out and --train.steps."""
    data = ["--data.path", str(pictures), "--data.cache", str(tmp_path_factory.mktemp("cache"))]
    return {name: [*sizes.split(), *COMMON.split(), *data] for name, sizes in SIZES.items()}


@pytest.fixture(scope="module")
def runs(arguments, tmp_path_factory):
    """{family: directory of such a run}, complete. Tests must not change it."""
    folder = tmp_path_factory.mktemp("runs")
    for name in FAMILIES:
        assert call(train, *arguments[name], "--train.steps", STEPS, "--out", folder / name) == 0
    return {name: folder / name for name in FAMILIES}


def evaluations(run):
    """The rows of metrics.jsonl with validation scores, without the time."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "val_loss" in row]
    for row in rows:
        del row["time"]
    return rows


# ---- train --------------------------------------------------------------------------------------


def test_an_autoencoder_learns_in_fifty_steps(runs):
    config = run_dir.open_run(str(runs["autoencoder"])).run.model
    first, *_, last = evaluations(runs["autoencoder"])
    assert last["val_reconstruction"] < 0.4 * first["val_reconstruction"]
    for row in (first, last):
        whole = row["val_reconstruction"] + config.beta * row["val_kl"]
        assert row["val_loss"] == pytest.approx(whole, rel=1e-5)
        assert 0 < row["val_active"] <= 2 * 4 * 4
    with open_image(runs["autoencoder"] / "samples" / f"step-{STEPS:06d}.png") as grid:
        assert grid.size == (8 * 65 + 1, 4 * 65 + 1)  # 16 validation pictures, each above its copy


def test_a_vq_vae_learns_and_uses_its_codes(runs):
    first, *_, last = evaluations(runs["vq"])
    assert last["val_reconstruction"] < 0.5 * first["val_reconstruction"]
    assert last["val_unused"] < 20 and 3 < last["val_perplexity"] <= 32
    terms = ("val_reconstruction", "val_codebook", "val_commitment")
    whole = sum(factor * last[name] for factor, name in zip((1, 1, 0.25), terms))
    assert last["val_loss"] == pytest.approx(whole, rel=1e-5)


def test_diffusion_learns_in_fifty_steps(runs):
    first, *_, last = evaluations(runs["ddpm"])
    assert last["val_loss"] < 0.6 * first["val_loss"]
    for row in (first, last):
        assert row["val_loss"] == pytest.approx(np.mean([row[f"val_loss_t{k}"] for k in range(4)]))
    with open_image(runs["ddpm"] / "samples" / f"step-{STEPS:06d}.png") as grid:
        assert grid.size == (8 * 65 + 1, 4 * 65 + 1)


def test_the_verdict_shows_the_reconstruction_or_the_loss():
    scores = {"val_loss": 3.0, "val_loss_t0": 9.0}
    preset = registry.find_preset("ddpm")
    line = run_dir.verdict(preset, preset.run, {"val_loss": 4.0}, scores)
    assert line.startswith("val_loss: 4.000 untrained, 3.000 reached")
    line = run_dir.verdict(preset, preset.run, {}, scores | {"val_reconstruction": 2.0})
    assert line.startswith("val_reconstruction: unknown untrained, 2.000 reached")


def test_the_latents_are_measured_on_the_training_pictures(runs):
    opened = run_dir.open_run(str(runs["autoencoder"]))
    model = opened.model
    split = opened.run.open_data().train
    saved = [float(model.latent_mean), float(model.latent_scale)]
    images = split.batch(np.arange(len(split.labels)))["images"]
    with torch.no_grad():
        mean, logvar = model.encode(images)
    z = torch.cat([mean + torch.randn(mean.shape) * torch.exp(logvar / 2) for _ in range(50)])
    standard = model.standardise(z)
    assert standard.mean().abs() < 0.01
    assert abs(standard.std() - 1) < 0.01
    model.measure_latents([images])
    assert saved == pytest.approx([float(model.latent_mean), float(model.latent_scale)], rel=1e-4)
    assert saved[1] == pytest.approx(evaluations(runs["autoencoder"])[-1]["latent_scale"])
    earlier = run_dir.open_run(str(runs["autoencoder"] / "step-000025")).model
    assert saved[1] != float(earlier.latent_scale)  # measured for each checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_resumes_bit_for_bit(family, runs, arguments, tmp_path):
    """From step 25 of 50, with the measures of the latents and the averaged weights."""
    out = shutil.copytree(runs[family], tmp_path / "run")
    shutil.rmtree(out / "step-000050")
    (out / "latest").write_text("step-000025\n", encoding="utf-8")
    resume = ["--train.steps", STEPS, "--out", out, "--resume"]
    assert call(train, *arguments[family], *resume) == 0
    names = {path.name for path in (runs[family] / "step-000050").glob("*.safetensors")}
    assert ("ema.safetensors" in names) == (family == "ddpm")
    for name in names:
        stem = name.removesuffix(".safetensors")
        whole = files.load_tensors(runs[family] / "step-000050", stem)
        for key, value in files.load_tensors(out / "step-000050", stem).items():
            assert torch.equal(value, whole[key]), key
    assert evaluations(out)[-1] == evaluations(runs[family])[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_change_nothing(family, runs, arguments, tmp_path):
    out = tmp_path / "run"
    small = ["--train.micro-batch-size", 5, "--train.eval-every", 0]
    assert call(train, *arguments[family], "--train.steps", 2, *small, "--out", out) == 0
    for name in ("loss", "val_loss"):
        first = []  # of each run
        for run in (runs[family], out):
            rows = read_metrics(run / "metrics.jsonl")
            first.append(next(row[name] for row in rows if name in row))
        assert first[0] == pytest.approx(first[1], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_record_gives_back_the_run(family, runs):
    """Lists in JSON become tuples."""
    record = files.read_json(runs[family] / "config.json")
    run = run_dir.open_run(str(runs[family])).run
    assert type(record["model"]["channels"]) is list and run.model.channels == (8, 16)
    record.pop("data_fingerprint")
    assert run_dir.to_record(family, run) == record


@pytest.mark.parametrize(
    "family, change, settings, text",
    [
        ("autoencoder", "--model.no-variational", "", "no prior"),
        ("ddpm", "--model.prediction flow", "--sampler heun --steps 3", "heun in 3 steps"),
    ],
)
def test_other_models_train_and_are_sampled(
    family, change, settings, text, arguments, tmp_path, capsys
):
    """A plain autoencoder has no prior to draw from; a flow has other samplers."""
    short = ["--train.steps", 2, "--train.eval-every", 0, "--out", tmp_path / "run"]
    assert call(train, *arguments[family], *change.split(), *short) == 0
    capsys.readouterr()
    picture = tmp_path / "x.png"
    assert call(sample, tmp_path / "run", "-n", 2, "--out", picture, *settings.split()) == 0
    assert text in capsys.readouterr().out
    with open_image(picture) as image:
        assert np.ptp(np.array(image)) > 0


def test_bfloat16_trains(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("tinyfm.common.device.bfloat16_is_fast", lambda device: True)
    for family in FAMILIES:
        short = ["--train.steps", 8, "--train.eval-every", 0, "--train.dtype", "bfloat16"]
        assert call(train, *arguments[family], *short, "--out", tmp_path / family) == 0
        first, last = evaluations(tmp_path / family)
        assert last["val_loss"] < 0.95 * first["val_loss"]


# ---- the data -----------------------------------------------------------------------------------


def test_batches_have_pictures_and_their_step(pictures, tmp_path):
    config = ImageConfig(str(pictures), val_fraction=0.2, val_images=7, cache=str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning that all captions are equal
        data = ImageData.load(config, 8, 3, 6, 0)
    assert sum(len(split.labels) for split in data.splits.values()) == 80  # none has a caption
    whole = data.batch(3)
    assert whole.keys() == {"images", "step"}
    assert whole["step"] == 3
    assert torch.equal(data.batch(3, slice(2, 5))["images"], whole["images"][2:5])
    val = list(data.val_batches(3))
    assert [len(batch["images"]) for batch in val] == [3, 3, 1]
    assert all(batch.keys() == {"images"} for batch in val)  # without a step, so without warm-up
    again = torch.cat([batch["images"] for batch in data.val_batches(7)])
    assert torch.equal(again, torch.cat([batch["images"] for batch in val]))
    grey = ImageData.load(config, 4, 1, 6, 0)
    assert grey.batch(0)["images"].shape == (6, 1, 4, 4)


def test_captions_are_not_needed_and_not_read(pictures, tmp_path):
    for i in range(4):
        shutil.copy(pictures / f"{i}.png", tmp_path)
    (tmp_path / "0.txt").write_text("a bar", encoding="utf-8")
    (tmp_path / "list.csv").write_text("path,caption\n0.png,a bar\n1.png,\n", encoding="utf-8")
    (tmp_path / "list.jsonl").write_text('{"image": "2.png"}\n{"path": 3}\n', encoding="utf-8")
    for path, count in (("", 4), ("list.csv", 2), ("list.jsonl", 1)):
        found = captioned.pairs(tmp_path / path, Report(), template="")
        assert [pair.captions for pair in found] == [("",)] * count
    assert len(captioned.pairs(tmp_path, Report())) == 1  # with a template, they are needed
    assert len(captioned.pairs(tmp_path / "list.csv", Report())) == 1


# ---- sample and evaluate ------------------------------------------------------------------------


def test_sampling_an_autoencoder(runs, tmp_path, capsys):
    out = tmp_path / "x.png"
    assert call(sample, runs["autoencoder"], "-n", 3, "--seed", 1, "--out", out) == 0
    printed = capsys.readouterr()
    assert re.search("originals; reconstructions; .*prior; ", printed.out)
    assert "model weights" in printed.err
    with open_image(out) as grid:
        assert grid.size[0] == 3 * (8 * 12 + 6) + 6
    opened = run_dir.open_run(str(runs["autoencoder"]))
    model = opened.model
    images = opened.run.open_data().test.batch(np.arange(3))["images"]
    rows = sheets.latent_space(model, images, seed=1).images.unflatten(0, (4, 3))
    fewer = sheets.latent_space(model, images[:2], seed=1).images.unflatten(0, (4, 2))
    with torch.no_grad():
        assert torch.allclose(rows[1], model.decode(model.encode(images)[0]), atol=1e-5)
    assert torch.equal(rows[0], images)
    ends = [0, -1]  # of the walk between two latents
    assert torch.allclose(rows[3, ends], rows[1, ends], atol=1e-5)
    assert torch.allclose(rows[2, :2], fewer[2], atol=1e-5)  # a draw does not depend on n
    assert not torch.allclose(rows[2], sheets.latent_space(model, images, seed=2).images[6:9])


def test_reconstructions_stand_below_their_originals(runs):
    model = run_dir.open_run(str(runs["autoencoder"])).model
    images = torch.rand(19, 3, 8, 8)
    sheet = sheets.reconstructions(model, images)
    rows = sheet.images.unflatten(0, (6, 8))  # two rows of 8, and one of 3
    white = torch.ones(5, 3, 8, 8)
    assert torch.equal(rows[::2].flatten(0, 1), torch.cat((images, white)))
    with torch.no_grad():
        rebuilt = model.decode(model.encode(images)[0])
    assert torch.allclose(rows[1::2].flatten(0, 1), torch.cat((rebuilt, white)), atol=1e-5)
    assert len(sheets.reconstructions(model, images[:3]).images) == 6


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_sampling_diffusion(sampler, runs, tmp_path, capsys):
    out = tmp_path / "x.png"
    run = str(runs["ddpm"])
    settings = ["--sampler", sampler, "--steps", 4, "--seed", 3, "--out", out]
    assert call(sample, run, "-n", 3, *settings) == 0
    printed = capsys.readouterr()
    assert printed.out == f"3 samples by {sampler} in 4 steps\n{out}\n"
    assert "ema weights" in printed.err
    model = run_dir.open_run(run).model
    sheet = sheets.samples(model, 3, sampler, 4, seed=3)
    with open_image(out) as grid:
        pixels = np.array(grid)[1:65:8, 1:65:8].transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(pixels - sheet.images[0].clamp(-1, 1).numpy()).max() < 0.01
    fewer = sheets.samples(model, 2, sampler, 4, seed=3)
    assert torch.allclose(sheet.images[:2], fewer.images, atol=1e-4)
    assert not torch.allclose(sheet.images, sheets.samples(model, 3, sampler, 4, seed=4).images)


def test_many_samples_are_drawn_in_parts(runs, monkeypatch):
    model = run_dir.open_run(str(runs["ddpm"])).model
    whole = sheets.samples(model, 5, "ddpm", 3, seed=0).images
    monkeypatch.setattr(sheets, "AT_ONCE", 2)
    assert torch.allclose(sheets.samples(model, 5, "ddpm", 3, seed=0).images, whole, atol=1e-4)


def test_a_film_goes_from_noise_to_the_samples(runs, tmp_path, capsys):
    out = tmp_path / "film.png"
    assert call(sample, runs["ddpm"], "--film", "-n", 2, "--steps", 3, "--out", out) == 0
    text = capsys.readouterr().out
    assert "after 0, 1, 2, 3 of 3 steps" in text and str(out) in text
    model = run_dir.open_run(str(runs["ddpm"])).model
    sheet = sheets.film(model, 2, "ddim", 30, 0)
    last = sheets.samples(model, 2, "ddim", 30, 0).images
    frames = sheet.images.unflatten(0, (2, sheets.MOMENTS))
    assert torch.equal(frames[:, -1], last)
    assert torch.equal(frames[:, 0], sheets.noise((3, 8, 8), 2, seed=0))
    assert sheet.titles[:2] == ("after 0 of 30", "after 3 of 30")
    assert len(sheets.film(model, 20, "ddim", 1, 0).images) == sheets.FILMED * 2


def test_raw_weights_draw_other_pictures(runs, tmp_path, capsys):
    pictures = []
    for words, kind in (([], "ema"), (["--raw"], "model")):
        out = tmp_path / f"{kind}.png"
        assert call(sample, runs["ddpm"], *words, "-n", 1, "--steps", 2, "--out", out) == 0
        assert f"{kind} weights" in capsys.readouterr().err
        pictures.append(out.read_bytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation(family, runs, capsys):
    assert call(evaluate, runs[family], "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    first, *_, last = evaluations(runs[family])
    assert scores["val_loss"]["reached"] == pytest.approx(last["val_loss"], rel=1e-4)
    assert scores["val_loss"]["untrained"] == pytest.approx(first["val_loss"], rel=1e-4)


# ---- mistakes -----------------------------------------------------------------------------------

# The family, the options, and a pattern of the value and the advice in the message.
OF_TRAINING = {
    "size": ("autoencoder", "--model.image-size 9", "9 x 9 .*halved 1 times; .*8 x 8"),
    "size of a U-Net": ("ddpm", "--model.image-size 7", "7 x 7 .*halved 1 times; .*8 x 8"),
    "glyphs in colour": (
        "ddpm",
        "--data.path glyphs --model.image-size 32",
        "glyphs .*--data.color.*32 x 32 in 3: .*image-size to 32 .*channels to 1",
    ),
    "small glyphs": (
        "autoencoder",
        "--data.path glyphs --model.in-channels 1",
        "8 x 8 in 1: .*image-size to 32",
    ),
    "no pictures": ("ddpm", "--data.path EMPTY", r"no image in EMPTY \(0 found"),
    "no path": ("ddpm", "--data.path=", "--data.path must not be empty"),
    "nowhere": ("ddpm", "--data.path nowhere", "nowhere is not a folder with images"),
    "two channels": ("ddpm", "--model.in-channels 2", "channels.* 2.*1 .*grey.*3 .*colour"),
    "fraction": ("ddpm", "--data.val-fraction 1", "--data.val-fraction 1.0: .*between"),
    "none to validate": ("ddpm", "--data.val-images 0", "--data.val-images 0: .*at least 1"),
    "context": ("ddpm", "--model.d-context 8", "set --model.d-context 0"),
    "batch": ("ddpm", "--train.batch-size 99", "48 training pictures, .*99"),
}


@pytest.mark.parametrize("name", [*OF_TRAINING])
def test_mistakes_of_training(name, arguments, tmp_path, capsys):
    family, change, message = OF_TRAINING[name]
    empty = tmp_path / "empty"
    empty.mkdir()
    change = change.replace("EMPTY", str(empty))
    message = message.replace("EMPTY", re.escape(str(empty)))
    assert call(train, *arguments[family], *change.split(), "--out", tmp_path / "run") != 0
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert re.search(message, printed)
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


OF_SAMPLING = {
    "none": ("ddpm", "-n 0", "-n is 0; use 1 to"),
    "a negative number": ("autoencoder", "-n -1", "-n is -1; use 1 to"),
    "sampler": ("ddpm", "--sampler plms", r"'plms'; use one of ddpm, ddim, dpm\+\+"),
    "flow": ("ddpm", "--sampler heun", "heun .*flow; .*predicts v"),
    "steps": ("ddpm", "--steps 1001", "1001 steps .*; use 1 to 1000"),
    "film steps": ("ddpm", "--film --steps 0", "0 steps .*; use 1 to 1000"),
    "prompt": ("ddpm", "--prompt a", "--prompt is not for .*ddpm: .*--film, "),
    "text": ("autoencoder", "--top-p 0.5", "--top-p is not for .*autoencoder"),
    "steps of none": ("autoencoder", "--steps 5", "--steps is not for .*autoencoder"),
    "folder": ("ddpm", "--out /proc/x.png --steps 1", "No such file or directory: '/proc/x.png'"),
}


@pytest.mark.parametrize("name", [*OF_SAMPLING])
def test_mistakes_of_sampling(name, runs, capsys):
    family, change, message = OF_SAMPLING[name]
    assert call(sample, runs[family], *change.split()) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_gpt_takes_no_sampler(tiny_run, capsys):
    assert call(sample, tiny_run, "--sampler", "ddim") == 1
    assert re.search("--sampler is not for .*gpt: .*--", capsys.readouterr().err)


def test_a_weights_file_has_the_measures_of_the_latents(runs):
    """A model that is built from the config needs no other file."""
    folder = runs["autoencoder"] / "step-000050"
    model = Autoencoder(run_dir.open_run(str(folder)).run.model)
    assert float(model.latent_scale) == 1
    files.load_model(model, files.load_tensors(folder))
    assert float(model.latent_scale) != 1
