"""The text data path: sources, downloads, shards, the order of batches, damage and mistakes."""

import hashlib
import http.server
import json
import math
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from data import docs, download, files, shakespeare, splits, stdlib
from data.report import Report
from tinyfm import tokenizer
from tinyfm.batches import shards
from tinyfm.batches.order import permute, shuffle
from tinyfm.batches.text import (
    TextConfig,
    TextData,
    back_to_documents,
    count_windows,
    window_starts,
)

VOCAB = 300  # more than the 256 bytes and the end-of-text token


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        Path(folder, f"{name}.txt").write_bytes(text.encode("utf-8"))
    return folder


def prepare(tmp_path, path, length=16, batch_size=4, seed=0, vocab_size=VOCAB, **config):
    config = {"tokenizer": "bytes", "cache": str(tmp_path / "cache")} | config
    return TextData.prepare(
        TextConfig(path=str(path), **config), vocab_size, length, batch_size, seed
    )


@pytest.fixture
def small(tmp_path):
    """A prepared text of 2 KB."""
    text = "".join(f"line {i} of a small text, naïve and short\n" for i in range(50))
    return prepare(tmp_path, write(tmp_path / "text", small=text) / "small.txt")


def cache_folder(tmp_path) -> Path:
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


# --- The order of batches -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_permutation_has_every_value_once(size):
    for epoch in range(3):
        keys = np.random.SeedSequence((7, epoch)).generate_state(6, np.uint64)
        assert sorted(permute(np.arange(size), size, keys)) == list(range(size))


def test_permutation_of_a_huge_range_needs_no_table():
    size = 10**15 + 37
    index = np.concatenate([np.arange(1000), size - 1 - np.arange(1000)])
    keys = np.random.SeedSequence(0).generate_state(6, np.uint64)
    image = permute(index, size, keys)
    assert len(set(image.tolist())) == 2000
    assert 0 <= image.min() <= image.max() < size
    assert 0.4 < (image < size // 2).mean() < 0.6


def test_permutation_is_uniform():
    """Chi-square: over many keys, each of 12 places receives each of the 12 values as often."""
    size, epochs = 12, 3000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        keys = np.random.SeedSequence((1, epoch)).generate_state(6, np.uint64)
        counts[np.arange(size), permute(np.arange(size), size, keys)] += 1
    expected = epochs / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_an_index_outside_is_refused():
    keys = np.arange(6, dtype=np.uint64)
    for index in (6, -1):
        with pytest.raises(ValueError, match=rf"index {index} is outside 0 to 5"):
            permute(np.array([0, index]), 6, keys)


def test_shuffle_gives_each_epoch_and_seed_an_order():
    epochs = shuffle(np.arange(300), 100, seed=3).reshape(3, 100)
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs.tolist())
    orders = {tuple(epoch) for epoch in epochs.tolist()}
    orders.add(tuple(shuffle(np.arange(100), 100, seed=4).tolist()))
    assert len(orders) == 4


def test_shuffle_computes_any_sample_alone():
    whole = shuffle(np.arange(21), 7, seed=3)
    for part in ([0], [12], [5, 6, 7, 8], [20, 2, 13]):
        assert shuffle(np.array(part), 7, seed=3).tolist() == whole[part].tolist()


@pytest.mark.parametrize(
    ("n_tokens", "length"), [(1000, 16), (33, 32), (40, 32), (64, 32), (65, 1)]
)
def test_an_epoch_reads_every_window_once(n_tokens, length):
    windows = count_windows(n_tokens, length)
    offsets = set()
    for epoch in range(40):
        index = np.arange(windows) + epoch * windows
        starts = np.sort(window_starts(index, n_tokens, length, seed=3))
        assert (np.diff(starts) == length).all()
        assert 0 <= starts[0] < length
        assert starts[-1] + length + 1 <= n_tokens
        assert n_tokens - (len(starts) * length + 1) < 2 * length  # left out at the two ends
        offsets.add(int(starts[0]))
    assert len(offsets) > 1 or n_tokens == length + 1 or length == 1


