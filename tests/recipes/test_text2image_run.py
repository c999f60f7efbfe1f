"""Text-to-image as commands: its parts trained or given, resume, sample, judge, and errors."""

import dataclasses
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import INKS, assert_equal_weights, call, refusal, write_captioned_pictures
from PIL import Image
from PIL.Image import open as open_image

import sample
import train
from data import captioned, glyphs
from data.report import Report
from tinyfm.batches.pairs import ImageData
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.evaluate import generated, judge
from tinyfm.recipes import launch, registry, run_dir, text2image
from tinyfm.training import checkpoint, distributed
from tinyfm.training.log import read_metrics

PARTS = {
    "autoencoder": """--model.image-size 8 --model.in-channels 3 --model.channels 8 16
    --model.groups 4 --model.latent-channels 2 --optim.lr 1e-2""",
    "clip": """--model.image-size 8 --model.channels 3 --model.patch-size 4 --model.image-width 16
    --model.text-width 16 --model.image-layer 1 --model.text-layer 1 --model.embed-dim 16
    --model.context-length 12 --data.tokenizer bytes --model.vocab-size 257""",
}
DENOISER = """--model.diffusion.channels 8 16 --model.diffusion.groups 4
--model.diffusion.attend False True --model.diffusion.n-head 2 --optim.ema-half-life 5
--optim.lr 1e-2 --train.eval-every 20 --data.val-images 8"""
COMMON = """--train.batch-size 16 --train.log-every 1 --train.dtype float32 --train.device cpu
--optim.warmup-steps 5 --data.val-fraction 0.4"""
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
def parts(common, tmp_path_factory):
    """{family: run directory} of a trained autoencoder and a trained CLIP."""
    folder = tmp_path_factory.mktemp("parts")
    for name, sizes in PARTS.items():
        steps = ["--train.steps", 30, "--out", folder / name]
        assert call(train, name, *sizes.split(), *common, *steps) == 0
    return {name: folder / name for name in PARTS}


@pytest.fixture(scope="module")
def arguments(common, parts):
    """Options of a small run with given parts, without --out and --train.steps."""
    given = ["--autoencoder", parts["autoencoder"], "--clip", parts["clip"]]
    return ["text2image", *DENOISER.split(), *common, *given]


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory):
    """A complete run. Tests must not change it."""
    out = tmp_path_factory.mktemp("runs") / "text2image"
    assert call(train, *arguments, "--train.steps", 40, "--out", out) == 0
    return out


def losses(run):
    """The validation losses of a run."""
    return [row["val_loss"] for row in read_metrics(run / "metrics.jsonl") if "val_loss" in row]


# ---- train --------------------------------------------------------------------------------------


def test_it_learns_and_draws_samples(run):
    first, *_, last = losses(run)
    assert last < 0.85 * first
    samples = sorted(path.name for path in (run / "samples").iterdir())
    assert samples == ["step-000020.png", "step-000040.png"]


def test_the_frozen_weights_are_those_of_the_parts(run, parts):
    model = run_dir.open_run(str(run)).model
    autoencoder = run_dir.open_run(str(parts["autoencoder"])).model
    clip = run_dir.open_run(str(parts["clip"])).model
    assert_equal_weights(model.autoencoder, autoencoder)
    assert_equal_weights(model.text_tower, clip.text_tower)


def test_a_run_does_not_need_its_parts_again(run, arguments, parts, tmp_path):
    """It resumes bit for bit, and is evaluated, although the folders of its parts are gone."""
    half = tmp_path / "half"
    shorter = [*arguments, "--train.steps", 40, "--out", half]
    save = checkpoint.save

    def save_and_stop(out, step, *rest):
        save(out, step, *rest)
        if step == 20:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_stop)
        assert call(train, *shorter) == 130
    elsewhere = ["--autoencoder", tmp_path / "gone", "--clip", tmp_path / "gone"]
    assert call(train, *shorter, *elsewhere, "--resume") == 0
    assert losses(half)[-1] == losses(run)[-1]
    table = evaluate.evaluate(run_dir.open_run(str(half)), evaluate.Options(str(half)))
    assert table["val_loss"]["reached"] == pytest.approx(losses(run)[-1], rel=1e-4)


