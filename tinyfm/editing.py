"""What else a text-to-image model can do, without any more training.

A sampler knows a model only as denoise(x, t, alpha, sigma) -> (x_0, eps). Whoever corrects the
estimate x_0, and lets eps = (x - alpha x_0) / sigma follow, has a say in what is drawn:

    image-to-image    begin midway, at alpha z + sigma eps of a picture's latent z: the fewer steps
                      are left, the less can change (SDEdit, Meng et al. 2022)
    inpainting        x_0 = z wherever the picture is known, so that the rest comes to fit it
                      (Blended Latent Diffusion, Avrahami et al. 2023)
    super-resolution  x_0 + E(y) - E(D(x_0)): y is the decoded estimate D(x_0), its means over
                      blocks of pixels moved to those of a small picture (as ILVR, Choi et al. 2021)

A latent holds a picture only nearly, so what is known of pixels is put back at the end. `model` is
text2image.py's, and `given` what its `generate` was given: latents, init_images, mask, upscale.
Letters as there. Left out: denoisers that were trained to see a mask or a small picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfm.ddpm import Path, gaussian_noise, q_sample
from tinyfm.unet import check_images

Correct = Callable[[Tensor], Tensor]  # of estimates x_0 (B, Z, h, w), or of pictures (B, C, H, W)


def corrected(denoise: Callable, correct: Correct) -> Callable:
    """denoise with correct(x_0) in place of x_0, and what is then left of x as noise."""

    def new(x: Tensor, t: float, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        x0 = correct(denoise(x, t, alpha, sigma)[0])
        return x0, (x - alpha * x0) / sigma

    return new


def last_steps(path: Path, strength: float) -> Path:
    """The last int(steps * strength) steps of a path. Raises ValueError if there are none."""
    steps = len(path) - 1
    if not 0 < strength <= 1 or int(steps * strength) < 1:
        allowed = f"above 0, at most 1, and enough for one of {steps} steps"
        raise ValueError(f"strength is {strength}; it must be {allowed}")
    return path[-1 - int(steps * strength) :]


def match_means(images: Tensor, small: Tensor) -> Tensor:
    """images (B, C, H, W) changed so that their means over blocks are small (B or 1, C, h, w).

    The pixels of a block go the same share of their way to white, or to black: so does their mean,
    and none leaves [-1, 1].
    """
    H, W = images.shape[-2:]
    means = F.avg_pool2d(images, (H // small.size(2), W // small.size(3)))
    goal = torch.where(small > means, 1.0, -1.0)
    share = ((small - means) / (goal - means)).nan_to_num()  # 0 / 0 where all is black already
    goal, share = (F.interpolate(x, (H, W)) for x in (goal, share))  # to all pixels of a block
    return torch.lerp(images, goal, share)


def corrections(model: nn.Module, given: dict[str, Tensor], z: Tensor | None,
                ) -> tuple[Correct, Correct]:  # fmt: skip
    """What is known of x_0, and of pictures, by what is given with a picture's latent z."""
    if "upscale" in given:
        small = given["upscale"]

        def correct(x0: Tensor) -> Tensor:
            drawn = model.decode(x0)
            better = model.encode_images(match_means(drawn, small))
            return x0 + better - model.encode_images(drawn)  # what encoding loses cancels out

        return correct, lambda drawn: match_means(drawn, small)
    if "mask" in given:
        images, mask = given["init_images"], given["mask"] > 0.5
        anew = F.max_pool2d(mask.float(), model.config.autoencoder.factor) > 0  # if any pixel is
        return lambda x0: torch.where(anew, x0, z), lambda drawn: torch.where(mask, drawn, images)
    return nn.Identity(), nn.Identity()


def picture_size(config, rows: int, size: Sequence[int] | None,
                 given: dict[str, Tensor]) -> tuple[int, int]:  # fmt: skip
    """H and W of what is to be drawn. Raises ValueError for tensors that do not go with it."""
    a, images, small = config.autoencoder, given.get("init_images"), given.get("upscale")
    if (images is None and "mask" in given) or not (images is None or small is None):
        raise ValueError("a mask needs init_images, and upscale goes with neither; leave one out")
    H, W = size or (2 * [a.image_size] if images is None else images.shape[-2:])
    h, w = (H, W) if small is None else small.shape[-2:]
    C, Z, f = a.in_channels, a.latent_channels, a.factor
    check_images((rows, C, H, W), C, f * config.diffusion.factor)
    shapes = {"latents": (Z, H // f, W // f), "init_images": (C, H, W), "mask": (1, H, W),
              "upscale": (C, h, w)}  # fmt: skip
    for name, x in given.items():
        if name in ("init_images", "upscale") and x.ndim == 4:
            check_images(x.shape, C, 1)
        if x.shape not in ((rows, *shapes[name]), (1, *shapes[name])):
            fits = f"({rows} or 1, {', '.join(map(str, shapes[name]))})"
            raise ValueError(f"{name} of {tuple(x.shape)} must be {fits}; change it, or size")
    if H % h or W % w:
        raise ValueError(f"upscale of {h} x {w} does not divide {H} x {W}; change it, or size")
    return H, W


def begin(model: nn.Module, given: dict[str, Tensor], H: int, W: int, path: Path,
          strength: float | None, generators: Sequence[torch.Generator]) -> tuple:  # fmt: skip
    """(x, path, z): the first x, the way from there, and the latent z of a given picture, or None.

    Row i draws from generators[i]: first of z, then noise.
    """
    images, a = given.get("init_images"), model.config.autoencoder
    if "upscale" in given:
        images = F.interpolate(given["upscale"], (H, W), mode="bilinear")
    if images is None and strength is not None:
        raise ValueError(f"strength is {strength}, but no picture is given to begin with; give one")
    z = None if images is None else model.encode_images(images, generators)
    x = given.get("latents")
    if x is None:
        x = gaussian_noise(generators, (a.latent_channels, H // a.factor, W // a.factor))
    x = x.to(model.text_tower.position.device).expand(len(generators), -1, -1, -1)
    if z is None:
        return x, path, z
    if strength is None:
        strength = 1.0 if "mask" in given else 0.8
    path = last_steps(path, strength)
    if "mask" in given and strength == 1:  # what the mask covers is forgotten
        return x, path, z
    return q_sample(z, x, *path[0][1:]), path, z
