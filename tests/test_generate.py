"""Generation: the cache changes no token, rows are independent, and texts end at their stops."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tinyfm.generate import (
    KVCache,
    Sampling,
    TextStream,
    choose,
    complete,
    filter_logits,
    penalise_repeats,
    stream,
    stream_text,
    visible_from,
)
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes.gpt import STYLES
from tinyfm.tokenizer import ByteTokenizer

VARIANTS = {
    "rope": {},
    "learned": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True},
    "grouped": {"n_kv_head": 2},
    "window": {"window": 5, "n_kv_head": 1},
    "learned window": {"position": "learned", "window": 3},
    "tied": {"tied": True, "d_head": 6, "qk_norm": False},
    "gpt1": STYLES["gpt1"],
    "bloom": STYLES["bloom"] | {"n_head": 6, "d_head": 4},
    "alibi window": {"position": "alibi", "window": 5, "n_kv_head": 2},
    "granite": STYLES["granite"],
    "falcon-7b": STYLES["falcon"] | {"n_kv_head": 1},
    "falcon-40b": STYLES["falcon-40b"] | {"n_kv_head": 2},
    "palm": STYLES["palm"] | {"n_kv_head": 1},
}
V, CONTEXT = 41, 16
PROMPTS = [[3], [7, 1, 4, 1, 5, 9, 2], [2, 7, 1]]
GREEDY = Sampling(max_new_tokens=6, temperature=0)
GREEDY_TEXT = Sampling(max_new_tokens=40, temperature=0)
PAST_THE_CONTEXT = pytest.mark.filterwarnings("ignore:past 16 tokens")


def loud(dtype=torch.float64, **options) -> GPT:
    """A model with random weights so large that every input matters to its output."""
    sizes = {"vocab_size": V, "context_length": CONTEXT, "n_layer": 2, "n_head": 4, "d_model": 32}
    model = GPT(GPTConfig(**{**sizes, **options})).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 1.0
            if p.ndim == 2:
                scale = p.size(1) ** -0.5
            elif name.endswith("bias"):
                scale = 0.2
            p.copy_(torch.randn(p.shape, generator=g) * scale)
        model.head.weight *= 3
    return model.to(dtype)


@pytest.fixture(params=VARIANTS)
def model(request) -> GPT:
    return loud(**VARIANTS[request.param])


@torch.no_grad()
def obvious(model: GPT, prompt: list[int], n: int) -> list[int]:
    """Greedy generation of one row without a cache: each token reads the whole text again."""
    row = list(prompt)
    for _ in range(n):
        seen = row[visible_from(len(row), model.config.context_length) :]
        row.append(model(torch.tensor([seen]))[0, -1].argmax().item())
    return row[len(prompt) :]


# ---- the cache ----------------------------------------------------------------------------------


@PAST_THE_CONTEXT
@pytest.mark.parametrize("n", [6, 30])  # inside the context, and far past its end
def test_the_cache_changes_no_greedy_token(model, n):
    s = replace(GREEDY, max_new_tokens=n)
    cached = complete(model, PROMPTS, s)
    assert cached == complete(model, PROMPTS, s, use_cache=False)
    assert cached == [obvious(model, prompt, n) for prompt in PROMPTS]
    assert model.generate(PROMPTS, s) == cached
    assert len({token for row in cached for token in row}) > 2  # not always the same token


@PAST_THE_CONTEXT
def test_the_cache_changes_no_draw(model):
    s = Sampling(max_new_tokens=30, temperature=1.0, seed=3)
    assert complete(model, PROMPTS, s) == complete(model, PROMPTS, s, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("pads", [[0, 0], [2, 0]])
def test_cached_logits_equal_the_full_logits(model, pads):
    """A prompt of 4 tokens is read at once; then one token at a time fills the context.

    Row 0 may start with 2 tokens of padding.
    """
    tokens = torch.randint(0, V, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, CONTEXT, torch.tensor(pads))
    steps = [model.hidden(tokens[:, :4], cache)]
    steps += [model.hidden(tokens[:, t : t + 1], cache) for t in range(4, CONTEXT)]
    logits = model.head(torch.cat(steps, 1))  # (2, CONTEXT, V)
    for row, pad, got in zip(tokens, pads, logits):
        torch.testing.assert_close(got[pad:], model(row[None, pad:])[0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_cache_keeps_no_more_than_the_window():
    model = loud(window=5, n_kv_head=2)
    cache = KVCache(model.config, CONTEXT, torch.tensor([0]))
    for t in range(CONTEXT):
        model.hidden(torch.tensor([[t]]), cache)
    k, v = cache.layers[0]
    assert len(cache.layers) == 2
    assert k.shape == v.shape == (1, 2, 5, 8)
    assert cache.key_positions(1).tolist() == [15, 16, 12, 13, 14]  # with 16 stored next


def test_generation_in_bfloat16():
    half = complete(loud(torch.bfloat16), PROMPTS, GREEDY)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = complete(loud(torch.float32), PROMPTS, GREEDY)
    for rows in (half, mixed):
        assert [len(row) for row in rows] == [6, 6, 6]
        assert all(0 <= token < V for row in rows for token in row)


# ---- the rows of a batch ------------------------------------------------------------------------


@PAST_THE_CONTEXT
def test_a_batch_equals_its_rows_one_by_one(model):
    s = replace(GREEDY, max_new_tokens=24)
    assert complete(model, PROMPTS, s) == [complete(model, [prompt], s)[0] for prompt in PROMPTS]


@PAST_THE_CONTEXT
def test_the_draws_of_a_row_do_not_depend_on_the_others():
    model = loud()
    s = Sampling(max_new_tokens=24, temperature=1.0, seed=5)
    rows = complete(model, PROMPTS, s)
    assert complete(model, [[8, 8, 8, 8], PROMPTS[1]], s)[1] == rows[1]
    assert complete(model, PROMPTS[:1], s)[0] == rows[0]
    assert complete(model, PROMPTS, s) == rows  # the same seed
    assert complete(model, PROMPTS, replace(s, seed=6)) != rows
    same = complete(model, [[1, 2]] * 3, s)
    assert same[0] != same[1] != same[2]  # each row has its own random stream


def test_sampling_leaves_the_global_random_state_alone():
    model = loud()
    before = torch.get_rng_state()
    complete(model, PROMPTS, Sampling(max_new_tokens=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_stop_tokens_end_their_row_only():
    model = loud()
    free = complete(model, PROMPTS, replace(GREEDY, max_new_tokens=8))
    stop = next(token for token in free[1] if token not in free[0] + free[2])
    s = replace(GREEDY, max_new_tokens=8, stop_tokens=(stop,))
    cut = free[1].index(stop)
    assert complete(model, PROMPTS, s) == [free[0], free[1][:cut], free[2]]
    steps = [step[1] for step in stream(model, PROMPTS, s)]
    assert steps == free[1][:cut] + [None] * (8 - cut)
    ends = tuple({row[2] for row in free})
    assert len(list(stream(model, PROMPTS, replace(s, stop_tokens=ends)))) <= 2  # all have stopped


def test_one_warning_past_the_context():
    model = loud()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        complete(model, PROMPTS, replace(GREEDY, max_new_tokens=9))
        assert not caught
        complete(model, PROMPTS, replace(GREEDY, max_new_tokens=40))
    assert len(caught) == 1
    assert "16 tokens" in str(caught[0].message)


@given(st.integers(1, 200), st.integers(1, 32))
def test_visible_tokens_fit_the_context_and_slide_rarely(n, context):
    start = visible_from(n, context)
    assert n - start <= context and start <= n - 1
    assert start == 0 or n - start > context - max(1, context // 2)
    assert visible_from(n + 1, context) in (start, start + max(1, context // 2))


# ---- one draw -----------------------------------------------------------------------------------

LOGITS = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()


@pytest.mark.parametrize(
    "top_k_top_p_min_p, kept",
    [
        ((0, 1.0, 0.0), [0, 1, 2, 3, 4]),
        ((2, 1.0, 0.0), [0, 1]),
        ((99, 1.0, 0.0), [0, 1, 2, 3, 4]),
        ((0, 0.69, 0.0), [0, 1]),
        ((0, 0.71, 0.0), [0, 1, 2]),  # the token that crosses top_p is kept
        ((0, 1e-9, 0.0), [0]),
        ((0, 1.0, 0.25), [0, 1, 2]),
        ((0, 1.0, 1.0), [0]),
        ((3, 0.6, 0.0), [0, 1]),  # after top-k the probabilities are 0.59, 0.24, 0.18
        ((4, 0.95, 0.35), [0, 1]),
    ],
)
def test_filters_by_hand(top_k_top_p_min_p, kept):
    shuffle = torch.tensor([3, 0, 4, 2, 1])
    filtered = filter_logits(LOGITS[:, shuffle], *top_k_top_p_min_p)[0]
    assert sorted(shuffle[filtered > -math.inf].tolist()) == kept
    expected = LOGITS[0, [i for i in shuffle.tolist() if i in kept]]
    torch.testing.assert_close(filtered[filtered > -math.inf], expected)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-30, 30), min_size=1, max_size=12),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    temperature=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_a_draw_is_among_the_kept_tokens(values, top_k, top_p, min_p, temperature, seed):
    logits = torch.tensor([values])
    s = Sampling(1, temperature, top_k, top_p, min_p)
    token = choose(logits, s, [torch.Generator().manual_seed(seed)]).item()
    if temperature < 1e-30:
        assert logits[0, token] == logits.max()
    else:
        shaped = (logits - logits.max()) / temperature
        kept = filter_logits(shaped, top_k, top_p, min_p)[0]
        assert kept[logits.argmax()] == 0
        assert kept[token] > -math.inf


def test_draws_have_the_models_probabilities():
    n = 4000
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    drawn = choose(LOGITS.expand(n, 5), Sampling(temperature=1.0), generators)
    share = drawn.bincount(minlength=5) / n
    p = LOGITS[0].exp()
    assert (share - p).abs().max() < 0.025  # three standard deviations
    colder = choose(LOGITS.expand(n, 5), Sampling(temperature=0.5), generators)
    share = colder.bincount(minlength=5) / n
    assert (share - p**2 / (p**2).sum()).abs().max() < 0.025


def test_draws_from_half_precision_reach_all_tokens():
    """A cumulative sum in bfloat16 has steps of 1/256 near 1, so that most tokens never came."""
    n = 1000
    logits = torch.zeros(n, 2000, dtype=torch.bfloat16)
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    drawn = choose(logits, Sampling(temperature=1.0), generators)
    assert len(set(drawn.tolist())) > 700  # 787 are expected


def test_repetition_penalty():
    logits = torch.tensor([[2.0, -1.0, 0.5], [2.0, -1.0, 0.5]])
    got = penalise_repeats(logits, [[0, 1, 0], [2]], 2.0)
    assert got.tolist() == [[1.0, -2.0, 0.5], [2.0, -1.0, 0.25]]
    assert logits[0, 0] == 2  # the input is unchanged
    row = complete(loud(), [[1]], Sampling(10, 0, repetition_penalty=1e9))[0]
    assert len(set(row)) == 10


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    model = loud()
    with torch.no_grad():
        model.norm.weight[0] = bad
    with pytest.raises(ValueError, match="logits are not finite"):
        complete(model, PROMPTS, Sampling(temperature=temperature))


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; .*at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1; .*0 .*or above"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0; .*above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; .*above 0"),
    ],
)
def test_mistakes_in_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "there is no prompt"),
        ([[1], []], "prompt 1 is empty"),
        ([[1], [2, V]], "prompt 1 .*id 41, outside 0 to 40"),
        ([[-1]], "prompt 0 .*id -1"),
    ],
)
def test_mistakes_in_prompts(prompts, message):
    with pytest.raises(ValueError, match=message):
        complete(loud(), prompts)


# ---- text ---------------------------------------------------------------------------------------


def expected_text(text: str, stops: list[str]) -> str:
    """The text before the stop string that ends first; of two that end at once, the longer."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stops if s and text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


