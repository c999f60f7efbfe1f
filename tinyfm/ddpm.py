"""Diffusion: learn to take noise away, then begin with nothing but noise.

A picture x_0 is drowned in Gaussian noise eps. At level t of it, in one step from the picture,

    x_t = alpha_t x_0 + sigma_t eps        (Ho et al. 2020, eq. 4: alpha_t^2 = alpha_bar_t)

with alpha falling from 1 to about 0 and sigma rising from 0 to about 1: alpha^2 + sigma^2 = 1. A
network sees x_t and t and predicts y = a x_0 + b eps, some fixed mixture of what went in:

    eps   y = eps                          Ho et al. 2020, eq. 14: the mean of |eps - y|^2
    x0    y = x_0
    v     y = alpha eps - sigma x_0        Salimans & Ho 2022, appendix D
    flow  y = eps - x_0                    Lipman et al. 2023: where alpha = 1 - t, sigma = t

From x_t and y both x_0 and eps follow: two equations, two unknowns. So a prediction is an estimate
of the clean picture, and a sampler walks from sigma = 1 to 0 by it: estimate x_0 and eps, mix them
again with less noise, look again. Samplers differ in that mixture alone, and know of a model only
denoise(x, t, alpha, sigma) -> (x_0, eps). A text steers by guidance (Ho & Salimans 2022): predict
with and without it, and go further along the difference.

Letters: B batch, C channels, H W rows and columns, S diffusion steps, T rows and E width of a
context. Pictures are in [-1, 1], or are latents of about unit variance. Left out: learned
variances, schedules that end without any signal, stochastic solvers of higher order.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from tinyfm.unet import UNet, UNetConfig, check_images


@dataclass(frozen=True)
class DiffusionConfig(UNetConfig):
    """The network's fields, and these."""

    diffusion_steps: int = 1000  # levels of noise in training
    schedule: Literal["cosine", "linear", "scaled_linear"] = "cosine"  # how noise grows; not flow
    beta_start: float = 1e-4  # first step's added variance; not for cosine
    beta_end: float = 0.02  # last step's
    prediction: Literal["eps", "x0", "v", "flow"] = "v"  # what the network names
    min_snr: float = 0.0  # cap on the loss's weight by signal-to-noise ratio; 0 = simple loss
    context_dropout: float = 0.1  # share of contexts left out in training, for guidance
    learned_null: bool = True  # learn what stands in for them; False: null_context is given
    clip: bool = True  # estimates of x_0 stay in [-1, 1]; False for latents
    spacing: Literal["trailing", "leading", "linspace"] = "trailing"  # which steps a sampler takes
    offset: int = 0  # added to them if leading
    end_clean: bool = True  # DDIM ends at no noise at all; False: at that of step 0
    variance: Literal["small", "large"] = "small"  # of DDPM's steps (Ho et al. 2020, section 3.2)

    def __post_init__(self):
        super().__post_init__()
        for name, kind in get_type_hints(DiffusionConfig).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {get_args(kind)}")
        most = {"beta_start": self.beta_end, "beta_end": 1, "context_dropout": 1}
        for name in (*most, "diffusion_steps", "offset", "min_snr"):
            low, high = int(name == "diffusion_steps"), most.get(name, math.inf)
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; use {low} to {high}")
        if self.min_snr and self.prediction == "flow":
            raise ValueError(f"min_snr is {self.min_snr}; a flow is weighted evenly, use 0")
        if self.out_channels not in (0, self.in_channels):
            raise ValueError(f"out_channels is {self.out_channels}; it must be in_channels, or 0")


# ---- schedules ----------------------------------------------------------------------------------


def linear_betas(S: int, start: float, end: float) -> Tensor:
    """Variance that each of S steps adds, (S,) float64 (Ho et al. 2020, section 4)."""
    return torch.linspace(start, end, S, dtype=torch.float64)


def scaled_linear_betas(S: int, start: float, end: float) -> Tensor:
    """Linear in the standard deviation instead; Stable Diffusion's (Rombach et al. 2022)."""
    return linear_betas(S, start**0.5, end**0.5).square()


