"""Scaling laws: published constants give published optima; fits recover known laws; sweeps."""

import json
import math
import shutil
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from conftest import count_parameters, edit_json

from tinyfm.calc import __main__ as calc
from tinyfm.calc import scaling_laws, sweep
from tinyfm.calc.scaling_laws import CHINCHILLA, LAWS, REFIT, UNROUNDED, fit_law
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes import registry, run_dir

BUDGET = 5.76e23  # Chinchilla's


# ---- published laws -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "parameters", "tokens", "ratio"),
    [
        (CHINCHILLA, 3.22e10, 2.982e12, 92.6),
        (UNROUNDED, 4.03e10, 2.382e12, 59.1),
        (REFIT, 7.22e10, 1.329e12, 18.4),
    ],
)
def test_optima_at_chinchillas_budget(law, parameters, tokens, ratio):
    best = law.optimum(BUDGET)
    assert best.parameters == pytest.approx(parameters, rel=2e-3)
    assert best.tokens == pytest.approx(tokens, rel=2e-3)
    assert best.tokens / best.parameters == pytest.approx(ratio, rel=2e-3)


@pytest.mark.parametrize(
    ("parameters", "flops", "tokens"),
    [
        (4e8, 1.92e19, 8e9),
        (1e9, 1.21e20, 2.02e10),
        (1e10, 1.23e22, 2.051e11),
        (6.7e10, 5.76e23, 1.5e12),
        (1.75e11, 3.85e24, 3.7e12),
        (2.8e11, 9.9e24, 5.9e12),
        (5.2e11, 3.43e25, 1.1e13),
        (1e12, 1.27e26, 2.12e13),
        (1e13, 1.3e28, 2.162e14),
    ],
)
def test_first_approach_of_chinchilla(parameters, flops, tokens):
    """Hoffmann et al. 2022, table 3. The third approach agrees with it only after the refit."""
    best = next(law for law in LAWS if law.law == "Chinchilla 1").optimum(flops)
    assert best.parameters == pytest.approx(parameters, rel=0.07)
    assert best.tokens == pytest.approx(tokens, rel=0.08)
    if parameters > 6e10:  # from the budget of Chinchilla on
        assert REFIT.optimum(flops).parameters == pytest.approx(parameters, rel=0.25)
        assert CHINCHILLA.optimum(flops).parameters < 0.5 * parameters


@pytest.mark.parametrize("law", [CHINCHILLA, REFIT])
@pytest.mark.parametrize("flops", [1e18, 1e24])
def test_the_optimum_has_the_least_loss(law, flops):
    best = law.optimum(flops)
    assert 6 * best.parameters * best.tokens == pytest.approx(flops)
    least = law.loss(best.parameters, best.tokens)
    for factor in (0.5, 0.9, 1.1, 2):
        assert law.loss(best.parameters * factor, best.tokens / factor) > least


def test_every_law_spends_the_whole_budget():
    for law in LAWS:
        best = law.optimum(1e21)
        assert 6 * best.parameters * best.tokens == pytest.approx(1e21)


def test_the_optima_of_all_laws_are_shown():
    text = calc.answer(["optimal", "5.76e23"])
    assert "5.76e+23 FLOPs" in text
    for law in LAWS:
        (line,) = [line for line in text.splitlines() if line.startswith(law.law + "  ")]
        assert f"{law.optimum(BUDGET).parameters:.3g}" in line
    cases = [
        (["optimal", "0"], "0 must be above 0"),
        (["optimal"], "required"),
        (["optimal", "much"], "'much' is not a number"),
    ]
    for words, message in cases:
        with pytest.raises(ValueError, match=message):
            calc.answer(words)
    with pytest.raises(ValueError, match="such as 1e21"):
        scaling_laws.optima_text(math.inf)


# ---- fitting ------------------------------------------------------------------------------------


def test_least_squares_finds_the_bottom_of_a_valley():
    def rosenbrock(p):
        return np.array([10 * (p[1] - p[0] ** 2), 1 - p[0]])

    assert scaling_laws.least_squares(rosenbrock, np.array([-1.2, 1.0])) == pytest.approx([1, 1])


@pytest.mark.parametrize("form", scaling_laws.FORMS)
@pytest.mark.parametrize(("floor", "exponent"), [(1.7, 0.15), (0.8, 0.08), (3.0, 0.3)])
def test_a_power_law_is_recovered_and_extrapolated(form, floor, exponent):
    """From seven budgets over two decades, with noise of 0.3%, to four times the largest.

    The broken law has twice as many parameters, so its tolerance is larger.
    """
    flops = np.geomspace(1e13, 1e15, 7)

    def truth(C):
        return floor + 1.5 * (C / 1e14) ** -exponent

    noise = np.random.default_rng(1).standard_normal(7)
    fitted = fit_law(form, flops, truth(flops) * np.exp(0.003 * noise))
    tolerance = 0.02 if form == "power law" else 0.03
    assert fitted.loss(4e15) == pytest.approx(truth(4e15), rel=tolerance)
    low, high = fitted.interval(4e15)
    assert low < fitted.loss(4e15) < high
    assert high - low < 0.1 * high
    exact = fit_law(form, flops, truth(flops), replicas=5)
    assert exact.loss(flops) == pytest.approx(truth(flops), rel=2e-4)


