"""Pictures with captions: reading images, the user's pairs, prepared folders, batches, mistakes."""

import csv
import io
import json
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.Image import open as open_image
from transformers import CLIPImageProcessorPil

from data import captioned, glyphs, near, pictures
from data.download import sha256_of
from data.report import Report
from data.splits import SPLITS
from tinyfm import tokenizer
from tinyfm.batches import pair_files
from tinyfm.batches.order import shuffle_runs
from tinyfm.batches.pairs import PairConfig, PairData

ROOT = Path(__file__).parents[2]


def noise(height, width, channels=3, seed=0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def save(path: Path, seed: int, size: int = 8) -> Path:
    return write(path, encoded(Image.fromarray(noise(size, size, seed=seed))))


# --- Reading one image ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("shape", [(50, 50), (40, 71), (71, 40), (33, 200), (7, 9), (32, 33)])
def test_squares_are_those_of_clip(tmp_path, shape, size):
    image = noise(*shape)
    path = write(tmp_path / "a.png", encoded(Image.fromarray(image)))
    crop = {"height": size, "width": size}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size=crop, do_rescale=False, do_normalize=False
    )
    expected = processor(Image.fromarray(image))["pixel_values"][0]
    assert np.array_equal(pictures.read(path, size, 3).transpose(2, 0, 1), expected)


def test_grey_is_the_usual_mix_and_grey_files_fit_colour_models(tmp_path):
    image = noise(8, 8)
    path = write(tmp_path / "a.png", encoded(Image.fromarray(image)))
    with pytest.warns(UserWarning, match=r"a\.png is in colour, the model in grey: read as grey"):
        grey = pictures.read(path, 8, 1)
    assert grey.shape == (8, 8, 1)
    assert np.abs(grey[..., 0] - image @ [0.299, 0.587, 0.114]).max() <= 0.51
    write(path, encoded(Image.fromarray(grey[..., 0])))
    assert np.array_equal(pictures.read(path, 8, 1), grey)
    assert np.array_equal(pictures.read(path, 8, 3), np.repeat(grey, 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, orientation):
    upright = noise(8, 8)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    path = write(tmp_path / "a.png", encoded(image, exif=exif))
    assert np.array_equal(pictures.read(path, 8, 3), upright)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_pixels_become_white(tmp_path, mode):
    half = np.zeros((8, 8, 4), np.uint8)
    half[:4, :, 3] = 255  # black above, nothing below
    image, options = Image.fromarray(half), {}
    if mode == "RGB":
        half[4:, :, 0] = 7  # this colour means transparent
        image, options = Image.fromarray(half[..., :3].copy()), {"transparency": (7, 0, 0)}
    elif mode == "P":
        image, options = Image.fromarray(half[..., 3] // 255, "L").convert("P"), {"transparency": 0}
        image.putpalette([9, 9, 9, 0, 0, 0])
    path = write(tmp_path / "a.png", encoded(image.convert(mode), **options))
    pixels = pictures.read(path, 8, 3)
    assert pixels[:4].max() == 0
    assert pixels[4:].min() == 255


def test_deep_grey_is_scaled_not_clipped(tmp_path):
    deep = np.repeat(np.array([[0, 257, 32768, 40000]], np.uint16), 4, axis=0)
    for format in ("PNG", "TIFF"):
        path = write(tmp_path / "a.png", encoded(Image.fromarray(deep), format))
        assert pictures.read(path, 4, 1)[0, :, 0].tolist() == [0, 1, 128, 156]
    for top in (1.0, 2.0):  # floating point: white is 1, or the brightest pixel
        values = np.repeat(np.array([[0, np.nan, 0.5, top]], np.float32), 4, axis=0)
        path = write(tmp_path / "a.tif", encoded(Image.fromarray(values), "TIFF"))
        assert pictures.read(path, 4, 1)[0, :, 0].tolist() == [0, 0, round(127.5 / top), 255]


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_printers_ink_becomes_colour(tmp_path, format):
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # magenta and yellow: red
    path = write(tmp_path / "a", encoded(ink, format))
    red, green, blue = pictures.read(path, 8, 3)[4, 4]
    assert red > 250
    assert max(green, blue) < 5


def test_one_bit_and_every_format(tmp_path):
    path = write(tmp_path / "a", encoded(Image.new("1", (8, 8), 1)))
    assert pictures.read(path, 8, 1).min() == 255
    smooth = Image.linear_gradient("L").convert("RGB")
    for format in pictures.FORMATS:
        path = write(
            tmp_path / "mislabelled.png", encoded(smooth, format)
        )  # recognised by its content
        pixels = pictures.read(path, 256, 3).astype(int)
        assert np.abs(pixels - np.asarray(smooth, int)).max() <= 8, format


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        content = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        pixels, count = pictures.decode(write(tmp_path / "a", content), 8, 3)
        assert count == 3
        assert pixels[4, 4, 0] > 250
        assert pixels[4, 4, 1:].max() < 5


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    return start + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 0) + b"IDAT"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image in one of the formats PNG, JPEG"),
        (b"<html>not found</html>", "not an image"),
        (encoded(Image.fromarray(noise(64, 64)), "PPM"), "not an image"),
        (encoded(Image.fromarray(noise(64, 64)))[:2000], "truncated or damaged"),
        (encoded(Image.fromarray(noise(64, 64)), "JPEG")[:2000], "truncated or damaged"),
        (encoded(Image.fromarray(noise(64, 64)), "TIFF")[:2000], "truncated or damaged"),
        (png_header(9_000, 12_000), "more than 100,000,000 pixels"),  # Pillow would only warn
        (png_header(90_000, 90_000), "more than 100,000,000 pixels"),
        (png_header(0, 0), "no pixels|not an image|damaged"),
        (encoded(Image.new("L", (1, 60_000))), "too long for its width"),
    ],
)
def test_bad_images_are_refused_with_a_reason(tmp_path, content, reason):
    path = write(tmp_path / "bad.png", content)
    with pytest.raises(ValueError, match=rf"bad\.png cannot be used as an image: .*({reason})"):
        pictures.read(path, 224, 3)


