"""Labelled examples: tables, folders, the offline tasks, splits, batches, and mistakes."""

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import glyphs, labelled, packages, scripts, stdlib
from data.pictures import Record
from data.report import Report
from data.splits import SPLITS, overlap_of
from tinyfm.batches import labelled as tasks
from tinyfm.batches.labelled import TaskConfig, hold_out, stratified
from tinyfm.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def reviews(tmp_path: Path, n: int = 30, name: str = "reviews.csv") -> Path:
    """n texts of 5 to 14 bytes, a third of them good, each with a topic as well."""
    mark = "\t" if name.endswith("tsv") else ","
    lines = [mark.join(("text", "label", "topic"))]
    for i in range(n):
        text = f"text{i}" + "!" * (i % 9)
        label = "good" if i % 3 == 0 else "bad"
        topic = "sea" if i // 15 % 2 == 0 else "sky"
        lines.append(mark.join((text, label, topic)))
    return write(tmp_path / name, "\n".join(lines) + "\n")


def open_texts(path, length=12, batch_size=4, seed=0, **config) -> tasks.TaskData:
    return tasks.texts(TaskConfig(str(path), **config), BYTES, length, batch_size, seed)


# ---- splits and samples of labels ---------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.integers(0, 9))
def test_each_prefix_has_every_class_in_proportion(column, seed):
    labels = np.array(column)[:, None]
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = stratified(labels, order)
    assert sorted(chosen) == list(range(len(labels)))
    counts = Counter(column)
    for size in range(len(labels) + 1):
        taken = Counter(column[i] for i in chosen[:size])
        assert len(taken) == min(size, len(counts))
        for name, count in counts.items():
            exact = count * size / len(labels)
            assert abs(taken[name] - exact) <= max(2, len(counts))


def test_the_held_out_share_depends_on_content_alone():
    names = [("a",)] * 20 + [("b",)] * 10
    keys = [f"text {i}" for i in range(30)]
    split = hold_out(names, keys, 0.4)
    assert Counter(zip(names, split)) == {
        (("a",), "train"): 12,
        (("a",), "val"): 4,
        (("a",), "test"): 4,
        (("b",), "train"): 6,
        (("b",), "val"): 2,
        (("b",), "test"): 2,
    }
    mixed = np.random.default_rng(0).permutation(30)
    again = hold_out([names[i] for i in mixed], [keys[i] for i in mixed], 0.4)
    assert again == [split[i] for i in mixed]
    least = hold_out([("a",), ("a",), ("b",)], ["x", "y", "z"], 0.01)
    assert sorted(least) == ["test", "train", "val"]


# ---- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_all_forms_of_tables_give_the_same_rows(tmp_path, form):
    rows = [('a, "quoted" text', "1"), ('" a quote in front', "2"), ("naïve", "1")]
    if form == "jsonl":
        text = "\n".join(json.dumps({"text": t, "label": int(k)}) for t, k in rows)
    elif form == "tsv":  # without quoting
        text = "\n".join(["label\ttext", *(f"{k}\t{t}" for t, k in rows)])
    else:
        quoted = ['"' + t.replace('"', '""') + '"' for t, _ in rows]
        text = "\n".join(["label,text", *(f"{k},{q}" for q, (_, k) in zip(quoted, rows))])
    report = Report()
    found = labelled.text_rows(write(tmp_path / f"t.{form}", text), report)
    assert [(row.source, *row.labels) for row in found] == rows
    assert str(report) == "3 found, 3 used"


