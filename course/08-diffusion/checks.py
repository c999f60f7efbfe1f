"""Checks of the exercises of lesson 8.

Several use data whose best denoiser is known: numbers from N(m, s^2). There the mean of x_0 given
x_t is a line, and (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2) stays constant along the exact path
from noise to data, so that it is known where each x must arrive.
"""

import math

import pytest
import torch

from course.compare import agree
from course.lessons import checks
from tinyfm.ddpm import (
    Diffusion,
    DiffusionConfig,
    cosine_betas,
    ddim,
    ddpm,
    dpm,
    heun,
    last,
    level,
    min_snr_weight,
    q_sample,
    separate,
    target,
    timesteps,
)

PREDICTIONS = ("eps", "x0", "v", "flow")
STOPS = [(9.0, 0.6, 0.8), (4.0, 0.8, 0.6), (0.0, 1.0, 0.0)]  # (t, alpha, sigma), and the end
MEAN, DEVIATION = 0.5, 0.3  # of the data whose denoiser is known


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.double)


class Given:
    """A denoiser with given answers that notes its calls."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.calls = []

    def __call__(self, x, t, alpha, sigma):
        self.calls.append((t, alpha, sigma))
        x0, eps = self.answers[min(len(self.calls), len(self.answers)) - 1]
        return one(x0), one(eps)


class Noise:
    """Noise that is 2 each time, and is counted."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return one(2.0)


def steps_of(sampler, denoise, x: float, path, noise=None, **options) -> list[float]:
    states = list(sampler(denoise, one(x), path, noise or Noise(), **options))
    assert len(states) == len(path) - 1, (
        f"expected a state after each of {len(path) - 1} steps, got {len(states)}"
    )
    return [state.item() for state in states]


def perfect(x, t, alpha, sigma):
    """The best denoiser of N(MEAN, DEVIATION^2)."""
    gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
    x0 = MEAN + gain * (x - alpha * MEAN)
    return x0, (x - alpha * x0) / sigma


def quarter_circle(steps: int) -> list[tuple[float, float, float]]:
    angles = [0.99 * math.pi / 2 * (1 - i / steps) for i in range(steps + 1)]
    return [(angle, math.cos(angle), math.sin(angle)) for angle in angles]


def straight_line(steps: int) -> list[tuple[float, float, float]]:
    return [(t, 1 - t, t) for t in (0.99 * (1 - i / steps) for i in range(steps + 1))]


def error_of(sampler, path) -> float:
    """How far from the exact end a sampler ends, with the perfect denoiser."""
    x = one(1.5)
    _, alpha, sigma = path[0]
    exact = MEAN + DEVIATION * (x - alpha * MEAN) / math.hypot(alpha * DEVIATION, sigma)
    return (last(sampler(perfect, x, path, Noise())) - exact).abs().item()


# ---- q_sample -----------------------------------------------------------------------------------


@checks("q_sample")
def test_a_noisy_pixel_by_hand():
    agree(q_sample(one(1.0), one(-0.5), 0.6, 0.8), one(0.2), "0.6 * 1 + 0.8 * (-0.5)")


@checks("q_sample")
def test_each_row_has_its_own_level():
    alpha = torch.tensor([1.0, 0.0, 0.6]).view(3, 1, 1, 1)
    sigma = torch.tensor([0.0, 1.0, 0.8]).view(3, 1, 1, 1)
    x_t = q_sample(torch.full((3, 1, 2, 2), 2.0), torch.full((3, 1, 2, 2), 5.0), alpha, sigma)
    assert x_t.shape == (3, 1, 2, 2), f"expected the shape of the images, got {tuple(x_t.shape)}"
    agree(x_t[:, 0, 0, 0], [2.0, 5.0, 5.2], "no noise, noise alone, and a mixture")


@checks("q_sample")
def test_data_of_variance_1_keep_it():
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 100_000, generator=generator)
    agree(
        q_sample(x0, eps, 0.6, 0.8).var(), 1.0, "variance of x_t where alpha^2 + sigma^2 = 1", 0.02
    )


# ---- cosine_betas -------------------------------------------------------------------------------


@checks("cosine_betas")
def test_betas_of_four_steps():
    # diffusers 0.36, DDPMScheduler(4, beta_schedule="squaredcos_cap_v2").betas, in float32
    agree(cosine_betas(4), [0.15298784, 0.41695809, 0.70785874, 0.999], "betas of 4 steps", 1e-6)


