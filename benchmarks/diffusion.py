"""Compare the speed of the diffusion U-Net with two other libraries: training and sampling.

    python benchmarks/diffusion.py train [--channels 1] [--batch 32] [--repeats 3]
    python benchmarks/diffusion.py sample [--channels 1] [--batch 16] [--steps 20] [--repeats 3]

train: images/s of whole training steps on pictures of 32 x 32: noise is added, then forward pass,
mean squared error of v, backward pass, fused AdamW; nothing is compiled. sample: images/s from
noise by DDIM, with one call of the network per step. Both in float32, and in bfloat16 by autocast.
All models take turns in this process; the medians are printed, and our rates over that of the
faster peer.

    same         the network of diffusers, which has no patches, by Diffusion.loss and .sample
    patches      the model of the ddpm preset, which works on patches of 2 x 2 pixels
    preset       the same, trained as the preset trains it: Muon for matrices and kernels, AdamW for
                 the rest, clipping, and a moving average of the weights
    diffusers    UNet2DModel, with the weights of "same"; trained with DDIMScheduler's add_noise and
                 get_velocity, as its example does, and sampled by DDIMPipeline
    lucidrains   denoising-diffusion-pytorch: a Unet of another design (RMSNorm, linear attention
                 at the upper levels) with the same channels and levels, in GaussianDiffusion

So "same" compares the code alone, "patches" a network with about as many parameters, and "preset"
what a user of train.py gets. The script checks that the numbers of parameters are within 5%. All
models predict v on the cosine schedule of 1,000 levels and have untrained weights. Freed memory is
kept, as in train.py.

    pip install "diffusers>=0.35" && pip install --no-deps denoising-diffusion-pytorch

installs the peers. The second one needs its dependencies for its trainer alone, so they are left
out, and empty modules replace them here.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import MagicMock

os.environ["TQDM_DISABLE"] = "1"  # the progress bar of lucidrains' sampler takes time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from timing import Work, by_turns, describe_machine, training_step

from tinyfm.common import device
from tinyfm.ddpm import Diffusion, DiffusionConfig
from tinyfm.recipes.registry import find_preset
from tinyfm.training.optim import EMA, build_optimizers, scale_and_clip

NEEDED_BY_ITS_TRAINER = (
    "accelerate",
    "ema_pytorch",
    "pytorch_fid",
    "pytorch_fid.fid_score",
    "pytorch_fid.inception",
    "scipy",
    "scipy.optimize",
    "torchvision",
)
PEERS = ("diffusers", "lucidrains")
Models = dict[str, object]


# ---- the models ---------------------------------------------------------------------------------


def build_lucidrains(config: DiffusionConfig, steps: int) -> torch.nn.Module:
    """Its model with the channels and levels of `config`, which samples in `steps` steps."""
    replaced = {name: MagicMock() for name in NEEDED_BY_ITS_TRAINER if name not in sys.modules}
    sys.modules.update(replaced)
    try:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    except ImportError as error:
        advice = "pip install --no-deps denoising-diffusion-pytorch"
        raise SystemExit(f"{error}: {advice}") from None
    for name in replaced:
        del sys.modules[name]
    width = config.channels[0]
    unet = Unet(
        dim=width,
        dim_mults=tuple(channels // width for channels in config.channels),
        channels=config.in_channels,
    )
    return GaussianDiffusion(
        unet,
        image_size=config.image_size,
        timesteps=config.diffusion_steps,
        sampling_timesteps=steps,
        objective="pred_v",
        beta_schedule="cosine",
        auto_normalize=False,
    )


def build_models(channels: int, steps: int) -> Models:
    """Models by name; that of diffusers is a pipeline with the weights of "same"."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    config = replace(find_preset("ddpm").run.model, in_channels=channels)
    same = Diffusion(replace(config, patch_size=1))
    with TemporaryDirectory() as folder:
        same.save_pretrained(folder)
        unet = UNet2DModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = DDIMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return {
        "same": same,
        "patches": Diffusion(config),
        "preset": Diffusion(config),
        "diffusers": pipeline,
        "lucidrains": build_lucidrains(config, steps),
    }


def network(model: object) -> torch.nn.Module:
    """The U-Net inside a model."""
    return model.unet if hasattr(model, "unet") else model.model


