"""Diffusion: samplers against diffusers and against a mixture in closed form, the loss, folders."""

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise

import diffusers
import pytest
import torch
from conftest import assert_equal_weights, edit_json, generators, normal
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyfm import ddpm
from tinyfm.ddpm import SAMPLERS, Diffusion, DiffusionConfig
from tinyfm.hub import scheduler
from tinyfm.unet import UNet

diffusers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers'
TINY = DiffusionConfig(
    image_size=8, channels=(8, 16), attend=(False, True), n_block=1, groups=4, n_head=2
)
BETAS = {  # our name of a schedule -> the fields of a scheduler of diffusers
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
# Our name of a prediction -> that of diffusers.
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def config_of(schedule, **fields):
    """TINY with a schedule of BETAS, and without clipping unless the fields say so."""
    ends = {key: value for key, value in BETAS[schedule].items() if key != "beta_schedule"}
    return replace(TINY, schedule=schedule, **{"clip": False, **ends, **fields})


def trained(config, seed=0):
    """A model with random weights: an untrained one would predict zero."""
    torch.manual_seed(seed)
    model = Diffusion(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


# ---- schedules and predictions -------------------------------------------------------------------


@pytest.mark.parametrize("name", BETAS)
def test_schedules_equal_diffusers(name):
    ours = ddpm.alpha_bars(config_of(name))
    assert ours.dtype == torch.float64
    theirs = DDPMScheduler(**BETAS[name]).alphas_cumprod
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-7)
    assert (ours.diff() < 0).all()
    assert ours[0] > 0.99
    assert 0 < ours[-1] < 0.01


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
@settings(deadline=None, max_examples=30)
@given(share=st.floats(0.001, 0.999), seed=st.integers(0, 2**32))
def test_x0_and_eps_follow_from_x_t_and_a_prediction(prediction, share, seed):
    config = replace(TINY, prediction=prediction)
    _, alpha, sigma = ddpm.level(config, torch.tensor([share], dtype=torch.float64))
    x0, eps = normal(2, 3, 4, 4, seed=seed).double().unbind()
    x_t = ddpm.q_sample(x0, eps, alpha, sigma)
    y = ddpm.target(prediction, x0, eps, alpha, sigma)
    found_x0, found_eps = ddpm.separate(prediction, y, x_t, alpha, sigma)
    rounding = 1e-14 / min(alpha, sigma).item()
    torch.testing.assert_close(found_x0, x0, atol=rounding, rtol=0)
    torch.testing.assert_close(found_eps, eps, atol=rounding, rtol=0)


def test_q_sample_keeps_the_variance():
    config = config_of("linear")
    x0, eps = normal(2, 100_000).double()
    for alpha_bar in ddpm.alpha_bars(config)[::250]:
        x_t = ddpm.q_sample(x0, eps, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
        assert abs(x_t.var() - 1) < 0.02


def test_min_snr_weights_errors_of_x0():
    """For each prediction y, the weighted error of y is min(SNR, 5) times the error of x_0."""
    alpha_bar = ddpm.alpha_bars(TINY)[::50]
    alpha = alpha_bar.sqrt()
    sigma = (1 - alpha_bar).sqrt()
    snr = alpha_bar / (1 - alpha_bar)
    assert (snr > 5).any() and (snr < 5).any()
    x0, eps, y = normal(3, len(alpha)).double()
    x_t = ddpm.q_sample(x0, eps, alpha, sigma)
    for prediction in PREDICTIONS:
        error = (y - ddpm.target(prediction, x0, eps, alpha, sigma)).square()
        found_x0, _ = ddpm.separate(prediction, y, x_t, alpha, sigma)
        weighted = ddpm.min_snr_weight(prediction, snr, 5.0) * error
        expected = snr.clamp(max=5) * (found_x0 - x0).square()
        torch.testing.assert_close(weighted, expected, rtol=1e-6, atol=1e-9)


def test_the_bound_is_a_sum_of_squared_errors():
    """The KL of a step of ddpm, from its mean and variance, is 1/2 (SNR_s - SNR_t) |x_0 - X|^2."""
    path = Diffusion(config_of("linear")).path(20, "ddpm")
    x, x0, estimate = normal(3, 1, 1, 4, 4).double()
    for step in list(pairwise(path))[:-1]:

        def draw(x0, noise, step=step):
            return next(SAMPLERS["ddpm"](lambda *inputs: (x0, None), x, step, lambda: noise))

        mean_q = draw(x0, 0.0)
        mean_p = draw(estimate, 0.0)
        deviation = draw(x0, 1.0) - mean_q
        kl = ((mean_q - mean_p).square() / (2 * deviation.square())).sum()
        snr, snr_s = [(alpha / sigma) ** 2 for _, alpha, sigma in step]
        torch.testing.assert_close(kl, (snr_s - snr) / 2 * (x0 - estimate).square().sum())


def test_the_mean_noise_is_minus_sigma_times_the_score():
    for alpha, sigma in ((0.9, 0.44), (0.3, 0.95)):
        x = normal(20, 2, 1, 1, seed=8).requires_grad_()
        variance = alpha**2 * SPREAD**2 + sigma**2
        distance = (x.flatten(1)[:, None] - alpha * MEANS).square().sum(-1)
        log_density = (torch.tensor(SHARES).log() - distance / (2 * variance)).logsumexp(-1)
        (score,) = torch.autograd.grad(log_density.sum(), x)
        _, eps = denoise_mixture(x.detach(), None, alpha, sigma)
        torch.testing.assert_close(eps, -sigma * score, atol=1e-5, rtol=1e-4)


# ---- the samplers against diffusers --------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 20, 300])
def test_timesteps_equal_diffusers(spacing, steps):
    theirs = DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    if (steps, spacing) == (1, "linspace"):  # diffusers would call pure noise an almost clean image
        assert theirs.timesteps.tolist() == [0]
        assert ddpm.timesteps(1000, steps, spacing) == [999]
    else:
        assert ddpm.timesteps(1000, steps, spacing) == theirs.timesteps.tolist()
    theirs = DPMSolverMultistepScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    ours = Diffusion(replace(TINY, spacing=spacing)).path(steps, "dpm++")
    assert [t for t, _, _ in ours[:-1]] == theirs.timesteps.tolist()


def scripted(config, predictions):
    """A denoiser that makes the given predictions, and the list of the times of its calls."""
    times = []
    script = iter(predictions)

    def denoise(x, t, alpha, sigma):
        times.append(t)
        x0, eps = ddpm.separate(config.prediction, next(script), x, alpha, sigma)
        if config.clip:
            x0 = x0.clamp(-1, 1)
        return x0, eps

    return denoise, times


def assert_same_steps(config, sampler, theirs, steps, options=None, step_options=None):
    """Each step, from the same state, prediction and noise, gives the same state."""
    theirs.set_timesteps(steps)
    predictions = normal(steps, 2, 3, 4, 4, seed=1)
    x = normal(2, 3, 4, 4, seed=2)
    noises = normal(steps, 2, 3, 4, 4, seed=3)
    denoise, times = scripted(config, predictions)
    draw = iter(noises)
    path = Diffusion(config).path(steps, sampler)
    states = SAMPLERS[sampler](denoise, x, path, lambda: next(draw), **(options or {}))
    count = 0
    for t, prediction, noise, ours in zip(theirs.timesteps, predictions, noises, states):
        extra = step_options(noise) if step_options else {}
        expected = theirs.step(prediction, t, x, **extra).prev_sample
        torch.testing.assert_close(ours, expected, atol=3e-5, rtol=3e-5)
        x = ours
        count += 1
    assert count == steps
    assert times == theirs.timesteps.tolist()


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_steps(name, prediction, eta):
    # The cosine schedule ends with so little signal that the x_0 of an eps overflows.
    clip = name == "cosine"
    config = config_of(name, prediction=prediction, clip=clip)
    theirs = DDIMScheduler(
        **BETAS[name],
        prediction_type=PREDICTIONS[prediction],
        clip_sample=clip,
        timestep_spacing="trailing",
    )

    def step_options(noise):
        return {"eta": eta, "variance_noise": noise}

    assert_same_steps(config, "ddim", theirs, 20, {"eta": eta}, step_options)


def test_ddim_steps_of_stable_diffusion():
    config = config_of(
        "scaled_linear", prediction="eps", spacing="leading", offset=1, end_clean=False
    )
    theirs = DDIMScheduler(
        **BETAS["scaled_linear"], clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    assert_same_steps(config, "ddim", theirs, 50)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("steps", [10, 1000])
def test_ddpm_steps(prediction, variance, steps, monkeypatch):
    config = config_of("linear", prediction=prediction, variance=variance, spacing="leading")
    theirs = DDPMScheduler(
        prediction_type=PREDICTIONS[prediction],
        clip_sample=False,
        variance_type=f"fixed_{variance}",
    )
    # The float32 tables of diffusers are too coarse for small betas: 1 - 0.9999 has three digits.
    theirs.alphas_cumprod = ddpm.alpha_bars(config)
    noises = iter(normal(steps, 2, 3, 4, 4, seed=3))
    scheduling = diffusers.schedulers.scheduling_ddpm
    monkeypatch.setattr(scheduling, "randn_tensor", lambda *args, **options: next(noises))
    assert_same_steps(config, "ddpm", theirs, steps, {"variance": variance})


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "steps, spacing", [(1, "trailing"), (20, "trailing"), (20, "linspace"), (9, "leading")]
)
def test_dpm_solver_steps(prediction, steps, spacing):
    config = config_of("scaled_linear", prediction=prediction, spacing=spacing)
    theirs = DPMSolverMultistepScheduler(
        **BETAS["scaled_linear"], prediction_type=PREDICTIONS[prediction], timestep_spacing=spacing
    )
    assert_same_steps(config, "dpm++", theirs, steps)


def test_euler_steps_of_a_flow():
    steps = 10
    config = replace(TINY, prediction="flow", clip=False)
    path = Diffusion(config).path(steps, "euler")
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=[sigma for _, _, sigma in path[:-1]])
    velocities = normal(steps, 2, 1, 4, 4, seed=1)
    x = normal(2, 1, 4, 4, seed=2)
    denoise, times = scripted(config, velocities)
    states = SAMPLERS["euler"](denoise, x, path, None)
    for t, velocity, ours in zip(theirs.timesteps, velocities, states):
        x = theirs.step(velocity, t, x).prev_sample
        torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)
    assert times == pytest.approx(theirs.timesteps.tolist())


