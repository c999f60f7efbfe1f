"""Optimizers: Muon against PyTorch's, parameter groups, schedules, clipping and averaging."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tinyfm.autoencoder import Autoencoder, AutoencoderConfig
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.ddpm import Diffusion, DiffusionConfig
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.training.muon import NEWTON_SCHULZ, Muon, orthogonalise
from tinyfm.training.optim import (
    EMA,
    OptimConfig,
    build_optimizers,
    lr_factor,
    scale_and_clip,
    set_lr,
)

SHAPES = [(24, 24), (16, 48), (16, 48), (60, 20), (60, 20), (60, 20), (8, 1)]


def matrices(seed: int) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES]


# ---- Muon ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_muon_agrees_with_pytorch(weight_decay):
    ours, theirs = matrices(0), matrices(0)
    start = [p.detach().clone() for p in ours]
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": weight_decay}
    optimizers = [
        Muon(ours, **settings),
        torch.optim.Muon(theirs, nesterov=True, adjust_lr_fn="original", **settings),
    ]
    for step in range(6):
        for mine, other, gradient in zip(ours, theirs, matrices(step + 1)):
            mine.grad, other.grad = gradient.data.clone(), gradient.data.clone()
        for optimizer in optimizers:
            optimizer.step()
    for before, mine, other in zip(start, ours, theirs):
        moved = other - before
        difference = mine - other
        assert difference.norm() < 0.01 * moved.norm()  # products in bfloat16, in another order


def test_muon_decays_by_the_learning_rate_and_keeps_gradients():
    p = nn.Parameter(torch.ones(60, 20))
    p.grad = torch.zeros(60, 20)
    Muon([p], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(p.data, torch.full((60, 20), 0.95))
    p.grad = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    before = p.grad.clone()
    Muon([p], lr=0.1).step()
    assert torch.equal(p.grad, before)


def test_muon_continues_from_its_saved_state():
    straight, stopped = matrices(0), matrices(0)
    first, second = Muon(straight, lr=0.1), Muon(stopped, lr=0.1)
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy(second.state_dict())
            second = Muon(stopped, lr=9.0)
            second.load_state_dict(saved)
        for params, optimizer in ((straight, first), (stopped, second)):
            for p, gradient in zip(params, matrices(step + 1)):
                p.grad = gradient.data
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, stopped))


def test_muon_skips_parameters_without_gradient_and_refuses_vectors():
    a, b = matrices(0)[1:3]
    a.grad = torch.ones_like(a)
    before = b.detach().clone()
    Muon([a, b], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(b, before)
    with pytest.raises(ValueError, match=r"Muon updates matrices; it was given the shape \(5,\)"):
        Muon([nn.Parameter(torch.zeros(5))], lr=0.1)


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (60, 2, 3, 3)])
def test_muon_treats_a_kernel_as_a_matrix(shape):
    kernel = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    matrix.grad = kernel.grad.flatten(1)
    for p in (kernel, matrix):
        Muon([p], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_newton_schulz_ends_in_its_stated_range():
    a, b, c = NEWTON_SCHULZ
    s = torch.linspace(0.002, 1, 100_000, dtype=torch.float64)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert s.min() > 0.68 and s.max() < 1.21


@pytest.mark.parametrize("shape", [(32, 32), (32, 80), (80, 32)])
def test_orthogonalise_keeps_singular_vectors_and_equalises_values(shape):
    g = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(3, *shape, generator=g), full_matrices=False)
    S = torch.logspace(0, -2, 32)  # from 1 to 0.01
    M = (U * S) @ Vh
    got = orthogonalise(M).float()
    assert got.shape == M.shape
    along = (U.mT @ got @ Vh.mT).diagonal(dim1=1, dim2=2)  # (3, 32): length along each direction
    assert along.min() > 0.6 and along.max() < 1.25
    values = torch.linalg.svdvals(got)
    assert values.min() > 0.6 and values.max() < 1.25  # the stated range, and bfloat16's rounding
    torch.testing.assert_close(orthogonalise(1000 * M).float(), got, rtol=0.05, atol=0.02)
    assert orthogonalise(torch.zeros(1, 4, 6)).abs().max() == 0


# ---- parameter groups ---------------------------------------------------------------------------


def groups_of(model: nn.Module, config: OptimConfig) -> dict[str, tuple[str, float, float]]:
    """Name of each parameter -> (optimizer, peak rate, decay); every parameter exactly once."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[str, float, float]] = {}
    for optimizer in build_optimizers(model, config):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[id(p)] not in found
                kind = type(optimizer).__name__
                found[names[id(p)]] = (kind, group["peak_lr"], group["weight_decay"])
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_the_right_group(tied):
    model = GPT(GPTConfig(64, 16, 2, 2, d_model=32, position="learned", bias=True, tied=tied))
    config = OptimConfig(lr=1e-3, muon_lr=0.05, weight_decay=0.2)
    found = groups_of(model, config)
    assert found.keys() == dict(model.named_parameters()).keys()
    tables = {"token_embedding.weight", "position_embedding.weight"}
    if not tied:
        tables.add("head.weight")
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert found[name] == ("AdamW", 1e-3, 0.0)
        elif name in tables:
            assert found[name] == ("AdamW", 1e-3, 0.2)
        else:
            assert name.startswith("blocks.") and found[name] == ("Muon", 0.05, 0.2)
    plain = groups_of(model, replace(config, optimizer="adamw"))
    assert {kind for kind, _, _ in plain.values()} == {"AdamW"}
    assert {name for name, (_, _, decay) in plain.items() if decay} == {
        name for name, p in model.named_parameters() if p.ndim > 1
    }


