"""Checks of lesson 4."""

import math

import pytest
import torch

from course.compare import agree
from course.lessons import checks
from tinyfm.generate import (
    KVCache,
    Sampling,
    TextStream,
    choose,
    complete,
    filter_logits,
    keep_min_p,
    keep_nucleus,
    penalise_repeats,
    visible_from,
)
from tinyfm.gpt import GPT, GPTConfig

# The distribution of the lesson, with its tokens out of order: 0.5, 0.2, 0.15, 0.1, 0.05.
P = torch.tensor([[0.1, 0.5, 0.05, 0.15, 0.2]])
LOGITS = P.log()
# A row of logits whose filtered tokens the library transformers gave (5.24.0).
ROW = torch.tensor([[1.5, -0.3, 0.8, 2.2, -1.0, 0.1, 1.1, -2.0]])


def kept(logits: torch.Tensor) -> list[int]:
    return torch.isfinite(logits[0]).nonzero().flatten().tolist()


def same(got, expected, what: str) -> None:
    assert got == expected, f"{what}: expected {expected}, got {got}"


def unchanged(function, logits: torch.Tensor, *arguments) -> None:
    before = logits.clone()
    function(logits, *arguments)
    assert torch.equal(logits, before), f"{function.__name__} changed the logits it was given"


def loud(**options) -> GPT:
    """A small model with weights so large that every input matters to its output."""
    sizes = {"vocab_size": 23, "context_length": 16, "n_layer": 2, "n_head": 2, "d_model": 16}
    model = GPT(GPTConfig(**{**sizes, **options})).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            scale = p.size(1) ** -0.5 if p.ndim == 2 else 1.0
            p.copy_(torch.randn(p.shape, generator=g) * scale)
        model.head.weight *= 3
    return model.double()


def generators(n: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(n)]


# ---- filters ------------------------------------------------------------------------------------


@checks("keep_min_p")
def test_min_p_compares_with_the_likeliest_token():
    # A share of 0.25 of 0.5 is 0.125: the tokens with 0.5, 0.2 and 0.15 stay.
    same(kept(keep_min_p(LOGITS, 0.25)), [1, 3, 4], "tokens kept with a share of 0.25")
    same(kept(keep_min_p(LOGITS, 1.0)), [1], "tokens kept with a share of 1")


@checks("keep_min_p")
def test_min_p_keeps_the_logits_of_the_other_tokens():
    got = keep_min_p(LOGITS, 0.25)
    agree(got[0, [1, 3, 4]], LOGITS[0, [1, 3, 4]], "the logits of the tokens that are kept")
    unchanged(keep_min_p, LOGITS, 0.25)


@checks("keep_min_p")
def test_min_p_treats_each_row_by_itself():
    logits = torch.cat([LOGITS, torch.zeros(1, 5)])
    got = keep_min_p(logits, 0.5)
    same(kept(got[:1]), [1], "tokens kept in the first row with a share of 0.5")
    same(kept(got[1:]), [0, 1, 2, 3, 4], "tokens kept in a row of equal logits")


@checks("keep_min_p")
def test_min_p_keeps_the_tokens_of_the_library():
    # transformers 5.24.0, MinPLogitsWarper
    for share, expected in ((0.05, [0, 1, 2, 3, 5, 6]), (0.2, [0, 2, 3, 6]), (0.4, [0, 3])):
        same(kept(keep_min_p(ROW, share)), expected, f"tokens kept with a share of {share}")


@checks("keep_nucleus")
def test_the_token_that_crosses_top_p_is_kept():
    # In order: 0.5, 0.2, 0.15, 0.1, 0.05; the sums before each are 0, 0.5, 0.7, 0.85, 0.95.
    same(kept(keep_nucleus(LOGITS, 0.69)), [1, 4], "tokens kept with top_p 0.69")
    same(kept(keep_nucleus(LOGITS, 0.71)), [1, 3, 4], "tokens kept with top_p 0.71")
    same(kept(keep_nucleus(LOGITS, 0.9)), [0, 1, 3, 4], "tokens kept with top_p 0.9")


