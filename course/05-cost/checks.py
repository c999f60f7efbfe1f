"""Checks of lesson 5. Figures with a source are published ones; the others are worked by hand."""

from functools import partial
from types import SimpleNamespace as Shape

import numpy as np
import pytest

from course import compare
from course.lessons import checks
from tinyfm.calc import ledgers, memory, scaling_laws, systems
from tinyfm.calc.ledgers import Layer, Stack
from tinyfm.calc.memory import Layout, Training
from tinyfm.calc.scaling_laws import CHINCHILLA, REFIT, Parametric
from tinyfm.common import gpus

agree = partial(compare.agree, tolerance=1e-9)


# ---- multiply-adds of a layer --------------------------------------------------------------------


@checks("Layer.macs")
def test_each_weight_is_used_once_at_each_position():
    agree(Layer("x", weights=6, positions=4).macs, 24, "6 weights at 4 positions")


@checks("Layer.macs")
def test_biases_and_tables_multiply_nothing():
    agree(Layer("x", weights=6, vectors=5, positions=4).macs, 24, "6 weights, 5 biases, at 4")
    agree(Layer("embedding", vectors=1000, positions=4).macs, 0, "a table of 1000 numbers")


@checks("Layer.macs")
def test_products_of_activations_are_added_once():
    agree(Layer("x", weights=6, positions=4, products=10).macs, 34, "24 and 10 products")


@checks("Layer.macs")
def test_gpt2_costs_what_its_matrices_and_its_attention_cost():
    """12 blocks of 12 D^2 weights and 2 D T^2 products, and the head, V D, at T = 1024 tokens."""
    D, T, V = 768, 1024, 50257
    expected = 12 * (12 * D * D * T + 2 * D * T * T) + V * D * T
    agree(systems.get("gpt2").total("macs"), expected, "multiply-adds of GPT-2")


# ---- hours ---------------------------------------------------------------------------------------

TOY = gpus.GPU("toy", {"fp32": 1, "bf16": 4}, 8, 100, 0, 100)  # 1 and 4 TFLOP/s


@checks("busy_hours")
def test_at_the_peak_a_teraflop_takes_a_second_on_a_teraflop_a_second():
    agree(gpus.busy_hours(3.6e15, TOY, "fp32", 1.0), 1, "hours for 3.6e15 FLOPs at 1e12 FLOP/s")


@checks("busy_hours")
def test_half_the_utilisation_takes_twice_the_hours():
    agree(gpus.busy_hours(3.6e15, TOY, "fp32", 0.5), 2, "hours at an MFU of 0.5")


@checks("busy_hours")
def test_the_peak_is_that_of_the_number_format():
    agree(gpus.busy_hours(3.6e15, TOY, "bf16", 1.0), 0.25, "hours in bf16, at 4e12 FLOP/s")
    agree(gpus.busy_hours(3.6e15, TOY, mfu=1.0), 0.25, "hours in the default format, bf16")
    with pytest.raises(ValueError):
        gpus.busy_hours(1, TOY, "fp8")


@checks("busy_hours")
@pytest.mark.parametrize("mfu", [0, -0.1, 1.5])
def test_an_impossible_share_of_the_peak_is_refused(mfu):
    try:
        hours = gpus.busy_hours(1e15, TOY, "fp32", mfu)
    except ValueError:
        return
    except ZeroDivisionError:
        hours = "a division by zero"
    raise AssertionError(f"an MFU of {mfu} gave {hours}; expected a ValueError")


# ---- the MLP's ledger ----------------------------------------------------------------------------


def mlp_of(T: int = 4, **changes) -> dict[str, Layer]:
    shape = {"d_model": 3, "d_ff": 5, "mlp": "gelu", "active": 1, "experts": 1, "mlp_bias": 1}
    layers = list(ledgers.mlp(Shape(**shape | changes), T))
    return {layer.part: layer for layer in layers}