def test_epochs_and_seeds_have_different_orders():
    def order(epoch, seed):
        return tuple(window_starts(np.arange(62) + 62 * epoch, 1024, 16, seed) // 16)

    assert len({order(0, 0), order(1, 0), order(2, 0), order(0, 1), order(1, 1)}) == 5


def test_windows_move_back_to_documents_that_fit():
    documents = np.array([0, 10, 14, 40])  # of 9, 3, 25 and 10 tokens, and the last end at 51
    starts = np.array([0, 9, 10, 13, 20, 39, 40, 45])
    moved = back_to_documents(starts, documents, 52, 12)
    assert moved.tolist() == [0, 0, 10, 10, 20, 39, 40, 40]
    assert back_to_documents(starts, documents, 52, 26).tolist() == [0, 0, 10, 10, 14, 14, 40, 40]


def test_whole_rows_begin_with_a_document(tmp_path):
    lines = {f"a{i}": "x" * (3 + i % 9) for i in range(40)}
    plain = prepare(tmp_path, write(tmp_path / "text", **lines), batch_size=64)
    whole = prepare(tmp_path, tmp_path / "text", batch_size=64, whole=True)
    eot = whole.tokenizer.eot
    assert (whole.batch(3)["tokens"][:, 0] == eot).all()
    assert not (plain.batch(3)["tokens"][:, 0] == eot).all()
    part = whole.batch(3, slice(5, 9))["tokens"]
    assert torch.equal(part, whole.batch(3)["tokens"][5:9])

    # Validation too, and each token is a target once.
    for data in (plain, whole):
        found = []
        for batch in data.split_batches("val", 3):
            found += batch["tokens"][:, 1:][batch["mask"]].tolist()
        assert found == data.split("val").tokens[1:].tolist()
    begun = [batch["tokens"][0, 0] == eot for batch in whole.split_batches("val", 1)]
    assert all(map(bool, begun[:-1]))  # the last one is moved back to full length


def test_batch_is_a_pure_function_of_seed_and_step(tmp_path, small):
    later = small.batch(9)["tokens"]
    first = small.batch(0)["tokens"]
    assert first.shape == (4, 17)
    assert first.dtype == torch.int64
    assert torch.equal(small.batch(9)["tokens"], later)
    path = tmp_path / "text" / "small.txt"
    again, other = prepare(tmp_path, path), prepare(tmp_path, path, seed=1)
    assert torch.equal(again.batch(9)["tokens"], later)
    assert not torch.equal(other.batch(9)["tokens"], later)
    assert again.fingerprint == other.fingerprint


def test_ranks_read_their_rows_of_the_global_batch(tmp_path, small):
    big = prepare(tmp_path, tmp_path / "text" / "small.txt", batch_size=8)
    whole = big.batch(5)["tokens"]
    for world in (2, 4, 8):
        rows = 8 // world
        parts = [big.batch(5, slice(r * rows, (r + 1) * rows))["tokens"] for r in range(world)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(big.batch(5, slice(1, None, 3))["tokens"], whole[1::3])
    # Half the batch size: the same samples, in twice as many steps.
    assert torch.equal(torch.cat([small.batch(10)["tokens"], small.batch(11)["tokens"]]), whole)


def test_a_batch_is_text_and_may_straddle_epochs(tmp_path):
    text = "0123456789" * 12
    data = prepare(tmp_path, write(tmp_path, a=text) / "a.txt", length=8, batch_size=40)
    assert count_windows(len(data.train), 8) < 40
    train = data.train.read(0, len(data.train)).tolist()
    for row in data.batch(3)["tokens"].tolist():
        assert any(train[s : s + 9] == row for s in range(len(train) - 8))


# --- Validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 16, 100, 208])
@pytest.mark.parametrize("rows", [1, 5])
def test_validation_predicts_each_token_once(tmp_path, length, rows):
    text = "the quick brown fox. " * 100
    data = prepare(tmp_path, write(tmp_path, a=text) / "a.txt", length=length)
    for name, (first, last) in shards.find_blocks(len(text), 0.1).items():
        split = data.split(name)
        assert data.tokenizer.decode(split.tokens[1:-1].tolist()) == text[first:last]
        targets = []
        batches = data.val_batches(rows) if name == "val" else data.split_batches(name, rows)
        for batch in batches:
            tokens, mask = batch["tokens"], batch["mask"]
            assert tokens.shape == (len(mask), min(length, len(split) - 1) + 1)
            assert mask.dtype == torch.bool
            targets += tokens[:, 1:][mask].tolist()
        assert targets == split.tokens[1:].tolist()
        assert split.predicted == len(targets)


def test_bits_per_byte_by_hand(tmp_path):
    text = "é" * 1000  # two bytes a character
    data = prepare(tmp_path, write(tmp_path, a=text) / "a.txt")
    # 100 characters are held out, 50 for each split, of which 5 are the gap: 45 characters have 90
    # bytes, 90 byte tokens and the closing end of text.
    assert data.split("val").predicted == data.split("test").predicted == 91
    assert data.metrics(math.log(2))["val_bpb"] == pytest.approx(91 / 90)
    assert data.split("test").bits_per_byte(2.5) == pytest.approx(2.5 * 91 / math.log(2) / 90)


# --- What importing loads -------------------------------------------------------------------------


def test_data_of_language_models_load_no_fonts_and_no_pictures():
    modules = {f"tinyfm.batches.{name}" for name in ("text", "labelled", "chat")}
    code = f"import {', '.join(modules)}, sys; print(*sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True, cwd=root
    )
    loaded = set(done.stdout.split())
    assert modules <= loaded
    heavy = {"PIL", "matplotlib", "fontTools", "data.glyphs", "data.scripts", "data.pictures"}
    assert not loaded & heavy


# --- Splits and shards ----------------------------------------------------------------------------


def ids_of(split) -> list[int]:
    return split.read(0, len(split)).tolist()


def test_one_document_splits_as_nanogpt_does(tmp_path):
    """Training is the same start of the text. What nanoGPT holds out is halved, with gaps."""
    text = "".join(chr(97 + i * i % 26) for i in range(12_370))
    data = prepare(tmp_path, write(tmp_path, a=text) / "a.txt")
    eot, decode = data.tokenizer.eot, data.tokenizer.decode
    blocks = {"train": (0, 11_133), "val": (11_133 + 61, 11_751), "test": (11_751 + 61, 12_370)}
    for name, (first, last) in blocks.items():
        ids = data.split(name).tokens.tolist()
        assert ids[0] == ids[-1] == eot
        assert decode(ids[1:-1]) == text[first:last]
        assert ids.count(eot) == 2
    assert shards.find_blocks(10**7, 0.1)["val"] == (9 * 10**6 + 1000, 95 * 10**5)


def test_few_documents_are_cut_at_the_tail(tmp_path):
    words = [f"{name}{i:03d} " for name in "abc" for i in range(100)]
    text = "".join(words)  # three documents of 500 characters
    parts = {name: text[500 * i : 500 * (i + 1)] for i, name in enumerate("abc")}
    data = prepare(tmp_path, write(tmp_path / "t", **parts), 8, val_fraction=0.5)
    eot, encode = data.tokenizer.eot, data.tokenizer.encode

    def ids(*texts):
        return [token for part in texts for token in (eot, *encode(part))] + [eot]

    # The last 750 characters are held out, and 37 before each half are left out.
    assert ids_of(data.train) == ids(text[:500], text[500:750])
    assert ids_of(data.val) == ids(text[787:1000], text[1000:1125])
    assert data.split("test").tokens.tolist() == ids(text[1162:])


def documents_of(split) -> list[str]:
    """The documents of a split, by its borders."""
    ends = [*split.starts[1:], len(split) - 1]
    ids = [split.tokens[a + 1 : b].tolist() for a, b in zip(split.starts, ends)]
    return [split.tokenizer.decode(own) for own in ids]


def test_many_documents_go_to_one_side_whole(tmp_path):
    texts = {f"d{i:03d}": f"document number {i % 300}\n" for i in range(400)}  # 100 occur twice
    data = prepare(tmp_path, write(tmp_path / "many", **texts), val_fraction=0.2)
    sides = {name: Counter(documents_of(data.split(name))) for name in splits.SPLITS}
    assert sum(sides.values(), Counter()) == Counter(set(texts.values()))
    assert all(0.05 < sides[name].total() / 300 < 0.15 for name in ("val", "test"))
    for split in data.splits.values():
        assert split.tokens[split.starts].tolist() == [data.tokenizer.eot] * len(split.starts)
        assert split.bytes.tolist() == [len(text.encode()) for text in documents_of(split)]
        assert split.bytes.sum() == split.utf8_bytes


def words_of(draw: random.Random, count: int) -> list[str]:
    return [f"w{draw.randrange(1000)}" for _ in range(count)]


@pytest.fixture
def articles() -> dict[str, str]:
    """300 documents of 200 random words."""
    draw = random.Random(0)
    return {f"d{i:03d}": " ".join(words_of(draw, 200)) for i in range(300)}


def test_planted_near_duplicates_are_left_out_before_the_split(tmp_path, articles, capsys):
    """Each of 50 documents occurs again, with one word changed."""
    draw = random.Random(1)
    twins = {}
    for name, text in list(articles.items())[:50]:
        words = text.split()
        words[draw.randrange(200)] = "changed"
        twins[f"z{name}"] = " ".join(words)
    folder = write(tmp_path / "in", **articles, **twins)
    data = prepare(tmp_path, folder, val_fraction=0.4)
    found = [text for name in splits.SPLITS for text in documents_of(data.split(name))]
    assert sorted(found) == sorted(articles.values())
    assert "50 near duplicates left out" in capsys.readouterr().out


def test_planted_overlap_is_measured_and_left_out(tmp_path, articles, capsys):
    """Half of the held-out documents quote 100 words of a training document."""
    train = [text for text in articles.values() if splits.split_of(text, 0.4) == "train"]
    quoting = {}
    for name, text in articles.items():
        quoting[name] = text
        if text not in train and len(quoting) % 2:
            # The hash of the new text must keep it on its side.
            own = text.split()[:100]
            quotes = (" ".join([*own, *other.split()[50:150]]) for other in train)
            quoting[name] = next(q for q in quotes if splits.split_of(q, 0.4) != "train")
    held = [text for text in quoting.values() if splits.split_of(text, 0.4) != "train"]
    before = splits.share_of(splits.overlap_of(held, train))
    assert 0.2 < before < 0.3
    data = prepare(tmp_path, write(tmp_path / "in", **quoting), val_fraction=0.4)
    line = capsys.readouterr().out.splitlines()[-1]
    assert "0.00% of validation" in line
    texts = documents_of(data.split("train"))
    for name in ("val", "test"):
        kept = documents_of(data.split(name))
        assert len(kept) > 10
        assert splits.share_of(splits.overlap_of(kept, texts)) == 0
    dropped = len(held) - len(data.split("val").starts) - len(data.split("test").starts)
    assert dropped > 20
    assert f"left out for having more: {dropped} document" in line


def test_windows_span_shards_and_long_documents_are_encoded_in_pieces(tmp_path, monkeypatch):
    text = "".join(f"{i} ünïcode\n" for i in range(300)) + "x" * 500
    path = write(tmp_path, a=text) / "a.txt"
    whole = prepare(tmp_path / "1", path)
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    monkeypatch.setattr(shards, "PIECE_CHARS", 37)
    monkeypatch.setattr(shards, "GROUP_PIECES", 2)
    parts = prepare(tmp_path / "2", path)
    assert len(parts.train.arrays) > 20
    assert all(a.nbytes < 100 + 2 * 2 * 2 * 37 for a in parts.train.arrays)
    assert ids_of(parts.train) == ids_of(whole.train)
    for step in range(5):
        assert torch.equal(parts.batch(step)["tokens"], whole.batch(step)["tokens"])


def test_large_vocabularies_take_four_bytes(tmp_path):
    assert shards.token_dtype(1 << 16) == np.dtype("<u2")
    assert shards.token_dtype((1 << 16) + 1) == np.dtype("<u4")
    shards.append(tmp_path, "train", [0, 70_000], 70_001)
    assert np.fromfile(tmp_path / "train-00000.bin", "<u4").tolist() == [0, 70_000]
    with pytest.raises(ValueError, match=r"outside 0\.\.9"):
        shards.append(tmp_path, "train", [10], 10)


def test_shards_are_reused_until_something_changes(tmp_path, capsys):
    folder = write(tmp_path / "mine", a="some words " * 40)
    first = prepare(tmp_path, folder)
    line = capsys.readouterr().out
    assert "1 found, 1 used" in line
    assert f"{sum(map(len, first.splits.values())):,} tokens" in line
    assert "0.00% of validation (1 document), 0.00% of test (1 document)" in line
    assert "mine" in first.description
    assert prepare(tmp_path, folder).fingerprint == first.fingerprint
    assert capsys.readouterr().out == ""  # nothing was built
    write(folder, b="more words " * 40)
    assert prepare(tmp_path, folder).fingerprint != first.fingerprint
    prepare(tmp_path, folder, val_fraction=0.2)
    assert len(list((tmp_path / "cache").iterdir())) == 3  # no temporary folder is left


def test_lone_surrogates_are_replaced(tmp_path):
    path = tmp_path / "spool"
    texts = ["\ufeffgood", "", "bad \ud800", "\ud83d\ude00 too"]
    assert shards.spool(map(splits.Document, texts), path, Report()) == (3, 15)
    assert [text for text, *_ in shards.read_spool(path)] == ["\ufeffgood", "bad \ufffd", "😀 too"]


# --- Damage ---------------------------------------------------------------------------------------


def test_damaged_shards_are_refused_by_name(tmp_path, small):
    text, folder = tmp_path / "text" / "small.txt", cache_folder(tmp_path)
    shard = folder / "train-00000.bin"
    good = shard.read_bytes()

    def refused(content, *words):
        shard.write_bytes(content)
        with pytest.raises(ValueError) as error:
            prepare(tmp_path, text)
        for word in (shard.name, str(folder), "delete the folder", *words):
            assert word in str(error.value)

    refused(good[:-2], f"{len(good) - 2} bytes", str(len(good)))
    refused(good[:40] + b"\xff\xff" + good[42:], "id 65535", "byte 40")
    refused(good[:40] + b"\x01\x00" + good[42:], "altered")
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00000\.bin has 0 bytes"):
        prepare(tmp_path, text)


def altered(manifest: Path, keys: tuple, value) -> None:
    """Change one value in a JSON file."""
    content = json.loads(manifest.read_text(encoding="utf-8"))
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    manifest.write_text(json.dumps(content), encoding="utf-8")


def test_the_bytes_that_a_manifest_claims_are_counted(tmp_path, small):
    """Bits per byte rest on them."""
    manifest = cache_folder(tmp_path) / "manifest.json"
    before = json.loads(manifest.read_text(encoding="utf-8"))["utf8_bytes"]["val"]
    altered(manifest, ("utf8_bytes", "val"), before // 2)
    with pytest.raises(ValueError, match=f"validation has {before // 2} bytes, .* have {before}:"):
        prepare(tmp_path, tmp_path / "text" / "small.txt")


NAMES = ("train", "documents", "utf8_bytes", "vocab_size", "tokenizer", "report",
         "overlap")  # fmt: skip
COUNTED = ("documents", "utf8_bytes", "overlap")
ENTRY = ("file", "tokens", "sha256")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("utf8_bytes", "val"), "many"),
        (("utf8_bytes",), {"val": 1}),
        (("train",), []),
        (("train", 0, "tokens"), 1.5),
        (("train", 0, "file"), None),
        (("vocab_size",), 1e300),
        (("tokenizer",), ["a"]),
        *(((name,), value) for name in NAMES for value in ([], {"a": 1}, True, -1.5, 10**30)),
        *(((name, "test"), value) for name in COUNTED for value in ([], "9", None, True, 2**70)),
        *((("train", 0, name), value) for name in ENTRY for value in ([], {}, None, 1.5, True)),
    ],
)
def test_a_manifest_of_another_shape_is_refused_by_name(tmp_path, small, keys, value):
    altered(cache_folder(tmp_path) / "manifest.json", keys, value)
    with pytest.raises(ValueError, match=r"manifest\.json .*delete the folder"):
        prepare(tmp_path, tmp_path / "text" / "small.txt")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_manifest_is_refused(tmp_path, small, content):
    manifest = cache_folder(tmp_path) / "manifest.json"
    documents = json.loads(manifest.read_text(encoding="utf-8"))["documents"]
    assert documents == {"train": 1, "val": 1, "test": 1}
    manifest.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read"):
        prepare(tmp_path, tmp_path / "text" / "small.txt")


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    path = write(tmp_path, a="text " * 100) / "a.txt"

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "write_shards", interrupted)
        prepare(tmp_path, path)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(prepare(tmp_path, path).train) > 16


