"""Pictures with captions, encoded once: what text-to-image reads.

A denoiser that works on latents asks the autoencoder for the same ones in every epoch. So they are
made once, before the training, and kept: an array of float16 beside the prepared pictures, under a
name that depends on the pictures and on the autoencoder's weights. They are the encoder's means;
the noise around them is far less than what the denoiser is trained to remove.

Letters: B batch, R rows of it, T tokens, C channels, Z latent channels, h w rows and columns of a
latent.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from tinyfm.batches.order import shuffle
from tinyfm.batches.pairs import PairConfig, PairData

ROWS = 256  # through the encoder at once


@dataclass(frozen=True)
class LatentConfig(PairConfig):
    """As for CLIP, with the tokenizer of the run that the text tower comes from."""

    path: str = "letters"  # glyphs, letters, or your own: a folder of images, a .csv or a .jsonl
    val_images: int = 500  # of the pictures held out, how many an evaluation looks at
    cache_latents: bool = True  # encode all pictures before the training; else in every step

    def __post_init__(self):
        super().__post_init__()
        if self.val_images < 1:
            raise ValueError(f"--data.val-images {self.val_images}: it must be at least 1")


def fingerprint(model: nn.Module) -> str:
    """Of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def open_latents(path: Path, rows: int) -> np.ndarray:
    """float16 (rows, Z, h, w), mapped from a file. Raises ValueError if it is damaged."""
    try:
        latents = np.lib.format.open_memmap(path, mode="r").view(np.ndarray)
        if (latents.dtype, latents.ndim, len(latents)) != (np.float16, 4, rows):
            raise ValueError(f"it holds {latents.dtype} {latents.shape}, not {rows} latents")
    except Exception as error:  # numpy's reader of such files raises all sorts
        advice = "delete it, it will be made again"
        raise ValueError(f"{path} cannot be read: {error}; {advice}") from error
    return latents


@torch.no_grad()
def encode(model: nn.Module, images: np.ndarray, path: Path) -> np.ndarray:
    """float16 (B, Z, h, w), mapped from a file that is written if it is not there.

    images: uint8 (B, C, H, W); model.encode_images makes latents of them. Raises ValueError for a
    file that is there and damaged.
    """
    if not path.exists():
        device = next(model.parameters()).device
        temporary = path.with_name(f".{path.name}-{os.getpid()}")
        parts = [images[i : i + ROWS] for i in range(0, len(images), ROWS)]
        z = [
            model.encode_images(torch.tensor(part, device=device) / 127.5 - 1).half().cpu().numpy()
            for part in tqdm(parts, "encoding", unit=f" x {ROWS} images", leave=False, disable=None)
        ]
        try:
            with open(temporary, "wb") as file:
                np.save(file, np.concatenate(z))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # of a disk that was full
    return open_latents(path, len(images))


class LatentData(PairData):
    """Batches of latents with captions; before `encode_all`, of pictures with captions."""

    latents: dict[str, np.ndarray] | None = None  # of the splits that training reads
    val_images: int

    def encode_all(self, model: nn.Module, config: LatentConfig) -> None:
        """Make, or find, the latents of the splits that training reads."""
        name = hashlib.sha256(f"{self.fingerprint} {fingerprint(model.autoencoder)}".encode())
        path = Path(config.cache, f"latents-{name.hexdigest()[:12]}")
        self.latents = {
            split: encode(model, self.splits[split].images, path.with_suffix(f".{i}.npy"))
            for i, split in enumerate(list(self.splits)[:2])
        }

    def read(self, split: str, index: np.ndarray) -> dict[str, torch.Tensor]:
        """Rows `index` (int64): tokens (R, T), and latents (R, Z, h, w) or images (R, C, H, W)."""
        batch = self.splits[split].batch(index)
        if self.latents is None:
            return {"images": batch["images"], "tokens": batch["tokens"]}
        latents = torch.from_numpy(self.latents[split][index]).float()
        return {"latents": latents, "tokens": batch["tokens"]}

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """`rows` of the global batch of `step`, as `read` returns them."""
        return self.read(next(iter(self.splits)), self.rows_of(step, rows))

    def val_batches(self, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """val_images of the validation split, in an order that never changes."""
        split = list(self.splits)[1]
        size = len(self.val.labels)
        order = shuffle(np.arange(size), size, seed=0)[: self.val_images]
        for first in range(0, len(order), rows):
            yield self.read(split, order[first : first + rows])
