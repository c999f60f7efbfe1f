"""Text-to-image in use: its parts trained first, or given; sampled, resumed, judged."""

import dataclasses
import json
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call
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
INKS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """60 pictures with captions: a bar at one of four places, in one of three colours."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(60):
        picture = np.full((8, 8, 3), 255, dtype=np.uint8)
        name = list(INKS)[i % 3]
        picture[:, 2 * (i % 4)] = INKS[name]
        Image.fromarray(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{name} {'abcd'[i % 4]}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def common(pictures, tmp_path_factory):
    data = ["--data.path", pictures, "--data.cache", tmp_path_factory.mktemp("cache")]
    return [*COMMON.split(), *data]


@pytest.fixture(scope="module")
def parts(common, tmp_path_factory):
    """{option: run directory} of a trained autoencoder and a trained CLIP."""
    folder = tmp_path_factory.mktemp("parts")
    for name, sizes in PARTS.items():
        steps = ["--train.steps", 30, "--out", folder / name]
        assert call(train, name, *sizes.split(), *common, *steps) == 0
    return {name: folder / name for name in PARTS}


@pytest.fixture(scope="module")
def arguments(common, parts):
    given = [word for name, folder in parts.items() for word in (f"--{name}", folder)]
    return ["text2image", *DENOISER.split(), *common, *given]


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory):
    """A complete run, not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "text2image"
    assert call(train, *arguments, "--train.steps", 40, "--out", out) == 0
    return out


def refusal(capsys, *words):
    """What is said where nothing can be done."""
    assert call(*words) == 1
    return capsys.readouterr().err


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]


def losses(run):
    return [row["val_loss"] for row in metrics(run) if "val_loss" in row]


def test_it_learns_and_draws_as_it_does(run):
    first, *_, last = losses(run)
    assert last < 0.8 * first
    assert {path.name for path in (run / "samples").iterdir()} == {
        "step-000020.png", "step-000040.png",
    }  # fmt: skip


def test_what_is_frozen_is_that_of_its_parts(run, parts):
    model = run_dir.open_run(str(run)).model
    for name in PARTS:
        own = run_dir.open_run(str(parts[name])).model
        own, taken = (
            (own.text_tower, model.text_tower) if name == "clip" else (own, model.autoencoder)
        )
        for key, tensor in own.state_dict().items():
            assert torch.equal(tensor, taken.state_dict()[key]), key


def test_a_run_does_not_need_its_parts_again(run, arguments, parts, tmp_path):
    """The parts were moved: it goes on, samples and is evaluated by what it keeps; bit for bit."""
    half = tmp_path / "half"
    shorter = [*arguments, "--train.steps", 40, "--out", half]
    stop = checkpoint.save

    def save_and_stop(out, step, *rest):
        stop(out, step, *rest)
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


def test_latents_are_encoded_once_and_again_for_other_weights(run, tmp_path):
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
    data.encode_all(opened.model, config)
    assert sorted(tmp_path.iterdir()) == files
    assert len(files) == 2  # the two splits that training reads
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=f"{files[0].name} cannot be read: .*; delete it"):
        data.encode_all(opened.model, config)
    files[0].write_bytes(whole)
    opened.model.autoencoder.latent_scale.mul_(2)
    data.encode_all(opened.model, config)
    assert len(list(tmp_path.iterdir())) == 4
    assert torch.allclose(data.batch(3)["latents"], 2 * cached["latents"], atol=1e-2)


@pytest.fixture
def tiny_presets(monkeypatch):
    """Those of text-to-image and its parts, of this file's sizes."""
    tiny = {}
    for name, sizes in PARTS.items():
        own = ["--train.steps", "4", "--train.eval-every", "0", "--train.batch-size", "8"]
        words = [name, *sizes.split(), *own]
        tiny[f"text2image-{name}"] = dataclasses.replace(
            registry.find_preset(name), run=train.read_arguments(words)[2]
        )
    whole = text2image.PRESETS["text2image"]
    sized = dataclasses.replace(tiny["text2image-autoencoder"].run.model)
    model = dataclasses.replace(
        whole.run.model, autoencoder=sized, clip=tiny["text2image-clip"].run.model,
        diffusion=dataclasses.replace(
            whole.run.model.diffusion, image_size=4, in_channels=2, d_context=16
        ),
    )  # fmt: skip
    changed = dataclasses.replace(whole, run=dataclasses.replace(whole.run, model=model))
    monkeypatch.setattr(text2image, "PRESETS", tiny | {"text2image": changed})