def test_latents_are_encoded_again_only_for_other_weights(run, tmp_path):
    opened = run_dir.open_run(str(run))
    config = dataclasses.replace(opened.run.data, cache=str(tmp_path))
    data = opened.run.open_data()
    plain = data.batch(3)
    data.encode_all(opened.model, config)
    cached = data.batch(3)
    direct = opened.model.encode_images(plain["images"])
    assert torch.allclose(cached["latents"], direct, atol=2e-3)
    assert torch.equal(cached["tokens"], plain["tokens"])
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2  # the two splits that training reads

    # The same weights: nothing is encoded.
    data.encode_all(opened.model, config)
    assert sorted(tmp_path.iterdir()) == files

    # A file that was cut short.
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=f"{files[0].name} .*; delete it"):
        data.encode_all(opened.model, config)
    files[0].write_bytes(whole)

    # Other weights: two more files.
    opened.model.autoencoder.latent_scale.mul_(2)
    data.encode_all(opened.model, config)
    assert len(list(tmp_path.iterdir())) == 4
    assert torch.allclose(data.batch(3)["latents"], 2 * cached["latents"], atol=1e-2)


@pytest.fixture
def tiny_presets(monkeypatch):
    """Replace the presets of text-to-image and its parts by ones of this file's sizes."""
    replace = dataclasses.replace
    presets = {}
    for name, sizes in PARTS.items():
        short = ["--train.steps", "4", "--train.eval-every", "0", "--train.batch-size", "8"]
        _, _, run = train.read_arguments([name, *sizes.split(), *short])
        presets[f"text2image-{name}"] = replace(registry.find_preset(name), run=run)
    whole = text2image.PRESETS["text2image"]
    diffusion = replace(whole.run.model.diffusion, image_size=4, in_channels=2, d_context=16)
    model = replace(
        whole.run.model,
        autoencoder=presets["text2image-autoencoder"].run.model,
        clip=presets["text2image-clip"].run.model,
        diffusion=diffusion,
    )
    presets["text2image"] = replace(whole, run=replace(whole.run, model=model))
    monkeypatch.setattr(text2image, "PRESETS", presets)


