"""The autoencoder: equality with AutoencoderKL of diffusers, the loss by hand, latents, errors."""

from dataclasses import replace

import diffusers
import pytest
import torch
from conftest import (
    assert_equal_weights,
    count_parameters,
    edit_json,
    generators,
    normal,
    random_weights,
)
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from tinyfm.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    Upsample,
    kl_divergence,
    reparameterise,
)
from tinyfm.hub import diffusion, layout

diffusers.logging.set_verbosity_error()
SIZES = {
    "sample_size": 16, "in_channels": 3, "out_channels": 3, "latent_channels": 4,
    "block_out_channels": (8, 16, 16), "layers_per_block": 2, "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
}  # fmt: skip
VARIANTS = {
    "stable-diffusion-1": SIZES,
    "grey": SIZES
    | {
        "in_channels": 1,
        "out_channels": 1,
        "latent_channels": 2,
        "layers_per_block": 1,
        "scaling_factor": 1.7,
        "shift_factor": 0.3,
    },
    "without-options": SIZES
    | {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False},
}
TINY = AutoencoderConfig(image_size=8, channels=(8, 16), groups=4, latent_channels=2)


def reference(fields):
    return random_weights(lambda: AutoencoderKL(**fields), matrices=0.05)


@pytest.fixture(scope="module", params=VARIANTS)
def published(request, tmp_path_factory):
    """A model of diffusers, and a folder that it was saved to."""
    model = reference(VARIANTS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def assert_same(ours, theirs):
    """Equal moments and pictures, of the same images and latents."""
    images = normal(2, theirs.config.in_channels, 16, 24).clamp(-1, 1)
    posterior = theirs.encode(images).latent_dist
    mean, logvar = ours.encode(images)
    torch.testing.assert_close(mean, posterior.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logvar, posterior.logvar, atol=1e-4, rtol=1e-4)
    z = normal(2, theirs.config.latent_channels, 4, 6, seed=1)
    expected = theirs.decode(z).sample
    assert mean.std() > 0.05 and expected.std() > 0.05
    torch.testing.assert_close(ours.decode(z), expected, atol=1e-4, rtol=1e-4)


# ---- against diffusers ---------------------------------------------------------------------------


def test_moments_and_pictures_of_a_published_folder(published):
    theirs, folder = published
    ours = Autoencoder.from_pretrained(folder)
    assert not ours.training
    assert_same(ours, theirs)
    assert count_parameters(ours) == theirs.num_parameters()
    assert ours.latent_scale.item() == pytest.approx(theirs.config.scaling_factor)
    assert ours.latent_mean.item() == pytest.approx(theirs.config.shift_factor or 0)


def test_export_loads_in_diffusers_and_returns_bit_for_bit(published, tmp_path):
    _, folder = published
    ours = Autoencoder.from_pretrained(folder)
    ours.latent_mean.fill_(0.25)
    ours.save_pretrained(tmp_path)
    exported, info = AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(ours, exported)
    assert exported.config.shift_factor == 0.25
    again = Autoencoder.from_pretrained(tmp_path)
    latents = {"latent_mean": 0.0, "latent_scale": 1.0}  # the config has initial values only
    assert replace(again.config, **latents) == replace(ours.config, **latents)
    assert_equal_weights(again, ours)
    with pytest.raises(ValueError, match="holds a model already"):
        ours.save_pretrained(tmp_path)


def test_size_and_config_of_stable_diffusion_1():
    """Its config.json leaves out most fields."""
    raw = {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512], "in_channels": 3, "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "layers_per_block": 2,
        "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }  # fmt: skip
    config = diffusion.read_autoencoder("AutoencoderKL", raw, AutoencoderConfig)
    with torch.device("meta"):
        ours = Autoencoder(config)
        theirs = AutoencoderKL.from_config(raw)
    assert count_parameters(ours) == 83_653_863 == theirs.num_parameters()
    assert config.latent_scale == 0.18215
    names = diffusion.autoencoder_names()
    found = {layout.translate(n, names): p.shape for n, p in ours.named_parameters()}
    assert found == {name: p.shape for name, p in theirs.named_parameters()}


def test_files_from_before_2023(tmp_path):
    """In these files the attention layers have other names."""
    theirs = reference(SIZES)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for old, new in diffusion.OLD.items():
        tensors = {name.replace(f".{new}.", f".{old}."): t for name, t in tensors.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, path)
    assert_same(Autoencoder.from_pretrained(tmp_path), theirs)


@torch.no_grad()
def test_half_precision(tmp_path):
    reference(SIZES).save_pretrained(tmp_path)
    half = Autoencoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    whole = Autoencoder.from_pretrained(tmp_path)
    images = normal(2, 3, 16, 16).clamp(-1, 1)
    mean = half.encode(images)[0]
    expected = whole.encode(images)[0]
    assert (mean - expected).std() < 0.05 * expected.std()
    assert half.decode(mean.float()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"_class_name": "VQModel"}, "_class_name is 'VQModel'; .*AutoencoderKL"),
        ({"act_fn": "relu"}, "act_fn is 'relu'; supported: 'silu'"),
        ({"latents_mean": [0.1]}, r"latents_mean is \[0.1\]; supported: None"),
        ({"out_channels": 1}, "out_channels is 1; supported: 3"),
        ({"use_quant_conv": False}, "use_post_quant_conv is True; supported: False"),
        ({"latent_channels": "four"}, "latent_channels is 'four'; .* type int"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, r"up_block_types is \['UpDecoderBlock2D'\]"),
        ({"down_block_types": ...}, "down_block_types is None; supported: "),
        ({"norm_num_groups": 3}, "8 channels cannot be divided by groups 3"),
        ({"layers_per_block": 1}, "tensors do not fit config.json"),
    ],
)
def test_folders_that_the_config_cannot_express(fields, message, tmp_path):
    reference(SIZES).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **fields)
    with pytest.raises(ValueError, match=message) as error:
        Autoencoder.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_plain_autoencoder_cannot_be_exported(tmp_path):
    with pytest.raises(ValueError, match="no plain autoencoder"):
        Autoencoder(replace(TINY, variational=False)).save_pretrained(tmp_path)


