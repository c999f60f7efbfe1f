"""Diffusion: learn to remove noise from images, then make new images from noise alone.

The forward process adds Gaussian noise eps to an image x_0. Level t is reached in one step:

    x_t = alpha_t x_0 + sigma_t eps        (Ho et al. 2020, eq. 4: alpha_t^2 = alpha_bar_t)

alpha falls from 1 to about 0 and sigma rises from 0 to about 1; alpha^2 + sigma^2 = 1, but for flow
(see below). A network reads x_t and t and predicts y = a x_0 + b eps, a fixed mixture of image and
noise:

    eps   y = eps                          Ho et al. 2020, eq. 14: the loss is the mean |eps - y|^2
    x0    y = x_0
    v     y = alpha eps - sigma x_0        Salimans & Ho 2022, appendix D
    flow  y = eps - x_0                    flow matching: here alpha = 1 - t, sigma = t

The last line is Esser et al. 2024's. Lipman et al. 2023 (eq. 23) and Liu et al. 2023 count time the
other way, from noise at t = 0 to the image at t = 1, and predict x_0 - eps.

Both x_0 and eps follow from x_t and y: two equations with two unknowns. So every prediction is an
estimate of the clean image. A sampler uses it to move from sigma = 1 to sigma = 0: at each step it
estimates x_0 and eps and mixes them again with less noise. Samplers differ only in this mixture,
and all they need of a model is a function denoise(x, t, alpha, sigma) -> (x_0, eps).

Why a squared error? The aim is a model p that gives real images a high probability. It draws an
image from noise level by level, by steps p(x_s | x_t) from t to the level s below it. If x_0 were
known, Bayes' rule would give this step exactly (Ho et al. 2020, eq. 6 and 7):

    q(x_s | x_t, x_0) = Gaussian, mean u_t x_t + c_t x_0, variance v_t

The model does not know x_0. It takes the same Gaussian with its own estimate X(x_t, t) for x_0. The
variational bound (eq. 5) adds up how far each step is from the exact one:

    -ln p(x_0) <= sum_t E KL(q(x_s | x_t, x_0) || p(x_s | x_t)) + terms for the first and last level

Two Gaussians of equal variance have KL = |difference of their means|^2 / (2 v). The means differ by
c_t (x_0 - X). With SNR = alpha^2 / sigma^2, c_t^2 / v_t is SNR_s - SNR_t (Kingma et al. 2021), so

    KL_t = 1/2 (SNR_s - SNR_t) |x_0 - X(x_t, t)|^2

and the bound is a weighted sum of squared errors. The best X at each level is the mean of all x_0
that lead to x_t, whatever the weights are; a finite network spends its effort where they are large.
The error of eps is SNR_t times that of x_0, so the plain loss on eps gives high noise more weight
than the bound does. Ho et al. 2020 (section 3.4) found that images become better so.

The same from another side: grad ln q(x_t) is called the score, and the mean of eps given x_t is
-sigma_t times the score (Vincent 2011; Song & Ermon 2019). So a step against the predicted noise is
a step to where x_t is more probable.

Guidance makes an image follow a text (Ho & Salimans 2022): predict with and without the text, and
move further along the difference.

Letters: B batch, C channels, H W rows and columns, S diffusion steps, T rows and E width of a
context. Images are in [-1, 1], or are latents of about unit variance. Left out: learned variances,
schedules that end without any signal, stochastic solvers of higher order.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from tinyfm.unet import UNet, UNetConfig, check_images

MAX_ERROR_FACTOR = 1000  # of x_0 over eps, 1 / alpha; 157 for Ho et al. 2020, 15 for Rombach et al.


@dataclass(frozen=True)
class DiffusionConfig(UNetConfig):
    """The fields of the U-Net, and those of the diffusion process."""

    diffusion_steps: int = 1000  # levels of noise in training
    # growth of the noise over the levels; not used by flow
    schedule: Literal["cosine", "linear", "scaled_linear"] = "cosine"
    beta_start: float = 1e-4  # variance added by the first step; not used by cosine
    beta_end: float = 0.02  # variance added by the last step; not used by cosine
    prediction: Literal["eps", "x0", "v", "flow"] = "v"  # quantity that the network predicts
    min_snr: float = 0.0  # cap on the loss's weight by signal-to-noise ratio; 0 = plain loss
    context_dropout: float = 0.1  # share of contexts left out in training, for guidance
    learned_null: bool = True  # learn the empty context; False: the caller gives null_context
    clip: bool = True  # clip estimates of x_0 to [-1, 1]; False for latents
    spacing: Literal["trailing", "leading", "linspace"] = "trailing"  # choice of a sampler's levels
    offset: int = 0  # number added to each level with leading spacing
    end_clean: bool = True  # let DDIM end without noise; False: with the noise of level 0
    variance: Literal["small", "large"] = "small"  # noise of DDPM's steps (Ho et al. 2020, 3.2)

    def __post_init__(self):
        super().__post_init__()
        for name, kind in get_type_hints(DiffusionConfig).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"{name} is {value!r}; use one of {get_args(kind)}")
        self.check_range("beta_start", 0, self.beta_end)
        self.check_range("beta_end", 0, 1)
        self.check_range("context_dropout", 0, 1)
        self.check_range("diffusion_steps", 1)
        self.check_range("offset", 0)
        self.check_range("min_snr", 0)
        if self.min_snr and self.prediction == "flow":
            raise ValueError(f"min_snr is {self.min_snr}; a flow weights all levels alike, use 0")
        if self.out_channels not in (0, self.in_channels):
            raise ValueError(f"out_channels is {self.out_channels}; it must be in_channels, or 0")
        if self.prediction == "eps" and not self.clip and self.spacing != "leading":
            self.check_first_estimate()

    def check_first_estimate(self) -> None:
        """Raise ValueError if a sampler's first estimate of x_0 = (x - sigma eps) / alpha explodes.

        Most samplers start at the last level, where alpha may be so small that the division turns
        the network's errors into thousands. Clipping x_0 hides that.
        """
        factor = alpha_bars(self)[-1].item() ** -0.5
        if factor > MAX_ERROR_FACTOR:
            raise ValueError(
                f"prediction is eps, schedule is {self.schedule} and clip is off: at the last "
                f"level, errors of x_0 are {factor:,.0f} times those of eps; use prediction v, "
                "clip, or spacing leading"
            )

    def check_range(self, name: str, low: float, high: float = math.inf) -> None:
        """Raise ValueError unless a field lies in [low, high]."""
        value = getattr(self, name)
        if not low <= value <= high:
            allowed = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise ValueError(f"{name} is {value}; use {allowed}")


# ---- schedules ----------------------------------------------------------------------------------


def linear_betas(S: int, start: float, end: float) -> Tensor:
    """Variance that each of S steps adds, (S,) float64 (Ho et al. 2020, section 4)."""
    return torch.linspace(start, end, S, dtype=torch.float64)


def scaled_linear_betas(S: int, start: float, end: float) -> Tensor:
    """The same with a linear standard deviation, as in Stable Diffusion (Rombach et al. 2022)."""
    return linear_betas(S, start**0.5, end**0.5).square()


def cosine_betas(S: int) -> Tensor:
    """The same with alpha_bar falling as cos^2 (Nichol & Dhariwal 2021, eq. 17).

    alpha_bar after the share p = 0, 1 / S .. 1 of the steps is cos^2((p + 0.008) / 1.008 pi / 2),
    which falls slowly at both ends. A step's beta is 1 - alpha_bar after it / alpha_bar before it,
    and at most 0.999.
    """
    progress = torch.arange(S + 1, dtype=torch.float64) / S
    alpha_bar = torch.cos((progress + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def alpha_bars(config: DiffusionConfig) -> Tensor:
    """Share of the variance that is signal at levels 0 .. S - 1, (S,) float64."""
    S = config.diffusion_steps
    if config.schedule == "cosine":
        betas = cosine_betas(S)
    elif config.schedule == "linear":
        betas = linear_betas(S, config.beta_start, config.beta_end)
    else:
        betas = scaled_linear_betas(S, config.beta_start, config.beta_end)
    return (1 - betas).cumprod(0)


def level(config: DiffusionConfig, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(t, alpha, sigma) at a share of the way to noise: each (B,) float64, share (B,) in [0, 1)."""
    S = config.diffusion_steps
    if config.prediction == "flow":
        return S * share, 1 - share, share
    t = (S * share).long()
    alpha_bar = alpha_bars(config)[t]
    return t.double(), alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