@checks("keep_nucleus")
def test_the_likeliest_token_is_never_excluded():
    same(kept(keep_nucleus(LOGITS, 1e-9)), [1], "tokens kept with top_p 1e-9")


@checks("keep_nucleus")
def test_the_nucleus_keeps_the_logits_of_its_tokens():
    got = keep_nucleus(LOGITS, 0.71)
    agree(got[0, [1, 3, 4]], LOGITS[0, [1, 3, 4]], "the logits of the tokens that are kept")
    unchanged(keep_nucleus, LOGITS, 0.71)


@checks("keep_nucleus")
def test_each_row_has_a_nucleus_for_itself():
    got = keep_nucleus(torch.cat([LOGITS, LOGITS.flip(1)]), 0.6)
    same(kept(got[:1]), [1, 4], "tokens kept in the first row")
    same(kept(got[1:]), [0, 3], "tokens kept in the second row, the first one reversed")


@checks("keep_nucleus")
def test_logits_need_not_be_normalised():
    same(
        kept(keep_nucleus(LOGITS + 7, 0.71)), [1, 3, 4], "tokens kept when all logits are 7 higher"
    )


@checks("keep_nucleus")
def test_the_nucleus_is_that_of_the_library():
    # transformers 5.24.0, TopPLogitsWarper
    expected = {0.3: [3], 0.5: [0, 3], 0.8: [0, 2, 3, 6], 0.95: [0, 1, 2, 3, 5, 6]}
    for top_p, tokens in expected.items():
        same(kept(keep_nucleus(ROW, top_p)), tokens, f"tokens kept with top_p {top_p}")


# ---- repetition penalty -------------------------------------------------------------------------


@checks("penalise_repeats")
def test_a_penalty_lowers_logits_of_either_sign():
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    agree(penalise_repeats(logits, [[0, 1]], 2.0), [[1.0, -2.0, 0.5]], "2, -1 and 0.5, penalty 2")


@checks("penalise_repeats")
def test_a_token_counts_once_however_often_it_occurs():
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    got = penalise_repeats(logits, [[0, 0, 0, 1, 1]], 2.0)
    agree(got, [[1.0, -2.0, 0.5]], "a text with token 0 three times")


@checks("penalise_repeats")
def test_each_row_is_penalised_for_its_own_text():
    logits = torch.tensor([[2.0, -1.0, 0.5], [2.0, -1.0, 0.5]])
    got = penalise_repeats(logits, [[0], [2]], 2.0)
    agree(got, [[1.0, -1.0, 0.5], [2.0, -1.0, 0.25]], "two rows with the texts 0 and 2")
    unchanged(penalise_repeats, logits, [[0], [2]], 2.0)


@checks("penalise_repeats")
def test_the_penalty_is_that_of_the_library():
    # transformers 5.24.0, RepetitionPenaltyLogitsProcessor(1.3) with the text 3 1 3 5
    expected = [[1.5, -0.39, 0.8, 1.692308, -1.0, 0.076923, 1.1, -2.0]]
    agree(penalise_repeats(ROW, [[3, 1, 3, 5]], 1.3), expected, "a penalty of 1.3")


# ---- one draw -----------------------------------------------------------------------------------


@checks("choose")
def test_temperature_zero_takes_the_likeliest():
    logits = torch.cat([LOGITS, LOGITS.flip(1)])
    got = choose(logits, Sampling(temperature=0), generators(2)).tolist()
    same(got, [1, 3], "the likeliest tokens of two rows")


@checks("choose")
def test_the_draw_is_the_first_token_whose_cumulative_probability_exceeds_u():
    # The cumulative probabilities of the five tokens are 0.1, 0.6, 0.65, 0.8 and 1.
    for seed in range(40):
        u = torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()
        expected = sum(u >= total for total in (0.1, 0.6, 0.65, 0.8))
        got = choose(LOGITS, Sampling(temperature=1.0), generators(1, seed)).item()
        same(got, expected, f"the token that is drawn for u = {u:.4f}")


