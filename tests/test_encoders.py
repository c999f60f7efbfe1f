"""The encoder: attention, padding, the loss of masked tokens, and ELECTRA's, by hand."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import count_parameters, generators, random_weights

from tinyfm.calc import trace
from tinyfm.encoder import Attention, Encoder, EncoderConfig, Reach, Rows, draw

V, T = 23, 12
SMALL = EncoderConfig(V, T, n_layer=2, n_head=4, d_model=32, zero_init=False)
BERT = replace(
    SMALL, norm="post", position="learned", segments=2, mlp="gelu", bias=True, d_embedding=8
)
ROBERTA = replace(BERT, first_position=1)
ELECTRA = replace(BERT, objective="electra", generator_head=2)
WINDOWS = replace(SMALL, window=2, n_layer=3, window_every=2)
CONFIGS = {
    "modern": SMALL,
    "windows": WINDOWS,
    "bert": BERT,
    "roberta": ROBERTA,
    "electra": ELECTRA,
}


def build(config: EncoderConfig) -> Encoder:
    return random_weights(lambda: Encoder(config)).double()


def random_batch(rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of unequal length, in which every third token is predicted."""
    g = torch.Generator().manual_seed(seed)
    length = torch.tensor([T, 5, 9, 7])[:rows, None]
    mask = torch.arange(T) < length
    tokens = torch.randint(1, V, (rows, T), generator=g).where(mask, 0)
    targets = torch.randint(1, V, (rows, T), generator=g)
    chosen = mask & (torch.rand(rows, T, generator=g) < 0.4)
    return {"tokens": tokens, "mask": mask, "targets": targets.where(chosen, -100)}


# ---- attention and padding -----------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 2])
def test_attention_by_hand(padding):
    """q = k = v = x: a token attends to itself with the score 1 / sqrt(2), to the other with 0."""
    layer = Attention(EncoderConfig(n_head=1, d_model=2, position="learned"))
    for linear in (layer.q, layer.k, layer.v, layer.out):
        torch.nn.init.eye_(linear.weight)
    mask = torch.tensor([[True, True] + [False] * padding])
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # the real tokens alone
    rows = Rows(mask, mask.shape)
    y = layer(x, rows, Reach(rows.keys, None))
    own = math.exp(0.5**0.5) / (math.exp(0.5**0.5) + 1)  # 0.6698
    torch.testing.assert_close(y, torch.tensor([[own, 1 - own], [1 - own, own]]))


def test_on_a_cpu_bfloat16_lists_have_few_lengths():
    """Padding fills a list up to a multiple of 128, or to the whole batch, and is dropped again."""
    g = torch.Generator().manual_seed(0)
    for rows in (3, 12, 20, 40):
        mask = torch.arange(T) < torch.randint(1, T, (rows, 1), generator=g)
        x = torch.randn(rows, T, 2, generator=g)
        with torch.autocast("cpu", torch.bfloat16):
            filled = Rows(mask, mask.shape)
        listed = filled.pack(x)
        assert filled.unpack(listed).equal(x * mask[..., None])
        assert listed[: mask.sum()].equal(Rows(mask, mask.shape).pack(x))
        assert len(listed.unique(dim=0)) == len(listed)  # padding, and no token twice
        assert len(listed) == min(128 * math.ceil(mask.sum() / 128), rows * T)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name):
    model = build(CONFIGS[name])
    batch = random_batch()
    h = model.hidden(batch["tokens"], batch["mask"])
    assert not h[~batch["mask"]].any()
    for i, n in enumerate(batch["mask"].sum(1).tolist()):
        alone = model.hidden(batch["tokens"][i : i + 1, :n])
        torch.testing.assert_close(h[i : i + 1, :n], alone)


def test_a_token_reads_both_sides():
    model = build(SMALL)
    tokens = torch.arange(1, T + 1)[None]
    before = model.hidden(tokens)
    for changed in (0, T - 1):
        other = tokens.clone()
        other[0, changed] = V - 1
        assert (model.hidden(other) != before).any(-1).all()


def test_a_window():
    """With a window of 2, a change reaches two tokens on either side in a layer, four in two."""
    model = build(replace(WINDOWS, n_layer=3, window_every=3))
    tokens = torch.arange(1, T + 1)[None]
    other = tokens.clone()
    other[0, 5] = V - 1

    def reached(layers):
        x = [model.embeddings(row) for row in (tokens, other)]
        blocks = model.tower.blocks[1 : 1 + layers]
        rows = Rows(None, (1, T))
        _, windowed = model.tower.reaches(rows, T, tokens.device)
        states = []
        for row in x:
            for block in blocks:
                row = block(rows.pack(row), rows, windowed)
                row = rows.unpack(row)
            states.append(row)
        return (states[0] != states[1]).any(-1)[0].nonzero()[:, 0].tolist()

    assert reached(1) == [3, 4, 5, 6, 7]
    assert reached(2) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [block.windowed for block in model.tower.blocks] == [False, True, True]