@checks("cosine_betas")
def test_the_signal_that_is_left_follows_cos_squared():
    betas = cosine_betas(1000)
    assert betas.shape == (1000,), f"expected 1000 betas, got the shape {tuple(betas.shape)}"
    assert betas.dtype == torch.float64, f"expected float64, got {betas.dtype}"
    first = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    expected = [math.cos((p + 0.008) / 1.008 * math.pi / 2) ** 2 / first for p in (0.25, 0.5, 0.75)]
    agree((1 - betas).cumprod(0)[[249, 499, 749]], expected, "alpha_bar after 250, 500, 750 steps")


@checks("cosine_betas")
def test_no_beta_exceeds_its_limit():
    betas = cosine_betas(50)
    agree(betas.max(), 0.999, "largest beta (at 1, no signal would be left to divide by)")
    assert betas.min() > 0, f"each step adds some noise; the smallest beta is {betas.min():.3g}"


# ---- separate -----------------------------------------------------------------------------------


@checks("separate")
def test_v_by_hand():
    # x_0 = 1, eps = -0.5: x_t = 0.6 - 0.4 = 0.2, v = 0.6 (-0.5) - 0.8 = -1.1
    x0, eps = separate("v", one(-1.1), one(0.2), 0.6, 0.8)
    agree((x0.item(), eps.item()), [1.0, -0.5], "(x_0, eps) from v = -1.1 and x_t = 0.2")


@checks("separate")
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_it_undoes_q_sample_and_target(prediction, share):
    config = DiffusionConfig(prediction=prediction)
    _, alpha, sigma = level(config, torch.tensor([share], dtype=torch.double))
    alpha, sigma = alpha.view(1, 1, 1, 1), sigma.view(1, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1, 1, 2, 2, generator=generator, dtype=torch.double)
    y = target(prediction, x0, eps, alpha, sigma)
    found = separate(prediction, y, q_sample(x0, eps, alpha, sigma), alpha, sigma)
    agree(found[0], x0, f"x_0 from x_t and {prediction}")
    agree(found[1], eps, f"eps from x_t and {prediction}")


@checks("separate")
def test_the_estimates_mix_to_x_t_even_if_the_network_is_wrong():
    for prediction in PREDICTIONS:
        x0, eps = separate(prediction, one(0.3), one(-0.7), 0.6, 0.8)
        agree(0.6 * x0 + 0.8 * eps, one(-0.7), f"alpha x_0 + sigma eps, from {prediction}")


# ---- min_snr_weight -----------------------------------------------------------------------------


@checks("min_snr_weight")
@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("x0", [0.25, 4.0, 5.0]), ("eps", [1.0, 1.0, 5 / 9]), ("v", [0.2, 0.8, 0.5])],
)
def test_weights_by_hand(prediction, expected):
    snr = torch.tensor([0.25, 4.0, 9.0], dtype=torch.double)
    what = f"weights of {prediction} at SNR 1/4, 4, 9, capped at 5"
    agree(min_snr_weight(prediction, snr, 5.0), expected, what)


@checks("min_snr_weight")
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_weighted_error_of_y_is_the_capped_snr_times_the_error_of_x0(prediction):
    for angle in (0.2, 0.7, 1.4):
        alpha, sigma = math.cos(angle), math.sin(angle)
        x_t, x0 = one(0.4), one(0.9)
        wrong = x0 + 0.1  # an estimate that is off by 0.1, and the eps that goes with it
        y = target(prediction, x0, (x_t - alpha * x0) / sigma, alpha, sigma)
        y_wrong = target(prediction, wrong, (x_t - alpha * wrong) / sigma, alpha, sigma)
        snr = one((alpha / sigma) ** 2)
        weight = min_snr_weight(prediction, snr, 5.0)
        what = f"weighted error of {prediction} at SNR {snr.item():.3g}"
        agree(weight * (y_wrong - y) ** 2, snr.clamp(max=5) * 0.01, what)


# ---- ddim ---------------------------------------------------------------------------------------


