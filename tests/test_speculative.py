"""Speculative decoding: greedy texts are those of generate.stream, draws have its distribution."""

from dataclasses import replace

import pytest
import torch
from test_generate import GREEDY, PROMPTS, VARIANTS, loud

from tinyfm import speculative
from tinyfm.generate import Sampling, complete, distribution
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.speculative import Counts, accept, find_repeat, stream

pytestmark = pytest.mark.filterwarnings("ignore:past 16 tokens")
LONG = replace(GREEDY, max_new_tokens=40)


def rows_of(model, prompts, sampling, **options) -> list[list[int]]:
    rows = [[] for _ in prompts]
    for step in stream(model, prompts, sampling, **options):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def small_draft(model: GPT) -> GPT:
    """A draft that is often right: the model with a little noise, and a shorter context."""
    draft = loud(dtype=torch.float32, **VARIANTS["rope"] | {"context_length": 11})
    own = model.state_dict()
    for name, p in draft.named_parameters():
        if name in own and own[name].shape == p.shape:
            p.data.copy_(own[name] + 0.02 * torch.randn(p.shape))
    return draft


# ---- greedy texts --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["rope", "learned window", "bloom", "palm"])
def test_greedy_texts_are_those_of_plain_decoding(variant):
    """Inside the context and far past it, with both drafts, in float32."""
    model = loud(torch.float32, **VARIANTS[variant])
    expected = complete(model, PROMPTS, LONG)
    for draft in (None, small_draft(model), model):
        counts = Counts()
        assert rows_of(model, PROMPTS, LONG, draft=draft, counts=counts) == expected
        assert 0 < counts.accepted <= counts.proposed
        assert counts.passes + counts.accepted == counts.written == 120
    assert counts.accepted > 80  # by the model itself
    s = replace(LONG, repetition_penalty=1.5, stop_tokens=(expected[0][20],))
    expected = complete(model, PROMPTS, s, never=[5])
    assert rows_of(model, PROMPTS, s, never=[5], pack=True, n_draft=3) == expected


@torch.no_grad()
def test_where_rounding_decides_the_text_is_still_the_same(monkeypatch):
    """Half of the tokens are nearly copies of the others: the best two differ by rounding alone."""
    model = loud(torch.float32)
    noise = 1e-7 * torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    model.head.weight[20:40] = model.head.weight[:20] * (1 + noise)
    prompts = [[i] for i in range(10)]
    s = replace(GREEDY, max_new_tokens=12)
    one_by_one = [complete(model, [prompt], s)[0] for prompt in prompts]
    counts = Counts()
    assert rows_of(model, prompts, s, draft=model, counts=counts) == one_by_one
    assert counts.doubts > 30
    monkeypatch.setattr(speculative, "DOUBT", -1)
    assert rows_of(model, prompts, s, draft=model) != one_by_one


# ---- draws ---------------------------------------------------------------------------------------


def test_accepted_and_redrawn_tokens_have_the_distribution_of_the_model():
    """Frequencies of the first token, and of the second one after it, of 10,000 trials."""
    g = torch.Generator().manual_seed(0)
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.6, 0.3, 0.0]])
    n = 10_000
    proposed = torch.stack([row.multinomial(n, True, generator=g) for row in q], 1).tolist()
    first = torch.zeros(4)
    second = torch.zeros(4)
    for tokens in proposed:
        accepted, last = accept(tokens, p, q, g)
        text = [*tokens[:accepted], last]
        first[text[0]] += 1
        if len(text) > 1:
            second[text[1]] += 1
    torch.testing.assert_close(first / n, p[0], rtol=0, atol=0.017)  # 3.4 standard deviations
    torch.testing.assert_close(second / second.sum(), p[1], rtol=0, atol=0.025)
    refused = n - second.sum()
    expected = (p[0] - q[0]).clamp(min=0).sum()  # Leviathan et al. 2023, theorem 3.5
    assert abs(refused / n - expected) < 0.017


def test_a_whole_text_has_the_exact_probabilities():
    """Three tokens of a vocabulary of three, drawn 300 times, against the chain rule."""
    config = GPTConfig(vocab_size=3, context_length=8, n_layer=1, n_head=1, d_model=8)
    torch.manual_seed(0)
    model = GPT(config).eval()
    draft = GPT(config).eval()
    with torch.no_grad():
        for p in (*model.parameters(), *draft.parameters()):
            p.copy_(torch.randn(p.shape) * 0.7)
    s = Sampling(max_new_tokens=3, temperature=0.9, top_p=0.95)
    texts = [[a, b, c] for a in range(3) for b in range(3) for c in range(3)]
    exact = torch.ones(27)
    with torch.no_grad():
        for i, text in enumerate(texts):
            p = distribution(model(torch.tensor([[0, *text]]))[0], s)
            for t in range(3):
                exact[i] *= p[t, text[t]]
    for own, n in ((draft, 300), (None, 300)):
        counts = Counts()
        rows = rows_of(model, [[0]] * n, s, draft=own, counts=counts, n_draft=2)
        found = torch.tensor([rows.count(text) / n for text in texts])
        spread = (exact * (1 - exact) / n).sqrt()
        assert 0 < counts.accepted < counts.proposed
        assert ((found - exact).abs() <= 3.9 * spread + 1e-6).all()


def test_a_row_depends_on_its_seed_and_place_alone():
    model = loud(torch.float32)
    s = Sampling(max_new_tokens=20, temperature=1.0, seed=3)
    together = rows_of(model, PROMPTS, s)
    assert rows_of(model, PROMPTS[:2], s) == together[:2]
    assert rows_of(model, PROMPTS, replace(s, seed=4)) != together


# ---- drafts --------------------------------------------------------------------------------------


def test_the_latest_of_the_longest_repeats_counts():
    assert find_repeat([1, 2, 3, 9, 1, 2, 3, 8, 5, 2, 3], 3) == 7  # "2 3", the latest
    assert find_repeat([1, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3], 3) == 3  # "1 2 3" is longer
    assert find_repeat([4, 4], 3) == 1
    assert find_repeat([1, 2, 3], 3) == 3  # none
    assert find_repeat([1], 3) == 1


def test_a_draft_with_other_tokens_is_refused():
    other = GPT(GPTConfig(vocab_size=7, context_length=8, n_layer=1, n_head=1, d_model=8))
    with pytest.raises(ValueError, match=r"the draft has 7 tokens, the model 41.*--data.tokenizer"):
        next(stream(loud(), PROMPTS, draft=other))
    with pytest.raises(ValueError, match="draft tokens is 0; it must be at least 1"):
        next(stream(loud(), PROMPTS, n_draft=0))