@checks("mlp")
def test_a_plain_mlp_has_two_matrices_and_two_biases():
    layers = mlp_of()
    assert set(layers) == {"mlp"}, f"layers {sorted(layers)}; expected only mlp"
    agree(layers["mlp"].weights, 30, "weights for D = 3, F = 5: 2 D F")
    agree(layers["mlp"].vectors, 8, "biases for D = 3, F = 5: F + D")
    agree(mlp_of(mlp_bias=0)["mlp"].vectors, 0, "biases where there are none")


@checks("mlp")
def test_swiglu_has_three_matrices():
    agree(mlp_of(mlp="swiglu")["mlp"].weights, 45, "weights for D = 3, F = 5: 3 D F")


@checks("mlp")
def test_every_token_passes_the_matrices():
    agree(mlp_of(T=7)["mlp"].positions, 7, "positions of 7 tokens")
    agree(mlp_of(T=7)["mlp"].macs, 210, "multiply-adds of 7 tokens: 7 times 30")


@checks("mlp")
def test_what_the_backward_pass_needs_is_kept():
    layer = mlp_of()["mlp"]
    agree([layer.kept, layer.split], [12, 40], "kept D T and split 2 F T, for T = 4")
    agree(mlp_of(mlp="swiglu")["mlp"].split, 80, "split for SwiGLU: 4 F T")
    agree(mlp_of(mlp="relu")["mlp"].split, 20, "split for ReLU: F T")
    agree(layer.masks, 12, "numbers that dropout may zero: D T")


@checks("mlp")
def test_a_token_multiplies_the_active_experts_but_all_are_held():
    layers = mlp_of(experts=8, active=2)
    agree(layers["mlp"].weights, 60, "weights that a token passes: 2 experts of 30")
    assert "router" in layers, f"layers {sorted(layers)}; expected a router among them"
    agree(layers["router"].macs, 96, "the router multiplies D x 8 at 4 tokens")
    assert "idle experts" in layers, f"layers {sorted(layers)}; expected idle experts"
    agree(layers["idle experts"].parameters, 180, "parameters of the 6 other experts of 30")
    agree(layers["idle experts"].macs, 0, "multiply-adds of experts that are not passed")
    agree(layers["mlp"].split, 80, "split of two active experts")


@checks("mlp")
@pytest.mark.parametrize(
    ("name", "parameters"),
    # The counts of the released weights.
    [("gpt2", 124_439_808), ("llama-7b", 6_738_415_616), ("mixtral-8x7b", 46_702_792_704)],
    ids=["GPT-2", "Llama 7B", "Mixtral 8x7B"],
)
def test_published_models_have_their_published_sizes(name, parameters):
    agree(systems.get(name).parameters, parameters, f"parameters of {name}")


# ---- keys and values -----------------------------------------------------------------------------


def network(window: int = 0, cross: int = 0) -> Shape:
    """Two blocks that cache 10 numbers a token, and one block that caches 3."""
    stacks = (Stack((), 2, cache=10, cross_cache=cross), Stack((), 1, cache=3))
    return Shape(shape={"window": window}, stacks=stacks)


@checks("cache_bytes")
def test_every_block_caches_every_token():
    agree(memory.cache_bytes(network(), 5), 230, "bytes in bf16: 2 (2 x 10 + 3) 5")
    agree(memory.cache_bytes(network(), 10), 460, "bytes of twice the tokens")


@checks("cache_bytes")
def test_every_row_has_a_cache_in_the_given_format():
    agree(memory.cache_bytes(network(), 5, rows=4, dtype="fp32"), 1840, "bytes of 4 rows in fp32")


@checks("cache_bytes")
def test_a_window_keeps_its_latest_tokens_only():
    agree(memory.cache_bytes(network(window=3), 100), 138, "bytes with a window of 3: 2 x 23 x 3")
    agree(memory.cache_bytes(network(window=30), 5), 230, "bytes of 5 tokens, a window of 30")
    without = Shape(shape={}, stacks=network().stacks)
    agree(memory.cache_bytes(without, 5), 230, "bytes where the shape names no window")


@checks("cache_bytes")
def test_an_encoders_output_is_cached_once_a_row():
    agree(memory.cache_bytes(network(cross=7), 5), 258, "2 (2 x (50 + 7) + 15)")
    agree(memory.cache_bytes(network(cross=7), 10, rows=2), 976, "2 x 2 (2 x (100 + 7) + 30)")