@checks("ddim")
def test_two_steps_by_hand():
    denoise = Given((0.5, -1.0), (0.4, 3.0))
    noise = Noise()
    states = steps_of(ddim, denoise, 0.7, STOPS, noise)
    agree(states, [0.8 * 0.5 + 0.6 * -1.0, 0.4], "x after each step: mixed again at the next level")
    assert denoise.calls == STOPS[:2], (
        f"the network must be called at the stops {STOPS[:2]}, was called at {denoise.calls}"
    )
    assert noise.calls == 0, f"eta 0 draws nothing, but noise() was called {noise.calls} times"


@checks("ddim")
def test_eta_1_replaces_part_of_eps_by_new_noise():
    # added = 0.64 - (0.75 * 0.6)^2 = 0.4375; fresh = 0.75 sqrt(0.4375) = 0.49608
    states = steps_of(ddim, Given((0.5, -1.0)), 0.7, STOPS, eta=1.0)
    fresh = 0.75 * math.sqrt(0.4375)
    expected = 0.4 + math.sqrt(0.36 - fresh**2) * -1.0 + fresh * 2.0
    agree(states[0], expected, "x after a step with eta 1, where the new noise is 2")


@checks("ddim")
def test_the_last_step_draws_no_noise():
    noise = Noise()
    states = steps_of(ddim, Given((0.5, -1.0)), 0.7, STOPS, noise, eta=1.0)
    agree(states[-1], 0.5, "the end is the last estimate of x_0")
    assert noise.calls == 1, f"2 steps need noise once with eta 1, it was drawn {noise.calls} times"


@checks("ddim")
def test_from_pure_noise_with_eta_1_all_noise_is_new():
    path = [(9.0, 0.0, 1.0), (5.0, 0.1, 0.99498743710662), (0.0, 1.0, 0.0)]
    states = steps_of(ddim, Given((0.5, -1.0)), 0.7, path, eta=1.0)
    expected = 0.1 * 0.5 + path[1][2] * 2
    agree(states[0], expected, "from pure noise with eta 1, all noise is new", 1e-4)


@checks("ddim")
def test_twice_the_steps_halve_the_error():
    errors = [error_of(ddim, quarter_circle(steps)) for steps in (64, 128)]
    assert errors[1] < 0.02, (
        f"128 steps must end near the exact image; the error is {errors[1]:.4f}"
    )
    ratio = errors[0] / errors[1]
    assert 1.8 < ratio < 2.2, f"first order: expected about half the error, got 1 / {ratio:.2f}"


# ---- heun ---------------------------------------------------------------------------------------

LINE = [(1000.0, 0.0, 1.0), (500.0, 0.5, 0.5), (0.0, 1.0, 0.0)]


@checks("heun")
def test_heun_by_hand():
    # Velocities -1 at the start and (1.5 - 3) / 0.5 = -3 on arrival at 1.5: their mean is -2, so
    # x = 1 + 0.5 * 2 = 2. Then x_0 = 4: velocity (2 - 4) / 0.5 = -4, and x = 2 + 0.5 * 4 = 4.
    denoise = Given((2.0, 0.0), (3.0, 0.0), (4.0, 0.0))
    agree(steps_of(heun, denoise, 1.0, LINE), [2.0, 4.0], "x after each step")


@checks("heun")
def test_two_calls_a_step_and_one_in_the_last():
    denoise = Given((2.0, 0.0))
    steps_of(heun, denoise, 1.0, LINE)
    expected = [LINE[0], LINE[1], LINE[1]]
    assert denoise.calls == expected, f"expected calls at {expected}, got {denoise.calls}"


@checks("heun")
def test_twice_the_steps_quarter_the_error():
    errors = [error_of(heun, straight_line(steps)) for steps in (128, 256)]
    ratio = errors[0] / errors[1]
    assert errors[1] < 0.01, (
        f"256 steps must end near the exact image; the error is {errors[1]:.4f}"
    )
    assert 3.2 < ratio < 4.8, f"second order: expected a quarter of the error, got 1 / {ratio:.2f}"


# ---- ddpm ---------------------------------------------------------------------------------------