def test_missing_parts_are_trained_first(common, tiny_presets, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["text2image", *DENOISER.split(), *common, "--train.steps", 2, "--out", out]
    assert call(train, *words) == 0
    printed = capsys.readouterr().out
    assert printed.index("--- the autoencoder, in") < printed.index("--- the clip, in")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run-autoencoder", "run-clip"}
    shutil.rmtree(out)
    assert call(train, *words) == 0  # the parts are there: they are not trained again
    assert "the run is complete" in capsys.readouterr().out


def test_the_same_command_resumes_a_part(common, tiny_presets, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    batch = ImageData.batch

    def interrupt(data, step, rows=slice(None)):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return batch(data, step, rows)

    words = ["text2image", *DENOISER.split(), *common, "--train.steps", 2, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(ImageData, "batch", interrupt)
        assert call(train, *words) == 130
    assert re.search("stopped at step 3 .*the command that started it", capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == {"run-autoencoder"}
    assert call(train, *words) == 0
    assert f"resumed from {out}-autoencoder/step-000003" in capsys.readouterr().out


def test_too_large_a_batch_is_refused_before_the_parts(common, tmp_path, capsys):
    words = ["text2image", *common, "--train.batch-size", 64, "--out", tmp_path / "run"]
    message = refusal(capsys, train, *words)
    assert re.search("36 training pictures, 64 .*--train.batch-size <= 36", message)
    assert not list(tmp_path.iterdir())


def test_a_part_must_be_a_run_of_its_family(arguments, parts, tmp_path, capsys):
    out = ["--out", tmp_path / "x"]
    message = refusal(capsys, train, *arguments, "--autoencoder", parts["clip"], *out)
    assert "family clip, not autoencoder" in message
    message = refusal(capsys, train, *arguments, "--clip", tmp_path / "none", *out)
    assert f"no run directory {tmp_path / 'none'}" in message
    assert not (tmp_path / "x").exists()


def test_pictures_of_other_channels_are_refused(arguments, tmp_path, capsys):
    message = refusal(capsys, train, *arguments, "--data.path", "letters", "--out", tmp_path / "x")
    assert re.search(r"letters are 32 x 32 .*--data.color", message)
    message = refusal(capsys, train, *arguments, "--data.color", "--out", tmp_path / "x")
    assert "and not your own pictures" in message


def test_colour_changes_the_recipe_of_the_autoencoder():
    grey = registry.get_preset("text2image").run
    painted = dataclasses.replace(grey, data=dataclasses.replace(grey.data, color=True))
    usual = registry.get_preset("text2image-autoencoder").run
    grey = grey.part_run("autoencoder", usual, {})
    painted = painted.part_run("autoencoder", usual, {})
    assert painted.model == dataclasses.replace(grey.model, in_channels=3, groups=1)
    assert painted.optim.kernels and not grey.optim.kernels
    assert painted.train == dataclasses.replace(grey.train, steps=500)


def test_a_part_has_settings_that_suit_the_data_and_the_other_part(arguments, parts, tmp_path):
    """Few pictures make small batches; a given part decides how the other one reads pictures."""
    words = [*arguments[:-2], "--clip", "", "--out", tmp_path / "x", "--data.template", "my {}"]
    _, _, run = train.read_arguments([str(word) for word in words])
    preset = registry.get_preset("text2image-clip")
    part = run.part_run("clip", preset.run, {})
    assert part.data.template == "my {}"
    assert part.train.batch_size == 16  # 60 pictures, of which 36 train
    letters = dataclasses.replace(run, data=dataclasses.replace(run.data, path="letters"))
    part = letters.part_run("clip", preset.run, {})
    assert part.train.batch_size == 256
    dry = dataclasses.replace(run, dry_run=True)
    plan = launch.resolve("text2image", preset, dry, distributed.World())
    assert plan.run.model.autoencoder == run_dir.open_run(str(parts["autoencoder"])).run.model
    assert (plan.run.model.clip.image_size, plan.run.model.clip.channels) == (8, 3)


def test_mistakes_are_found_before_a_part_is_trained(common, parts, pictures, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(pictures / "0.png", bare)
    out = ["--out", tmp_path / "x"]
    message = refusal(capsys, train, "text2image", *common, "--data.path", bare, *out)
    assert "no image with a caption" in message
    swapped = ["--clip", parts["autoencoder"]]
    message = refusal(capsys, train, "text2image", *common, *swapped, *out)
    assert "family autoencoder, not clip" in message
    assert {path.name for path in tmp_path.iterdir()} == {"bare"}


def test_colours_that_a_grey_model_cannot_see_are_counted(pictures):
    for channels, counted in ((1, True), (3, False)):
        report = Report()
        images = [record.image for record in captioned.records(pictures, 8, channels, report)]
        assert {image.shape for image in images} == {(8, 8, channels)}
        assert ("60 in colour, read as grey" in str(report)) == counted


# ---- sample -------------------------------------------------------------------------------------


def pixels(path):
    with open_image(path) as image:
        return np.array(image)


def test_a_sample_depends_on_its_prompt_alone(run, tmp_path, capsys):
    out = tmp_path / "drawn.png"
    sheets = []
    for prompt in ("red a", "red a", "blue d"):
        assert call(sample, run, "--prompt", prompt, "-n", 3, "--steps", 4, "--out", out) == 0
        sheets.append(pixels(out))
    assert "3 pictures in 4 steps" in capsys.readouterr().out
    assert np.array_equal(sheets[0], sheets[1])
    assert not np.array_equal(sheets[0], sheets[2])


def test_sample_changes_fills_and_enlarges_pictures(run, pictures, tmp_path):
    out, mask, small = (tmp_path / f"{name}.png" for name in ("out", "mask", "small"))
    white = np.zeros((8, 8), dtype=np.uint8)
    white[:, :4] = 255
    Image.fromarray(white).save(mask)
    with open_image(pictures / "0.png") as image:
        image.resize((4, 4)).save(small)
    first = ["--prompt", "red a", "-n", 2, "--steps", 5, "--out", out]
    own = ["--init-image", pictures / "0.png"]
    sheets = []
    for words in ([*own, "--strength", 0.5], [*own, "--mask", mask], ["--upscale", small]):
        assert call(sample, run, *first, *words) == 0
        sheets.append(pixels(out))
        out.unlink()
    assert not np.array_equal(sheets[0], sheets[1])
    assert not np.array_equal(sheets[0], sheets[2])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to draw"),
        (["--prompt", " "], "say what to draw"),
        (["--prompt", "a", "--out", "none/x.png"], "no folder none; make it first"),
        (["--prompt", "a", "--init-image", "0.png", "--upscale", "0.png"], "leave one out"),
        (["--prompt", "a", "--guidance", -1], "guidance is -1.0; .*0 or above"),
        (["--prompt", "a", "--steps", 2000], "2000 steps .*; use 1 to 1000"),
        (["--prompt", "a", "--strength", 0.5], "--strength needs --init-image"),
        (["--prompt", "a", "--mask", "0.png"], "--mask 0.png needs --init-image"),
        (
            ["--prompt", "a", "--init-image", "0.png", "--strength", 1.5],
            "strength is 1.5; .*at most",
        ),
        (["--prompt", "a", "--init-image", "0.png", "--mask", "wide.png"], "make them equal"),
        (["--prompt", "a", "--upscale", "wide.png"], "give 2 x 2 or 4 x 4"),
        (["--prompt", "a", "--init-image", "none.png"], "none.png cannot be used as an image"),
        (["--prompt", "a", "--top-k", 3], "--top-k is not for .*text2image"),
    ],
)
def test_mistakes_of_sampling(run, pictures, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    shutil.copy(pictures / "0.png", tmp_path)
    Image.new("RGB", (9, 5)).save(tmp_path / "wide.png")
    assert re.search(message, refusal(capsys, sample, run, *words))
    assert not (tmp_path / "sample.png").exists()


def test_a_prompt_beyond_the_context_is_cut_with_a_warning(run, tmp_path, capsys):
    first = [run, "-n", 2, "--steps", 2, "--out", tmp_path / "x.png", "--prompt"]
    assert call(sample, *first, "red a" * 9) == 0
    assert "cut to 12 tokens" in capsys.readouterr().err
    assert call(sample, *first, "red a") == 0
    assert "cut" not in capsys.readouterr().err


def test_labels_are_a_list_or_a_text_file(parts, pictures, tmp_path, capsys):
    first = [sample, parts["clip"], "--image", pictures / "0.png", "--labels"]
    labels = [f"{ink} {i}" for ink in INKS for i in range(100)]
    assert call(*first, ",".join(labels)) == 0
    assert len(capsys.readouterr().out.splitlines()) == 300
    assert call(*first, "red a,a much longer text") == 0
    assert "cut to 12 tokens" in capsys.readouterr().err
    assert "'none.txt' is the only label" in refusal(capsys, *first, "none.txt")
    assert "0.png is no list of names" in refusal(capsys, *first, pictures / "0.png")
    without_image = ["--prompt", "red a", "--labels", "red a,blue b"]
    assert "give --image FILE" in refusal(capsys, sample, parts["clip"], *without_image)


# ---- the judge of drawings ----------------------------------------------------------------------


class Copier:
    """A model that draws each prompt exactly as the font does, with an autoencoder that darkens."""

    def parameters(self):
        yield torch.zeros(1)

    def encode_images(self, images, generators=None):
        return images

    def decode(self, latents):
        return latents - 0.1

    def generate(self, prompts, **how):
        rows = []
        for prompt in prompts:
            ink = "black"
            paper = "white"
            if " on " in prompt:
                ink, _, prompt = prompt.partition(" ")
                prompt, _, paper = prompt.rpartition(" on ")
            styles = [style for style in judge.STYLES if prompt.startswith(f"{style} ")]
            style = max(styles, key=len)  # "sans bold italic" rather than "sans"
            image = generated.real_drawings([(style, prompt[len(style) + 1 :])])[0, 0].numpy()
            rows.append(glyphs.paint(image[:, :, None], ink, paper).transpose(2, 0, 1))
        images = torch.from_numpy(np.stack(rows)) / 127.5 - 1
        if (ink, paper) == ("black", "white"):
            return images[:, :1]
        return images


@pytest.fixture
def drawings(monkeypatch):
    """Data of a few characters, and a judge that is not trained."""
    monkeypatch.setattr(judge, "CHARACTERS", judge.CHARACTERS[:6])
    config = judge.JudgeConfig(width=8, features=16)
    marked = [f"latin small letter e with {mark}" for mark in ("acute", "grave", "circumflex")]
    names = [*judge.CHARACTERS, *marked]
    ceilings = {"characters": {"character": 0.5}, "held-out characters": {"character": 0.25}}
    untrained = (judge.Judge(config, names), ceilings)
    monkeypatch.setattr(judge, "load_or_train", lambda cache, config: untrained)
    styles = ("sans", "mono bold", "serif italic", "sans bold italic")
    characters_of = {
        "train": judge.CHARACTERS[:3],
        "val": judge.CHARACTERS[:1],
        "held-out pairs": judge.CHARACTERS[3:],
        "held-out characters": marked,
    }
    splits = {}
    for split, characters in characters_of.items():
        prompts = [(style, name) for name in characters for style in styles]
        splits[split] = SimpleNamespace(
            labels=[name for _, name in prompts],
            captions=[[f"{style} {name}"] for style, name in prompts],
            images=generated.real_drawings(prompts).numpy(),
        )
    return SimpleNamespace(train=splits["train"], splits=splits)


def test_perfect_drawings_score_like_real_ones(drawings):
    config = SimpleNamespace(color=False, cache="")
    scores = generated.measure(Copier(), drawings, config, {}, judge.JudgeConfig())
    ceiling = "the judge on unseen real drawings"
    assert scores[f"{ceiling}, characters: character"] == 0.5
    assert scores[f"{ceiling}, held-out characters: character"] == 0.25
    assert scores["letters and digits: Frechet distance"] == pytest.approx(0, abs=1e-3)
    sets = generated.PROMPT_SETS
    expected = {"letters and digits": 1, "held-out pairs": 0, "held-out characters": 0}
    for of in ("", ", real drawings"):
        copies = {name: scores[f"{name}{of}: copies of training pictures"] for name in sets}
        assert copies == expected
    assert scores["control, decoded training pictures: copies of training pictures"] == 1
    prompts = generated.prompts_of(drawings)
    assert [len(prompts[name]) for name in sets] == [12, 12, 3]
    for name in sets:
        for key in ("character", "bold", "italic", "family"):
            assert f"{name}: {key}" in scores
    weakest = scores["letters and digits: character, weakest style"]
    assert weakest <= scores["letters and digits: character"]


def test_held_out_characters_are_drawn(drawings, run, tmp_path, capsys, monkeypatch):
    batches = []  # of prompts
    generate = Copier.generate

    def recorded(self, prompts, **options):
        batches.append(prompts)
        return generate(self, prompts)

    monkeypatch.setattr(Copier, "generate", recorded)
    generated.draw_held_out(Copier(), drawings, False, {}, str(tmp_path / "x.png"))
    held_out = generated.prompts_of(drawings)["held-out characters"]
    assert batches == [[f"{style} {name}" for style, name in held_out]]
    assert open_image(tmp_path / "x.png").width > 3 * 32
    generated.draw_held_out(Copier(), drawings, True, {}, str(tmp_path / "y.png"))
    assert all(" on " in prompt for prompt in batches[1])
    message = refusal(capsys, evaluate, run, "--picture", tmp_path / "z.png")
    assert "text-to-image on letters" in message


def test_right_colours_are_all_recognised(drawings):
    config = SimpleNamespace(color=True, cache="")
    scores = generated.measure(Copier(), drawings, config, {}, judge.JudgeConfig())
    for name in generated.PROMPT_SETS:
        assert scores[f"{name}: both"] == 1
