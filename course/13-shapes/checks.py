"""Checks of lesson 13. Values are worked out by hand, or by the slow way that the module has."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from course.compare import agree
from course.lessons import checks
from tinyfm import encoder, xlnet
from tinyfm.batches import masked, spans
from tinyfm.encoder import Encoder, EncoderConfig, Rows
from tinyfm.seq2seq import Block, Memory, Seq2Seq, Seq2SeqConfig
from tinyfm.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()

# ---- what a query may look at -------------------------------------------------------------------


def marks(mask: torch.Tensor) -> list[str]:
    return ["".join("#" if look else "." for look in row) for row in mask.tolist()]


@checks("query_mask")
def test_a_query_sees_what_comes_before_it_in_the_order():
    order = torch.tensor([[0, 2, 0, 1]])  # the, cat, sat, on
    got = marks(xlnet.query_mask(order, torch.tensor([[3, 1]]))[0])
    assert got == ["#.#.", "#.##"], f"queries at on and cat, orders 0 2 0 1: got {got}"


@checks("query_mask")
def test_a_query_never_sees_its_own_token():
    order = torch.stack([torch.randperm(9) for _ in range(5)])
    places = torch.arange(9).expand(5, 9)
    own = xlnet.query_mask(order, places).diagonal(dim1=1, dim2=2)
    assert not own.any(), "a query looks at the token that it predicts"


@checks("query_mask")
def test_tokens_of_the_same_order_do_not_see_each_other():
    got = marks(xlnet.query_mask(torch.tensor([[1, 0, 1, 1]]), torch.tensor([[0, 2]]))[0])
    assert got == [".#..", ".#.."], f"orders 1 0 1 1, queries at 0 and 2: got {got}"


# ---- hidden tokens ------------------------------------------------------------------------------

WORDS = masked.Vocabulary(BYTES, 258)  # the end of a text is 256, the mask 257


def hidden(text: bytes, seed: int = 0, allowed=None, **settings):
    """(ids, inputs, targets) of a text."""
    ids = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    config = masked.MaskedConfig(**settings)
    allowed = np.ones(len(ids), dtype=bool) if allowed is None else allowed
    rng = np.random.default_rng(seed)
    kept = ids.copy()
    inputs, targets = masked.hide(ids, allowed, WORDS, config, rng)
    assert (ids == kept).all(), "the ids that were given have been changed"
    return ids, inputs, targets


@checks("hide")
def test_targets_are_the_hidden_tokens_and_nothing_else():
    ids, inputs, targets = hidden(b"the cat sat on the mat " * 40)
    there = targets != masked.NOT_PREDICTED
    assert there.sum() == 138, f"{there.sum()} of 920 tokens are targets; 15% are 138"
    assert (targets[there] == ids[there]).all(), "a target is not the token that was there"
    assert (inputs == ids)[~there].all(), "a token that is not predicted was changed"


@checks("hide")
def test_most_read_the_mask_some_another_token_and_some_themselves():
    ids, inputs, targets = hidden(bytes(range(97, 123)) * 2000, hidden=0.5)
    there = targets != masked.NOT_PREDICTED
    same = inputs[there] == ids[there]
    mask = inputs[there] == 257
    shares = [mask.mean(), (~mask & ~same).mean(), same.mean()]
    agree(shares, [0.8, 0.1, 0.1], "shares of masks, other tokens, the same", tolerance=0.015)
    others = inputs[there][~mask & ~same]
    assert len(np.unique(others)) > 200, "the other tokens are not drawn from the vocabulary"


@checks("hide")
def test_special_tokens_and_forbidden_places_are_never_hidden():
    ids = np.array([256, 97, 98, 99, 256, 100, 101, 102])
    allowed = np.arange(8) < 6
    for seed in range(20):
        config = masked.MaskedConfig(hidden=0.9)
        _, targets = masked.hide(ids, allowed, WORDS, config, np.random.default_rng(seed))
        places = np.flatnonzero(targets != masked.NOT_PREDICTED).tolist()
        assert set(places) <= {1, 2, 3, 5}, f"places {places} are hidden; only 1, 2, 3, 5 may be"


@checks("hide")
def test_one_token_is_hidden_if_there_is_one():
    _, _, targets = hidden(b"ab", hidden=0.1)
    assert (targets != masked.NOT_PREDICTED).sum() == 1, "of two tokens at 10%, one is hidden"
    _, _, targets = hidden(b"ab", allowed=np.zeros(2, dtype=bool))
    assert (targets == masked.NOT_PREDICTED).all(), "nothing may be hidden, and something was"


@checks("hide")
def test_whole_words_are_hidden_with_all_their_tokens():
    text = b"some words of text here" * 4
    _, _, targets = hidden(text, whole_words=True, hidden=0.3)
    there = targets != masked.NOT_PREDICTED
    starts = [i for i, byte in enumerate(text) if byte == 32]
    for first, last in pairwise([0, *starts, len(text)]):
        part = there[first:last]
        assert part.all() or not part.any(), f"of {text[first:last]} only a part is hidden"


# ---- hidden spans -------------------------------------------------------------------------------


@checks("hide_spans")
def test_the_example_of_the_page(monkeypatch):
    """Thank you [for inviting] me to your party [last], in kept parts 2, 4 and spans 2, 1."""
    sizes = iter([np.array([2, 4]), np.array([2, 1])])
    monkeypatch.setattr(spans, "cut", lambda total, parts, rng: next(sizes))
    sentinels = np.array([90, 91, 92])
    shape = spans.Shape(9, 3, 2)
    source, target = spans.hide_spans(np.arange(9), shape, sentinels, 99, None)
    expected = [0, 1, 90, 4, 5, 6, 7, 91, 99]
    assert source.tolist() == expected, f"source {source.tolist()}, expected {expected}"
    expected = [90, 2, 3, 91, 8, 92, 99]
    assert target.tolist() == expected, f"target {target.tolist()}, expected {expected}"


@checks("hide_spans")
@pytest.mark.parametrize("seed", range(5))
def test_source_and_target_together_are_the_text(seed):
    shape = spans.shape_of(40, 0.3, 3)
    ids = np.random.default_rng(seed).permutation(40)
    sentinels = 100 - np.arange(shape.spans + 1)
    rng = np.random.default_rng(seed)
    source, target = spans.hide_spans(ids, shape, sentinels, 7000, rng)
    sizes = (len(source), len(target))
    assert sizes == (shape.source, shape.target), f"sizes {sizes}; see Shape"
    assert source[-1] == target[-1] == 7000, "source and target end with END"
    after = {}
    for token in target[:-1].tolist():
        if token in sentinels:
            own = after.setdefault(token, [])
        else:
            own.append(token)
    text = []
    for token in source[:-1].tolist():
        text += after[token] if token in sentinels else [token]
    assert text == ids.tolist(), "with the spans put back, the source is not the text"


# ---- a layer of the decoder ---------------------------------------------------------------------


def layer(decoder: bool, norm: str = "pre") -> tuple[Block, torch.Tensor, torch.Tensor]:
    """A block with random weights, states of a target (4, 8), and of a source (3, 8)."""
    torch.manual_seed(0)
    config = Seq2SeqConfig(20, 8, n_layer=1, n_head=2, d_model=8, norm=norm)
    block = Block(config, decoder).eval()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return block, torch.randn(4, 8), torch.randn(3, 8)


def all_keys(T: int, S: int) -> torch.Tensor:
    return torch.ones(1, 1, T, S, dtype=torch.bool)


@torch.no_grad()
def by_hand(block: Block, x, source, scores) -> torch.Tensor:
    """Three updates with the norms before them; source None: two."""
    rows = Rows(None, (1, len(x)))
    y = block.norm1(x)
    x = x + block.attention(y, rows, *block.attention.keys_values(y, rows), scores)
    if source is not None:
        keys = block.cross.keys_values(source, Rows(None, (1, len(source))))
        x = x + block.cross(block.cross_norm(x), rows, *keys, None)
    return x + block.mlp(block.norm2(x))


@checks("Block.forward")
def test_a_decoder_has_three_updates():
    block, x, source = layer(decoder=True)
    memory = Memory(source, Rows(None, (1, 3)))
    causal = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        got = block(x, Rows(None, (1, 4)), causal, memory)
    agree(got, by_hand(block, x, source, causal), "states after a layer of a decoder")


@checks("Block.forward")
def test_an_encoder_has_two_updates():
    block, x, _ = layer(decoder=False)
    with torch.no_grad():
        got = block(x, Rows(None, (1, 4)), all_keys(4, 4))
    expected = by_hand(block, x, None, all_keys(4, 4))
    agree(got, expected, "states after a layer of an encoder")


@checks("Block.forward")
def test_the_form_of_2017_normalises_the_sums():
    block, x, source = layer(decoder=True, norm="post")
    with torch.no_grad():
        got = block(x, Rows(None, (1, 4)), None, Memory(source, Rows(None, (1, 3))))
    squares = (got / block.norm2.weight).square().mean(1)
    agree(squares, torch.ones(4), "mean squares of the states over the gains", 1e-3)


@checks("Block.forward")
def test_padding_of_the_source_is_not_looked_up():
    block, x, source = layer(decoder=True)
    mask = torch.tensor([[True, True, False]])
    results = []
    for padding in (0.0, 50.0):
        memory = Memory(source[:2], Rows(mask, (1, 3)))
        memory.states = torch.cat((source[:2], torch.full((1, 8), padding)))
        memory.rows = Rows(None, (1, 3))
        with torch.no_grad():
            results.append(block(x, Rows(None, (1, 4)), None, memory))
    agree(*results, "states with other padding behind the source")


@checks("Block.forward")
def test_a_text_that_is_kept_is_read_once():
    """With a cache, the second token alone gives what both together give."""
    block, x, source = layer(decoder=True)
    rows = Rows(None, (1, 3))
    causal = torch.ones(2, 2, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        whole = block(x[:2], Rows(None, (1, 2)), causal, Memory(source, rows))
        memory = Memory(source, rows)
        memory.keep = True
        parts = [block(x[i : i + 1], Rows(None, (1, 1)), None, memory) for i in range(2)]
    agree(torch.cat(parts), whole, "two tokens, one after the other")
    assert len(memory.source) == len(memory.target) == 1, "the cache has one entry for a layer"


# ---- ELECTRA ------------------------------------------------------------------------------------

TARGETS = torch.tensor([[-100, 5, -100, 7], [3, -100, -100, -100]])
TEXT = torch.tensor([[4, 5, 6, 7], [3, 8, 9, 0]])
BATCH = {
    "tokens": TEXT.masked_fill(TARGETS != -100, 11),
    "targets": TARGETS,
    "mask": torch.tensor([[True] * 4, [True] * 3 + [False]]),
}


def electra(weight: float = 50.0) -> Encoder:
    torch.manual_seed(0)
    config = EncoderConfig(
        12, 4, n_layer=1, n_head=2, d_model=8, objective="electra", detection_weight=weight
    )
    model = Encoder(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def drawing(monkeypatch, tokens: list[int]) -> None:
    """The generator's draws, whatever its logits say."""
    monkeypatch.setattr(encoder, "draw", lambda logits, u: torch.tensor(tokens))


