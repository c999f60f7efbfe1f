"""Batches of rows with orders: what is predicted, in which order, and from what in front."""

from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from tinyfm.batches.masked import NOT_PREDICTED
from tinyfm.batches.permuted import PermutedConfig, PermutedData, draw_order
from tinyfm.tokenizer import ByteTokenizer

EOT = ByteTokenizer().eot
T = 24


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A folder of short texts."""
    folder = tmp_path_factory.mktemp("permuted") / "text"
    folder.mkdir()
    for i, text in enumerate([*topics.values()][:40]):
        (folder / f"{i}.txt").write_text(text[:300], encoding="utf-8")
    return folder


def prepare(path, seed: int = 0, batch_size: int = 4, segments: bool = False, **options):
    own = {"tokenizer": "bytes", "cache": str(path.parent / "cache"), "val_fraction": 0.2}
    config = PermutedConfig(str(path), **own | options)
    return PermutedData.prepare(config, 257, T, batch_size, seed, segments)


def orders(n: int, allowed: np.ndarray, **options) -> np.ndarray:
    config = PermutedConfig(**options)
    return np.stack([draw_order(allowed, config, np.random.default_rng(i)) for i in range(n)])


# ---- orders --------------------------------------------------------------------------------------


def test_the_last_of_a_random_permutation_are_predicted():
    allowed = np.arange(30) >= 6
    found = orders(600, allowed, one_in=4)
    assert (np.sort(found, axis=1)[:, -6:] == np.arange(1, 7)).all()
    assert ((found > 0).sum(1) == 6).all() and not found[:, :6].any()
    # Each allowed place as often as another, and in any order: 150 of 600, 10 standard deviations.
    counts = (found > 0).sum(0)[6:]
    assert (abs(counts - 150) < 60).all()
    first = (found == 1).sum(0)[6:]
    assert (abs(first - 25) < 25).all()


def test_one_token_is_given_unless_there_is_a_memory():
    allowed = np.ones(5, dtype=bool)
    assert (np.sort(orders(3, allowed, one_in=1)) == [0, 1, 2, 3, 4]).all()
    assert (np.sort(orders(3, allowed, one_in=1, memory=9)) == [1, 2, 3, 4, 5]).all()
    assert orders(1, np.ones(1, dtype=bool)).tolist() == [[0]]
    assert orders(1, np.zeros(4, dtype=bool)).tolist() == [[0, 0, 0, 0]]


def test_spans_are_predicted_together():
    def neighbours(**options):
        there = orders(200, np.ones(60, dtype=bool), **options) > 0
        assert (there.sum(1) == 10).all()
        return (there[:, 1:] & there[:, :-1]).sum() / 200

    # By chance 59 pairs times 10/60 times 9/59 = 1.5; in spans of 3 on average, two of three.
    assert 1 < neighbours() < 2
    assert 5.5 < neighbours(span=5) < 8


@pytest.mark.parametrize("options", [{"one_in": 0}, {"span": 0}, {"memory": -1}])
def test_options_out_of_range(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"--data.{name.replace('_', '-')} {value}: .* at least"):
        PermutedConfig(**options)


def test_rows_and_memories_that_do_not_fit(path):
    with pytest.raises(ValueError, match=r"--model.context-length 1: .* use 2 or more"):
        PermutedData.prepare(PermutedConfig(str(path)), 257, 1, 4, 0)
    most = len(prepare(path).text.train) - 1 - T
    prepare(path, memory=most).batch(0)
    with pytest.raises(ValueError, match=rf"--data.memory {most + 1}: .* use at most {most}, or"):
        prepare(path, memory=most + 1)


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0, 8])
def test_a_batch_is_a_pure_function_of_seed_and_step(path, memory):
    data = prepare(path, memory=memory)
    batch = data.batch(9)
    data.batch(0)
    assert ("before" in batch) == (memory > 0)
    assert batch["tokens"].shape == (4, T) and batch["places"].shape == (4, T // 6)
    assert batch["targets"].equal(batch["tokens"].where(batch["order"] > 0, NOT_PREDICTED))
    found = (batch["targets"] != NOT_PREDICTED).nonzero()[:, 1].view(4, -1)
    assert batch["places"].equal(found)
    # Ranks and micro-batches read their rows, and so do two batches of half the size.
    parts = [data.batch(9, slice(i, i + 1)) for i in range(4)]
    halves = [prepare(path, batch_size=2, memory=memory).batch(step) for step in (18, 19)]
    for name, tensor in batch.items():
        assert torch.cat([part[name] for part in parts]).equal(tensor)
        assert torch.cat([half[name] for half in halves]).equal(tensor)
    assert not prepare(path, seed=1, memory=memory).batch(9)["order"].equal(batch["order"])


def test_segments_number_the_documents_of_a_row(path):
    data = prepare(path, segments=True)
    rows = list(data.split_batches("val", 3))
    tokens = torch.cat([batch["tokens"] for batch in rows])
    segments = torch.cat([batch["segments"] for batch in rows])
    for row, numbers in zip(tokens.tolist(), segments.tolist()):
        expected = 0
        for token, number in zip(row, numbers):
            assert number == expected
            expected += token == EOT
    assert segments.max() > 0


@pytest.mark.parametrize("memory", [0, 1, 8])
def test_held_out_text_is_read_once(path, memory):
    data = prepare(path, memory=memory)
    split = data.split("test")
    text = split.tokens

    # In random orders, which never change.
    batches = list(data.split_batches("test", 3))
    again = list(prepare(path, seed=5, memory=memory).split_batches("test", 2))
    for name in ("tokens", "order"):
        whole = torch.cat([batch[name] for batch in batches])
        assert torch.cat([batch[name] for batch in again]).equal(whole)
    documents = np.concatenate(list(data.documents_of("test", 3)))
    assert documents.shape == whole.shape
    places, new = data.windows("test", memory)
    assert (np.sort(places[new]) == np.arange(memory, len(text))).all()
    assert not (whole.numpy()[~new] > 0).any()
    for batch, own in zip(batches, np.split(places, range(3, len(places), 3))):
        assert (batch["tokens"].numpy() == text[own]).all()
        if memory:
            assert (batch["before"].numpy()[:, -1] == text[own[:, 0] - 1]).all()
    for place, document in zip(places.ravel().tolist(), documents.ravel().tolist()):
        start = split.starts[document]
        end = [*split.starts[1:], len(text) - 1][document]
        assert start < place <= end or place == document == 0

    # From left to right: each token but the first, from those in front of it.
    found = []
    for batch in data.left_to_right("test", 3):
        for row, targets in enumerate(batch["targets"]):
            assert batch["order"][row].diff().eq(1).all()
            found += targets[targets != NOT_PREDICTED].tolist()
    assert found == text[1:].tolist()


def test_left_to_right_without_memory_is_what_a_gpt_reads(path):
    data = prepare(path)
    ours = list(data.left_to_right("val", 4))
    for batch, expected in zip(ours, data.text.split_batches("val", 4), strict=True):
        assert batch["tokens"].equal(expected["tokens"])
        assert (batch["targets"][:, 1:] != NOT_PREDICTED).equal(expected["mask"])
        assert batch["order"][0].tolist() == [*range(T + 1)]