# ---- the mathematics -----------------------------------------------------------------------------


@torch.no_grad()
def test_upsampling_repeats_pixels_and_convolves():
    torch.manual_seed(0)
    layer = Upsample(6).double()
    x = normal(2, 6, 5, 4).double()
    repeated = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    expected = torch.nn.functional.conv2d(repeated, layer.weight, layer.bias, padding=1)
    assert expected.shape == (2, 6, 10, 8)
    torch.testing.assert_close(layer(x), expected)


def test_the_kl_divergence():
    """Torch's value; zero at the prior and above zero elsewhere."""
    mean, logvar = normal(2, 50, 3).double()
    q = torch.distributions.Normal(mean, (logvar / 2).exp())
    p = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    torch.testing.assert_close(kl_divergence(mean, logvar), torch.distributions.kl_divergence(q, p))
    assert kl_divergence(torch.zeros(1), torch.zeros(1)) == 0
    assert (kl_divergence(mean, logvar) > 0).all()


def test_draws_have_the_right_moments_and_gradients():
    mean = torch.tensor(1.5, requires_grad=True)
    logvar = torch.tensor(-1.0, requires_grad=True)
    z = reparameterise(mean, logvar, normal(200_000))
    assert z.mean().item() == pytest.approx(1.5, abs=0.01)
    assert z.var().item() == pytest.approx(torch.tensor(-1.0).exp().item(), abs=0.01)
    z.square().mean().backward()  # E z^2 = mean^2 + exp(logvar)
    assert mean.grad.item() == pytest.approx(3.0, abs=0.02)
    assert logvar.grad.item() == pytest.approx(torch.tensor(-1.0).exp().item(), abs=0.01)


def test_loss_by_hand():
    torch.manual_seed(0)
    model = Autoencoder(replace(TINY, beta=0.3))
    images = normal(3, 1, 8, 8).clamp(-1, 1)
    loss, metrics = model.loss({"images": images}, generators(3))
    reconstruction = 0.0
    kl = 0.0
    for image, g in zip(images, generators(3)):
        mean, logvar = model.encode(image[None])
        z = mean + (logvar / 2).exp() * torch.randn(2, 4, 4, generator=g)
        reconstruction += (model.decode(z) - image).square().sum().item() / 2 / 3
        kl += ((mean**2 + logvar.exp() - 1 - logvar) / 2).sum().item() / 3
    assert metrics["reconstruction"].item() == pytest.approx(reconstruction, rel=1e-4)
    assert metrics["kl"].item() == pytest.approx(kl, rel=1e-4)
    assert loss.item() == pytest.approx(reconstruction + 0.3 * kl, rel=1e-4)
    spread = model.encode(images)[0].var(dim=0, correction=0)
    assert metrics["active"].item() == (spread > 0.01).sum().item()


def test_active_latents_are_counted():
    model = Autoencoder(TINY)
    mean = torch.zeros(8, 2, 4, 4)
    mean[:, 0, 0, :3] = normal(8, 3)
    model.encode = lambda images: (mean, torch.zeros_like(mean))
    _, metrics = model.loss({"images": torch.zeros(8, 1, 8, 8)}, generators(8))
    assert metrics["active"] == 3


