"""Pictures with captions, encoded once: the batches of text-to-image models.

A denoiser that works on latents needs the same latents of a picture in every epoch. So the
autoencoder encodes all pictures once, before training. The latents are stored as float16 in a file
next to the prepared pictures. Its name depends on the pictures and on the autoencoder's weights.
They are the means of the encoder's distribution: its noise is far smaller than the noise that the
denoiser is trained to remove.

A language model that writes pictures needs their codes, the integers of a VQ-VAE. They are stored
in the same way, as int32.

Legend: B batch, T tokens, C channels, H W rows and columns of a picture, Z latent channels, h w
rows and columns of a latent, N codes of a picture.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from tinyfm.batches.order import fixed_order
from tinyfm.batches.pairs import PairConfig, PairData
from tinyfm.common.config import DataPath

ROWS = 256  # pictures to encode at once


@dataclass(frozen=True)
class LatentConfig(PairConfig):
    """Which pictures and captions to read. text2image has the tokenizer of its text tower's run."""

    # glyphs, letters, or your own: a folder of images, a .csv or a .jsonl
    path: DataPath = "letters"
    val_images: int = 500  # number of held-out pictures that an evaluation reads
    cache_latents: bool = True  # encode all pictures before training, instead of in every step

    def __post_init__(self):
        super().__post_init__()
        if self.val_images < 1:
            raise ValueError(f"--data.val-images {self.val_images}: it must be at least 1")


# ---- files of latents ----------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def open_latents(path: Path, rows: int, dtype: type) -> np.ndarray:
    """(rows, ...) of this dtype, mapped from a file. Raises ValueError if it is damaged."""
    try:
        latents = np.lib.format.open_memmap(path, mode="r").view(np.ndarray)
        if (latents.dtype, len(latents)) != (dtype, rows):
            raise ValueError(f"it holds {latents.dtype} {latents.shape}, not {rows} latents")
    except Exception as error:  # numpy's reader raises many kinds for a damaged file
        advice = "delete it, and the next run will write it again"
        raise ValueError(f"{path} cannot be read: {error}; {advice}") from error
    return latents


def kept_on_disk(path: Path, rows: int, dtype: type, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of make(), (rows, ...) of this dtype, mapped from a file. It is made and written
    if the file is absent. Raises ValueError if the file exists and is damaged."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}-{os.getpid()}")
        try:
            with open(temporary, "wb") as file:
                np.save(file, make())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # left over if the disk is full
    return open_latents(path, rows, dtype)


@torch.no_grad()
def encode(model: nn.Module, images: np.ndarray, dtype: type) -> np.ndarray:
    """Latents (B, Z, h, w) or codes (B, N) of images, uint8 (B, C, H, W), as dtype.

    model.encode_images encodes float32 in [-1, 1].
    """
    device = next(model.parameters()).device
    parts = [images[i : i + ROWS] for i in range(0, len(images), ROWS)]
    z = []
    for part in tqdm(parts, "encoding", unit=f" x {ROWS} images", leave=False, disable=None):
        x = torch.tensor(part, device=device) / 127.5 - 1  # (ROWS, C, H, W)
        z.append(model.encode_images(x).cpu().numpy().astype(dtype))
    return np.concatenate(z)


# ---- batches -------------------------------------------------------------------------------------


class LatentData(PairData):
    """Batches of latents with captions; before `encode_all`, of pictures with captions."""

    latents: dict[str, np.ndarray] | None = None  # of the splits that training reads
    val_images: int

    FIELD = "latents"  # of a batch
    PART = "autoencoder"  # of the model, whose weights decide the latents
    STORED = np.float16
    READ = torch.float32

    def encode_all(self, model: nn.Module, config: LatentConfig) -> None:
        """Encode the splits that training reads, or open the latents of an earlier run."""
        content = f"{self.fingerprint} {fingerprint(getattr(model, self.PART))}"
        name = hashlib.sha256(content.encode()).hexdigest()[:12]
        path = Path(config.cache, f"{self.FIELD}-{name}")
        train_and_val = list(self.splits)[:2]
        self.latents = {}
        for i, split in enumerate(train_and_val):
            images = self.splits[split].images
            make = partial(encode, model, images, self.STORED)
            file = path.with_suffix(f".{i}.npy")
            self.latents[split] = kept_on_disk(file, len(images), self.STORED, make)

    def read(self, split: str, index: np.ndarray) -> dict[str, torch.Tensor]:
        """Rows `index` (int64) of a split, B of them:

        {"latents": float32 (B, Z, h, w), "tokens": int64 (B, T)}
        or, before `encode_all` and in the test splits,
        {"images": float32 (B, C, H, W), "tokens": int64 (B, T)}.
        """
        batch = self.splits[split].batch(index)
        if split not in (self.latents or {}):
            return {"images": batch["images"], "tokens": batch["tokens"]}
        latents = torch.from_numpy(self.latents[split][index]).to(self.READ)
        return {self.FIELD: latents, "tokens": batch["tokens"]}

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """`rows` of the global batch of `step`, with the fields of `read`."""
        return self.read(next(iter(self.splits)), self.rows_of(step, rows))

    def split_batches(self, name: str, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """`val_images` pictures of a split, in an order that never changes."""
        split = self.split(name)
        order = fixed_order(len(self.splits[split].labels))[: self.val_images]
        for first in range(0, len(order), rows):
            yield self.read(split, order[first : first + rows])


class CodeData(LatentData):
    """The same with the codes of a VQ-VAE: {"codes": int64 (B, N), "tokens": int64 (B, T)}."""

    FIELD = "codes"
    PART = "vq"
    STORED = np.int32
    READ = torch.int64