# ---- the forward process and the predictions ----------------------------------------------------


def q_sample(x0: Tensor, eps: Tensor, alpha, sigma) -> Tensor:
    """x_t: the image x0 with noise eps. alpha and sigma are numbers or (B, 1, 1, 1)."""
    return alpha * x0 + sigma * eps


def mixture(prediction: str, alpha, sigma) -> tuple:
    """(a, b) of y = a x_0 + b eps, the quantity that the network predicts."""
    return {"eps": (0, 1), "x0": (1, 0), "v": (-sigma, alpha), "flow": (-1, 1)}[prediction]


def target(prediction: str, x0: Tensor, eps: Tensor, alpha, sigma) -> Tensor:
    """The y of a perfect network."""
    a, b = mixture(prediction, alpha, sigma)
    return a * x0 + b * eps


def separate(prediction: str, y: Tensor, x_t: Tensor, alpha, sigma) -> tuple[Tensor, Tensor]:
    """(x_0, eps) from x_t = alpha x_0 + sigma eps and y = a x_0 + b eps, by Cramer's rule.

    a and b are those of `mixture`. y and x_t have one shape, and so have x_0 and eps; alpha and
    sigma are numbers or (B, 1, 1, 1).
    """
    a, b = mixture(prediction, alpha, sigma)
    determinant = alpha * b - sigma * a  # for the four predictions: alpha, -sigma, 1, 1
    return (b * x_t - sigma * y) / determinant, (alpha * y - a * x_t) / determinant


