"""A GPT that sees, as commands: captions, questions, actions, a GPT as its start, and errors."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import corridor
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
    write_captioned_pictures,
)
from PIL import Image

import sample
import train
from data import episodes, glyphs
from data.pictures import Record
from data.splits import TRAIN
from tinyfm.batches.seen import SeenConfig
from tinyfm.calc import __main__ as calc
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.recipes import card, run_dir, vision_gpt

TRAINING = """--train.batch-size 16 --train.log-every 1 --train.dtype float32 --train.device cpu
--optim.warmup-steps 5 --optim.lr 1e-2 --data.tokenizer bytes --data.cache cache"""
SMALL = """--model.image-layer 1 --model.image-head 2 --model.image-width 32 --model.gpt.n-layer 1
--model.gpt.n-head 2 --model.gpt.d-model 32 --model.gpt.vocab-size 258"""
OWN = """--data.path pictures --data.val-fraction 0.4 --model.image-size 8 --model.patch-size 4
--model.channels 3"""
COMMON = ["vision-gpt", *TRAINING.split()]
pytestmark = pytest.mark.usefixtures("no_forecast", "there")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, no_forecast):
    """A folder with pictures, and with a run that has learned their captions."""
    place = tmp_path_factory.mktemp("seeing")
    (place / "pictures").mkdir()
    write_captioned_pictures(place / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        steps = ["--train.steps", 60, "--train.eval-every", 30]
        sizes = [*SMALL.split(), "--model.gpt.context-length", 24, *OWN.split()]
        assert call(train, *COMMON, *sizes, *steps, "--out", "run") == 0
    return place


@pytest.fixture
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


# ---- captions -----------------------------------------------------------------------------------


def test_captions_are_learned_and_a_run_that_stopped_goes_the_same_way(tmp_path):
    scores = [row for row in rows_of("run") if "val_loss" in row]
    assert [scores[0]["val_right"], scores[-1]["val_right"]] == [0, 1]
    assert Path("run/samples/step-000060.png").is_file()
    assert_it_resumes("run", tmp_path / "again", 60)


def test_sample_writes_the_caption_of_a_picture(capsys, tmp_path):
    assert call(sample, "run", "--image", "pictures/3.png") == 0
    assert capsys.readouterr().out == "pictures/3.png: red d\n"
    with Image.open("pictures/3.png") as picture:
        picture.resize((32, 48), Image.Resampling.NEAREST).convert("RGBA").save(tmp_path / "l.png")
    assert call(sample, "run", "--image", tmp_path / "l.png", "--prompt", "red") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'l.png'}: d\n"
    drawn = []
    for _ in range(2):
        words = ["--image", "pictures/3.png", "-n", 3, "--temperature", 9, "--seed", 4]
        assert call(sample, "run", *words) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] and len(drawn[0].splitlines()) >= 3


def test_evaluate_and_the_calculator_know_it(capsys):
    assert call(evaluate, "run", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    right = scores["test: caption"]
    assert (right["untrained"], right["reached"]) == (0, 1) and right["commonest answer"] < 0.5
    assert scores["test_loss"]["reached"] < 0.1 < scores["test_loss"]["untrained"]
    opened = run_dir.open_run("run")
    count = sum(p.numel() for p in opened.model.parameters())
    assert f"{count:,} parameters" in calc.answer(["run"]).replace("\xa0", " ")
    assert card.describe(opened, "run").head["pipeline_tag"] == "image-to-text"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give the picture to look at: --image FILE"),
        (("--image", "none.png"), "none.png cannot be used as an image"),
        (("--image", "pictures/0.png", "--prompt", "a" * 30), "leave out pictures"),
        (("--image", "pictures/0.png", "--prompt", "a" * 19), "leaves no room for an answer"),
        (("--image", "pictures/0.png", "--labels", "a, b"), "--labels is not for a run of family"),
        (("--image", *["pictures/0.png"] * 2), "2 pictures and --texts has 0: give a text"),
        (("--image", *["pictures/0.png"] * 6, "--texts", *"abcde"), "6 pictures of 4 tokens and"),
    ],
)
def test_what_sample_refuses(words, message, capsys):
    assert message in refusal(capsys, sample, "run", *words)


# ---- questions ----------------------------------------------------------------------------------


def draw_styles(report, **variant) -> list[Record]:
    """Eight names in all styles; a picture has a bar for its name and a border for its style."""
    found = []
    for i, style in enumerate(glyphs.FILES):
        for j in range(8):
            image = np.full((32, 32, 1), 255, dtype=np.uint8)
            image[4 * j : 4 * j + 3] = 0
            image[:, :i] = 60
            split = glyphs.split_of(style, f"sign {j}", set(), letters=False)
            split = glyphs.HELD_OUT_CHARACTERS if j == 7 else split
            found.append(Record(image, (f"{style} sign {j}",), f"sign {j}", split))
    return found


@pytest.fixture
def styles(monkeypatch):
    monkeypatch.setattr(glyphs, "records", draw_styles)
    monkeypatch.setattr(vision_gpt, "ASKED", 20)
    return [*SMALL.split(), "--model.patch-size", 16, "--data.cache", "cache"]


def test_rows_are_captions_and_questions_by_seed_and_step(styles):
    words = [*COMMON, *styles, "--train.batch-size", 64]
    data = train.read_arguments(list(map(str, words)))[2].open_data()
    asked = [question.name for question in data.questions[TRAIN]]
    assert asked == ["caption", "which family?", "what style?", "is it bold?", "is it italic?"]
    kinds = np.concatenate([data.kinds_of(step) for step in range(50)])
    shares = np.bincount(kinds, minlength=5) / len(kinds)
    assert shares == pytest.approx([0.75, *[0.0625] * 4], abs=0.02)
    batch = data.batch(3)
    assert batch["images"].shape == (64, 1, 1, 32, 32)
    texts = []
    for tokens, mask in zip(batch["tokens"], batch["mask"]):
        assert (tokens[1:5] == 257).all() and not (tokens[5:] == 257).any()
        texts.append(data.tokenizer.decode(tokens[5:][tokens[5:] != 256].tolist()))
        counted = data.tokenizer.decode(tokens[1:][mask].tolist())
        question = next((name for name in asked if texts[-1].startswith(name)), "")
        assert texts[-1] == question + counted.partition("<")[0]
    assert len({text.partition("?")[0] for text in texts if "?" in text}) == 4
    assert any(re.fullmatch(r"is it italic\? (yes|no)", text) for text in texts)
    assert all(re.fullmatch(r"sign \d", text) for text in texts if "?" not in text)
    part = data.batch(3, slice(10, 20))
    width = part["tokens"].size(1)
    assert torch.equal(part["tokens"], batch["tokens"][10:20, :width])
    assert torch.equal(part["images"], batch["images"][10:20])


def test_questions_are_asked_on_test_beside_the_commonest_answer(styles, capsys):
    few = ["--train.steps", 4, "--train.eval-every", 0, "--out", "styles"]
    assert call(train, *COMMON, *styles, *few) == 0
    capsys.readouterr()
    assert call(evaluate, "styles", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    fonts = scores["held-out fonts: is it bold?"]
    assert set(fonts) == {"untrained", "reached", "commonest answer"}
    assert fonts["commonest answer"] == 0  # in training most are not bold, here all are
    characters = scores["held-out characters: what style?"]
    assert characters["commonest answer"] == pytest.approx(1 / 3)  # no bold italic
    sheet = Path("styles/samples/step-000004.png")
    assert sheet.is_file()
    assert call(sample, "styles", "--image", sheet, "--prompt", "which family?") == 0
    assert capsys.readouterr().out.startswith(f"{sheet}: ")
    message = refusal(capsys, sample, "styles", "--image", sheet, "--prompt", "how old?")
    assert "give one of 'which family?', 'what style?'" in message


# ---- several pictures in a row ------------------------------------------------------------------

PLACES = "\0" * 4
END = "\1"
TWO = """--data.pictures 2 --data.compare 0.3 --data.questions 0.4 --model.gpt.context-length 96
--train.batch-size 64"""


def letters(tokens) -> str:
    return "".join(chr(i) if i < 256 else {256: "\1", 257: "\0"}[i] for i in tokens.tolist())


def style_and_name(image) -> tuple[str, str]:
    """Those of a picture of draw_styles, from its pixels."""
    pixels = (image[0] + 1) * 127.5
    style = list(glyphs.FILES)[int((pixels[-1] - 60).abs().lt(1).sum())]
    return style, f"sign {int(pixels[:, -1].argmin()) // 4}"


def expected(images) -> dict[str, str]:
    """{row: what counts in it} for all that may be asked about two pictures."""
    (style, name), (other_style, other_name) = map(style_and_name, images)
    asked = [glyphs.answers(f"{style} {name}", name)]
    asked.append(glyphs.answers(f"{other_style} {other_name}", other_name))
    rows = {f"{PLACES}{name}{END}{PLACES}{other_name}": f"{name}{END}{other_name}{END}"}
    for question in asked[0]:
        one, other = (answers[question] for answers in asked)
        rows[f"{PLACES}{one}{END}{PLACES}{other}"] = f"{one}{END}{other}{END}"
        told = f"{PLACES}{question} {one}{END}{PLACES}{question} {other}"
        rows[told] = f" {one}{END} {other}{END}"
    alike = {"character": name == other_name, "family": style.split()[0] == other_style.split()[0]}
    for word, is_alike in alike.items():
        answer = "yes" if is_alike else "no"
        rows[f"{PLACES}{PLACES}same {word}? {answer}"] = f" {answer}{END}"
    return rows


def test_rows_of_two_pictures_have_their_texts_or_a_question_about_both(styles):
    run = train.read_arguments(list(map(str, [*COMMON, *styles, *TWO.split()])))[2]
    data = run.open_data()
    found = []
    for step in range(4):
        batch = data.batch(step)
        assert batch["images"].shape == (64, 2, 1, 32, 32)
        for images, tokens, mask in zip(batch["images"], batch["tokens"], batch["mask"]):
            row = letters(tokens).strip(END)
            assert letters(tokens[1:][mask]) == expected(images)[row]
            found.append(row)
    both = [row for row in found if row.startswith(2 * PLACES)]
    told = [row for row in found if row.count("?") == 2]
    names = [row for row in found if "sign" in row]
    shares = [len(rows) / len(found) for rows in (both, told, names)]
    assert shares == pytest.approx([0.3, 0.2, 0.3], abs=0.08)  # the others are told by example
    assert np.mean([row.endswith("yes") for row in both]) == pytest.approx(0.5, abs=0.2)

    # A part of a batch is that part, and parts have the loss of the whole.
    model = run.build_model()
    part = data.batch(3, slice(10, 20))
    width = part["tokens"].size(1)
    assert torch.equal(part["tokens"], batch["tokens"][10:20, :width])
    assert torch.equal(part["images"], batch["images"][10:20])
    losses = [model.loss(data.batch(3, slice(i, j))) for i, j in ((0, 64), (0, 7), (7, 64))]
    (whole, all_), *parts = [(loss.item(), int(metrics["weight"])) for loss, metrics in losses]
    assert all_ == sum(weight for _, weight in parts)
    assert whole == pytest.approx(sum(x * weight for x, weight in parts) / all_, rel=1e-5)


def test_evaluate_and_sample_ask_about_two_pictures(styles, capsys):
    few = ["--train.steps", 2, "--train.eval-every", 0, "--out", "two"]
    assert call(train, *COMMON, *styles, *TWO.split(), *few) == 0
    capsys.readouterr()
    assert call(evaluate, "two", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["held-out fonts: same family?"]["commonest answer"] == pytest.approx(0.5, abs=0.3)
    by_example = scores["held-out characters: what style? by 1 example"]
    assert by_example["commonest answer"] == pytest.approx(1 / 3)
    assert set(by_example) == {"untrained", "reached", "commonest answer"}
    sheet = str(next(Path("two/samples").iterdir()))
    look = [sample, "two", "--image", sheet, sheet]
    for more in (["--prompt", "same family?"], ["--texts", "sans"]):
        assert call(*look, *more) == 0
        assert capsys.readouterr().out.startswith(f"{sheet} {sheet}: ")
    message = refusal(capsys, sample, "two", "--image", sheet, "--prompt", "same family?")
    assert "is about two pictures" in message and "--image FILE FILE" in message
    assert call(*look, sheet, "--texts", "sans", "mono") == 0
    assert "training had 2 in a row" in capsys.readouterr().err


def test_an_exam_by_examples_has_training_pictures_of_the_same_question(styles):
    data = train.read_arguments(list(map(str, [*COMMON, *styles, *TWO.split()])))[2].open_data()
    rows = np.arange(5)
    exam = data.exam(glyphs.HELD_OUT_CHARACTERS, 2, rows, shots=1)  # what style?
    assert exam.images.shape == (5, 2, 1, 32, 32)
    for images, texts, answer in zip(exam.images, exam.texts, exam.answers):
        seen = [style_and_name(torch.tensor(image) / 127.5 - 1) for image in images]
        styles_seen = [glyphs.answers(" ".join(own), own[1])["what style?"] for own in seen]
        assert styles_seen == [texts[0], answer] and texts[1] == ""
        assert seen[0][1] != "sign 7" == seen[1][1]
    same = data.exam(glyphs.HELD_OUT_CHARACTERS, 2, rows[3:], shots=1)
    assert np.array_equal(same.images, exam.images[3:])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pictures": 0}, r"--data\.pictures 0: it must be at least 1"),
        ({"compare": -0.1}, r"--data\.compare -0\.1: it must"),
        ({"compare": 0.6, "questions": 0.5}, "more than all rows"),
        ({"compare": 0.1, "path": "mine"}, "not about mine: leave it out"),
    ],
)
def test_rows_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        SeenConfig(**values)


def test_a_context_without_room_for_an_answer_is_refused(styles, capsys):
    words = [*COMMON, *styles, "--model.gpt.context-length", 14, "--data.pictures", 3, "--out", "x"]
    assert "3 pictures of 4 tokens" in (message := refusal(capsys, train, *words))
    assert "set --model.gpt.context-length 18 or more" in message
    words = [*COMMON, *styles, "--model.gpt.context-length", 15, "--out", "x"]
    assert "set --model.gpt.context-length 19 or more" in refusal(capsys, train, *words)
    words = [*COMMON, *styles, "--model.gpt.vocab-size", 257, "--out", "x"]
    assert "set --model.gpt.vocab-size 258" in refusal(capsys, train, *words)
    with pytest.raises(ValueError, match=r"--data\.questions 1: it must"):
        SeenConfig(questions=1)


# ---- actions ------------------------------------------------------------------------------------


def test_a_robot_is_told_what_to_do(monkeypatch, capsys):
    corridor.install(monkeypatch)
    monkeypatch.setattr(episodes, "PICTURED", 120)
    monkeypatch.setattr(episodes, "PLAYED", 3)
    words = ["actions", *TRAINING.split(), *SMALL.split(), "--model.gpt.context-length", 80]
    few = ["--train.steps", 4, "--train.eval-every", 0, "--out", "actions"]
    message = refusal(capsys, train, *words, "--model.image-size", 64, "--out", "x")
    assert "set --model.image-size 56 --model.channels 3" in message
    assert call(train, *words, *few) == 0
    capsys.readouterr()
    assert call(evaluate, "actions", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    for level in episodes.LEVELS:
        row = scores[f"success, {level}"]
        assert set(row) == {"reached", "expert", "random"}
    steps = scores["test: action"]
    assert steps["commonest answer"] > 0.3 and steps["untrained"] == 0
    look = ["actions", "--image", "pictures/0.png"]
    assert call(sample, *look, "--prompt", "go to the red ball") == 0
    assert "such as 'go to the red ball'" in refusal(capsys, sample, *look)


def test_the_policy_does_what_the_model_writes(monkeypatch):
    """A model that writes the expert's words reaches what the expert reaches."""
    corridor.install(monkeypatch)
    monkeypatch.setattr(episodes, "PLAYED", 3)
    monkeypatch.setattr(vision_gpt, "test_questions", lambda data: [])
    asked = []

    def write(model, tokenizer, images, missions, longest):
        asked.extend(mission for (mission,) in missions)
        assert images.shape == (len(missions), 1, 3, 56, 56)
        return ["forward"] * len(missions)

    monkeypatch.setattr(vision_gpt, "write", write)
    run = train.read_arguments(["actions"])[2]
    data = SimpleNamespace(tokenizer=None, longest=3)
    found = run.measure(SimpleNamespace(model=None), None, data, None)
    ahead = episodes.results(lambda running: ["forward"] * len(running))
    assert found == {game: np.mean(own) for game, own in ahead.items()}
    assert asked[0].startswith("go to the ")


