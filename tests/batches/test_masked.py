"""Hidden tokens: which, how many, what stands in their place, and that a batch is a function."""

import math

import numpy as np
import pytest
import torch

from tinyfm.batches import masked
from tinyfm.batches.masked import NOT_PREDICTED, MaskedConfig, MaskedData, Vocabulary, hide
from tinyfm.tokenizer import ByteTokenizer, train

BYTES = ByteTokenizer()
VOCAB = 260  # bytes, the end-of-text token, two spare rows and the mask
MASK = VOCAB - 1
TEXT = "A window of text, and after it another one: naïve, short and unlike. "


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(BYTES, VOCAB)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(120):  # enough for whole documents to be held out
        words = " ".join(f"w{i}x{j}" for j in range(20))
        (folder / f"{i}.txt").write_text(f"text {i}: {words}\n", encoding="utf-8")
    return folder


def prepare(path, length=32, batch_size=4, seed=0, **config) -> MaskedData:
    fields = {"tokenizer": "bytes", "cache": str(path.parent / "cache")} | config
    config = MaskedConfig(path=str(path), **fields)
    return MaskedData.prepare(config, VOCAB, length, batch_size, seed)


def hide_text(vocabulary, text=TEXT, seed=0, allowed=None, **config):
    ids = np.array(BYTES.encode(text))
    allowed = np.ones(len(ids), dtype=bool) if allowed is None else allowed
    config = MaskedConfig(**config)
    inputs, targets = hide(ids, allowed, vocabulary, config, np.random.default_rng(seed))
    return ids, inputs, targets


# ---- one row -------------------------------------------------------------------------------------


def test_targets_are_the_hidden_tokens_and_nothing_else(vocabulary):
    for seed in range(50):
        ids, inputs, targets = hide_text(vocabulary, seed=seed)
        hidden = targets != NOT_PREDICTED
        assert hidden.sum() == round(0.15 * len(ids))
        assert (targets[hidden] == ids[hidden]).all()
        assert (inputs[~hidden] == ids[~hidden]).all()
        assert vocabulary.ordinary[targets[hidden]].all()


def share_is(count: int, n: int, share: float) -> bool:
    """Whether a count of n is within 4 standard errors of a share."""
    return abs(count / n - share) < 4 * math.sqrt(share * (1 - share) / n)


def test_of_the_hidden_tokens_80_10_10_are_masked_replaced_and_kept(vocabulary):
    """By simulation. A random token of 256 is the old one by chance once in 256."""
    ids = np.full(1000, 65)
    config = MaskedConfig(hidden=0.5)
    counts = np.zeros(3, dtype=int)
    drawn = []
    n = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        inputs, targets = hide(ids, np.ones(1000, dtype=bool), vocabulary, config, rng)
        new = inputs[targets != NOT_PREDICTED]
        n += len(new)
        other = new[(new != MASK) & (new != 65)]
        counts += [(new == MASK).sum(), len(other), (new == 65).sum()]
        drawn += other.tolist()
    assert n == 20_000
    assert share_is(counts[0], n, 0.8)
    assert share_is(counts[1], n, 0.1 * 255 / 256)
    assert share_is(counts[2], n, 0.1 + 0.1 / 256)
    # The random ones are uniform over all bytes but 65, by chi-square.
    found = np.delete(np.bincount(drawn, minlength=256), 65)
    expected = len(drawn) / 255
    chi_square = ((found - expected) ** 2 / expected).sum()
    assert len(found) == 255
    assert abs(chi_square - 254) < 5 * math.sqrt(2 * 254)


def test_every_place_is_hidden_as_often_as_another(vocabulary):
    n = 4000
    ids = np.arange(40) + 65
    counts = np.zeros(40)
    for seed in range(n):
        _, targets = hide(
            ids, np.ones(40, dtype=bool), vocabulary, MaskedConfig(), np.random.default_rng(seed)
        )
        counts += targets != NOT_PREDICTED
    assert all(share_is(count, n, 0.15) for count in counts)


def test_special_tokens_are_neither_hidden_nor_drawn(vocabulary):
    ids = np.array([BYTES.eot, 65, BYTES.eot, 66, MASK, 257])
    for seed in range(200):
        inputs, targets = hide(
            ids,
            np.ones(6, dtype=bool),
            vocabulary,
            MaskedConfig(hidden=0.9),
            np.random.default_rng(seed),
        )
        assert (targets != NOT_PREDICTED).tolist() == [False, True, False, True, False, False]
        assert inputs[[0, 2, 4, 5]].tolist() == ids[[0, 2, 4, 5]].tolist()
        assert set(inputs[[1, 3]]) <= {*range(256), MASK}
    # A row of nothing else has nothing to hide, and other places are left alone.
    only = np.full(5, BYTES.eot)
    rng = np.random.default_rng(0)
    inputs, targets = hide(only, np.ones(5, dtype=bool), vocabulary, MaskedConfig(), rng)
    assert (inputs == only).all() and (targets == NOT_PREDICTED).all()
    allowed = np.arange(len(TEXT.encode())) < 7
    _, _, targets = hide_text(vocabulary, allowed=allowed, hidden=0.9)
    assert (targets[7:] == NOT_PREDICTED).all() and (targets != NOT_PREDICTED).sum() == 6