def generators(n: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


@torch.no_grad()
def parts_by_hand(
    model: Encoder, read: torch.Tensor, replaced: torch.Tensor
) -> tuple[float, float]:
    """(the generator's part, the discriminator's without its weight) of the sum over the rows."""
    logits = model(BATCH["tokens"], BATCH["mask"])
    nats = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), reduction="none").view(2, 4)
    own = 4 * nats[0].sum() / 2 + 3 * nats[1].sum() / 1
    d = model.detect(read, BATCH["mask"])
    each = torch.where(replaced, F.softplus(-d), F.softplus(d))
    return own.item(), each[BATCH["mask"]].sum().item()


@checks("Encoder.electra_loss")
def test_the_loss_by_hand(monkeypatch):
    """The draws are 5, which is right, 2 and 1, which are not: two tokens of seven are replaced."""
    drawing(monkeypatch, [5, 2, 1])
    model = electra()
    read = torch.tensor([[4, 5, 6, 2], [1, 8, 9, 0]])
    replaced = torch.tensor([[False, False, False, True], [True, False, False, False]])
    own, detection = parts_by_hand(model, read, replaced)
    loss, metrics = model.electra_loss(BATCH, generators())
    agree(metrics["weight"], 7, "the weight: real tokens")
    agree(loss, (own + 50 * detection) / 7, "the loss", 1e-3)


