"""What does guidance gain, and what does it cost? How far does an edit move an image?

A small system draws digits of 16 x 16 pixels from prompts of two words, such as "bold seven". Its
autoencoder and its denoiser are trained here; its text tower keeps its random weights, which give
different words different contexts. A classifier that was trained on the same drawings, the judge,
reads the results.
"""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import glyphs
from tinyfm.autoencoder import Autoencoder, AutoencoderConfig
from tinyfm.clip import CLIPConfig
from tinyfm.ddpm import DiffusionConfig
from tinyfm.text2image import TextToImage, TextToImageConfig

VARIANTS = ("20 steps", "5 steps", "10 steps", "40 steps")
GUIDANCE = (0, 1, 2, 4, 8)
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
UNITS = {
    "judge_accuracy": "of unseen drawings",
    **{f"accuracy_{guidance}": "of images" for guidance in GUIDANCE},
    "data_variety": "of the range of a pixel",
    **{f"variety_{guidance}": "of the range of a pixel" for guidance in GUIDANCE},
    "old_when_weak": "of images",
    "new_when_weak": "of images",
    "old_when_strong": "of images",
    "new_when_strong": "of images",
    "known_pixels_moved": "of the range of a pixel",
    "block_means_moved": "of the range of a pixel",
}
SIZE = 16
TEST_FONTS = ("mono bold italic", "serif italic", "stix", "sans bold")  # for the judge's ceiling
STYLES = ("", "bold", "italic", "bold italic")
DIGITS = "0123456789"
END = len(STYLES) + len(DIGITS)  # the token that ends a prompt
CONFIG = TextToImageConfig(
    diffusion=DiffusionConfig(
        image_size=8,
        in_channels=2,
        channels=(16, 32),
        attend=(False, True),
        groups=8,
        n_block=1,
        d_context=32,
        clip=False,
        context_dropout=0.15,
    ),
    autoencoder=AutoencoderConfig(
        SIZE, channels=(8, 16), latent_channels=2, groups=8, attention=False
    ),
    clip=CLIPConfig(
        SIZE, image_layer=1, vocab_size=END + 1, context_length=3, text_layer=1, text_width=32
    ),
)
ROWS = 32


def drawings() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Digits of the training and the test fonts: images in [-1, 1], tokens (N, 3), and digits."""
    parts = ([], [])
    for style, file in glyphs.FILES.items():
        words = style.partition(" ")[2]
        for digit in DIGITS:
            ink = glyphs.draw(digit, file)[..., 0].astype(np.float32)
            image = F.avg_pool2d(torch.from_numpy(ink)[None], 2) / 127.5 - 1
            tokens = (STYLES.index(words), len(STYLES) + int(digit), END)
            parts[style in TEST_FONTS].append((image, torch.tensor(tokens), int(digit)))
    found = []
    for part in parts:
        images, tokens, digits = zip(*part)
        columns = {"images": torch.stack(images), "tokens": torch.stack(tokens)}
        found.append({**columns, "digits": torch.tensor(digits)})
    return tuple(found)


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images, each moved by up to one pixel in both directions."""
    padded = F.pad(images, (1, 1, 1, 1), value=1.0)
    shifts = torch.randint(0, 3, (len(images), 2), generator=generator).tolist()
    cut = [image[:, y : y + SIZE, x : x + SIZE] for image, (y, x) in zip(padded, shifts)]
    return torch.stack(cut)


def fit(parameters, loss, data: dict, steps: int, lr: float, seed: int, name: str) -> None:
    """Minimise loss(rows, generators) over random rows, with AdamW and a falling rate."""
    generator = torch.Generator().manual_seed(seed)
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0)
    said = time.monotonic()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        chosen = torch.randint(0, len(data["images"]), (ROWS,), generator=generator)
        rows = {key: values[chosen] for key, values in data.items()}
        rows["images"] = moved(rows["images"], generator)
        seeds = torch.randint(0, 2**62, (ROWS,), generator=generator).tolist()
        value = loss(rows, [torch.Generator().manual_seed(s) for s in seeds])
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if time.monotonic() - said > 10 or step == steps - 1:
            said = time.monotonic()
            print(f"{name}: step {step + 1} of {steps}, loss {value.item():.3f}", flush=True)


