"""What a text-to-image model draws, judged by a network that was taught on the real drawings.

Asked for a "serif bold latin small letter a", did the model draw an a, bold, with serifs? A small
network learns to read the real letters and digits of data/glyphs.py, black on white, and says of
any picture in which style it is, and which character it is in the style that was asked for: a shape
is a capital O in one font and a zero in another. It learns from all splits: what the model never
saw, its judge must know; and from further fonts, to know what letters have in common. No model can
be measured above its judge, so the judge's own score, on real drawings that it did not see, stands
beside.

Letters: B pictures, C channels, H W rows and columns, M characters, F features. Pictures are uint8,
or float in [-1, 1], to which they are clamped.
"""

from __future__ import annotations

import hashlib
import json
import operator
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from data import glyphs
from data.pictures import Record
from tinyfm.clip import augment
from tinyfm.common import device as machine
from tinyfm.common import files
from tinyfm.evaluate.zero_shot import ROWS
from tinyfm.training.optim import EMA

FORMAT = 3  # of what is kept: with another number, judges are trained anew
STYLES = tuple(glyphs.FILES)  # "sans", "sans bold", ...
FURTHER = {  # Computer Modern, which only the judge reads: style words -> file
    "cm": "cmr10", "cm bold": "cmb10", "cm sans": "cmss10", "cm italic": "cmti10",
    "cm mono": "cmtt10",
}  # fmt: skip
KNOWN = (*STYLES, *FURTHER)
CHARACTERS = tuple(
    unicodedata.name(character).lower() for character in ascii_uppercase + ascii_lowercase + digits
)
ASPECTS = {  # what the words of a style say
    "style": str,
    "bold": lambda words: "bold" in words,
    "italic": lambda words: "italic" in words,
    "family": lambda words: words.split()[0],
}
GROUPS = 8  # of channels, normalised together
TOLD = 8.0  # how loudly a style is told, beside features
Pictures = Tensor | np.ndarray


@dataclass(frozen=True)
class JudgeConfig:
    """How large the judge is and how it is trained."""

    width: int = 32  # channels of the first convolution; the last has four times as many
    features: int = 256  # F
    steps: int = 2000
    batch_size: int = 128  # half of it CHARACTERS, half any Latin letters
    lr: float = 2e-3
    weight_decay: float = 0.05
    augment: float = 0.1  # see clip.augment; o is O but for its size, so not much
    noise: float = 0.1  # largest standard deviation
    held_out: float = 0.1  # share of the drawings of CHARACTERS that training leaves out
    fold: int = 0  # which of such shares: with another, another judge
    seed: int = 0

    def __post_init__(self):
        if self.width < 1 or self.width % GROUPS or not 0 < self.held_out < 1:
            advice = f"use a multiple of {GROUPS}, and a share between 0 and 1"
            raise ValueError(f"width is {self.width}, held_out {self.held_out}: {advice}")
        if not 0 <= self.fold < (most := int(1 / self.held_out)):
            raise ValueError(f"fold is {self.fold}; there are 0 to {most - 1}")


def as_pixels(images: Pictures, channels: int) -> Tensor:
    """float32 (B, channels, H, W) in [-1, 1]. Raises ValueError for another shape."""
    images = torch.as_tensor(images)
    if images.ndim != 4 or images.size(1) != channels or not len(images):
        shape = tuple(images.shape)
        raise ValueError(f"images are {shape}; they must be (B, {channels}, H, W), B at least 1")
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    return images.float().clamp(-1, 1)


def places(words: Sequence[str], among: Sequence[str]) -> Tensor:
    """Where each of the words stands, int64 (B,). Raises ValueError for one that does not."""
    numbers = {word: i for i, word in enumerate(among)}
    if unknown := set(words) - set(numbers):
        shown = ", ".join(among[:3])
        raise ValueError(f"{min(unknown)!r} is none of the {len(among)} there are: {shown}, ...")
    return torch.tensor([numbers[word] for word in words])


# ---- the judge ----------------------------------------------------------------------------------