def test_positions_of_roberta_skip_padding():
    model = build(replace(ROBERTA, pad_id=1, first_position=2))
    tokens = torch.tensor([[1, 1, 7, 8, 1, 9]])
    assert model.embeddings.positions(tokens).tolist() == [[1, 1, 2, 3, 1, 4]]


# ---- masked tokens -------------------------------------------------------------------------------


def test_candidates_and_loss_by_hand():
    """With embeddings of 0, the logits are the biases of the decoder: here p = 1/2, 1/4, 1/4."""
    model = Encoder(EncoderConfig(3, 4, n_layer=1, n_head=2, d_model=8))
    with torch.no_grad():
        model.embeddings.token_embedding.weight.zero_()
        model.head.decoder.bias.copy_(torch.tensor([0.5, 0.25, 0.25]).log())
    tokens = torch.tensor([[2, 2, 2, 2]])
    p = model(tokens).softmax(-1)
    torch.testing.assert_close(p, torch.tensor([0.5, 0.25, 0.25]).expand(1, 4, 3))
    loss, metrics = model.loss({"tokens": tokens, "targets": torch.tensor([[-100, 0, 1, -100]])})
    torch.testing.assert_close(loss, torch.tensor((math.log(2) + math.log(4)) / 2))
    assert metrics["weight"] == 2


@pytest.mark.parametrize("name", ["windows", "bert"])
def test_loss_is_that_of_all_logits(name):
    model = build(CONFIGS[name])
    batch = random_batch()
    logits = model(batch["tokens"], batch["mask"])
    expected = F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten())
    torch.testing.assert_close(model.loss(batch)[0], expected)
    places = (batch["targets"].flatten() != -100).nonzero()[:, 0]
    assert torch.equal(model.loss(batch | {"places": places})[0], model.loss(batch)[0])
    nothing = batch | {"targets": torch.full_like(batch["targets"], -100)}
    loss, metrics = model.loss(nothing)
    assert loss == metrics["weight"] == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_of_a_batch_add_up(name):
    model = build(CONFIGS[name])
    batch = random_batch()
    loss, metrics = model.loss(batch, generators(4))
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        cut = {field: tensor[rows] for field, tensor in batch.items()}
        value, own = model.loss(cut, generators(4)[rows])
        parts.append((value * own["weight"], own["weight"]))
    total, weight = map(sum, zip(*parts))
    assert weight == metrics["weight"]
    torch.testing.assert_close(total / weight, loss)


@pytest.mark.parametrize("objective", ["mlm", "electra"])
def test_it_learns(objective):
    """Rows of one number: a hidden place has the number of the others."""
    torch.manual_seed(0)
    model = Encoder(replace(SMALL, objective=objective, zero_init=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    g = torch.Generator().manual_seed(0)
    for step in range(100):
        text = torch.randint(1, V - 1, (32, 1), generator=g).expand(32, T)
        hidden = torch.rand(text.shape, generator=g) < 0.3
        batch = {"tokens": text.masked_fill(hidden, V - 1), "targets": text.where(hidden, -100)}
        optimizer.zero_grad()
        model.loss(batch, generators(32, seed=step))[0].backward()
        optimizer.step()
    if objective == "mlm":
        nats = F.cross_entropy(model(batch["tokens"])[hidden], text[hidden])
        assert nats < 0.6  # ln 21 = 3.0 at first
    else:
        wrong = text.clone()
        wrong[:, 4] = 1 + wrong[:, 4] % (V - 2)
        found = model.detect(wrong).argmax(1) == 4
        assert found.float().mean() > 0.8  # by chance 1/12


# ---- ELECTRA -------------------------------------------------------------------------------------


def test_draw_by_hand_and_by_frequency():
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25]).log().expand(4, 4)
    u = torch.tensor([0.0, 0.49, 0.5, 0.99])
    assert draw(logits, u).tolist() == [0, 0, 2, 3]
    n = 20_000
    g = torch.Generator().manual_seed(0)
    drawn = draw(logits[:1].expand(n, 4), torch.rand(n, generator=g))
    share = drawn.bincount(minlength=4) / n
    torch.testing.assert_close(share, torch.tensor([0.5, 0, 0.25, 0.25]), atol=0.015, rtol=0)


