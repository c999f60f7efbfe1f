"""The law of size and data: budgets in words, known laws recovered, the choice of a size."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tinyfm.calc import size_law
from tinyfm.calc.size_law import Budget, Trained, consider, fit_size_law, read_budget, worth
from tinyfm.common import gpus
from tinyfm.recipes import registry

SIZES = {128: 6.3e6, 192: 1.1e7, 256: 1.7e7, 384: 4.5e7, 512: 9.5e7}  # FLOPs a token
TEXT = 3e6  # tokens


def true_loss(M, U):
    return 0.7 + 0.3 * (M / 2e7) ** -0.35 + 0.6 * (U / 1e6) ** -0.45


def sweep(noise=0.0, seed=0):
    """Runs of a triangle of sizes and tokens, as benchmarks/budget.py has."""
    random = np.random.default_rng(seed)
    runs = []
    for width, M in SIZES.items():
        for D in (4e5, 1e6, 2.5e6, 6.25e6):
            if M * D < 7e13:
                loss = true_loss(M, worth(D, TEXT)) * math.exp(noise * random.standard_normal())
                runs.append(Trained(width, M, D, TEXT, float(loss)))
    return runs


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("90s", "seconds", 90),
        ("10m", "seconds", 600),
        ("1.5 h", "seconds", 5400),
        ("1e13", "flops", 1e13),
        ("2.5e14 FLOP", "flops", 2.5e14),
        ("20M tokens", "tokens", 2e7),
        ("300,000 tokens", "tokens", 3e5),
    ],
)
def test_budgets_in_words(text, kind, amount):
    assert read_budget(text) == Budget(kind, pytest.approx(amount), text)


def test_dollars_buy_the_flops_of_a_gpu():
    h100 = gpus.get("h100")
    flops = 5 / h100.price * 3600 * h100.peak("bf16") * 0.4
    for text in ("5 dollars", "$5"):
        found = read_budget(text, "h100")
        assert (found.kind, found.amount) == ("flops", pytest.approx(flops))
        assert h100.priced in found.text and "MFU 0.4" in found.text


@pytest.mark.parametrize(
    ("text", "gpu", "message"),
    [
        ("soon", "", "'soon'; use 10m, 90s"),
        ("", "", "''; use 10m"),
        ("0m", "", "'0m'; use 10m"),
        ("1.5.2h", "", "'1.5.2h'; use 10m"),
        ("10 apples", "", "'10 apples'; use 10m"),
        ("5 dollars", "", "add --gpu NAME"),
        ("5 dollars", "rtx-4090", "no price of rtx-4090 .* use one of .*h100"),
        ("10m", "h100", "10m is none: leave it out"),
    ],
)
def test_refused_budgets(text, gpu, message):
    with pytest.raises(ValueError, match=message):
        read_budget(text, gpu)


def test_a_second_pass_is_worth_nearly_as_much_as_new_text():
    assert float(worth(2e6, TEXT)) == 2e6
    assert float(worth(TEXT, TEXT)) == TEXT
    passes = worth(TEXT * np.arange(1, 40), TEXT) / TEXT
    gains = np.diff(passes)
    assert 0.95 < gains[0] < 1 and (np.diff(gains) < 0).all()
    assert gains[14] == pytest.approx(math.exp(-14.5 / 15.4), rel=1e-3)
    assert float(worth(1e12, TEXT)) == pytest.approx(TEXT * 16.4)


def test_a_known_law_is_recovered_and_extrapolated():
    law = fit_size_law(sweep())
    assert law.deviation < 1e-5
    assert law.most == max(run.flops_per_token * run.tokens for run in sweep())
    for M, U in ((9.5e7, 6e6), (1.7e7, 2e7), (6.3e6, 1e5)):
        assert law.loss(M, U) == pytest.approx(true_loss(M, U), rel=1e-3)


def test_the_interval_holds_as_often_as_it_says():
    """Of one more run, with its own noise, 2.5 times as dear as the sweep's largest."""
    random = np.random.default_rng(1)
    M, U = SIZES[256], 1e7
    inside, widths = 0, []
    for seed in range(40):
        low, high = fit_size_law(sweep(0.005, seed)).interval(M, U)
        inside += low < true_loss(M, U) * math.exp(0.005 * random.standard_normal()) < high
        widths.append(high / low - 1)
    assert inside / 40 >= 0.8
    assert 2 * 1.645 * 0.005 < np.mean(widths) < 0.06


def test_a_law_needs_runs_of_several_widths():
    runs = sweep()
    with pytest.raises(ValueError, match="7 runs of 2 widths"):
        fit_size_law(runs[:7])
    with pytest.raises(ValueError, match="9 runs of 1 widths"):
        fit_size_law([replace(run, width=1) for run in runs[:9]])


def test_a_width_of_the_preset_decides_the_rest():
    """The preset's own width is the preset itself; heads never get narrower than 64."""
    usual = registry.find_preset("gpt").run
    assert usual.at_width(256) == usual
    sizes = {}
    for width in (128, 192, 256, 384, 512):
        run = usual.at_width(width)
        sizes[width] = (run.model.n_layer, run.model.n_head, run.train.batch_size, run.optim.lr)
        assert run.model.K >= 64 and run.optim.muon_lr == usual.optim.muon_lr
    assert sizes[128] == (2, 2, 8, pytest.approx(0.012 * 2**0.5, rel=0.01))
    assert sizes[512] == (4, 4, 32, pytest.approx(0.012 / 2**0.5, rel=0.01))


def test_a_budget_of_flops_goes_to_the_size_of_least_loss():
    law = fit_size_law(sweep())
    widths = []
    for flops in (2e12, 2e13, 2e14, 2e15):
        tokens = {width: flops / M for width, M in SIZES.items()}
        found = consider(law, SIZES, tokens, 1e12)
        best = size_law.choose(law, SIZES, found, Budget("flops", flops, ""), 1e12)
        losses = {width: true_loss(M, tokens[width]) for width, M in SIZES.items()}
        assert best.width == min(losses, key=losses.get)
        assert best.loss == pytest.approx(losses[best.width], rel=2e-3)
        widths.append(best.width)
    assert widths == sorted(widths) and widths[0] < widths[-1]
    with pytest.raises(ValueError, match=r"1e\+17 FLOP, .*calc optimal 1e\+17"):
        consider(law, SIZES, {256: 1e17 / SIZES[256]}, TEXT)


def test_a_budget_of_tokens_goes_to_the_size_that_they_suit():
    """No other size at the same FLOPs is better, even with its own number of tokens."""
    law = fit_size_law(sweep())
    for tokens in (3e5, 2e6, 2e7):
        M = law.best_size(tokens)
        others = M * np.geomspace(0.25, 4, 201)
        losses = [true_loss(other, M * tokens / other) for other in others]
        assert others[int(np.argmin(losses))] == pytest.approx(M, rel=0.05)
    found = consider(law, SIZES, dict.fromkeys(SIZES, 2e6), TEXT)
    best = size_law.choose(law, SIZES, found, Budget("tokens", 2e6, ""), TEXT)
    near = min(SIZES, key=lambda width: abs(math.log(SIZES[width] / law.best_size(2e6))))
    assert best.width == near < 512


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"x.csv has not been recorded.*benchmarks/budget.py"):
        size_law.read_table(tmp_path / "x.csv")
