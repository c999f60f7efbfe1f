"""Measures of generated pictures: do they follow their prompts, and do they look like real ones?

The prompts of a text-to-image run come in three sets: letters and digits as in training; pairs of
such a character and a style that were both in training, but never together; and characters that
were never in training, made of known parts ("latin small letter e with circumflex"). A judge
(judge.py), which knows all of them, reads the drawings. In colour, ink and paper are any two
colours, so most combinations of ink, paper and drawing are new as well. The other measures:

    frechet_distance   distance of two clouds of features, taken as Gaussians (Heusel et al. 2017,
                       eq. 6): |mean_a - mean_b|^2 + tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2)).
                       FID uses features of Inception; here they are the judge's, so the numbers
                       cannot be compared with FID, nor those of other numbers of pictures. Two
                       controls of as many pictures stand beside it: other real pictures, or the
                       real ones as the autoencoder decodes them
    copies             share of pictures that are copies of training pictures, or nearly. Two
                       controls stand beside it. Real drawings of the same prompts: of letters
                       that training has, nearly all are copies; of the others, those count that
                       happen to be near to a drawing of another name. And training pictures that
                       the autoencoder has encoded and decoded, with its own noise: they show
                       that the check finds a copy
    color_accuracy     share of pictures with the ink and the paper of the prompt

Letters: B pictures, C channels, H W rows and columns, F features. Left out: your own pictures,
which this judge cannot read.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import glyphs
from data.near import NEAR
from tinyfm.batches.latents import LatentConfig, LatentData
from tinyfm.batches.order import fixed_order
from tinyfm.batches.pairs import GLYPHS, ImageConfig, ImageData
from tinyfm.common import sheets
from tinyfm.common.seeds import row_generators
from tinyfm.dalle import DALLE
from tinyfm.ddpm import Diffusion
from tinyfm.evaluate import judge
from tinyfm.evaluate.judge import Judge, JudgeConfig, Pictures, agreement, as_pixels, indices
from tinyfm.evaluate.metrics import NO_INTERVAL, Measured, jackknife_error, student_t, wilson
from tinyfm.evaluate.zero_shot import ROWS, share
from tinyfm.text2image import TextToImage
from tinyfm.vq import VQVAE, count_codes, perplexity

SAMPLER = "dpm++"
STEPS = 20
SHOWN = 48  # drawings in the picture
COUNT = 400  # samples of a model without prompts
BLOCK = 4  # rows and columns of a block over which pictures are averaged, at most
ROUNDING = 1e-5  # of distances
GROUPS = 20  # of pictures, left out in turn for the interval of a distance
CONTROLS = 500  # training pictures of which copies must be found
FAINT = 0.02  # standard deviation of noise that is hardly visible
PROMPT_SETS = ("letters and digits", "held-out pairs", "held-out characters")
StyledNames = list[tuple[str, str]]  # (style, name) of each prompt


# ---- measures: shares from 0 to 1 ---------------------------------------------------------------


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Distance of the Gaussians with the means and covariances of two clouds (B, F), in float64.

    It is larger for fewer pictures, even of the same kind: compare only equal counts.
    """
    a = features_a.double()
    b = features_b.double()
    if a.ndim != 2 or a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < 2:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"features are {shapes}; they must be (B, F), of one F, B at least 2")
    A = torch.atleast_2d(a.T.cov())  # (F, F)
    B = torch.atleast_2d(b.T.cov())
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^(1/2)
    overlap = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * overlap
    return max(0.0, distance.item())


def measured_distance(features_a: Tensor, features_b: Tensor) -> Measured:
    """`frechet_distance` of two clouds (B, F) of as many rows each, with an interval.

    The distance is biased: with few pictures it is large even between two clouds of one kind. In a
    simulation with F = 256, such clouds had 279 with 115 rows each, 89 with 400, and 2 with 20,000.
    So no interval can hold the distance of infinitely many pictures. This one is that of the mean
    over other samples of as many pictures: the value +- t standard errors of a jackknife. It leaves
    out one of GROUPS random groups at a time, the same rows of both clouds. Simulated, it holds
    that mean in 93 to 100% of the cases; a bootstrap draws rows twice, which adds to the bias.
    """
    value = frechet_distance(features_a, features_b)
    n = len(features_a)
    about = f"{n:,} pictures each, biased by their number"
    if len(features_b) != n or n < 2 * GROUPS:
        return Measured(value, NO_INTERVAL, n, about)
    group = torch.from_numpy(fixed_order(n)) % GROUPS
    without = [
        frechet_distance(features_a[group != k], features_b[group != k]) for k in range(GROUPS)
    ]
    half = student_t(0.95, GROUPS - 1) * jackknife_error(np.array(without))
    return Measured(value, (max(0.0, value - half), value + half), n, about)


