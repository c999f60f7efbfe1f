"""Scaling laws: published constants give published optima; fits recover known laws; sweeps."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import count_parameters, edit_json

from tinyfm.calc import __main__ as calc
from tinyfm.calc import estimate, scaling_laws, sweep
from tinyfm.calc.scaling_laws import (
    CHINCHILLA,
    LAWS,
    REFIT,
    UNROUNDED,
    fit_broken_law,
    fit_power_law,
)
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


@pytest.mark.parametrize("C_min", [1.0, 1e4, BUDGET / 8.64e19])
def test_kaplans_table_counts_compute_far_below_the_critical_batch_size(C_min):
    """Kaplan et al. 2020, table 6, with C_min in PF-days; C = 2 C_min at the critical batch size.

    The table gives N and D separately, each with rounded constants.
    """
    kaplan = next(law for law in LAWS if law.law == "Kaplan").optimum(2 * C_min * 8.64e19)
    assert kaplan.parameters == pytest.approx(1.3e9 * C_min**0.73)
    assert kaplan.tokens == pytest.approx(2e10 * C_min**0.27, rel=0.11)


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

BUDGETS = np.geomspace(6e10, 4.5e12, 8)  # about those of the presets
HELD_OUT = 4 * BUDGETS[-1]


def power_law(E, alpha, flops):
    return E + (flops / 1e12) ** -alpha


@pytest.mark.parametrize(
    ("dof", "quantile"), [(2, 2.920), (3, 2.353), (5, 2.015), (10, 1.812), (30, 1.697)]
)
def test_quantiles_of_student(dof, quantile):
    """The 95% column of the usual table."""
    assert scaling_laws.student_t(0.9, dof) == pytest.approx(quantile, rel=4e-3)


@pytest.mark.parametrize(("E", "alpha"), [(1.7, 0.15), (0.8, 0.08), (3.0, 0.3), (0.0, 0.2)])
def test_a_power_law_is_recovered_and_extrapolated(E, alpha):
    law = fit_power_law(BUDGETS, power_law(E, alpha, BUDGETS))
    assert law.alpha == pytest.approx(alpha, rel=1e-3)
    assert pytest.approx(E, abs=3e-3) == law.E
    assert law.loss(BUDGETS) == pytest.approx(power_law(E, alpha, BUDGETS), rel=1e-4)
    assert law.loss(HELD_OUT) == pytest.approx(power_law(E, alpha, HELD_OUT), rel=1e-4)
    assert law.deviation < 1e-4
    formula = re.search(r"L = (\S+) \+ (\S+) C\^-(\S+),", law.formula())
    E, a, exponent = map(float, formula.groups())
    assert E + a * 1e13**-exponent == pytest.approx(law.loss(1e13), rel=0.02)


def test_the_fit_is_that_of_least_squares():
    noise = 0.01 * np.random.default_rng(4).standard_normal(8)
    losses = power_law(0.7, 0.2, BUDGETS) + noise
    law = fit_power_law(BUDGETS, losses)
    start = np.array([law.E, law.A, law.alpha])

    def residuals(theta):
        return theta[0] + theta[1] * (BUDGETS / law.C0) ** -theta[2] - losses

    best = scaling_laws.least_squares(residuals, start)
    assert law.alpha == pytest.approx(best[2], rel=1e-3)
    squares = np.sum(residuals(best) ** 2)
    assert law.deviation**2 * law.dof == pytest.approx(squares, rel=1e-5)


@pytest.mark.parametrize(
    ("E", "alpha", "seeds", "sizes"),
    [(0.7, 0.2, 0.003, 0.0), (0.7, 0.2, 0.02, 0.01), (0.2, 0.1, 0.003, 0.003), (1.0, 0.4, 0.01, 0)],
)
def test_intervals_contain_the_truth_as_often_as_stated(E, alpha, seeds, sizes):
    """Sweeps of eight sizes with three seeds each, and what a larger size then measures.

    The losses scatter with the seed, and with the size, as where a learning rate suits one better.
    """
    random = np.random.default_rng(0)
    sweeps = 1000
    inside = 0
    exponents = 0
    for _ in range(sweeps):
        scatter = seeds * random.standard_normal((9, 3)) + sizes * random.standard_normal((9, 1))
        *points, new = scatter.mean(1)
        law = fit_power_law(BUDGETS, power_law(E, alpha, BUDGETS) + points)
        low, high = law.interval(HELD_OUT)
        inside += low < power_law(E, alpha, HELD_OUT) + new < high
        exponents += law.alphas[0] < 1.01 * alpha and law.alphas[1] > 0.99 * alpha
    assert inside / sweeps == pytest.approx(0.9, abs=0.03)
    assert exponents / sweeps == pytest.approx(0.9, abs=0.03)


def test_more_noise_widens_the_interval_and_so_does_distance():
    noise = np.random.default_rng(0).standard_normal(8)
    widths = []
    for size in (0.001, 0.01):
        law = fit_power_law(BUDGETS, power_law(0.7, 0.2, BUDGETS) + size * noise)
        low, high = law.interval(np.array([BUDGETS[4], HELD_OUT, 4 * HELD_OUT]))
        widths.append(high - low)
        assert np.all(np.diff(high - low) > 0)
    assert np.all(widths[1] > 5 * widths[0])


def test_too_few_budgets():
    with pytest.raises(ValueError, match=r"4 different budgets; .*at least 5"):
        fit_power_law(np.array([1e9, 1e9, 2e9, 3e9, 4e9]), np.array([3.0, 3.0, 2.5, 2.2, 2.0]))


def test_least_squares_finds_the_bottom_of_a_valley():
    def rosenbrock(p):
        return np.array([10 * (p[1] - p[0] ** 2), 1 - p[0]])

    assert scaling_laws.least_squares(rosenbrock, np.array([-1.2, 1.0])) == pytest.approx([1, 1])


def test_only_the_broken_law_finds_a_break():
    flops = np.geomspace(1e12, 1e18, 25)
    truth = 0.5 + 40 * flops**-0.1 * (1 + (flops / 1e15) ** 2) ** (-0.15 * 0.5)
    broken = fit_broken_law(flops, truth, 2e-3)
    assert np.abs(broken(flops) / truth - 1).max() < 1e-3
    assert np.abs(fit_power_law(flops, truth).loss(flops) / truth - 1).max() > 0.02


def test_priors_decide_what_a_law_of_six_parameters_predicts():
    """Of the same eight points three priors make three predictions, far wider than the noise."""
    noise = 0.003 * np.random.default_rng(2).standard_normal(8)
    losses = power_law(0.7, 0.2, BUDGETS) + noise
    found = [fit_broken_law(BUDGETS, losses, prior)(HELD_OUT) for prior in scaling_laws.PRIORS]
    assert np.ptp(found) > 3 * 0.003


# ---- fits of run directories --------------------------------------------------------------------

STEPS = (10, 20, 40, 80, 160, 640)


def make_run(folder, i, seed=0, change=0.0):
    """A run directory as train.py writes it, of a GPT whose loss follows a law."""
    folder.mkdir()
    config = GPTConfig(n_layer=1 + i, d_model=64)
    preset = registry.get_preset("gpt").run
    run = replace(
        preset,
        model=config,
        train=replace(preset.train, steps=STEPS[i], batch_size=4, seed=seed),
    )
    record = run_dir.to_record("gpt", run, "same")
    (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
    flops = 4 * STEPS[i] * GPT(config).flops_per_row()
    rows = [
        {"step": 0, "val_loss": 8.0},
        {"step": STEPS[i], "loss": 1.0},
        {"step": STEPS[i], "val_loss": law(flops) + change},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return folder


def law(flops):
    return 2 + 3 * (flops / 1e12) ** -0.2


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path / f"sweep-{i}", i) for i in range(len(STEPS))]


def ask(*words):
    return calc.answer(["fit", *map(str, words)])


def test_a_sweep_is_read_fitted_and_drawn(runs):
    found = sweep.read_point(runs[2], calc.read_run_directory(str(runs[2])))
    config = GPTConfig(n_layer=3, d_model=64)
    assert found.flops == 40 * 4 * GPT(config).flops_per_row()
    assert found.parameters == count_parameters(GPT(config))
    assert found.non_embedding == found.parameters - 2 * 4096 * 64
    assert found.units == 40 * 4 * 256
    assert found.loss == law(found.flops)
    text = ask(*runs[:5], "--held-out", runs[5])
    assert "power law: L = " in text
    (line,) = [line for line in text.splitlines() if "measured" in line]
    assert abs(float(re.search(r", (\S+)% off", line)[1])) < 0.1
    picture = matplotlib.image.imread(runs[0].parent / "scaling.png")
    assert picture.std() > 0.05


def test_runs_that_differ_in_their_seed_are_one_point(tmp_path):
    """The law goes through their mean, and the text says how far they differ."""
    folders = []
    for i in range(len(STEPS)):
        for seed, change in enumerate((-0.02, 0.0, 0.02)):
            folders.append(make_run(tmp_path / f"sweep-{i}-seed-{seed}", i, seed, change))
    text = ask(*folders[:-3], "--held-out", *folders[-3:])
    rows = [line for line in text.splitlines() if line.startswith("sweep-")]
    assert [row.split()[0] for row in rows] == [f"sweep-{i}" for i in range(len(STEPS))]
    assert all(float(row.split()[7]) == 0.02 for row in rows)
    assert rows[-1].endswith("held out")
    assert f"3 seeds explain {0.02 / math.sqrt(3):.2g}" in text
    assert "the mean of 3 seeds" in text
    with pytest.raises(ValueError, match=r"number of seeds \(sweep-0 has 2, "):
        ask(*folders[1:-3])
    shutil.copytree(folders[0], tmp_path / "again")
    with pytest.raises(ValueError, match=r"sweep-0-seed-0 and again .*the same seed 0"):
        ask(*folders, tmp_path / "again")


def test_the_text_says_whether_the_prediction_holds(runs):
    text = ask(*runs[:5], "--held-out", runs[5])
    low, high = map(float, re.search(r"\[(\S+) to (\S+)\]; measured", text).groups())
    assert low <= high
    lines = (runs[5] / "metrics.jsonl").read_text(encoding="utf-8")
    worse = high + 0.1
    lines += json.dumps({"step": STEPS[5], "val_loss": worse}) + "\n"
    (runs[5] / "metrics.jsonl").write_text(lines, encoding="utf-8")
    text = ask(*runs[:5], "--held-out", runs[5])
    assert re.search(rf"measured {worse:.4f}, .* OUTSIDE the interval", text)


def test_the_influence_of_the_prior_is_shown(runs):
    text = ask(*runs[:5], "--held-out", runs[5])
    (line,) = [line for line in text.splitlines() if "BNSL" in line]
    assert "0.02, 0.002, 0.0002" in line
    assert len(set(line.split(": ")[1].split(", "))) > 1


def test_the_held_out_run_may_be_among_the_runs(runs):
    """A glob of a sweep often matches it too."""
    text = ask(*runs, "--held-out", runs[5])
    assert text == ask(*runs[:5], "--held-out", runs[5])
    assert text.count("held out") == 1


def test_without_a_held_out_run_it_predicts_larger_ones(runs, tmp_path):
    text = ask(*runs, "--plot", tmp_path / "here.png")
    assert "4 x the largest" in text and "10 x the largest" in text
    assert "a run of one seed" in text
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
    for value in ("[]", '"a"', "true", "1e999", "null", '{"a": 1}'):
        damaged = lines[-1].replace(lines[-1].split('"val_loss": ')[1], value + "}")
        (tmp_path / "cut" / "metrics.jsonl").write_text(f"{damaged}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"cut is at step 0 of 80|cut.*loss"):
            ask(*runs, tmp_path / "cut")
    edit_json(runs[0] / "config.json", data_fingerprint="other")
    with pytest.raises(ValueError, match="2 different data"):
        ask(*runs)
    for value in (["a"], {"a": 1}, None, True, 1.5, 10**30):
        edit_json(runs[0] / "config.json", data_fingerprint=value)
        with pytest.raises(ValueError, match=r"sweep-0.config\.json"):
            ask(*runs)
    edit_json(runs[0] / "config.json", data_fingerprint="same", family="none")
    with pytest.raises(ValueError, match=r"family 'none'.*gpt"):
        ask(*runs)
    edit_json(runs[0] / "config.json", family="gpt", train={"stepz": 3})
    with pytest.raises(ValueError, match=r"of this version.*stepz"):
        ask(*runs)
    with pytest.raises(ValueError, match="required"):
        ask()


# ---- training a sweep ---------------------------------------------------------------------------

# Stands in for train.py: it notes how it was called, and makes a run directory at once.
FAKE = """
import json, os, pathlib, signal, sys, time
name, _, seed, *options = sys.argv[1:]
out = pathlib.Path(options[options.index("--out") + 1])
made = json.loads(pathlib.Path("made.json").read_text())[name]
with open("calls.txt", "a") as file:
    file.write(f"{name} {seed} {' '.join(options)} {os.environ['OMP_NUM_THREADS']}\\n")
