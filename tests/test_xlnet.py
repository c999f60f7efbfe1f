"""XLNet: who may look at whom, relative positions, memory, and the loss, by hand."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import normal, random_weights

from tinyfm import xlnet
from tinyfm.calc import trace
from tinyfm.xlnet import Attention, View, XLNet, XLNetConfig, by_key, remember, shift

V, T = 23, 12
SMALL = XLNetConfig(V, T, n_layer=2, n_head=4, d_model=32, zero_init=False)
SEGMENTS = replace(SMALL, segments=True)


def build(config: XLNetConfig = SMALL) -> XLNet:
    return random_weights(lambda: XLNet(config)).double()


def random_batch(rows: int = 4) -> dict[str, torch.Tensor]:
    """Rows of unequal length, in which some tokens are predicted, not equally many in each row."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(T) < torch.tensor([T, 5, 9, 7])[:rows, None]
    tokens = torch.randint(1, V, (rows, T), generator=g).where(mask, 0)
    order = torch.stack([torch.randperm(T, generator=g) for _ in range(rows)])
    order = (order - 7).clamp(min=0) * mask
    return {
        "tokens": tokens,
        "mask": mask,
        "order": order,
        "targets": tokens.where(order > 0, -100),
        "segments": torch.randint(2, (rows, T), generator=g),
    }


# ---- what may be looked at -----------------------------------------------------------------------


def test_masks_of_three_tokens_by_hand():
    """x0 is given; x2 is predicted first, then x1."""
    order = torch.tensor([[0, 2, 1]])
    assert xlnet.content_mask(order)[0].int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 0, 1]]
    query = xlnet.query_mask(order, torch.tensor([[2, 1]]))[0]
    assert query.int().tolist() == [[1, 0, 0], [1, 0, 1]]  # of x2, of x1


def test_the_picture_of_the_lesson():
    """Each line of the picture is one of the docstring, where the predictions stand beside it."""
    drawn = xlnet.picture(["the", "cat", "sat", "on"], [0, 2, 0, 1]).splitlines()
    lines = xlnet.__doc__.splitlines()
    start = next(i for i, line in enumerate(lines) if "g looks at" in line)
    for line, own in zip(lines[start:], drawn):
        assert line.split("  p(")[0].rstrip() == f"    {own}"
    # The columns also stand in line if an order has two digits.
    title, _, *lines = xlnet.picture(["a"] * 11, range(11)).splitlines()
    assert [line.index("#") for line in lines] == [title.index("h looks")] * 11


def test_a_prediction_depends_on_what_is_earlier_in_the_order_alone():
    model = build()
    tokens = torch.arange(1, T + 1)[None]
    order = torch.tensor([[0, 3, 0, 0, 1, 0, 4, 0, 2, 0, 0, 0]])
    places = torch.tensor([[4, 8, 1, 6]])
    before = model(tokens, order, places)
    for changed in range(T):
        other = tokens.clone()
        other[0, changed] = V - 1
        moved = (model(other, order, places) != before).any(-1)[0]
        assert moved.tolist() == (order[0, changed] < torch.arange(1, 5)).tolist()


@pytest.mark.parametrize("order", [(2, 3, 1), (1, 2, 3), (3, 2, 1)])
def test_the_probabilities_of_all_texts_add_up_to_one(order):
    """With nothing given, in any order: a token that saw itself would break this."""
    model = build(XLNetConfig(3, 3, n_layer=2, n_head=2, d_model=8, zero_init=False))
    texts = torch.tensor([*itertools.product(range(3), repeat=3)])  # (27, 3)
    everywhere = torch.arange(3).expand(27, 3)
    logits = model(texts, torch.tensor(order).expand(27, 3), everywhere)
    log_p = logits.log_softmax(-1).gather(-1, texts[..., None]).sum((1, 2))
    torch.testing.assert_close(log_p.exp().sum().item(), 1.0)
    assert log_p.std() > 0.01


def test_tokens_of_equal_order_are_predicted_as_if_the_others_were_hidden():
    model = build()
    tokens = torch.arange(1, T + 1)[None]
    places = torch.tensor([[3, 4]])
    order = torch.zeros_like(tokens).index_fill(1, places[0], 1)
    together = model(tokens, order, places)
    for i, place in enumerate((3, 4)):
        other = tokens.clone()
        other[0, [3, 4]] = 0
        alone = model(other, order, torch.tensor([[place]]))
        torch.testing.assert_close(together[:, i], alone[:, 0])