def test_an_absent_package_is_one_command(capsys, monkeypatch):
    monkeypatch.setattr(episodes, "PACKAGE", episodes.Installed("no-such-robot", "3.2", "MIT"))
    words = ["actions", "--data.cache", "cache", "--out", "x"]
    assert "pip install no-such-robot==3.2" in refusal(capsys, train, *words)


# ---- a GPT as the start --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer(folder, text):
    """A GPT with a spare id."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = [*SIZES.split(), "--data.path", text, "--data.cache", "cache"]
        assert call(train, *words, "--model.vocab-size", 258, "--out", "gpt") == 0
        assert call(train, *words, "--out", "full") == 0
    return "gpt"


def test_a_gpt_becomes_the_language_model(writer):
    words = ["vision-gpt", "--data.path", "pictures", "--data.cache", "cache"]
    words += ["--train.batch-size", 16, "--train.steps", 4, "--train.eval-every", 0]
    sizes = [*OWN.split(), "--model.image-width", 32]
    start = ["--init-from", writer, "--model.frozen", "--out", "frozen"]
    assert call(train, *words, *sizes, *start) == 0
    base = run_dir.open_run(writer)
    weights = base.model.state_dict()
    frozen = run_dir.open_run("frozen")
    assert_equal_weights(frozen.model.gpt, base.model)
    assert frozen.tokenizer.fingerprint() == base.tokenizer.fingerprint()
    # What sees is trained first, and then the whole.
    go_on = ["--init-from", "frozen", "--model.no-frozen", "--out", "whole"]
    assert call(train, *words, "--data.val-fraction", "0.4", *go_on) == 0
    whole = run_dir.open_run("whole").model
    assert whole.config.image_width == 32
    assert not whole.gpt.head.weight.equal(weights["head.weight"])


def test_starts_that_do_not_fit(writer, capsys):
    words = ["vision-gpt", "--data.cache", "cache", *OWN.split(), "--out", "x"]
    cases = {
        ("--init-from", "full"): "train that with --model.vocab-size 258",
        ("--init-from", writer, "--adapt", "lora"): "use --model.frozen",
        ("--init-from", writer, "--model.gpt.n-layer", 5): "sizes come from gpt",
        ("--model.frozen",): "add --init-from RUN",
    }
    for given, message in cases.items():
        assert message in refusal(capsys, train, *words, *given)
    wrong = ["gpt", "--init-from", "run", "--out", "x"]
    assert "is a run of family vision-gpt, not gpt" in refusal(capsys, train, *wrong)