@pytest.mark.parametrize("kernels", [False, True])
def test_muon_updates_kernels_only_with_the_option(kernels):
    model = Autoencoder(AutoencoderConfig(image_size=8, channels=(8, 16), groups=4))
    found = groups_of(model, OptimConfig(kernels=kernels))
    ndims = (2, 4) if kernels else (2,)
    for name, p in model.named_parameters():
        assert (found[name][0] == "Muon") == (p.ndim in ndims), name


def test_muon_trains_all_matrices_of_the_picture_models():
    """As optim.py says: tables, input and output layers too. AdamW has gains and biases."""
    clip = CLIP(CLIPConfig(image_layer=1, text_layer=1))
    unet = DiffusionConfig(channels=(8, 16), attend=(False, True), groups=4, n_head=2, n_block=1)
    by_muon = set()
    for model in (clip, Diffusion(unet)):
        for name, (kind, _, _) in groups_of(model, OptimConfig(kernels=True)).items():
            assert (kind == "Muon") == (model.get_parameter(name).ndim in (2, 4)), name
            if kind == "Muon":
                by_muon.add(name)
    assert by_muon > {
        "text_tower.token_embedding.weight",
        "text_tower.position",
        "text_projection.weight",
        "unet.conv_in.weight",
        "unet.conv_out.weight",
        "unet.time_in.weight",
    }


def test_a_name_of_outer_is_a_whole_part_of_a_path():
    model = nn.ModuleDict({"ahead": nn.Linear(2, 3), "inner": nn.ModuleDict({})})
    model["inner"]["head"] = nn.Linear(2, 4)
    model.outer = ("head",)
    found = groups_of(model, OptimConfig())
    assert found["ahead.weight"][0] == "Muon"
    assert found["inner.head.weight"][0] == "AdamW"


def test_frozen_parameters_are_in_no_group():
    model = GPT(GPTConfig(64, 16, 1, 2, d_model=32))
    model.requires_grad_(False)
    model.norm.weight.requires_grad_(True)
    assert groups_of(model, OptimConfig()).keys() == {"norm.weight"}


# ---- schedules ----------------------------------------------------------------------------------


def test_wsd_at_its_turning_points():
    c = OptimConfig(warmup_steps=10, decay_fraction=0.4)
    factors = [lr_factor(step, 100, c) for step in range(100)]
    assert factors[0] == 0.1 and factors[8] == 0.9 and factors[9] == 1.0
    assert factors[9:61] == [1.0] * 52  # 40 of 100 steps are left at step 60
    assert factors[80] == 0.5 and factors[99] == pytest.approx(1 / 40)
    assert lr_factor(100, 100, c) == lr_factor(105, 100, c) == 0.0
    assert lr_factor(100, 100, replace(c, final_lr=0.1)) == 0.1


@pytest.mark.parametrize("decay_fraction", [0.85, 0.95, 1.0])
def test_a_long_fall_starts_where_the_warmup_ends(decay_fraction):
    """The rate does not jump between the two: each step falls as far as the one before."""
    c = OptimConfig(warmup_steps=20, decay_fraction=decay_fraction)
    factors = [lr_factor(step, 100, c) for step in range(101)]
    assert factors[19] == factors[20] == 1.0
    torch.testing.assert_close(torch.tensor(factors[20:]), torch.linspace(1, 0, 81))