@pytest.mark.parametrize("config", [SMALL, SEGMENTS])
def test_padding_changes_nothing(config):
    model = build(config)
    batch = random_batch()
    segments = batch["segments"] if config.segments else None
    states = model.hidden(batch["tokens"], batch["mask"], segments)
    assert not states[~batch["mask"]].any()
    places = xlnet.places_of(batch["targets"])
    logits = model(batch["tokens"], batch["order"], places.clamp(min=0), batch["mask"], segments)
    for i, n in enumerate(batch["mask"].sum(1).tolist()):
        row = slice(i, i + 1)
        own = None if segments is None else segments[row, :n]
        alone = model.hidden(batch["tokens"][row, :n], None, own)
        torch.testing.assert_close(states[row, :n], alone)
        real = places[row][places[row] >= 0][None]
        found = model(batch["tokens"][row, :n], batch["order"][row, :n], real, None, own)
        torch.testing.assert_close(logits[row, : real.size(1)], found)


# ---- relative positions and memory ---------------------------------------------------------------


@pytest.mark.parametrize("M", [0, 3])
def test_the_shift_is_the_obvious_index(M):
    T = 5
    S = M + T
    x = normal(2, 3, T, S + T)
    slow = torch.empty(2, 3, T, S)
    for i in range(T):
        for j in range(S):
            distance = M + i - j
            slow[:, :, i, j] = x[:, :, i, S - distance]  # the columns are S, S - 1, ..., 1 - T
    assert torch.equal(shift(x), slow)
    places = torch.tensor([[4, 0], [2, 3]])
    rows = torch.arange(2)[:, None]
    picked = by_key(x[rows, :, places].transpose(1, 2), places, T)
    assert torch.equal(picked, slow[rows, :, places].transpose(1, 2))


def test_attention_is_the_formula():
    """One head, two tokens in memory, segments: score by score."""
    config = replace(SEGMENTS, n_head=1, d_model=8)
    layer = random_weights(lambda: Attention(config)).double()
    h, before = normal(1, 3, 8).double(), normal(1, 2, 8, seed=1).double()
    distances = xlnet.encode_distances(3, 5, 8, h.device).double()
    same = torch.tensor([[[1, 1, 1, 0, 1], [0, 0, 0, 1, 0], [1, 1, 1, 0, 1]]]).bool()
    allowed = torch.tensor([[[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]]).bool()
    states = torch.cat((before, h), 1)
    found = layer(h, layer.keys(states, distances), View(None, allowed, same))

    u, v, b = layer.content_bias[0], layer.position_bias[0], layer.segment_bias[0]
    for i in range(3):
        q = layer.q(h[0, i])
        scores = []
        for j in range(5):
            angles = (2 + i - j) / 10_000 ** (torch.arange(0, 8, 2).double() / 8)
            r = layer.r(torch.cat((angles.sin(), angles.cos())))
            s = layer.segment_embedding[0 if same[0, i, j] else 1, 0]
            score = ((q + u) @ layer.k(states[0, j]) + (q + v) @ r + (q + b) @ s) / math.sqrt(8)
            scores.append(score if allowed[0, i, j] else score - torch.inf)
        weights = torch.stack(scores).softmax(0)
        expected = layer.out(weights @ layer.v(states[0]))
        torch.testing.assert_close(found[0, i], expected, atol=1e-6, rtol=1e-6)


def test_reading_in_pieces_is_reading_at_once():
    """Where no token may look at a later piece: the order is the number of the piece."""
    model = build(replace(SMALL, n_layer=3))
    tokens = torch.arange(1, T + 1)[None].expand(2, T)
    pieces = torch.tensor([0] * 5 + [1] * 4 + [2] * 3).expand(2, T)
    at_once = model.streams(tokens, pieces).content
    for most in (T, 2):
        memory = None
        found = []
        for n in range(3):
            states = model.streams(tokens[:, pieces[0] == n], memory=memory)
            memory = remember(states, memory, most)
            found.append(states.content)
        difference = (torch.cat(found, 1) - at_once).abs().amax((0, 2))
        assert (difference < 1e-12).tolist() == [most == T or place < 5 for place in range(T)]
    assert memory[0].shape == (2, 2, 32) and not memory[1].requires_grad
    with pytest.raises(ValueError, match="most is 0"):
        remember(states, memory, 0)


def test_a_batch_with_memory():
    """A prediction from left to right is the same with the text in front as memory, or given."""
    model = build(replace(SMALL, n_layer=1))
    tokens = torch.arange(1, T + 1)[None]
    places = torch.arange(4, T)[None]
    order = torch.tensor([[0] * 4 + [*range(1, 9)]])
    whole = model(tokens, order, places)
    batch = {"tokens": tokens[:, 4:], "before": tokens[:, :4], "targets": tokens[:, 4:]}
    found, logits = model.predictions(batch | {"order": order[:, 4:]})
    assert found.tolist() == [*range(8)]
    torch.testing.assert_close(logits, whole[0].float())


# ---- the loss ------------------------------------------------------------------------------------


def test_loss_is_that_of_each_prediction():
    model = build(SEGMENTS)
    batch = random_batch()
    nats = []
    for i, place in (batch["order"] > 0).nonzero().tolist():
        row = {name: tensor[i : i + 1] for name, tensor in batch.items()}
        arguments = (row["mask"], row["segments"])
        logits = model(row["tokens"], row["order"], torch.tensor([[place]]), *arguments)
        nats.append(F.cross_entropy(logits[0].float(), row["tokens"][0, place : place + 1]))
    loss, metrics = model.loss(batch)
    assert metrics["weight"] == len(nats) > 6
    torch.testing.assert_close(loss, torch.stack(nats).mean())
    # Parts of the batch add up, and the places may be given.
    total = 0
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: tensor[rows] for name, tensor in batch.items()}
        part["places"] = xlnet.places_of(batch["targets"])[rows]
        value, own = model.loss(part)
        total += value * own["weight"]
    torch.testing.assert_close(total / len(nats), loss)
    nothing = batch | {"targets": torch.full_like(batch["targets"], -100)}
    assert all(value == 0 for value in (model.loss(nothing)[0], model.loss(nothing)[1]["weight"]))


