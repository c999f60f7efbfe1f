"""What a text-to-image run draws, and how much of it is what the prompt says.

The prompts are letters and digits as training had them; pairs of such a character and a style that
it had, but not together; and characters that it never had, made of parts that it did ("latin small
letter e with circumflex"). A judge (judge.py) that knows them all names what was drawn. In colour,
ink and paper are any two: most of these triples of ink, paper and drawing are new as well. The
other measures:

    frechet_distance   of two clouds of features, taken for Gaussians (Heusel et al. 2017, eq. 6):
                       |mean_a - mean_b|^2 + tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2)).
                       FID is this with the features of Inception, so ours is another number
    copies             share of pictures that are training pictures again, or nearly
    color_accuracy     shares of pictures in the ink and on the paper that the prompt named

Letters: B pictures, C channels, H W rows and columns, F features. Left out: pictures of one's own,
which no judge here knows.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data import glyphs
from tinyfm.batches.latents import LatentConfig, LatentData
from tinyfm.batches.pairs import ImageData
from tinyfm.common import sheets
from tinyfm.ddpm import Diffusion
from tinyfm.evaluate import judge
from tinyfm.evaluate.judge import Judge, Pictures, agreement, as_pixels, places
from tinyfm.evaluate.metrics import SHOWN
from tinyfm.evaluate.zero_shot import ROWS, share
from tinyfm.text2image import TextToImage

STEPS, SAMPLER = 20, "dpm++"
COUNT = 400  # samples of a model that takes no prompts
COPY = 0.006  # a mean difference of pixels, black to white 2: two real drawings are seldom nearer
ASKED = ("letters and digits", "held-out pairs", "held-out characters")
Asked = list[tuple[str, str]]  # (style, name) of each prompt


# ---- measures: shares are of 1 ------------------------------------------------------------------


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Between the Gaussians with the means and covariances of two clouds (B, F), in float64.

    It is larger for fewer pictures, even of the same kind: compare only equal counts.
    """
    a, b = features_a.double(), features_b.double()
    if a.ndim != 2 or a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < 2:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"features are {shapes}; they must be (B, F), of one F, B at least 2")
    A, B = (torch.atleast_2d(x.T.cov()) for x in (a, b))
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^(1/2)
    overlap = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * overlap
    return max(0.0, distance.item())


def copies(images: Pictures, train_images: Pictures, threshold: float) -> tuple[float, Tensor]:
    """(share of pictures (B, C, H, W) with a training picture nearer than the threshold, which one
    is the nearest, int64 (B,)). The distance is the mean absolute difference, black to white 2."""
    x, train_x = (as_pixels(own, images.shape[1]).flatten(1) for own in (images, train_images))
    if x.size(1) != train_x.size(1) or threshold <= 0:
        sizes = f"{x.size(1)} and {train_x.size(1)} pixels, threshold {threshold}"
        raise ValueError(f"{sizes}: give pictures of one size and a threshold above 0")
    nearest = [torch.cdist(part, train_x, p=1).min(1) for part in x.split(ROWS)]
    distances = torch.cat([part.values for part in nearest]) / x.size(1)
    return share(distances < threshold), torch.cat([part.indices for part in nearest])


def unpaint(images: Pictures) -> tuple[list[str], list[str], Tensor]:
    """Pictures (B, 3, H, W) -> (inks, papers, the same in black on white as the judge reads them,
    uint8 (B, 1, H, W)); see glyphs.unpaint."""
    rows = (as_pixels(images, 3).permute(0, 2, 3, 1).cpu().numpy() + 1) * 127.5
    inks, papers, drawings = zip(*map(glyphs.unpaint, rows))
    return list(inks), list(papers), torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2)


def color_accuracy(
    images: Pictures, inks: Sequence[str], papers: Sequence[str]
) -> dict[str, float]:
    """Shares of pictures (B, 3, H, W) in the "ink", on the "paper", in "both" that were asked for.

    Raises ValueError for colours that are not in glyphs.COLORS.
    """
    places([*inks, *papers], list(glyphs.COLORS))  # for its ValueError
    seen_inks, seen_papers, _ = unpaint(images)
    scores = {"ink": agreement(seen_inks, inks), "paper": agreement(seen_papers, papers)}
    return scores | {"both": agreement(zip(seen_inks, seen_papers), zip(inks, papers))}


# ---- what is asked for -------------------------------------------------------------------------