def test_the_last_step_of_ddpm_adds_no_noise():
    calls = []
    x0 = normal(2, 1, 4, 4, seed=9)

    def noise():
        calls.append("noise")
        return normal(2, 1, 4, 4)

    def denoise(x, t, alpha, sigma):
        return x0, x

    for variance in ("small", "large"):
        calls.clear()
        path = Diffusion(TINY).path(5, "ddpm")
        states = list(SAMPLERS["ddpm"](denoise, x0, path, noise, variance=variance))
        assert len(calls) == 4
        torch.testing.assert_close(states[-1], x0)


# ---- the samplers against a distribution known in closed form ------------------------------------

MEANS = torch.tensor([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.0]])
SPREAD = 0.3
SHARES = (0.2, 0.3, 0.5)


def denoise_mixture(x, t, alpha, sigma):
    """E[x_0 | x_t] for three Gaussians in the plane, and the eps of that x_0.

    A point of the plane is an image (2, 1, 1).
    """
    points = x.flatten(1)[:, None].double()  # (B, 1, 2)
    variance = alpha**2 * SPREAD**2 + sigma**2
    distance = (points - alpha * MEANS).square().sum(-1)  # (B, 3)
    weight = (torch.tensor(SHARES).log() - distance / (2 * variance)).softmax(-1)
    posterior = MEANS + alpha * SPREAD**2 / variance * (points - alpha * MEANS)
    x0 = (weight[..., None] * posterior).sum(1).reshape(x.shape)
    return x0.float(), ((x - alpha * x0) / sigma).float()