@checks("choose")
def test_shares_are_the_probabilities_at_this_temperature():
    n = 4000
    for temperature in (1.0, 0.5, 2.0):
        p = P[0] ** (1 / temperature)
        p = p / p.sum()
        drawn = choose(LOGITS.expand(n, 5), Sampling(temperature=temperature), generators(n))
        share = drawn.bincount(minlength=5) / n
        worst = (share - p).abs().max().item()
        assert worst < 0.03, (
            f"temperature {temperature}: expected shares {[round(x, 3) for x in p.tolist()]}, "
            f"got {[round(x, 3) for x in share.tolist()]}"
        )


@checks("choose")
def test_filters_are_applied_after_the_temperature():
    # At temperature 2 the probabilities are 0.340, 0.215, 0.186, 0.152, 0.107: top_p 0.7 keeps
    # three tokens. At temperature 1 it would keep two.
    sampling = Sampling(temperature=2.0, top_p=0.7)
    drawn = choose(LOGITS.expand(600, 5), sampling, generators(600))
    same(sorted(set(drawn.tolist())), [1, 3, 4], "tokens drawn at temperature 2 with top_p 0.7")
    sampling = Sampling(temperature=1.0, top_k=2)
    drawn = choose(LOGITS.expand(200, 5), sampling, generators(200))
    same(sorted(set(drawn.tolist())), [1, 4], "tokens drawn with top_k 2")


@checks("choose")
def test_a_row_uses_only_its_own_generator():
    sampling = Sampling(temperature=1.0)
    logits = torch.zeros(6, 50)  # fifty tokens, equally likely
    alone = [choose(logits[:1], sampling, generators(1, seed)).item() for seed in range(6)]
    together = choose(logits, sampling, generators(6)).tolist()
    same(together, alone, "the draws of six rows at once, and one by one")


@checks("choose")
def test_large_logits_and_small_temperatures_do_not_overflow():
    logits = torch.tensor([[900.0, 1000.0, -900.0]])
    got = choose(logits, Sampling(temperature=1e-3), generators(1)).item()
    same(got, 1, "logits 900, 1000 and -900 at temperature 0.001")


@checks("choose")
def test_half_precision_is_drawn_in_float32():
    # In bfloat16 the cumulative sums near 1 are multiples of 1/256, so many tokens share one.
    logits = torch.zeros(1000, 2000, dtype=torch.bfloat16)
    drawn = choose(logits, Sampling(temperature=1.0), generators(1000))
    different = len(set(drawn.tolist()))
    message = f"1,000 draws from 2,000 equal logits: expected about 790 tokens, got {different}"
    assert different > 700, message


@checks("choose")
def test_logits_that_are_not_finite_are_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError):
            choose(torch.tensor([[0.0, bad, 1.0]]), Sampling(temperature=1.0), generators(1))


# ---- the context --------------------------------------------------------------------------------


@checks("visible_from")
def test_a_text_that_fits_is_seen_whole():
    for n in (1, 7, 8):
        same(visible_from(n, 8), 0, f"first visible token of {n} with a context of 8")


@checks("visible_from")
def test_the_start_moves_in_steps_of_half_a_context():
    expected = {9: 4, 12: 4, 13: 8, 16: 8, 17: 12}
    for n, start in expected.items():
        same(visible_from(n, 8), start, f"first visible token of {n} with a context of 8")
    for n, start in {6: 2, 7: 2, 8: 4}.items():
        same(visible_from(n, 5), start, f"first visible token of {n} with a context of 5")


@checks("visible_from")
def test_a_context_of_one_token_sees_the_last():
    same(visible_from(1, 1), 0, "first visible token of 1 with a context of 1")
    same(visible_from(5, 1), 4, "first visible token of 5 with a context of 1")


