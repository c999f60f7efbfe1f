"""Checks of lesson 2: values worked out by hand, and properties that the mathematics promises."""

import math

import pytest
import torch
from torch import nn

from course.compare import agree, waves
from course.lessons import checks
from tinyfm.gpt import (
    GPT,
    MLP,
    Attention,
    Block,
    GPTConfig,
    attention_mask,
    rope_frequencies,
    rotate,
)

# ---- aids ---------------------------------------------------------------------------------------

# Sizes that differ wherever they can, so that a wrong axis shows.
SIZES = {"vocab_size": 7, "context_length": 8, "n_layer": 2, "n_head": 4, "n_kv_head": 2}
SIZES |= {"d_model": 12, "d_head": 6, "d_ff": 10}
PLAIN = {"qk_norm": False, "position": "learned"}


@torch.no_grad()
def worked_model(**options) -> GPT:
    """A small GPT in the form of Qwen3 with weights given by a formula."""
    model = GPT(GPTConfig(**SIZES | options)).eval()
    for i, p in enumerate(model.parameters()):
        p.copy_(1 + 0.3 * waves(*p.shape, shift=i) if p.ndim == 1 else waves(*p.shape, shift=i))
    return model


TOKENS = torch.tensor([[3, 1, 4, 1, 5, 2]])
# From transformers 5.24.0; tests/course/test_oracles.py computes them again.
# Qwen3ForCausalLM: the logits of worked_model() after the last token of TOKENS.
LOGITS = [0.26193, 1.04156, 3.41897, 0.21041, -2.59285, 1.47086, -4.05158]
# Qwen3's apply_rotary_pos_emb: (1, 2, 3, 4) at the positions 0 and 3, theta 10000.
ROTATED = [[1.0, 2.0, 3.0, 4.0], [-1.413353, 1.879118, -2.828857, 4.058191]]
# ROPE_INIT_FUNCTIONS["llama3"]: K = 8, theta 10000, 64 positions times 8; times 1, 10, 100, 1000.
SLOWED = [1.0, 0.130423, 0.125, 0.125]


def agrees_with_transformers() -> None:
    logits = worked_model()(TOKENS)[0, -1]
    agree(logits, LOGITS, "logits of Qwen3 as transformers computes them", 1e-3)


def attention(**options) -> Attention:
    return Attention(GPTConfig(**SIZES | PLAIN | options)).eval()


# ---- attention_mask -----------------------------------------------------------------------------


def mask_of(query: list[int], key: list[int], window: int = 0, pad=None) -> torch.Tensor:
    return attention_mask(torch.tensor(query), torch.tensor(key), window, pad)


@checks("attention_mask")
def test_a_query_sees_itself_and_what_came_before():
    mask = mask_of([0, 1, 2], [0, 1, 2])
    agree(mask[0, 0], [[1, 0, 0], [1, 1, 0], [1, 1, 1]], "rows are queries 0 to 2, columns keys")


@checks("attention_mask")
def test_a_window_of_two_is_the_token_and_the_one_before():
    mask = mask_of([0, 1, 2, 3], [0, 1, 2, 3], window=2)
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    agree(mask[0, 0], expected, "window 2, rows are queries 0 to 3")


@checks("attention_mask")
def test_queries_may_stand_behind_cached_keys():
    mask = mask_of([2, 3], [0, 1, 2, 3])
    agree(mask, [[[[1, 1, 1, 0], [1, 1, 1, 1]]]], "queries 2 and 3, keys 0 to 3; (1, 1, T, S)")


@checks("attention_mask")
def test_padding_is_seen_by_nobody_but_itself():
    mask = mask_of([0, 1, 2], [0, 1, 2], pad=torch.tensor([0, 2]))
    full = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    padded = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    agree(mask, [[full], [padded]], "pad (0, 2), so positions 0 and 1 of row 1 are padding")


@checks("attention_mask")
def test_the_mask_is_a_tensor_of_truth_values():
    mask = mask_of([0, 1], [0, 1])
    assert mask.dtype == torch.bool, f"expected torch.bool, got {mask.dtype}"


# ---- Attention.attend ---------------------------------------------------------------------------