@pytest.mark.parametrize(
    "sampler, prediction, steps, options",
    [
        ("ddpm", "v", 250, {}),
        ("ddim", "v", 100, {}),
        ("ddim", "v", 250, {"eta": 1.0}),
        ("dpm++", "v", 20, {}),
        ("euler", "flow", 100, {}),
        ("heun", "flow", 20, {}),
        ("dpm++", "flow", 20, {}),
        ("ddpm", "flow", 250, {}),
    ],
)
def test_samplers_recover_a_mixture(sampler, prediction, steps, options):
    model = Diffusion(replace(TINY, prediction=prediction, schedule="cosine"))
    n = 4000
    noise = iter(normal(steps + 1, n, 2, 1, 1, seed=5))
    start = next(noise)
    path = model.path(steps, sampler)
    *_, x = SAMPLERS[sampler](denoise_mixture, start, path, lambda: next(noise), **options)
    points = x.flatten(1)
    nearest = torch.cdist(points, MEANS).argmin(1)
    for k, share in enumerate(SHARES):
        cloud = points[nearest == k]
        assert abs(len(cloud) / n - share) < 0.03
        torch.testing.assert_close(cloud.mean(0), MEANS[k], atol=0.04, rtol=0)
        torch.testing.assert_close(cloud.std(0), torch.full((2,), SPREAD), atol=0.03, rtol=0)


