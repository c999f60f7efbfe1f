"""What is held out: splits by hash, the overlap in runs of 13 words, and the shares of the data."""

import random

import numpy as np
import pytest

from data import chats, dedupe, splits
from data.splits import HELD_OUT, SPLITS, TRAIN
from tinyfm.batches.text import TextConfig, TextData
from tinyfm.recipes.registry import find_preset

EXPLAIN = ("What does", "What is", "Explain", "Tell me what")


def words(draw: random.Random, count: int) -> list[str]:
    return [f"w{draw.randrange(10_000)}" for _ in range(count)]


# ---- splits --------------------------------------------------------------------------------------


def test_a_split_depends_on_the_name_alone_and_has_its_share():
    names = [f"name {i}" for i in range(20_000)]
    found = [splits.split_of(name, 0.2) for name in names]
    for split, share in ((TRAIN, 0.8), ("val", 0.1), ("test", 0.1)):
        assert abs(found.count(split) / len(found) - share) < 0.01
    # A larger share holds out more, and no test document becomes training text.
    more = [splits.split_of(name, 0.4) for name in names]
    assert all(b != TRAIN for a, b in zip(found, more) if a != TRAIN)


def test_a_name_is_in_the_same_split_on_every_machine():
    """Python's own hash of a text would differ from process to process."""
    named = {"pathlib:Path": "val", "b": "val", "json.decoder:JSONDecoder": "test", "os": TRAIN}
    assert {name: splits.split_of(name, 0.5) for name in named} == named


# ---- overlap -------------------------------------------------------------------------------------


def slow_count(held_out: str, training: list[str]) -> tuple[int, int]:
    """The definition, word by word."""
    size = splits.RUN_WORDS
    known = set()
    for text in training:
        own = dedupe.WORD.findall(text.lower())
        known |= {tuple(own[i : i + size]) for i in range(len(own) - size + 1)}
    own = dedupe.WORD.findall(held_out.lower())
    covered = set()
    for i in range(len(own) - size + 1):
        if tuple(own[i : i + size]) in known:
            covered |= {*range(i, i + size)}
    return len(covered), len(own)


def test_overlap_is_that_of_the_definition():
    draw = random.Random(0)
    training = [" ".join(words(draw, 300)) for _ in range(20)]
    held_out = []
    for length in (0, 5, 12, 13, 14, 30, 100):
        quoted = training[draw.randrange(20)].split()[100 : 100 + length]
        held_out.append(" ".join([*words(draw, 40), *quoted, *words(draw, 25)]))
    counts = splits.overlap_of(held_out, training).tolist()
    assert counts == [list(slow_count(text, training)) for text in held_out]
    assert [covered for covered, _ in counts] == [0, 0, 0, 13, 14, 30, 100]
    assert splits.share_of(np.array(counts)) == 157 / sum(total for _, total in counts)


def test_case_and_punctuation_do_not_count_and_short_texts_have_no_runs():
    training = ["The quick brown fox, jumps over: the lazy dog and then it (slowly) sleeps"]
    held_out = [
        "the QUICK brown fox jumps over the lazy dog, and then it slowly sleeps.",
        "The quick",
    ]
    assert splits.overlap_of(held_out, training).tolist() == [[14, 14], [0, 0]]
    assert splits.share_of(splits.overlap_of([], training)) == 0
    assert splits.share_of(splits.overlap_of(held_out, [])) == 0


def test_the_largest_overlaps_are_left_out_first():
    counts = np.array([[0, 100], [50, 100], [1, 100], [90, 100], [2, 100], [0, 0]])
    assert splits.overlapping(counts, 0.02) == [1, 3]
    assert splits.overlapping(counts, 0.0) == [1, 3, 4]  # at least half stay
    assert splits.overlapping(counts, 1.0) == []
    assert splits.overlapping(np.zeros((0, 2), dtype=np.int64)) == []


# ---- the real data -------------------------------------------------------------------------------


def read_texts(data: TextData, name: str) -> list[str]:
    """The documents of a split, as they were prepared."""
    split = data.split(name)
    ends = [*split.starts[1:], len(split) - 1]
    parts = (split.tokens[a + 1 : b].tolist() for a, b in zip(split.starts, ends))
    return [split.tokenizer.decode(ids) for ids in parts]


@pytest.fixture(scope="module")
def prepared(shared_cache) -> dict[str, dict[str, list[str]]]:
    """{source: {split: texts}} of docs and stdlib, prepared as test_readme.py does."""
    shared = {"val_fraction": 0.01, "cache": str(shared_cache)}
    docs = find_preset("gpt").run
    found = {}
    for name, tokenizer, vocab_size in (
        ("docs", docs.data.tokenizer, docs.model.vocab_size),
        ("stdlib", "bytes", 257),
    ):
        config = TextConfig(path=name, tokenizer=tokenizer, **shared)
        data = TextData.prepare(config, vocab_size, 256, batch_size=4, seed=0)
        found[name] = {split: read_texts(data, split) for split in SPLITS}
    return found


@pytest.mark.parametrize("name", ["docs", "stdlib"])
def test_held_out_text_is_large_and_not_in_training(name, prepared):
    texts = prepared[name]
    sizes = {split: sum(map(len, parts)) for split, parts in texts.items()}
    for split in HELD_OUT:
        assert len(texts[split]) >= 150
        assert 0.01 < sizes[split] / sum(sizes.values()) < 0.06
        assert splits.share_of(splits.overlap_of(texts[split], texts[TRAIN])) < 0.01
        assert not set(texts[split]) & set(texts[TRAIN])


def test_a_base_of_docs_has_not_read_the_held_out_code_and_answers(prepared):
    docs = prepared["docs"][TRAIN]
    for split in HELD_OUT:
        assert splits.share_of(splits.overlap_of(prepared["stdlib"][split], docs)) < 0.01
    read = " ".join(" ".join(docs).split())
    told = {split: [] for split in SPLITS}
    talks = list(chats.conversations())
    for split in HELD_OUT:
        said = [chats.said_in(talk["messages"]) for talk in talks if talk["split"] == split]
        assert splits.share_of(splits.overlap_of(said, docs)) < 0.01
    for talk in talks:
        for question, answer in zip(talk["messages"], talk["messages"][1:]):
            if question["content"].startswith(EXPLAIN) and answer["role"] == "assistant":
                told[talk["split"]].append(answer["content"])
    assert np.mean([answer in read for answer in told[TRAIN][::20]]) > 0.9
    for split in HELD_OUT:
        assert len(told[split]) > 100
        assert np.mean([answer in read for answer in told[split]]) < 0.01