def test_cosine_at_its_turning_points():
    c = OptimConfig(schedule="cosine", warmup_steps=20, final_lr=0.1)
    factors = [lr_factor(step, 120, c) for step in range(121)]
    assert factors[19] == factors[20] == 1.0
    assert factors[70] == pytest.approx(0.55) and factors[120] == pytest.approx(0.1)
    assert factors[45] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 50])
@pytest.mark.parametrize("steps", [1, 2, 10, 51])
def test_schedules_stay_in_range(schedule, warmup, steps):
    for decay in (0.0, 0.3, 1.0):
        c = OptimConfig(schedule=schedule, warmup_steps=warmup, decay_fraction=decay)
        factors = [lr_factor(step, steps, c) for step in range(steps)]
        assert all(0 < factor <= 1 for factor in factors)
        after = factors[warmup:]
        assert after == sorted(after, reverse=True)


def test_set_lr_scales_every_group_from_its_own_peak():
    model = GPT(GPTConfig(64, 16, 1, 2, d_model=32))
    optimizers = build_optimizers(model, OptimConfig(lr=1e-3, muon_lr=0.05))
    for factor in (0.1, 1.0, 0.5):  # twice in a row does not shrink twice
        set_lr(optimizers, factor)
    rates = {group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
    assert rates == {0.5e-3, 0.025}


# ---- clipping and averaging ---------------------------------------------------------------------


def with_gradients(*values: float) -> nn.Module:
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in values])
    for p, value in zip(model, values):
        p.grad = torch.tensor([value])
    return model


@pytest.mark.parametrize(
    "scale, clip, norm, grads",
    [
        (1.0, 10.0, 5.0, (3.0, 4.0)),  # below the limit
        (1.0, 1.0, 5.0, (0.6, 0.8)),
        (0.1, 1.0, 0.5, (0.3, 0.4)),  # below the limit after scaling
        (torch.tensor(2.0), 5.0, 10.0, (3.0, 4.0)),
        (2.0, 0.0, 10.0, (6.0, 8.0)),  # 0 = no clipping
    ],
)
def test_scale_and_clip(scale, clip, norm, grads):
    model = with_gradients(3.0, 4.0)
    assert scale_and_clip(model, scale, clip).item() == pytest.approx(norm)
    assert [p.grad.item() for p in model] == pytest.approx(grads, rel=1e-5)


def test_ema_forgets_half_in_its_half_life():
    model = nn.ParameterList([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))])
    ema = EMA(model, half_life=20)
    with torch.no_grad():
        for p in model:
            p.fill_(1.0)
    for step in range(1000, 1020):  # long after the start
        ema.update(model, step)
    for average in ema.average.values():
        torch.testing.assert_close(average, torch.full_like(average, 0.5))


def test_ema_soon_forgets_the_initial_weights():
    model = with_gradients(0.0)
    ema = EMA(model, half_life=1e6)
    model[0].data.fill_(1.0)
    for step in range(30):
        ema.update(model, step)
    assert ema.average["0"].item() > 0.999


def test_ema_swaps_in_and_out_and_loads():
    model = with_gradients(0.0)
    ema = EMA(model, half_life=10)
    model[0].data.fill_(1.0)
    ema.swap(model)
    assert model[0].item() == 0 and ema.average["0"].item() == 1
    ema.swap(model)
    assert model[0].item() == 1 and ema.average["0"].item() == 0
    ema.load({"0": torch.tensor([0.25])})
    assert ema.average["0"].item() == 0.25


# ---- wrong settings, and learning ---------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"muon_lr": math.inf}, "muon_lr is inf"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; it must be 0 or above"),
        ({"clip": math.nan}, "clip is nan"),
        ({"momentum": 1.5}, "momentum is 1.5; it must be between 0 and 1"),
        ({"decay_fraction": -1}, "decay_fraction is -1"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        OptimConfig(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_small_regression_is_learned(optimizer):
    torch.manual_seed(0)

    def network() -> nn.Sequential:
        layers = [nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4)]
        return nn.Sequential(*layers)

    teacher = network()
    model = network()
    model.outer = ()
    x = torch.randn(256, 8)
    y = teacher(x).detach()
    y = (y - y.mean(0)) / y.std(0)  # then predicting the mean has the loss 1
    config = OptimConfig(optimizer, lr=1e-2, muon_lr=0.02, weight_decay=0.0, warmup_steps=5)
    optimizers = build_optimizers(model, config)
    for step in range(100):
        set_lr(optimizers, lr_factor(step, 100, config))
        loss = (model(x) - y).square().mean()
        loss.backward()
        scale_and_clip(model, 1.0, config.clip)
        for each in optimizers:
            each.step()
            each.zero_grad()
    assert loss.item() < 0.05