def test_higher_orders_need_fewer_steps():
    """The reference is the result of many small steps from the same noise."""
    x = normal(500, 2, 1, 1, seed=6)

    def run(sampler, prediction, steps):
        path = Diffusion(replace(TINY, prediction=prediction)).path(steps, sampler)
        *_, end = SAMPLERS[sampler](denoise_mixture, x, path, None)
        return end

    for low, high, prediction in (("ddim", "dpm++", "v"), ("euler", "heun", "flow")):
        exact = run(high, prediction, 500)
        error = {s: (run(s, prediction, 20) - exact).abs().mean() for s in (low, high)}
        assert error[high] < error[low] / 2


def test_euler_is_ddim_on_the_straight_path():
    path = Diffusion(replace(TINY, prediction="flow")).path(10, "euler")
    x = normal(50, 2, 1, 1)
    states = SAMPLERS["ddim"](denoise_mixture, x, path, None)
    for (level, next_level), ours in zip(pairwise(path), states):
        t, alpha, sigma = level
        x0, eps = denoise_mixture(x, t, alpha, sigma)
        x = x + (next_level[2] - sigma) * (eps - x0)
        torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


# ---- loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_loss_by_hand(prediction):
    """A plain loop over the rows makes the same draws."""
    config = replace(TINY, prediction=prediction)
    model = trained(config)
    images = normal(3, 1, 8, 8).clamp(-1, 1)
    loss, metrics = model.loss({"images": images}, generators(3))
    rows = []
    shares = []
    for x0, g in zip(images, generators(3)):
        share = torch.rand((), generator=g, dtype=torch.float64).item()
        eps = torch.randn(x0.shape, generator=g)
        if prediction == "flow":
            t = 1000 * share
            alpha = 1 - share
            sigma = share
        else:
            t = int(1000 * share)
            alpha_bar = ddpm.alpha_bars(config)[t].item()
            alpha = math.sqrt(alpha_bar)
            sigma = math.sqrt(1 - alpha_bar)
        y = model.unet((alpha * x0 + sigma * eps)[None], torch.tensor([t]))[0]
        targets = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}
        rows.append((y - targets[prediction]).square().mean().item())
        shares.append(share)
    assert loss.item() == pytest.approx(sum(rows) / 3, rel=1e-4)
    assert metrics.keys() == {"loss_t0", "loss_t1", "loss_t2", "loss_t3"}
    for k in range(4):
        part = sum(row for row, share in zip(rows, shares) if int(4 * share) == k) * 4 / 3
        assert metrics[f"loss_t{k}"].item() == pytest.approx(part, rel=1e-4)
    assert sum(metrics.values()).item() / 4 == pytest.approx(loss.item(), rel=1e-5)


def test_loss_does_not_depend_on_the_micro_batch():
    config = replace(TINY, d_context=6, context_dropout=0.5, min_snr=5.0)
    model = trained(config)
    images = normal(6, 1, 8, 8)
    context = normal(6, 3, 6, seed=1)
    whole, _ = model.loss({"images": images, "context": context}, generators(6))
    parts = []
    for i in (0, 2, 4):
        rows = slice(i, i + 2)
        batch = {"images": images[rows], "context": context[rows]}
        parts.append(model.loss(batch, generators(6)[rows])[0])
    assert whole.item() == pytest.approx(sum(parts).item() / 3, rel=1e-5)


