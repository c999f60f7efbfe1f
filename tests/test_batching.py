"""Continuous batching: a text gets the tokens of generate.stream, whenever others join or leave."""

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from tinyfm.adapt.soft_prompt import add_prompt, prompt_ids
from tinyfm.batching import Batch, Drawn, PrefixCache, RowCache, Text, pack_weights
from tinyfm.compiled import compile_decoding
from tinyfm.generate import Sampling, stream
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes.gpt import STYLES

V, CONTEXT = 41, 32
VARIANTS = {
    "rope": {},
    "learned": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True},
    "window": {"window": 5, "n_kv_head": 1},
    "alibi": {"position": "alibi", "window": 5},
    "bloom": STYLES["bloom"] | {"n_head": 6, "d_head": 4},
    "soft prompt": {},
}
pytestmark = pytest.mark.filterwarnings("ignore:past 32 tokens")


def loud(dtype=torch.float32, **options) -> GPT:
    """A model with random weights so large that every input matters to its output."""
    sizes = {"vocab_size": V, "context_length": CONTEXT, "n_layer": 2, "n_head": 4, "d_model": 32}
    model = GPT(GPTConfig(**{**sizes, **options})).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            scale = p.size(1) ** -0.5 if p.ndim == 2 else 0.5
            p.copy_(torch.randn(p.shape, generator=g) * scale)
        model.head.weight *= 2
    return model.to(dtype)


def write_all(batch: Batch, arrivals: list[tuple[int, Text]]) -> dict[Text, list[Drawn]]:
    """Add each text at its step; write all to their max_new_tokens."""
    drawn: dict[Text, list[Drawn]] = {text: [] for _, text in arrivals}
    step = 0
    while batch.texts or step <= max(when for when, _ in arrivals):
        for when, text in arrivals:
            if when == step:
                batch.add(text)
        for text, result in batch.step():
            drawn[text].append(result)
            if sum(not d.prompt for d in drawn[text]) == text.sampling.max_new_tokens:
                batch.texts.remove(text)
        step += 1
    return drawn


def ids(drawn: list[Drawn]) -> list[int]:
    return [d.token for d in drawn]


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_those_of_a_stream(variant, monkeypatch):
    """Texts join at random moments and have their own settings. Some outgrow the context; long
    prompts are read in pieces."""
    monkeypatch.setattr("tinyfm.batching.PIECE", 6)
    model = loud(**VARIANTS[variant])
    if variant == "soft prompt":
        add_prompt(model, 3)
    r = random.Random(0)
    arrivals = []
    for i in range(12):
        prompt = [r.randrange(V) for _ in range(r.choice([1, 2, 4, 9, 29, 35]))]
        settings = {"temperature": r.choice([0, 1.0]), "repetition_penalty": r.choice([1, 1.3])}
        s = Sampling(r.choice([1, 9, 40]), seed=i, top_p=r.choice([0.8, 1.0]), **settings)
        arrivals.append((r.randrange(40), Text(prompt_ids(model) + prompt, s, index=i % 3)))
    prompts = {text: list(text.tokens) for _, text in arrivals}
    got = write_all(Batch(model, never=[5], prefix_bytes=1 << 20), arrivals)
    for i, (_, text) in enumerate(arrivals):
        steps = stream(model, [prompts[text]] * (i % 3 + 1), text.sampling, never=[5])
        assert ids(got[text]) == [step[-1] for step in steps], i


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_change_no_bit(dtype):
    model = loud(dtype)
    s = Sampling(20, 1.0, seed=4)
    alone = write_all(Batch(model), [(0, Text([1, 2, 3, 4, 5], s))])
    mine = Text([1, 2, 3, 4, 5], s)
    others = [(i, Text([i] * (3 * i + 1), replace(s, max_new_tokens=3 * i + 1))) for i in range(9)]
    among = write_all(Batch(model), [*others, (2, mine)])[mine]
    for a, b in zip(next(iter(alone.values())), among, strict=True):
        assert a.token == b.token
        assert torch.equal(a.logprobs, b.logprobs)