def test_it_learns():
    """Rows of one number: a hidden place has the number of the others, in whatever order."""
    torch.manual_seed(0)
    model = XLNet(replace(SMALL, zero_init=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        tokens = torch.randint(1, V, (32, 1), generator=g).expand(32, T)
        order = torch.stack([torch.randperm(T, generator=g) for _ in range(32)])
        batch = {"tokens": tokens, "order": (order - 7).clamp(min=0)}
        batch["targets"] = tokens.where(batch["order"] > 0, -100)
        optimizer.zero_grad()
        loss, _ = model.loss(batch)
        loss.backward()
        optimizer.step()
    assert loss < 0.3  # ln 22 = 3.1 at first


def test_in_bfloat16_every_weight_has_a_gradient():
    model = build(SEGMENTS).float()
    batch = random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = model.loss(batch)
    half.backward()
    torch.testing.assert_close(half, model.loss(batch)[0], rtol=0.03, atol=0)
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


def test_the_calculator_can_run_it():
    counted = trace.count_flops(XLNet(SEGMENTS), 2)
    heads = 6 * 2 * 2 * 32 * V  # 2 rows of 2 places, forward and backward
    assert sum(counted["head"]) == heads


# ---- bad input -----------------------------------------------------------------------------------


def test_rows_that_cannot_be_read():
    tokens = torch.tensor([[1, V]])
    with pytest.raises(ValueError, match=f"token id {V} is not one .* 0 ... {V - 1}"):
        build().hidden(tokens)
    with pytest.raises(ValueError, match=r"segments False: leave the segments out"):
        build().hidden(tokens - 1, segments=torch.zeros_like(tokens))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 30}, "d_model 30 is not divisible by 2 and n_head 4; use 32"),
        ({"d_model": 5, "n_head": 5}, "not divisible by 2 and n_head 5; use 10"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"n_layer": 0}, "n_layer is 0; it must be at least 1"),
        ({"d_ff": -1}, "d_ff is -1"),
    ],
)
def test_settings_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **fields)
