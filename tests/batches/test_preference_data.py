"""Pairs and prompts as data: what is read, what is left out, and which split it is in."""

import json

import pytest

from data import functions, ratings
from data.ratings import Rated
from data.report import Report
from data.splits import SPLITS, TEST, TRAIN, VAL, Document
from tinyfm.batches.preference import PairConfig, PairData, PromptConfig, PromptData, split_by_key
from tinyfm.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pair(prompt="q", chosen="yes", rejected="no") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def open_pairs(path: str, context: int = 64, **options) -> PairData:
    return PairData(PairConfig(path, **options), BYTES, context, batch_size=4, seed=0)


def test_rows_that_are_no_pairs_are_skipped_with_the_reason(tmp_path):
    rows = [pair(f"q{i}") for i in range(20)]
    rows += [
        pair(chosen="same", rejected="same"),
        pair(chosen=" "),
        {"chosen": "a", "rejected": "b"},
        pair() | {"rejected": None},
        pair([{"role": "user", "content": "hi"}]),
        pair("q0"),
        pair("long" * 20),
    ]
    data = open_pairs(write(tmp_path / "pairs.jsonl", rows))
    assert sum(map(len, data.splits.values())) == 20
    for reason in (
        "1 skipped: chosen equals rejected (pairs.jsonl:21)",
        "1 skipped: an empty answer (pairs.jsonl:22)",
        "1 skipped: no 'prompt': give \"\" for answers to nothing (pairs.jsonl:23)",
        "1 skipped: no 'rejected' (pairs.jsonl:24)",
        "1 skipped: 'prompt' is no text; conversations are not read (pairs.jsonl:25)",
        "1 skipped: the same as a row before (pairs.jsonl:26)",
        "1 pair longer than the context of 64",
    ):
        assert reason in data.description
    row = data.splits[VAL][0]
    assert row.chosen[0] == BYTES.eot and BYTES.decode(row.chosen[row.start : -1]) == "yes"
    assert row.chosen[-1] == BYTES.eot


def test_a_batch_is_a_function_of_the_step_and_the_mask_covers_the_answers(tmp_path):
    rows = [pair(f"q{i}", "yes" * (1 + i % 3)) for i in range(20)]
    path = write(tmp_path / "pairs.jsonl", rows)
    data = open_pairs(path, cache=str(tmp_path))
    calls = []

    def log_probs(tokens, mask):
        calls.append(len(tokens))
        return (tokens[:, 1:] * mask).float()

    data.add_reference(log_probs, "hash")
    batch = data.batch(7)
    part = data.batch(7, slice(1, 3))
    for name, tensor in part.items():
        width = tensor.shape[-1]
        assert tensor.equal(batch[name][1:3, ..., :width])
    targets = batch["tokens"][..., 1:]
    assert batch["reference"].equal((targets * batch["mask"]).sum(-1).float())
    for tokens, mask in zip(targets.flatten(0, 1), batch["mask"].flatten(0, 1)):
        answer = tokens[mask].tolist()
        assert answer[-1] == BYTES.eot
        assert BYTES.decode(answer[:-1]).replace("yes", "") in ("", "no")
    # The next run reads what the reference says; another reference is asked again.
    again = open_pairs(path, cache=str(tmp_path))
    made = len(calls)
    again.add_reference(log_probs, "hash")
    assert len(calls) == made and again.batch(7)["reference"].equal(batch["reference"])
    again.add_reference(log_probs, "another")
    assert len(calls) > made


def test_equal_prompts_are_in_one_split():
    keys = [f"p{i % 10}" for i in range(30)]
    splits = split_by_key(keys, 0.4)
    assert {splits.count(split) for split in (VAL, TEST)} == {6}
    assert all(len({s for k, s in zip(keys, splits) if k == key}) == 1 for key in keys)
    with pytest.raises(ValueError, match="1 prompt: give two"):
        split_by_key(["a", "a"], 0.1)