def prompts_of(data: LatentData) -> dict[str, Asked]:
    """What is asked for: all CHARACTERS in all styles as training has them; the pairs of both that
    it lacks; and each character that was held out, in one of the styles that it has."""
    seen, pairs, held_out = [], [], {}
    for asked, split in zip((seen, pairs, held_out), data.splits.values()):
        for (caption, *_), name in zip(split.captions, split.labels):
            style = max((s for s in judge.STYLES if f"{s} {name}" in caption), key=len)
            if asked is held_out:
                others = held_out.setdefault(name, style), style
                held_out[name] = max(others, key=lambda style: glyphs.number_of(f"{style} {name}"))
            elif name in judge.CHARACTERS:
                asked.append((style, name))
    return dict(zip(ASKED, (seen, pairs, [(style, name) for name, style in held_out.items()])))


def captions_of(asked: Asked, color: bool, seed: int = 0) -> tuple[list[str], list, list]:
    """Prompts, and the inks and papers in them, any two, [] each if all is black and white."""
    if not color:
        return [f"{style} {name}" for style, name in asked], [], []
    random = np.random.default_rng(seed)
    pairs = [random.permutation(list(glyphs.COLORS))[:2].tolist() for _ in asked]
    texts = [f"{ink} {s} {n} on {paper}" for (s, n), (ink, paper) in zip(asked, pairs)]
    return texts, [ink for ink, _ in pairs], [paper for _, paper in pairs]


def real_drawings(asked: Asked) -> Tensor:
    """The fonts' own drawings, uint8 (B, 1, H, W)."""
    drawn = [glyphs.draw(unicodedata.lookup(name), glyphs.FILES[style]) for style, name in asked]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


def weakest(critic: Judge, images: Tensor, names: Sequence[str], styles: Sequence[str]) -> float:
    """Share of pictures with the right character, in the style where it is least."""
    shares = []
    for style in set(styles):
        rows = [i for i, own in enumerate(styles) if own == style]
        of_style = images[rows], [names[i] for i in rows], [style] * len(rows), judge.CHARACTERS
        shares.append(judge.prompt_following(critic, *of_style)["character"])
    return min(shares)


def measure(
    model: TextToImage, data: LatentData, config: LatentConfig, guidance: float
) -> dict[str, float]:
    """{measure: value}: shares of 1, and Frechet distances between drawn and real."""
    critic, own = judge.load_or_train(config.cache)
    train, scores = torch.tensor(data.train.images), {}
    for what, asked in prompts_of(data).items():
        styles, names = (list(column) for column in zip(*asked))
        prompts, inks, papers = captions_of(asked, config.color)
        images = sheets.illustrate(model, prompts, STEPS, sampler=SAMPLER, guidance=guidance)
        if config.color:
            found = color_accuracy(images, inks, papers)
            scores |= {f"{what}: {key}": value for key, value in found.items()}
            _, _, images = unpaint(images)
        else:
            scores[f"{what}: copies of training pictures"], _ = copies(images, train, COPY)
        among = critic.names if what == "held-out characters" else judge.CHARACTERS
        found = judge.prompt_following(critic, images, names, styles, among)
        if what == ASKED[0]:  # of the others a style has too few
            found["character, weakest style"] = weakest(critic, images, names, styles)
        scores |= {f"{what}: {key}": value for key, value in found.items()}
        real = judge.embed(critic, real_drawings(asked))
        drawn = judge.embed(critic, images)
        scores[f"{what}: Frechet distance"] = frechet_distance(drawn, real)
    return {f"the judge on real drawings: {key}": value for key, value in own.items()} | scores


def measure_samples(model: Diffusion, data: ImageData, cache: str) -> dict[str, float]:
    """{measure: value} of COUNT samples, and of real pictures among themselves, which no model
    beats; {} for a size or colours that no judge reads."""
    if (model.config.in_channels, model.config.image_size) != (1, glyphs.SIZE):
        return {}
    critic, _ = judge.load_or_train(cache)
    drawn = sheets.samples(model, COUNT, SAMPLER, STEPS, seed=0).images
    real = torch.cat([x["images"] for x in data.fixed_batches([*data.splits][1], 2 * COUNT, ROWS)])
    first, second, found = (judge.embed(critic, x) for x in (*real.split(COUNT), drawn))
    share_copied, _ = copies(drawn, torch.tensor(data.train.images), COPY)
    return {
        "samples: Frechet distance": frechet_distance(found, first),
        "other real pictures: Frechet distance": frechet_distance(second, first),
        "samples: copies of training pictures": share_copied,
    }


def draw_held_out(model, data: LatentData, color: bool, guidance: float, path: str) -> None:
    """A grid of characters that training had in no style, drawn by their names."""
    asked = prompts_of(data)[ASKED[-1]]
    rows = np.sort(np.random.default_rng(0).permutation(len(asked))[:SHOWN])
    prompts, _, _ = captions_of([asked[i] for i in rows], color)
    how = {"sampler": SAMPLER, "guidance": guidance}
    sheets.prompted(model, prompts, STEPS, **how).save(path)
