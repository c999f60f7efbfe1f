"""How many steps does a sampler need, and why does a network draw letters that it never saw?"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from course.letters import SIDE, Letters, draw_letters, split_letters
from tinyfm.ddpm import Diffusion, DiffusionConfig, gaussian_noise, last, level, q_sample, target

CALLS = (3, 7, 15, 31, 63)  # of the network, by samplers that are compared with many calls
MANY = 128  # steps of second order
UNITS = {
    "loss_network": "per pixel",
    "loss_memory": "per pixel",
    "test_loss_network": "per pixel",
    "test_loss_memory": "per pixel",
    "first_order_error_15_calls": "per pixel (rms)",
    "second_order_error_15_calls": "per pixel (rms)",
    "first_order_error_63_calls": "per pixel (rms)",
    "second_order_error_63_calls": "per pixel (rms)",
    "copy_distance_network": "per pixel (rms)",
    "copy_distance_memory": "per pixel (rms)",
}
VARIANTS = ("flow", "v", "eps", "x0")  # what the network predicts
STEPS = 600
ROWS = 32  # of a batch
PEAK = 3e-3  # learning rate
SAMPLES = 48
SHOWN = 6  # samples in the figure


def train(config: DiffusionConfig, letters: Letters, seed: int) -> Diffusion:
    """A network whose weights are an average over the last steps."""
    torch.manual_seed(seed)
    model = Diffusion(config)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98)
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    order = torch.Generator().manual_seed(seed)
    noise = [torch.Generator().manual_seed(seed * ROWS + i) for i in range(ROWS)]
    recent = 0.0
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1, (step + 1) / 30, 1.6 * (1 - step / STEPS))
        rows = torch.randint(len(letters), (ROWS,), generator=order)
        loss, _ = model.loss({"images": letters.images[rows]}, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        recent += loss.item() / 100
        if step % 100 == 99:
            print(f"step {step + 1} of {STEPS}: mean loss of the last 100 {recent:.3f}")
            sys.stdout.flush()
            recent = 0.0
    return average.module.eval()


def memory_of(pictures: Tensor):
    """The denoiser of least squared error on exactly these pictures (N, C, H, W).

    Its x_0 is the mean of the pictures, each weighted by how probable it makes x_t.
    """
    flat = pictures.flatten(1)

    def denoise(x: Tensor, t, alpha, sigma) -> tuple[Tensor, Tensor]:
        far = torch.cdist(x.flatten(1), alpha * flat).square()  # (B, N)
        weights = torch.softmax(-far / (2 * sigma**2), dim=1)
        x0 = (weights @ flat).view_as(x)
        return x0, (x - alpha * x0) / sigma

    return denoise


@torch.no_grad()
def mean_loss(config: DiffusionConfig, denoise, images: Tensor, seed: int) -> float:
    """The loss of a denoiser over 20 noise levels, equally spaced, and these pictures."""
    total = 0.0
    generator = torch.Generator().manual_seed(seed)
    for k in range(20):
        share = torch.tensor([(k + 0.5) / 20], dtype=torch.double)
        t, alpha, sigma = (n.item() for n in level(config, share))
        eps = torch.randn(images.shape, generator=generator)
        x0, found = denoise(q_sample(images, eps, alpha, sigma), t, alpha, sigma)
        wanted = target(config.prediction, images, eps, alpha, sigma)
        guess = target(config.prediction, x0, found, alpha, sigma)
        total += (guess - wanted).square().mean().item() / 20
    return total


@torch.no_grad()
def draw_samples(model: Diffusion, denoise, steps: int, sampler: str, seed: int) -> Tensor:
    """Pictures (SAMPLES, 1, SIDE, SIDE) from the same noise for all steps and samplers."""
    generators = [torch.Generator().manual_seed(seed * 1000 + i) for i in range(SAMPLES)]
    x = gaussian_noise(generators, (1, SIDE, SIDE))
    path = model.path(steps, sampler)
    return last(model.sampler_states(sampler, denoise, x, path, generators))


def rms(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item()


def copy_distance(samples: Tensor, pictures: Tensor) -> float:
    """Root of the mean squared difference from a sample to the nearest picture, a pixel."""
    nearest = torch.cdist(samples.flatten(1), pictures.flatten(1)).min(1).values
    return (nearest.square().mean() / samples[0].numel()).sqrt().item()


def to_percent(images: Tensor) -> list[int]:
    return ((images.clamp(-1, 1) + 1) * 50).round().int().flatten().tolist()


def measure(seed: int, variant: str) -> dict:
    letters, unseen = split_letters(draw_letters())
    config = DiffusionConfig(
        image_size=SIDE,
        patch_size=2,
        channels=(32, 64),
        attend=(False, True),
        n_block=1,
        groups=8,
        prediction=variant,
        clip=False,
        spacing="leading" if variant == "eps" else "trailing",
    )
    model = train(config, letters, seed)
    network = model.denoiser()
    memory = memory_of(letters.images)
    with torch.no_grad():
        measured = {
            "loss_network": mean_loss(config, network, letters.images, seed),
            "loss_memory": mean_loss(config, memory, letters.images, seed),
            "test_loss_network": mean_loss(config, network, unseen.images, seed),
            "test_loss_memory": mean_loss(config, memory, unseen.images, seed),
        }
    samplers = ("euler", "heun") if variant == "flow" else ("ddim", "dpm++")
    exact = draw_samples(model, network, MANY, samplers[1], seed)
    errors = {}
    pictures = []
    for order, sampler in zip(("first_order", "second_order"), samplers):
        errors[order] = []
        for calls in CALLS:
            steps = (calls + 1) // 2 if sampler == "heun" else calls  # Heun calls twice a step
            samples = draw_samples(model, network, steps, sampler, seed)
            errors[order].append(rms(samples - exact))
            if calls in (15, 63):
                measured[f"{order}_error_{calls}_calls"] = errors[order][-1]
            if calls == 15:
                pictures.append(samples[:SHOWN])
        print(f"{sampler}: errors after {CALLS} calls", *(f"{e:.3f}" for e in errors[order]))
        sys.stdout.flush()
    copies = draw_samples(model, memory, MANY, samplers[0], seed)
    measured["copy_distance_network"] = copy_distance(exact, letters.images)
    measured["copy_distance_memory"] = copy_distance(copies, letters.images)
    measured["first_order_errors"] = [round(error, 5) for error in errors["first_order"]]
    measured["second_order_errors"] = [round(error, 5) for error in errors["second_order"]]
    measured["pictures"] = to_percent(torch.cat([*pictures, exact[:SHOWN], copies[:SHOWN]]))
    return measured


def draw(figure, results):
    left, right = figure.subplots(1, 2, width_ratios=(5, 6))
    orders = {
        "first_order": "first order (Euler, DDIM)",
        "second_order": "second order (Heun, DPM++)",
    }
    for number, (name, label) in enumerate(orders.items()):
        for i, result in enumerate(results):
            words = label if i == 0 else None
            left.plot(CALLS, result[f"{name}_errors"], "o-", color=f"C{number}", lw=1, label=words)
    left.set(
        xscale="log", yscale="log", xlabel="calls of the network", ylabel="error (rms a pixel)"
    )
    left.set_xticks(CALLS, CALLS)
    left.minorticks_off()
    left.legend(loc="upper right", fontsize=10)

    names = ("1st order,\n15 calls", "2nd order,\n15 calls", "many calls", "memory")
    rows = len(names)
    pixels = torch.tensor(results[0]["pictures"]).view(rows, SHOWN, SIDE, SIDE)
    sheet = pixels.permute(0, 2, 1, 3).reshape(rows * SIDE, SHOWN * SIDE)
    right.imshow(100 - sheet, cmap="gray", vmin=0, vmax=100)
    right.set_yticks([SIDE * (row + 0.5) for row in range(rows)], names)
    right.set_xticks([])
    right.set_xlabel("samples from the same noise")
    right.grid(False)