def test_what_leaves_nothing_to_learn_is_an_error(tmp_path):
    path = write(tmp_path / "same.jsonl", [pair(chosen="a", rejected="a")] * 3)
    with pytest.raises(ValueError, match=r"no pair to learn from in .*3 skipped: chosen equals"):
        open_pairs(path)
    path = write(tmp_path / "one.jsonl", [pair()])
    with pytest.raises(ValueError, match=r"has pairs of 1 prompt: give two"):
        open_pairs(path)
    path = write(tmp_path / "long.jsonl", [pair("x" * 90), pair("y" * 99)])
    with pytest.raises(ValueError, match="longest has 104 tokens and the context 64; use shorter"):
        open_pairs(path)
    path = write(tmp_path / "prompts.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=r'1 skipped: no "prompt" that is a text .prompts.jsonl:1'):
        PromptData(PromptConfig(path=path), BYTES, 20, batch_size=4, seed=0)
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "a" * n} for n in (30, 31)])
    with pytest.raises(ValueError, match=r"2 prompts longer than 20 tokens; give shorter"):
        PromptData(PromptConfig(path=path), BYTES, 20, batch_size=4, seed=0)
    for words in ({"reward": "positive"}, {"judge": "runs/reward"}):
        with pytest.raises(ValueError, match=r"--data\.judge RUN"):
            PromptConfig(**words)


def test_rated_sentences_become_pairs_and_prompts(monkeypatch):
    rows = []
    for i in range(24):
        mean = i % 3 - 1
        text = f"film number {i} is one that people rate as {mean}"
        rows.append(Rated(text, (mean, mean), text, SPLITS[i // 8]))
    monkeypatch.setattr(ratings, "rows", lambda name, report: rows)
    data = open_pairs("films")
    assert [len(data.splits[split]) for split in SPLITS] == [2, 3, 2]  # those of the rarer sign
    for row in data.splits[TRAIN]:
        assert BYTES.decode(row.chosen[1:-1]).endswith("as 1") and row.start == 1
        assert BYTES.decode(row.rejected[1:-1]).endswith("as -1")
    prompts = PromptData(PromptConfig("positive", "judge"), BYTES, 40, batch_size=4, seed=0)
    assert prompts.path == "films" and prompts.whole
    assert sorted(BYTES.decode(ids[1:]) for ids in prompts.splits[VAL])[0] == "film number 10 is"
    batch = prompts.batch(0)
    assert batch["prompts"].shape[0] == 4
    first = batch["prompts"][0][: batch["lengths"][0]].tolist()
    assert first in prompts.splits[TRAIN]
    assert prompts.batch(0, slice(1, 2))["lengths"].equal(batch["lengths"][1:2])


SOURCE = '''
class Shape:
    """A shape."""

    def area(self):
        """Its area,
        in metres."""
        return 0

    def silent(self):
        return 1

    def empty(self):
        """Does nothing."""


def g(x): "Short."; return x
'''
FURTHER_LEFT = '''
class Shape:
\f
    def area(self):
        """Its area,
in metres."""
        return 0
'''


def test_prompts_of_functions_end_with_their_docstring(monkeypatch):
    expected = 'def area(self):\n    """Its area,\n    in metres."""\n'
    assert list(functions.prompts_of(SOURCE)) == [("area", expected)]
    left = 'def area(self):\n    """Its area,\nin metres."""\n'
    assert list(functions.prompts_of(FURTHER_LEFT)) == [("area", left)]
    found = [Document(SOURCE, VAL, "m:Shape"), Document(SOURCE, VAL, "m:2"), Document("if", TEST)]
    monkeypatch.setattr(functions.stdlib, "documents", lambda: iter(found))
    report = Report()
    assert list(functions.documents(report)) == [Document(expected, VAL, "m:Shape area")]
    assert "1 skipped: no Python: SyntaxError" in str(report)
    assert "1 skipped: the same as another (area)" in str(report)