def one_head(rows: list[list[float]]) -> torch.Tensor:
    """(T, K) as (1, 1, T, K)."""
    return torch.tensor(rows)[None, None]


@checks("Attention.attend")
def test_scores_are_divided_by_the_root_of_the_width():
    """q . k / sqrt(4) is ln 3 and 0, so the weights are 3/4 and 1/4."""
    layer = attention(n_head=1, n_kv_head=1, d_head=4)
    q = one_head([[2.0, 0, 0, 0]])
    k = one_head([[math.log(3), 0, 0, 0], [0, 1, 0, 0]])
    v = one_head([[8.0, 0, 0, 0], [0, 4, 0, 0]])
    y = layer.attend(q, k, v, torch.ones(1, 1, 1, 2, dtype=torch.bool))
    agree(y[0, 0, 0], [6, 1, 0, 0], "3/4 of (8, 0, 0, 0) + 1/4 of (0, 4, 0, 0)")


@checks("Attention.attend")
def test_without_a_mask_no_query_sees_a_later_key():
    layer = attention(n_head=1, n_kv_head=1, d_head=1)
    q = one_head([[0.0], [0.0], [0.0]])
    v = one_head([[1.0], [3.0], [8.0]])
    y = layer.attend(q, q, v, None)
    agree(y[0, 0, :, 0], [1, 2, 4], "equal scores, values 1, 3, 8: means of the first 1, 2, 3")


@checks("Attention.attend")
def test_a_single_query_without_a_mask_sees_all_keys():
    layer = attention(n_head=1, n_kv_head=1, d_head=1)
    v = one_head([[1.0], [3.0], [8.0]])
    y = layer.attend(one_head([[0.0]]), torch.zeros_like(v), v, None)
    agree(y[0, 0, 0, 0], 4, "the latest token with a cache of values 1, 3, 8")


@checks("Attention.attend")
def test_only_allowed_keys_have_a_weight():
    layer = attention(n_head=1, n_kv_head=1, d_head=1)
    v = one_head([[1.0], [3.0], [8.0]])
    mask = torch.tensor([[[[True, False, False], [False, True, False], [True, False, True]]]])
    y = layer.attend(torch.zeros_like(v), torch.zeros_like(v), v, mask)
    agree(y[0, 0, :, 0], [1, 3, 4.5], "values 1, 3, 8 with the keys {0}, {1} and {0, 2} allowed")


@checks("Attention.attend")
def test_a_mask_of_numbers_is_added_to_the_scores():
    layer = attention(n_head=1, n_kv_head=1, d_head=1)
    v = one_head([[8.0], [4.0]])
    mask = one_head([[0.0, -math.inf], [math.log(3), 0.0]])
    y = layer.attend(torch.zeros_like(v), torch.zeros_like(v), v, mask)
    agree(y[0, 0, :, 0], [8, 7], "values 8, 4; position 1 adds ln 3 and 0, so 3/4 of 8 + 1/4 of 4")


@checks("Attention.attend")
def test_the_factor_of_the_scores_is_that_of_the_config():
    layer = attention(n_head=1, n_kv_head=1, d_head=4, attention_scale=1.0)
    q = one_head([[1.0, 0, 0, 0]])
    k = one_head([[math.log(3), 0, 0, 0], [0, 1, 0, 0]])
    v = one_head([[8.0, 0, 0, 0], [4, 0, 0, 0]])
    y = layer.attend(q, k, v, torch.ones(1, 1, 1, 2, dtype=torch.bool))
    agree(y[0, 0, 0, 0], 7, "attention_scale 1, so q . k is ln 3 and 0: 3/4 of 8 + 1/4 of 4")


@checks("Attention.attend")
def test_neighbouring_query_heads_share_a_key_value_head():
    layer = attention(n_head=4, n_kv_head=2, d_head=1)
    v = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    y = layer.attend(torch.zeros(1, 4, 1, 1), torch.zeros(1, 2, 1, 1), v, None)
    agree(y.flatten(), [10, 10, 20, 20], "4 query heads on 2 key/value heads of values 10 and 20")


