"""The embedder: its loss is InfoNCE, with equal passages as positives; widths, parts, learning."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_weights

from tinyfm.adapt.embedder import Embedder, EmbedderConfig
from tinyfm.encoder import Encoder, EncoderConfig
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes import encoder, gpt

BODIES = {
    "encoder": (
        lambda: Encoder(EncoderConfig(61, 12, n_layer=1, n_head=2, d_model=16)),
        encoder.EncoderEmbedRun,
    ),
    "gpt": (
        lambda: GPT(GPTConfig(61, 12, n_layer=1, n_head=2, d_model=16)),
        gpt.GPTEmbedRun,
    ),
}


def make(name: str = "encoder", **fields) -> Embedder:
    build, run = BODIES[name]
    settings = EmbedderConfig(**{"widths": (4, 8), **fields})
    model = Embedder(random_weights(build), settings, run.reader, run.states)
    torch.nn.init.normal_(model.heads.log_factor)
    model.heads.count([[0, 1], [1, 2, 2], [1]])
    return model.train()


def random_batch(rows: int = 6) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    draw = lambda high, *shape: torch.randint(high, shape, generator=g)  # noqa: E731
    ids = torch.arange(2 * rows).view(rows, 2)
    ids[1] = ids[0, 0]  # row 1 has the passage of row 0, which is also its own negative
    return {
        "questions": draw(61, rows, 5),
        "question_lengths": 1 + draw(5, rows),
        "passages": draw(61, rows, 2, 9),
        "passage_lengths": 1 + draw(9, rows, 2),
        "ids": ids,
    }


@pytest.mark.parametrize("name", BODIES)
def test_the_loss_is_its_formula(name):
    """By loops, for each width and both directions; and cut into parts, with the same gradients."""
    model = make(name)
    batch = random_batch()
    loss, _ = model.loss(batch)
    rows = zip(batch["questions"], batch["question_lengths"])
    q = torch.cat([model.read(t[None, :n], torch.tensor([n])) for t, n in rows])
    rows = zip(batch["passages"].flatten(0, 1), batch["passage_lengths"].flatten())
    p = torch.cat([model.read(t[None, :n], torch.tensor([n])) for t, n in rows])
    columns = batch["ids"].flatten().tolist()
    own = batch["ids"][:, 0].tolist()
    losses = []
    for width in (4, 8, 16):
        x, y = F.normalize(q[:, :width], dim=1), F.normalize(p[:, :width], dim=1)
        z = x @ y.T / 0.05
        w = (x @ y[::2].T / 0.05).T
        for i, number in enumerate(own):
            right = [j for j, column in enumerate(columns) if column == number]
            losses.append(-z[i].log_softmax(0)[right].mean())
            right = [j for j, other in enumerate(own) if other == number]
            losses.append(-w[i].log_softmax(0)[right].mean())
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)
    loss.backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.rows_at_once = 2
    parts, _ = model.loss(batch)
    parts.backward()
    torch.testing.assert_close(parts, loss)
    for name, p in model.named_parameters():
        if name in whole:
            torch.testing.assert_close(p.grad, whole[name], rtol=1e-3, atol=1e-5, msg=name)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert whole.keys() | frozen == {name for name, _ in model.named_parameters()}


def test_the_mean_is_weighted_by_token():
    model = make().eval()
    states = model.body.hidden(torch.tensor([[5, 1, 7]]))[0]
    weights = []
    for token, n in ((5, 0), (1, 3), (7, 0)):
        factor = model.heads.log_factor[token].exp().item()
        weights.append(math.log(1 + 3 / (1 + n)) * factor)
    expected = sum(w * h for w, h in zip(weights, states)) / sum(weights)
    found = model.read(torch.tensor([[5, 1, 7, 9]]), torch.tensor([3]))[0]
    torch.testing.assert_close(found, expected)
    before = model.heads.idf.clone()
    model.heads.count([[5]])  # known already
    assert model.heads.idf.equal(before)


def test_vectors_have_length_one_and_do_not_depend_on_their_neighbours():
    model = make().eval()
    batch = random_batch()
    tokens, lengths = batch["questions"], batch["question_lengths"]
    for width in (0, 4):
        vectors = model(tokens, lengths, width)
        assert vectors.shape == (6, width or 16)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(6))
        alone = model(tokens[2:3, : lengths[2]], lengths[2:3], width)
        torch.testing.assert_close(alone[0], vectors[2])


def test_mistakes():
    with pytest.raises(ValueError, match=r"use --train.batch-size 2"):
        make().loss({name: tensor[:1] for name, tensor in random_batch().items()})
    with pytest.raises(ValueError, match=r"widths has 32, and the vectors have 16"):
        make(widths=(4, 32))
    with pytest.raises(ValueError, match=r"trained for the widths 4, 8, 16"):
        make().check_width(5)
    for fields in ({"temperature": 0}, {"widths": (0,)}):
        with pytest.raises(ValueError, match=r"must be"):
            dataclasses.replace(EmbedderConfig(), **fields)
