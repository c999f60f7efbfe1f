"""How fast the U-Net of diffusion trains and samples beside two other libraries'.

    python benchmarks/diffusion.py train [--channels 1] [--batch 32] [--repeats 3]
    python benchmarks/diffusion.py sample [--channels 1] [--batch 16] [--steps 20] [--repeats 3]

train: images/s of whole training steps: noise added to pictures of 32 x 32, forward, the mean
squared error of v, backward, fused AdamW. sample: images/s from noise by DDIM, one call of the
network a step. float32, and bfloat16 by autocast; all in this process by turns; medians, and
tinyfm's over that of the faster peer.

    tinyfm       the ddpm preset's model, which works on patches of 2 x 2 pixels: Diffusion.loss and
                 Diffusion.sample
    same         the same without patches, for the network of diffusers
    diffusers    UNet2DModel, that network with the same weights; DDIMScheduler's add_noise and
                 get_velocity as its training example uses them; DDIMPipeline
    lucidrains   denoising-diffusion-pytorch: Unet of its own design (RMSNorm, linear attention at
                 the upper levels) with the same channels and levels; GaussianDiffusion

So "same" is about the code alone, tinyfm about what one trains with so many parameters, equal to
5%, which is checked. All predict v on the cosine schedule of 1,000 levels, with untrained weights;
freed memory is kept, as in train.py.

    pip install "diffusers>=0.35" && pip install --no-deps denoising-diffusion-pytorch

installs them. The dependencies left out serve its trainer; here empty modules stand in for them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import MagicMock

os.environ["TQDM_DISABLE"] = "1"  # lucidrains' sampler draws a bar, which takes time

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from generation import by_turns, processor

from tinyfm.common import device
from tinyfm.ddpm import Diffusion, DiffusionConfig
from tinyfm.recipes.registry import get_preset

OF_ITS_TRAINER = (
    "accelerate", "ema_pytorch", "pytorch_fid", "pytorch_fid.fid_score", "pytorch_fid.inception",
    "scipy", "scipy.optimize", "torchvision",
)  # fmt: skip
Models, Runs = dict[str, object], dict[str, Callable[[], object]]


def lucidrains(config: DiffusionConfig, steps: int) -> torch.nn.Module:
    absent = {name: MagicMock() for name in OF_ITS_TRAINER if name not in sys.modules}
    sys.modules.update(absent)
    try:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    except ImportError as error:
        raise SystemExit(f"{error}: pip install --no-deps denoising-diffusion-pytorch") from None
    for name in absent:
        del sys.modules[name]
    mults = tuple(width // config.channels[0] for width in config.channels)
    return GaussianDiffusion(
        Unet(dim=config.channels[0], dim_mults=mults, channels=config.in_channels),
        image_size=config.image_size, timesteps=config.diffusion_steps, sampling_timesteps=steps,
        objective="pred_v", beta_schedule="cosine", auto_normalize=False,
    )  # fmt: skip


def build(channels: int, steps: int) -> Models:
    """Models by name; diffusers' is a pipeline with the weights of "same"."""
    config = replace(get_preset("ddpm").run.model, in_channels=channels)
    same = Diffusion(replace(config, patch_size=1))
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    with TemporaryDirectory() as folder:
        same.save_pretrained(folder)
        unet = UNet2DModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = DDIMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return {"tinyfm": Diffusion(config), "same": same, "diffusers": pipeline,
            "lucidrains": lucidrains(config, steps)}  # fmt: skip


def network(model: object) -> torch.nn.Module:
    return model.unet if hasattr(model, "unet") else model.model


def under(dtype: torch.dtype, run: Callable[[], object]) -> Callable[[], object]:
    def cast() -> object:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return run()

    return cast


def training(models: Models, images: torch.Tensor, dtype: torch.dtype) -> Runs:
    """A step of each. tinyfm draws noise from a generator a row, the others from torch's own."""
    unet, scheduler = models["diffusers"].unet, models["diffusers"].scheduler
    S, batch = scheduler.config.num_train_timesteps, {"images": images}
    generators = [torch.Generator().manual_seed(row) for row in range(len(images))]

    def diffusers_loss() -> torch.Tensor:
        noise, t = torch.randn_like(images), torch.randint(0, S, (len(images),))
        y = unet(scheduler.add_noise(images, noise, t), t).sample
        target = scheduler.get_velocity(images, noise, t)
        return torch.nn.functional.mse_loss(y.float(), target)

    def step(name: str, loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
        parameters = network(models[name]).train().parameters()
        optimizer, forward = torch.optim.AdamW(parameters, lr=1e-4, fused=True), under(dtype, loss)

        def run() -> None:
            forward().backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    return {
        "tinyfm": step("tinyfm", lambda: models["tinyfm"].loss(batch, generators)[0]),
        "same": step("same", lambda: models["same"].loss(batch, generators)[0]),
        "diffusers": step("diffusers", diffusers_loss),
        "lucidrains": step("lucidrains", lambda: models["lucidrains"](images)),
    }


def sampling(models: Models, batch: int, steps: int, dtype: torch.dtype) -> Runs:
    for model in models.values():
        network(model).eval()
    pipeline = models["diffusers"]
    runs = {
        "tinyfm": lambda: models["tinyfm"].sample(batch, steps),
        "same": lambda: models["same"].sample(batch, steps),
        "diffusers": lambda: pipeline(batch, num_inference_steps=steps, output_type="pt"),
        "lucidrains": lambda: models["lucidrains"].sample(batch),
    }
    return {name: under(dtype, run) for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "sample"))
    parser.add_argument("--channels", type=int, default=1, choices=(1, 3), help="grey or colour")
    parser.add_argument("--batch", type=int, default=0, help="images; 32, or 16 for sample")
    parser.add_argument("--steps", type=int, default=20, help="network calls of a sample")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds; medians are shown")
    args = parser.parse_args()
    batch = args.batch or (32 if args.what == "train" else 16)
    torch.manual_seed(0)
    device.keep_freed_memory()
    models = build(args.channels, args.steps)
    sizes = {k: sum(p.numel() for p in network(model).parameters()) for k, model in models.items()}
    print(f"{date.today()}, {processor()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}")  # fmt: skip
    how = f"{args.steps} steps, " if args.what == "sample" else ""
    print(f"{args.what}: {batch} images of {args.channels} x 32 x 32, {how}{args.repeats} repeats")
    print("parameters: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    if max(sizes.values()) > 1.05 * min(sizes.values()):
        raise SystemExit("the networks differ by more than 5% in size: no comparison")
    images = torch.rand(batch, args.channels, 32, 32) * 2 - 1
    for dtype in (torch.float32, torch.bfloat16):
        if args.what == "train":
            runs = training(models, images, dtype)
        else:
            runs = sampling(models, batch, args.steps, dtype)
        rates = {name: batch / took for name, took in by_turns(runs, args.repeats).items()}
        best = max(("diffusers", "lucidrains"), key=rates.get)
        shown = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
        ratios = ", ".join(
            f"{name} {rates[name] / rates[best]:.2f}x" for name in ("tinyfm", "same")
        )
        print(f"{dtype}: {shown} images/s: {ratios} {best}", flush=True)


if __name__ == "__main__":
    main()