def copies(images: Pictures, train_images: Pictures, threshold: float = NEAR) -> Measured:
    """The share of pictures (B, C, H, W) that are copies of training pictures (M, C, H, W).

    A copy is nearer to a training picture than the threshold. The distance is the mean absolute
    difference of pixels, where black to white is 2. It is at least the distance of the pictures
    averaged over blocks, so only pairs that are near in blocks are compared pixel by pixel.
    """
    channels = images.shape[1]
    x = as_pixels(images, channels)
    train_x = as_pixels(train_images, channels)
    if x.shape[1:] != train_x.shape[1:] or threshold <= 0:
        sizes = f"{x[0].numel()} and {train_x[0].numel()} pixels, threshold {threshold}"
        raise ValueError(f"{sizes}: give pictures of one size and a threshold above 0")
    height, width = x.shape[2:]
    block = math.gcd(height, width, BLOCK)
    train_blocks = F.avg_pool2d(train_x, block).flatten(1)
    found = torch.zeros(len(x), dtype=torch.bool)
    for start in range(0, len(x), ROWS):
        blocks = F.avg_pool2d(x[start : start + ROWS], block).flatten(1)
        bounds = torch.cdist(blocks, train_blocks, p=1) / blocks.size(1)
        for i in (bounds < threshold + ROUNDING).any(1).nonzero().flatten().tolist():
            near = train_x[bounds[i] < threshold + ROUNDING]
            distances = (near - x[start + i]).abs().mean((1, 2, 3))
            found[start + i] = (distances < threshold).any()
    return share(found)


@torch.no_grad()
def rebuild(model: TextToImage | DALLE, images: Tensor, noisy: bool = False) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1], encoded and decoded by the model's autoencoder.

    The latents are the encoder's means or, if `noisy`, draws from its Gaussians; codes are never
    draws. A model of latents or codes that copies a training picture draws these, and so the
    decoded picture, not the original.
    """
    device = next(model.parameters()).device
    parts = []
    for i, part in enumerate(images.split(ROWS)):
        generators = row_generators(0, i, range(len(part))) if noisy else None
        z = model.encode_images(part.to(device), generators)
        parts.append(model.decode(z).float().clamp(-1, 1).cpu())
    return torch.cat(parts)


def unpaint(images: Pictures) -> tuple[list[str], list[str], Tensor]:
    """Pictures (B, 3, H, W) -> (inks, papers, the drawings in black, uint8 (B, 1, H, W)).

    The judge reads the drawings in black on white; see glyphs.unpaint.
    """
    rows = (as_pixels(images, 3).permute(0, 2, 3, 1).cpu().numpy() + 1) * 127.5  # (B, H, W, 3)
    inks, papers, drawings = zip(*map(glyphs.unpaint, rows))
    return list(inks), list(papers), torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2)


def color_accuracy(
    images: Pictures, inks: Sequence[str], papers: Sequence[str]
) -> dict[str, float]:
    """Shares of pictures (B, 3, H, W) with the "ink" of the prompt, its "paper", and "both".

    Raises ValueError for colours that are not in glyphs.COLORS.
    """
    indices([*inks, *papers], list(glyphs.COLORS))  # for its ValueError
    seen_inks, seen_papers, _ = unpaint(images)
    return {
        "ink": agreement(seen_inks, inks),
        "paper": agreement(seen_papers, papers),
        "both": agreement(zip(seen_inks, seen_papers), zip(inks, papers)),
    }


def weakest(
    network: Judge, images: Tensor, names: Sequence[str], styles: Sequence[str]
) -> Measured:
    """Share of pictures with the right character, in the style where it is lowest.

    The lowest of several shares is low by chance too. So its interval is one of several that hold
    the shares of all styles at once, in 95% of the cases (Bonferroni).
    """
    shares = []
    for style in sorted(set(styles)):
        rows = [i for i, other in enumerate(styles) if other == style]
        scores = judge.prompt_following(
            network,
            images[rows],
            [names[i] for i in rows],
            [style] * len(rows),
            judge.CHARACTERS,
        )
        shares.append(scores["character"])
    lowest = min(shares)
    interval = wilson(round(lowest * lowest.n), lowest.n, 1 - 0.05 / len(shares))
    about = f"{lowest.about}, the lowest of {len(shares)} styles"
    return Measured(float(lowest), interval, lowest.n, about)


# ---- prompts ------------------------------------------------------------------------------------


def style_in(caption: str, name: str) -> str:
    """The style of a caption with this name: "sans bold", not "sans", of "sans bold digit one"."""
    return max((style for style in judge.STYLES if f"{style} {name}" in caption), key=len)


def prompts_of(data: LatentData) -> dict[str, StyledNames]:
    """The prompts of each of the PROMPT_SETS.

    They are all CHARACTERS in all styles of the training split; the pairs of both that were held
    out; and each held-out character, in one of its styles.
    """
    train, _, pairs, characters = data.splits.values()
    prompts = {}
    for what, split in (("letters and digits", train), ("held-out pairs", pairs)):
        prompts[what] = []
        for captions, name in zip(split.captions, split.labels):
            if name in judge.CHARACTERS:
                prompts[what].append((style_in(captions[0], name), name))

    # Of the styles of a held-out character, a hash chooses one.
    chosen = {}
    for captions, name in zip(characters.captions, characters.labels):
        style = style_in(captions[0], name)
        best = chosen.setdefault(name, style)
        if glyphs.stable_hash(f"{style} {name}") > glyphs.stable_hash(f"{best} {name}"):
            chosen[name] = style
    prompts["held-out characters"] = [(style, name) for name, style in chosen.items()]
    return prompts


def captions_of(
    prompts: StyledNames, color: bool, seed: int = 0
) -> tuple[list[str], list[str], list[str]]:
    """(captions, inks, papers) of prompts. In colour, ink and paper are any two colours; else both
    lists are empty."""
    if not color:
        return [f"{style} {name}" for style, name in prompts], [], []
    random = np.random.default_rng(seed)
    captions = []
    inks = []
    papers = []
    for style, name in prompts:
        ink, paper = random.permutation(list(glyphs.COLORS))[:2].tolist()
        captions.append(f"{ink} {style} {name} on {paper}")
        inks.append(ink)
        papers.append(paper)
    return captions, inks, papers


def real_drawings(prompts: StyledNames) -> Tensor:
    """The fonts' own drawings of prompts, uint8 (B, 1, H, W)."""
    drawn = [glyphs.draw(unicodedata.lookup(name), glyphs.FILES[style]) for style, name in prompts]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