def test_contexts_are_left_out_by_row():
    config = replace(TINY, d_context=6, context_dropout=0.3)
    model = trained(config)
    n = 200
    contexts = []  # that the U-Net receives

    def forward(x, t, context):
        contexts.append(context)
        return x

    model.unet.forward = forward
    context = normal(n, 3, 6, seed=1)
    batch = {"images": normal(n, 1, 8, 8), "context": context}
    model.loss(batch, generators(n))
    null = model.null_context.expand(3, 6)
    dropped = [torch.equal(row, null) for row in contexts[0]]
    assert 0.2 < sum(dropped) / n < 0.4
    for received, original, is_null in zip(contexts[0], context, dropped):
        assert is_null or torch.equal(received, original)

    # A batch may bring its own empty context.
    model.loss(batch | {"null_context": torch.full((1, 3, 6), 7.0)}, generators(n))
    assert [bool((row == 7).all()) for row in contexts[1]] == dropped


@pytest.mark.parametrize("fields", [{}, {"d_context": 6}, {"d_context": 6, "learned_null": False}])
def test_an_example_batch_fits_the_loss(fields):
    model = Diffusion(replace(TINY, **fields))
    loss, _ = model.loss(model.example_batch(2), generators(2))
    assert loss.isfinite()


def test_the_empty_context_is_learned():
    model = trained(replace(TINY, d_context=6, context_dropout=1.0))
    batch = {"images": normal(2, 1, 8, 8), "context": normal(2, 3, 6)}
    loss, _ = model.loss(batch, generators(2))
    loss.backward()
    assert model.null_context.grad.abs().sum() > 0


