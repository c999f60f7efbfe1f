"""CLIP in use: trained through train.py on a folder of pictures, sampled, evaluated, measured."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image
from PIL.Image import open as open_image

import sample
import train
from data import glyphs
from tinyfm.batches.pair_files import Split
from tinyfm.common import files
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.evaluate import zero_shot
from tinyfm.recipes import registry, run_dir

COLOURS = ["red", "green", "blue", "white", "black", "yellow", "cyan", "pink"]
SIZES = """clip --model.image-size 8 --model.channels 3 --model.patch-size 4 --model.image-layer 1
--model.image-width 32 --model.image-head 2 --model.vocab-size 257 --model.context-length 24
--model.text-layer 1 --model.text-width 32 --model.text-head 2 --model.embed-dim 16
--data.tokenizer bytes --data.neighbours 1 --train.batch-size 8 --train.eval-every 25
--train.log-every 5 --train.dtype float32 --train.device cpu"""
pytestmark = pytest.mark.usefixtures("no_forecast")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder for each of eight colours, with twelve squares that differ a little."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for colour in COLOURS:
        (folder / colour).mkdir()
        for i in range(12):
            noise = random.integers(-20, 20, (8, 8, 3))
            ink = np.array(Image.new("RGB", (8, 8), colour)).astype(int) + noise
            picture = Image.fromarray(ink.clip(0, 255).astype(np.uint8))
            picture.save(folder / colour / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def arguments(pictures, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return [*SIZES.split(), "--data.path", str(pictures), "--data.cache", str(cache)]


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "clip"
    assert call(train, *arguments, "--train.steps", "50", "--out", out) == 0
    return out


def metrics(run):
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# ---- train --------------------------------------------------------------------------------------


def test_eight_colours_are_learnt_in_fifty_steps(run):
    """Equal captions share the target, so the loss cannot fall below the entropy of the copies."""
    first, *_, last = [row for row in metrics(run) if "val_loss" in row]
    assert first["zero_shot_val"] < 0.5 and last["zero_shot_val"] == 1
    assert last["val_loss"] < 0.6 < math.log(8) - 0.5 < first["val_loss"]
    assert open_image(run / "samples" / "step-000050.png").size[0] > 100


def test_micro_batches_and_resume_change_nothing(run, arguments, tmp_path, capsys):
    """Micro-batches save memory; the loss is still that of the whole batch. A run that was stopped
    after 25 of 50 steps resumes bit for bit."""
    options = [*arguments, "--train.steps", "50", "--out", tmp_path / "cut"]
    assert call(train, *options, "--train.micro-batch-size", "3") == 0
    name = "loss_more_negatives"  # those of the memory
    losses = [[r[name] for r in metrics(out) if name in r] for out in (run, tmp_path / "cut")]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)  # later, rounding errors grow
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    shutil.rmtree(whole / "step-000050")
    (whole / "latest").write_text("step-000025\n", encoding="utf-8")
    capsys.readouterr()
    assert call(train, *arguments, "--train.steps", "50", "--out", whole, "--resume") == 0
    assert "zero_shot_val: " in capsys.readouterr().out  # the untrained score is still known
    for name, weight in files.load_tensors(run / "step-000050").items():
        assert torch.equal(weight, files.load_tensors(whole / "step-000050")[name]), name


@pytest.mark.parametrize("loss", ["simclr", "siglip"])
def test_other_losses_train(arguments, tmp_path, loss):
    out = tmp_path / loss
    assert call(train, *arguments, "--train.steps", "25", "--model.loss", loss, "--out", out) == 0
    first, *_, last = [row for row in metrics(out) if "val_loss" in row]
    assert last["val_loss"] < first["val_loss"] - 0.1
    assert ("neighbour_val" in last) == (loss == "simclr")
    assert call(evaluate, out) == 0
    if loss == "simclr":
        assert call(sample, out, "--prompt", "red") == 1
        assert call(evaluate, out, "--picture", tmp_path / "x.png") == 1


def test_glyphs_of_one_character_are_alike():
    assert zero_shot.HELD_OUT_FONTS == glyphs.HELD_OUT_FONTS
    assert zero_shot.HELD_OUT_CHARACTERS == glyphs.HELD_OUT_CHARACTERS
    captions = [["sans bold italic a"], ["sans bold italic b"], ["serif bold italic a"]]
    empty = np.zeros(0)
    split = Split(empty, empty, empty, captions, ["a", "b", "a"])
    for name in (glyphs.HELD_OUT_FONTS, glyphs.HELD_OUT_CHARACTERS):
        assert zero_shot.clusters_of(name, split) == (["a", "b", "a"], "characters")
    assert zero_shot.clusters_of("test", split) == ([], "")


# ---- sample and evaluate ------------------------------------------------------------------------


def test_an_image_is_named(run, pictures, tmp_path, capsys):
    big = tmp_path / "big.jpg"
    open_image(pictures / "blue" / "0.png").resize((300, 200)).save(big)
    assert call(sample, run, "--image", big, "--labels", "red, blue,green") == 0
    lines = [line.split("%  ") for line in capsys.readouterr().out.splitlines()]
    assert lines[0][1] == "blue" and len(lines) == 3
    assert sum(float(p) for p, _ in lines) == pytest.approx(100, abs=0.1)
    names = tmp_path / "names.txt"
    names.write_text("pink\nblue\n", encoding="utf-8")
    assert call(sample, run, "--image", big, "--labels", names) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("blue")


def test_images_are_found(run, tmp_path, capsys):
    out = tmp_path / "found.png"
    prompt = "a picture of a yellow"
    assert call(sample, run, "--prompt", prompt, "-n", "5", "--out", out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1] for line in lines[:5]] == [prompt] * 5
    assert np.array(open_image(out)).std() > 0
    # The second search embeds no image: the vectors were kept.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_shot, "embed_images", lambda *_: 1 / 0)
        assert call(sample, run, "--prompt", prompt, "-n", "5", "--out", out) == 0
    assert capsys.readouterr().out.splitlines()[:5] == lines[:5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give --image FILE with --labels, or --prompt"),
        (["--image", "IMAGE", "--prompt", "x"], "give --image FILE with --labels, or --prompt"),
        (["--image", "IMAGE"], "there is no label"),
        (["--image", "IMAGE", "IMAGE", "--labels", "red"], "has 2 pictures: give one to name"),
        (["--image", "IMAGE", "--labels", " , "], "there is no label"),
        (["--image", "IMAGE", "--labels", "red,blue,red"], "'red' more than once"),
        (["--image", "nowhere.png", "--labels", "red"], "nowhere.png"),
        (["--prompt", "x", "-n", "0"], "-n is 0"),
    ],
)
def test_bad_options_are_refused(run, pictures, capsys, given, message):
    image = str(pictures / "red" / "0.png")
    assert call(sample, run, *(image if a == "IMAGE" else a for a in given)) == 1
    assert message in capsys.readouterr().err


def test_a_batch_of_one_is_refused(arguments, tmp_path, capsys):
    assert call(train, *arguments, "--train.batch-size", "1", "--out", tmp_path / "one") == 1
    assert "needs a batch of 2 rows or more" in capsys.readouterr().err


def test_confusions_stand_beside_a_picture_of_the_guess(tmp_path):
    """Image i is all grey level i. The guess of a bold one is shown in bold, if there is one."""
    names = ["one", "one", "two", "two", "six"]
    captions = ["thin one", "bold one", "thin two", "bold two", "bold six"]
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 4, 4), np.uint8)
    path = tmp_path / "confusions.png"
    shown = []

    def keep(tiles, path, columns, titles):
        shown.append([(int(tile[0, 0, 0]), title) for tile, title in zip(tiles, titles)])
        assert columns % 2 == 0  # a pair stays in its row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_shot, "save_grid", keep)
        for guesses, of_whom in (
            (["one", "two", "two", "two", "six"], captions),
            (["one", "one", "two", "two", "two"], captions),
            (["one", "two", "two", "two", "six"], None),
            (["one", "seven", "two", "two", "six"], captions),
        ):
            zero_shot.draw_confusions(images, names, guesses, str(path), of_whom)
    assert shown == [
        [(1, "is: one"), (3, "guess: two")],
        [(4, "is: six"), (3, "guess: two")],
        [(1, "is: one"), (2, "guess: two")],
        [(1, "is: one"), (128, "guess: seven")],
    ]
    with pytest.raises(ValueError, match="no confusion"):
        zero_shot.draw_confusions(images, names, names, str(path))


def test_words_that_training_never_saw_are_named(run, pictures, tmp_path, capsys):
    first = [sample, run, "--out", tmp_path / "x.png", "--prompt"]
    assert call(*first, "a picture of a mauve and red zebra") == 0
    assert "no training caption has 'and', 'mauve', 'zebra'\n" in capsys.readouterr().err
    assert call(*first, "a picture of a red") == 0
    assert "no training caption" not in capsys.readouterr().err
    image = pictures / "blue" / "0.png"
    assert call(sample, run, "--image", image, "--labels", "red, mauve") == 0
    assert "no training caption has 'mauve'\n" in capsys.readouterr().err
    for path in run.glob("step-*/words.json"):  # a run of an earlier version has none
        assert files.read_record(path, list[str])


def test_a_picture_without_a_name_replaces_none(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "found.png").write_text("precious", encoding="utf-8")
    for _ in range(2):
        assert call(sample, run, "--prompt", "a picture of a red") == 0
    assert (tmp_path / "found.png").read_text(encoding="utf-8") == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {f"found{i}.png" for i in ("", "-2", "-3")}
    assert "found-3.png" in capsys.readouterr().out


def test_evaluation(run, tmp_path, capsys):
    picture = tmp_path / "confusions.png"
    assert call(evaluate, run, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    scores = printed["scores"]
    for name in scores:
        interval = printed["intervals"][name]["reached"]
        assert interval["n"] > 0, name
    among_own = next(row for name, row in scores.items() if name.startswith("zero-shot, test, "))
    assert among_own["reached"] == 1 and among_own["untrained"] < 0.6
    among_all = scores[f"zero-shot, test, all {len(COLOURS)} names"]
    assert among_all["untrained"] <= among_own["untrained"]
    assert among_all["reached"] > 0.7
    features = [row for name, row in scores.items() if "features" in name]
    assert len(features) == 2
    assert all(row.keys() == {"untrained", "reached", "pixels"} for row in features)
    last = [row for row in metrics(run) if "val_loss" in row][-1]
    assert scores["val_loss"]["reached"] == pytest.approx(last["val_loss"], rel=1e-4)
    assert call(evaluate, run, "--picture", picture) == 1  # nothing is confused
    assert "no confusion" in capsys.readouterr().err
    assert call(evaluate, run) == 0
    assert "untrained" in capsys.readouterr().out


def test_evaluation_of_a_gpt(tiny_run, capsys):
    assert call(evaluate, tiny_run, "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    last = [row for row in metrics(tiny_run) if "val_loss" in row][-1]
    assert scores["val_bpb"]["reached"] == pytest.approx(last["val_bpb"], rel=1e-4)
    assert call(evaluate, tiny_run, "--picture", "x.png") == 1


# ---- measures -----------------------------------------------------------------------------------


def test_a_class_is_as_probable_as_its_captions_together():
    """x is a picture of class 0 in its first style. So it belongs to class 0, although the mean of
    the two styles of class 1 is nearer."""
    angles = torch.tensor([[0.0, 30.0], [90.0, 40.0]]).deg2rad()  # (n, M)
    classes = torch.stack((angles.cos(), angles.sin()), dim=-1)
    x = torch.tensor([[1.0, 0.0]])
    means = classes.mean(0)
    assert (x @ (means / means.norm(dim=1, keepdim=True)).T).argmax() == 1
    scale = torch.tensor(20.0)
    p = (scale * x @ classes.flatten(0, 1).T).softmax(1).view(2, 2).sum(0)  # of the four captions
    found = zero_shot.class_logits(x, classes, scale).softmax(1)
    torch.testing.assert_close(found[0], p)
    assert zero_shot.classify(x, classes, scale).tolist() == [0]


def test_a_run_sets_the_number_of_pairs_of_its_model(run):
    opened = run_dir.open_run(str(run))
    opened.run.get_ready(opened.model, opened.run.open_data())
    assert opened.model.config.rivals == "all" and opened.model.n_pairs == 86


def test_recall_counts_ranks():
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(30, 4), dim=-1)
    owner = torch.arange(60) % 30  # two captions an image
    y = torch.nn.functional.normalize(x[owner] + torch.randn(60, 4), dim=-1)
    found = zero_shot.recall(x, y, owner, (1, 3))
    z = x @ y.T
    for k in (1, 3):
        images = [bool({*z[i].topk(k).indices.tolist()} & {i, i + 30}) for i in range(30)]
        texts = [owner[j].item() in z[:, j].topk(k).indices.tolist() for j in range(60)]
        assert found[f"image_to_text_at_{k}"] == pytest.approx(np.mean(images))
        assert found[f"text_to_image_at_{k}"] == pytest.approx(np.mean(texts))


def test_a_model_that_embeds_everything_alike_recalls_nothing():
    x = torch.ones(10, 4) / 2
    assert zero_shot.recall(x, x, torch.arange(10), (1,)) == {
        "image_to_text_at_1": 0.0,
        "text_to_image_at_1": 0.0,
    }


def test_features_are_the_output_of_the_tower_before_the_projection(run):
    model = run_dir.open_run(str(run)).model
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), np.uint8)
    x = zero_shot.image_features(model, images)
    assert x.shape == (5, 32) and torch.allclose(x.norm(dim=1), torch.ones(5))
    y = torch.nn.functional.normalize(model.image_projection(x), dim=1)
    assert torch.allclose(y, zero_shot.embed_images(model, images), atol=1e-5)


def test_probes():
    torch.manual_seed(0)
    train_y, y = torch.arange(60) % 3, torch.arange(30) % 3
    centres = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    train_x, x = centres[train_y], centres[y] + 0.01 * torch.randn(30, 8)
    assert torch.equal(zero_shot.nearest_neighbours(x, train_x, train_y, k=5), y)
    assert torch.equal(zero_shot.linear_probe(x, train_x, train_y), y)
    train_x = train_x + 0.5 * torch.randn(60, 8)
    with_one = torch.cat((train_x, torch.ones(60, 1)), 1).double()
    targets = torch.nn.functional.one_hot(train_y).double()
    padded = torch.cat((with_one, (1e-3 * 60) ** 0.5 * torch.eye(9).double()))
    weights = torch.linalg.lstsq(padded, torch.cat((targets, torch.zeros(9, 3)))).solution
    expected = (torch.cat((x, torch.ones(30, 1)), 1).double() @ weights).argmax(1)
    assert torch.equal(zero_shot.linear_probe(x, train_x, train_y), expected)


def test_probes_count_the_glyphs_of_a_character_together():
    train = SimpleNamespace(labels=list("abcd") * 3)
    test = SimpleNamespace(labels=list("abcd") * 5)
    splits = {"train": train, "val": train, glyphs.HELD_OUT_FONTS: test}
    data = SimpleNamespace(splits=splits, train=train, test=test)
    x = {"train": torch.randn(12, 6), glyphs.HELD_OUT_FONTS: torch.randn(20, 6)}
    for score in zero_shot.by_features(data, x).values():
        assert score.about == "20 images in 4 characters"


def test_templates_are_found_in_the_captions():
    captions = [["a red cat"], ["a blue cat"], ["red: one"], ["nothing of it"]]
    none = np.zeros((4, 1))
    split = Split(none, none, none, captions, ["red", "blue", "red", "red"])
    assert zero_shot.find_templates(split) == ["a {} cat", "{}: one", "{}"]


def test_run_types_are_found_by_name():
    for name in ("gpt", "chat", "gpt-classify", "clip", "clip-classify", "text2image"):
        assert registry.find_run_type(name).family == name
    with pytest.raises(ValueError, match=r"'cnn'.*none of.*ddpm"):
        registry.find_run_type("cnn")