@checks("visible_from")
def test_what_is_visible_fits_and_is_as_long_as_the_steps_allow():
    for context in range(1, 12):
        step = max(1, context // 2)
        for n in range(1, 60):
            start = visible_from(n, context)
            what = f"{n} tokens with a context of {context}, visible from {start}"
            assert n - start <= context, f"{what}: {n - start} tokens do not fit"
            assert start == 0 or n - start + step > context, f"{what}: one step too far"
            assert start % step == 0, f"{what}: not a multiple of the step {step}"


# ---- the cache ----------------------------------------------------------------------------------


def cache_of(window: int = 0, length: int = 12, rows: int = 1) -> KVCache:
    config = GPTConfig(vocab_size=11, context_length=16, n_layer=2, n_head=2, d_model=8)
    if window:
        config = GPTConfig(11, 16, n_layer=2, n_head=2, d_model=8, window=window)
    return KVCache(config, length, torch.zeros(rows, dtype=torch.long))


def keys_at(*positions: int) -> torch.Tensor:
    """Keys (1, 2, T, 4) whose numbers are their position."""
    return (
        torch.tensor(positions, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 2, -1, 4).clone()
    )


def fill(cache: KVCache, *positions: int) -> list[int]:
    """Store keys of these positions in both layers; the positions of the keys that come back."""
    for layer in (0, 1):
        k = keys_at(*positions) + 100 * layer
        got_k, got_v = cache.update(layer, k, -k)
        assert torch.equal(got_v, -got_k), "the values do not belong to the keys"
        numbers = got_k[0, 0, :, 0] - 100 * layer
    cache.length += len(positions)
    assert got_k.shape[:2] == (1, 2), f"expected keys (1, 2, S, 4), got {tuple(got_k.shape)}"
    return numbers.int().tolist()


@checks("KVCache.update")
def test_a_prompt_gets_its_own_keys_back():
    same(fill(cache_of(), 0, 1, 2), [0, 1, 2], "positions of the keys of a prompt of three")


@checks("KVCache.update")
def test_a_later_token_gets_all_keys_so_far():
    cache = cache_of()
    fill(cache, 0, 1, 2)
    same(fill(cache, 3), [0, 1, 2, 3], "positions of the keys after a fourth token")
    same(fill(cache, 4), [0, 1, 2, 3, 4], "positions of the keys after a fifth token")


@checks("KVCache.update")
def test_layers_have_keys_of_their_own():
    cache = cache_of()
    for layer in (0, 1):
        cache.update(layer, keys_at(0, 1) + 100 * layer, keys_at(0, 1))
    same(len(cache.layers), 2, "number of layers")
    cache.length = 2
    got, _ = cache.update(0, keys_at(2), keys_at(2))
    same(got[0, 0, :, 0].tolist(), [0, 1, 2], "keys of the first layer")


@checks("KVCache.update")
def test_memory_is_allocated_once():
    cache = cache_of()
    fill(cache, 0, 1, 2)
    same(tuple(cache.layers[0][0].shape), (1, 2, 12, 4), "shape of the keys of a layer")
    before = cache.layers[0][0].data_ptr()
    fill(cache, 3)
    same(cache.layers[0][0].data_ptr(), before, "address of the keys after one more token")


@checks("KVCache.update")
def test_in_a_window_a_new_key_takes_the_place_of_the_oldest():
    cache = cache_of(window=4)
    fill(cache, 0, 1, 2)
    same(fill(cache, 3), [0, 1, 2, 3], "positions of the keys when the window is full")
    same(fill(cache, 4), [4, 1, 2, 3], "positions of the keys by slot, one token later")
    same(fill(cache, 5), [4, 5, 2, 3], "positions of the keys by slot, two tokens later")


@checks("KVCache.update")
def test_a_prompt_longer_than_the_window_leaves_its_latest_keys():
    cache = cache_of(window=4)
    same(fill(cache, 0, 1, 2, 3, 4, 5), [0, 1, 2, 3, 4, 5], "positions of a prompt's keys")
    same(fill(cache, 6), [4, 5, 6, 3], "positions of the keys by slot, one token later")


@checks("KVCache.update")
def test_the_cache_changes_no_logits():
    """A prompt of four tokens is read at once, then one token at a time."""
    for options in ({}, {"window": 5, "n_kv_head": 1}):
        model = loud(**options)
        tokens = torch.randint(0, 23, (2, 16), generator=torch.Generator().manual_seed(1))
        cache = KVCache(model.config, 16, torch.tensor([0, 0]))
        with torch.no_grad():
            steps = [model.hidden(tokens[:, :4], cache)]
            steps += [model.hidden(tokens[:, t : t + 1], cache) for t in range(4, 16)]
            got = model.head(torch.cat(steps, 1))
            expected = model(tokens)
        worst = (got - expected).abs().max().item()
        assert worst < 1e-9, (
            f"logits with {options or 'the whole text'} differ by up to {worst:.2g}"
        )


@checks("KVCache.key_positions")
def test_the_keys_of_a_prompt_have_its_positions():
    same(cache_of().key_positions(5).tolist(), [0, 1, 2, 3, 4], "positions of a prompt of five")


@checks("KVCache.key_positions")
def test_before_the_slots_are_full_each_position_has_its_own():
    cache = cache_of()
    cache.length = 3
    same(cache.key_positions(1).tolist(), [0, 1, 2, 3], "positions of the keys for a fourth token")


@checks("KVCache.key_positions")
def test_the_first_token_of_a_text_sees_itself():
    same(cache_of().key_positions(1).tolist(), [0], "positions of the keys for a first token")


@checks("KVCache.key_positions")
def test_a_slot_holds_the_latest_position_that_belongs_there():
    cache = cache_of(window=4)
    expected = {3: [0, 1, 2, 3], 4: [4, 1, 2, 3], 6: [4, 5, 6, 3], 9: [8, 9, 6, 7]}
    for length, positions in expected.items():
        cache.length = length
        got = cache.key_positions(1).tolist()
        same(got, positions, f"positions by slot for the token at position {length}, window 4")


@checks("KVCache.key_positions")
def test_key_positions_agree_with_what_update_returns():
    cache = cache_of(window=5)
    expected = cache.key_positions(3).tolist()
    same(expected, fill(cache, 0, 1, 2), "positions of a prompt of three")
    for position in range(3, 15):
        expected = cache.key_positions(1).tolist()
        same(expected, fill(cache, position), f"positions by slot at position {position}")


@checks("KVCache.key_positions")
def test_prompts_of_unequal_length_do_not_see_the_padding():
    for options in ({}, {"window": 5}):
        model = loud(**options)
        prompts = [[3], [7, 1, 4, 1, 5, 9, 2], [2, 7, 1]]
        s = Sampling(max_new_tokens=8, temperature=0)
        alone = [complete(model, [prompt], s)[0] for prompt in prompts]
        same(complete(model, prompts, s), alone, f"three prompts at once, {options or 'no window'}")


# ---- around the exercises -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"position": "learned"}, {"window": 5, "n_kv_head": 1}])
def test_generation_with_and_without_the_cache_is_the_same(options):
    model = loud(**options)
    s = Sampling(max_new_tokens=9, temperature=0)
    slow = complete(model, [[7, 1, 4]], s, use_cache=False)
    same(complete(model, [[7, 1, 4]], s), slow, f"greedy tokens with the cache, {options}")


@pytest.mark.parametrize("options", [{}, {"position": "learned"}])
def test_a_prompt_does_not_depend_on_the_others_of_its_batch(options):
    model = loud(**options)
    s = Sampling(max_new_tokens=8, temperature=0)
    alone = complete(model, [[2, 7, 1]], s)[0]
    together = complete(model, [[2, 7, 1], [7, 1, 4, 1, 5, 9, 2]], s)[0]
    same(together, alone, f"greedy tokens beside a longer prompt, {options}")


def test_samples_of_one_prompt_differ():
    rows = complete(loud(), [[1, 2]] * 4, Sampling(max_new_tokens=12, temperature=1.0))
    assert len({tuple(row) for row in rows}) > 1, f"four samples are all {rows[0]}"


def test_dropout_is_off_while_sampling():
    model = loud(dropout=0.5).train()
    s = Sampling(max_new_tokens=8, temperature=0)
    first = complete(model, [[1, 2]], s)
    same(complete(model, [[1, 2]], s), first, "greedy tokens, twice from the same model")


def test_a_character_is_shown_once_it_is_whole():
    text = TextStream()
    pieces = [text.feed(bytes([byte])) for byte in "\u00e9\U0001f642".encode()]
    same(pieces, ["", "\u00e9", "", "", "", "\U0001f642"], "text after each byte")


def test_filters_are_off_by_default():
    s = Sampling()
    assert torch.equal(filter_logits(LOGITS, s.top_k, s.top_p, s.min_p), LOGITS)
