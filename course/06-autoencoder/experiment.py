"""What does a nat of KL buy? Rate and distortion of variational autoencoders at three betas."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from course.letters import SIDE, Letters, draw_letters, split_letters
from tinyfm.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    count_active,
    kl_divergence,
    reparameterise,
)

BETAS = {"low": 0.05, "middle": 0.15, "high": 0.45}
UNITS = {}
for _name, _beta in BETAS.items():
    UNITS[f"reconstruction_{_name}"] = f"at beta {_beta}"
    UNITS[f"kl_{_name}"] = "nats a picture"
    UNITS[f"active_{_name}"] = "latents"
    UNITS[f"linear_active_{_name}"] = "latents"
    UNITS[f"advantage_{_name}"] = "of the linear loss"
UNITS["test_reconstruction_middle"] = "unseen fonts"
VARIANTS = ("4", "2", "8")  # channels of a latent, on 4 x 4 places
STEPS = 500
ROWS = 32  # of a batch
PEAK = 4e-3  # learning rate
SHOWN = 6  # letters in the figure


def config_for(channels: int, beta: float) -> AutoencoderConfig:
    return AutoencoderConfig(
        image_size=SIDE,
        channels=(8, 16, 32),
        groups=8,
        latent_channels=channels,
        attention=False,
        beta=beta,
        beta_warmup_steps=100,
    )


def train(config: AutoencoderConfig, letters: Letters, seed: int) -> Autoencoder:
    torch.manual_seed(seed)
    model = Autoencoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    order = torch.Generator().manual_seed(seed)
    noise = [torch.Generator().manual_seed(seed * ROWS + i) for i in range(ROWS)]
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1, (step + 1) / 20, 1.6 * (1 - step / STEPS))
        rows = torch.randint(len(letters), (ROWS,), generator=order)
        batch = {"images": letters.images[rows], "step": torch.tensor(float(step))}
        loss, _ = model.loss(batch, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"beta {config.beta}, step {step + 1} of {STEPS}: loss {loss.item():.2f}")
            sys.stdout.flush()
    return model.eval()


@torch.no_grad()
def measure_terms(model: Autoencoder, images: Tensor, seed: int) -> tuple[float, float, int]:
    """(half the squared error, KL) a picture, and the number of active latents."""
    mean, logvar = model.encode(images)
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    rebuilt = model.decode(reparameterise(mean, logvar, eps))
    error = (rebuilt - images).square().sum().item() / (2 * len(images))
    kl = kl_divergence(mean, logvar).sum().item() / len(images)
    return error, kl, int(count_active(mean))


def linear_optimum(variances: Tensor, beta: float) -> tuple[float, float, int]:
    """The same three of the best linear autoencoder, from the variances of the principal axes."""
    used = variances > beta
    error = variances[~used].sum().item() / 2 + beta * int(used.sum()) / 2
    kl = (variances[used] / beta).log().sum().item() / 2
    return error, kl, int(used.sum())


def principal_variances(images: Tensor) -> Tensor:
    """Variances of pictures (N, 1, H, W) along their principal axes, the largest first."""
    x = images.flatten(1).double()
    return torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0).clamp(min=0)


def to_percent(images: Tensor) -> list[int]:
    return ((images.clamp(-1, 1) + 1) * 50).round().int().flatten().tolist()


def measure(seed: int, variant: str) -> dict:
    letters, unseen = split_letters(draw_letters())
    variances = principal_variances(letters.images)
    shown = unseen.images[:: len(unseen) // SHOWN][:SHOWN]
    pictures = to_percent(shown)
    measured = {}
    for name, beta in BETAS.items():
        model = train(config_for(int(variant), beta), letters, seed)
        error, kl, active = measure_terms(model, letters.images, seed)
        linear_error, linear_kl, linear_active = linear_optimum(variances, beta)
        measured[f"reconstruction_{name}"] = error
        measured[f"kl_{name}"] = kl
        measured[f"active_{name}"] = active
        measured[f"linear_active_{name}"] = linear_active
        measured[f"advantage_{name}"] = 1 - (error + beta * kl) / (linear_error + beta * linear_kl)
        with torch.no_grad():
            pictures += to_percent(model.decode(model.encode(shown)[0]))
        if name == "middle":
            measured["test_reconstruction_middle"] = measure_terms(model, unseen.images, seed)[0]
            eps = torch.randn(
                (SHOWN, *model.encode(shown)[0].shape[1:]),
                generator=torch.Generator().manual_seed(seed),
            )
            with torch.no_grad():
                drawn = to_percent(model.decode(eps))
    curve = [linear_optimum(variances, 0.03 * 1.1**i) for i in range(40)]
    measured["linear_errors"] = [round(error, 3) for error, _, _ in curve]
    measured["linear_kls"] = [round(kl, 3) for _, kl, _ in curve]
    measured["pictures"] = pictures + drawn
    return measured


def draw(figure, results):
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    first = results[0]
    left.plot(first["linear_kls"], first["linear_errors"], color="#000000", label="best linear")
    for name, beta in BETAS.items():
        kls = [result[f"kl_{name}"] for result in results]
        errors = [result[f"reconstruction_{name}"] for result in results]
        left.plot(kls, errors, "o", label=f"beta {beta}")
    left.set(xlim=(0, None), ylim=(0, None))
    left.set(xlabel="rate: KL (nats a picture)", ylabel="distortion: half the squared error")
    left.legend()

    names = ["unseen letters", *(f"beta {beta}" for beta in BETAS.values()), "samples, 0.15"]
    rows = len(names)
    pixels = torch.tensor(first["pictures"]).view(rows, SHOWN, SIDE, SIDE)
    sheet = pixels.permute(0, 2, 1, 3).reshape(rows * SIDE, SHOWN * SIDE)
    right.imshow(100 - sheet, cmap="gray", vmin=0, vmax=100)
    right.set_yticks([SIDE * (row + 0.5) for row in range(rows)], names)
    right.set_xticks([])
    right.grid(False)