@pytest.mark.parametrize("window", [0, 5])
def test_a_prefix_from_the_cache_changes_no_token(window):
    """The numbers are equal to rounding: the attention library cuts a short prompt otherwise."""
    model = loud(window=window)
    s = Sampling(9, 1.0)
    start = [r % V for r in range(7, 27)]
    prompts = [
        [*start, 3, 1, 4, 1, 5, 9],
        [*start, 2, 7],
        [*start[:12], 8, 8, 8],
        start,
        [9, *start],
    ]
    batch = Batch(model, prefix_bytes=1 << 20)
    for prompt, cached in zip(prompts, [0, 17, 10, 19, 0]):
        expected = Text(prompt, s)
        text = Text(prompt, s)
        known = write_all(Batch(model), [(0, expected)])[expected]
        got = write_all(batch, [(0, text)])[text]
        assert text.cached == cached
        assert ids(got) == ids(known)
        for a, b in zip(known, got, strict=True):
            torch.testing.assert_close(a.logprobs, b.logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_packed_weights(dtype, tolerance):
    """They give a linear layer's results; those of a row do not depend on the number of rows."""
    layer = nn.Linear(384, 352).to(dtype).requires_grad_(False)
    x = torch.randn(17, 1, 384, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = layer(x)
    pack_weights(layer)
    if dtype == torch.float32:
        assert ("forward" in vars(layer)) == torch.backends.mkldnn.is_available()
    got = layer(x)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    for n in (1, 2, 3, 4, 8, 12):
        assert torch.equal(layer(x[:n]), got[:n])


def test_texts_that_join_together_read_their_common_prompt_once():
    model = loud()
    s = Sampling(4, 1.0)
    texts = [Text(range(20), s, index=i) for i in range(3)]
    write_all(Batch(model, prefix_bytes=1 << 20), [(0, text) for text in texts])
    assert [text.cached for text in texts] == [0, 19, 19]


def test_the_prefix_cache_is_bounded(monkeypatch):
    config = GPTConfig(n_head=2, d_model=8)
    caches = []
    for n in (20, 20, 20):
        cache = RowCache(config, torch.device("cpu"))
        cache.length = n
        cache.layers = [(torch.zeros(1, 2, 64, 4), torch.zeros(1, 2, 64, 4))]
        caches.append(cache)
    size = 2 * 20 * 8 * 4
    prefixes = PrefixCache(2 * size)
    prompts = [[i] * 20 for i in range(3)]
    for prompt, cache in zip(prompts[:2], caches):
        prefixes.add(prompt, cache)
    assert prefixes.bytes == 2 * size
    assert prefixes.find([0] * 30).length == 20  # now the second was used least recently
    prefixes.add(prompts[2], caches[2])
    assert prefixes.bytes == 2 * size
    assert [prefixes.find(prompt) is not None for prompt in prompts] == [True, False, True]
    monkeypatch.setattr(RowCache, "copy", None)  # what is too large is not even copied
    caches[0].length = 50
    prefixes.add([7] * 50, caches[0])  # too large to be kept: the others stay
    monkeypatch.undo()
    assert [prefixes.find(prompt) is not None for prompt in prompts] == [True, False, True]


def test_memory_grows_with_the_text_not_with_what_was_asked():
    model = loud(context_length=4096)
    text = Text([1, 2, 3], Sampling(1 << 39))
    batch = Batch(model)
    batch.add(text)
    for _ in range(70):
        batch.step()
    assert text.cache.count_bytes() == 2 * 2 * 32 * 128 * 4  # layers, k and v, D, positions, bytes


def test_an_echoed_prompt_has_the_models_probabilities():
    model = loud()
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    text = Text(prompt, Sampling(2, 0), echo=True)
    batch = Batch(model, prefix_bytes=1 << 20)
    drawn = write_all(batch, [(0, text)])[text]
    assert ids(drawn[:9]) == prompt[1:] and [d.prompt for d in drawn] == [True] * 9 + [False] * 2
    with torch.no_grad():
        expected = model(torch.tensor([text.tokens[:-1]]))[0].log_softmax(-1)
    torch.testing.assert_close(torch.stack([d.logprobs for d in drawn]), expected)
    again = Text(prompt, Sampling(2, 0), echo=True)
    assert len(write_all(batch, [(0, again)])[again]) == 11 and again.cached == 0


def test_one_failing_text_harms_no_other():
    model = loud()
    with torch.no_grad():
        model.token_embedding.weight[7] = torch.nan
    s = Sampling(6, seed=2)
    good, bad = Text([1, 2, 3], s), Text([1, 7, 3], s)
    batch = Batch(model, never=[7])
    batch.add(good)
    batch.add(bad)
    results = batch.step()
    assert isinstance(dict(results)[bad], ValueError) and "not finite" in str(dict(results)[bad])
    batch.texts.remove(bad)
    for _ in range(5):
        batch.step()
    assert good.tokens[3:] == [step[0] for step in stream(model, [[1, 2, 3]], s, never=[7])]


def test_a_step_that_failed_is_done_again(monkeypatch):
    """The head fails once, as with too little memory: no text reads its last token twice."""
    model = loud(window=5)
    s = Sampling(9, seed=2)
    texts = [Text([1, 2, 3], s), Text([4, 5], s)]
    head = model.head.forward
    calls = []

    def fail_once(x):
        calls.append(len(x))
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return head(x)

    monkeypatch.setattr(model.head, "forward", fail_once)
    batch = Batch(model)
    for text in texts:
        batch.add(text)
    for _ in range(9):
        batch.step()
    assert len(calls) == 9 + 2
    monkeypatch.undo()
    expected = [[step[0] for step in stream(model, [p], s)] for p in ([1, 2, 3], [4, 5])]
    assert [text.tokens[text.prompt_length :] for text in texts] == expected


def test_a_batch_has_few_sizes(monkeypatch):
    """So that a compiled model is compiled for few."""
    sizes = set()

    class Recorded:
        """In place of torch.compile, which takes seconds for each size."""

        def __init__(self, function, **options):
            self.function = function

        def __call__(self, x, *rest):
            sizes.add(len(x))
            return self.function(x, *rest)

    monkeypatch.setattr("tinyfm.compiled.Compiled", Recorded)
    model = loud()
    s = Sampling(12, seed=1)
    prompts = [[i, 2, 3] for i in range(11)]
    expected = [[step[0] for step in stream(model, [prompt], s)] for prompt in prompts]
    compile_decoding(model)
    texts = [(i, Text(prompt, s)) for i, prompt in enumerate(prompts)]
    got = write_all(Batch(model), texts)
    assert [ids(got[text]) for _, text in texts] == expected
    assert sizes == {4, 8, 12}
