"""What a text-to-image run draws, and how much of it is what the prompt says.

The prompts are letters and digits in all styles of training; in styles that training never showed
with any character ("bold italic", though both words were seen); and characters that it never
showed, made of parts that it did ("latin small letter e with circumflex"). A judge (judge.py) that
knows them all names what was drawn. In colour, ink and paper are any two: most of these triples of
ink, paper and drawing are new as well.

Left out: pictures of one's own, which no judge here knows.
"""

from __future__ import annotations

import unicodedata

import numpy as np
import torch
from torch import Tensor

from data import glyphs
from tinyfm import draw, judge
from tinyfm.latents import LatentConfig, LatentData
from tinyfm.text2image import TextToImage

STEPS, SAMPLER = 20, "dpm++"
COPY = 0.006  # a mean difference of pixels, black to white 2: two real drawings are seldom nearer
Asked = list[tuple[str, str]]  # (style, name) of each prompt


def prompts_of(data: LatentData) -> dict[str, Asked]:
    """What is asked for: all CHARACTERS in the styles of training and in others, and each character
    that was held out, in a style of its own."""
    unseen = [style for style in judge.STYLES if style.endswith(glyphs.HELD_OUT_STYLE)]
    seen = [style for style in judge.STYLES if style not in unseen]
    held_out = sorted(set(data.splits[glyphs.HELD_OUT_CHARACTERS].labels))
    return {
        "letters and digits": [(style, name) for style in seen for name in judge.CHARACTERS],
        "held-out styles": [(style, name) for style in unseen for name in judge.CHARACTERS],
        "held-out characters": [(seen[i % len(seen)], name) for i, name in enumerate(held_out)],
    }


def captions_of(asked: Asked, color: bool, seed: int = 0) -> tuple[list[str], list, list]:
    """Prompts, and the inks and papers in them, any two, [] each if all is black and white."""
    if not color:
        return [f"{style} {name}" for style, name in asked], [], []
    random = np.random.default_rng(seed)
    pairs = [random.permutation(list(glyphs.COLORS))[:2].tolist() for _ in asked]
    texts = [f"{ink} {s} {n} on {paper}" for (s, n), (ink, paper) in zip(asked, pairs)]
    return texts, [ink for ink, _ in pairs], [paper for _, paper in pairs]


def real_drawings(asked: Asked) -> Tensor:
    """The fonts' own drawings, uint8 (B, 1, H, W), of those that they have."""
    drawn = [glyphs.draw(unicodedata.lookup(name), glyphs.FILES[style]) for style, name in asked]
    images = [image for image in drawn if image is not None]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def measure(
    model: TextToImage, data: LatentData, config: LatentConfig, guidance: float
) -> dict[str, float]:
    """{measure: value}: shares of 1, and Frechet distances between drawn and real."""
    critic, own = judge.load_or_train(config.cache)
    train, scores = torch.tensor(data.train.images), {}
    for what, asked in prompts_of(data).items():
        styles, names = (list(column) for column in zip(*asked))
        prompts, inks, papers = captions_of(asked, config.color)
        images = draw.illustrate(model, prompts, STEPS, sampler=SAMPLER, guidance=guidance)
        if config.color:
            found = judge.color_accuracy(images, inks, papers)
            scores |= {f"{what}: {key}": value for key, value in found.items()}
            _, _, images = judge.unpaint(images)
        else:
            scores[f"{what}: copies of training pictures"], _ = judge.copies(images, train, COPY)
        among = critic.names if what == "held-out characters" else judge.CHARACTERS
        found = judge.prompt_following(critic, images, names, styles, among)
        scores |= {f"{what}: {key}": value for key, value in found.items()}
        real = judge.embed(critic, real_drawings(asked))
        drawn = judge.embed(critic, images)
        scores[f"{what}: Frechet distance"] = judge.frechet_distance(drawn, real)
    return {f"the judge on real drawings: {key}": value for key, value in own.items()} | scores