def test_electra_is_the_sum_of_two_losses():
    """One row, so that the two means are the paper's; the draws come from the row's generator."""
    model = build(ELECTRA)
    batch = random_batch(rows=1)
    tokens, targets = batch["tokens"], batch["targets"]
    chosen = targets != -100
    logits = model(tokens)
    nats = F.cross_entropy(logits[chosen].float(), targets[chosen])
    u = torch.rand(T, generator=generators(1)[0])
    drawn = tokens.clone()
    drawn[chosen] = draw(logits[chosen], u[chosen[0]])
    replaced = (drawn != tokens.where(~chosen, targets)).float()
    assert replaced.sum() > 0
    bce = F.binary_cross_entropy_with_logits(model.detect(drawn).float(), replaced)
    loss, metrics = model.loss(batch, generators(1))
    torch.testing.assert_close(loss, nats + 50 * bce)
    assert metrics["weight"] == T


def test_a_draw_that_hits_the_hidden_token_replaces_nothing():
    model = build(ELECTRA)
    with torch.no_grad():
        model.head.decoder.bias[5] = 1e3  # the generator always draws token 5
    batch = random_batch(rows=1)
    targets = torch.full_like(batch["targets"], -100)
    targets[0, 2:5] = 5
    original = batch["tokens"].clone()
    original[0, 2:5] = 5
    loss, _ = model.loss(batch | {"targets": targets}, generators(1))
    expected = 50 * F.softplus(model.detect(original).float()).mean()  # all are original
    torch.testing.assert_close(loss, expected)


def test_no_gradient_flows_through_the_draw():
    """The generator learns as it would alone; the shared embeddings learn from both."""
    model = build(ELECTRA)
    batch = random_batch(rows=1)

    def gradients(weight):
        model.config = replace(ELECTRA, detection_weight=weight)
        model.zero_grad()
        model.loss(batch, generators(1))[0].backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    alone, both = gradients(0.0), gradients(50.0)
    for name in alone:
        if name.startswith(("generator.", "head.")):
            torch.testing.assert_close(both[name], alone[name])
    table = "embeddings.token_embedding.weight"
    assert not torch.equal(both[table], alone[table])
    assert model.head.decoder.weight is model.embeddings.token_embedding.weight
    assert not any("embedding" in name for name, _ in model.generator.named_parameters())


def test_generators_have_the_published_sizes():
    for n_head, d_model, share, sizes in (
        (4, 256, 1, (64, 256)), (12, 768, 4, (256, 1024)), (16, 1024, 4, (256, 1024))
    ):  # fmt: skip
        config = replace(
            ELECTRA, n_head=n_head, d_model=d_model, d_embedding=128, generator_head=share
        ).generator()
        assert (config.d_model, config.F, config.E) == (*sizes, 128)


# ---- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_that_are_counted(name):
    model = Encoder(replace(CONFIGS[name], context_length=100))
    rows = 2
    counted = sum(map(sum, trace.count_flops(model, rows).values())) / rows
    assert counted == pytest.approx(model.flops_per_row(), rel=0.01)


def test_bfloat16_and_padding():
    model = build(ELECTRA).float()
    batch = random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = model.loss(batch, generators(4))
    half.backward()
    torch.testing.assert_close(half, model.loss(batch, generators(4))[0], rtol=0.03, atol=0)
    assert all(p.grad is not None for p in model.parameters())


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "segments", "message"),
    [
        (torch.ones(1, T + 1, dtype=torch.long), None, f"{T + 1} tokens exceed context_length {T}"),
        (torch.tensor([[1, V]]), None, f"token id {V} is not one of the model's, 0 ... {V - 1}"),
        (torch.tensor([[1, 2]]), torch.tensor([[0, 2]]), "segment 2 is not one .* 0 ... 1"),
    ],
)
def test_rows_that_cannot_be_read(tokens, segments, message):
    with pytest.raises(ValueError, match=message):
        build(BERT).hidden(tokens, segments=segments)


def test_what_a_model_does_not_have():
    with pytest.raises(ValueError, match=r"segments 0: leave the segments out"):
        build(SMALL).hidden(torch.ones(1, 2).long(), segments=torch.zeros(1, 2).long())
    with pytest.raises(ValueError, match=r"pass 4 generators, 1 a row, not 0"):
        build(ELECTRA).loss(random_batch())
    alone = build(replace(ELECTRA, generator_head=0))
    assert count_parameters(alone) < count_parameters(build(ELECTRA))
    with pytest.raises(ValueError, match=r"no generator.*--task classify"):
        alone.loss(random_batch(), generators(4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 30}, "d_model 30 is not divisible by n_head 4; use 32"),
        ({"d_model": 20}, "head width 5 is odd"),
        ({"first_position": 2}, "first_position is 2.*position learned"),
        ({"pad_id": V}, f"pad_id {V} is not in the vocabulary, 0 ... {V - 1}"),
        ({"objective": "nsp"}, "objective is 'nsp'; use one of"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"n_layer": 0}, "n_layer is 0; it must be at least 1"),
    ],
)
def test_settings_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **fields)