@checks("Attention.attend")
def test_dropout_acts_in_training_only():
    layer = attention(n_head=1, n_kv_head=1, d_head=1, dropout=0.5)
    v = torch.ones(1, 1, 64, 1)
    scores = torch.zeros_like(v)
    agree(layer.attend(scores, scores, v, None), v, "values 1 in evaluation")
    torch.manual_seed(0)
    y = layer.train().attend(scores, scores, v, None)
    assert not torch.equal(y, v), "in training, dropout 0.5 changed nothing"
    message = f"dropout must keep the mean: expected about 1, got {y[0, 0, 16:].mean():.2f}"
    assert abs(y[0, 0, 16:].mean() - 1) < 0.2, message


@checks("Attention.attend")
def test_the_whole_model_agrees_with_transformers():
    agrees_with_transformers()


# ---- rope_frequencies ---------------------------------------------------------------------------


@checks("rope_frequencies")
def test_the_first_pair_turns_by_one_radian_per_position():
    frequency = rope_frequencies(GPTConfig(d_head=8, rope_theta=10_000.0))
    agree(frequency[0], 1, "pair 0")


@checks("rope_frequencies")
def test_each_pair_turns_slower_by_the_same_factor():
    frequency = rope_frequencies(GPTConfig(d_head=8, rope_theta=10_000.0))
    agree(frequency, [1, 0.1, 0.01, 0.001], "10000^(-2i/8) = 10^-i")  # i = 0 ... 3
    frequency = rope_frequencies(GPTConfig(d_head=4, rope_theta=100.0))
    agree(frequency, [1, 0.1], "theta 100, K = 4: 100^(-2i/4) = 10^-i")


@checks("rope_frequencies")
def test_a_longer_context_slows_the_long_waves():
    """In 64 positions the four pairs make 10.19, 1.019, 0.102 and 0.010 turns.

    More than 4 turns: kept. Fewer than 1: slowed by 8. Between: keep = (1.019 - 1) / (4 - 1).
    """
    config = GPTConfig(d_head=8, rope_theta=1e4, rope_factor=8.0, rope_original_context=64)
    frequency = rope_frequencies(config) * torch.tensor([1.0, 10, 100, 1000])
    agree(frequency, SLOWED, "frequencies, times 1, 10, 100, 1000")


@checks("rope_frequencies")
def test_frequencies_are_float32_without_an_extension_too():
    frequency = rope_frequencies(GPTConfig(d_head=6))
    assert frequency.shape == (3,), f"K = 6 has 3 pairs, got {tuple(frequency.shape)}"
    assert frequency.dtype == torch.float32, f"expected float32, got {frequency.dtype}"


# ---- rotate -------------------------------------------------------------------------------------


def turn(x: list[float], degrees: list[float]) -> torch.Tensor:
    angles = torch.tensor(degrees).deg2rad()[None]
    return rotate(torch.tensor(x).view(1, 1, 1, -1), angles.cos(), angles.sin()).flatten()


@checks("rotate")
def test_a_quarter_turn_takes_the_first_half_to_the_second():
    agree(turn([1, 0], [90]), [0, 1], "(1, 0) turned by 90 degrees")
    agree(turn([0, 1], [90]), [-1, 0], "(0, 1) turned by 90 degrees")


@checks("rotate")
def test_pairs_are_half_a_width_apart():
    agree(turn([1, 2, 3, 4], [0, 90]), [1, -4, 3, 2], "only the pair (2, 4) turns, by 90 degrees")


@checks("rotate")
def test_lengths_stay():
    length = turn([3.0, -1.0, 4.0, 2.0], [25.0, 70.0]).norm()
    agree(length, math.sqrt(30), "the length of (3, -1, 4, 2)")


@checks("rotate")
def test_scores_depend_on_the_distance_only():
    q = [0.3, -1.2, 0.7, 0.5]
    k = [1.1, 0.4, -0.6, 0.9]
    near = turn(q, [50.0, 5.0]) @ turn(k, [20.0, 2.0])  # positions 5 and 2
    far = turn(q, [90.0, 9.0]) @ turn(k, [60.0, 6.0])  # positions 9 and 6
    agree(far, near, "score at the positions 9 and 6, beside 5 and 2")