def test_missing_images_and_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.png cannot be used .*: No such file"):
        pictures.read(tmp_path / "a.png", 8, 3)
    with pytest.raises(ValueError, match="cannot be used as an image"):
        pictures.read(tmp_path, 8, 3)


SEEDS = [
    encoded(Image.fromarray(noise(9, 9)).convert(mode), format)
    for mode, format in [
        ("RGB", "PNG"),
        ("P", "GIF"),
        ("RGB", "JPEG"),
        ("CMYK", "TIFF"),
        ("L", "BMP"),
        ("RGBA", "WEBP"),
    ]
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=9))
def test_any_bytes_give_a_picture_or_a_reason(tmp_path_factory, content, changes):
    damaged = bytearray(content)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    path = write(tmp_path_factory.getbasetemp() / "damaged", bytes(damaged))
    try:
        pixels, _ = pictures.decode(path, 8, 1)
    except ValueError as error:
        assert str(error)
    else:
        assert pixels.shape == (8, 8, 1)


def test_a_grid_of_pictures(tmp_path):
    images = noise(5 * 8, 8).reshape(5, 8, 8, 3)
    pictures.save_grid(images, tmp_path / "grid", 3)
    with open_image(tmp_path / "grid") as image:
        assert image.format == "PNG"
        pixels = np.asarray(image)
    assert pixels.shape == (2 * 65 + 1, 3 * 65 + 1, 3)  # each enlarged to 64 x 64
    assert np.array_equal(pixels[1:65:8, 66:130:8], images[1])
    assert np.array_equal(pixels[66:130:8, 66:130:8], images[4])
    titles = ["serif latin small letter a with circumflex and acute and more", "", "x", "y", "z"]
    pictures.save_grid(images[..., :1], tmp_path / "grid", 5, titles)
    with open_image(tmp_path / "grid") as image:
        pixels = np.asarray(image)
    left = [6 + 102 * i for i in range(5)]  # of each image of 96 pixels
    assert np.array_equal(pixels[-102:-6:12, 6:102:12, 0], images[0, :, :, 0])
    above = pixels[:-102, :, 0]
    white = [above[:, x : x + 96].max(axis=1) > 200 for x in left]  # rows with ink, by image
    assert white[0].any() and not white[1].any()  # a title, and none
    assert above[:, left[1] - 6 : left[1]].std() == 0  # it does not run into the next
    assert white[2].nonzero()[0].min() > len(above) - 14  # a short title is right above its image


# --- The user's own pairs -------------------------------------------------------------------------


def read_all(path, **options):
    report = Report()
    return list(captioned.records(path, 8, 3, report, **options)), report


def test_the_split_does_not_depend_on_captions_or_the_folder(tmp_path):
    """So an autoencoder and a CLIP of the same pictures hold out the same ones."""
    splits = []
    for name, template in (("a", captioned.TEMPLATE), ("b", "")):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(20):
            save(folder / f"{i}.png", i)
            (folder / f"{i}.txt").write_text(f"picture {i % 7}", encoding="utf-8")
        listed = captioned.pairs(folder, Report(), template)
        drawn = captioned.choose_splits(listed, 0.4)
        splits.append({path.name: split for path, split in drawn.items()})
    assert splits[0] == splits[1] and len(set(splits[0].values())) == 3


def test_a_text_file_next_to_each_image(tmp_path):
    save(tmp_path / "a.png", 0)
    write(tmp_path / "a.txt", "a first caption\r\n\n  and a second \n")
    save(tmp_path / "deep" / "b.JPG", 1)  # a PNG inside
    write(tmp_path / "deep" / "b.txt", "\ufeffünïcode")
    save(tmp_path / "deep" / "none.png", 2)
    save(tmp_path / ".hidden" / "c.png", 3)
    save(tmp_path / "._c.png", 3)
    save(tmp_path / "empty.png", 4)
    write(tmp_path / "empty.txt", " \n")
    write(tmp_path / "bad.png", "no image")
    write(tmp_path / "bad.txt", "a caption")
    records, report = read_all(tmp_path)
    captions = {record.captions: record.label for record in records}
    assert captions == {
        ("a first caption", "and a second"): "a first caption",
        ("ünïcode",): "ünïcode",
    }
    assert np.array_equal(records[0].image, noise(8, 8, seed=0))
    assert (report.found, report.used) == (5, 2)
    reasons = {why: [Path(name).name for name in names] for why, names in report.skipped.items()}
    (bad,) = (why for why in reasons if "not an image in one of the formats PNG, JPEG" in why)
    assert reasons.pop(bad) == ["bad.png"]
    assert reasons.pop("its caption: empty") == ["empty.png"]
    assert reasons == {"its caption: No such file or directory": ["none.png"]}
    assert report.notes == ["not read: 2 hidden"]