# ---- the measures of a run ----------------------------------------------------------------------


def denoising(guidance: float) -> dict[str, Any]:
    """The options of TextToImage.generate with which its drawings are measured."""
    return {"steps": STEPS, "sampler": SAMPLER, "guidance": guidance}


def name_ceilings(ceilings: dict[str, dict[str, Measured]]) -> dict[str, Measured]:
    """The ceilings of a judge as measures of a run."""
    return {
        f"the judge on unseen real drawings, {question}: {key}": value
        for question, own in ceilings.items()
        for key, value in own.items()
    }


def measure(
    model: TextToImage | DALLE,
    data: LatentData,
    config: LatentConfig,
    how: dict[str, Any],
    judged_by: JudgeConfig,
    samples: int = 0,
) -> dict[str, float]:
    """{measure: value} of a text-to-image model: shares, and Frechet distances to real drawings.

    how: options of model.generate. samples: prompts of each set to draw, at random; 0 = all.
    """
    network, ceilings = judge.load_or_train(config.cache, judged_by)
    scores = name_ceilings(ceilings)

    # What a copy is compared with: the training pictures, as they are and as they are decoded.
    if not config.color:
        train_images = as_pixels(data.train.images, data.train.images.shape[1])
        known = torch.cat((train_images, rebuild(model, train_images)))
        some = train_images[fixed_order(len(train_images))[:CONTROLS]]
        share_found = copies(rebuild(model, some, noisy=True), known)
        scores["control, decoded training pictures: copies of training pictures"] = share_found
    for what, all_prompts in prompts_of(data).items():
        chosen = fixed_order(len(all_prompts))[:samples] if samples else range(len(all_prompts))
        prompts = [all_prompts[i] for i in chosen]
        styles = [style for style, _ in prompts]
        names = [name for _, name in prompts]
        captions, inks, papers = captions_of(prompts, config.color)
        images = sheets.illustrate(model, captions, **how)

        # Colours, or copies.
        if config.color:
            for key, value in color_accuracy(images, inks, papers).items():
                scores[f"{what}: {key}"] = value
            _, _, images = unpaint(images)
        else:
            scores[f"{what}: copies of training pictures"] = copies(images, known)
            real = real_drawings(prompts)
            scores[f"{what}, real drawings: copies of training pictures"] = copies(real, known)

        # Characters and styles.
        held_out = what == "held-out characters"
        candidates = network.names if held_out else judge.CHARACTERS
        found = judge.prompt_following(network, images, names, styles, candidates)
        if what == "letters and digits":  # the other sets have too few prompts in a style
            found["character, weakest style"] = weakest(network, images, names, styles)
        for key, value in found.items():
            scores[f"{what}: {key}"] = value

        # Distance to the real drawings.
        real = judge.embed(network, real_drawings(prompts))
        drawn = judge.embed(network, images)
        scores[f"{what}: Frechet distance"] = measured_distance(drawn, real)
        if not config.color:
            decoded = judge.embed(network, rebuild(model, as_pixels(real_drawings(prompts), 1)))
            control = f"{what}, decoded real drawings: Frechet distance"
            scores[control] = measured_distance(decoded, real)
    return scores


