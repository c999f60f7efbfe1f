"""Hidden spans: by hand, how many and how long by simulation, and that a batch is a function."""

import math
from collections import Counter
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest

from tinyfm.batches import spans
from tinyfm.batches.spans import Shape, SpanData, cut, hide_spans, longest_shape, shape_of
from tinyfm.batches.text_pairs import TextPairConfig
from tinyfm.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
MODEL = SimpleNamespace(vocab_size=262, context_length=32, start_id=0, end_id=256)
SENTINELS = 261 - np.arange(4)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(120):  # enough for whole documents to be held out
        words = " ".join(f"w{i}x{j}" for j in range(20))
        (folder / f"{i}.txt").write_text(f"text {i}: {words}\n", encoding="utf-8")
    return folder


def prepare(path, batch_size=4, seed=0) -> SpanData:
    config = TextPairConfig(
        "spans", text=str(path), tokenizer="bytes", cache=str(path.parent / "cache")
    )
    return SpanData.prepare(config, MODEL, batch_size, seed)


# ---- one row -------------------------------------------------------------------------------------


def test_the_example_of_the_paper(monkeypatch):
    """Thank you <0> me to your party <1> week; <0> for inviting <1> last <2>, with one more word
    kept at the start of each part."""
    text = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week", "now"]
    ids = np.arange(len(text))
    sizes = iter([np.array([2, 4]), np.array([2, 3])])
    monkeypatch.setattr(spans, "cut", lambda *_: next(sizes))
    source, target = hide_spans(ids, Shape(11, 5, 2), np.array([101, 102, 103]), 100, None)
    assert source.tolist() == [0, 1, 101, 4, 5, 6, 7, 102, 100]
    assert target.tolist() == [101, 2, 3, 102, 8, 9, 10, 103, 100]


def test_all_ways_to_cut_are_equally_likely():
    rng = np.random.default_rng(0)
    counts = Counter(tuple(cut(6, 3, rng)) for _ in range(10_000))
    assert len(counts) == math.comb(5, 2)
    assert all(sum(sizes) == 6 and min(sizes) >= 1 for sizes in counts)
    expected = 10_000 / 10
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 9 + 5 * math.sqrt(18)
    assert cut(5, 1, rng).tolist() == [5]
    assert cut(3, 3, rng).tolist() == [1, 1, 1]


def test_15_percent_in_spans_of_3(path):
    """Simulated: the text comes back, and so many tokens are hidden, in spans of that mean."""
    shape = shape_of(200, 0.15, 3.0)
    assert shape == Shape(200, 30, 10)
    sentinels = 1020 - np.arange(11)
    ids = np.arange(200)
    lengths = []
    hidden_at = np.zeros(200)
    for seed in range(300):
        source, target = hide_spans(ids, shape, sentinels, 999, np.random.default_rng(seed))
        assert len(source) == shape.source and len(target) == shape.target
        assert source[-1] == target[-1] == 999
        assert target[-2] == sentinels[-1]
        assert [token for token in source if token >= 1010] == sentinels[:-1].tolist()
        assert [token for token in target if token >= 1010] == sentinels.tolist()
        own = {}
        for token in target[:-1].tolist():
            if token >= 1010:
                span = own.setdefault(token, [])
            else:
                span.append(token)
        whole = []
        for token in source[:-1].tolist():
            whole += own.get(token, [token])
        assert whole == ids.tolist()
        lengths += [len(span) for span in own.values() if span]
        hidden_at[[token for span in own.values() for token in span]] += 1
    assert len(lengths) == 3000 and np.mean(lengths) == 3
    assert hidden_at[0] == 0 and hidden_at[-1] == 300  # as in T5's code
    middle = hidden_at[40:160] / 300
    assert abs(middle.mean() - 0.15) < 0.02
    # Lengths of a random composition: P(1) = C(28, 8) / C(29, 9).
    ones = Counter(lengths)[1] / 3000
    assert abs(ones - math.comb(28, 8) / math.comb(29, 9)) < 0.05


@pytest.mark.parametrize("context_length", [5, 6, 17, 128])
def test_the_longest_window_that_fits(context_length):
    config = TextPairConfig("spans")
    shape = longest_shape(config, context_length)
    assert max(shape.source, shape.target) <= context_length
    longer = shape_of(shape.length + 1, config.hidden, config.span_length)
    assert max(longer.source, longer.target) > context_length
    with pytest.raises(ValueError, match=r"--model\.context-length 3 has no room"):
        longest_shape(config, 3)


# ---- batches -------------------------------------------------------------------------------------


def test_a_batch_of_spans(path):
    data = prepare(path)
    later = data.batch(9)
    data.batch(0)
    assert all(data.batch(9)[name].equal(later[name]) for name in later)
    assert not prepare(path, seed=1).batch(9)["source"].equal(later["source"])
    parts = [data.batch(9, slice(i, i + 1)) for i in range(4)]
    for name in later:
        assert [part[name][0].tolist() for part in parts] == later[name].tolist()
    assert later["mask"].all() and (later["targets"] >= 0).all()
    # The window comes back: sentinels replaced by what follows them in the target.
    windows = data.text.batch(9)["tokens"][:, :-1].tolist()
    for source, target, window in zip(later["source"].tolist(), later["targets"].tolist(), windows):
        pieces = [list(g) for k, g in groupby(target[:-1], lambda t: t >= 258) if not k]
        pieces = iter(pieces)
        whole = []
        for token in source[:-1]:
            whole += next(pieces) if token >= 258 else [token]
        assert whole == window


def test_held_out_windows_never_change(path):
    data = prepare(path)
    batches = list(data.split_batches("test", 4))
    again = list(prepare(path, seed=5, batch_size=2).split_batches("test", 4))
    assert all(a["source"].equal(b["source"]) for a, b in zip(batches, again, strict=True))
    count = sum(len(batch["source"]) for batch in batches)
    assert count == len(data.text.split("test")) // data.shape.length


def test_sentinels_are_t5s_or_the_last_rows():
    assert spans.find_sentinels(BYTES, 262, 4).tolist() == [261, 260, 259, 258]
    with pytest.raises(ValueError, match=r"--model\.vocab-size 262"):
        spans.find_sentinels(BYTES, 261, 5)
    names = {f"<extra_id_{i}>": 300 - i for i in range(100)}
    t5 = SimpleNamespace(specials=names, vocab_size=301)
    assert spans.find_sentinels(t5, 301, 3).tolist() == [300, 299, 298]


def test_texts_that_are_too_short(tmp_path):
    (tmp_path / "a.txt").write_text("short text " * 12, encoding="utf-8")
    with pytest.raises(ValueError, match=r"fewer than the \d+ of a row"):
        prepare(tmp_path / "a.txt")