def test_folders_named_for_their_subject(tmp_path):
    for i in range(6):
        save(tmp_path / ("polar_bear" if i % 2 else "cat") / f"{i}.png", i)
    save(tmp_path / "loose.png", 9)
    records, report = read_all(tmp_path, template="one {} here")
    assert {r.captions: r.label for r in records} == {
        ("one cat here",): "cat",
        ("one polar bear here",): "polar bear",
    }
    assert report.skipped == {"no caption": [(tmp_path / "loose.png").as_posix()]}
    records, _ = read_all(tmp_path)
    assert records[0].captions == ("a picture of a cat",)


def table(folder, rows, kind) -> Path:
    path = folder / f"pairs.{kind}"
    if kind == "jsonl":
        return write(path, "\n".join(map(json.dumps, rows)) + "\n")
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["path", "image", "caption"])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables(tmp_path, kind):
    save(tmp_path / "pictures" / "a.png", 0)
    save(tmp_path / "b.png", 1)
    absolute = str(save(tmp_path / "elsewhere" / "c.png", 2))
    path = table(
        tmp_path,
        [
            {"path": "pictures/a.png", "caption": 'one, with "quotes"'},
            {"image": "b.png", "caption": "line\nbreak"},
            {"path": "pictures/a.png", "caption": "two"},
            {"path": absolute, "caption": "three"},
            {"path": "missing.png", "caption": "four"},
            {"path": "b.png", "caption": " "},
            {"caption": "five"},
        ],
        kind,
    )
    records, report = read_all(path)
    assert [r.captions for r in records] == [
        ('one, with "quotes"', "two"),
        ("line\nbreak",),
        ("three",),
    ]
    assert np.array_equal(records[0].image, noise(8, 8, seed=0))
    assert (report.found, report.used) == (6, 3)
    assert report.skipped["no path or no caption"] == [
        f"pairs.{kind}:{n}" for n in ((8, 9) if kind == "csv" else (6, 7))
    ]
    assert report.skipped["No such file or directory"] == [(tmp_path / "missing.png").as_posix()]


def test_odd_lines_of_a_jsonl_are_skipped(tmp_path):
    save(tmp_path / "a.png", 0)
    lines = ['{"path": "a.png", "caption": ["one", "two", 3]}', "{", "[]", '{"path": 1}', "7"]
    records, report = read_all(write(tmp_path / "pairs.jsonl", "\n".join(lines)))
    assert [r.captions for r in records] == [("one", "two")]
    assert sum(map(len, report.skipped.values())) == 4
    assert report.skipped["no path or no caption"] == ["pairs.jsonl:4"]
    assert (report.found, report.used) == (5, 1)


