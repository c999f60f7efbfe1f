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
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from data import glyphs
from data.pictures import Record
from data.report import counted
from tinyfm.clip import augment
from tinyfm.common import device as machine
from tinyfm.common import files
from tinyfm.common.folders import whole_or_absent
from tinyfm.evaluate.metrics import Measured, proportion
from tinyfm.evaluate.zero_shot import ROWS
from tinyfm.training.optim import EMA

FORMAT = 5  # version of the cached files; a new number makes every judge train again
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
MINUTES = 2.0  # that the training takes on two cores without bfloat16; with it, less
GROUPS = 8  # groups of channels that are normalised together
STYLE_SCALE = 8.0  # value of a style's one-hot input, so that it counts next to the features
Pictures = Tensor | np.ndarray


@dataclass(frozen=True)
class JudgeConfig:
    """The size of the judge and its training."""

    width: int = 32  # channels of the first convolution; the last one has four times as many
    features: int = 256  # F
    steps: int = 1000  # training steps
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
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}; use at least 2")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; use a share between 0 and 1")
        folds = int(1 / self.held_out)
        if not 0 <= self.fold < folds:
            raise ValueError(f"fold is {self.fold}; use 0 to {folds - 1}")


def config_of(steps: int) -> JudgeConfig:
    """The usual judge, or one of `steps` training steps if that is not 0."""
    return JudgeConfig(steps=steps) if steps else JudgeConfig()


def as_pixels(images: Pictures, channels: int) -> Tensor:
    """Pictures (B, channels, H, W) as float32 in [-1, 1]. Raises ValueError for another shape."""
    if isinstance(images, np.ndarray):
        images = torch.tensor(images)  # a copy: one that is mapped from a file is not writable
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


def agreement(found: Iterable, expected: Iterable) -> Measured:
    """Share of positions in which two lists are equal. Raises ValueError for unequal lengths."""
    found = list(found)
    expected = list(expected)
    if len(found) != len(expected):
        counts = f"{counted(len(found), 'pictures')}, {counted(len(expected), 'prompts')}"
        raise ValueError(f"{counts}: give one prompt each")
    return proportion([a == b for a, b in zip(found, expected)], "images")


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


def style_of(record: Record) -> str:
    """The style of a drawing: "sans bold"."""
    return record.captions[0].removesuffix(f" {record.label}")


def is_common(record: Record) -> bool:
    """Whether a drawing shows one of the CHARACTERS."""
    return record.label in CHARACTERS


def is_held_out(record: Record) -> bool:
    """Whether a drawing shows a character that the generating models never see."""
    return record.split == glyphs.HELD_OUT_CHARACTERS


def stack(records: Sequence[Record]) -> tuple[Tensor, list[str], list[str]]:
    """Black drawings as images, uint8 (B, 1, 32, 32), with their names and styles."""
    images = torch.from_numpy(np.stack([record.image.transpose(2, 0, 1) for record in records]))
    names = [record.label for record in records]
    return images, names, [style_of(record) for record in records]


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
) -> tuple[list[Record], list[Record], list[Record]]:
    """Split records into (the others, CHARACTERS, held-out characters): of each kind, the share
    `part` of the drawings in each style.

    A hash shuffles the drawings of a style; fold 0 has the first of them, fold 1 the next, and so
    on. A drawing of a held-out character is left out only if another drawing of it stays, because a
    judge can find no name that it was never told.
    """
    parts = []
    for kind in (is_common, is_held_out):
        unseen = set()
        for style in STYLES:
            captions = [r.captions[0] for r in records if kind(r) and style_of(r) == style]
            captions.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
            size = round(part * len(captions))
            unseen.update(captions[fold * size :][:size])
        parts.append([record for record in records if record.captions[0] in unseen])
    left_out = {record.captions[0] for unseen in parts for record in unseen}
    others = [record for record in records if record.captions[0] not in left_out]
    known = {record.label for record in others}
    common, held_out = parts
    alone = [record for record in held_out if record.label not in known]
    return others + alone, common, [record for record in held_out if record.label in known]


# ---- its training -------------------------------------------------------------------------------


@torch.inference_mode(False)  # an evaluation asks for it, in inference mode and under autocast
@torch.enable_grad()
@torch.autocast("cpu", enabled=False)
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

        # Loss. An autocast inside another would keep its first copies of the weights for ever.
        on = dtype != torch.float32
        with torch.autocast("cpu", dtype, enabled=on, cache_enabled=False):
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


def ceilings(
    judge: Judge, common: Sequence[Record], held_out: Sequence[Record]
) -> dict[str, dict[str, Measured]]:
    """{"characters" or "held-out characters": prompt_following} of drawings the judge has not seen.

    They are the questions that generated pictures are judged by: which of CHARACTERS is it, and
    which of all names is it?
    """
    scores = {"characters": prompt_following(judge, *stack(common))}
    if held_out:
        scores["held-out characters"] = prompt_following(judge, *stack(held_out), judge.names)
    return scores


class About(TypedDict):
    """What stands in judge.json."""

    names: list[str]  # the characters that it knows
    right: dict[str, dict[str, tuple[int, int]]]  # question -> {aspect: (right answers, drawings)}


def read_about(path: Path) -> About:
    """Read a judge.json. Raises ValueError with its name if a value in it cannot be."""
    about = files.read_record(path, About)
    names = about["names"]
    if len(set(names)) < len(names) or not {*CHARACTERS} <= {*names}:
        raise ValueError(f"{path}: names has a name twice, or lacks one of the CHARACTERS")
    for question, own in about["right"].items():
        for name, (right, n) in own.items():
            if not 0 <= right <= n:
                raise ValueError(f"{path}: right.{question}.{name} is {right} of {n} drawings")
    return about


@torch.inference_mode(False)
def load_or_train(
    cache: str | Path, config: JudgeConfig = JudgeConfig()
) -> tuple[Judge, dict[str, dict[str, Measured]]]:
    """The judge, and its `ceilings`.

    It is trained once, in minutes, which a line on stderr says, and kept in a folder of `cache`.
    The folder's name ends with a hash of everything that the judge depends on. Raises
    CheckpointError if the folder is damaged.
    """
    key = json.dumps([FORMAT, glyphs.version(letters=True), asdict(config)])
    folder = Path(cache, f"judge-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    with whole_or_absent(folder) as temporary:
        if temporary:
            minutes = MINUTES * config.steps / JudgeConfig.steps
            print(
                f"training the judge of drawings, this once: {config.steps:,} steps, about "
                f"{minutes:.1f} minutes on two cores; it is kept in {folder}",
                file=sys.stderr,
                flush=True,
            )
            drawings = list(glyphs.records(letters=True))
            others, *unseen = leave_out(drawings, config.held_out, config.fold)
            judge = train(others + extra_records(), config)
            counts = {
                question: {name: [round(score * score.n), score.n] for name, score in own.items()}
                for question, own in ceilings(judge, *unseen).items()
            }
            files.save_tensors(temporary, "model", judge.state_dict())
            files.write_json(temporary / "judge.json", {"names": judge.names, "right": counts})
    about = read_about(folder / "judge.json")
    judge = Judge(config, about["names"])
    files.load_model(judge, files.load_tensors(folder))
    scores = {
        question: {
            name: proportion(np.arange(n) < right, "images") for name, (right, n) in own.items()
        }
        for question, own in about["right"].items()
    }
    return judge, scores


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
) -> dict[str, Measured]:
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
