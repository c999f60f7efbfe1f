"""Pairs of texts: which are read, their vocabulary, their order, and that a batch is a function."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Oracle

from data import text_pairs as table
from data import translations, words
from data.report import Report
from data.splits import SPLITS, TEST, TRAIN, VAL
from tinyfm import tokenizer as tokenizers
from tinyfm.batches import text_pairs
from tinyfm.batches.text_pairs import NOT_PREDICTED, POOL, TextPair, TextPairConfig, TextPairData

MODEL = SimpleNamespace(vocab_size=300, context_length=40, start_id=0, end_id=256)


@pytest.fixture
def path(tmp_path):
    """A table of 400 sources of 1 to 30 letters; every tenth has two targets."""
    draw = np.random.default_rng(0)
    lines = ["source\ttarget"]
    for i in range(400):
        source = f"{i} " + "".join(draw.choice(list("abc"), draw.integers(1, 27)))
        lines.append(f"{source}\t{source[::-1]}")
        if i % 10 == 0:
            lines.append(f"{source}\t{i}")
    place = tmp_path / "pairs.tsv"
    place.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return place


def prepare(path, batch_size=8, seed=0, model=MODEL, **config) -> TextPairData:
    fields = {"tokenizer": "bytes", "cache": str(path.parent / "cache")} | config
    return TextPairData.prepare(TextPairConfig(str(path), **fields), model, batch_size, seed)


# ---- your own tables -----------------------------------------------------------------------------


def test_a_table_of_pairs(tmp_path):
    rows = [
        {"source": "one  two", "target": "eins zwei"},
        {"source": "one two", "target": "eins zwei"},
        {"source": "one two", "target": "1 2"},
        {"source": "", "target": "x"},
        {"source": "x", "target": None},
        {"source": 3, "target": 4.5},
        {"source": "one two three four five six seven eight nine", "target": "y"},
        {"source": "One two three four five six seven eight, nine.", "target": "z"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    report = Report()
    found = table.rows(str(path), report)
    assert found == {
        "one two": ["eins zwei", "1 2"],
        "3": ["4.5"],
        rows[6]["source"]: ["y"],
    }
    assert {reason: len(names) for reason, names in report.skipped.items()} == {
        "the same pair as one before": 1,
        "no source": 1,
        "no target": 1,
        "a near duplicate of a source before": 1,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tb\n1\t2\n", r"neither source nor target, its columns are 'a', 'b': name them"),
        ("source\ttarget\n", r"has no pair .*add some"),
        ("source\ttarget\na\tb\nc\td\n", r"2 sources .*, need 3"),
        ("source\ttarget\na\tb\nc\td\ne\t" + 60 * "f" + "\n", r"no pair is left for .*1 pair"),
    ],
)
def test_tables_that_are_refused(tmp_path, content, message):
    path = tmp_path / "pairs.tsv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        prepare(path)
    for no_table in (tmp_path, tmp_path / "none.tsv"):
        with pytest.raises(ValueError, match=r"not a file of pairs: give a \.csv"):
            prepare(no_table)


def test_the_order_of_a_table_changes_no_split(path):
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    splits = {pair.source: pair.split for pair in text_pairs.read_own(str(path), 0.2, Report())}
    assert Counter(splits.values()) == {TRAIN: 320, VAL: 40, TEST: 40}
    path.write_text("\n".join([header, *lines[::-1]]), encoding="utf-8")
    again = text_pairs.read_own(str(path), 0.2, Report())
    assert {pair.source: pair.split for pair in again} == splits


# ---- the named data ------------------------------------------------------------------------------


def test_words_and_strings_as_pairs(monkeypatch):
    found = [words.Word("read", (("R", "EH", "D"), ("R", "IY", "D")), VAL)]
    monkeypatch.setattr(words, "rows", lambda report: found)
    assert text_pairs.read_words(Report()) == [TextPair("read", ["R EH D ", "R IY D "], VAL)]
    monkeypatch.setattr(
        translations,
        "rows",
        lambda language, report: [translations.Pair("Open", f"to {language}", "x", TRAIN)],
    )
    assert text_pairs.read_translations("de", Report()) == [TextPair("Open", ["to de"], TRAIN)]


def test_letters_and_phones_are_tokens(tmp_path):
    """Also for the library: tokenizer.json is an ordinary one."""
    pairs = [TextPair("cab's", ["K AE B Z "], TRAIN), TextPair("babe", ["B EY B "], TRAIN)]
    own = text_pairs.letters(pairs, phones=True)
    tokens = [own.decode([i]) for i in range(own.vocab_size)]
    assert tokens == [
        *("<pad>", "</s>", "'", "a", "b", "c", "e", "s", "AE ", "B ", "EY ", "K ", "Z ")
    ]
    assert own.eot == 1
    for text in ("cab's", "K AE B Z "):
        assert own.decode(own.encode(text)) == text
        own.save(tmp_path)
        library = Oracle.from_file(str(tmp_path / "tokenizer.json"))
        assert library.encode(text).ids == own.encode(text)
        assert library.decode(own.encode(text)) == text
    assert tokenizers.load(tmp_path).fingerprint() == own.fingerprint()
    assert text_pairs.unread(own, "cafés") == ["f", "é"]
    assert text_pairs.unread(tokenizers.ByteTokenizer(), "cafés") == []


def test_a_learned_vocabulary_is_of_both_sides(path):
    model = SimpleNamespace(vocab_size=300, context_length=40, start_id=0, end_id=1)
    data = prepare(path, model=model, tokenizer="")
    assert data.tokenizer.vocab_size == 300
    text = "12 abcabc"
    assert data.tokenizer.decode(data.tokenizer.encode(text)) == text
    with pytest.raises(ValueError, match=r"--model\.vocab-size 4096"):
        prepare(path, tokenizer="bpe", model=SimpleNamespace(vocab_size=68))
    with pytest.raises(ValueError, match=r"--model\.end-id 256"):
        prepare(path, model=model)  # bytes


def test_letters_that_training_does_not_have(tmp_path):
    lines = [f"{a}{b}\t{b}{a}" for a in "abcdefgh" for b in "ijklm"]
    lines += [f"a{chr(0x4E00 + i)}\ta" for i in range(40)]
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join(["source\ttarget", *lines]), encoding="utf-8")
    model = SimpleNamespace(vocab_size=60, context_length=8, start_id=0, end_id=1)
    data = prepare(path, model=model, tokenizer="letters", val_fraction=0.5)
    assert data.tokenizer.decode(data.tokenizer.encode("ija")) == "ija"
    left_out = 80 - sum(len(own.pairs) for own in data.splits.values())
    assert left_out > 10 and f"{left_out} pairs" in data.description
    assert "letters that training does not have" in data.description


# ---- batches -------------------------------------------------------------------------------------


def test_a_batch_by_hand():
    rows = [np.array([5, 6, 7, 1]), np.array([8, 1])]
    targets = [np.array([9, 1]), np.array([9, 9, 9, 1])]
    batch = text_pairs.collate(rows, targets, start=0)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "source": [[5, 6, 7, 1], [8, 1, 0, 0]],
        "mask": [[True] * 4, [True, True, False, False]],
        "inputs": [[0, 9, 0, 0], [0, 9, 9, 9]],
        "targets": [[9, 1, NOT_PREDICTED, NOT_PREDICTED], [9, 9, 9, 1]],
    }


def test_a_batch_is_a_pure_function_of_seed_and_step(path):
    data = prepare(path)
    later = data.batch(70)
    data.batch(0)
    assert all(data.batch(70)[name].equal(later[name]) for name in later)
    assert all(prepare(path).batch(70)[name].equal(later[name]) for name in later)
    assert not prepare(path, seed=1).batch(70)["source"].equal(later["source"])
    # Ranks and micro-batches read their rows of it.
    parts = [data.batch(70, slice(i, i + 2)) for i in range(0, 8, 2)]
    for name in ("source", "targets"):
        whole = [row[row >= 0] for row in later[name]]
        found = [row[row >= 0] for part in parts for row in part[name]]
        for a, b in zip(whole, found, strict=True):
            size = max(len(a), len(b))
            assert torch.nn.functional.pad(a, (0, size - len(a))).equal(
                torch.nn.functional.pad(b, (0, size - len(b)))
            )


def test_an_epoch_reads_each_row_once_and_rows_of_like_length_are_together(path):
    data = prepare(path)
    n = len(data.splits[TRAIN].pairs)
    assert n == 360
    counts = Counter()
    steps = 2 * POOL
    spread = []
    for step in range(steps):
        rows, _ = data.order(step)
        counts.update(rows.tolist())
        spread.append(np.ptp(data.source_lengths[rows]))
    assert {counts[i] for i in range(n)} == {steps * 8 // n, steps * 8 // n + 1}
    assert np.mean(spread) < 3 < np.ptp(data.source_lengths) / 4
    # Long and short batches come in a random order.
    lengths = [data.source_lengths[data.order(step)[0]].mean() for step in range(POOL)]
    assert abs(np.corrcoef(lengths, np.arange(POOL))[0, 1]) < 0.5


def test_one_of_several_targets_is_drawn(path):
    data = prepare(path)
    drawn = Counter()
    for step in range(20 * POOL):
        rows, which = data.order(step)
        assert (which < data.answers[rows]).all()
        drawn.update(which[data.answers[rows] == 2].tolist())
    share = drawn[1] / drawn.total()
    assert abs(share - 0.5) < 4 * np.sqrt(0.25 / drawn.total())


def test_held_out_pairs_come_once_with_their_first_target(path):
    data = prepare(path)
    for split in (VAL, TEST):
        own = data.splits[split]
        found = [row for batch in data.split_batches(split, 3) for row in zip(*batch.values())]
        assert len(found) == len(own.pairs)
        texts = {}
        for source, mask, _, targets in found:
            text = data.tokenizer.decode(source[mask].tolist()[:-1])
            texts[text] = data.tokenizer.decode(targets[targets >= 0].tolist()[:-1])
        assert texts == {pair.source: pair.targets[0] for pair in own.pairs}
    lengths = [int(batch["mask"].sum(1).max()) for batch in data.val_batches(5)]
    assert lengths == sorted(lengths)


def test_long_pairs_are_left_out_and_counted(path):
    short = SimpleNamespace(**vars(MODEL) | {"context_length": 16})
    data = prepare(path, model=short)
    whole = prepare(path)
    expected = {
        split: sum(
            len(pair.source) < 16 and min(len(target) for target in pair.targets) < 16
            for pair in whole.splits[split].pairs
        )
        for split in SPLITS
    }
    assert {split: len(data.splits[split].pairs) for split in SPLITS} == expected
    count = 400 - sum(expected.values())
    assert f"{count} pairs left out, longer than --model.context-length 16" in data.description


def test_a_folder_that_was_altered(path):
    prepare(path)
    (pairs,) = path.parent.glob("cache/*/pairs.jsonl")
    pairs.write_text(pairs.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(ValueError, match="altered: delete the folder"):
        prepare(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": ""}, "must not be empty"),
        ({"hidden": 1.0}, r"--data\.hidden 1\.0"),
        ({"span_length": 0.5}, r"--data\.span-length 0\.5"),
        ({"val_fraction": 0}, r"--data\.val-fraction 0"),
    ],
)
def test_settings_that_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TextPairConfig(**values)