def feed_all(text: TextStream, pieces: list[bytes]) -> str:
    parts = [text.feed(piece) for piece in pieces]
    parts.append(text.feed(b"", final=True))
    return "".join(parts)


def cut(whole: bytes, places: list[int]) -> list[bytes]:
    """The pieces of the bytes, cut at these places."""
    return [whole[a:b] for a, b in zip([0, *places], [*places, len(whole)])]


few_letters = st.text("ab\n\u00e9\U0001f600", max_size=30)


@settings(max_examples=300, deadline=None)
@given(few_letters, st.lists(st.text("ab\n\u00e9", max_size=4), max_size=3), st.data())
def test_text_does_not_depend_on_where_tokens_are_cut(text, stops, data):
    whole = text.encode()
    places = data.draw(st.lists(st.integers(0, len(whole)), max_size=12).map(sorted))
    assert feed_all(TextStream(stops), cut(whole, places)) == expected_text(text, stops)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40), st.data())
def test_broken_utf8_is_replaced_as_python_does(whole, data):
    places = data.draw(st.lists(st.integers(0, len(whole)), max_size=8).map(sorted))
    assert feed_all(TextStream(), cut(whole, places)) == whole.decode("utf-8", errors="replace")


def test_only_text_that_may_change_is_held_back():
    text = TextStream(["\nUser:"])
    pieces = ["Hi", "!\n", "Us", "ual", "\nUs", "er: x", "y"]
    shown = [text.feed(piece.encode()) for piece in pieces]
    assert shown == ["Hi", "!", "", "\nUsual", "", "", ""]
    assert text.stopped
    smile = "\U0001f600".encode()
    text = TextStream()
    assert [text.feed(smile[i : i + 1]) for i in range(4)] == ["", "", "", "\U0001f600"]