def cosine_betas(S: int) -> Tensor:
    """So that alpha_bar falls as cos^2, slowly at both ends (Nichol & Dhariwal 2021, eq. 17)."""
    progress = torch.arange(S + 1, dtype=torch.float64) / S
    alpha_bar = torch.cos((progress + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def alpha_bars(config: DiffusionConfig) -> Tensor:
    """Share of the variance that is still picture at step 0 .. S - 1, (S,) float64."""
    S, start, end = config.diffusion_steps, config.beta_start, config.beta_end
    if config.schedule == "cosine":
        return (1 - cosine_betas(S)).cumprod(0)
    betas = linear_betas if config.schedule == "linear" else scaled_linear_betas
    return (1 - betas(S, start, end)).cumprod(0)


def level(config: DiffusionConfig, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(t, alpha, sigma), (B,) float64, at shares of the way to noise, (B,) in [0, 1)."""
    S = config.diffusion_steps
    if config.prediction == "flow":
        return S * share, 1 - share, share
    t = (S * share).long()
    alpha_bar = alpha_bars(config)[t]
    return t.double(), alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


# ---- the forward process, and what is predicted of it -------------------------------------------


def q_sample(x0: Tensor, eps: Tensor, alpha, sigma) -> Tensor:
    """The picture x0 with noise eps in it; alpha and sigma are numbers or (B, 1, 1, 1)."""
    return alpha * x0 + sigma * eps


def mixture(prediction: str, alpha, sigma) -> tuple:
    """(a, b) of y = a x_0 + b eps: what a network of this kind names."""
    return {"eps": (0, 1), "x0": (1, 0), "v": (-sigma, alpha), "flow": (-1, 1)}[prediction]


def target(prediction: str, x0: Tensor, eps: Tensor, alpha, sigma) -> Tensor:
    """The y that a perfect network would give."""
    a, b = mixture(prediction, alpha, sigma)
    return a * x0 + b * eps


def separate(prediction: str, y: Tensor, x_t: Tensor, alpha, sigma) -> tuple[Tensor, Tensor]:
    """(x_0, eps) from x_t = alpha x_0 + sigma eps and y = a x_0 + b eps, by Cramer's rule."""
    a, b = mixture(prediction, alpha, sigma)
    determinant = alpha * b - sigma * a  # alpha, -sigma, 1, 1
    return (b * x_t - sigma * y) / determinant, (alpha * y - a * x_t) / determinant


def min_snr_weight(prediction: str, snr: Tensor, gamma: float) -> Tensor:
    """Weight of |y - target|^2 that counts errors of x_0 by min(SNR, gamma) (Hang et al. 2023).

    SNR = alpha^2 / sigma^2. Without the cap, nearly clean pictures would outweigh all others.
    """
    error_of_x0 = {"x0": 1.0, "eps": 1 / snr, "v": 1 / (snr + 1)}[prediction]
    return snr.clamp(max=gamma) * error_of_x0


# ---- the way back -------------------------------------------------------------------------------

Denoise = Callable[[Tensor, float, float, float], tuple[Tensor, Tensor]]
Path = list[tuple[float, float, float]]  # (t, alpha, sigma) at each stop, the last being the end
Noise = Callable[[], Tensor]  # standard normal in the shape of x, another at each call
States = Iterator[Tensor]  # x after every step


def timesteps(S: int, steps: int, spacing: str, offset: int = 0) -> list[int]:
    """Which of S levels a sampler of so many steps stops at, from noise to picture.

    trailing starts at the last level, leading ends at `offset`, linspace does both (Lin et al.
    2024, table 2). Raises ValueError for more steps than there are levels.
    """
    most = S - offset if spacing == "leading" else S
    if not 1 <= steps <= most:
        raise ValueError(f"{steps} steps do not fit a schedule of {S}; use 1 to {most}")
    if spacing == "trailing":
        return [round(S - i * (S / steps)) - 1 for i in range(steps)]
    if spacing == "leading":
        return [min(S - 1, i * (S // steps) + offset) for i in reversed(range(steps))]
    return [round(i * ((S - 1) / max(1, steps - 1))) for i in reversed(range(steps))]


def gaussian_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal (B, *shape), row i from generators[i]: no row depends on the others."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])


def ddim(denoise: Denoise, x: Tensor, path: Path, noise: Noise, eta: float = 0.0) -> States:
    """Song et al. 2021, eq. 12 and 16: x_0 and eps mixed anew; a share of eps is fresh.

    eta = 0 draws nothing: the same noise always becomes the same picture. eta = 1 is DDPM.
    """
    for (t, alpha, sigma), (_, alpha_next, sigma_next) in pairwise(path):
        x0, eps = denoise(x, t, alpha, sigma)
        added = max(0.0, sigma**2 - (alpha / alpha_next * sigma_next) ** 2)
        fresh = eta * sigma_next / sigma * math.sqrt(added)
        x = alpha_next * x0 + math.sqrt(max(0.0, sigma_next**2 - fresh**2)) * eps
        if fresh > 0:
            x = x + fresh * noise()
        yield x


def ddpm(denoise: Denoise, x: Tensor, path: Path, noise: Noise, variance="small") -> States:
    """Ancestral sampling: draw from q(x_next | x_t, x_0), a known Gaussian (Ho et al. 2020, eq. 7).

    `added` is the variance by which the forward process leads from the next level to this one;
    variance "large" adds all of it back, the upper bound. The last step adds no noise.
    """
    for (t, alpha, sigma), (_, alpha_next, sigma_next) in pairwise(path):
        x0, _ = denoise(x, t, alpha, sigma)
        kept = alpha / alpha_next
        added = sigma**2 - (kept * sigma_next) ** 2
        x = (kept * sigma_next**2 * x + alpha_next * added * x0) / sigma**2
        if sigma_next > 0:
            x = x + math.sqrt(added) * (1 if variance == "large" else sigma_next / sigma) * noise()
        yield x


def dpm(denoise: Denoise, x: Tensor, path: Path, noise: Noise) -> States:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): DDIM, but x_0 goes on as it last changed.

    It is a line in lambda = ln(alpha / sigma), a second order at no cost in network calls. The last
    step, to lambda = inf, is DDIM's. Draws nothing.
    """
    before, h_before = None, math.inf
    for (t, alpha, sigma), (_, alpha_next, sigma_next) in pairwise(path):
        x0, _ = denoise(x, t, alpha, sigma)
        h, ahead = math.inf, x0
        if alpha > 0 and sigma_next > 0:
            h = math.log(alpha_next / sigma_next) - math.log(alpha / sigma)
            if before is not None:
                ahead = x0 + (h / h_before / 2) * (x0 - before)
        x = sigma_next / sigma * x + (alpha_next - alpha * sigma_next / sigma) * ahead
        before, h_before = x0, h
        yield x


# ---- flow matching: the straight path -----------------------------------------------------------
# With alpha = 1 - t and sigma = t, x_t moves on a straight line from picture to noise, at the
# velocity dx/dt = eps - x_0, and sampling integrates the velocity that the network names from t = 1
# to 0. All of the above holds here too; DDIM is Euler's rule, x_next = x + (t_next - t) dx/dt.


def flow_path(S: int, steps: int) -> Path:
    """Equal steps of time from 1 to 0. The network is told S t, as if there were S levels."""
    return [(S * t, 1 - t, t) for t in (1 - i / steps for i in range(steps + 1))]


def heun(denoise: Denoise, x: Tensor, path: Path, noise: Noise) -> States:
    """Go on at the mean of the velocities here and where Euler would arrive: second order, for two
    network calls a step; but one in the last, as the network was not trained at t = 0."""
    for (t, alpha, sigma), (t_next, alpha_next, sigma_next) in pairwise(path):
        velocity = (x - denoise(x, t, alpha, sigma)[0]) / sigma  # that is eps - x_0
        if sigma_next > 0:
            arrived = x + (sigma_next - sigma) * velocity
            x0, _ = denoise(arrived, t_next, alpha_next, sigma_next)
            velocity = (velocity + (arrived - x0) / sigma_next) / 2
        x = x + (sigma_next - sigma) * velocity
        yield x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm, "euler": ddim, "heun": heun}


# ---- the model ----------------------------------------------------------------------------------


class Diffusion(nn.Module):
    """A U-Net, the noise it is trained against, and the ways to sample from it."""

    outer = ()  # no tables: all matrices lie between hidden states

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.config, self.unet = config, UNet(config)
        if config.d_context and config.learned_null:
            self.null_context = nn.Parameter(torch.zeros(config.d_context))

    def path(self, steps: int, sampler: str = "ddim") -> Path:
        """Where `sampler` stops. ValueError for one, or for steps, that the model does not have."""
        c, S = self.config, self.config.diffusion_steps
        if sampler not in SAMPLERS:
            raise ValueError(f"there is no sampler {sampler!r}; use one of {', '.join(SAMPLERS)}")
        if sampler in ("euler", "heun") and c.prediction != "flow":
            raise ValueError(f"{sampler} follows a flow; this model predicts {c.prediction}")
        extra = sampler == "dpm++" and c.spacing != "trailing"  # as published, with a stop at 0
        levels = timesteps(S, steps + extra, c.spacing, c.offset)[:steps]
        if c.prediction == "flow":
            return flow_path(S, steps)
        table = alpha_bars(c).tolist()
        stops = [(t, math.sqrt(table[t]), math.sqrt(1 - table[t])) for t in levels]
        end = 1.0 if c.end_clean or sampler != "ddim" else table[0]
        return [*stops, (0, math.sqrt(end), math.sqrt(1 - end))]

    def null(self, context: Tensor, given: Tensor | None) -> Tensor:
        """What stands in for a context, in its shape: learned, or given, as an empty text's."""
        if given is None and not self.config.learned_null:
            raise ValueError("this model learned no null_context; give one, (1 or B, T, E)")
        return (self.null_context if given is None else given).to(context).expand_as(context)

    def loss(self, batch: dict[str, Tensor], generators: Sequence[torch.Generator]):
        """Mean of |y - target|^2 over batch["images"] (B, C, H, W), float32: (loss, metrics).

        A model with d_context needs batch["context"] (B, T, E), and without learned_null also
        batch["null_context"], which expands to it. Row i draws its level, its noise and whether to
        leave out its context from generators[i], a CPU generator.
        metrics["loss_t0"] .. ["loss_t3"] are the parts of the loss from quarters of the noise
        level, each times 4: over many rows the mean loss there. Their mean is the loss.
        """
        c, x0, context = self.config, batch["images"], batch.get("context")
        check_images(x0.shape, c.in_channels, c.factor)  # before anything is drawn
        share = torch.stack([torch.rand((), generator=g, dtype=torch.double) for g in generators])
        eps = gaussian_noise(generators, x0.shape[1:]).to(x0.device)
        t, alpha, sigma = level(c, share)
        weight = torch.ones_like(t)
        if c.min_snr:
            weight = min_snr_weight(c.prediction, (alpha / sigma).square(), c.min_snr)
        numbers = torch.stack((t, alpha, sigma, weight, (4 * share).floor())).float()
        t, alpha, sigma, weight, quarter = numbers.to(x0.device)[..., None, None, None].unbind()
        if c.d_context and context is not None:
            dropped = torch.stack([torch.rand((), generator=g) for g in generators])
            dropped = (dropped < c.context_dropout).to(x0.device)[:, None, None]
            context = torch.where(dropped, self.null(context, batch.get("null_context")), context)
        y = self.unet(q_sample(x0, eps, alpha, sigma), t.flatten(), context)
        error = (y.float() - target(c.prediction, x0, eps, alpha, sigma)).square()
        rows = (weight * error).mean(dim=(1, 2, 3))  # (B,)
        parts = [4 * (rows.detach() * (quarter.flatten() == k)).mean() for k in range(4)]
        return rows.mean(), {f"loss_t{k}": part for k, part in enumerate(parts)}

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch as data would give it, of zeros; a context has 77 rows, as CLIP's texts."""
        c = self.config
        batch = {"images": torch.zeros(rows, c.in_channels, c.image_size, c.image_size)}
        given = ("context",) if c.learned_null else ("context", "null_context")
        return batch | {name: torch.zeros(rows, 77, c.d_context) for name in given if c.d_context}

    def denoiser(self, context: Tensor | None = None, guidance: float = 1.0,
                 null_context: Tensor | None = None) -> Denoise:  # fmt: skip
        """denoise(x, t, alpha, sigma) -> (x_0, eps) for contexts (B, T, E).

        The prediction is y_null + guidance (y - y_null): 0 ignores the context, 1 is the plain
        conditional model, more follows the text at the cost of variety.
        """
        c = self.config
        if not 0 <= guidance < math.inf:
            raise ValueError(f"guidance is {guidance}; it must be 0 or above (1 = plain)")
        if guidance != 1 and context is None:
            raise ValueError(f"guidance is {guidance}, but no context was given to follow")
        rows = [context] if guidance else []
        rows += [self.null(context, null_context)] if guidance != 1 else []
        rows = None if context is None else torch.cat(rows)

        def denoise(x: Tensor, t: float, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
            copies = 1 if rows is None else len(rows) // len(x)
            x_t = x.repeat(copies, 1, 1, 1)
            y = self.unet(x_t, torch.full((len(x_t),), float(t), device=x.device), rows).float()
            if copies == 2:
                y, y_null = y.chunk(2)
                y = y_null + guidance * (y - y_null)
            x0, eps = separate(c.prediction, y, x, alpha, sigma)
            return (x0.clamp(-1, 1) if c.clip else x0), eps

        return denoise

    @torch.no_grad()
    def sample(self, start: int | Tensor, steps: int = 50, sampler: str = "ddim",
               guidance: float = 1.0, context: Tensor | None = None,
               generators: Sequence[torch.Generator] | None = None, film: bool = False,
               null_context: Tensor | None = None, eta: float = 0.0) -> Tensor:  # fmt: skip
        """Pictures (B, C, H, W), float32; a film (steps + 1, B, C, H, W) has every x, noise first.

        start: how many, or their noise, of any H and W the network can halve. Sample i draws from
        generators[i], a CPU generator, whatever the batch and the device; without them, torch's
        own seed decides. Raises ValueError for what the model or the schedule cannot do.
        """
        c, count = self.config, start if isinstance(start, int) else len(start)
        if generators is None:
            seeds = [torch.randint(2**62, ()).item() for _ in range(count)]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        contexts = count if context is None else len(context)
        if count < 1 or not count == len(generators) == contexts:
            given = f"{len(generators)} generators and {contexts} contexts"
            raise ValueError(f"{count} samples with {given}: give one of each a sample")
        path, denoise = self.path(steps, sampler), self.denoiser(context, guidance, null_context)
        device, was_training = next(self.parameters()).device, self.training
        shape = (c.in_channels, c.image_size, c.image_size)
        x = gaussian_noise(generators, shape) if isinstance(start, int) else start
        x = x.to(device, torch.float32)
        options = {"ddim": {"eta": eta}, "ddpm": {"variance": c.variance}}.get(sampler, {})
        fresh = lambda: gaussian_noise(generators, x.shape[1:]).to(device)  # noqa: E731
        states = SAMPLERS[sampler](denoise, x, path, fresh, **options)
        self.eval()
        try:
            return torch.stack([x, *states]) if film else deque(states, maxlen=1)[0]
        finally:
            self.train(was_training)

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> Diffusion:
        """Read a folder of diffusers: a U-Net and a scheduler (hub_pipeline.py)."""
        from tinyfm.hub import scheduler

        return scheduler.load(cls, DiffusionConfig, folder, dtype)

    def save_pretrained(self, folder: str, overwrite: bool = False) -> None:
        """Write a folder of diffusers: a U-Net and a scheduler (hub_pipeline.py)."""
        from tinyfm.hub import scheduler

        scheduler.save(self, folder, overwrite)