def measure_samples(
    model: Diffusion, data: ImageData, cache: str, judged_by: JudgeConfig, count: int = COUNT
) -> dict[str, float]:
    """{measure: value} of `count` samples of a diffusion model without prompts.

    The distance between real pictures is the best that a model can reach. The control of copies
    are training pictures with noise that is hardly visible. Pictures of a size or colours that the
    judge cannot read give {}.
    """
    if (model.config.in_channels, model.config.image_size) != (1, glyphs.SIZE):
        return {}
    network, _ = judge.load_or_train(cache, judged_by)
    batches = data.fixed_batches(data.split("test"), 2 * count, ROWS)
    real_images = torch.cat([batch["images"] for batch in batches])
    if len(real_images) < 2 * count:
        most = len(real_images) // 2
        raise ValueError(f"{count} samples need as many test pictures twice; use at most {most}")
    held_out, other = real_images.split(count)
    samples = sheets.samples(model, count, SAMPLER, STEPS, seed=0).images

    real = judge.embed(network, held_out)
    other_real = judge.embed(network, other)
    drawn = judge.embed(network, samples)
    train_images = as_pixels(data.train.images, 1)
    copied = copies(samples, train_images)
    some = train_images[fixed_order(len(train_images))[:CONTROLS]]
    noise = torch.randn(some.shape, generator=torch.Generator().manual_seed(0))
    control = copies(some + FAINT * noise, train_images)
    by_chance = copies(torch.cat((held_out, other)), train_images)
    return {
        "samples: Frechet distance": measured_distance(drawn, real),
        "other real pictures: Frechet distance": measured_distance(other_real, real),
        "samples: copies of training pictures": copied,
        "other real pictures: copies of training pictures": by_chance,
        "control, training pictures with faint noise: copies of training pictures": control,
    }


def measure_rebuilt(
    model: VQVAE, data: ImageData, config: ImageConfig, judged_by: JudgeConfig, count: int = 0
) -> dict[str, float]:
    """{measure: value} of the test pictures as a VQ-VAE rebuilds them from their codes: what the
    judge reads in them, and beside it in the pictures as they are.

    count: pictures of each test split, at random; 0 = all that the judge can read. Your own
    pictures, and coloured ones, give {}.
    """
    if config.path not in GLYPHS or config.color:
        return {}
    network, ceilings = judge.load_or_train(config.cache, judged_by)
    scores = name_ceilings(ceilings)
    device = next(model.parameters()).device
    for what, split in list(data.splits.items())[2:]:
        candidates = judge.CHARACTERS
        if what == glyphs.HELD_OUT_CHARACTERS:
            candidates = network.names
        known = {*candidates}
        order = fixed_order(len(split.labels)).tolist()
        rows = [i for i in order if split.labels[i] in known][: count or None]
        names = [split.labels[i] for i in rows]
        styles = [style_in(split.captions[i][0], split.labels[i]) for i in rows]
        images = as_pixels(split.images[rows], 1)
        rebuilt = []
        counts = torch.zeros(model.config.n_book, model.config.n_code)
        for part in images.split(ROWS):
            codes = model.encode(part.to(device))
            rebuilt.append(model.decode(codes).float().cpu())
            counts += count_codes(codes, model.config.n_code)
        for of, pictures in (("rebuilt", torch.cat(rebuilt)), ("real", images)):
            found = judge.prompt_following(network, pictures, names, styles, candidates)
            for key in ("character", "style"):
                scores[f"{what}, {of}: {key}"] = found[key]
        for q, used in enumerate(counts):
            scores[f"{what}: perplexity of codebook {q}"] = float(perplexity(used))
    return scores


def draw_held_out(
    model: TextToImage | DALLE, data: LatentData, color: bool, how: dict[str, Any], path: str
) -> None:
    """Write a sheet of held-out characters, which were in training in no style, to a PNG file."""
    prompts = prompts_of(data)["held-out characters"]
    rows = np.sort(np.random.default_rng(0).permutation(len(prompts))[:SHOWN])
    captions, _, _ = captions_of([prompts[i] for i in rows], color)
    sheets.prompted(model, captions, **how).save(path)