out.mkdir(exist_ok=True, parents=True)
made["config"]["train"]["seed"] = int(seed)
(out / "config.json").write_text(json.dumps(made["config"]))
if "--wait" in options:
    signal.signal(signal.SIGTERM, lambda *_: (out / "stopped").touch() or sys.exit(143))
    time.sleep(60)
if "--fail" in options:
    sys.exit("error: no such option --fail")
loss = made["loss"] + 0.01 * int(seed)
lines = [{"step": made["config"]["train"]["steps"], "val_loss": loss}]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(out / "step-000001").mkdir(exist_ok=True)
(out / "step-000001" / "manifest.json").touch()
print("verdict")
"""


@pytest.fixture
def fake_train(tmp_path, monkeypatch):
    """Make train.py quick, with losses that follow a law of the presets' FLOPs."""
    made = {}
    for name, preset in registry.all_presets().items():
        if name.startswith("sweep-"):
            run = preset.run
            flops = run.train.steps * run.train.batch_size * run.build_model().flops_per_row()
            made[name] = {"config": run_dir.to_record(name, run, "same"), "loss": law(flops)}
    (tmp_path / "made.json").write_text(json.dumps(made), encoding="utf-8")
    script = tmp_path / "train.py"
    script.write_text(FAKE, encoding="utf-8")
    monkeypatch.setattr(sweep, "TRAIN", script)
    monkeypatch.chdir(tmp_path)
    return lambda: (tmp_path / "calls.txt").read_text(encoding="utf-8").splitlines()