@checks("rotate")
def test_a_later_query_meets_an_earlier_key_as_in_transformers():
    """Two rows at the positions 0 and 3, theta 10000, K = 4."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4).expand(1, 1, 2, 4)
    angles = torch.tensor([[0.0, 0.0], [3.0, 0.03]])
    agree(rotate(x, angles.cos(), angles.sin())[0, 0], ROTATED, "(1, 2, 3, 4) at 0 and 3")


# ---- Attention.project --------------------------------------------------------------------------


@torch.no_grad()
def identity_attention(**options) -> Attention:
    """Two heads of width 2 whose three layers hand on the four channels as they are."""
    sizes = {"n_head": 2, "n_kv_head": 2, "d_model": 4, "d_head": 2}
    layer = attention(**sizes, **options)
    for linear in (layer.q, layer.k, layer.v):
        linear.weight.copy_(torch.eye(4))
    return layer


@checks("Attention.project")
def test_neighbouring_channels_form_a_head():
    x = torch.tensor([[[1.0, 2, 3, 4], [5, 6, 7, 8]]])  # (1, T = 2, 4)
    expected = [[[[1, 2], [5, 6]], [[3, 4], [7, 8]]]]  # (1, N = 2, T, K = 2)
    for name, got in zip("qkv", identity_attention().project(x, None)):
        agree(got, expected, f"{name} of two tokens (1, 2, 3, 4) and (5, 6, 7, 8)")


@checks("Attention.project")
def test_there_are_fewer_key_and_value_heads():
    q, k, v = attention(n_head=4, n_kv_head=2).project(waves(3, 5, 12), None)
    shapes = [tuple(x.shape) for x in (q, k, v)]
    expected = [(3, 4, 5, 6), (3, 2, 5, 6), (3, 2, 5, 6)]
    assert shapes == expected, f"expected the shapes {expected}, got {shapes}"


@checks("Attention.project")
def test_queries_and_keys_are_rotated_and_values_are_not():
    x = torch.tensor([[[1.0, 2, 3, 4]]])
    quarter = (torch.tensor([[0.0]]), torch.tensor([[1.0]]))  # cos and sin of 90 degrees
    q, k, v = identity_attention().project(x, quarter)
    agree(q.flatten(), [-2, 1, -4, 3], "q of (1, 2, 3, 4), each pair turned by 90 degrees")
    agree(k.flatten(), [-2, 1, -4, 3], "k of (1, 2, 3, 4), each pair turned by 90 degrees")
    agree(v.flatten(), [1, 2, 3, 4], "v, which has no position")


@checks("Attention.project")
def test_queries_and_keys_are_normalised_per_head_and_values_are_not():
    """The mean square of (3, 4) is 12.5, that of (30, 40) a hundred times that."""
    x = torch.tensor([[[3.0, 4, 30, 40]]])
    q, k, v = identity_attention(qk_norm=True).project(x, None)
    expected = [3 / math.sqrt(12.5), 4 / math.sqrt(12.5)] * 2
    agree(q.flatten(), expected, "q of (3, 4) and (30, 40)")
    agree(k.flatten(), expected, "k of (3, 4) and (30, 40)")
    agree(v.flatten(), [3, 4, 30, 40], "v, which is not normalised")


@checks("Attention.project")
@torch.no_grad()
def test_the_norm_comes_before_the_rotation():
    """The gains 2 and 5 belong to the channels before they turn."""
    layer = identity_attention(qk_norm=True)
    layer.q_norm.weight.copy_(torch.tensor([2.0, 5.0]))
    layer.k_norm.weight.copy_(torch.tensor([3.0, 7.0]))
    quarter = (torch.tensor([[0.0]]), torch.tensor([[1.0]]))
    q, k, _ = layer.project(torch.ones(1, 1, 4), quarter)
    agree(q.flatten(), [-5, 2, -5, 2], "q of (1, 1), gains (2, 5), then 90 degrees")
    agree(k.flatten(), [-7, 3, -7, 3], "k of (1, 1), gains (3, 7), then 90 degrees")


@checks("Attention.project")
def test_with_your_projections_the_model_agrees_with_transformers():
    agrees_with_transformers()


# ---- MLP.forward --------------------------------------------------------------------------------


@torch.no_grad()
def scalar_mlp(kind: str, gate: float = 1.0, up: float = 1.0, down: float = 1.0) -> MLP:
    """An MLP whose layers multiply one number."""
    mlp = MLP(GPTConfig(**SIZES | PLAIN | {"d_model": 1, "d_ff": 1, "mlp": kind}))
    mlp.up.weight.fill_(up)
    mlp.down.weight.fill_(down)
    if kind == "swiglu":
        mlp.gate.weight.fill_(gate)
    return mlp


@checks("MLP.forward")
def test_silu_acts_on_the_gate():
    """SiLU(z) = z / (1 + e^-z), so SiLU(ln 3) = 3/4 ln 3; times up, 2; times down, 10."""
    y = scalar_mlp("swiglu", gate=math.log(3), up=2.0, down=10.0)(torch.ones(1, 1, 1))
    agree(y.flatten()[0], 15 * math.log(3), "gate ln 3, up 2, down 10 of the number 1")


@checks("MLP.forward")
def test_a_closed_gate_lets_nothing_through():
    y = scalar_mlp("swiglu", gate=0.0, up=2.0)(torch.ones(1, 1, 1))
    agree(y.flatten()[0], 0, "gate 0, up 2")


@checks("MLP.forward")
def test_gelu_is_the_tanh_formula():
    """0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))), as in GPT-2; the exact one is 1.95450."""
    y = scalar_mlp("gelu", up=2.0)(torch.ones(1, 1, 1))
    agree(y.flatten()[0], 1.954598, "GELU of 2", 1e-5)


@checks("MLP.forward")
def test_the_exact_gelu_is_not():
    """z times the share of a normal distribution below z: 2 * 0.977250."""
    y = scalar_mlp("exact-gelu", up=2.0)(torch.ones(1, 1, 1))
    agree(y.flatten()[0], 1.954500, "exact GELU of 2", 1e-5)


@checks("MLP.forward")
@pytest.mark.parametrize("z, expected", [(3.0, 45.0), (-3.0, 0.0)])
def test_relu2_squares_what_is_positive(z, expected):
    y = scalar_mlp("relu2", up=z, down=5.0)(torch.ones(1, 1, 1))
    agree(y.flatten()[0], expected, f"5 times the square of ReLU({z:g})")


@checks("MLP.forward")
def test_with_your_mlp_the_model_agrees_with_transformers():
    agrees_with_transformers()


# ---- Block.after_attention ----------------------------------------------------------------------


class Nothing(nn.Module):
    """Takes everything, gives zeros."""

    def forward(self, x):
        return torch.zeros_like(x)


@torch.no_grad()
def plain_block() -> Block:
    """Two heads of width 1 on a stream of width 2; `out` hands on, and the MLP gives zeros."""
    block = Block(GPTConfig(**SIZES | PLAIN | {"n_head": 2, "d_head": 1, "d_model": 2})).eval()
    block.attention.out.weight.copy_(torch.eye(2))
    block.mlp = Nothing()
    return block


@checks("Block.after_attention")
def test_the_heads_lie_side_by_side():
    y = torch.tensor([[[[1.0], [2.0]], [[3.0], [4.0]]]])  # (1, N = 2, T = 2, K = 1)
    out = plain_block().after_attention(torch.zeros(1, 2, 2), y)
    agree(out, [[[1, 3], [2, 4]]], "head 0 has 1, 2 and head 1 has 3, 4 for two tokens")


@checks("Block.after_attention")
def test_updates_are_added_to_the_stream():
    y = torch.tensor([[[[1.0]], [[3.0]]]])
    out = plain_block().after_attention(torch.tensor([[[10.0, 20.0]]]), y)
    agree(out, [[[11, 23]]], "stream (10, 20), output of attention (1, 3), MLP 0")


@checks("Block.after_attention")
def test_the_mlp_reads_the_normalised_sum():
    """The sum is (3, 4); its root mean square is sqrt(12.5); the MLP here hands on its input."""
    block = plain_block()
    block.mlp = nn.Identity()
    out = block.after_attention(torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[[1.0]], [[3.0]]]]))
    expected = [3 + 3 / math.sqrt(12.5), 4 + 4 / math.sqrt(12.5)]
    agree(out[0, 0], expected, "stream (2, 1), attention (1, 3): (3, 4) + norm of (3, 4)")


@checks("Block.after_attention")
def test_dropout_meets_both_updates_and_not_the_stream():
    block = plain_block()
    block.mlp = nn.Identity()
    block.dropout = Nothing()
    out = block.after_attention(torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[[1.0]], [[3.0]]]]))
    agree(out, [[[2, 1]]], "stream (2, 1) when dropout drops everything")


@checks("Block.after_attention")
def test_with_your_updates_the_model_agrees_with_transformers():
    agrees_with_transformers()


# ---- GPT.loss -----------------------------------------------------------------------------------


class Successor(GPT):
    """Of two tokens, gives 1 after 0 and 0 after 1 the probability 3/4."""

    def __init__(self):
        super().__init__(GPTConfig(**SIZES | {"vocab_size": 2, "d_model": 2, "n_layer": 1}))
        self.head.weight.data.copy_(math.log(3) * torch.eye(2))

    def hidden(self, tokens, cache=None, sight=None):
        return nn.functional.one_hot(1 - tokens, 2).float()


LIKELY = -math.log(3 / 4)
UNLIKELY = -math.log(1 / 4)


@checks("GPT.loss")
def test_the_target_is_the_next_token():
    loss, _ = Successor().loss({"tokens": torch.tensor([[0, 1, 0, 1]])})
    agree(loss, LIKELY, "0 1 0 1, each next token has p = 3/4: -ln 3/4")
    loss, _ = Successor().loss({"tokens": torch.tensor([[0, 0, 0, 0]])})
    agree(loss, UNLIKELY, "0 0 0 0, each next token has p = 1/4: -ln 1/4")


@checks("GPT.loss")
def test_the_loss_is_a_mean_over_targets():
    batch = {"tokens": torch.tensor([[0, 1, 0], [0, 0, 0]])}
    loss, metrics = Successor().loss(batch)
    agree(loss, (LIKELY + UNLIKELY) / 2, "two likely and two unlikely targets")
    agree(metrics["weight"], 4, "number of targets of two rows of three tokens")


@checks("GPT.loss")
def test_masked_targets_do_not_count():
    """Of six targets three count; two of these are likely."""
    tokens = torch.tensor([[0, 1, 0, 0], [0, 1, 1, 1]])
    mask = torch.tensor([[True, True, True], [False, False, False]])
    loss, metrics = Successor().loss({"tokens": tokens, "mask": mask})
    agree(metrics["weight"], 3, "number of targets that count")
    agree(loss, (2 * LIKELY + UNLIKELY) / 3, "mean over the three targets that count")


@checks("GPT.loss")
def test_a_batch_without_targets_costs_nothing():
    mask = torch.zeros(1, 3, dtype=torch.bool)
    loss, metrics = Successor().loss({"tokens": torch.tensor([[0, 1, 0, 0]]), "mask": mask})
    agree(loss, 0, "loss of a batch in which no target counts")
    agree(metrics["weight"], 0, "number of targets that count")


@checks("GPT.loss")
def test_a_model_that_knows_nothing_pays_the_logarithm_of_its_vocabulary():
    model = worked_model()
    nn.init.zeros_(model.head.weight)
    loss, _ = model.loss({"tokens": TOKENS})
    agree(loss, math.log(7), "ln 7, as all 7 tokens are equally likely")


@checks("GPT.loss")
def test_the_loss_is_float32_in_a_bfloat16_model():
    loss, _ = worked_model().bfloat16().loss({"tokens": TOKENS})
    assert loss.dtype == torch.float32, f"expected float32, got {loss.dtype}"


# ---- the whole model ----------------------------------------------------------------------------


def test_no_logit_depends_on_a_later_token():
    model = worked_model()
    before = model(TOKENS)
    changed = TOKENS.clone()
    changed[0, 4] = 0
    after = model(changed)
    agree(after[0, :4], before[0, :4], "logits before the changed token 4")