class Scripted(nn.Module):
    """In place of a GPT: row i generates texts[i], byte by byte, then end-of-text tokens."""

    def __init__(self, texts: list[str]):
        super().__init__()
        self.config = GPTConfig(vocab_size=257, context_length=64)
        self.head = nn.Linear(257, 257, bias=False)
        nn.init.eye_(self.head.weight)
        self.script = [[*text.encode(), *[256] * 64] for text in texts]
        self.prompts = None
        self.calls = 0

    def hidden(self, tokens, cache):
        if self.prompts is None:
            self.prompts = tokens
        ids = torch.tensor([[row[self.calls]] for row in self.script])
        self.calls += 1
        return nn.functional.one_hot(ids, 257).float()  # (B, 1, V)


def test_stream_text():
    model = Scripted(["caf\u00e9 STOP no", "one two", "ST"])
    tokenizer = ByteTokenizer()
    assert tokenizer.eot == 256
    parts = list(stream_text(model, tokenizer, ["a", "", "bc"], GREEDY_TEXT, ["STOP"]))
    assert ["".join(column) for column in zip(*parts)] == ["caf\u00e9 ", "one two", "ST"]
    # An empty prompt becomes the end-of-text token, which starts a new text.
    assert model.prompts.tolist() == [[0, 97], [0, 256], [98, 99]]
    assert model.calls < 21  # all rows had stopped long before max_new_tokens