def test_only_the_broken_law_finds_a_break():
    flops = np.geomspace(1e12, 1e18, 25)
    truth = 0.5 + 40 * flops**-0.1 * (1 + (flops / 1e15) ** 2) ** (-0.15 * 0.5)
    plain, broken = (fit_law(form, flops, truth, replicas=5) for form in scaling_laws.FORMS)
    assert np.abs(broken.loss(flops) / truth - 1).max() < 1e-3
    assert np.abs(plain.loss(flops) / truth - 1).max() > 0.02
    assert np.exp(broken.theta[3] + broken.centre) == pytest.approx(1e15, rel=0.05)


def test_intervals_contain_the_truth_about_as_often_as_stated():
    flops = np.geomspace(1e13, 1e15, 10)
    hits = 0
    truth = 1.0 + 2 * (flops / 1e14) ** -0.2
    random = np.random.default_rng(3)
    for _ in range(20):
        losses = truth * np.exp(0.005 * random.standard_normal(10))
        law = fit_law("power law", flops, losses, replicas=40)
        low, high = law.interval(1e14)
        if low < 1 + 2 < high:
            hits += 1
    assert 13 <= hits <= 20  # of 20; 18 are expected for a 90% interval


def test_more_noise_widens_the_interval_and_a_seed_repeats_it():
    flops = np.geomspace(1e13, 1e15, 8)
    truth = 1 + 2 * (flops / 1e14) ** -0.2
    noise = np.random.default_rng(0).standard_normal(8)
    widths = []
    for size in (0.001, 0.01):
        law = fit_law("power law", flops, truth * np.exp(size * noise))
        again = fit_law("power law", flops, truth * np.exp(size * noise))
        assert np.array_equal(law.replicas, again.replicas)
        widths.append(np.ptp(law.interval(4e15)))
    assert widths[1] > 3 * widths[0]


def test_too_few_budgets():
    with pytest.raises(ValueError, match=r"3 different budgets; .*at least 4"):
        fit_law("power law", np.array([1e9, 1e9, 2e9, 3e9]), np.array([3.0, 3.0, 2.5, 2.0]))


# ---- fits of run directories --------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """Run directories as train.py writes them, of GPTs whose losses follow a law."""
    folders = []
    for i, steps in enumerate((10, 20, 40, 80, 160, 640)):
        folder = tmp_path / f"sweep-{i}"
        folder.mkdir()
        config = GPTConfig(n_layer=1 + i, d_model=64)
        preset = registry.get_preset("gpt").run
        run = replace(preset, model=config, train=replace(preset.train, steps=steps, batch_size=4))
        record = run_dir.to_record("gpt", run, "same")
        (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
        flops = 4 * steps * GPT(config).flops_per_row()
        rows = [
            {"step": 0, "val_loss": 8.0},
            {"step": steps, "loss": 1.0},
            {"step": steps, "val_loss": law(flops)},
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
        folders.append(folder)
    return folders


def law(flops):
    return 2 + 3 * (flops / 1e12) ** -0.2


def ask(*words):
    return calc.answer(["fit", *map(str, words)])


def test_a_sweep_is_read_fitted_and_drawn(runs):
    found = sweep.read_point(runs[2], calc.read_run_directory(str(runs[2])))
    config = GPTConfig(n_layer=3, d_model=64)
    assert found.flops == 40 * 4 * GPT(config).flops_per_row()
    assert found.parameters == count_parameters(GPT(config))
    assert found.units == 40 * 4 * 256
    assert found.loss == law(found.flops)
    text = ask(*runs[:5], "--held-out", runs[5])
    assert "held out" in text and "BNSL: L = " in text
    lines = [line for line in text.splitlines() if "from the measured loss" in line]
    errors = [float(line.split("], ")[1].split("%")[0]) for line in lines]
    assert len(errors) == 2
    assert max(abs(error) for error in errors) < 2
    picture = matplotlib.image.imread(runs[0].parent / "scaling.png")
    assert picture.std() > 0.05


def test_the_held_out_run_may_be_among_the_runs(runs):
    """A glob of a sweep often matches it too."""
    text = ask(*runs, "--held-out", runs[5])
    assert text == ask(*runs[:5], "--held-out", runs[5])
    assert text.count("held out") == 1


def test_without_a_held_out_run_it_predicts_larger_ones(runs, tmp_path):
    text = ask(*runs, "--plot", tmp_path / "here.png")
    assert "4 x the largest" in text and "10 x the largest" in text
    assert (tmp_path / "here.png").exists()
    assert not (tmp_path / "scaling.png").exists()


def test_refused_sweeps(runs, tmp_path):
    with pytest.raises(ValueError, match="3 different budgets"):
        ask(*runs[:3])
    with pytest.raises(ValueError, match="is not a run directory"):
        ask(*runs, tmp_path)
    shutil.copytree(runs[3], tmp_path / "cut")
    lines = (runs[3] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "cut" / "metrics.jsonl").write_text(lines[0], encoding="utf-8")
    with pytest.raises(ValueError, match=r"cut is at step 0 of 80: finish it"):
        ask(*runs, tmp_path / "cut")
    edit_json(runs[0] / "config.json", data_fingerprint="other")
    with pytest.raises(ValueError, match="2 different data"):
        ask(*runs)
    edit_json(runs[0] / "config.json", data_fingerprint="same", family="none")
    with pytest.raises(ValueError, match=r"family 'none'.*gpt"):
        ask(*runs)
    edit_json(runs[0] / "config.json", family="gpt", train={"stepz": 3})
    with pytest.raises(ValueError, match="is not of this version"):
        ask(*runs)
    with pytest.raises(ValueError, match="required"):
        ask()
