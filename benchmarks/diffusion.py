"""How fast the U-Net of diffusion trains and samples beside two other libraries'.

    python benchmarks/diffusion.py train [--channels 1] [--batch 32] [--repeats 3]
    python benchmarks/diffusion.py sample [--channels 1] [--batch 16] [--steps 20] [--repeats 3]

train: images/s of whole training steps: noise added to pictures of 32 x 32, forward, the mean
squared error of v, backward, fused AdamW. sample: images/s from noise by DDIM, one call of the
network a step. float32, and bfloat16 by autocast; all in this process by turns; medians, and
tinyfm's over that of the faster peer.

    tinyfm       the ddpm preset's model: Diffusion.loss and Diffusion.sample
    diffusers    UNet2DModel, the same network with the same weights; DDIMScheduler's add_noise and
                 get_velocity as its training example uses them; DDIMPipeline
    lucidrains   denoising-diffusion-pytorch: Unet of its own design (RMSNorm, linear attention at
                 the upper levels) with the same channels and levels; GaussianDiffusion

So diffusers has equal layers, lucidrains equal parameters to 5%, which is checked. All predict v on
the cosine schedule of 1,000 levels, with untrained weights; freed memory is kept, as in train.py.

    pip install "diffusers>=0.35" && pip install --no-deps denoising-diffusion-pytorch

installs them. The dependencies left out serve its trainer; here empty modules stand in for them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import MagicMock

os.environ["TQDM_DISABLE"] = "1"  # lucidrains' sampler draws a bar, which takes time

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from generation import by_turns, processor

from tinyfm import machine
from tinyfm.ddpm import Diffusion, DiffusionConfig
from tinyfm.presets import get_preset

OF_ITS_TRAINER = (
    "accelerate", "ema_pytorch", "pytorch_fid", "pytorch_fid.fid_score", "pytorch_fid.inception",
    "scipy", "scipy.optimize", "torchvision",
)  # fmt: skip
Runs = dict[str, Callable[[], object]]


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


def build(channels: int, steps: int) -> tuple[Diffusion, torch.nn.Module, object]:
    """tinyfm's model, lucidrains', and a pipeline of diffusers with the weights of the first."""
    config = DiffusionConfig(**{**vars(get_preset("ddpm").run.model), "in_channels": channels})
    ours, theirs = Diffusion(config), lucidrains(config, steps)
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    with TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        unet = UNet2DModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = DDIMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return ours, theirs, pipeline


def under(dtype: torch.dtype, run: Callable[[], object]) -> Callable[[], object]:
    def cast() -> object:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return run()

    return cast


def training(ours, theirs, pipeline, images: torch.Tensor, dtype: torch.dtype) -> Runs:
    """A step of each. tinyfm draws noise from a generator a row, the others from torch's own."""
    unet, scheduler, S = pipeline.unet, pipeline.scheduler, ours.config.diffusion_steps
    generators = [torch.Generator().manual_seed(row) for row in range(len(images))]

    def diffusers_loss() -> torch.Tensor:
        noise, t = torch.randn_like(images), torch.randint(0, S, (len(images),))
        y = unet(scheduler.add_noise(images, noise, t), t).sample
        target = scheduler.get_velocity(images, noise, t)
        return torch.nn.functional.mse_loss(y.float(), target)

    def step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)
        forward = under(dtype, loss)

        def run() -> None:
            forward().backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    return {
        "tinyfm": step(ours, lambda: ours.loss({"images": images}, generators)[0]),
        "diffusers": step(unet, diffusers_loss),
        "lucidrains": step(theirs, lambda: theirs(images)),
    }


def sampling(ours, theirs, pipeline, batch: int, steps: int, dtype: torch.dtype) -> Runs:
    for model in (ours, theirs, pipeline.unet):
        model.eval()
    runs = {
        "tinyfm": lambda: ours.sample(batch, steps),
        "diffusers": lambda: pipeline(batch, num_inference_steps=steps, output_type="pt"),
        "lucidrains": lambda: theirs.sample(batch),
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
    machine.keep_freed_memory()
    ours, theirs, pipeline = models = build(args.channels, args.steps)
    networks = {"tinyfm": ours.unet, "diffusers": pipeline.unet, "lucidrains": theirs.model}
    sizes = {k: sum(p.numel() for p in network.parameters()) for k, network in networks.items()}
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
            runs = training(*models, images, dtype)
        else:
            runs = sampling(*models, batch, args.steps, dtype)
        rates = {name: batch / took for name, took in by_turns(runs, args.repeats).items()}
        best = max(("diffusers", "lucidrains"), key=rates.get)
        shown = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
        print(f"{dtype}: {shown} images/s: {rates['tinyfm'] / rates[best]:.2f}x {best}")


if __name__ == "__main__":
    main()