@checks("cache_bytes")
def test_a_token_of_opt_13b_takes_800_kib():
    """Kwon et al. 2023 (vLLM), section 3."""
    agree(memory.cache_bytes(systems.get("opt-13b"), 1), 800 * 1024, "bytes of a token of OPT-13B")


# ---- weights, gradients, optimizer ---------------------------------------------------------------


def state(parameters=100, matrices=0, frozen=0, layout=None, **training) -> list[float]:
    use = memory.state_memory(
        parameters, Training(**training), layout or Layout(), matrices, frozen
    )
    return [use.weights, use.gradients, use.optimizer]


@checks("state_memory")
def test_mixed_precision_takes_16_bytes_a_parameter():
    agree(state(), [200, 200, 1200], "weights, gradients, optimizer of 100 parameters in bf16")


@checks("state_memory")
def test_float32_needs_no_master_weights():
    agree(state(dtype="fp32"), [400, 400, 800], "the three of 100 parameters in fp32")


@checks("state_memory")
def test_muon_keeps_one_average_of_a_matrix():
    got = state(matrices=60, optimizer="muon")
    agree(got, [200, 200, 960], "the three with 60 of 100 parameters in Muon's matrices")
    agree(state(matrices=60), [200, 200, 1200], "the three with AdamW, which has no such matrices")


@checks("state_memory")
def test_a_frozen_parameter_has_a_weight_and_nothing_else():
    agree(state(frozen=90), [200, 20, 120], "the three with 90 of 100 parameters frozen")


@checks("state_memory")
@pytest.mark.parametrize(
    ("stage", "gigabytes"),
    [
        (0, [15, 15, 90]),
        (1, [15, 15, 1.40625]),
        (2, [15, 0.234375, 1.40625]),
        (3, [0.234375, 0.234375, 1.40625]),
    ],
    ids=["stage 0", "stage 1", "stage 2", "stage 3"],
)
def test_each_stage_of_zero_divides_one_thing_more(stage, gigabytes):
    """Rajbhandari et al. 2020, figure 1: 7.5e9 parameters on 64 GPUs: 120, 31.4, 16.6, 1.9 GB."""
    got = state(7.5e9, layout=Layout(64, zero=stage))
    agree(np.array(got) / 1e9, gigabytes, f"GB of the three in stage {stage} on 64 GPUs")


@checks("state_memory")
def test_tensor_and_pipeline_parallelism_divide_everything():
    agree(state(layout=Layout(4, tensor=2, pipeline=2)), [50, 50, 300], "tensor 2, pipeline 2")
    sharded = Layout(16, tensor=2, pipeline=2, zero=3)
    agree(state(layout=sharded), [12.5, 12.5, 75], "the same, and ZeRO 3 over the other 4")


# ---- the best division of a budget ---------------------------------------------------------------


@checks("Parametric.optimum")
def test_equal_terms_share_the_budget_equally():
    best = Parametric("toy", 1, 5, 5, 0.5, 0.5).optimum(600)
    agree([best.parameters, best.tokens], [10, 10], "N and D of 600 FLOPs, A = B, alpha = beta")


@checks("Parametric.optimum")
def test_a_dearer_model_term_asks_for_a_larger_model():
    best = Parametric("toy", 1, 16, 4, 0.5, 0.5).optimum(600)
    agree([best.parameters, best.tokens], [40, 2.5], "N and D of 600 FLOPs with A = 4 B")


@checks("Parametric.optimum")
@pytest.mark.parametrize("law", [CHINCHILLA, REFIT], ids=["Chinchilla", "refit"])
@pytest.mark.parametrize("flops", [1e18, 1e24])
def test_the_whole_budget_is_spent_and_nothing_beats_it(law, flops):
    best = law.optimum(flops)
    agree(6 * best.parameters * best.tokens, flops, "6 N D")
    least = law.loss(best.parameters, best.tokens)
    for factor in (0.5, 0.9, 1.1, 2):
        other = law.loss(best.parameters * factor, best.tokens / factor)
        assert other > least, f"{factor} N and D / {factor} has loss {other}, below {least}"