def test_stream_text_ends_at_max_new_tokens():
    model = Scripted(["abS", "\U0001f600"])
    s = replace(GREEDY_TEXT, max_new_tokens=3)
    parts = list(stream_text(model, ByteTokenizer(), ["x", "y"], s, ["STOP"]))
    # A beginning of a stop string is shown after all; an incomplete character is replaced.
    assert ["".join(column) for column in zip(*parts)] == ["abS", "\ufffd"]


def test_a_stop_string_of_any_length():
    """Each character costs the same: a stop string of 100,000 is no slower than one of ten."""
    text = TextStream(["a" * 100_000 + "b"])
    assert feed_all(text, [b"a"] * 1000) == "a" * 1000
    text = TextStream(["a" * 1000 + "b"])
    assert feed_all(text, [b"a"] * 1500 + [b"b", b"c"]) == "a" * 500


def test_an_id_without_a_token_is_never_drawn():
    """A model's vocabulary may be padded, and a tokenizer's may have gaps."""
    model = loud()
    hot = replace(GREEDY, temperature=9.0)
    drawn = {token for row in complete(model, PROMPTS, hot) for token in row}
    some = sorted(drawn)[: len(drawn) // 2 + 1]
    for sampling in (GREEDY, hot):
        rows = complete(model, PROMPTS, sampling, never=some)
        assert rows and not {token for row in rows for token in row} & {*some}