@checks("Encoder.electra_loss")
def test_right_draws_replace_nothing(monkeypatch):
    drawing(monkeypatch, [5, 7, 3])
    model = electra()
    own, detection = parts_by_hand(model, TEXT, torch.zeros_like(TEXT, dtype=torch.bool))
    loss, _ = model.electra_loss(BATCH, generators())
    agree(loss, (own + 50 * detection) / 7, "the loss where all draws are right", 1e-3)


@checks("Encoder.electra_loss")
def test_the_generator_does_not_learn_to_deceive():
    """Its tower has the same gradient, whatever the weight of the discriminator's loss is."""
    gradients = []
    for weight in (0.0, 50.0):
        model = electra(weight)
        model.electra_loss(BATCH, generators())[0].backward()
        gradients.append(model.generator.blocks[0].mlp.up.weight.grad)
    agree(*gradients, "gradients of the generator without and with the discriminator's loss")


@checks("Encoder.electra_loss")
def test_a_batch_may_be_cut_anywhere():
    model = electra()
    whole, _ = model.electra_loss(BATCH, generators())
    total = 0.0
    for i in range(2):
        row = {name: tensor[i : i + 1] for name, tensor in BATCH.items()}
        loss, metrics = model.electra_loss(row, generators()[i : i + 1])
        total += loss.item() * metrics["weight"].item()
    agree(total / 7, whole.item(), "the weighted mean of the losses of two rows", 1e-4)


