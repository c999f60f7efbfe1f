"""The law of size and data: known laws are recovered, and their intervals hold."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tinyfm.calc.size_law import Trained, fit_size_law, worth
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
    for M, U in ((9.5e7, 6e6), (1.7e7, 2e7), (6.3e6, 1e5)):
        assert law.loss(M, U) == pytest.approx(true_loss(M, U), rel=1e-3)


def test_the_interval_holds_as_often_as_it_says():
    """Of one more run, with its own noise, four times as dear as the sweep's largest."""
    random = np.random.default_rng(1)
    M, U = SIZES[256], 1e7
    inside = 0
    for seed in range(60):
        low, high = fit_size_law(sweep(0.005, seed)).interval(M, U)
        inside += low < true_loss(M, U) * math.exp(0.005 * random.standard_normal()) < high
    assert 0.8 <= inside / 60 <= 0.98


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