def min_snr_weight(prediction: str, snr: Tensor, gamma: float) -> Tensor:
    """Weight of |y - target|^2 that makes it min(SNR, gamma) |error of x_0|^2 (Hang et al. 2023).

    SNR = alpha^2 / sigma^2. Without the cap gamma, nearly clean images would outweigh all others.
    prediction is "x0", "eps" or "v", and says what y is; snr and the result are (B,). In y = x0 the
    two errors are equal; in y = eps, |error of eps|^2 is SNR |error of x_0|^2, in y = v SNR + 1
    times it.
    """
    error_of_x0 = {"x0": 1.0, "eps": 1 / snr, "v": 1 / (snr + 1)}[prediction]
    return snr.clamp(max=gamma) * error_of_x0


# ---- noise --------------------------------------------------------------------------------------


def gaussian_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal numbers (B, *shape). Row i comes from generators[i], so it does not depend
    on the other rows."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])


def new_generators(count: int) -> list[torch.Generator]:
    """CPU generators, one per sample, with seeds drawn from torch's global generator."""
    seeds = torch.randint(2**62, (count,)).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---- samplers -----------------------------------------------------------------------------------

Denoise = Callable[[Tensor, float, float, float], tuple[Tensor, Tensor]]
NoisePath = list[tuple[float, float, float]]  # (t, alpha, sigma) of each stop and of the end
Noise = Callable[[], Tensor]  # returns new standard normal noise in the shape of x at each call
States = Iterator[Tensor]  # x after each step