def test_it_overfits_one_picture():
    torch.manual_seed(0)
    model = Diffusion(TINY)
    picture = normal(1, 1, 8, 8, seed=3).clamp(-1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    losses = []
    for step in range(120):
        batch = {"images": picture.expand(8, -1, -1, -1)}
        loss, _ = model.loss(batch, generators(8, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.4 * sum(losses[:3]) / 3
    drawn = model.sample(2, steps=10, sampler="dpm++", generators=generators(2))
    assert (drawn - picture).abs().mean() < 0.35 < picture.abs().mean()


# ---- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler, prediction", [("ddpm", "v"), ("ddim", "eps"), ("dpm++", "x0"), ("heun", "flow")]
)
def test_a_sample_does_not_depend_on_its_batch(sampler, prediction):
    model = trained(replace(TINY, prediction=prediction))
    together = model.sample(3, 4, sampler, generators=generators(3))
    alone = [model.sample(1, 4, sampler, generators=[g]) for g in generators(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=0.1)
    assert together.abs().max() <= 1  # the last x_0 is clipped, and no noise is added


def test_film_and_images_of_another_size():
    model = trained(TINY)
    noise = normal(2, 1, 4, 12)
    film = model.sample(noise, 5, "ddim", film=True)
    assert film.shape == (6, 2, 1, 4, 12)
    assert torch.equal(film[0], noise)
    assert torch.equal(film[-1], model.sample(noise, 5, "ddim"))
    torch.manual_seed(3)
    first = model.sample(1, 2)
    assert not torch.equal(first, model.sample(1, 2))
    torch.manual_seed(3)
    assert torch.equal(first, model.sample(1, 2))


def test_sampling_restores_the_training_mode():
    model = trained(replace(TINY, dropout=0.5)).train()
    first = model.sample(normal(1, 1, 8, 8), 2)
    assert model.training and model.unet.training
    assert torch.equal(first, model.sample(normal(1, 1, 8, 8), 2))
    assert not model.eval().sample(1, 2).requires_grad
    assert not model.training


def test_guidance():
    config = replace(TINY, d_context=6, clip=False, prediction="eps", schedule="linear")
    model = trained(config)
    x = normal(2, 1, 8, 8)
    context = normal(2, 3, 6, seed=1)
    other_null = normal(1, 3, 6, seed=2)

    def eps(guidance, context=context, null=None):
        return model.denoiser(context, guidance, null)(x, 500, 0.6, 0.8)[1]

    t = torch.tensor(500)
    plain = model.unet(x, t, context)
    empty = model.unet(x, t, model.null_context.expand(2, 3, 6))
    torch.testing.assert_close(eps(1.0), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(eps(0.0), empty, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(eps(3.0), empty + 3 * (plain - empty), atol=1e-4, rtol=1e-4)
    other = model.unet(x, t, other_null.expand(2, 3, 6))
    torch.testing.assert_close(eps(2.0, null=other_null), 2 * plain - other, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, empty, atol=1e-2)
    weak = model.sample(x, 3, "ddim", 1.0, context)
    strong = model.sample(x, 3, "ddim", 3.0, context)
    assert not torch.allclose(weak, strong, atol=1e-3)


# ---- folders of diffusers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"prediction": "eps", "schedule": "linear", "variance": "large", "d_head": 8},
        {"prediction": "v", "spacing": "leading", "offset": 1, "end_clean": False, "clip": False},
        {"prediction": "flow", "d_context": 6},
        {
            "prediction": "x0",
            "schedule": "scaled_linear",
            "beta_start": 0.001,
            "d_context": 6,
            "learned_null": False,
        },
    ],
    ids=str,
)
def test_a_folder_returns_the_same_model(fields, tmp_path):
    config = replace(TINY, **fields)
    model = trained(config)
    model.save_pretrained(tmp_path)
    again = Diffusion.from_pretrained(tmp_path)
    learned = config.d_context > 0 and config.learned_null
    expected = replace(config, out_channels=1, learned_null=learned)
    assert replace(again.config, n_head=config.n_head, d_head=config.d_head) == expected
    assert_equal_weights(again, model)
    assert not again.training
    with pytest.raises(ValueError, match="holds a model already"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, overwrite=True)
    other = trained(replace(TINY, d_context=6, learned_null=False))
    other.save_pretrained(tmp_path, overwrite=True)
    assert not Diffusion.from_pretrained(tmp_path).config.learned_null


def test_a_pipeline_of_diffusers_draws_the_same(tmp_path):
    """DDPMPipeline reads our folder. We read its two parts, also when they lie in one folder."""
    model = trained(replace(TINY, prediction="eps", schedule="linear", spacing="leading"))
    model.save_pretrained(tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    pixels = pipeline(1, torch.Generator().manual_seed(4), 10, output_type="np").images
    ours = model.sample(1, 10, "ddpm", generators=[torch.Generator().manual_seed(4)])
    ours = ours[0].permute(1, 2, 0).numpy() / 2 + 0.5
    torch.testing.assert_close(ours, pixels[0], atol=1e-4, rtol=1e-4)
    flat = tmp_path / "flat"
    pipeline.unet.save_pretrained(flat)
    pipeline.scheduler.save_pretrained(flat)
    again = Diffusion.from_pretrained(flat)
    assert again.config == Diffusion.from_pretrained(tmp_path).config


def test_a_pipeline_of_diffusers_follows_a_flow(tmp_path):
    """By Euler's method, at its own noise levels."""
    model = trained(replace(TINY, prediction="flow", clip=False))
    trained(replace(TINY, prediction="eps", clip=True)).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, overwrite=True)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline, DDPMPipeline)
    pipeline.set_progress_bar_config(disable=True)
    pixels = pipeline(2, torch.Generator().manual_seed(4), 5, output_type="np").images
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    levels = pipeline.scheduler.sigmas.tolist()
    assert levels[0] == 1 and levels[-1] == 0
    with torch.no_grad():
        for now, after in pairwise(levels):
            x = x + (after - now) * model.unet(x, torch.tensor(now * TINY.diffusion_steps))
    ours = (x.permute(0, 2, 3, 1).numpy() / 2 + 0.5).clip(0, 1)
    torch.testing.assert_close(ours, pixels, atol=1e-4, rtol=1e-4)
    trained(replace(TINY, d_context=6)).save_pretrained(tmp_path, overwrite=True)
    assert not (tmp_path / "model_index.json").exists()


@pytest.mark.parametrize(
    "theirs",
    [
        DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        DDPMScheduler(variance_type="fixed_large"),
        PNDMScheduler(steps_offset=1, beta_schedule="scaled_linear", skip_prk_steps=True),
        DPMSolverMultistepScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
        FlowMatchEulerDiscreteScheduler(),
    ],
    ids=lambda s: type(s).__name__,
)
def test_schedulers_of_other_samplers(theirs, tmp_path):
    trained(TINY).save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "scheduler")
    ours = Diffusion.from_pretrained(tmp_path).config
    fields = theirs.config
    predictions = {"epsilon": "eps", "v_prediction": "v", None: "flow"}
    assert ours.prediction == predictions[fields.get("prediction_type")]
    assert ours.clip == fields.get("clip_sample", False)
    if ours.prediction != "flow":
        assert (ours.spacing, ours.offset) == (fields.timestep_spacing, fields.steps_offset)
        assert ours.end_clean == fields.get("set_alpha_to_one", True)
        large = fields.get("variance_type") == "fixed_large"
        assert ours.variance == ("large" if large else "small")
        torch.testing.assert_close(ddpm.alpha_bars(ours).float(), theirs.alphas_cumprod)


@pytest.mark.parametrize("name", scheduler.SCHEDULERS)
def test_schedulers_without_fields(name, tmp_path):
    """A field that the file lacks has the default of its class in diffusers."""
    cls = getattr(diffusers, name)
    trained(TINY).save_pretrained(tmp_path)
    cls().save_pretrained(tmp_path / "scheduler")
    expected = Diffusion.from_pretrained(tmp_path).config
    torch.testing.assert_close(ddpm.alpha_bars(expected).float(), cls().alphas_cumprod)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": cls.__name__}), encoding="utf-8")
    assert Diffusion.from_pretrained(tmp_path).config == expected


def test_settings_of_a_sampler_are_left_to_it(tmp_path):
    trained(TINY).save_pretrained(tmp_path)
    theirs = DPMSolverMultistepScheduler(use_karras_sigmas=True, beta_schedule="scaled_linear")
    theirs.save_pretrained(tmp_path / "scheduler")
    with pytest.warns(UserWarning, match="DPMSolverMultistepScheduler .*use_karras_sigmas"):
        ours = Diffusion.from_pretrained(tmp_path).config
    torch.testing.assert_close(ddpm.alpha_bars(ours).float(), theirs.alphas_cumprod)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"_class_name": "UnCLIPScheduler"}, "_class_name is 'UnCLIPScheduler'; .*DDPMScheduler"),
        ({"trained_betas": [0.1]}, r"trained_betas is \[0.1\]; supported: None"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True; supported: False"),
        ({"beta_schedule": "sigmoid"}, "schedule is 'sigmoid'; supported: linear"),
        ({"variance_type": "learned"}, "variance is 'learned'; supported: fixed_small"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps is 'many'"),
        ({"beta_start": 3.0}, "beta_start is 3.0"),
    ],
)
def test_schedulers_that_this_model_cannot_express(fields, message, tmp_path):
    trained(TINY).save_pretrained(tmp_path)
    edit_json(tmp_path / "scheduler" / "scheduler_config.json", **fields)
    with pytest.raises(ValueError, match=message):
        Diffusion.from_pretrained(tmp_path)