def test_a_sweep_is_trained_fitted_and_continued(fake_train, capsys):
    """Each size with each seed, one thread a run; a second time, all of them are resumed."""
    words = ["sweep", "--seeds", "2", "--out", "runs", "--", "--data.path", "my.txt"]
    text = calc.answer(words)
    calls = fake_train()
    assert len(calls) == 18
    assert "sweep-large 0 --data.path my.txt --out runs/sweep-large-seed-0 1" in calls
    assert calls[0].startswith("sweep-large") and calls[-1].startswith("sweep-1")
    rows = [line for line in text.splitlines() if line.startswith("sweep-")]
    assert [row.split()[0] for row in rows] == [f"sweep-{i}" for i in (*range(1, 9), "large")]
    assert rows[-1].endswith("held out")
    assert "inside the interval" in text and "the mean of 2 seeds" in text
    assert Path("runs/scaling.png").exists()
    folders = [*map(str, Path("runs").glob("sweep-[1-8]-*"))]
    held_out = map(str, Path("runs").glob("sweep-large-*"))
    assert ask(*folders, "--held-out", *held_out) == text
    assert "[18 of 18, " in capsys.readouterr().out
    assert calc.answer(words) == text
    assert all("--resume" in call for call in fake_train()[18:])


def test_a_run_that_had_saved_nothing_starts_from_the_beginning(fake_train):
    folder = Path("runs", "one")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "left over").touch()
    sweep.train_all([sweep.Job(folder, ("sweep-1", "--train.seed", "0"))], 1)
    assert "--resume" not in fake_train()[0]
    assert not (folder / "left over").exists()