def test_loss_does_not_depend_on_the_micro_batch():
    torch.manual_seed(0)
    model = Autoencoder(TINY)
    images = normal(4, 1, 8, 8)
    whole, _ = model.loss({"images": images}, generators(4))
    first, _ = model.loss({"images": images[:2]}, generators(4)[:2])
    second, _ = model.loss({"images": images[2:]}, generators(4)[2:])
    assert whole.item() == pytest.approx((first + second).item() / 2, rel=1e-5)


def test_beta_rises_with_the_step_of_the_batch():
    torch.manual_seed(0)
    model = Autoencoder(replace(TINY, beta=2.0, beta_warmup_steps=10))
    factors = []
    for step in (0, 5, 10, 99, None):
        batch = {"images": normal(2, 1, 8, 8)}
        if step is not None:
            batch["step"] = torch.tensor(step)
        loss, metrics = model.loss(batch, generators(2))
        factors.append(((loss - metrics["reconstruction"]) / metrics["kl"]).item())
    assert factors == pytest.approx([0.0, 1.0, 2.0, 2.0, 2.0], abs=1e-3)


def test_a_plain_autoencoder_draws_nothing():
    torch.manual_seed(0)
    model = Autoencoder(replace(TINY, variational=False))
    images = normal(2, 1, 8, 8)
    mean, logvar = model.encode(images)
    assert mean.shape == logvar.shape == (2, 2, 4, 4)
    loss, metrics = model.loss({"images": images}, [None, None])
    rebuilt = model.decode(mean)
    assert loss.item() == pytest.approx((rebuilt - images).square().sum().item() / 4, rel=1e-5)
    assert metrics["kl"] == 0


def test_the_example_batch_has_a_loss():
    model = Autoencoder(TINY)
    assert model.loss(model.example_batch(2), generators(2))[0].isfinite()


def test_it_overfits_a_few_pictures():
    torch.manual_seed(0)
    model = Autoencoder(TINY)
    images = normal(4, 1, 8, 8, seed=3).clamp(-1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for step in range(150):
        loss, metrics = model.loss({"images": images}, generators(4, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(metrics["reconstruction"].item())
    assert losses[-1] < 0.2 * losses[0]
    assert metrics["active"] > 8


def test_training_in_bfloat16_stays_close_to_float32():
    torch.manual_seed(0)
    model = Autoencoder(TINY)
    images = normal(4, 1, 8, 8)
    full, _ = model.loss({"images": images}, generators(4))
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = model.loss({"images": images}, generators(4))
    assert half.item() == pytest.approx(full.item(), rel=0.02)
    half.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_standardised_latents_have_mean_0_and_variance_1():
    torch.manual_seed(0)
    model = Autoencoder(TINY)
    images = normal(300, 1, 8, 8)
    model.measure_latents(images.split(128))
    with torch.no_grad():
        mean, logvar = model.encode(images)
        z = reparameterise(mean, logvar, normal(*mean.shape, seed=1))
    standard = model.standardise(z)
    assert abs(z.mean()) > 0.03 or abs(z.std() - 1) > 0.03  # before, they had not
    assert standard.mean().item() == pytest.approx(0, abs=0.02)
    assert standard.std().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(model.restore(standard), z, atol=1e-5, rtol=1e-5)
    assert {"latent_mean", "latent_scale"} <= model.state_dict().keys()
    with pytest.raises(ValueError, match="no pictures"):
        model.measure_latents([])


@torch.no_grad()
def test_images_of_another_size():
    """Any size that the encoder can halve."""
    model = Autoencoder(AutoencoderConfig())
    mean, _ = model.encode(torch.zeros(1, 1, 64, 16))
    assert mean.shape == (1, 4, 16, 4)
    assert model.decode(mean).shape == (1, 1, 64, 16)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"channels": (8, 18)}, "18 channels cannot be divided by groups 4"),
        ({"channels": ()}, r"channels is \(\); give the width"),
        ({"latent_channels": 0}, "latent_channels is 0; .*at least 1"),
        ({"beta": -0.1}, "beta is -0.1; .*at least 0"),
        ({"latent_scale": 0.0}, "latent_scale is 0.0; .*above 0"),
        ({"image_size": 9}, "9 x 9 .*halved 1 times; .*8 x 8"),
    ],
)
def test_configs_that_cannot_be_built(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **fields)


def test_images_that_do_not_fit():
    model = Autoencoder(AutoencoderConfig())
    with pytest.raises(ValueError, match=r"30 x 33 .*halved 2 times; .*32 x 32"):
        model.encode(torch.zeros(1, 1, 30, 33))
    with pytest.raises(ValueError, match=r"3 channels .*takes 1 channel \(grey"):
        model.loss({"images": torch.zeros(1, 3, 32, 32)}, generators(1))
    model = Autoencoder(AutoencoderConfig(in_channels=3))
    with pytest.raises(ValueError, match=r"1 channel .*takes 3 channels \(colour"):
        model.encode(torch.zeros(1, 1, 32, 32))