class Judge(nn.Module):
    """Images (B, 1, 32, 32) in [-1, 1] and, for the first of both, the styles (B,) that they are to
    be read in -> (character logits (B, M), style logits (B, 21)).

    `names` are the M characters'. Nothing is averaged over places: where a shape stands on the
    line, and how large it is, is all that tells o from O.
    """

    def __init__(self, config: JudgeConfig, names: Sequence[str]):
        super().__init__()
        self.names, layers, c_in = tuple(names), [], 1
        for times, kernel, stride in ((1, 5, 2), (2, 3, 2), (4, 3, 1), (4, 3, 2)):
            c_out = times * config.width
            conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2)
            layers += [conv, nn.GroupNorm(GROUPS, c_out), nn.ReLU()]
            c_in = c_out
        flat = c_in * (glyphs.SIZE // 8) ** 2
        layers += [nn.Flatten(), nn.Linear(flat, config.features), nn.ReLU()]
        self.features = nn.Sequential(*layers)  # -> (B, F)
        self.style = nn.Linear(config.features, len(KNOWN))
        told = nn.Linear(config.features + len(KNOWN), config.features)
        self.character = nn.Sequential(told, nn.ReLU(), nn.Linear(config.features, len(self.names)))

    def read(self, features: Tensor, styles: Tensor) -> Tensor:
        """Character logits (B, M) of features (B, F) in styles, int64 (B,)."""
        told = TOLD * F.one_hot(styles, len(KNOWN)).to(features)
        return self.character(torch.cat((features, told), dim=1))

    def forward(self, images: Tensor, styles: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return self.read(features, styles), self.style(features)


# ---- how it is trained --------------------------------------------------------------------------


def stack(records: Sequence[Record]) -> tuple[Tensor, list[str], list[str]]:
    """Images, uint8 (B, 1, 32, 32), names and styles of black drawings."""
    images = torch.from_numpy(np.stack([record.image.transpose(2, 0, 1) for record in records]))
    names = [record.label for record in records]
    return images, names, [r.captions[0].removesuffix(f" {r.label}") for r in records]


def further_records() -> list[Record]:
    """The CHARACTERS in the FURTHER fonts."""
    return [
        Record(glyphs.draw(unicodedata.lookup(name), file), (f"{style} {name}",), name, "further")
        for style, file in FURTHER.items()
        for name in CHARACTERS
    ]


def leave_out(
    records: Sequence[Record], part: float, fold: int = 0
) -> tuple[list[Record], list[Record]]:
    """(the others, this part of the CHARACTERS in each style: the one of this number, by a hash)"""
    out = set()
    for style in STYLES:
        captions = {f"{style} {name}" for name in CHARACTERS} & {r.captions[0] for r in records}
        mixed = sorted(captions, key=lambda text: hashlib.sha256(text.encode()).digest())
        size = round(part * len(mixed))
        out |= {*mixed[fold * size :][:size]}
    others = [record for record in records if record.captions[0] not in out]
    return others, [record for record in records if record.captions[0] in out]


def train(records: Sequence[Record], config: JudgeConfig) -> Judge:
    """A judge that knows the characters of these drawings, and of CHARACTERS at least the names."""
    images, names, styles = stack(records)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        judge = Judge(config, sorted({*CHARACTERS, *names}))
    generator = torch.Generator().manual_seed(config.seed)
    own = torch.tensor([name in CHARACTERS for name in names]).nonzero().flatten()
    images, names, styles = as_pixels(images, 1), places(names, judge.names), places(styles, KNOWN)
    half = config.batch_size // 2
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)
    average, dtype = EMA(judge, half_life=50), machine.choose_dtype("auto", torch.device("cpu"))
    for step in trange(config.steps, desc="training the judge", leave=False, disable=None):
        drawn = [torch.randint(n, (half,), generator=generator) for n in (len(images), len(own))]
        rows = torch.cat((drawn[0], own[drawn[1]]))
        x = augment(images[rows], [generator] * len(rows), config.augment)
        spread = config.noise * torch.rand(len(rows), 1, 1, 1, generator=generator)
        x = x + spread * torch.randn(x.shape, generator=generator)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            character, style = judge(x, styles[rows])
        loss = F.cross_entropy(character.float(), names[rows])
        loss = loss + F.cross_entropy(style.float(), styles[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update(judge, step)
    average.swap(judge)
    return judge


def load_or_train(
    cache: str | Path, config: JudgeConfig = JudgeConfig()
) -> tuple[Judge, dict[str, float]]:
    """The judge, and its prompt_following on the real drawings of CHARACTERS that it did not see.

    It is trained once, in minutes, and kept in a folder of `cache` whose name ends with a hash of
    all that it depends on. Raises CheckpointError if what is there is damaged.
    """
    key = json.dumps([FORMAT, glyphs.version(letters=True), asdict(config)])
    folder = Path(cache, f"judge-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    if not folder.exists():
        others, unseen = leave_out(list(glyphs.records(letters=True)), config.held_out, config.fold)
        judge = train(others + further_records(), config)
        about = {"names": judge.names, "scores": prompt_following(judge, *stack(unseen))}
        with files.whole_or_absent(folder) as temporary:
            files.save_tensors(temporary, "model", judge.state_dict())
            files.write_json(temporary / "judge.json", about)
    about = files.read_json(folder / "judge.json")
    judge = Judge(config, about["names"])
    files.load_model(judge, files.load_tensors(folder))
    return judge, about["scores"]


# ---- measures: shares are of 1 ------------------------------------------------------------------


@torch.no_grad()
def embed(judge: Judge, images: Pictures) -> Tensor:
    """Pictures (B, 1, 32, 32) -> features (B, F)."""
    device = judge.style.weight.device
    return torch.cat([judge.features(x.to(device)) for x in as_pixels(images, 1).split(ROWS)])


def agreement(found: Iterable, asked: Iterable) -> float:
    """Share of places in which two lists are equal. Raises ValueError for unequal lengths."""
    found, asked = list(found), list(asked)
    if len(found) != len(asked):
        raise ValueError(f"{len(found)} pictures, {len(asked)} prompts: give each its own")
    return sum(map(operator.eq, found, asked)) / len(asked)


@torch.no_grad()
def prompt_following(
    judge: Judge, images: Pictures, names: Sequence[str], styles: Sequence[str],
    candidates: Sequence[str] = CHARACTERS,
) -> dict[str, float]:  # fmt: skip
    """Shares of pictures (B, 1, 32, 32) in which the judge sees what was asked for: "character", of
    the candidates, read in the style asked for; "style", all its words; "bold" and "italic", there
    or not; "family".

    Raises ValueError for a name that is no candidate, or a candidate that the judge does not know.
    """
    asked, told = places(names, candidates), places(styles, STYLES)
    features, among = embed(judge, images), places(candidates, judge.names)
    seen_styles = [STYLES[i] for i in judge.style(features)[:, : len(STYLES)].argmax(1)]
    scores = {key: agreement(map(of, seen_styles), map(of, styles)) for key, of in ASPECTS.items()}
    seen = judge.read(features, told)[:, among].argmax(1)
    return {"character": agreement(seen.tolist(), asked.tolist()), **scores}
