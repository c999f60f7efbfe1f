"""Sounds -> batches: pieces of recordings for a codec, pieces of their codes for a language model.

The n training samples, one recording after the other, are cut into windows of T samples, at another
place in each epoch, and an epoch reads each window once, in a random order (text.py, which does the
same with tokens). So a batch is a pure function of (seed, step). Validation and test are cut from
their start, and what does not fill the last window is left out.

A language model needs codes, integers in place of samples. A codec encodes each recording once, as
a whole. The codes are stored as int32, in a file whose name depends on the recordings and on the
weights of the codec, and are cut into windows in the same way: of frames, Q codes each.

Legend: B batch, C channels, T samples or frames of a window, Q codebooks.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data import sounds, waves
from data.report import Report, counted
from data.splits import SPLITS, TRAIN
from tinyfm.batches.latents import fingerprint, kept_on_disk
from tinyfm.batches.text import window_starts
from tinyfm.common.config import DataPath, FolderPath, may_change

FORMAT = 1  # of the windows: a new number refuses to resume old runs


@dataclass(frozen=True)
class SoundConfig:
    """Which sounds to read."""

    path: DataPath = "sounds"  # sounds
    cache: FolderPath = may_change("data/cache")  # folder for the codes

    def __post_init__(self):
        if self.path != "sounds":
            raise ValueError(f"--data.path {self.path}: the recordings are --data.path sounds")


class SoundData:
    """Batches of windows, and the recordings of each split."""

    def __init__(self, config: SoundConfig, rate: int, length: int, batch_size: int, seed: int):
        """length: samples in a window.

        Raises ValueError for another rate than the recordings have, or a split shorter than a
        window.
        """
        if rate != sounds.RATE:
            raise ValueError(
                f"--model.rate {rate}: the sounds have {sounds.RATE} samples a second; use "
                f"--model.rate {sounds.RATE}"
            )
        self.config = config
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.unit = "seconds"
        self.units_per_row = length / rate
        self.recordings = {split: [] for split in SPLITS}  # int16 (n,) each
        report = Report()
        for _, split, samples in sounds.recordings(report):
            self.recordings[split].append(samples)
        self.windows = {name: join(own)[None] for name, own in self.recordings.items()}  # (1, n)
        self.check_lengths("samples", "--model.sound-length")
        self.fingerprint = f"{FORMAT}-{hashlib.sha256(sounds.version().encode()).hexdigest()}"
        minutes = [f"{own.size / rate / 60:.1f} {name}" for name, own in self.windows.items()]
        self.description = f"sounds: minutes of {', '.join(minutes)}; {report}"

    def check_lengths(self, unit: str, option: str) -> None:
        """Raise ValueError if a split is shorter than a window."""
        for name, own in self.windows.items():
            if own.shape[1] <= self.length:
                raise ValueError(
                    f"the split {name!r} has {counted(own.shape[1], unit)}, a window "
                    f"{self.length}: use a smaller {option}"
                )

    def read(self, split: str, starts: np.ndarray) -> dict[str, torch.Tensor]:
        """The windows of a split that start there: {"sounds": float32 (B, C, T) in [-1, 1)}."""
        own = self.windows[split]
        rows = np.stack([own[:, start : start + self.length] for start in starts])
        return {"sounds": torch.from_numpy(rows / np.float32(waves.SCALE))}

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """`rows` of the global batch of `step`, with the fields of `read`."""
        index = np.arange(self.batch_size, dtype=np.int64)[rows] + step * self.batch_size
        n = self.windows[TRAIN].shape[1]
        return self.read(TRAIN, window_starts(index, n, self.length, self.seed))

    def val_batches(self, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """The validation split; see `split_batches`."""
        return self.split_batches("val", rows)

    def split_batches(self, name: str, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """All whole windows of a split in order, `rows` at a time."""
        starts = np.arange(0, self.windows[name].shape[1] - self.length + 1, self.length)
        for first in range(0, len(starts), rows):
            yield self.read(name, starts[first : first + rows])

    def metrics(self, loss: float) -> dict[str, float]:
        """No metrics beyond the loss."""
        return {}


def join(parts: list[np.ndarray]) -> np.ndarray:
    """Arrays (..., n) one after the other; an empty one if there are none."""
    return np.concatenate([np.zeros(0, np.int16), *parts], axis=-1)


def to_sounds(samples: np.ndarray) -> torch.Tensor:
    """Samples int16 (n,) -> one sound, float32 (1, 1, n) in [-1, 1)."""
    return torch.from_numpy(samples / np.float32(waves.SCALE))[None, None]


# ---- codes ---------------------------------------------------------------------------------------


@torch.no_grad()
def encode(codec: nn.Module, recordings: list[np.ndarray]) -> np.ndarray:
    """The codes of recordings, one after the other: int32 (Q, frames)."""
    device = next(codec.parameters()).device
    parts = []
    for samples in tqdm(recordings, "encoding", unit=" sounds", leave=False, disable=None):
        parts.append(codec.encode(to_sounds(samples).to(device))[0].cpu().numpy())
    return np.concatenate(parts, axis=1).astype(np.int32)


class SoundCodeData(SoundData):
    """Batches of codes; before `encode_all`, of samples."""

    codes = False  # whether the windows are codes

    def encode_all(self, codec: nn.Module, frames: int) -> None:
        """Encode all splits, or open the codes of an earlier run. frames: of a window."""
        content = f"{self.fingerprint} {fingerprint(codec)}"
        name = hashlib.sha256(content.encode()).hexdigest()[:12]
        path = Path(self.config.cache, f"codes-{name}")
        for split, own in self.recordings.items():
            file = path.with_suffix(f".{split}.npy")
            make = partial(encode, codec, own)
            self.windows[split] = kept_on_disk(file, codec.config.n_book, np.int32, make)
        self.codes = True
        self.length = frames
        self.check_lengths("frames", "--model.music.context-length")

    def read(self, split: str, starts: np.ndarray) -> dict[str, torch.Tensor]:
        """The windows of a split that start there: {"codes": int64 (B, Q, T)}, or before
        `encode_all` {"sounds": ...}."""
        if not self.codes:
            return super().read(split, starts)
        own = self.windows[split]
        rows = np.stack([own[:, start : start + self.length] for start in starts])
        return {"codes": torch.from_numpy(rows.astype(np.int64))}