# ---- scores by distance -------------------------------------------------------------------------


@checks("shift")
def test_two_queries_by_hand():
    """Row i starts at column T - i: 2 and 3 of the first row, 11 and 12 of the second."""
    x = torch.tensor([[[[0.0, 1, 2, 3], [10, 11, 12, 13]]]])
    agree(xlnet.shift(x), [[[[2, 3], [11, 12]]]], "scores by key, T = 2")


@checks("shift")
@pytest.mark.parametrize(("T", "M"), [(1, 0), (3, 0), (5, 4), (4, 7)])
def test_it_is_the_slow_way(T, M):
    x = torch.randn(2, 3, T, 2 * T + M, generator=torch.Generator().manual_seed(T))
    places = torch.arange(T).expand(2, T)
    agree(xlnet.shift(x), xlnet.by_key(x, places, T), f"T = {T} queries, {M} tokens in memory")


# ---- what no exercise covers --------------------------------------------------------------------


def test_a_given_token_sees_itself_and_its_like():
    got = marks(xlnet.content_mask(torch.tensor([[0, 2, 0, 1]]))[0])
    assert got == ["#.#.", "####", "#.#.", "#.##"], f"the content stream looks at {got}"


@torch.no_grad()
def test_a_target_does_not_read_what_comes_after_it():
    torch.manual_seed(0)
    config = Seq2SeqConfig(20, 8, n_layer=1, n_head=2, d_model=8, zero_init=False)
    model = Seq2Seq(config).eval()
    source = torch.tensor([[3, 4, 1]])
    first, second = (model(source, torch.tensor([[0, 5, last]])) for last in (6, 7))
    agree(first[:, :2], second[:, :2], "logits in front of a token that was changed")


@torch.no_grad()
def test_evaluation_is_not_smoothed():
    torch.manual_seed(0)
    model = Seq2Seq(Seq2SeqConfig(20, 8, n_layer=1, n_head=2, d_model=8)).eval()
    batch = {
        "source": torch.tensor([[3, 4, 1]]),
        "inputs": torch.tensor([[0, 5]]),
        "targets": torch.tensor([[5, 1]]),
    }
    loss, metrics = model.loss(batch)
    agree(loss, metrics["nats"], "the loss in evaluation, and the nats")
