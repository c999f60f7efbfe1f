"""Checks of the exercises of lesson 6."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course.compare import agree
from course.lessons import checks
from tinyfm.autoencoder import (
    LOGVAR_RANGE,
    Autoencoder,
    AutoencoderConfig,
    Upsample,
    count_active,
    kl_divergence,
    reparameterise,
)

# Pictures of 2 x 2 pixels, and latents of the same size: sums that can be worked out by hand.
TINY = {"image_size": 2, "channels": (4,), "groups": 4, "latent_channels": 1, "attention": False}


class Fixed(Autoencoder):
    """An autoencoder whose code and pictures are given; no network."""

    def __init__(self, mean=None, logvar=None, **fields):
        super().__init__(AutoencoderConfig(**{**TINY, **fields}))
        self.mean = mean
        self.logvar = logvar

    def encode(self, images):
        if self.mean is None:  # the picture says: a mean and ln var in each of its rows
            return images[:, :, :1], images[:, :, 1:]
        return self.mean, self.logvar

    def decode(self, z):
        return z


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(n)]


# ---- reparameterise -----------------------------------------------------------------------------


@checks("reparameterise")
def test_values_by_hand():
    mean = torch.tensor([1.0, -1.0, 0.0])
    logvar = torch.tensor([math.log(4), 0.0, math.log(0.25)])  # standard deviations 2, 1, 1/2
    z = reparameterise(mean, logvar, torch.tensor([0.5, 2.0, -1.0]))
    agree(z, [2.0, 1.0, -0.5], "mean + standard deviation times eps")


@checks("reparameterise")
def test_draws_have_the_mean_and_the_variance_asked_for():
    eps = torch.randn(200_000, generator=generators(1)[0])
    z = reparameterise(torch.full_like(eps, 3), torch.full_like(eps, math.log(0.25)), eps)
    agree(z.mean(), 3.0, "mean of 200,000 draws", 0.01)
    agree(z.var(), 0.25, "variance of 200,000 draws", 0.01)


@checks("reparameterise")
def test_the_gradient_reaches_mean_and_logvar():
    mean = torch.zeros(2, requires_grad=True)
    logvar = torch.tensor([0.0, math.log(4)], requires_grad=True)
    z = reparameterise(mean, logvar, torch.tensor([1.0, 3.0]))
    assert z.requires_grad, "z has no gradient: something was detached"
    z.sum().backward()
    assert logvar.grad is not None, "no gradient for logvar: the encoder would not learn it"
    agree(mean.grad, [1.0, 1.0], "dz / d mean")
    agree(logvar.grad, [0.5, 3.0], "dz / d logvar = standard deviation eps / 2")


# ---- kl_divergence ------------------------------------------------------------------------------


@checks("kl_divergence")
def test_kl_by_hand():
    mean = torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    logvar = torch.tensor([[0.0, 0.0], [2.0, -2.0]])
    expected = [[0.0, 2.0], [(math.e**2 - 3) / 2, (math.e**-2 + 2) / 2]]
    agree(kl_divergence(mean, logvar), expected, "KL of each element")


@checks("kl_divergence")
def test_it_is_the_integral_of_q_ln_q_over_p():
    x = torch.linspace(-20, 20, 40_001, dtype=torch.double)
    mean, var = 1.5, 0.3
    log_q = -((x - mean) ** 2) / (2 * var) - math.log(2 * math.pi * var) / 2
    log_p = -(x**2) / 2 - math.log(2 * math.pi) / 2
    integral = torch.trapezoid(log_q.exp() * (log_q - log_p), x)
    one = torch.ones((), dtype=torch.double)
    agree(kl_divergence(mean * one, math.log(var) * one), integral, "KL against its integral")


@checks("kl_divergence")
def test_it_is_least_and_zero_at_mean_0_and_variance_1():
    mean = torch.linspace(-2, 2, 41)[:, None].expand(41, 41)
    logvar = torch.linspace(-3, 3, 41)[None].expand(41, 41)
    kl = kl_divergence(mean, logvar)
    assert kl.shape == (41, 41), f"expected a KL for each element, got shape {tuple(kl.shape)}"
    assert kl.min() >= -1e-6, f"a KL is never negative, got {kl.min():.4f}"
    assert kl.argmin() == 20 * 41 + 20, "the least KL must stand at mean 0, ln var 0"


# ---- count_active -------------------------------------------------------------------------------


@checks("count_active")
def test_latents_that_vary_from_picture_to_picture_count():
    means = torch.zeros(4, 2, 1, 3)  # 6 latents
    means[:, 0, 0, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    means[:, 1, 0, 1] = torch.tensor([5.0, 5.5, 5.0, 5.5])
    agree(count_active(means), 2, "active latents, of which two vary")


@checks("count_active")
def test_a_large_mean_that_never_varies_is_not_active():
    means = torch.arange(6.0).view(1, 2, 1, 3).expand(4, 2, 1, 3)
    agree(count_active(means), 0, "active latents, all constant over the pictures")


@checks("count_active")
def test_the_variance_is_divided_by_the_number_of_pictures():
    means = torch.tensor([0.09, -0.09]).view(2, 1, 1, 1)  # variance 0.0081, or 0.0162 by n - 1
    agree(count_active(means), 0, "active latents at a variance of 0.0081, below 0.01")
    agree(count_active(means * 2), 1, "active latents at a variance of 0.0324, above 0.01")


# ---- Autoencoder.restore ------------------------------------------------------------------------


def scaled() -> Fixed:
    return Fixed(latent_mean=3.0, latent_scale=0.5)


@checks("Autoencoder.restore")
def test_restored_by_hand():
    z = scaled().restore(torch.tensor([0.0, 1.0, -2.0]))
    agree(z, [3.0, 5.0, -1.0], "restored with mean 3 and scale 1/2")


@checks("Autoencoder.restore")
def test_it_undoes_standardise():
    z = torch.randn(2, 1, 2, 2, generator=generators(1)[0])
    agree(scaled().restore(scaled().standardise(z)), z, "restore(standardise(z))")


# ---- Autoencoder.encode -------------------------------------------------------------------------


class GivenEncoder(nn.Module):
    """Stands for the network: its answer is given."""

    def __init__(self, answer):
        super().__init__()
        self.conv_in = nn.Conv2d(1, 1, 1)  # encode looks up the dtype here
        self.answer = answer

    def forward(self, images):
        assert images.dtype == self.conv_in.weight.dtype, (
            f"images must be converted to the weights' dtype, got {images.dtype}"
        )
        return self.answer


def encoded(answer, images=None, **fields):
    model = Autoencoder(AutoencoderConfig(**{**TINY, **fields}))
    model.encoder = GivenEncoder(answer)
    if images is None:
        images = torch.zeros(len(answer), 1, 2, 2)
    return model.encode(images)


@checks("Autoencoder.encode")
def test_the_first_channels_are_means_and_the_others_ln_var():
    answer = torch.arange(8.0).view(2, 4, 1, 1)  # 2 pictures, means in 2 channels, ln var in 2
    mean, logvar = encoded(answer, latent_channels=2)
    agree(mean, answer[:, :2], "means")
    agree(logvar, answer[:, 2:], "ln var")


@checks("Autoencoder.encode")
def test_ln_var_is_clamped_and_the_mean_is_not():
    answer = torch.tensor([[100.0, -100.0], [-100.0, 50.0]]).view(2, 2, 1, 1)
    mean, logvar = encoded(answer)
    agree(mean.flatten(), [100.0, -100.0], "means")
    agree(logvar.flatten(), LOGVAR_RANGE, "ln var, clamped to LOGVAR_RANGE")


@checks("Autoencoder.encode")
def test_a_plain_autoencoder_has_all_channels_as_means_and_almost_no_variance():
    answer = torch.arange(4.0).view(1, 4, 1, 1)
    mean, logvar = encoded(answer, latent_channels=4, variational=False)
    agree(mean, answer, "means")
    agree(logvar, torch.full_like(answer, LOGVAR_RANGE[0]), "ln var of a plain autoencoder")


@checks("Autoencoder.encode")
def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="channels"):
        encoded(torch.zeros(1, 2, 1, 1), torch.zeros(1, 3, 2, 2))


@checks("Autoencoder.encode")
def test_images_are_converted_to_the_dtype_of_the_weights():
    mean, _ = encoded(torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 2, 2, dtype=torch.double))
    assert mean.dtype == torch.float32, f"expected float32, got {mean.dtype}"


# ---- Autoencoder.measure_latents ----------------------------------------------------------------


def measured(*batches) -> tuple[float, float]:
    """(latent_mean, latent_scale) from batches, each a list of (mean, ln var) of its pictures."""
    model = Fixed()
    model.measure_latents([torch.tensor(batch).view(-1, 1, 2, 1) for batch in batches])
    return float(model.latent_mean), float(model.latent_scale)


@checks("Autoencoder.measure_latents")
def test_mean_and_scale_by_hand():
    mean, scale = measured([(1.0, 0.0), (3.0, 0.0)])
    agree(mean, 2.0, "latent_mean of N(1, 1) and N(3, 1)")
    agree(scale, 2**-0.5, "latent_scale: E z^2 = (1 + 9) / 2 + 1 = 6, so the variance is 6 - 4 = 2")


@checks("Autoencoder.measure_latents")
def test_pictures_count_alike_in_batches_of_any_size():
    rows = [(1.0, 0.0), (3.0, 0.0), (5.0, 0.5), (8.0, -1.0)]
    agree(measured(rows[:1], rows[1:]), measured(rows), "mean and scale from 1 + 3 and from 4")


@checks("Autoencoder.measure_latents")
def test_every_latent_counts():
    model = Fixed(torch.tensor([0.0, 2.0]).view(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    model.measure_latents([torch.zeros(1, 1, 2, 2)])
    agree(float(model.latent_mean), 1.0, "latent_mean of one picture with latents 0 and 2")


@checks("Autoencoder.measure_latents")
def test_a_mean_far_from_0_does_not_blur_the_scale():
    _, scale = measured([(10_000.0, 0.0), (10_000.0, 0.0)])
    agree(scale, 1.0, "latent_scale at mean 10,000, variance 1 (sums need float64)", 1e-3)


@checks("Autoencoder.measure_latents")
def test_no_pictures_are_refused():
    with pytest.raises(ValueError):
        Fixed().measure_latents([])


# ---- Autoencoder.loss ---------------------------------------------------------------------------


def constant(value: float, rows: int = 2) -> torch.Tensor:
    return torch.full((rows, 1, 2, 2), value)


def nearly_certain(mean: float, **fields) -> Fixed:
    """All latents at `mean` with a standard deviation of e^-15."""
    return Fixed(constant(mean), constant(LOGVAR_RANGE[0]), **fields)


@checks("Autoencoder.loss")
def test_the_reconstruction_is_half_the_squared_error_of_a_picture():
    model = nearly_certain(0.0, beta=0)
    loss, metrics = model.loss({"images": constant(0.5)}, generators(2))
    expected = 4 * 0.5**2 / 2  # 4 pixels
    agree(loss, expected, "loss: 4 pixels off by 0.5, summed over pixels, averaged over pictures")
    agree(metrics["reconstruction"], expected, 'metrics["reconstruction"]')


@checks("Autoencoder.loss")
def test_the_kl_is_summed_over_latents_and_weighted_by_beta():
    model = Fixed(constant(1.0), constant(0.0), beta=0.25)
    images = constant(0.0)
    loss, metrics = model.loss({"images": images}, generators(2))
    agree(metrics["kl"], 2.0, 'metrics["kl"]: 4 latents of KL 1/2, not yet times beta')
    agree(loss - metrics["reconstruction"], 0.5, "beta KL, with beta 0.25, added to the loss")


@checks("Autoencoder.loss")
def test_each_row_draws_its_noise_from_its_generator():
    model = Fixed(constant(0.0), constant(0.0), beta=0)
    loss, _ = model.loss({"images": constant(0.0)}, generators(2))
    eps = torch.stack([torch.randn((1, 2, 2), generator=g) for g in generators(2)])
    agree(loss, eps.square().sum() / 4, "loss where the picture is 0 and z is the noise")


@checks("Autoencoder.loss")
def test_a_plain_autoencoder_draws_nothing_and_has_no_kl():
    model = Fixed(constant(1.0), constant(LOGVAR_RANGE[0]), variational=False, beta=1)
    rows = generators(2)
    loss, metrics = model.loss({"images": constant(0.0)}, rows)
    agree(loss, 2.0, "loss of a plain autoencoder: 4 pixels off by 1")
    agree(metrics["kl"], 0.0, 'metrics["kl"] of a plain autoencoder')
    untouched = [torch.equal(a.get_state(), b.get_state()) for a, b in zip(rows, generators(2))]
    assert all(untouched), "a plain autoencoder must not use the generators"


@checks("Autoencoder.loss")
@pytest.mark.parametrize(("step", "beta"), [(0, 0.0), (5, 0.25), (10, 0.5), (40, 0.5)])
def test_beta_rises_with_the_step_and_stops_at_its_full_value(step, beta):
    model = Fixed(constant(1.0), constant(0.0), beta=0.5, beta_warmup_steps=10)
    batch = {"images": constant(0.0), "step": torch.tensor(float(step))}
    loss, metrics = model.loss(batch, generators(2))
    agree(loss - metrics["reconstruction"], beta * 2, f"beta KL at step {step} of a warm-up of 10")


@checks("Autoencoder.loss")
def test_without_a_step_beta_has_its_full_value():
    model = Fixed(constant(1.0), constant(0.0), beta=0.5, beta_warmup_steps=10)
    loss, metrics = model.loss({"images": constant(0.0)}, generators(2))
    agree(loss - metrics["reconstruction"], 1.0, "beta KL without a step: beta 0.5, KL 2")


@checks("Autoencoder.loss")
def test_the_encoder_learns_from_the_reconstruction():
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(**TINY, beta=0))
    loss, metrics = model.loss({"images": constant(0.5)}, generators(2))
    loss.backward()
    gradient = model.encoder.conv_in.weight.grad
    assert gradient is not None and gradient.abs().max() > 0, "no gradient reaches the encoder"
    assert not metrics["reconstruction"].requires_grad, "metrics must be detached"


@checks("Autoencoder.loss")
def test_active_latents_of_the_batch_are_reported():
    mean = constant(0.0)
    mean[0, 0, 0, 0] = 1.0
    _, metrics = Fixed(mean, constant(0.0)).loss({"images": constant(0.0)}, generators(2))
    agree(metrics["active"], 1, 'metrics["active"]')


# ---- what no exercise covers, but a debugging exercise breaks ------------------------------------


def test_upsampling_repeats_pixels_and_convolves():
    torch.manual_seed(0)
    layer = Upsample(2)
    x = torch.randn(1, 2, 3, 5)
    repeated = F.interpolate(x, scale_factor=2, mode="nearest")
    agree(layer(x), F.conv2d(repeated, layer.weight, layer.bias, padding=1), "Upsample")