@checks("Parametric.optimum")
def test_the_size_grows_as_a_power_of_the_budget():
    law = Parametric("toy", 1, 5, 5, 0.3, 0.6)
    growth = law.optimum(8e20).parameters / law.optimum(1e20).parameters
    agree(growth, 4, "growth of N for 8 times the budget, with exponent 0.6 / 0.9: 8^(2/3)")


# ---- a straight line for each exponent -----------------------------------------------------------

X = np.log([1.0, 2.0, 4.0])


@checks("regress")
def test_points_on_a_law_give_its_floor_and_its_height():
    E, A, squares = scaling_laws.regress(X, np.array([5.0, 3.5, 2.75]), np.array([1.0]))
    agree(E, [2], "E of losses 2 + 3 / C at C = 1, 2, 4")
    agree(A, [3], "A of losses 2 + 3 / C at C = 1, 2, 4")
    agree(squares, [0], "squared residuals of points that lie on the law")


@checks("regress")
def test_the_residuals_are_summed():
    """A line through (1, 0), (1/2, 1), (1/4, 0) in (u, loss): worked out with the normal equations.

    mean u = 7/12, sum (u - mean)^2 = 7/24, sum (u - mean) loss = -1/12: A = -2/7, E = 1/2, and the
    sum of squares is 2/3 - (1/12)^2 / (7/24) = 9/14.
    """
    E, A, squares = scaling_laws.regress(X, np.array([0.0, 1.0, 0.0]), np.array([1.0]))
    agree([*A, *E], [-2 / 7, 1 / 2], "A and E of the losses 0, 1, 0 at u = 1, 1/2, 1/4")
    agree(squares, [9 / 14], "the sum of the squared residuals")


@checks("regress")
def test_each_exponent_has_its_own_line():
    """Against numpy's least squares."""
    rng = np.random.default_rng(3)
    x = np.sort(rng.uniform(-2, 2, 6))
    losses = 2 + 0.7 * np.exp(-0.4 * x) + rng.normal(0, 0.05, 6)
    alphas = np.array([0.1, 0.4, 0.9, 2.0])
    E, A, squares = scaling_laws.regress(x, losses, alphas)
    for i, alpha in enumerate(alphas):
        columns = np.stack([np.ones(6), np.exp(-alpha * x)], axis=1)
        (e, a), (rest,), *_ = np.linalg.lstsq(columns, losses, rcond=None)
        agree(
            [E[i], A[i], squares[i]], [e, a, rest], f"E, A, squares at alpha {alpha}", relative=1e-6
        )


# ---- what no exercise covers ---------------------------------------------------------------------


def test_training_costs_three_times_a_forward_pass():
    gpt2 = systems.get("gpt2")
    forward = gpt2.flops_per_row(backward=False)
    agree(gpt2.flops_per_row(), 3 * forward, "FLOPs with the backward pass")


def test_grouped_queries_have_fewer_keys_and_values():
    """Llama 3 8B has 8 heads of keys and values for 32 of queries: 8,030,261,248 parameters."""
    agree(systems.get("llama3-8b").parameters, 8_030_261_248, "parameters of llama3-8b")


def test_activations_grow_with_the_rows():
    gpt2 = systems.get("gpt2")
    one = memory.activation_bytes(gpt2, Training(rows=1), Layout())
    agree(memory.activation_bytes(gpt2, Training(rows=8), Layout()), 8 * one, "8 rows")


def test_an_interval_contains_nine_of_ten_new_measurements():
    rng = np.random.default_rng(0)
    budgets = np.geomspace(1e9, 1e11, 8)
    inside = 0
    for _ in range(100):
        noise = rng.normal(0, 0.02, 9)
        losses = 1.5 + 2 * (np.append(budgets, 1e10) / 1e9) ** -0.3 + noise
        low, high = scaling_laws.fit_power_law(budgets, losses[:-1]).interval(1e10)
        inside += low <= losses[-1] <= high
    assert inside >= 80, f"{inside} of 100 new losses lie in the intervals of 90%"