def test_two_builds_at_once_agree(tmp_path, monkeypatch):
    """The second waits for the first, and finds its folder."""
    path = write(tmp_path, a="one text " * 90) / "a.txt"
    real = shards.write_shards
    calls = []

    def slow(*arguments):
        calls.append(1)
        time.sleep(0.3)
        return real(*arguments)

    monkeypatch.setattr(shards, "write_shards", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(prepare, [tmp_path, tmp_path], [path, path])
    assert first.fingerprint == second.fingerprint
    assert len(calls) == 1
    assert cache_folder(tmp_path).name.startswith("a-txt-")


# --- Mistakes of the user -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"val_fraction": 0.0}, "val-fraction 0.0"),
        ({"val_fraction": 1.0}, "val-fraction 1.0"),
        ({"val_fraction": float("nan")}, "val-fraction nan"),
        ({"path": ""}, "empty"),
        ({"tokenizer": ""}, "empty"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ValueError, match=message):
        TextConfig(**config)


def test_mistakes_are_named_with_the_fix(tmp_path):
    path = write(tmp_path, a="0123456789" * 20) / "a.txt"
    with pytest.raises(ValueError, match=r"training text has 182 tokens, need > 182.* <= 181"):
        prepare(tmp_path, path, length=182)
    prepare(tmp_path, path, length=181)
    with pytest.raises(ValueError, match=r"need > 64: use more text$"):  # no length would do
        prepare(tmp_path, write(tmp_path, one="a") / "one.txt", length=64)
    with pytest.raises(ValueError, match=r"no text is left for validation.*--data.val-fraction"):
        prepare(tmp_path, write(tmp_path, tiny="0123456789") / "tiny.txt", length=2)
    with pytest.raises(ValueError, match=r"--model.vocab-size 257"):
        prepare(tmp_path, path, vocab_size=256)
    with pytest.raises(ValueError, match="'bite' is no folder"):
        prepare(tmp_path, path, tokenizer="bite")
    with pytest.raises(ValueError, match="no file matches"):
        prepare(tmp_path, tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="seed -1"):
        prepare(tmp_path, path, seed=-1)


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-unigram", "bpe"])
def test_learned_tokenizers_see_training_text_only(tmp_path, monkeypatch, kind):
    text = "\n".join(next(stdlib.documents()).text.split(" ")) + "ünïcode\n" * 9
    path = write(tmp_path, a=text) / "a.txt"
    seen = []
    train = tokenizer.train

    def spy(kind, documents, vocab_size):
        seen.extend(documents)
        return train(kind, seen, vocab_size)

    monkeypatch.setattr(tokenizer, "train", spy)
    monkeypatch.setattr(shards, "PIECE_CHARS", 100)
    data = prepare(tmp_path, path, tokenizer=kind)
    assert seen == [text[: int(len(text) * 0.9)]]
    assert data.tokenizer.decode(ids_of(data.train)[1:-1]) == seen[0]
    assert data.tokenizer.vocab_size == VOCAB


def test_a_saved_tokenizer_is_used(tmp_path):
    path = write(tmp_path, a="0123456789" * 20) / "a.txt"
    trained = prepare(tmp_path, path)
    saved = str(tmp_path / "saved")
    trained.tokenizer.save(saved)
    assert ids_of(prepare(tmp_path, path, tokenizer=saved).train) == ids_of(trained.train)
    with pytest.raises(ValueError, match=r"--model.vocab-size 257"):
        prepare(tmp_path, path, tokenizer=saved, vocab_size=100)


# --- The user's own files -------------------------------------------------------------------------


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    contents = {
        "b.md": "\ufeffwith a mark\r\nand Windows lines\r\n".encode(),
        "a": b"no extension",
        "sub/c.txt": "deep ünïcode".encode(),
        "empty.txt": b" \n",
        "picture.png": b"\x89PNG\0\0" + bytes(100),
        "latin.txt": "übermäßig größere Bäume".encode("latin-1"),
        "wide.txt": "wide".encode("utf-16"),
        "rare.txt": b"one bad byte \xff" + b"and much good text " * 20,
        ".hidden": b"hidden",
        ".git/config": b"hidden too",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def test_folder_report(notes):
    report = Report()
    texts = list(files.documents(str(notes), report))
    assert texts[:2] == ["no extension", "with a mark\nand Windows lines\n"]
    assert texts[2].startswith("one bad byte \ufffdand")
    assert texts[3] == "deep ünïcode"
    assert (report.found, report.used) == (8, 4)
    reasons = {why: [Path(n).name for n in names] for why, names in report.skipped.items()}
    assert reasons == {
        "empty": ["empty.txt"],
        "not UTF-8, convert it": ["latin.txt"],
        "binary, it has NUL bytes": ["picture.png"],
        "UTF-16, save it as UTF-8": ["wide.txt"],
    }
    assert "8 found, 4 used; 1 skipped: empty" in str(report)
    assert "1 invalid byte replaced in" in str(report)


def test_globs_and_single_files(notes):
    assert list(files.documents(str(notes / "a"))) == ["no extension"]
    assert list(files.documents(str(notes / "**" / "c*.txt"))) == ["deep ünïcode"]
    with pytest.raises(ValueError, match=r"no file matches '.*\.rst'"):
        list(files.documents(str(notes / "*.rst")))
    with pytest.raises(ValueError, match=r"no text in .*1 found, 0 used; 1 skipped: binary"):
        list(files.documents(str(notes / "*.png")))


# --- Text that is already on the disk -------------------------------------------------------------


def test_docstrings_of_a_source_file():
    source = b'''"""About m."""
class A(Base):
    """About A."""
    def f(self, x: int = 1, *, y=None) -> str:
        r"""About f.

            Indented \\d.
        """
    def undocumented(self): ...
if True:
    async def g():
        """About g."""
add_docstr(torch.abs, r"""
abs(input) -> Tensor
""" + r"""Args:
    {input}
""".format(**common))
add_newdoc("numpy", "ndarray", ("T", """
    The transpose.
"""))
print("nothing\\n")
'''
    entries = docs.docstrings(source, "m")
    assert [heading for heading, _ in entries] == [
        "module m", "class m.A(Base)", "m.A.f(self, x: int=1, *, y=None)", "m.g()",
        "torch.abs", "numpy.ndarray.T",
    ]  # fmt: skip
    assert entries[4][1] == "\nabs(input) -> Tensor\nArgs:\n"


def test_docs_read_packages_without_importing_them(tmp_path):
    package = tmp_path / "fakepackage"
    for folder in ("", "tests", "sub"):
        write(package / folder)
    (package / "__init__.py").write_text('"""About it."""\nraise SystemExit', encoding="utf-8")
    (package / "sub" / "m.py").write_text(
        '"""About it."""\ndef f(x):\n    """About f.\n\n      More.\n    End.\n    """',
        encoding="utf-8",
    )
    (package / "tests" / "t.py").write_text('"""A test."""', encoding="utf-8")
    (package / "broken.py").write_text('"""Broken."""\ndef (', encoding="utf-8")
    # A new process, in which nothing has been imported yet.
    code = """
import json, sys
from data import docs
from data.report import Report
report = Report()
found = [d.text for d in docs.documents(report, ("fakepackage", "numpy", "absent_package"))]
assert docs.version().count("torch-") == 1
heavy = [m for m in ("torch", "fakepackage") if m in sys.modules]
size = sum(len(text) for text in found)
fake = [text for text in found if "fakepackage" in text[:20]]
once = "".join(found).count("Compute the qr factorization")
print(json.dumps([fake, heavy, size, report.skipped, once]))
"""
    root = Path(__file__).parents[2]
    path = "import sys; sys.path += " + repr([str(root), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", path + code], capture_output=True, encoding="utf-8", check=True
    )
    fake, heavy, size, skipped, once = json.loads(done.stdout)
    # The second "About it." is a duplicate, and the file in tests/ is not looked at.
    assert fake == [
        "module fakepackage\n\nAbout it.\n",
        "fakepackage.sub.m.f(x)\n\nAbout f.\n\n  More.\nEnd.\n",
    ]
    assert heavy == []
    assert size > 3_000_000
    assert skipped["not installed"] == ["absent_package"]
    assert skipped["does not parse: SyntaxError"] == ["fakepackage.broken"]
    assert once == 1


def test_standard_library_source():
    report = Report()
    found = list(stdlib.documents(report))
    assert report.used > 500
    assert any('"""A generally useful event scheduler class.' in text for text, *_ in found)
    assert sum(len(text) for text, *_ in found) > 5_000_000
    assert found == list(stdlib.documents())


def test_a_file_is_cut_before_each_definition():
    source = """import os

X = 1

# About f.
@decorator
def f(x):
    def inner(): ...
    return x

class A:
    def g(self): ...
Y = 2
async def h(): ...
"""
    parts = list(stdlib.definitions(source, "m"))
    assert [name for name, _ in parts] == ["m", "m:f", "m:A", "m:h"]
    assert "".join(text for _, text in parts) == source
    assert parts[1][1].startswith("# About f.\n@decorator\ndef f")
    assert parts[2][1].endswith("Y = 2\n")
    names = ["module m", "m.f(x)", "class m.A(Base)", "m.A.g(self)", "numpy.ndarray.T", "abs"]
    assert [docs.definition_of(name, "m") for name in names] == [
        "m", "m:f", "m:A", "m:A", "numpy:ndarray", "m",
    ]  # fmt: skip


# --- Downloads ------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, with Range; /whole ignores Range, /wrong lies, /short hangs up early."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        content, status = CONTENT, 200
        if self.path == "/missing":
            return self.send_error(404)
        if self.path == "/wrong":
            content = b"something else"
        if self.headers.get("Range") and self.path != "/whole":
            content = content[int(self.headers["Range"][len("bytes=") : -1]) :]
            status = 206
            if not content:
                return self.send_error(416)
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:1000] if self.path == "/short" else content)
        return None

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_download_once(tmp_path, server):
    path = tmp_path / "new" / "file.bin"
    for _ in range(2):
        assert download.download([server.url + "/file"], path, SHA256).read_bytes() == CONTENT
    assert len(server.requests) == 1
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("place", ["/file", "/whole"])
def test_download_resumes(tmp_path, server, place):
    path, part = tmp_path / "file.bin", tmp_path / "file.bin.part"
    with pytest.raises(ConnectionError, match="closed after 1,000 of 10,240 bytes"):
        download.download([server.url + "/short"], path, SHA256)
    assert part.read_bytes() == CONTENT[:1000]
    download.download([server.url + place], path, SHA256)
    assert path.read_bytes() == CONTENT
    assert server.requests[-1] == (place, "bytes=1000-")


@pytest.mark.parametrize("stale", [b"stale", CONTENT, CONTENT + b"more"])
def test_download_survives_a_stale_part(tmp_path, server, stale):
    path = tmp_path / "file.bin"
    Path(f"{path}.part").write_bytes(stale)
    download.download([server.url + "/file"], path, SHA256)
    assert path.read_bytes() == CONTENT


def test_download_mirrors_and_failures(tmp_path, server):
    path = tmp_path / "file.bin"
    refused = "http://127.0.0.1:1/file"
    with pytest.raises(ConnectionError) as error:
        download.download([refused, server.url + "/missing", server.url + "/wrong"], path, SHA256)
    for word in (refused, "HTTP 404", "SHA-256 is", SHA256, f"put the file here by hand: {path}"):
        assert word in str(error.value)
    assert list(tmp_path.iterdir()) == []  # nothing wrong is kept
    download.download([refused, server.url + "/wrong", server.url + "/file"], path, SHA256)
    assert path.read_bytes() == CONTENT
    path.write_bytes(b"put here by hand, but another file")
    with pytest.raises(ValueError, match=r"file.bin has SHA-256 .* delete it"):
        download.download([server.url + "/file"], path, SHA256)


def test_shakespeare_reader(tmp_path, monkeypatch):
    source = tmp_path / "source.txt"
    source.write_bytes("First Citizen:\nSpeak, speak. é\n".encode())
    monkeypatch.setattr(shakespeare, "PATH", tmp_path / "downloads" / "tinyshakespeare.txt")
    monkeypatch.setattr(shakespeare, "URLS", ("http://127.0.0.1:1/",))
    with pytest.raises(ConnectionError, match=r"by hand: .*tinyshakespeare.txt"):
        list(shakespeare.documents())
    monkeypatch.setattr(shakespeare, "URLS", (source.as_uri(),))
    with pytest.raises(ConnectionError, match=f"expected {shakespeare.SHA256}"):
        list(shakespeare.documents())
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(source.read_bytes()).hexdigest())
    report = Report()
    (document,) = shakespeare.documents(report)
    assert document.text == "First Citizen:\nSpeak, speak. é\n"
    assert (report.found, report.used) == (1, 1)