def test_whole_words_are_hidden_together(vocabulary):
    text = "one two three, four"
    words = [(0, 3), (3, 7), (7, 13), (13, 14), (14, 19)]  # with the space before; a comma
    hidden_words = np.zeros(5)
    for seed in range(300):
        _, _, targets = hide_text(vocabulary, text, seed=seed, whole_words=True, hidden=0.5)
        hidden = targets != NOT_PREDICTED
        whole = [hidden[a:b].all() for a, b in words]
        assert hidden.sum() == sum(b - a for (a, b), own in zip(words, whole) if own)
        assert 0 < hidden.sum() <= round(0.5 * len(text))
        hidden_words += whole
    assert (hidden_words > 60).all()
    # A share smaller than any word hides one word all the same.
    _, _, targets = hide_text(vocabulary, "altogether", whole_words=True)
    assert (targets != NOT_PREDICTED).all()


def test_words_of_a_learned_tokenizer():
    pieces = train("sentencepiece", [TEXT * 20], 300)
    vocabulary = Vocabulary(pieces, 301)
    assert vocabulary.mask == 300
    ids = np.array(pieces.encode(" another window, unlike"))
    starts = "".join("|" if own else "." for own in vocabulary.starts_word[ids])
    texts = [pieces.token_bytes(i).decode() for i in ids]
    assert [start == "|" for start in starts] == [t[0] in " ," for t in texts]


# ---- the mask ------------------------------------------------------------------------------------


def test_the_mask_is_the_vocabularys_own_or_the_models_last_row():
    assert masked.mask_token(BYTES, VOCAB) == MASK
    with pytest.raises(ValueError, match=r"--model\.vocab-size 258"):
        masked.mask_token(BYTES, 257)

    letters = [" ".join(f"{a}{b}{a}" for a in "abcdefgh" for b in "ijklmnop")]
    pieces = train("wordpiece", letters, 64)
    assert masked.mask_token(pieces, 64) == pieces.mask < 64


def test_a_learned_tokenizer_leaves_a_row_for_it(path):
    data = MaskedData.prepare(
        MaskedConfig(str(path), cache=str(path.parent / "cache")), 280, 16, 2, seed=0
    )
    assert data.tokenizer.vocab_size == 279
    assert data.vocabulary.mask == 279


# ---- batches -------------------------------------------------------------------------------------


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_a_batch_is_a_pure_function_of_seed_and_step(path):
    data = prepare(path)
    later = data.batch(9)
    data.batch(0)
    assert equal(data.batch(9), later)
    assert equal(prepare(path).batch(9), later)
    assert not equal(prepare(path, seed=1).batch(9), later)
    assert later["tokens"].shape == later["targets"].shape == (4, 32)
    assert next(iter(later)) == "tokens"  # whose length is the number of rows
    expected = (later["targets"].flatten() != NOT_PREDICTED).nonzero()[:, 0]
    assert later["places"].equal(expected)
    # Ranks and micro-batches read their rows of it, and so do two batches of half the size.
    parts = [data.batch(9, slice(i, i + 1)) for i in range(4)]
    halves = [prepare(path, batch_size=2).batch(step) for step in (18, 19)]
    for name in ("tokens", "targets"):
        assert torch.cat([part[name] for part in parts]).equal(later[name])
        assert torch.cat([half[name] for half in halves]).equal(later[name])


def test_each_epoch_hides_the_same_text_in_another_way(path):
    data = prepare(path, batch_size=1)
    windows = (len(data.text.train) - 32) // 32
    seen = {}
    for step in range(3 * windows):
        batch = data.batch(step)
        whole = torch.where(batch["targets"] == NOT_PREDICTED, batch["tokens"], batch["targets"])
        for i, token in enumerate(whole[0].tolist()):
            seen.setdefault((token, i), set()).add(int(batch["targets"][0, i]))
    # Of any token at any place, some were hidden and some not.
    hidden = [own - {NOT_PREDICTED} for own in seen.values()]
    assert 0.2 < np.mean([bool(own) for own in hidden]) < 1


def test_validation_has_masks_that_never_change(path):
    data = prepare(path)
    batches = list(data.val_batches(4))
    again = list(prepare(path, seed=5, batch_size=2).val_batches(4))
    assert all(map(equal, batches, again))
    assert not equal(batches[0], next(data.split_batches("test", 4)))
    # Other sizes of a batch give the same rows.
    rows = torch.cat([batch["tokens"] for batch in batches])
    assert torch.cat([batch["tokens"] for batch in data.val_batches(3)]).equal(rows)
    # The share that is hidden, and each token at most once: the last window is moved back.
    hidden = torch.cat([batch["targets"] for batch in batches]) != NOT_PREDICTED
    predicted = data.split("val").predicted
    assert len(rows) == math.ceil(predicted / 32)
    assert abs(int(hidden.sum()) / predicted - 0.15) < 0.02
    assert not hidden[-1, : len(rows) * 32 - predicted].any()


def test_each_hidden_token_has_its_document(path):
    data = prepare(path)
    split = data.split("test")
    texts = []
    for i, start in enumerate(split.starts):
        end = [*split.starts[1:], len(split) - 1][i]
        texts.append(split.tokens[start + 1 : end])
    for batch, documents in zip(data.split_batches("test", 4), data.documents_of("test", 4)):
        assert documents.shape == batch["tokens"].shape
        targets = batch["targets"].numpy()
        for row, column in zip(*np.nonzero(targets != NOT_PREDICTED)):
            assert targets[row, column] in texts[documents[row, column]]
    numbers = np.concatenate([own.ravel() for own in data.documents_of("test", 4)])
    assert set(range(len(texts))) <= set(numbers.tolist())


@pytest.mark.parametrize("hidden", [0.0, 1.0, -0.1])
def test_a_share_that_is_none(hidden):
    with pytest.raises(ValueError, match=r"--data\.hidden .* between 0 and 1"):
        MaskedConfig(hidden=hidden)
