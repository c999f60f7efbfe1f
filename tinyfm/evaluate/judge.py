"""A judge: a network that reads letters and digits, to measure how well drawings follow prompts.

Given the prompt "serif bold latin small letter a", did a model draw an a, bold, with serifs? The
judge is a small network, trained on the real drawings of data/glyphs.py, black on white. For any
picture it predicts the style, and which character it shows if read in the style of the prompt: the
same shape can be a capital O in one font and a zero in another.

The judge is trained on all splits, because it must know the characters that were held out from the
generating model. It also reads extra fonts, to learn what letters have in common. No model can be
measured above its judge. So the judge's score on real drawings that it has not seen is reported
next to the model's.

Letters: B pictures, C channels, H W rows and columns, M characters, F features. Pictures are uint8,
or float in [-1, 1]; values outside are clamped.
"""

from __future__ import annotations

import hashlib
import json
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
from tinyfm.common.folders import whole_or_absent
from tinyfm.evaluate.zero_shot import ROWS
from tinyfm.training.optim import EMA

FORMAT = 3  # version of the cached files; a new number makes every judge train again
STYLES = tuple(glyphs.FILES)  # "sans", "sans bold", ...
EXTRA_FONTS = {  # style words -> file: Computer Modern, which only the judge reads
    "cm": "cmr10",
    "cm bold": "cmb10",
    "cm sans": "cmss10",
    "cm italic": "cmti10",
    "cm mono": "cmtt10",
}
KNOWN = (*STYLES, *EXTRA_FONTS)
CHARACTERS = tuple(
    unicodedata.name(character).lower() for character in ascii_uppercase + ascii_lowercase + digits
)
ASPECTS = ("style", "bold", "italic", "family")  # see `aspects`
GROUPS = 8  # groups of channels that are normalised together
STYLE_SCALE = 8.0  # value of a style's one-hot input, so that it counts next to the features
Pictures = Tensor | np.ndarray


@dataclass(frozen=True)
class JudgeConfig:
    """The size of the judge and its training."""

    width: int = 32  # channels of the first convolution; the last one has four times as many
    features: int = 256  # F
    steps: int = 2000  # training steps
    batch_size: int = 128  # drawings per step: half of them CHARACTERS, half any Latin letters
    lr: float = 2e-3  # peak learning rate
    weight_decay: float = 0.05  # AdamW's weight decay
    augment: float = 0.1  # strength of clip.augment; low, as o and O differ only in size
    noise: float = 0.1  # largest standard deviation of the added noise
    held_out: float = 0.1  # share of the drawings of CHARACTERS that training leaves out
    fold: int = 0  # number of the share that is left out; each gives another judge
    seed: int = 0  # seed of weights and batches

    def __post_init__(self):
        if self.width < 1 or self.width % GROUPS:
            raise ValueError(f"width is {self.width}; use a multiple of {GROUPS}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; use a share between 0 and 1")
        folds = int(1 / self.held_out)
        if not 0 <= self.fold < folds:
            raise ValueError(f"fold is {self.fold}; use 0 to {folds - 1}")


def as_pixels(images: Pictures, channels: int) -> Tensor:
    """Pictures (B, channels, H, W) as float32 in [-1, 1]. Raises ValueError for another shape."""
    images = torch.as_tensor(images)
    if images.ndim != 4 or images.size(1) != channels or not len(images):
        shape = tuple(images.shape)
        raise ValueError(f"images are {shape}; they must be (B, {channels}, H, W), B at least 1")
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    return images.float().clamp(-1, 1)


def indices(words: Sequence[str], vocabulary: Sequence[str]) -> Tensor:
    """The position of each word in the vocabulary, int64 (B,).

    Raises ValueError for a word that is not in it.
    """
    numbers = {word: i for i, word in enumerate(vocabulary)}
    unknown = set(words) - set(numbers)
    if unknown:
        known = f"the {len(vocabulary)} known: {', '.join(vocabulary[:3])}, ..."
        raise ValueError(f"{min(unknown)!r} is none of {known}")
    return torch.tensor([numbers[word] for word in words])


