"""The judge: its training, its cache, and the measures of generated pictures."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_equal_weights
from torch import nn

from data import glyphs
from data.pictures import Record
from tinyfm.common.files import CheckpointError
from tinyfm.evaluate import generated, metrics
from tinyfm.evaluate import judge as judging
from tinyfm.evaluate.generated import color_accuracy as colors
from tinyfm.evaluate.judge import CHARACTERS, STYLES, Judge, JudgeConfig

TINY = JudgeConfig(width=8, features=16, steps=2, batch_size=4)
LETTER = {name: "latin capital letter " + name for name in "abcdefgh"}


def drawn(letters: str, styles=STYLES) -> list[Record]:
    """Records of these capital letters."""
    records = []
    for style in styles:
        for letter in letters:
            image = glyphs.draw(letter.upper(), glyphs.FILES[style])
            name = LETTER[letter]
            records.append(Record(image, (f"{style} {name}",), name, glyphs.TRAIN))
    return records


class Reader(Judge):
    """A judge whose answers stand in the first pixels of a picture.

    The brightest of the first M pixels is the character, that of the next 16 the style.
    """

    def __init__(self, names):
        super().__init__(TINY, names)
        M = len(names)
        S = len(STYLES)
        pixels = glyphs.SIZE**2
        self.features = nn.Flatten()
        self.character = nn.Linear(pixels + len(judging.KNOWN), M)
        self.style = nn.Linear(pixels, S)
        for layer, first in ((self.character, 0), (self.style, M)):
            nn.init.zeros_(layer.bias)
            layer.weight.data = torch.eye(layer.in_features)[first : first + layer.out_features]

    def write(self, answers):
        """Pictures with these answers: (names, the likeliest first; style) each."""
        images = -torch.ones(len(answers), glyphs.SIZE**2)
        for image, (names, style) in zip(images, answers):
            for i, name in enumerate(names):
                image[self.names.index(name)] = 1 - i / 4
            image[len(self.names) + STYLES.index(style)] = 1
        return images.view(-1, 1, glyphs.SIZE, glyphs.SIZE)


# ---- the network and its training ----------------------------------------------------------------


def test_the_characters_are_letters_and_digits():
    assert len(set(CHARACTERS)) == 62
    assert {"latin capital letter q", "latin small letter q", "digit nine"} <= {*CHARACTERS}
    assert len(STYLES) == 16


def test_a_judge_is_the_same_inside_an_evaluation():
    """An evaluation is in inference mode, and its autocast must keep no weight of a judge."""
    records = drawn("abcd")
    config = replace(TINY, steps=8)
    outside = judging.train(records, config)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        judging.ceilings(outside, records, [])  # fills the cache of that autocast
        inside = judging.train(records, config)
    assert_equal_weights(inside, outside)


def test_a_tiny_judge_learns_40_drawings():
    records = drawn("abcdefgh", STYLES[:5])
    config = replace(TINY, width=16, features=64, steps=80, batch_size=40, lr=5e-3, augment=0.05)
    judge = judging.train(records, config)
    assert len(records) == 40
    assert judging.prompt_following(judge, *judging.stack(records)) == {
        "character": 1, "style": 1, "bold": 1, "italic": 1, "family": 1,
    }  # fmt: skip


def test_one_shape_is_read_in_the_style_of_the_prompt():
    """The zero of one font is the capital O of another."""
    (zero,) = drawn("a", ["sans"])
    capital = zero._replace(captions=(f"mono {LETTER['b']}",), label=LETTER["b"])
    config = replace(TINY, width=16, features=64, steps=60, batch_size=16, lr=5e-3)
    judge = judging.train([zero, capital], config)
    images, names, styles = judging.stack([zero, capital])
    assert torch.equal(images[0], images[1])
    assert judging.prompt_following(judge, images, names, styles)["character"] == 1
    assert judging.prompt_following(judge, images, names, styles[::-1])["character"] == 0


def test_training_is_repeatable_and_leaves_the_global_generator_alone():
    records = drawn("ab", STYLES[:2])
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = judging.train(records, TINY)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    again = judging.train(records, TINY)
    other = judging.train(records, replace(TINY, seed=1))
    assert first.names == tuple(sorted(CHARACTERS))
    weights = [judge.state_dict() for judge in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["style.weight"], weights[2]["style.weight"])


def test_the_extra_fonts_have_every_character_once():
    records = judging.extra_records()
    assert len({r.captions[0] for r in records}) == len(records) == 5 * 62
    assert len({r.image.tobytes() for r in records}) > 300  # sans I and l are one
    assert not {r.captions[0] for r in records} & {f"{s} {n}" for s in STYLES for n in CHARACTERS}


def test_the_same_part_of_each_style_is_left_out():
    held_out_names = [f"latin small letter {letter} with horn" for letter in "abcdefghijklmnop"]
    records = []
    for style in STYLES:
        names = (*CHARACTERS, "latin small letter thorn", *held_out_names)
        for name in names:
            split = glyphs.HELD_OUT_CHARACTERS if name in held_out_names else glyphs.TRAIN
            records.append(Record(np.zeros((32, 32, 1)), (f"{style} {name}",), name, split))
    single = Record(np.zeros((32, 32, 1)), ("sans x",), "x", glyphs.HELD_OUT_CHARACTERS)
    others, out, held_out = judging.leave_out([*records, single], 0.1)
    assert len(others) + len(out) + len(held_out) == len(records) + 1
    assert {record.label for record in held_out} <= {*held_out_names}
    assert 30 <= len(held_out) <= 32  # two of each style
    # No drawing is judged by a judge that has seen it, and each name is known from another style.
    seen = {record.captions[0] for record in others}
    assert not seen & {record.captions[0] for record in (*out, *held_out)}
    assert {record.label for record in (*out, *held_out)} <= {record.label for record in others}
    assert "x" in {record.label for record in others}
    captions = {record.captions[0] for record in out}
    assert not captions & {record.captions[0] for record in others}
    assert all(record.label in CHARACTERS for record in out)
    styles = judging.stack(out)[2]
    assert [styles.count(style) for style in STYLES] == [6] * 16
    assert len({record.label for record in out}) > 40  # not the same in each
    assert {record.captions[0] for record in judging.leave_out(records[::-1], 0.1)[1]} == captions
    parts = [judging.leave_out(records, 0.1, fold)[1] for fold in range(10)]
    folds = [{record.captions[0] for record in part} for part in parts]
    assert folds[0] == captions
    assert len(set().union(*folds)) == sum(map(len, folds)) == 960


@pytest.fixture
def four_fonts(monkeypatch):
    fonts = {style: file for style, file in glyphs.FILES.items() if "mono" in style}
    monkeypatch.setattr(glyphs, "FILES", fonts)


def test_a_judge_is_cached(tmp_path, monkeypatch, four_fonts, capsys):
    with torch.inference_mode():  # as evaluate asks for it
        judge, scores = judging.load_or_train(tmp_path, TINY)
    assert re.search(r"training the judge .* 2 steps, .*minutes", capsys.readouterr().err)
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert {*scores} == {"characters", "held-out characters"}
    for own in scores.values():
        assert {*own} == {"character", *judging.ASPECTS}
        assert all(0 <= score.low <= score <= score.high <= 1 for score in own.values())
    assert len(judge.names) > 700
    monkeypatch.setattr(judging, "train", None)  # not called again: the judge is cached
    again, same_scores = judging.load_or_train(tmp_path, TINY)
    assert (again.names, same_scores) == (judge.names, scores)
    x = torch.rand(3, 1, 32, 32)
    styles = torch.arange(3)
    assert all(torch.equal(a, b) for a, b in zip(judge(x, styles), again(x, styles)))
    with pytest.raises(TypeError):  # another config is another judge
        judging.load_or_train(tmp_path, replace(TINY, seed=1))
    path = folder / "judge.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    values = ([], {"a": 1}, None, True, "many", -1.5, 10**30, ["a", "a"], [7])
    changes = [{field: value} for field in good for value in values]
    for value in ([3, 2], [-1, 2], [1.5, 2], [1], [True, 2], "12", {"n": 1}, [0, 2**70]):
        changes.append({"right": {"characters": {"character": value}}})
    for change in changes:
        path.write_text(json.dumps(good | change), encoding="utf-8")
        with pytest.raises(ValueError, match=r"judge\.json"):
            judging.load_or_train(tmp_path, TINY)
    path.write_text(json.dumps(good), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a readable"):
        judging.load_or_train(tmp_path, TINY)


def test_its_scores_are_measured_on_drawings_that_it_has_not_seen(
    tmp_path, monkeypatch, four_fonts
):
    seen = []
    train = judging.train

    def watched_train(records, config):
        seen.extend(records)
        return train(records, config)

    monkeypatch.setattr(judging, "train", watched_train)
    judge, scores = judging.load_or_train(tmp_path, TINY)
    captions = {record.captions[0] for record in seen}
    unseen = [r for r in glyphs.records(letters=True) if r.captions[0] not in captions]
    common = [r for r in unseen if r.label in CHARACTERS]
    held_out = [r for r in unseen if r.split == glyphs.HELD_OUT_CHARACTERS]
    assert len(unseen) == len(common) + len(held_out)
    assert len(common) > 20 and len(held_out) > 50
    expected = {
        "characters": judging.prompt_following(judge, *judging.stack(common)),
        "held-out characters": judging.prompt_following(
            judge, *judging.stack(held_out), judge.names
        ),
    }
    assert scores == expected
    assert [own["character"].n for own in scores.values()] == [len(common), len(held_out)]


# ---- prompts -------------------------------------------------------------------------------------


def test_prompt_following_compares_with_the_prompts():
    judge = Reader([*CHARACTERS, "latin small letter thorn"])
    a, b, thorn = "digit one", "digit two", "latin small letter thorn"
    images = judge.write([
        ([a], "sans"), ([a], "sans bold"), ([a], "serif bold italic"), ([b], "stix italic"),
    ])  # fmt: skip
    styles = ["sans", "mono bold", "serif bold", "sans"]
    assert judging.prompt_following(judge, images, [a] * 4, styles) == {
        "character": 0.75, "style": 0.25, "bold": 1, "italic": 0.5, "family": 0.5,
    }  # fmt: skip
    images = judge.write([([thorn, b, a], "sans")])
    for names, candidates, right in (
        ([b], {}, 1),
        ([a], {}, 0),
        ([a], {"candidates": [a, "digit six"]}, 1),
        ([thorn], {"candidates": judge.names}, 1),
    ):
        scores = judging.prompt_following(judge, images, names, ["sans"], **candidates)
        assert scores["character"] == right


def test_the_weakest_style_has_the_most_mistakes():
    judge = Reader(CHARACTERS)
    a, b = "digit one", "digit two"
    images = judge.write([([a], "sans"), ([b], "sans"), ([a], "mono"), ([b], "mono")])
    styles = ["sans", "sans", "mono", "mono"]
    for names, share in (([a, b, a, b], 1), ([a, a, a, b], 0.5), ([b, a, a, b], 0)):
        assert generated.weakest(judge, images, names, styles) == share


def test_bytes_and_floats_are_the_same_pictures():
    judge = Judge(TINY, CHARACTERS)
    images, _, _ = judging.stack(drawn("ab"))
    floats = images.float() / 127.5 - 1
    expected = judging.embed(judge, images)
    assert expected.shape == (32, TINY.features)
    torch.testing.assert_close(judging.embed(judge, floats), expected)
    torch.testing.assert_close(judging.embed(judge, images.numpy()), expected)
    beyond = torch.where(floats == 1, 3.0, floats)
    torch.testing.assert_close(judging.embed(judge, beyond), expected)


# ---- distances -----------------------------------------------------------------------------------


def cloud(mean, factor, rows=50):
    """Points whose mean is `mean` and whose covariance is factor @ factor.T, exactly."""
    x = torch.randn(rows, len(mean), generator=torch.Generator().manual_seed(0)).double()
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return white @ factor.T + mean


def test_frechet_distance_of_known_gaussians():
    a = cloud(torch.tensor([0.0, 1, 2]).double(), torch.diag(torch.tensor([1.0, 2, 3])).double())
    b = cloud(torch.tensor([1.0, 1, 4]).double(), torch.diag(torch.tensor([3.0, 2, 1])).double())
    expected = (1 + 0 + 4) + (4 + 0 + 4)  # means, then standard deviations, squared
    assert generated.frechet_distance(a, b) == pytest.approx(expected)
    generator = torch.Generator().manual_seed(1)
    m, n = (torch.randn(4, 4, generator=generator).double() for _ in range(2))
    a, b = cloud(m[0], m), cloud(n[0], n)  # covariances that do not commute
    A, B = m @ m.T, n @ n.T
    root = torch.linalg.eigvals(A @ B).sqrt().real.sum()
    expected = (m[0] - n[0]).square().sum() + A.trace() + B.trace() - 2 * root
    assert generated.frechet_distance(a, b) == pytest.approx(expected.item())
    assert generated.frechet_distance(b, a) == pytest.approx(expected.item())


def test_frechet_distance_of_a_cloud_to_itself_is_0():
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))  # singular covariance
    assert generated.frechet_distance(x, x) == pytest.approx(0, abs=1e-5)
    assert generated.frechet_distance(x, x + 2) == pytest.approx(4 * 64)
    assert generated.frechet_distance(x[:, :1], x[:, :1].flip(0)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("apart", [0.0, 0.4])
def test_an_interval_of_a_distance_catches_its_mean(apart):
    """The mean over other pairs of clouds of as many rows, which is far from that of many rows."""
    draw = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.2, 1, 16)

    def cloud(rows: int, shift: float = 0) -> torch.Tensor:
        return shift + spread * torch.randn(rows, 16, generator=draw)

    pairs = [(cloud(60), cloud(60, apart)) for _ in range(400)]
    mean = np.mean([generated.frechet_distance(*pair) for pair in pairs])
    found = [generated.measured_distance(*pair) for pair in pairs[:120]]
    assert np.mean([own.low <= mean <= own.high for own in found]) >= 0.9
    assert np.mean([own.high - own.low for own in found]) < 8 * np.std(found)
    assert mean > 1.15 * generated.frechet_distance(cloud(20_000), cloud(20_000, apart))
    assert str(found[0]).endswith("; 60 pictures each, biased by their number)")
    assert math.isnan(generated.measured_distance(cloud(39), cloud(39)).low)


def test_the_weakest_style_has_an_interval_for_the_lowest_of_all(monkeypatch):
    right = {"sans": 9, "serif": 7, "mono": 10}

    def follow(network, images, names, styles, candidates):
        share = metrics.proportion(np.arange(len(styles)) < right[styles[0]], "images")
        return {"character": share}

    monkeypatch.setattr(judging, "prompt_following", follow)
    styles = [style for style in right for _ in range(10)]
    found = generated.weakest(None, torch.zeros(30, 1), ["a"] * 30, styles)
    assert (found, found.n) == (0.7, 10)
    assert (found.low, found.high) == metrics.wilson(7, 10, 1 - 0.05 / 3)
    assert found.about == "10 images, the lowest of 3 styles"


def test_copies_are_found():
    train = judging.stack(drawn("abcd"))[0]
    images = train[[5, 60, 17]].float() / 127.5 - 1
    images[1] = (images[1] + 0.05).clamp(max=1)  # nearly
    images[2] = 1 - 2 * torch.rand(images[2].shape, generator=torch.Generator().manual_seed(0))
    assert generated.copies(images, train, threshold=0.06) == pytest.approx(2 / 3)
    assert generated.copies(images, train, threshold=1e-4) == pytest.approx(1 / 3)
    # The obvious way, pixel by pixel.
    pixels = train.float() / 127.5 - 1
    nearest = torch.cdist(pixels[::3].flatten(1), pixels[1::3].flatten(1), p=1).min(1).values
    for threshold in (0.02, 0.1, 0.2, 0.3):
        expected = (nearest / pixels[0].numel() < threshold).float().mean().item()
        found = generated.copies(train[::3], train[1::3], threshold)
        assert found == pytest.approx(expected)
    white, black = np.full((1, 1, 4, 4), 255, np.uint8), np.zeros((1, 1, 4, 4), np.uint8)
    assert [generated.copies(white, black, t) for t in (1.99, 2.01)] == [0, 1]


def test_samples_of_a_model_without_prompts(monkeypatch):
    torch.manual_seed(0)
    judge = Judge(TINY, CHARACTERS)
    monkeypatch.setattr(judging, "load_or_train", lambda cache, config: (judge, {}))
    images, _, _ = judging.stack(drawn("abcdefgh"))  # the first 64 are the training split
    floats = images.float() / 127.5 - 1

    def batches(split, count, rows):
        assert split == "held out"
        return [{"images": floats[64 : 64 + count]}]

    def measure(samples, image_size=32, count=24):
        config = SimpleNamespace(in_channels=1, image_size=image_size)
        model = SimpleNamespace(config=config, sample=lambda n, *_, generators: samples[:n])
        return generated.measure_samples(model, data, "cache", TINY, count)

    train = SimpleNamespace(images=images[:64].numpy())
    data = SimpleNamespace(
        split=lambda name: {"test": "held out"}[name], fixed_batches=batches, train=train
    )
    copied = measure(floats[:64])
    best = measure(floats[64:])
    copies = "copies of training pictures"
    assert copied[f"samples: {copies}"] == 1
    assert best[f"samples: {copies}"] == 0
    assert best[f"control, training pictures with faint noise: {copies}"] == 1  # the check can fire
    assert best[f"other real pictures: {copies}"] == 0
    distance, among = "samples: Frechet distance", "other real pictures: Frechet distance"
    assert best[distance] == pytest.approx(0, abs=1e-4)
    assert best[among] > 1e-3
    worst = measure(torch.zeros(24, 1, 32, 32))
    assert worst[distance] > copied[distance] > best[distance]
    assert worst[among] == copied[among] == best[among]
    assert measure(floats, image_size=16) == {}
    few = len(floats[64:]) // 2
    with pytest.raises(ValueError, match=f"use at most {few}"):
        measure(floats, count=few + 1)


# ---- colours -------------------------------------------------------------------------------------


def test_colours_of_real_drawings_are_all_read_right():
    records = drawn("abcdefgh")
    pairs = [glyphs.choose_colors("", str(i)) for i in range(len(records))]
    painted = [glyphs.paint(record.image, *pair) for record, pair in zip(records, pairs)]
    images = np.stack(painted).transpose(0, 3, 1, 2)
    inks, papers = map(list, zip(*pairs))
    assert colors(images, inks, papers) == {"ink": 1, "paper": 1, "both": 1}
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = torch.from_numpy(images) / 127.5 - 1 + 0.1 * noise
    assert colors(noisy, inks, papers) == {"ink": 1, "paper": 1, "both": 1}
    grey = judging.stack(records)[0]
    found = generated.unpaint(images)
    assert found[:2] == (inks, papers)
    assert (found[2].int() - grey.int()).abs().max() <= 1
    assert found[2].shape == grey.shape


def test_wrong_colours_and_blank_pictures_are_not_counted():
    image = glyphs.paint(drawn("a")[0].image, "red", "blue")
    blank = np.full_like(image, 0) + np.array(glyphs.COLORS["blue"], np.uint8)
    images = np.stack([image, image, image, blank]).transpose(0, 3, 1, 2)
    inks = ["red", "blue", "red", "red"]
    papers = ["blue", "red", "green", "blue"]
    scores = colors(images, inks, papers)
    assert scores == {"ink": 0.5, "paper": 0.5, "both": 0.25}


# ---- bad input -----------------------------------------------------------------------------------

ONE = torch.zeros(1, 1, 32, 32)
A = ["digit one"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda j: JudgeConfig(width=12), "width is 12; use a multiple of 8"),
        (lambda j: JudgeConfig(steps=1), "steps is 1; use at least 2"),
        (lambda j: JudgeConfig(held_out=0), "held_out is 0; .*between 0 and 1"),
        (lambda j: JudgeConfig(fold=10), "fold is 10; use 0 to 9"),
        (lambda j: judging.embed(j, ONE[0]), r"\(1, 32, 32\); they must be \(B, 1, H, W\)"),
        (lambda j: judging.embed(j, ONE[:0]), "B at least 1"),
        (lambda j: judging.prompt_following(j, ONE, A * 2, ["sans"] * 2), "1 picture, 2 prompts"),
        (lambda j: judging.prompt_following(j, ONE, ["x"], ["sans"]), "'x' is none of the 62"),
        (lambda j: judging.prompt_following(j, ONE, A, ["light"]), "'light' is none of the 16"),
        (lambda j: judging.prompt_following(j, ONE, A, ["sans"], ["x", *A]), "'x' is none of"),
        (lambda j: generated.frechet_distance(ONE[0, 0], ONE[0, 0, :, :3]), "of one F"),
        (lambda j: generated.frechet_distance(ONE[0, 0, :1], ONE[0, 0]), "B at least 2"),
        (lambda j: generated.copies(ONE, ONE[..., :8], 0.1), "1024 and 256 pixels"),
        (lambda j: generated.copies(ONE, ONE, 0), "threshold above 0"),
        (
            lambda j: colors(ONE, ["red"], ["blue"]),
            r"must be \(B, 3, H, W\)",
        ),
        (
            lambda j: colors(ONE, ["pink"], ["blue"]),
            "'pink' is none of the 8",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(Judge(TINY, CHARACTERS))