def test_a_run_that_fails_stops_the_others(fake_train):
    seed = ("sweep-1", "--train.seed", "0")
    long = sweep.Job(Path("long"), (*seed, "--wait"))
    wrong = sweep.Job(Path("wrong"), (*seed, "--fail"))
    with pytest.raises(ValueError, match=r"wrong failed: error: no such option --fail; see logs"):
        sweep.train_all([long, wrong], 2)
    assert Path("long", "stopped").exists()
    wrong.log.write_text("╭─ Error ─╮\n│ Unrecognized: x │\n╰─────────╯\n", encoding="utf-8")
    assert wrong.last_words() == "Error Unrecognized: x"


def test_the_presets_of_the_sweep():
    """20 tokens a parameter without tables, which are small; four times the FLOPs held out."""
    names = [name for name in registry.all_presets() if name.startswith("sweep-")]
    flops = []
    for name in names:
        run = registry.get_preset(name).run
        model = run.build_model()
        tables = estimate.table_parameters(model)
        tokens = run.train.steps * run.train.batch_size * run.model.context_length
        assert tokens / (count_parameters(model) - tables) == pytest.approx(20, rel=0.04)
        assert tables / count_parameters(model) < 0.5
        flops.append(tokens * model.flops_per_row() / run.model.context_length)
    assert names[-1] == calc.HELD_OUT and len(names) == 9
    assert flops == sorted(flops)
    assert flops[-1] / flops[-2] == pytest.approx(4, rel=0.03)