def test_estimates_that_explode_are_refused():
    fields = {"prediction": "eps", "schedule": "cosine", "clip": False, "spacing": "trailing"}
    with pytest.raises(ValueError, match=r"20,291 times .*prediction v, clip, or spacing leading"):
        replace(TINY, **fields)
    for change in ({"prediction": "v"}, {"clip": True}, {"spacing": "leading"}):
        replace(TINY, **fields | change)
    for schedule in ("linear", "scaled_linear"):
        replace(TINY, **fields | {"schedule": schedule})


def test_a_clipped_estimate_leaves_the_noise_as_predicted():
    """As in diffusers: clipping x_0 does not change eps, so the two no longer add up to x."""
    x = 3 * normal(2, 1, 8, 8)
    found = {}
    for clip in (False, True):
        model = trained(replace(TINY, clip=clip))
        found[clip] = model.denoiser()(x, 500, 0.6, 0.8)
    assert found[False][0].abs().max() > 1
    torch.testing.assert_close(found[True][0], found[False][0].clamp(-1, 1))
    assert torch.equal(found[True][1], found[False][1])


def test_a_config_is_equal_after_json():
    config = replace(TINY, prediction="flow", d_context=6)
    assert DiffusionConfig(**json.loads(json.dumps(asdict(config)))) == config


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prediction": "noise"}, "prediction is 'noise'; use one of"),
        ({"schedule": "square"}, "schedule is 'square'; use one of"),
        ({"diffusion_steps": 0}, "diffusion_steps is 0; use 1 or more"),
        ({"beta_start": 0.5}, "beta_start is 0.5; use 0 to 0.02"),
        ({"beta_end": 1.5}, "beta_end is 1.5"),
        ({"context_dropout": 1.1}, "context_dropout is 1.1; use 0 to 1"),
        ({"offset": -1}, "offset is -1; use 0 or more"),
        ({"min_snr": 5.0, "prediction": "flow"}, "min_snr is 5.0; .*use 0"),
        ({"out_channels": 2}, "out_channels is 2; .*in_channels"),
        ({"image_size": 7}, "7 x 7 .*halved 1 times; .*8 x 8"),
    ],
)
def test_refused_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **fields)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 1001}, "1001 steps .*; use 1 to 1000"),
        ({"steps": 0}, "0 steps .*; use 1 to 1000"),
        ({"sampler": "dpm"}, r"'dpm'; use one of ddpm, ddim, dpm\+\+"),
        ({"sampler": "heun"}, "heun .*flow; .*predicts v"),
        ({"guidance": -1.0}, "guidance is -1.0; .*0 or above"),
        ({"guidance": 2.0}, "guidance is 2.0.*no context.*use 1"),
        ({"start": 0}, "0 samples"),
        ({"start": -1}, "-1 samples"),
        ({"generators": generators(3)}, "2 samples with 3 generators"),
        ({"context": torch.zeros(1, 2, 6)}, "2 samples with 2 generators and 1 contexts"),
        ({"context": torch.zeros(2, 2, 6)}, "this model takes none"),
        ({"start": torch.zeros(2, 3, 8, 8)}, "3 channels .*takes 1 channel"),
        ({"start": torch.zeros(2, 1, 8, 9)}, "8 x 9 .*halved 1 times"),
    ],
)
def test_samples_that_cannot_be_drawn(arguments, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(TINY).sample(**{"start": 2, "steps": 3, **arguments})


def test_a_flow_refuses_too_many_steps():
    with pytest.raises(ValueError, match="1001 steps"):
        Diffusion(replace(TINY, prediction="flow")).path(1001, "euler")


def test_a_missing_context_is_refused():
    model = Diffusion(replace(TINY, d_context=6, learned_null=False))
    images = normal(2, 1, 8, 8)
    context = normal(2, 3, 6)
    with pytest.raises(ValueError, match="needs a context"):
        model.loss({"images": images}, generators(2))
    with pytest.raises(ValueError, match="needs a context"):
        model.sample(2, 3)
    with pytest.raises(ValueError, match="learned no null_context"):
        model.sample(2, 3, guidance=2.0, context=context)
    with pytest.raises(ValueError, match="learned no null_context"):
        model.loss({"images": images, "context": context}, generators(2))
    with pytest.raises(ValueError, match="3 channels"):
        model.loss({"images": normal(2, 3, 8, 8), "context": context}, generators(2))


def test_the_unet_folder_alone(tmp_path):
    """UNet.from_pretrained reads the unet/ of a pipeline."""
    model = trained(replace(TINY, d_context=6))
    model.save_pretrained(tmp_path)
    unet = UNet.from_pretrained(tmp_path / "unet")
    x = normal(2, 1, 8, 8)
    t = torch.tensor(5)
    context = normal(2, 3, 6)
    assert torch.equal(unet(x, t, context), model.unet(x, t, context))
    assert not (tmp_path / "model_index.json").exists()