def timesteps(S: int, steps: int, spacing: str, offset: int = 0) -> list[int]:
    """The `steps` of S levels at which a sampler calls the network, from noise to image.

    trailing starts at the last level, leading ends at `offset`, linspace starts at the last and
    ends at 0 (Lin et al. 2024, table 2); a single step starts at the last. Raises ValueError for
    more steps than levels.
    """
    most = S - offset if spacing == "leading" else S
    if not 1 <= steps <= most:
        raise ValueError(f"{steps} steps do not fit a schedule of {S}; use 1 to {most}")
    if spacing == "trailing":
        return [round(S - i * (S / steps)) - 1 for i in range(steps)]
    if spacing == "leading":
        return [min(S - 1, i * (S // steps) + offset) for i in reversed(range(steps))]
    if steps == 1:
        return [S - 1]
    return [round(i * ((S - 1) / (steps - 1))) for i in reversed(range(steps))]


def ddim(denoise: Denoise, x: Tensor, path: NoisePath, noise: Noise, eta: float = 0.0) -> States:
    """Mix x_0 and eps again, with part of eps replaced by new noise (Song et al. 2021, eq. 12, 16).

    From each stop of the path to the next, x becomes

        alpha_next x_0 + sqrt(sigma_next^2 - fresh^2) eps + fresh noise()
        fresh = eta sigma_next / sigma sqrt(sigma^2 - (alpha / alpha_next sigma_next)^2)

    where rounding must not make the argument of a root negative. Yields x after each step. eta = 0
    draws nothing, so the same starting noise always gives the same image. eta = 1 is DDPM.
    """
    for (t, alpha, sigma), (_, alpha_next, sigma_next) in pairwise(path):
        x0, eps = denoise(x, t, alpha, sigma)
        added = max(0.0, sigma**2 - (alpha / alpha_next * sigma_next) ** 2)
        fresh = eta * sigma_next / sigma * math.sqrt(added)
        x = alpha_next * x0 + math.sqrt(max(0.0, sigma_next**2 - fresh**2)) * eps
        if fresh > 0:
            x = x + fresh * noise()
        yield x


def ddpm(denoise: Denoise, x: Tensor, path: NoisePath, noise: Noise, variance="small") -> States:
    """Ancestral sampling: draw from the Gaussian q(x_next | x_t, x_0) (Ho et al. 2020, eq. 7).

    From the next level to this one, the forward process keeps alpha / alpha_next of x and adds the
    variance `added` = sigma^2 - (alpha / alpha_next sigma_next)^2. The noise drawn here has all of
    it if variance is "large", the upper bound, and the exact share of it, (sigma_next / sigma)^2,
    if "small". The last step, to sigma_next = 0, calls no noise(). Yields x after each step.
    """
    for (t, alpha, sigma), (_, alpha_next, sigma_next) in pairwise(path):
        x0, _ = denoise(x, t, alpha, sigma)
        kept = alpha / alpha_next
        added = sigma**2 - (kept * sigma_next) ** 2
        x = (kept * sigma_next**2 * x + alpha_next * added * x0) / sigma**2
        if sigma_next > 0:
            x = x + math.sqrt(added) * (1 if variance == "large" else sigma_next / sigma) * noise()
        yield x


def dpm(denoise: Denoise, x: Tensor, path: NoisePath, noise: Noise) -> States:
    """DPM-Solver++(2M): DDIM with x_0 extrapolated from its last change (Lu et al. 2022, alg. 2).

    The extrapolation is linear in lambda = ln(alpha / sigma): second order without further calls of
    the network. The last step, to lambda = inf, is DDIM's. Draws nothing.
    """
    x0_before = None
    h_before = math.inf  # the last step in lambda
    for (t, alpha, sigma), (_, alpha_next, sigma_next) in pairwise(path):
        x0, _ = denoise(x, t, alpha, sigma)
        h = math.inf
        ahead = x0
        if alpha > 0 and sigma_next > 0:
            h = math.log(alpha_next / sigma_next) - math.log(alpha / sigma)
            if x0_before is not None:
                ahead = x0 + (h / h_before / 2) * (x0 - x0_before)
        x = sigma_next / sigma * x + (alpha_next - alpha * sigma_next / sigma) * ahead
        x0_before = x0
        h_before = h
        yield x


# ---- flow matching: the straight path -----------------------------------------------------------
# With alpha = 1 - t and sigma = t, x_t moves on a straight line from image to noise, at the
# velocity dx/dt = eps - x_0. Sampling integrates the predicted velocity from t = 1 to 0. All of the
# above holds here too, and DDIM becomes Euler's rule, x_next = x + (t_next - t) dx/dt.


def flow_path(S: int, steps: int) -> NoisePath:
    """Equal steps of time from 1 to 0. The network reads S t, as if there were S levels."""
    times = [1 - i / steps for i in range(steps + 1)]
    return [(S * t, 1 - t, t) for t in times]


def heun(denoise: Denoise, x: Tensor, path: NoisePath, noise: Noise) -> States:
    """Heun's rule: step with the mean of the velocities here and at the end of Euler's step.

    It is of second order, with two calls of the network per step. The last step calls it once: it
    ends at sigma = 0, where the velocity (x - x_0) / sigma cannot be computed. Yields x after each
    step. Draws nothing.
    """
    for (t, alpha, sigma), (t_next, alpha_next, sigma_next) in pairwise(path):
        x0, _ = denoise(x, t, alpha, sigma)
        velocity = (x - x0) / sigma  # = eps - x_0
        if sigma_next > 0:
            arrived = x + (sigma_next - sigma) * velocity
            x0, _ = denoise(arrived, t_next, alpha_next, sigma_next)
            velocity = (velocity + (arrived - x0) / sigma_next) / 2
        x = x + (sigma_next - sigma) * velocity
        yield x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm, "euler": ddim, "heun": heun}


def last(states: States) -> Tensor:
    """The state after the last step; earlier ones are dropped as the sampler runs."""
    return deque(states, maxlen=1).pop()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode, which turns dropout off; restore its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ---- the model ----------------------------------------------------------------------------------


class Diffusion(nn.Module):
    """A U-Net with its noise schedule: the training loss, and sampling."""

    outer = ()  # Muon trains the layers of the input, output and time too (training/optim.py)
    unit = "image"  # one row of a batch

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.config = config
        self.unet = UNet(config)
        if config.d_context and config.learned_null:
            self.null_context = nn.Parameter(torch.zeros(config.d_context))

    def path(self, steps: int, sampler: str = "ddim") -> NoisePath:
        """The stops of a sampler. Raises ValueError for a sampler or steps that do not fit."""
        config = self.config
        S = config.diffusion_steps
        if sampler not in SAMPLERS:
            raise ValueError(f"there is no sampler {sampler!r}; use one of {', '.join(SAMPLERS)}")
        if sampler in ("euler", "heun") and config.prediction != "flow":
            raise ValueError(f"{sampler} follows a flow; this model predicts {config.prediction}")
        if sampler == "dpm++" and config.spacing != "trailing":
            # As published: space one more level, and leave out the last.
            levels = timesteps(S, steps + 1, config.spacing, config.offset)[:steps]
        else:
            levels = timesteps(S, steps, config.spacing, config.offset)
        if config.prediction == "flow":
            return flow_path(S, steps)

        table = alpha_bars(config).tolist()
        path = [(t, math.sqrt(table[t]), math.sqrt(1 - table[t])) for t in levels]
        end = 1.0
        if sampler == "ddim" and not config.end_clean:
            end = table[0]
        return [*path, (0, math.sqrt(end), math.sqrt(1 - end))]

    def null(self, context: Tensor, given: Tensor | None) -> Tensor:
        """The empty context in the shape of `context`: the given one, else the learned one.

        Raises ValueError if none is given and the model learned none.
        """
        if given is None:
            if not self.config.learned_null:
                raise ValueError("this model learned no null_context; give one, (1 or B, T, E)")
            given = self.null_context
        return given.to(context).expand_as(context)

    def loss(
        self, batch: dict[str, Tensor], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics): the mean of |y - target|^2 over batch["images"] (B, C, H, W), float32.

        A model with d_context needs batch["context"] (B, T, E). Without learned_null it also needs
        batch["null_context"], which must expand to that shape. Row i draws its level, its noise and
        whether its context is left out from generators[i], a CPU generator.

        metrics["loss_t0"] .. ["loss_t3"] are the parts of the loss from the four quarters of the
        noise levels, each times 4. So over many rows each is the mean loss in its quarter, and the
        mean of the four is the loss.
        """
        config = self.config
        x0 = batch["images"]
        context = batch.get("context")
        check_images(x0.shape, config.in_channels, config.factor)  # before anything is drawn

        # Level and noise of each row.
        share = torch.stack([torch.rand((), generator=g, dtype=torch.double) for g in generators])
        eps = gaussian_noise(generators, x0.shape[1:]).to(x0.device)
        t, alpha, sigma = level(config, share)
        weight = torch.ones_like(t)
        if config.min_snr:
            weight = min_snr_weight(config.prediction, (alpha / sigma).square(), config.min_snr)
        quarter = (4 * share).floor()

        # One copy takes all numbers of the rows to the device; each becomes (B, 1, 1, 1).
        numbers = torch.stack((t, alpha, sigma, weight, quarter)).float().to(x0.device)
        t, alpha, sigma, weight, quarter = numbers[..., None, None, None].unbind()

        # Contexts that are left out.
        if config.d_context and context is not None:
            null = self.null(context, batch.get("null_context"))
            dropped = torch.stack([torch.rand((), generator=g) for g in generators])
            dropped = (dropped < config.context_dropout).to(x0.device)[:, None, None]
            context = torch.where(dropped, null, context)

        # Predict and compare.
        y = self.unet(q_sample(x0, eps, alpha, sigma), t.flatten(), context)
        error = (y.float() - target(config.prediction, x0, eps, alpha, sigma)).square()
        rows = (weight * error).mean(dim=(1, 2, 3))  # (B,)
        metrics = {}
        for k in range(4):
            metrics[f"loss_t{k}"] = 4 * (rows.detach() * (quarter.flatten() == k)).mean()
        return rows.mean(), metrics

    def example_batch(self, rows: int) -> dict[str, Tensor]:
        """A batch of zeros with the fields of a real one; a context has 77 rows, as in CLIP."""
        config = self.config
        batch = {
            "images": torch.zeros(rows, config.in_channels, config.image_size, config.image_size)
        }
        if config.d_context:
            batch["context"] = torch.zeros(rows, 77, config.d_context)
            if not config.learned_null:
                batch["null_context"] = torch.zeros(rows, 77, config.d_context)
        return batch

    def denoiser(
        self,
        context: Tensor | None = None,
        guidance: float = 1.0,
        null_context: Tensor | None = None,
    ) -> Denoise:
        """A function denoise(x, t, alpha, sigma) -> (x_0, eps) for contexts (B, T, E).

        The prediction is y_null + guidance (y - y_null): 0 ignores the context, 1 is the plain
        conditional model, and more follows the context more closely, at the cost of variety.
        With config.clip, x_0 is clipped and eps stays what the network predicted, as in diffusers:
        then alpha x_0 + sigma eps is no longer x. DDIM and Euler use that eps, the other samplers
        x_0 alone. Raises ValueError for a guidance below 0, or one that needs a context if none is
        given.
        """
        config = self.config
        if not 0 <= guidance < math.inf:
            raise ValueError(f"guidance is {guidance}; it must be 0 or above (1 = plain)")
        if guidance != 1 and context is None:
            raise ValueError(
                f"guidance is {guidance}, but no context was given: give one, or use 1"
            )

        # With both predictions, the network runs once on a batch of twice the rows.
        contexts = None
        if context is not None:
            parts = []
            if guidance != 0:
                parts.append(context)
            if guidance != 1:
                parts.append(self.null(context, null_context))
            contexts = torch.cat(parts)

        def denoise(x: Tensor, t: float, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
            copies = 1 if contexts is None else len(contexts) // len(x)
            x_t = x.repeat(copies, 1, 1, 1)
            times = torch.full((len(x_t),), float(t), device=x.device)
            y = self.unet(x_t, times, contexts).float()
            if copies == 2:
                y, y_null = y.chunk(2)
                y = y_null + guidance * (y - y_null)
            x0, eps = separate(config.prediction, y, x, alpha, sigma)
            if config.clip:
                x0 = x0.clamp(-1, 1)
            return x0, eps

        return denoise

    def sampler_states(
        self,
        sampler: str,
        denoise: Denoise,
        x: Tensor,
        path: NoisePath,
        generators: Sequence[torch.Generator],
        eta: float = 0.0,
    ) -> States:
        """Run a sampler from x along `path`, with fresh noise from the generators of the rows."""
        options = {}
        if sampler == "ddim":
            options["eta"] = eta
        elif sampler == "ddpm":
            options["variance"] = self.config.variance

        def noise() -> Tensor:
            return gaussian_noise(generators, x.shape[1:]).to(x.device)

        return SAMPLERS[sampler](denoise, x, path, noise, **options)

    @torch.no_grad()
    def sample(
        self,
        start: int | Tensor,
        steps: int = 50,
        sampler: str = "ddim",
        guidance: float = 1.0,
        context: Tensor | None = None,
        generators: Sequence[torch.Generator] | None = None,
        film: bool = False,
        null_context: Tensor | None = None,
        eta: float = 0.0,
    ) -> Tensor:
        """Draw images (B, C, H, W), float32; with film all states (steps + 1, B, C, H, W).

        start: the number of images, or their noise, of any H and W that the network can halve.
        generators: CPU generators, one per sample. Sample i draws only from generators[i], so it
        does not depend on the batch and the device; by default torch's global generator seeds them.
        context, guidance, null_context: see `denoiser`. eta: see `ddim`.
        Raises ValueError for inputs that do not fit the model, the schedule or each other.
        """
        config = self.config
        count = start if isinstance(start, int) else len(start)
        if count < 1:
            raise ValueError(f"{count} samples were requested; draw at least 1")
        if generators is None:
            generators = new_generators(count)
        contexts = count if context is None else len(context)
        if not count == len(generators) == contexts:
            given = f"{len(generators)} generators and {contexts} contexts"
            raise ValueError(f"{count} samples with {given}: give one of each per sample")
        path = self.path(steps, sampler)
        denoise = self.denoiser(context, guidance, null_context)

        # Starting noise.
        if isinstance(start, int):
            shape = (config.in_channels, config.image_size, config.image_size)
            x = gaussian_noise(generators, shape)
        else:
            x = start
        x = x.to(next(self.parameters()).device, torch.float32)

        states = self.sampler_states(sampler, denoise, x, path, generators, eta)
        with evaluation_mode(self):
            return torch.stack([x, *states]) if film else last(states)

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> Diffusion:
        """Read a diffusers folder with a U-Net and a scheduler; see hub/scheduler.py."""
        from tinyfm.hub import scheduler

        return scheduler.load(cls, DiffusionConfig, folder, dtype)

    def save_pretrained(self, folder: str, overwrite: bool = False) -> None:
        """Write a diffusers folder with a U-Net and a scheduler; see hub/scheduler.py."""
        from tinyfm.hub import scheduler

        scheduler.save(self, folder, overwrite)