def test_mistakes_with_pairs_are_named_with_the_fix(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a folder .*\.csv, .*\.jsonl"):
        read_all(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no image with a caption in .*0 found"):
        read_all(tmp_path)
    save(tmp_path / "a.png", 0)
    with pytest.raises(ValueError, match=r"no caption .*put a text file .* next to each image"):
        read_all(tmp_path)
    path = write(tmp_path / "pairs.csv", "file,text\na.png,a caption\n")
    with pytest.raises(ValueError, match=r'no path or no caption .*columns "path" and "caption"'):
        read_all(path)
    path = write(tmp_path / "pairs.csv", "path,caption\na.png,größer\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"pairs\.csv cannot be read: UTF-16"):
        read_all(path)
    path = write(tmp_path / "pairs.csv", "path,caption\nmissing.png,a caption\n")
    with pytest.raises(ValueError, match=r"no image in .* can be used: 1 found, 0 used"):
        read_all(path)


def test_the_split_is_by_name_and_equal_pictures_stay_together(tmp_path):
    for top in ("here", "there"):
        for i in range(40):
            save(tmp_path / top / ("cat" if i % 2 else "dog") / f"{i}.png", i % 30)
    records, _ = read_all(tmp_path / "here", val_fraction=0.25)
    splits = [record.split for record in records]
    assert [r.split for r in read_all(tmp_path / "there", val_fraction=0.25)[0]] == splits
    held_out = [r for r in records if r.split != "train"]
    assert 4 <= len(held_out) <= 16
    assert {r.label for r in held_out} == {"cat", "dog"}
    sides = [{r.image.tobytes() for r in records if r.split == side} for side in SPLITS]
    assert all(sides)
    assert sum(map(len, sides)) == len(set().union(*sides)) == 30
    few = read_all(tmp_path / "here" / "cat" / "..")[0]
    assert [r.split for r in few].count("train") >= 32


def test_a_handful_of_pairs_has_two_for_validation_and_two_for_test(tmp_path):
    for count, expected in enumerate(
        ((1, 0, 0), (2, 0, 0), (1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2))
    ):
        save(tmp_path / "cat" / f"{count}.png", count)
        splits = [r.split for r in read_all(tmp_path)[0]]
        assert tuple(map(splits.count, SPLITS)) == expected


def test_animations_are_counted(tmp_path):
    frames = [Image.fromarray(noise(8, 8, seed=seed)) for seed in (0, 1)]
    write(
        tmp_path / "cat" / "a.gif",
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    )
    assert "1 with several frames or pages" in str(read_all(tmp_path)[1])


# --- Splits, links, suffixes ----------------------------------------------------------------------


def by_name(records, names) -> dict[str, set[str]]:
    """{split: file names}, by the content of the pictures: {name: seed}."""
    contents = {noise(8, 8, seed=seed).tobytes(): name for name, seed in names.items()}
    found = {}
    for record in records:
        found.setdefault(record.split, set()).add(contents[record.image.tobytes()])
    return found


@pytest.mark.parametrize("val", ["validation", "val", "valid", "dev", "Val"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_folders_named_for_splits_are_splits(tmp_path, val, kind):
    names = {}
    for split, count in (("train", 8), (val, 3), ("test", 4)):
        rows = []
        for i in range(count):
            name = f"{split}-{i}.png"
            names[name] = len(names)
            save(tmp_path / split / name, names[name])
            rows.append({"file_name": name, "text": f"caption of {name}"})
        metadata = tmp_path / split / f"metadata.{kind}"
        if kind == "jsonl":
            write(metadata, "\n".join(map(json.dumps, rows)))
        else:
            lines = [f"{row['file_name']},{row['text']}" for row in rows]
            write(metadata, "\n".join(["file_name,text", *lines]))
    records, report = read_all(tmp_path)
    expected = {"train": set(), "val": set(), "test": set()}
    for name in names:
        folder = name.rpartition("-")[0]
        expected[{val: "val"}.get(folder, folder)].add(name)
    assert by_name(records, names) == expected
    assert {r.captions for r in records} == {(f"caption of {name}",) for name in names}
    assert (report.found, report.used, report.notes) == (15, 15, [])


@pytest.mark.parametrize("test", ["test", "testing", "eval", "Evaluation"])
def test_a_folder_for_evaluation_is_not_trained_on(tmp_path, test):
    for i, split in enumerate(("train", "train", test)):
        save(tmp_path / split / "cat" / f"{i}.png", i)
    found = captioned.pairs(tmp_path, Report())
    assert [pair.split for pair in found if pair.path.parts[-3] == test] == ["test"]
    assert {pair.split for pair in found if pair.path.parts[-3] == "train"} == {""}


def test_a_split_without_a_folder_is_drawn_from_train(tmp_path):
    names = {f"{i}.png": i for i in range(23)}
    for i in range(20):
        save(tmp_path / "train" / ("cat" if i % 2 else "dog") / f"{i}.png", i)
    for i in range(20, 23):
        save(tmp_path / "test" / "dog" / f"{i}.png", i)
    save(tmp_path / "more" / "30.png", 30)
    records, report = read_all(tmp_path)
    found = by_name(records, names)
    assert found["test"] == {"20.png", "21.png", "22.png"}
    assert len(found["val"]) == 2 and len(found["train"]) == 18
    assert {r.captions for r in records} == {("a picture of a cat",), ("a picture of a dog",)}
    assert [*report.skipped] == ["beside the folders of the splits"]


def test_a_class_may_be_named_train(tmp_path):
    for i in range(8):
        save(tmp_path / ("train" if i % 2 else "bus") / f"{i}.png", i)
    assert {r.label for r in read_all(tmp_path)[0]} == {"train", "bus"}


def test_a_metadata_table_may_have_any_column_and_must_name_each_picture(tmp_path):
    for i in range(8):
        save(tmp_path / f"{i}.png", i)
    rows = [{"file_name": f"{i}.png", "note": f"number {i}"} for i in range(7)]
    rows += [{"file_name": "gone.png", "note": "gone"}, {"note": "whose?"}]
    write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    records, report = read_all(tmp_path)
    assert {r.captions for r in records} == {(f"number {i}",) for i in range(7)}
    skipped = {why: [Path(name).name for name in names] for why, names in report.skipped.items()}
    assert skipped == {"in a metadata table, but no picture": ["gone.png"], "no caption": ["7.png"]}
    assert (report.found, report.used) == (9, 7)
    assert "captions from the column 'note'" in report.notes
    assert any("1 row of metadata.jsonl" in note for note in report.notes)


def test_what_your_folders_hold_out_is_never_trained_on(tmp_path):
    """Training loses the copies, whatever their format; the other pictures stay where they are."""
    names = {f"{i}.png": i for i in range(12)}
    for i in range(8):
        save(tmp_path / "train" / f"{i}.png", i)
    for i in range(8, 12):
        save(tmp_path / ("val" if i % 2 else "test") / f"{i}.png", i)
    save(tmp_path / "train" / "copy.png", 9)
    slightly = (noise(8, 8, seed=10).astype(int) ^ 1).astype(np.uint8)
    write(tmp_path / "train" / "near.png", encoded(Image.fromarray(slightly)))
    for path in tmp_path.rglob("*.png"):
        label = {"copy": "another name", "near": "10"}.get(path.stem, path.stem)
        write(path.with_suffix(".txt"), label)
    records, report = read_all(tmp_path)
    assert {split: len(own) for split, own in by_name(records, names).items()} == {
        "train": 8, "val": 2, "test": 2,
    }  # fmt: skip
    ((why, lost),) = report.skipped.items()
    assert why == "nearly the same as a picture of another split"
    assert sorted(Path(path).name for path in lost) == ["copy.png", "near.png"]


def test_linked_folders_are_read_once_and_loops_are_refused(tmp_path):
    for i in range(3):
        save(tmp_path / "elsewhere" / "cat" / f"{i}.png", i)
        save(tmp_path / "own" / "dog" / f"{i}.png", 10 + i)
    (tmp_path / "own" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "own" / "again").symlink_to(tmp_path / "own" / "dog")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "own")
    (tmp_path / "own" / "dog" / "gone.png").symlink_to(tmp_path / "nothing.png")
    records, report = read_all(tmp_path / "own")
    assert sorted(r.label for r in records) == ["cat"] * 3 + ["dog"] * 3
    (note,) = report.notes
    assert "2 links to a folder that is read already" in note
    assert "1 links to nothing" in note


def test_every_suffix_of_a_picture_is_found_and_other_files_are_counted(tmp_path):
    content = encoded(Image.fromarray(noise(8, 8)), "JPEG")
    for suffix in (".jfif", ".jpe", ".JPG"):
        write(tmp_path / "cat" / f"a{suffix}", content)
    write(tmp_path / "cat" / "b.ppm", encoded(Image.fromarray(noise(8, 8)), "PPM"))
    write(tmp_path / "cat" / "c.heic", b"\0\0\0\x18ftypheic" + bytes(99))
    write(tmp_path / "cat" / "d.pdf", "a letter")
    write(tmp_path / "cat" / "README", "words")
    records, report = read_all(tmp_path)
    assert len(records) == 3
    reasons = {Path(name).name: why for why, names in report.skipped.items() for name in names}
    assert "not an image in one of the formats PNG" in reasons["b.ppm"]
    assert {*reasons} == {"b.ppm", "c.heic"}
    assert (report.found, report.used) == (5, 3)
    assert report.notes == ["not read: 1 .pdf, 1 without a suffix"]
    if "HEIF" not in pictures.readable():
        assert "pip install pillow-heif" in reasons["c.heic"]


def test_near_pictures_are_those_of_a_small_distance():
    """Against the formula, and summaries never miss a pair that is near."""
    random = np.random.default_rng(0)
    image = random.integers(60, 200, (40, 36, 3), dtype=np.uint8)
    for spread in (1, 2, 3, 4, 5, 6):
        moved = image.astype(int) + random.integers(-spread, spread + 1, image.shape)
        distance = np.abs(moved / 127.5 - image / 127.5).mean()
        moved = moved.astype(np.uint8)
        assert near.is_near(moved, [255 - image, image]) == (distance < near.NEAR)
        seen = near.Seen()
        seen.add(image, "a", "val")
        if distance < near.NEAR:
            assert seen.splits_near(moved, "a") == {"val"}
        assert seen.splits_near(moved, "b") == set()
        assert seen.splits_near(image, "b") == {"val"}  # equal, under another label
        assert seen.splits_near(255 - image, "a") == set()
        x = np.stack([moved, moved]).transpose(0, 3, 1, 2)
        train = np.stack([image, 255 - image]).transpose(0, 3, 1, 2)
        assert near.count_near(x, ["a", "b"], train, ["a", "b"]) == (distance < near.NEAR)
    assert near.SIDE < 36


# --- Prepared folders and batches -----------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """40 pictures of 10 kinds."""
    for i in range(40):
        save(tmp_path / "own" / f"kind_{i % 10}" / f"{i}.png", i)
    return tmp_path / "own"


def prepare(path, batch_size=8, seed=0, vocab_size=300, context_length=64, size=8, **config):
    config = {"tokenizer": "bytes", "cache": str(Path(path).parent / "cache")} | config
    config = PairConfig(path=str(path), **config)
    return PairData.prepare(config, size, 3, vocab_size, context_length, batch_size, seed)


def prepared(path) -> Path:
    (folder,) = (path.parent / "cache").iterdir()
    return folder


def test_the_fields_of_a_batch(own):
    data = prepare(own)
    batch = data.batch(0)
    assert {name: (x.dtype, len(x)) for name, x in batch.items()} == {
        "images": (torch.float32, 8),
        "tokens": (torch.int64, 8),
        "labels": (torch.int64, 8),
    }
    index = shuffle_runs(np.arange(8), 36, seed=0, length=1)
    originals = {f"a picture of a kind {i % 10}": set() for i in range(40)}
    for i in range(40):
        originals[f"a picture of a kind {i % 10}"].add(noise(8, 8, seed=i).tobytes())
    for row in range(8):
        text = data.tokenizer.decode(batch["tokens"][row][:-1].tolist())
        assert data.train.captions[index[row]] == [text]
        image = ((batch["images"][row] + 1) * 127.5).round().to(torch.uint8)
        assert image.permute(1, 2, 0).numpy().tobytes() in originals[text]
    assert batch["images"].min() >= -1
    assert batch["images"].max() <= 1
    assert batch["images"].max() - batch["images"].min() > 1.9
    assert (data.unit, data.units_per_row, data.metrics(1.0)) == ("images", 1, {})
    assert "36 train, 2 val, 2 test pictures of (3, 8, 8)" in data.description.replace("[", "(")


def test_labels_are_equal_where_captions_are(own):
    data = prepare(own, batch_size=36)
    batch = data.batch(2)
    texts = [data.tokenizer.decode(row.tolist()) for row in batch["tokens"]]
    same = [[a == b for b in texts] for a in texts]
    assert torch.equal(batch["labels"][:, None] == batch["labels"], torch.tensor(same))
    groups = {own[0]: group for own, group in zip(data.train.captions, data.train.groups)}
    assert all(groups[c[0]] == group for c, group in zip(data.val.captions, data.val.groups))


def test_tokens_end_with_the_end_token_and_are_no_longer_than_needed(tmp_path):
    for i in range(12):
        save(tmp_path / "own" / f"{i}.png", i)
        write(tmp_path / "own" / f"{i}.txt", "x" * (i + 1) + "\nnot this one, it is far too long")
    data = prepare(tmp_path / "own", batch_size=2, context_length=9)
    eot = data.tokenizer.eot
    for step in range(5):
        tokens = data.batch(step)["tokens"]
        lengths = (tokens != eot).sum(1)
        assert tokens.shape == (2, lengths.max() + 1)
        for row, length in zip(tokens, lengths):
            assert (row[length:] == eot).all()
            assert data.tokenizer.decode(row[:length].tolist()) == "x" * length
        assert lengths.max() <= 8
    manifest = json.loads(
        (prepared(tmp_path / "own") / "manifest.json").read_text(encoding="utf-8")
    )
    assert "4 captions cut to 9 tokens" in manifest["report"]
    assert [len(captions) for captions in data.train.captions] == [2] * len(data.train.captions)


def test_each_epoch_reads_every_picture_once_in_a_new_order(own):
    def order(steps, **options):
        data = prepare(own, batch_size=5, **options)  # 36 pictures: batches straddle epochs
        return [row.numpy().tobytes() for step in steps for row in data.batch(step)["images"]]

    drawn = order(range(36))
    epochs = [tuple(drawn[i : i + 36]) for i in range(0, 180, 36)]
    assert all(len(set(epoch)) == 36 for epoch in epochs)
    assert len(set(epochs)) == 5
    assert tuple(order(range(8), seed=1)[:36]) not in epochs


def test_a_batch_is_a_pure_function_of_seed_and_step(own):
    data, big = prepare(own, batch_size=4), prepare(own, batch_size=8)
    whole = big.batch(5)
    for world in (2, 4):
        rows = 8 // world
        parts = [big.batch(5, slice(r * rows, (r + 1) * rows)) for r in range(world)]
        for name in ("images", "labels"):
            assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    halves = torch.cat([data.batch(10)["images"], data.batch(11)["images"]])
    assert torch.equal(halves, whole["images"])
    assert torch.equal(big.batch(5)["tokens"], whole["tokens"])
    assert big.fingerprint == data.fingerprint


def test_validation_takes_full_batches_in_a_fixed_order(own):
    data = prepare(own, val_fraction=0.5)
    assert [*data.splits] == ["train", "val", "test"]
    for name in ("val", "test"):
        batches = list(data.split_batches(name, 4))
        assert [len(batch["labels"]) for batch in batches] == [4, 4]
        again = prepare(own, val_fraction=0.5, seed=5).split_batches(name, 4)
        assert all(torch.equal(a["images"], b["images"]) for a, b in zip(batches, again))
        (all_of_it,) = data.split_batches(name, 100)
        held_out = {image.tobytes() for image in data.splits[name].images}
        images = ((all_of_it["images"] + 1) * 127.5).round().to(torch.uint8).numpy()
        assert {image.tobytes() for image in images} == held_out
        assert len(held_out) == len(data.splits[name].labels) == 10
    (batch,) = data.val_batches(100)
    assert torch.equal(batch["images"], next(data.split_batches("val", 100))["images"])


def test_fewer_pictures_than_neighbours_are_all_read(own, tmp_path):
    config = PairConfig(path=str(own), cache=str(tmp_path), tokenizer="bytes", neighbours=64)
    data = PairData.prepare(config, 8, 1, 257, 32, 36, 0)
    assert sorted(data.rows_of(5, slice(None)).tolist()) == [*range(36)]


def test_glyphs_are_a_source(tmp_path, monkeypatch, capsys):
    families = ("mono", "serif")
    fonts = {s: file for s, file in glyphs.FILES.items() if s.startswith(families)}
    monkeypatch.setattr(glyphs, "FILES", fonts)
    config = PairConfig(cache=str(tmp_path), tokenizer="bpe")
    data = PairData.prepare(config, 32, 1, 1000, 32, 64, 0)
    assert [*data.splits] == [*glyphs.SPLITS]
    assert data.val is data.splits[glyphs.VAL]
    assert data.test is data.splits[glyphs.HELD_OUT_FONTS]
    counts = ", ".join(f"0 of {len(s.labels):,} in {n}" for n, s in [*data.splits.items()][1:])
    assert f"to a training picture of the same name: {counts}\n" in capsys.readouterr().out
    expected = {split: [] for split in glyphs.SPLITS}
    for record in glyphs.records():
        expected[record.split].append(record)
    for name, split in data.splits.items():
        assert split.images.shape == (len(expected[name]), 1, 32, 32)
        for i in range(0, len(split.labels), 50):
            assert np.array_equal(split.images[i, 0], expected[name][i].image[:, :, 0])
            assert split.captions[i] == list(expected[name][i].captions)
            assert split.labels[i] == expected[name][i].label
    assert data.batch(0)["images"].shape == (64, 1, 32, 32)
    with pytest.raises(ValueError, match=r"32 x 32 .* 64 x 64 in 3: set the .* image-size to 32"):
        PairData.prepare(config, 64, 3, 1000, 32, 64, 0)


# --- The cache ------------------------------------------------------------------------------------


def test_a_folder_is_used_again_until_something_changes(own, capsys):
    first = prepare(own)
    assert "40 found, 40 used" in capsys.readouterr().out
    assert prepare(own, batch_size=3).fingerprint == first.fingerprint
    assert capsys.readouterr().out == ""
    fingerprints = {first.fingerprint}
    for change in ({"val_fraction": 0.3}, {"template": "a {}"}, {"size": 9}):
        fingerprints.add(prepare(own, **change).fingerprint)
    save(own / "kind_1" / "1.png", 77)
    fingerprints.add(prepare(own).fingerprint)
    assert len(fingerprints) == 5
    prepare(own, context_length=9)
    assert len(list((own.parent / "cache").iterdir())) == 6  # and nothing half-done


def test_altered_files_are_refused_by_name(own):
    prepare(own, tokenizer="bpe", vocab_size=270)
    folder = prepared(own)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        good = file.read_bytes()
        for bad in (good[:-1], good[:2] + bytes([good[2] ^ 1]) + good[3:], None):
            if bad is None:
                file.unlink()
            else:
                file.write_bytes(bad)
            with pytest.raises(ValueError) as error:
                prepare(own, tokenizer="bpe", vocab_size=270)
            assert str(folder) in str(error.value), file.name
        file.write_bytes(good)
    prepare(own, tokenizer="bpe", vocab_size=270)


def test_a_manifest_that_exchanges_the_splits_is_refused(own):
    first = prepare(own).fingerprint
    path = prepared(own) / "manifest.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    rows = good["rows"]
    others = [name for name in rows if name != "train"]
    swapped = {name: rows[name] for name in (*others[:1], "train", *others[1:])}
    counts = dict(zip(rows, [*rows.values()][::-1]))
    for bad in (swapped, counts, {"train": rows["train"]} | {others[0]: -1}, {"train": "many"}):
        path.write_text(json.dumps(good | {"rows": bad}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"manifest\.json.*delete the folder"):
            prepare(own)
    path.write_text(json.dumps(good), encoding="utf-8")
    assert prepare(own).fingerprint == first


@pytest.mark.parametrize("value", [[], {"a": []}, None, True, "many", -1.5, 10**30, float("nan")])
def test_every_field_of_a_manifest_is_checked(own, value):
    prepare(own)
    path = prepared(own) / "manifest.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    name = next(iter(good["bytes"]))
    changes = [{field: value} for field in good if (field, value) != ("report", "many")]
    for field in ("bytes", "sha256", "rows"):
        key = "train" if field == "rows" else name
        changes.append({field: good[field] | {key: value}})
    changes += [{"image": [1, value, 16]}, {"image": [1, -16, -16]}, {"image": [0, 16, 16]}]
    for change in changes:
        path.write_text(json.dumps(good | change), encoding="utf-8")
        with pytest.raises(ValueError, match=r"delete the folder") as error:
            prepare(own)
        assert str(prepared(own)) in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"captions": "many"}, {"captions": [[7]]}, {"captions": [[]]}, {"labels": {"a": 1}},
        {"labels": [None]}, {"captions": []}, {"labels": ...},
    ],
)  # fmt: skip
def test_texts_of_another_shape_are_refused_by_name(own, change):
    """Also where their hash was altered with them."""
    prepare(own)
    folder = prepared(own)
    path = folder / "train.json"
    texts = json.loads(path.read_text(encoding="utf-8"))
    for field, value in change.items():
        if value is ...:
            del texts[field]
        else:
            texts[field] = value * len(texts[field]) if isinstance(value, list) else value
    path.write_text(json.dumps(texts), encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["bytes"]["train.json"] = path.stat().st_size
    manifest["sha256"]["train.json"] = sha256_of(path)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.json.*(captions|labels|rows)"):
        prepare(own)


def test_an_interrupted_build_leaves_nothing(own, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pair_files, "write_texts", interrupted)
        prepare(own)
    assert list((own.parent / "cache").iterdir()) == []
    prepare(own)


def test_two_builds_at_once_agree(own, monkeypatch):
    """The second waits for the first, and finds its folder."""
    real = pair_files.write_texts
    calls = []

    def slow(*arguments):
        calls.append(1)
        time.sleep(0.3)
        return real(*arguments)

    monkeypatch.setattr(pair_files, "write_texts", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(prepare, [own, own])
    assert first.fingerprint == second.fingerprint
    assert len(calls) == 1
    assert prepared(own).name.startswith("own-")


# --- Tokenizers and mistakes ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-unigram", "bpe"])
def test_a_vocabulary_that_the_captions_do_not_fill_is_made_smaller(own, capsys, kind):
    data = prepare(own, tokenizer=kind, vocab_size=5000)
    assert 257 < data.tokenizer.vocab_size < 400
    size = data.tokenizer.vocab_size
    assert f"the captions allow {size} tokens, not 5000" in capsys.readouterr().out
    ids = data.batch(0)["tokens"]
    assert data.tokenizer.decode(ids[0].tolist()).startswith("a picture of a kind")
    with pytest.raises(ValueError, match="vocab_size 100"):
        prepare(own, tokenizer=kind, vocab_size=100)


def test_the_tokenizer_learns_from_all_training_captions_only(own, monkeypatch):
    for path in own.rglob("*.png"):
        write(path.with_suffix(".txt"), f"caption of {path.stem}\nsecond of {path.stem}")
    seen = []

    def spy(kind, texts, size):
        seen.extend(texts)
        return tokenizer.ByteTokenizer()

    monkeypatch.setattr(tokenizer, "train", spy)
    data = prepare(own, tokenizer="bpe")
    assert seen == [caption for captions in data.train.captions for caption in captions]
    assert len(seen) == 72


def test_a_saved_tokenizer_is_used(own, tmp_path):
    first = prepare(own)
    first.tokenizer.save(tmp_path / "saved")
    data = prepare(own, tokenizer=str(tmp_path / "saved"))
    assert data.tokenizer.fingerprint() == first.tokenizer.fingerprint()
    with pytest.raises(ValueError, match=r"--model.vocab-size 257"):
        prepare(own, tokenizer=str(tmp_path / "saved"), vocab_size=256)


def test_captions_that_are_all_equal_are_warned_about(tmp_path):
    for i in range(8):
        save(tmp_path / "own" / "cat" / f"{i}.png", i)
    with pytest.warns(UserWarning, match="all captions are 'a picture of a cat'"):
        prepare(tmp_path / "own", batch_size=2, val_fraction=0.3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"val_fraction": 0.0}, "val-fraction 0.0"),
        ({"val_fraction": 1.0}, "val-fraction 1.0"),
        ({"val_fraction": float("nan")}, "val-fraction nan"),
        ({"path": ""}, "empty"),
        ({"tokenizer": ""}, "empty"),
        ({"template": "a picture"}, r"template 'a picture': write {}"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ValueError, match=message):
        PairConfig(**config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 37},
            "36 training pictures, the batch takes 37: use --train.batch-size <= 36",
        ),
        ({"batch_size": 0}, "batch size 0"),
        ({"seed": -1}, "seed -1"),
        ({"context_length": 1}, "context length 1"),
        ({"size": 0}, "image size 0"),
        ({"tokenizer": "bite"}, "'bite' is no folder"),
    ],
)
def test_mistakes_are_named_with_the_fix(own, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(own, **options)


def test_any_caption_becomes_tokens(tmp_path):
    texts = ["<|endoftext|>", "\ud800 half a pair", "zero\0byte", "▁", "🎈", "x", "y"]
    for i in range(7):
        save(tmp_path / f"{i}.png", i)
    rows = [{"path": f"{i}.png", "caption": text} for i, text in enumerate(texts)]
    path = write(tmp_path / "pairs.jsonl", "\n".join(map(json.dumps, rows)).replace("\\u0000", " "))
    data = prepare(path, batch_size=1, val_fraction=0.4, tokenizer="sentencepiece")
    texts = {tokenizer.replace_surrogates(text).replace("\0", " ") for text in texts}
    eot = data.tokenizer.eot
    for split in data.splits.values():
        for row in split.tokens.tolist():
            assert data.tokenizer.decode(row[: row.index(eot)]) in texts


def test_the_module_reads_a_folder(own):
    for path, status in ((own, 0), (own / "missing", 1)):
        done = subprocess.run(
            [sys.executable, "-m", "data.captioned", path],
            cwd=ROOT,
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == status
        found = done.stderr if status else done.stdout
        assert ("is not a folder" if status else "a picture of a kind 3") in found
    assert "Traceback" not in done.stderr


def test_a_split_without_pictures_is_named(tmp_path):
    for i in range(6):
        save(tmp_path / "own" / "cat" / f"{i}.png", seed=0)  # one picture goes to one split
    message = r"the split '(train|val)' has 0 pictures, need 2: add pairs"
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "own", batch_size=1)


@pytest.mark.parametrize("length", [1, 4, 5])
def test_neighbours_stay_together(length):
    """An epoch takes rows in runs, each row at most once, and leaves out less than a run."""
    size = 43
    whole = size // length * length
    first, second = np.split(shuffle_runs(np.arange(2 * whole), size, 7, length), 2)
    for epoch in (first, second):
        runs = epoch.reshape(-1, length)
        assert ((runs[:, 1:] - runs[:, :-1]) % size == 1).all()
        assert len(set(epoch.tolist())) == whole
    assert (first != second).any()
    assert (shuffle_runs(np.arange(3, 9), size, 7, length) == first[3:9]).all()