@checks("ddpm")
@pytest.mark.parametrize(("variance", "share"), [("small", 0.75), ("large", 1.0)])
def test_a_step_by_hand(variance, share):
    # kept = 0.6 / 0.8 = 0.75, added = 0.64 - (0.75 * 0.6)^2 = 0.4375
    states = steps_of(ddpm, Given((0.5, 0.0)), 1.0, STOPS, variance=variance)
    mean = (0.75 * 0.36 * 1.0 + 0.8 * 0.4375 * 0.5) / 0.64
    deviation = math.sqrt(0.4375) * share
    agree(states[0], mean + deviation * 2, f"x after a step with variance {variance}, noise 2")


@checks("ddpm")
def test_the_end_is_the_last_estimate_without_noise():
    for variance in ("small", "large"):
        noise = Noise()
        states = steps_of(ddpm, Given((0.5, 0.0)), 1.0, STOPS, noise, variance=variance)
        agree(states[-1], 0.5, f"the end with variance {variance}")
        assert noise.calls == 1, f"2 steps need noise once, it was drawn {noise.calls} times"


@checks("ddpm")
def test_a_step_draws_from_the_distribution_that_bayes_rule_gives():
    # q(x_s | x_t, x_0) on a grid: proportional to q(x_t | x_s) q(x_s | x_0).
    x_t, x0 = 1.0, 0.5
    (_, alpha, sigma), (_, alpha_s, sigma_s) = STOPS[:2]
    x_s = torch.linspace(-8, 8, 16_001, dtype=torch.double)
    kept = alpha / alpha_s
    added = sigma**2 - (kept * sigma_s) ** 2
    log_q = -((x_t - kept * x_s) ** 2) / (2 * added) - (x_s - alpha_s * x0) ** 2 / (2 * sigma_s**2)
    weights = torch.softmax(log_q, 0)
    mean = (weights * x_s).sum()
    deviation = (weights * (x_s - mean) ** 2).sum().sqrt()
    still = next(iter(ddpm(Given((x0, 0.0)), one(x_t), STOPS, lambda: one(0.0)))).item()
    moved = next(iter(ddpm(Given((x0, 0.0)), one(x_t), STOPS, lambda: one(1.0)))).item()
    agree(still, mean, "mean of the step", 1e-4)
    agree(moved - still, deviation, "standard deviation of the step", 1e-4)


@checks("ddpm")
def test_it_is_ddim_with_eta_1():
    x0, eps = 0.5, (1.0 - 0.6 * 0.5) / 0.8  # estimates that mix to x_t = 1
    ours = steps_of(ddpm, Given((x0, eps)), 1.0, STOPS)
    theirs = steps_of(ddim, Given((x0, eps)), 1.0, STOPS, eta=1.0)
    agree(ours, theirs, "states of ddpm and of ddim with eta 1")


# ---- what no exercise covers, but a debugging exercise breaks ------------------------------------


def test_levels_keep_the_variance():
    config = DiffusionConfig(prediction="v")
    _, alpha, sigma = level(config, torch.tensor([0.1, 0.5, 0.9], dtype=torch.double))
    agree(alpha**2 + sigma**2, torch.ones(3), "alpha^2 + sigma^2")


def test_sampling_starts_at_the_noisiest_level():
    assert timesteps(1000, 4, "trailing") == [999, 749, 499, 249], timesteps(1000, 4, "trailing")


def test_dpm_solver_is_of_second_order():
    def error(steps):
        angles = [1.4 - 1.1 * i / steps for i in range(steps + 1)]
        path = [(angle, math.cos(angle), math.sin(angle)) for angle in angles]
        x = one(1.5)
        first, end = (
            math.hypot(alpha * DEVIATION, sigma) for _, alpha, sigma in (path[0], path[-1])
        )
        exact = path[-1][1] * MEAN + end * (x - path[0][1] * MEAN) / first
        return (last(dpm(perfect, x, path, Noise())) - exact).abs().item()

    ratio = error(80) / error(160)
    assert 3 < ratio < 5, (
        f"expected a quarter of the error with twice the steps, got 1 / {ratio:.2f}"
    )


def test_sampling_turns_dropout_off():
    torch.manual_seed(0)
    config = DiffusionConfig(
        image_size=4, channels=(8,), attend=(False,), groups=2, n_head=2, n_block=1, dropout=0.5
    )
    model = Diffusion(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    first, second = (
        model.sample(1, 2, generators=[torch.Generator().manual_seed(0)]) for _ in range(2)
    )
    agree(first, second, "two samples from the same noise")