def test_parts_that_are_not_given_are_trained_first(common, tiny_presets, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["text2image", *DENOISER.split(), *common, "--train.steps", 2, "--out", out]
    assert call(train, *words) == 0
    said = capsys.readouterr().out
    assert said.index("--- the autoencoder, in") < said.index("--- the clip, in")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run-autoencoder", "run-clip"}
    shutil.rmtree(out)
    assert call(train, *words) == 0  # the parts are there: they are taken as they are
    assert "the run is complete" in capsys.readouterr().out


def test_a_part_that_was_stopped_goes_on_by_the_same_command(
    common, tiny_presets, tmp_path, monkeypatch, capsys
):
    out, plain = tmp_path / "run", ImageData.batch

    def interrupt(data, step, rows=slice(None)):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return plain(data, step, rows)

    words = ["text2image", *DENOISER.split(), *common, "--train.steps", 2, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(ImageData, "batch", interrupt)
        assert call(train, *words) == 130
    assert "stopped at step 3 and saved; continue with the same command" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"run-autoencoder"}
    assert call(train, *words) == 0
    assert f"resumed from {out}-autoencoder/step-000003" in capsys.readouterr().out


def test_a_batch_that_the_pictures_do_not_fill_is_refused_before(common, tmp_path, capsys):
    words = ["text2image", *common, "--train.batch-size", 64, "--out", tmp_path / "run"]
    message = refusal(capsys, train, *words)
    assert "36 training pictures, 64 in a batch: use --train.batch-size <= 36" in message
    assert not [*tmp_path.iterdir()]


def test_a_part_must_be_a_run_of_its_family(arguments, parts, tmp_path, capsys):
    swapped = ["--autoencoder", parts["clip"], "--out", tmp_path / "x"]
    message = refusal(capsys, train, *arguments, *swapped)
    assert "is a run of family clip, not autoencoder" in message
    message = refusal(
        capsys, train, *arguments, "--clip", tmp_path / "none", "--out", tmp_path / "x"
    )
    assert "there is no run directory" in message
    assert not (tmp_path / "x").exists()


def test_other_channels_than_the_pictures_have_are_named(arguments, tmp_path, capsys):
    message = refusal(capsys, train, *arguments, "--data.path", "letters", "--out", tmp_path / "x")
    assert "letters are 32 x 32 pixels of 1 (3 with --data.color)" in message
    message = refusal(capsys, train, *arguments, "--data.color", "--out", tmp_path / "x")
    assert "and not your own pictures" in message


def test_a_coloured_autoencoder_has_a_recipe_of_its_own():
    grey = registry.get_preset("text2image").run
    painted = dataclasses.replace(grey, data=dataclasses.replace(grey.data, color=True))
    usual = registry.get_preset("text2image-autoencoder").run
    grey, painted = (
        run.part_run("autoencoder", usual, run.model.autoencoder) for run in (grey, painted)
    )
    assert painted.model == dataclasses.replace(grey.model, in_channels=3, groups=1)
    assert painted.optim.kernels and not grey.optim.kernels
    assert painted.train == dataclasses.replace(grey.train, steps=500)


def test_parts_are_made_for_what_is_given(arguments, parts, pictures, tmp_path):
    """Few pictures make small batches; a given part says how the other one sees them."""
    words = [*arguments[:-2], "--clip", "", "--out", tmp_path / "x"]
    run = train.read_arguments([str(word) for word in [*words, "--data.template", "my {}"]])[2]
    preset = registry.get_preset("text2image-clip")
    part = run.part_run("clip", preset.run, run.model.autoencoder)
    assert part.data.template == "my {}"
    assert part.train.batch_size == 16  # 60 pictures, of which 36 train
    letters = dataclasses.replace(run, data=dataclasses.replace(run.data, path="letters"))
    part = letters.part_run("clip", preset.run, run.model.autoencoder)
    assert part.train.batch_size == 256
    dry = dataclasses.replace(run, dry_run=True)
    plan = launch.resolve("text2image", preset, dry, distributed.World())
    assert plan.run.model.autoencoder == run_dir.open_run(str(parts["autoencoder"])).run.model
    assert (plan.run.model.clip.image_size, plan.run.model.clip.channels) == (8, 3)


def test_what_lacks_is_said_before_any_part_is_trained(common, parts, pictures, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(pictures / "0.png", bare)
    out = ["--out", tmp_path / "x"]
    message = refusal(capsys, train, "text2image", *common, "--data.path", bare, *out)
    assert "no image with a caption" in message
    swapped = ["--clip", parts["autoencoder"]]
    message = refusal(capsys, train, "text2image", *common, *swapped, *out)
    assert "is a run of family autoencoder, not clip" in message
    assert {path.name for path in tmp_path.iterdir()} == {"bare"}


def test_colours_that_a_grey_model_does_not_see_are_counted(pictures):
    for channels, seen in ((1, True), (3, False)):
        report = Report()
        images = [record.image for record in captioned.records(pictures, 8, channels, report)]
        assert {image.shape for image in images} == {(8, 8, channels)}
        assert ("60 in colour, read as grey" in str(report)) == seen


# ---- sample -------------------------------------------------------------------------------------


def test_sample_draws_what_the_prompt_says(run, tmp_path, capsys):
    out = tmp_path / "drawn.png"
    assert call(sample, run, "--prompt", "red a", "-n", 3, "--steps", 4, "--out", out) == 0
    assert "3 pictures in 4 steps" in capsys.readouterr().out
    with open_image(out) as sheet:
        first = np.array(sheet)
    assert call(sample, run, "--prompt", "red a", "-n", 3, "--steps", 4, "--out", out) == 0
    with open_image(out) as sheet:
        assert np.array_equal(np.array(sheet), first)
    assert call(sample, run, "--prompt", "blue d", "-n", 3, "--steps", 4, "--out", out) == 0
    with open_image(out) as sheet:
        assert not np.array_equal(np.array(sheet), first)


def test_sample_changes_fills_and_enlarges_pictures(run, pictures, tmp_path):
    out, mask, small = (tmp_path / f"{name}.png" for name in ("out", "mask", "small"))
    white = np.zeros((8, 8), dtype=np.uint8)
    white[:, :4] = 255
    Image.fromarray(white).save(mask)
    with open_image(pictures / "0.png") as image:
        image.resize((4, 4)).save(small)
    first = ["--prompt", "red a", "-n", 2, "--steps", 5, "--out", out]
    own = ["--init-image", pictures / "0.png"]
    for words in ([*own, "--strength", 0.5], [*own, "--mask", mask], ["--upscale", small]):
        assert call(sample, run, *first, *words) == 0
        out.unlink()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to draw"),
        (["--prompt", " "], "say what to draw"),
        (["--prompt", "a", "--out", "none/x.png"], "there is no folder none; make it first"),
        (["--prompt", "a", "--init-image", "0.png", "--upscale", "0.png"], "leave one out"),
        (["--prompt", "a", "--guidance", -1], "it must be 0 or above"),
        (["--prompt", "a", "--steps", 2000], "do not fit a schedule"),
        (["--prompt", "a", "--strength", 0.5], "--strength needs --init-image"),
        (["--prompt", "a", "--mask", "0.png"], "--mask 0.png needs --init-image"),
        (["--prompt", "a", "--init-image", "0.png", "--strength", 1.5], "strength is 1.5"),
        (["--prompt", "a", "--init-image", "0.png", "--mask", "wide.png"], "make them equal"),
        (["--prompt", "a", "--upscale", "wide.png"], "give 2 x 2 or 4 x 4"),
        (["--prompt", "a", "--init-image", "none.png"], "none.png cannot be used as an image"),
        (["--prompt", "a", "--top-k", 3], "--top-k is not for a run of family text2image"),
    ],
)
def test_wrong_options_are_one_clear_sentence(
    run, pictures, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(pictures / "0.png", tmp_path)
    Image.new("RGB", (9, 5)).save(tmp_path / "wide.png")
    assert message in refusal(capsys, sample, run, *words)
    assert not (tmp_path / "sample.png").exists()


def test_a_prompt_beyond_the_context_is_cut_and_said_to_be(run, tmp_path, capsys):
    first = [run, "-n", 2, "--steps", 2, "--out", tmp_path / "x.png", "--prompt"]
    assert call(sample, *first, "red a" * 9) == 0
    assert "the text cut to 12 tokens" in capsys.readouterr().err
    assert call(sample, *first, "red a") == 0
    assert "cut" not in capsys.readouterr().err


def test_labels_are_a_list_of_any_length_or_a_file_of_text(parts, pictures, tmp_path, capsys):
    first = [sample, parts["clip"], "--image", pictures / "0.png", "--labels"]
    assert call(*first, ",".join(f"{ink} {i}" for ink in INKS for i in range(100))) == 0
    assert len(capsys.readouterr().out.splitlines()) == 300
    assert call(*first, "red a,a much longer text") == 0
    assert "cut to 12 tokens" in capsys.readouterr().err
    assert "'none.txt' is the only label, and no file" in refusal(capsys, *first, "none.txt")
    assert "0.png is not UTF-8 text" in refusal(capsys, *first, pictures / "0.png")
    asked = [sample, parts["clip"], "--prompt", "red a", "--labels", "red a,blue b"]
    assert "give --image FILE with --labels" in refusal(capsys, *asked)


# ---- what is drawn, judged ----------------------------------------------------------------------


class Copier:
    """Draws each prompt as the font does."""

    def generate(self, prompts, **how):
        rows = []
        for prompt in prompts:
            ink, paper = "black", "white"
            if " on " in prompt:
                ink, _, prompt = prompt.partition(" ")
                prompt, _, paper = prompt.rpartition(" on ")
            style = max((s for s in judge.STYLES if prompt.startswith(f"{s} ")), key=len)
            image = generated.real_drawings([(style, prompt[len(style) + 1 :])])[0, 0].numpy()
            rows.append(glyphs.paint(image[:, :, None], ink, paper).transpose(2, 0, 1))
        images = torch.from_numpy(np.stack(rows)) / 127.5 - 1
        return images if ink != "black" or paper != "white" else images[:, :1]


@pytest.fixture
def asked(monkeypatch):
    """Few characters, and a judge that was taught nothing."""
    monkeypatch.setattr(judge, "CHARACTERS", judge.CHARACTERS[:6])
    config = judge.JudgeConfig(width=8, features=16)
    marked = [f"latin small letter e with {mark}" for mark in ("acute", "grave", "circumflex")]
    names = [*judge.CHARACTERS, *marked]
    found = judge.Judge(config, names), {"character": 0.5}
    monkeypatch.setattr(judge, "load_or_train", lambda cache: found)
    first, second = judge.CHARACTERS[:3], judge.CHARACTERS[3:]
    styles = ("sans", "mono bold", "serif italic", "sans bold italic")
    shown = {"train": first, "held-out pairs": second, "held-out characters": marked}
    splits = {}
    for split, characters in shown.items():
        asked = [(style, name) for name in characters for style in styles]
        captions = [[f"{style} {name}"] for style, name in asked]
        images = generated.real_drawings(asked).numpy()
        splits[split] = SimpleNamespace(labels=[name for _, name in asked], captions=captions,
                                        images=images)  # fmt: skip
    return SimpleNamespace(train=splits["train"], splits=splits)


def test_perfect_drawings_are_as_the_real_ones(asked):
    config = SimpleNamespace(color=False, cache="")
    scores = generated.measure(Copier(), asked, config, guidance=2.0)
    assert scores["the judge on real drawings: character"] == 0.5
    assert scores["letters and digits: Frechet distance"] == pytest.approx(0, abs=1e-3)
    sets = generated.PROMPT_SETS
    copies = {what: scores[f"{what}: copies of training pictures"] for what in sets}
    assert copies == {"letters and digits": 1, "held-out pairs": 0, "held-out characters": 0}
    prompts = generated.prompts_of(asked)
    assert [len(prompts[what]) for what in sets] == [12, 12, 3]
    for what in sets:
        assert {f"{what}: {key}" for key in ("character", "bold", "italic", "family")} <= {*scores}
    least = [scores[f"letters and digits: character{key}"] for key in (", weakest style", "")]
    assert least == sorted(least)


def test_characters_that_were_held_out_are_shown(asked, run, tmp_path, capsys, monkeypatch):
    drawn, generate = [], Copier.generate
    monkeypatch.setattr(
        Copier,
        "generate",
        lambda self, prompts, **how: drawn.append(prompts) or generate(self, prompts),
    )
    generated.draw_held_out(Copier(), asked, False, 2.0, str(tmp_path / "x.png"))
    expected = [f"{s} {n}" for s, n in generated.prompts_of(asked)["held-out characters"]]
    assert drawn == [expected]
    assert open_image(tmp_path / "x.png").width > 3 * 32
    generated.draw_held_out(Copier(), asked, True, 2.0, str(tmp_path / "y.png"))
    assert all(" on " in prompt for prompt in drawn[1])
    message = "use a CLIP with texts, or text-to-image on letters"
    assert message in refusal(capsys, evaluate, run, "--picture", tmp_path / "z.png")


def test_colours_that_are_drawn_as_asked_are_all_found(asked):
    config = SimpleNamespace(color=True, cache="")
    scores = generated.measure(Copier(), asked, config, guidance=2.0)
    for what in generated.PROMPT_SETS:
        assert scores[f"{what}: both"] == 1
