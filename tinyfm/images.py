"""Pictures without captions -> batches: what an autoencoder and a diffusion model read.

They are the pictures of pairs.py, in the same files and the same order, of which only the images
are handed out: a folder of images is enough, and what stands beside them is not read. Each batch
says of which training step it is, for a loss that changes as training goes on.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from tinyfm.pairs import PairData, shuffle


@dataclass(frozen=True)
class ImageConfig:
    """Which pictures to read. Their captions do not matter, and need not be there."""

    path: str = "glyphs"  # glyphs, letters, or your own: a folder of images, a .csv or a .jsonl
    color: bool = False  # paint the glyphs in inks and on papers of their own
    val_fraction: float = 0.1  # share of your own pictures held out; glyphs has splits of its own
    val_images: int = 500  # of the pictures held out, how many an evaluation looks at
    cache: str = "data/cache"  # folder for what is prepared

    # What PairData asks of its config beside these: bytes need no training, and without a template
    # no captions are read of one's own pictures.
    tokenizer: ClassVar[str] = "bytes"
    template: ClassVar[str] = ""
    neighbours: ClassVar[int] = 1

    def __post_init__(self):
        if not self.path:
            raise ValueError("--data.path must not be empty")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--data.val-fraction {self.val_fraction}: it must be between 0 and 1")
        if self.val_images < 1:
            raise ValueError(f"--data.val-images {self.val_images}: it must be at least 1")


class ImageData(PairData):
    """Batches of pictures; `splits` as PairData has them."""

    val_images: int

    @classmethod
    def load(
        cls, config: ImageConfig, image_size: int, channels: int, batch_size: int, seed: int
    ) -> "ImageData":
        """Open the prepared pictures of `config`, (channels, image_size, image_size) each, after
        building them if need be. Raises ValueError as PairData.prepare does."""
        bytes_and_end, longest_caption = 257, 256
        sizes = (image_size, channels, bytes_and_end, longest_caption)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "all captions are")  # so they may be
            data = cls.prepare(config, *sizes, batch_size, seed)
        data.val_images = config.val_images
        return data

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """`rows` of the global batch of `step`, R of them:

        {"images": float32 (R, C, H, W) in [-1, 1], "step": int64 ()}
        """
        return {"images": super().batch(step, rows)["images"], "step": torch.tensor(step)}

    def fixed_batches(self, split: str, count: int, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """{"images": ...}, `rows` at a time, of `count` pictures of a split, always the same."""
        size = len(self.splits[split].labels)
        order = shuffle(np.arange(size), size, seed=0)[:count]
        for first in range(0, len(order), rows):
            index = order[first : first + rows]
            yield {"images": self.splits[split].batch(index)["images"]}

    def val_batches(self, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """The first val_images of the validation split, mixed in an order that never changes."""
        return self.fixed_batches(list(self.splits)[1], self.val_images, rows)
