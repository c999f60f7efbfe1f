"""Pictures step by step: the film of a sampler, and the way from one picture to another.

A sampler changes noise into a picture. After each step there are two pictures to look at: the
state, which still has noise in it, and the model's estimate of the end, which has none. Both are
yielded, so that a page can show them while the sampler runs.

Letters: B pictures, C channels, H W rows and columns, Z latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyfm.autoencoder import Autoencoder
from tinyfm.common.seeds import row_generators
from tinyfm.ddpm import Denoise, Diffusion, gaussian_noise
from tinyfm.text2image import TextToImage


class Moment(NamedTuple):
    """A drawing after `step` of `steps` steps. Pictures are (1, C, H, W) in [-1, 1]."""

    step: int
    steps: int
    state: Tensor
    estimate: Tensor  # of the finished picture; before the first step the state


class Watched:
    """A denoiser that remembers its last estimate of x_0."""

    def __init__(self, denoise: Denoise):
        self.denoise = denoise
        self.estimate = None

    def __call__(self, x: Tensor, t: float, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        x0, eps = self.denoise(x, t, alpha, sigma)
        self.estimate = x0
        return x0, eps


def sample_film(model: Diffusion, steps: int, sampler: str, seed: int) -> Iterator[Moment]:
    """Moments of `sample.py RUN -n 1 --film`, from noise to picture.

    Raises ValueError as Diffusion.path does.
    """
    config = model.config
    generators = row_generators(seed, 0, range(1))
    path = model.path(steps, sampler)
    denoise = Watched(model.denoiser())
    shape = (config.in_channels, config.image_size, config.image_size)
    x = gaussian_noise(generators, shape).to(next(model.parameters()).device)
    yield Moment(0, steps, x, x)
    states = model.sampler_states(sampler, denoise, x, path, generators)
    for step, state in enumerate(states, 1):
        yield Moment(step, steps, state, denoise.estimate)


def prompt_film(
    model: TextToImage, prompt: str, steps: int, guidance: float, sampler: str, seed: int, **given
) -> Iterator[Moment]:
    """Moments of `sample.py RUN --prompt PROMPT -n 1`; the last state is what that draws.

    given: init_images, mask and strength, as for TextToImage.generate. Raises ValueError as it
    does.
    """
    generators = row_generators(seed, 0, range(1))
    plan = model.plan([prompt], None, steps, guidance, sampler, generators=generators, **given)
    denoise = Watched(plan.denoise)
    steps = len(plan.path) - 1  # fewer than asked for, where a given picture is changed
    start = model.decode(plan.x)
    yield Moment(0, steps, start, start)
    states = model.diffusion.sampler_states(sampler, denoise, plan.x, plan.path, generators)
    for step, state in enumerate(states, 1):
        if step == steps:
            state = plan.correct_x0(state)
        shown = model.decode(state)
        if step == steps:
            shown = plan.correct_images(shown)
        yield Moment(step, steps, shown, model.decode(denoise.estimate))


@torch.inference_mode()
def walk(model: Autoencoder | TextToImage, first: Tensor, last: Tensor, n: int) -> Tensor:
    """n pictures (n, C, H, W) on the straight way between the latents of two pictures.

    first, last: (1, C, H, W) in [-1, 1]. The ends are the reconstructions of the two.
    """
    autoencoder: Any = getattr(model, "autoencoder", model)
    device = next(autoencoder.parameters()).device
    latents, _ = autoencoder.encode(torch.cat((first, last)).to(device))
    share = torch.linspace(0, 1, n, device=device)[:, None, None, None]
    between = torch.lerp(latents[:1].float(), latents[1:].float(), share)
    return autoencoder.decode(between).float().clamp(-1, 1).cpu()
