"""The encoder-decoder: positions, padding, the smoothed loss, and generation, by hand."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_weights

from tinyfm.calc import trace
from tinyfm.generate import Sampling
from tinyfm.seq2seq import Seq2Seq, Seq2SeqConfig, bucket, sinusoids
from tinyfm.training.parallel import checkpoint_activations

V, S, T = 23, 9, 7
T5 = Seq2SeqConfig(
    V, 12, n_layer=2, n_decoder_layer=1, n_head=4, d_model=32, d_head=6, n_bucket=8, max_distance=9,
    tied=True, logit_scale=0, zero_init=False,
)  # fmt: skip
PAPER = replace(
    T5, norm="post", norm_kind="layernorm", position="sinusoid", mlp="relu", bias=True,
    embedding_scale=0, logit_scale=1, attention_scale=0, d_head=0, start_id=V - 1, pad_id=V - 1,
)  # fmt: skip
V11 = replace(T5, tied=False, logit_scale=1)
CONFIGS = {"t5": T5, "paper": PAPER, "v1.1": V11}


def build(config: Seq2SeqConfig) -> Seq2Seq:
    return random_weights(lambda: Seq2Seq(config)).double()


def random_batch(rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Sources and targets of unequal length."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(S) < torch.tensor([5, S, 3])[:rows, None]
    real = torch.arange(T) < torch.tensor([T, 2, 4])[:rows, None]
    source = torch.randint(2, V - 1, (rows, S), generator=g).where(mask, 0)
    targets = torch.randint(2, V - 1, (rows, T), generator=g)
    inputs = F.pad(targets[:, :-1], (1, 0), value=0).where(real, 0)
    return {"source": source, "mask": mask, "inputs": inputs, "targets": targets.where(real, -100)}


# ---- positions -----------------------------------------------------------------------------------


def test_sinusoids_by_hand():
    """Width 4 has the frequencies 1 and 1/100; the sines come first."""
    table = sinusoids(60, 4)
    hand = [math.sin(50), math.sin(0.5), math.cos(50), math.cos(0.5)]
    torch.testing.assert_close(table[50], torch.tensor(hand))
    torch.testing.assert_close(table[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_buckets_by_hand():
    """Of 8 buckets up to distance 16, one-sided: 0 to 3 hold a distance each; the others end
    at 4 x 4^(i/4), which is 5.7, 8 and 11.3."""
    distance = -torch.tensor([-3, 0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 15, 16, 1000])
    one_sided = [0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7, 7]
    assert bucket(distance, 8, 16, two_sided=False).tolist() == one_sided
    # Two-sided: 4 buckets for each side; 0 and 1 alone, then from 2 and from 5.7.
    keys = torch.tensor([-100, -6, -5, -2, -1, 0, 1, 2, 5, 6, 100])
    two_sided = [3, 3, 2, 2, 1, 0, 5, 6, 6, 7, 7]
    assert bucket(keys, 8, 16, two_sided=True).tolist() == two_sided


# ---- padding and order ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name):
    model = build(CONFIGS[name])
    batch = random_batch()
    source, mask, inputs = batch["source"], batch["mask"], batch["inputs"]
    states = model.encode(source, mask)
    assert not states[~mask].any()
    logits = model(source, inputs, mask)
    for i, n in enumerate(mask.sum(1).tolist()):
        alone = slice(i, i + 1)
        torch.testing.assert_close(states[alone, :n], model.encode(source[alone, :n]))
        torch.testing.assert_close(logits[alone], model(source[alone, :n], inputs[alone]))
    # The loss does not compute padding of the targets; all logits give the same.
    nats = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    loss, metrics = model.eval().loss(batch)
    torch.testing.assert_close(loss, nats.float(), rtol=1e-6, atol=0)
    assert metrics["weight"] == T + 2 + 4


@pytest.mark.parametrize("name", CONFIGS)
def test_who_reads_what(name):
    """A state of the source depends on the whole source; a logit on the source, and on no later
    token of the target."""
    model = build(CONFIGS[name])
    batch = random_batch()
    source, inputs = batch["source"][1:2], batch["inputs"][:1]
    logits = model(source, inputs)
    later = inputs.clone()
    later[0, 4] = 1
    same = (model(source, later) == logits).all(-1)[0]
    assert same.tolist() == [True] * 4 + [False] * (T - 4)
    for place in (0, S - 1):
        other = source.clone()
        other[0, place] = 1
        assert (model.encode(other) != model.encode(source)).any(-1).all()
        assert (model(other, inputs) != logits).any(-1).all()


# ---- loss ----------------------------------------------------------------------------------------


def test_label_smoothing_by_hand():
    """With p = (1/2, 1/4, 1/4), eps = 0.3 and the first token as target, q = (0.8, 0.1, 0.1)."""
    config = Seq2SeqConfig(3, n_layer=1, n_head=1, d_model=2, label_smoothing=0.3, head_bias=True)
    model = Seq2Seq(config)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([0.5, 0.25, 0.25]).log()
    one = torch.zeros(1, 1, dtype=torch.long)
    batch = {"source": one, "inputs": one, "targets": one}
    loss, metrics = model.train().loss(batch)
    assert loss.item() == pytest.approx(0.8 * math.log(2) + 0.2 * math.log(4))
    assert metrics["nats"].item() == pytest.approx(math.log(2))
    assert model.eval().loss(batch)[0].item() == pytest.approx(math.log(2))


def test_smoothed_loss_is_that_of_torch_and_parts_add_up():
    model = build(replace(T5, label_smoothing=0.2)).float().train()
    batch = random_batch()
    batch["targets"][0, 3] = -100  # in the middle, not padding
    loss, metrics = model.loss(batch)
    logits = model(batch["source"], batch["inputs"], batch["mask"]).flatten(0, 1)
    want = F.cross_entropy(logits, batch["targets"].flatten(), label_smoothing=0.2)
    torch.testing.assert_close(loss, want)
    total = weight = 0
    for i in range(3):
        own, part = model.loss({name: value[i : i + 1] for name, value in batch.items()})
        total += own * part["weight"]
        weight += part["weight"]
    assert weight == metrics["weight"] == T - 1 + 2 + 4
    torch.testing.assert_close(total / weight, loss)
    batch["targets"][:] = -100
    assert model.loss(batch)[0].item() == 0


def test_recomputed_activations_change_no_gradient():
    """The keys and values of the source are computed inside the blocks, so these can be recomputed
    and sharded one by one."""
    gradients = []
    for recompute in (False, True):
        model = build(T5).train()
        if recompute:
            checkpoint_activations(model)
        model.loss(random_batch())[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_it_learns_to_reverse():
    torch.manual_seed(0)
    config = replace(PAPER, n_layer=1, d_model=64, d_head=16, tied=False, label_smoothing=0)
    model = Seq2Seq(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        text = torch.randint(2, 10, (32, 4), generator=g)
        targets = F.pad(text.flip(1), (0, 1), value=config.end_id)
        inputs = F.pad(text.flip(1), (1, 0), value=config.start_id)
        optimizer.zero_grad()
        model.loss({"source": text, "inputs": inputs, "targets": targets})[0].backward()
        optimizer.step()
    written = model.generate(text, sampling=Sampling(temperature=0))
    assert sum(a == b for a, b in zip(written, text.flip(1).tolist())) >= 28  # of 32


def test_bfloat16_and_padding():
    model = build(T5).float()
    batch = random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = model.loss(batch)
    half.backward()
    torch.testing.assert_close(half, model.loss(batch)[0], rtol=0.03, atol=0)
    assert all(p.grad is not None for p in model.parameters())


# ---- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_changes_nothing_and_rows_do_not_meet(name):
    model = build(CONFIGS[name])
    batch = random_batch()
    source, mask = batch["source"], batch["mask"]
    sampling = Sampling(max_new_tokens=12, temperature=1.5, top_k=9, repetition_penalty=1.2, seed=3)
    written = model.generate(source, mask, sampling)
    assert written == model.generate(source, mask, sampling, use_cache=False)
    assert written[0] == model.generate(source[:1, :5], None, sampling)[0]
    assert len({tuple(row) for row in written}) == 3
    # Greedy, step by step, without a cache.
    greedy = model.generate(source, mask, Sampling(11, temperature=0), never=[model.config.pad_id])
    for i, row in enumerate(greedy):
        inputs = torch.tensor([[model.config.start_id, *row]])
        logits = model(source[i : i + 1], inputs, mask[i : i + 1])[0]
        logits[:, model.config.pad_id] = -math.inf
        assert logits.argmax(1).tolist()[:11] == [*row, 1][:11]


# ---- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_that_are_counted(name):
    model = Seq2Seq(replace(CONFIGS[name], context_length=100))
    counted = sum(map(sum, trace.count_flops(model, 2).values())) / 2
    assert counted == pytest.approx(model.flops_per_row(), rel=0.01)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (torch.ones(1, 0).long(), None, r"no source in \(1, 0\) tokens"),
        (torch.ones(1, 13).long(), None, "13 tokens exceed context_length 12"),
        (torch.tensor([[1, V]]), None, f"token id {V} is not one of the model's, 0 ... {V - 1}"),
        (
            torch.ones(2, 2).long(),
            torch.tensor([[True, True], [False, False]]),
            "source 1 is empty",
        ),
    ],
)
def test_sources_that_cannot_be_read(tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        build(T5).encode(tokens, mask)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 30, "d_head": 0}, "d_model 30 is not divisible by n_head 4; use 32"),
        ({"position": "sinusoid", "d_model": 7}, "d_model 7 is odd.*use 8"),
        ({"n_bucket": 6}, "n_bucket is 6; it must be a multiple of 4"),
        ({"max_distance": 4}, "max_distance 4 .* use more than 4"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"logit_scale": -1.0}, "logit_scale is -1.0"),
        ({"end_id": V}, f"end_id {V} is not in the vocabulary, 0 ... {V - 1}"),
        ({"mlp": "swiglu"}, "mlp is 'swiglu'; use one of"),
        ({"n_layer": 0}, "n_layer is 0; it must be at least 1"),
    ],
)
def test_settings_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(T5, **fields)