def make_judge() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(32 * (SIZE // 4) ** 2, len(DIGITS)),
    )


def new_generators(count: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]


@torch.no_grad()
def share_read(judge: nn.Module, images: Tensor, digits: Tensor) -> float:
    """The share of images that the judge reads as these digits."""
    return (judge(images).argmax(1) == digits).float().mean().item()


def variety(images: Tensor, digits: Tensor) -> float:
    """Standard deviation of a pixel among the images of one digit, as a share of its range, 2.

    It is the root of the mean variance over pixels and digits.
    """
    variances = [images[digits == digit].var(0).mean() for digit in range(len(DIGITS))]
    return torch.stack(variances).mean().sqrt().item() / 2


def measure(seed: int, variant: str) -> dict:
    steps = int(variant.split()[0])
    train, test = drawings()
    torch.manual_seed(seed)
    model = TextToImage(CONFIG)
    autoencoder = Autoencoder(CONFIG.autoencoder)
    judge = make_judge()

    def judge_loss(rows: dict, generators) -> Tensor:
        noisy = rows["images"] + 0.3 * torch.randn(rows["images"].shape)
        return F.cross_entropy(judge(noisy), rows["digits"])

    def autoencoder_loss(rows: dict, generators) -> Tensor:
        return autoencoder.loss(rows, generators)[0]

    def denoiser_loss(rows: dict, generators) -> Tensor:
        return model.loss(rows, generators)[0]

    fit(judge.parameters(), judge_loss, train, 500, 3e-3, seed, "judge")
    fit(autoencoder.parameters(), autoencoder_loss, train, 350, 3e-3, seed, "autoencoder")
    autoencoder.measure_latents([train["images"]])
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    model.autoencoder.latent_mean.copy_(autoencoder.latent_mean)
    model.autoencoder.latent_scale.copy_(autoencoder.latent_scale)
    fit(model.diffusion.parameters(), denoiser_loss, train, 800, 2e-3, seed, "denoiser")
    model.eval()
    judge.eval()
    return {
        "judge_accuracy": share_read(judge, test["images"], test["digits"]),
        "data_variety": variety(train["images"], train["digits"]),
        **guided(model, judge, steps, seed),
        **edited(model, judge, train, steps, seed),
        **constrained(model, train, steps, seed),
    }


def guided(model: TextToImage, judge: nn.Module, steps: int, seed: int) -> dict:
    """Three images of each digit in each style, for each guidance."""
    pairs = [(style, digit) for style in range(len(STYLES)) for digit in range(len(DIGITS))]
    prompts = torch.tensor([(style, len(STYLES) + digit, END) for style, digit in pairs * 3])
    digits = prompts[:, 1] - len(STYLES)
    result = {}
    for guidance in GUIDANCE:
        own = new_generators(len(prompts), seed)
        drawn = model.generate(prompts, steps=steps, guidance=guidance, generators=own)
        result[f"accuracy_{guidance}"] = share_read(judge, drawn, digits)
        result[f"variety_{guidance}"] = variety(drawn, digits)
        print(f"guidance {guidance}: {result[f'accuracy_{guidance}']:.0%} as asked", flush=True)
    return result


def edited(model: TextToImage, judge: nn.Module, train: dict, steps: int, seed: int) -> dict:
    """Drawings of digits, each to be turned into the digit five further, in the same style."""
    images = train["images"]
    old = train["digits"]
    new = (old + 5) % len(DIGITS)
    prompts = train["tokens"].clone()
    prompts[:, 1] = len(STYLES) + new
    as_old = []
    as_new = []
    for strength in STRENGTHS:
        own = new_generators(len(prompts), seed)
        drawn = model.generate(
            prompts, steps=steps, guidance=2, generators=own, init_images=images, strength=strength
        )
        as_old.append(share_read(judge, drawn, old))
        as_new.append(share_read(judge, drawn, new))
        print(f"strength {strength}: {as_new[-1]:.0%} as the new digit", flush=True)
    return {
        "as_old": as_old,
        "as_new": as_new,
        "old_when_weak": as_old[0],
        "new_when_weak": as_new[0],
        "old_when_strong": as_old[-1],
        "new_when_strong": as_new[-1],
    }


def constrained(model: TextToImage, train: dict, steps: int, seed: int) -> dict:
    """How far sampling moves what it must keep: the left half of an image, and its block means."""
    images = train["images"][:20]
    prompts = train["tokens"][:20]
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., SIZE // 2 :] = 1
    own = new_generators(len(images), seed)
    filled = model.generate(prompts, steps=steps, generators=own, init_images=images, mask=mask)
    small = F.avg_pool2d(images, 4)
    own = new_generators(len(images), seed)
    size = (SIZE, SIZE)
    large = model.generate(prompts, steps=steps, generators=own, upscale=small, size=size)
    return {
        "known_pixels_moved": (filled - images)[..., : SIZE // 2].abs().max().item() / 2,
        "block_means_moved": (F.avg_pool2d(large, 4) - small).abs().max().item() / 2,
    }


def draw(figure, results) -> None:
    left, right = figure.subplots(1, 2)
    for number, result in enumerate(results):
        first = number == 0
        accuracy = [result[f"accuracy_{guidance}"] for guidance in GUIDANCE]
        change = [result[f"variety_{guidance}"] / result["data_variety"] for guidance in GUIDANCE]
        places = range(len(GUIDANCE))
        style = {"linewidth": 1.5, "marker": "o", "markersize": 4}
        left.plot(places, accuracy, color="C0", label="read as asked" if first else None, **style)
        label = "variety, relative\nto the real drawings"
        left.plot(places, change, color="C1", label=label if first else None, **style)
        label = "read as the old digit" if first else None
        right.plot(STRENGTHS, result["as_old"], color="C3", label=label, **style)
        label = "read as the new digit" if first else None
        right.plot(STRENGTHS, result["as_new"], color="C2", label=label, **style)
    left.set_xticks(range(len(GUIDANCE)), map(str, GUIDANCE))
    left.set_xlabel("guidance (1 = none)")
    left.set_ylabel("share")
    right.set_xlabel("strength of the edit (share of the steps)")
    right.set_ylabel("share of images")
    left.set_ylim(0, 1.5)
    left.legend(loc="lower right", fontsize=10)
    right.set_ylim(0, 1.3)
    right.legend(loc="upper right", fontsize=10)