def check_sizes(models: Models) -> None:
    """Print the numbers of parameters; stop if they differ by more than 5%."""
    sizes = {}
    for name, model in models.items():
        sizes[name] = sum(p.numel() for p in network(model).parameters())
    print("parameters: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    if max(sizes.values()) > 1.05 * min(sizes.values()):
        raise SystemExit("the networks differ by more than 5% in size: no comparison")


# ---- what is timed ------------------------------------------------------------------------------


def make_steps(models: Models, images: torch.Tensor, dtype: torch.dtype) -> dict[str, Work]:
    """A training step of each model on `images` (B, C, H, W)."""
    unet = models["diffusers"].unet
    scheduler = models["diffusers"].scheduler
    S = scheduler.config.num_train_timesteps
    B = len(images)
    batch = {"images": images}
    # Ours draws noise from one generator per row, the others from torch's global one.
    generators = [torch.Generator().manual_seed(row) for row in range(B)]

    def own_loss(name: str) -> torch.Tensor:
        loss, _ = models[name].loss(batch, generators)
        return loss

    def diffusers_loss() -> torch.Tensor:
        noise = torch.randn_like(images)
        t = torch.randint(0, S, (B,))
        y = unet(scheduler.add_noise(images, noise, t), t).sample
        target = scheduler.get_velocity(images, noise, t)
        return F.mse_loss(y.float(), target)

    losses = {
        "same": lambda: own_loss("same"),
        "patches": lambda: own_loss("patches"),
        "diffusers": diffusers_loss,
        "lucidrains": lambda: models["lucidrains"](images),
    }
    steps = {}
    for name, loss_of in losses.items():
        parameters = network(models[name]).train().parameters()
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        steps[name] = training_step(loss_of, [optimizer], dtype)
    steps["preset"] = preset_step(models["preset"], lambda: own_loss("preset"), dtype)
    return steps


def preset_step(model: Diffusion, loss_of: Callable[[], torch.Tensor], dtype: torch.dtype) -> Work:
    """A training step with the optimizers of the ddpm preset."""
    optim = find_preset("ddpm").run.optim
    optimizers = build_optimizers(model.train(), optim)
    average = EMA(model, optim.ema_half_life)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        scale_and_clip(model, 1.0, optim.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(model, step=0)

    return step


def make_samplers(models: Models, batch: int, steps: int, dtype: torch.dtype) -> dict[str, Work]:
    """A function for each model that draws `batch` pictures."""
    for model in models.values():
        network(model).eval()
    pipeline = models["diffusers"]
    samplers = {
        "same": lambda: models["same"].sample(batch, steps),
        "patches": lambda: models["patches"].sample(batch, steps),
        "diffusers": lambda: pipeline(batch, num_inference_steps=steps, output_type="pt"),
        "lucidrains": lambda: models["lucidrains"].sample(batch),
    }
    return {name: with_autocast(sample, dtype) for name, sample in samplers.items()}


def with_autocast(sample: Callable[[], object], dtype: torch.dtype) -> Work:
    """The function, with matrix products in `dtype`."""

    def cast() -> object:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return sample()

    return cast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "sample"), help="what to measure")
    parser.add_argument("--channels", type=int, default=1, choices=(1, 3), help="grey or colour")
    parser.add_argument("--batch", type=int, default=0, help="images; default: 32 or, sample, 16")
    parser.add_argument("--steps", type=int, default=20, help="network calls of a sample")
    parser.add_argument("--repeats", type=int, default=3, help="number of timed rounds")
    options = parser.parse_args()
    training = options.what == "train"
    batch = options.batch or (32 if training else 16)
    torch.manual_seed(0)
    device.keep_freed_memory()
    models = build_models(options.channels, options.steps)

    print(describe_machine())
    images = f"{batch} images of {options.channels} x 32 x 32"
    steps = "" if training else f"{options.steps} steps, "
    print(f"{options.what}: {images}, {steps}{options.repeats} repeats")
    check_sizes(models)

    images = torch.rand(batch, options.channels, 32, 32) * 2 - 1
    for dtype in (torch.float32, torch.bfloat16):
        if training:
            works = make_steps(models, images, dtype)
        else:
            works = make_samplers(models, batch, options.steps, dtype)
        times = by_turns(works, options.repeats)
        rates = {name: batch / elapsed for name, elapsed in times.items()}
        best = max(PEERS, key=rates.get)
        shown = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
        own = [name for name in rates if name not in PEERS]
        ratios = [f"{name} {rates[name] / rates[best]:.2f}x" for name in own]
        print(f"{dtype}: {shown} images/s: {', '.join(ratios)} {best}", flush=True)


if __name__ == "__main__":
    main()
