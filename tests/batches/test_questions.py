"""Questions and passages as data: what is read, which negatives are mined, the splits."""

import json

import numpy as np
import pytest

from data import passages as boolq
from data.passages import Question
from data.splits import SPLITS, TEST, TRAIN, VAL
from tinyfm.batches.questions import MINED, QuestionConfig, QuestionData, mine
from tinyfm.retrieval import BM25
from tinyfm.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pair(i: int, question: str = "") -> dict[str, str]:
    return {"question": question or f"who is n{i}", "passage": f"n{i} is one of group g{i % 5}"}


def open_data(path: str, tmp_path, context: int = 64, **options) -> QuestionData:
    config = QuestionConfig(path, cache=str(tmp_path / "cache"), **options)
    return QuestionData(config, BYTES, context, batch_size=6, seed=0)


def test_rows_that_are_no_pairs_are_skipped_with_the_reason(tmp_path):
    rows = [pair(i) for i in range(30)]
    rows += [
        pair(3, "what about n3"),
        pair(4),
        {"question": "a"},
        pair(5, " "),
        pair(6, "WHO is n7"),
    ]
    rows += [{"question": "x", "passage": "long " * 20}]
    data = open_data(write(tmp_path / "q.jsonl", rows), tmp_path)
    assert sum(map(len, data.splits.values())) == 32
    for reason in (
        "the same as a row before (q.jsonl:32)",
        "no 'passage' that is a text (q.jsonl:33)",
        "no 'question' that is a text (q.jsonl:34)",
        "1 question left out, asked before",
        "1 text cut to the 64 tokens that are read",
    ):
        assert reason in data.description
    assert all(len(ids) <= 64 for ids in data.passages)
    rows = [(split, row.question.split()) for split in SPLITS for row in data.splits[split]]
    assert len({split for split, words in rows if "n3" in words}) == 1  # of two questions


def test_a_batch_is_a_function_of_the_step_and_negatives_are_no_answers(tmp_path):
    path = write(tmp_path / "q.jsonl", [pair(i) for i in range(40)])
    data = open_data(path, tmp_path, negatives=2)
    batch = data.batch(7)
    again = data.batch(7, slice(2, 4))
    assert batch["ids"].shape == (6, 3) and batch["passages"].shape[:2] == (6, 3)
    assert again["ids"].equal(batch["ids"][2:4])
    assert not data.batch(8)["ids"].equal(batch["ids"])
    for ids, passages, lengths in zip(batch["ids"], batch["passages"], batch["passage_lengths"]):
        assert len(set(ids.tolist())) == 3
        for number, tokens, length in zip(ids.tolist(), passages, lengths):
            assert BYTES.decode(tokens[:length].tolist()) == data.texts[number]
        assert all(data.parts[i] == TRAIN for i in ids.tolist())
    assert len(list(data.split_batches(VAL, 6))) == 1 and len(data.splits[VAL]) == 2


def test_mined_negatives_are_the_best_of_bm25_without_the_right_article(tmp_path):
    passages = ["cat sat", "cat cat", "cat mat", "dog", "dog cat", "a cat"]
    articles = [0, 0, 1, 2, 2, 3]
    allowed = [0, 1, 2, 3, 4]
    found = mine(["cat", "dog"], [0, 3], passages, articles, allowed)
    scores = BM25([passages[i] for i in allowed]).scores("cat")
    assert found.shape == (2, 3) and found[0].tolist() == sorted(
        [2, 3, 4], key=lambda i: -scores[i]
    )
    assert set(found[1].tolist()) == {0, 1, 2}
    path = write(tmp_path / "q.jsonl", [pair(i) for i in range(40)])
    data = open_data(path, tmp_path)
    (kept,) = (tmp_path / "cache").glob("negatives-*.npy")
    before = kept.stat().st_mtime_ns
    assert np.array_equal(open_data(path, tmp_path).mined[TEST], data.mined[TEST])
    assert kept.stat().st_mtime_ns == before and data.mined[TRAIN].shape[1] == MINED
    kept.write_bytes(b"no")
    with pytest.raises(ValueError, match=rf"{kept.name} is damaged .*: delete it"):
        open_data(path, tmp_path)


def test_the_splits_of_boolq_are_those_of_its_articles(tmp_path, monkeypatch):
    rows = [
        Question(f"q{i} {j}", f"T{i} ({j}) -- text {i} {j}", True, SPLITS[max(0, i - 4)])
        for i in range(7)
        for j in range(2)
    ]
    monkeypatch.setattr(boolq, "questions", lambda: iter(rows))
    data = open_data("questions", tmp_path)
    assert [len(data.splits[split]) for split in SPLITS] == [10, 2, 2]
    with pytest.raises(ValueError, match=r"negatives 1: .*only 0 other"):
        few = [row for row in rows if row.split != TRAIN or "T0" in row.passage]
        monkeypatch.setattr(boolq, "questions", lambda: iter(few))
        open_data("questions", tmp_path)


def test_kept_negatives_are_of_the_same_splits(tmp_path, monkeypatch):
    """With fewer passages to train on, in the same order: none that is now held out."""
    for held_out in (2, 4):
        splits = [TRAIN] * (8 - held_out) + [VAL] * held_out
        rows = [Question(f"cat {i}", f"T{i} -- cat", True, own) for i, own in enumerate(splits)]
        monkeypatch.setattr(boolq, "questions", lambda rows=rows: iter(rows))
        data = open_data("questions", tmp_path)
        assert {data.parts[i] for i in data.mined[TRAIN].flatten()} == {TRAIN}


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match=r"no pair to learn from .*\"question\""):
        open_data(write(tmp_path / "a.jsonl", [{"text": "a"}]), tmp_path)
    with pytest.raises(ValueError, match=r"too few passages .*val split"):
        open_data(write(tmp_path / "b.jsonl", [pair(i) for i in range(5)]), tmp_path)
    with pytest.raises(ValueError, match=r"--data.negatives 3: .*only 2 other passages"):
        path = write(tmp_path / "c.jsonl", [pair(i) for i in range(7)])
        open_data(path, tmp_path, negatives=3, val_fraction=0.5)
    with pytest.raises(ValueError, match=r"from 0 to 20"):
        QuestionConfig(negatives=21)