def test_rows_that_cannot_be_used_are_listed(tmp_path):
    text = "text,label\none,a\n,a\ntwo,\nthree\nfour,five,six\none,a\none,b\nseven, b \n"
    report = Report()
    found = labelled.text_rows(write(tmp_path / "t.csv", text), report)
    assert found == [("one", ("a",)), ("seven", ("b",))]
    assert (report.found, report.used) == (8, 2)
    assert report.skipped == {
        "not as many cells as the header": ["t.csv:5", "t.csv:6"],
        "no text": ["t.csv:3"],
        "no label": ["t.csv:4"],
        "the same text as a row before": ["t.csv:7"],
        "the same text as a row before, with another label": ["t.csv:8"],
    }
    lines = '{"text": "a", "label": true}\nnot json\n{"text": "b", "label": ["c"]}\n[1]\n'
    lines += '{"text": "d", "label": false}\n'
    report = Report()
    found = labelled.text_rows(write(tmp_path / "t.jsonl", lines), report)
    assert found == [("a", ("True",)), ("d", ("False",))]
    assert sorted(chain(*report.skipped.values())) == ["t.jsonl:2", "t.jsonl:3", "t.jsonl:4"]


def test_mistakes_in_tables_name_the_fix(tmp_path):
    table = reviews(tmp_path)
    for config, message in [
        ({"label_columns": ("stars",)}, "no column 'stars', its columns are 'text', 'label', 'top"),
        ({"input_column": "body"}, "no column 'body', .*--data.input-column"),
        ({"label_columns": ("text",)}, "3 classes of 'text' .*each needs two examples"),
        ({"labels": 99}, "--data.labels 99 of 27 training examples: use at most 27"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_texts(table, **config)
    for text, message in [
        ("text,label\n", "no row below its header"),
        ("text,label\na,\nb,\n", "0 labelled examples, need 2.*2 skipped: no label"),
        ("text,label\na,x\nb,y\n", "2 labelled examples, need 3"),
        ("text,label\na,x\nb,x\nc,x\n", "all labels of 'label' are 'x': need two"),
        ('text,label\n"a,x\nb,y\n', "cannot be read: lines 2 to 4?.: a quote"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_texts(write(tmp_path / "bad.csv", text))
    write(tmp_path / "a.txt", "text")
    for path in ("a.txt", "missing.csv"):
        with pytest.raises(ValueError, match="not a file of labelled texts: give a"):
            open_texts(tmp_path / path)
    with pytest.raises(ValueError, match="scripts are pictures, the model reads text: packages"):
        open_texts("scripts")
    with pytest.raises(ValueError, match="packages are texts, the model reads scripts or char"):
        tasks.pictures(TaskConfig("packages"), 32, 1, 4, 0)


@pytest.mark.parametrize(
    "config",
    [
        {"path": ""},
        {"label_columns": ()},
        {"label_columns": ("a", "a")},
        {"labels": -1},
        {"val_fraction": 0},
    ],
)
def test_bad_configs_are_refused(config):
    with pytest.raises(ValueError, match="--data"):
        TaskConfig(**config)


def test_a_class_of_one_row_stays_in_training(tmp_path):
    rows = "".join(f"text {i},{'rare' if i == 4 else 'ab'[i % 2]}\n" for i in range(40))
    data = open_texts(write(tmp_path / "t.csv", "text,label\n" + rows))
    assert data.classes == {"label": ("a", "b", "rare")}
    assert 2 not in data.labels["val"] and 2 not in data.labels["test"]


def test_near_duplicates_are_left_out_before_the_split(tmp_path):
    rng = np.random.default_rng(0)
    lines = []
    for i in range(30):
        words = [f"w{n}" for n in rng.integers(10_000, size=60)]
        lines.append(f"{' '.join(words)},{'ab'[i % 2]}")
        lines.append(f"{' '.join(words[:-1]).upper()}!,{'ab'[i % 2]}")
        lines.append(f"word {i},{'ab'[i % 2]}")
    table = write(tmp_path / "t.csv", "text,label\n" + "\n".join(lines) + "\n")
    data = open_texts(table, length=400)
    assert sum(map(len, data.labels.values())) == 60  # short texts are compared as they are
    assert "30 skipped: a near duplicate of a text before" in data.description


# ---- batches ------------------------------------------------------------------------------------


def test_batches_of_text(tmp_path):
    data = open_texts(reviews(tmp_path), label_columns=("label", "topic"))
    assert data.classes == {"label": ("bad", "good"), "topic": ("sea", "sky")}
    assert (data.unit, data.units_per_row, data.metrics(1.0)) == ("texts", 1, {})
    known = {f"text{i}" + "!" * (i % 9): i for i in range(30)}
    for batch in (data.batch(0), *data.val_batches(2)):
        assert batch["tokens"].shape == batch["mask"].shape
        assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64
        for tokens, mask, labels in zip(*batch.values()):
            text = BYTES.decode(tokens[mask].tolist())
            (i,) = {i for whole, i in known.items() if whole[:12] == text}
            assert labels.tolist() == [int(i % 3 == 0), i // 15]
            assert (tokens[~mask] == BYTES.eot).all()
            assert mask.sum() == min(12, len(text)) and mask[: len(text)].all()
        assert batch["mask"].any(0).all()  # no longer than the longest row


def test_an_epoch_reads_each_example_once_and_a_batch_is_a_function_of_seed_and_step(tmp_path):
    data = open_texts(reviews(tmp_path), batch_size=9)

    def text(batch):
        pairs = zip(batch["tokens"], batch["mask"])
        return [BYTES.decode(tokens[mask].tolist()) for tokens, mask in pairs]

    epoch = [*chain(*(text(data.batch(step)) for step in range(3)))]
    assert len(set(epoch)) == 27
    assert set(chain(*(text(data.batch(step)) for step in range(3, 6)))) == set(epoch)
    assert text(data.batch(1)) != text(data.batch(4))
    again = open_texts(tmp_path / "reviews.csv", batch_size=9)
    assert text(again.batch(4)) == text(data.batch(4))
    parts = text(data.batch(4, slice(0, 4))) + text(data.batch(4, slice(4, 9)))
    assert parts == text(data.batch(4))
    assert text(open_texts(tmp_path / "reviews.csv", batch_size=9, seed=1).batch(4)) != parts
    held_out = [*chain(*(text(batch) for batch in data.val_batches(2)))]
    held_out += chain(*(text(batch) for batch in data.split_batches("test", 2)))
    assert len(set(held_out)) == 3
    assert not set(held_out) & set(epoch)
    assert again.fingerprint == data.fingerprint
    assert open_texts(tmp_path / "reviews.csv", length=9).fingerprint != data.fingerprint


def test_few_labels(tmp_path):
    path = reviews(tmp_path, 200)
    data = open_texts(path, labels=9, batch_size=4)
    seen = Counter()
    for step in range(9):
        batch = data.batch(step)
        seen.update(map(tuple, batch["tokens"].tolist()))
    assert len({tuple(t for t in row if t != BYTES.eot) for row in seen}) == 9
    assert np.bincount(data.labels["train"][data.chosen][:, 0]).tolist() == [6, 3]
    assert list(data.chosen) != list(open_texts(path, labels=9, seed=1).chosen)
    whole = open_texts(path)
    for split in ("val", "test"):
        assert np.array_equal(whole.labels[split], data.labels[split])
    assert "9 of 180 training, 10 validation and 10 test texts" in data.description


def test_baselines_without_a_model(tmp_path):
    data = open_texts(reviews(tmp_path, 300), label_columns=("label", "topic"))
    share = np.mean([batch["labels"][0, 0] == 0 for batch in data.split_batches("test", 1)])
    lines = data.baselines()
    assert lines["label"] == {"chance": 0.5, "commonest": pytest.approx(share)}
    assert 0.6 < share < 0.73
    assert f"accuracy by chance 50.0%, of always the most common class {share:.1%}" in (
        data.description
    )


# ---- pictures -----------------------------------------------------------------------------------


def draw(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def open_pictures(path, tmp_path, size=8, channels=1, **config) -> tasks.TaskData:
    config = TaskConfig(str(path), cache=str(tmp_path / "cache"), **config)
    return tasks.pictures(config, size, channels, 4, 0)


def test_pictures_of_folders_and_of_a_table_are_the_same(tmp_path, capsys):
    lines = ["image,label"]
    for i in range(20):
        name = ("cat", "hot_dog")[i % 2]
        draw(tmp_path / "pets" / name / f"{i}.png", i)
        lines.append(f"pets/{name}/{i}.png,{name.replace('_', ' ')}")
    write(tmp_path / "pets" / "cat" / "broken.png", "no picture")
    draw(tmp_path / "pets" / "cat" / "again.png", 0)
    folder = open_pictures(tmp_path / "pets", tmp_path, val_fraction=0.5)
    assert "not an image in one of the formats" in folder.description
    assert "1 skipped: the same picture as one before" in folder.description
    lines.append("pets/cat/missing.png,cat")
    table = write(tmp_path / "t.csv", "\n".join(lines))
    table = open_pictures(table, tmp_path, val_fraction=0.5)
    assert "No such file" in table.description
    for data in (folder, table):
        assert data.classes == {"label": ("cat", "hot dog")}
        assert data.unit == "images"
        batch = data.batch(0)
        assert batch["images"].shape == (4, 1, 8, 8)
        assert -1 <= batch["images"].min() < -0.5 < 0.5 < batch["images"].max() <= 1
        counts = [len(data.labels["train"])]
        for split in ("val", "test"):
            counts.append(sum(len(batch["labels"]) for batch in data.split_batches(split, 3)))
            assert counts[-1] == len(data.labels[split]) == len(set(data.clusters[split]))
        assert sum(counts) == 20 and min(counts) >= 3
    capsys.readouterr()
    again = open_pictures(tmp_path / "pets", tmp_path, val_fraction=0.5)
    assert again.fingerprint == folder.fingerprint
    assert capsys.readouterr().out == ""  # it was there
    colored = open_pictures(tmp_path / "pets", tmp_path, channels=3, val_fraction=0.5)
    assert colored.batch(0)["images"].size(1) == 3


def test_a_picture_near_to_one_of_another_split_is_left_out(tmp_path):
    rows = []
    for i in range(12):
        pixels = np.random.default_rng(i).integers(1, 255, (8, 8, 3), dtype=np.uint8)
        for twin in range(2):
            path = tmp_path / f"{i}-{twin}.png"
            Image.fromarray(pixels + np.uint8(twin)).save(path)
            rows.append(labelled.Row(str(path), ("ab"[i % 2],)))
    report = Report()
    splits = ["train", "test"] * 6 + ["train", "train"] * 6
    found = list(labelled.records(rows, splits, 8, 3, report))
    assert Counter(record.split for record in found) == {"train": 18}
    assert len(report.skipped["nearly the same as a picture of another split"]) == 6


def test_classes_in_folders_named_for_splits(tmp_path):
    """Each picture is in the split of its folder; a split without a folder is drawn from train."""
    own = tmp_path / "own"
    for i in range(24):
        draw(own / "train" / "ab"[i % 2] / f"{i}.png", i)
        if i < 6:
            draw(own / "test" / "ab"[i % 2] / f"{i}.png", 100 + i)
    draw(own / "train" / "loose.png", 50)
    draw(own / "train" / "a" / "copy.png", 100)  # of a test picture
    data = open_pictures(own, tmp_path, val_fraction=0.5)
    assert data.classes == {"label": ("a", "b")}
    assert {split: len(labels) for split, labels in data.labels.items()} == {
        "train": 18, "val": 6, "test": 6,
    }  # fmt: skip
    for i in range(24, 28):
        draw(own / "validation" / "ab"[i % 2] / f"{i}.png", i)
    data = open_pictures(own, tmp_path)
    assert {split: len(labels) for split, labels in data.labels.items()} == {
        "train": 24, "val": 4, "test": 6,
    }  # fmt: skip


def test_each_picture_keeps_its_labels(tmp_path):
    """The grey value of a picture is the number that its two labels make."""
    lines = ["path,tens,ones"]
    for i in range(40):
        Image.fromarray(np.full((8, 8), 5 * i, np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,t{i // 10},o{i % 10}")
    table = write(tmp_path / "t.csv", "\n".join(lines))
    data = open_pictures(table, tmp_path, label_columns=("tens", "ones"))
    for batch in (data.batch(0), *data.val_batches(4)):
        numbers = ((batch["images"][:, 0, 0, 0] + 1) * 127.5 / 5).round().long()
        assert torch.equal(batch["labels"], torch.stack((numbers // 10, numbers % 10), 1))


def test_mistakes_in_pictures_name_the_fix(tmp_path):
    draw(tmp_path / "pets" / "cat" / "1.png", 1)
    with pytest.raises(ValueError, match="1 labelled example, need 2"):
        open_pictures(tmp_path / "pets", tmp_path)
    for i in (2, 3):
        draw(tmp_path / "pets" / "cat" / f"{i}.png", i)
    with pytest.raises(ValueError, match="all labels of 'label' are 'cat'"):
        open_pictures(tmp_path / "pets", tmp_path)
    with pytest.raises(ValueError, match="which gives one label"):
        open_pictures(tmp_path / "pets", tmp_path, label_columns=("a", "b"))
    with pytest.raises(ValueError, match="no folder with a folder for each class"):
        open_pictures(tmp_path / "nothing", tmp_path)
    with pytest.raises(ValueError, match=r"channels 2: use 1 \(grey\) or 3"):
        open_pictures(tmp_path / "pets", tmp_path, channels=2)
    table = write(tmp_path / "t.csv", "path,label\na.png,x\nb.png,y\nc.png,y\n")
    with pytest.raises(ValueError, match=r"no picture can be used: .*3 skipped: No such file"):
        open_pictures(table, tmp_path)


def test_the_names_of_picture_tasks_are_those_of_their_source():
    assert tasks.PICTURES == scripts.TASKS  # written twice, as scripts loads font libraries


# ---- the offline tasks --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def passages():
    report = Report()
    return packages.examples(report), str(report)


def test_packages_are_balanced_and_many(passages):
    found, report = passages
    counts = Counter((passage.labels[0], passage.split) for passage in found)
    names = {name for name, _ in counts}
    assert len(names) >= 15  # 18 in Python 3.11; 3.13 has no distutils, Debian's no idlelib
    assert {"json", "email", "unittest"} < names
    for (_, split), count in counts.items():
        assert count == packages.PER_CLASS[split]
    lengths = [len(passage.text) for passage in found]
    assert packages.LENGTH // 2 <= min(lengths) <= max(lengths) <= packages.LENGTH
    told = np.mean([bool(re.search(rf"\b{p.labels[0]}\b", p.text)) for p in found])
    assert f"{told:.0%} of passages contain their package's name" in report
    packages.read_library.cache_clear()
    again = Report()
    assert found == packages.examples(again) and report == str(again)


def test_no_file_of_a_package_is_in_two_splits(passages):
    found, _ = passages
    sources = packages.find_packages(stdlib.library_folder(), Report())
    files = {split: {p.source for p in found if p.split == split} for split in SPLITS}
    assert min(len(own) for own in files.values()) > 60
    assert not files["train"] & (files["val"] | files["test"]) and not files["val"] & files["test"]
    assert len({passage.text for passage in found}) == len(found)
    for passage in found[::20]:
        (label,) = passage.labels
        assert passage.text in sources[label][passage.source]


def test_no_held_out_passage_repeats_code_of_another_split(passages):
    found, report = passages
    texts = {split: [p.text for p in found if p.split == split] for split in SPLITS}
    for split, others in (("val", ["train"]), ("test", ["train", "val"])):
        known = [text for other in others for text in texts[other]]
        assert overlap_of(texts[split], known)[:, 0].sum() == 0
    assert "with a single file for validation or test" in report
    assert "passages not held out, as another split has their text" in report


def test_a_planted_copy_is_not_held_out():
    code = {name: [(f"{name} {' '.join(map(str, range(i, i + 20)))}", f"{name}.py")] for i, name in
            ((0, "a"), (100, "b"), (200, "c"))}  # fmt: skip
    copy = (f"as in a: {code['a'][0][0]}", "copy.py")
    parts = {"p": {"train": code["a"], "val": [copy, *code["b"]], "test": [*code["c"], copy]}}
    files = {"p": {split: {name: text for text, name in own} for split, own in parts["p"].items()}}
    assert packages.drop_copies(parts, files) == 2
    assert parts["p"] == {"train": code["a"], "val": code["b"], "test": code["c"]}


def test_passages_are_whole_lines():
    text = "".join(f"{i:03} " + "x" * 95 + "\n" for i in range(10)) + "\n" + "y" * 500 + "\n"
    found = list(packages.passages(text))
    assert found[0] == text[:400].strip("\n")
    assert [part[:3] for part in found] == [f"{i:03}" for i in range(8)]  # two lines are too few


def test_a_library_without_packages_is_refused(tmp_path):
    with pytest.raises(ValueError, match="too few packages"):
        packages.examples(root=tmp_path)


@pytest.fixture
def few_glyphs(monkeypatch):
    """A few letters of four scripts and two signs, drawn in all fonts that have them."""
    letters = "ABCΩΔΨЖЩЮאבג∑→"

    found = {}
    for style, file in glyphs.FILES.items():
        known = dict(glyphs.named_characters(file, Report()))
        for letter in letters:
            if letter in known:
                image = glyphs.draw(letter, file)
                caption = (f"{style} {known[letter]}",)
                found.setdefault(image.tobytes(), Record(image, caption, known[letter], ""))
    monkeypatch.setattr(glyphs, "records", lambda report: found.values())


def test_scripts_are_tested_in_fonts_that_training_does_not_see(few_glyphs, tmp_path):
    found = list(scripts.records("scripts"))
    assert {r.captions[0] for r in found} >= {"latin", "greek", "cyrillic", "hebrew"}
    train, val, test = ({r.image.tobytes() for r in found if r.split == split} for split in SPLITS)
    assert train and val and test and not train & val and not train & test and not val & test
    hebrew = Counter(r.split for r in found if r.captions[0] == "hebrew")
    assert hebrew == {"train": 6, "val": 3, "test": 3}  # sans, italic; bold; bold italic
    latin = Counter(r.split for r in found if r.captions[0] == "latin")
    assert latin == {"train": 30, "val": 9, "test": 9}  # of each letter ten fonts, and three
    data = open_pictures("scripts", tmp_path, size=16, channels=3)
    assert tuple(data.classes) == ("script",)
    fonts = {split: set(data.clusters[split]) for split in SPLITS}
    assert fonts["test"] == {"sans bold italic", "serif bold italic", "mono bold"}
    assert not fonts["test"] & (fonts["train"] | fonts["val"])
    assert data.batch(0)["images"].shape == (4, 3, 16, 16)


def test_each_script_has_at_most_its_share(few_glyphs, monkeypatch):
    monkeypatch.setattr(scripts, "PER_SCRIPT", 20)
    found = Counter(r.captions[0] for r in scripts.records("scripts") if r.split == "train")
    assert found["latin"] == found["greek"] == found["cyrillic"] == 20
    assert found["hebrew"] == 6


def test_characters_are_those_that_all_fonts_draw(few_glyphs, tmp_path):
    found = list(scripts.records("characters"))
    classes = {record.captions[0] for record in found}
    assert {"latin capital letter a", "greek capital letter omega"} < classes
    assert not any(name.startswith("hebrew") for name in classes)
    assert set(Counter(record.captions[0] for record in found).values()) == {16}
    data = open_pictures("characters", tmp_path, size=32)
    assert data.classes["character"] == tuple(sorted(classes))
    assert len(data.labels["train"]) == 10 * len(classes)


def test_scripts_are_read_off_names():
    assert scripts.script_of("greek small letter alpha with tonos") == "greek"
    assert scripts.script_of("canadian syllabics carrier hee") == "canadian syllabics"
    assert scripts.script_of("rightwards arrow") == "arrow"
    assert scripts.script_of("n-ary summation") == "mathematics"
    assert scripts.script_of("black chess king") == ""