def aspects(style: str) -> dict[str, str | bool]:
    """ "sans bold" -> {"style": "sans bold", "bold": True, "italic": False, "family": "sans"}."""
    words = style.split()
    return {
        "style": style,
        "bold": "bold" in words,
        "italic": "italic" in words,
        "family": words[0],
    }


def agreement(found: Iterable, expected: Iterable) -> float:
    """Share of positions in which two lists are equal. Raises ValueError for unequal lengths."""
    found = list(found)
    expected = list(expected)
    if len(found) != len(expected):
        raise ValueError(f"{len(found)} pictures, {len(expected)} prompts: give one prompt each")
    return sum(a == b for a, b in zip(found, expected)) / len(expected)


# ---- the network --------------------------------------------------------------------------------


class Judge(nn.Module):
    """Images (B, 1, 32, 32) in [-1, 1] and styles (B,) -> character logits and style logits.

    The character logits (B, M) read each image in the given style; the style logits (B, 21) do not
    depend on it. `names` are the names of the M characters. There is no average over positions: an
    o differs from an O only in its size and its place on the line.
    """

    def __init__(self, config: JudgeConfig, names: Sequence[str]):
        super().__init__()
        self.names = tuple(names)
        layers = []
        c_in = 1
        for times, kernel, stride in ((1, 5, 2), (2, 3, 2), (4, 3, 1), (4, 3, 2)):
            c_out = times * config.width
            conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2)
            layers += [conv, nn.GroupNorm(GROUPS, c_out), nn.ReLU()]
            c_in = c_out
        flat = c_in * (glyphs.SIZE // 8) ** 2
        layers += [nn.Flatten(), nn.Linear(flat, config.features), nn.ReLU()]
        self.features = nn.Sequential(*layers)  # -> (B, F)
        self.style = nn.Linear(config.features, len(KNOWN))
        self.character = nn.Sequential(
            nn.Linear(config.features + len(KNOWN), config.features),
            nn.ReLU(),
            nn.Linear(config.features, len(self.names)),
        )

    def read(self, features: Tensor, styles: Tensor) -> Tensor:
        """Character logits (B, M) of features (B, F), read in styles, int64 (B,)."""
        one_hot = STYLE_SCALE * F.one_hot(styles, len(KNOWN)).to(features)
        return self.character(torch.cat((features, one_hot), dim=1))

    def forward(self, images: Tensor, styles: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return self.read(features, styles), self.style(features)


# ---- its drawings -------------------------------------------------------------------------------


def stack(records: Sequence[Record]) -> tuple[Tensor, list[str], list[str]]:
    """Black drawings as images, uint8 (B, 1, 32, 32), with their names and styles."""
    images = torch.from_numpy(np.stack([record.image.transpose(2, 0, 1) for record in records]))
    names = [record.label for record in records]
    styles = [record.captions[0].removesuffix(f" {record.label}") for record in records]
    return images, names, styles


def extra_records() -> list[Record]:
    """The CHARACTERS in the EXTRA_FONTS."""
    records = []
    for style, file in EXTRA_FONTS.items():
        for name in CHARACTERS:
            image = glyphs.draw(unicodedata.lookup(name), file)
            records.append(Record(image, (f"{style} {name}",), name, "extra"))
    return records


def leave_out(
    records: Sequence[Record], part: float, fold: int = 0
) -> tuple[list[Record], list[Record]]:
    """Split records into (the others, the share `part` of the CHARACTERS in each style).

    A hash shuffles the drawings of a style; fold 0 has the first of them, fold 1 the next, and so
    on.
    """
    unseen = set()
    existing = {record.captions[0] for record in records}
    for style in STYLES:
        captions = {f"{style} {name}" for name in CHARACTERS} & existing
        shuffled = sorted(captions, key=lambda text: hashlib.sha256(text.encode()).digest())
        size = round(part * len(shuffled))
        unseen.update(shuffled[fold * size :][:size])
    others = [record for record in records if record.captions[0] not in unseen]
    return others, [record for record in records if record.captions[0] in unseen]


# ---- its training -------------------------------------------------------------------------------


def train(records: Sequence[Record], config: JudgeConfig) -> Judge:
    """Train a judge on these drawings. It knows their characters and all CHARACTERS."""
    images, names, styles = stack(records)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        judge = Judge(config, sorted({*CHARACTERS, *names}))
    generator = torch.Generator().manual_seed(config.seed)

    # Targets, and the rows that show one of the CHARACTERS.
    common = torch.tensor([name in CHARACTERS for name in names]).nonzero().flatten()
    images = as_pixels(images, 1)
    names = indices(names, judge.names)
    styles = indices(styles, KNOWN)

    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)
    average = EMA(judge, half_life=50)
    dtype = machine.choose_dtype("auto", torch.device("cpu"))
    half = config.batch_size // 2
    for step in trange(config.steps, desc="training the judge", leave=False, disable=None):
        # Batch: half from all drawings, half from the CHARACTERS; moved about, with noise.
        any_rows = torch.randint(len(images), (half,), generator=generator)
        common_rows = common[torch.randint(len(common), (half,), generator=generator)]
        rows = torch.cat((any_rows, common_rows))
        x = augment(images[rows], [generator] * len(rows), config.augment)
        spread = config.noise * torch.rand(len(rows), 1, 1, 1, generator=generator)
        x = x + spread * torch.randn(x.shape, generator=generator)

        # Loss.
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            character, style = judge(x, styles[rows])
        loss = F.cross_entropy(character.float(), names[rows])
        loss = loss + F.cross_entropy(style.float(), styles[rows])

        # Step.
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
    """The judge, and its prompt_following on the real drawings of CHARACTERS that it has not seen.

    It is trained once, in minutes, and kept in a folder of `cache`. The folder's name ends with a
    hash of everything that the judge depends on. Raises CheckpointError if the folder is damaged.
    """
    key = json.dumps([FORMAT, glyphs.version(letters=True), asdict(config)])
    folder = Path(cache, f"judge-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    with whole_or_absent(folder) as temporary:
        if temporary:
            drawings = list(glyphs.records(letters=True))
            others, unseen = leave_out(drawings, config.held_out, config.fold)
            judge = train(others + extra_records(), config)
            about = {"names": judge.names, "scores": prompt_following(judge, *stack(unseen))}
            files.save_tensors(temporary, "model", judge.state_dict())
            files.write_json(temporary / "judge.json", about)
    about = files.read_json(folder / "judge.json")
    judge = Judge(config, about["names"])
    files.load_model(judge, files.load_tensors(folder))
    return judge, about["scores"]


# ---- its measures: shares from 0 to 1 -----------------------------------------------------------


@torch.no_grad()
def embed(judge: Judge, images: Pictures) -> Tensor:
    """Pictures (B, 1, 32, 32) -> features (B, F)."""
    device = judge.style.weight.device
    return torch.cat([judge.features(x.to(device)) for x in as_pixels(images, 1).split(ROWS)])


@torch.no_grad()
def prompt_following(
    judge: Judge,
    images: Pictures,
    names: Sequence[str],
    styles: Sequence[str],
    candidates: Sequence[str] = CHARACTERS,
) -> dict[str, float]:
    """Shares of pictures (B, 1, 32, 32) in which the judge sees the name and style of the prompt.

    "character": the name, as the likeliest of the candidates in the style of the prompt. "style":
    all words of the style; "bold" and "italic": whether it is bold, or italic; "family": its first
    word.

    Raises ValueError for a name that is no candidate, or a candidate that the judge does not know.
    """
    expected = indices(names, candidates)
    read_in = indices(styles, STYLES)
    features = embed(judge, images)
    columns = indices(candidates, judge.names)

    # Styles. The extra fonts come last among the logits and are no answers here.
    seen_styles = judge.style(features)[:, : len(STYLES)].argmax(1)
    found = [aspects(STYLES[i]) for i in seen_styles]
    wanted = [aspects(style) for style in styles]
    scores = {}
    for key in ASPECTS:
        scores[key] = agreement([own[key] for own in found], [own[key] for own in wanted])

    # Characters.
    seen = judge.read(features, read_in)[:, columns].argmax(1)
    return {"character": agreement(seen.tolist(), expected.tolist()), **scores}
