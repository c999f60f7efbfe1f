"""Pictures that clients send, and pictures for them.

A picture from a stranger is decoded as data/pictures.py does it: common formats only, the number of
pixels checked before any is decoded. The limit is lower here, and one picture is decoded at a time,
so that many clients cannot fill the memory.
"""

from __future__ import annotations

import base64
import io
import threading

import numpy as np
import torch
from torch import Tensor

from data import pictures
from tinyfm.serve.requests import BadRequest

MOST_PIXELS = 1 << 24  # 4,096 x 4,096

_one_at_a_time = threading.Lock()


def read_picture(data: bytes, size: int, channels: int, param: str) -> np.ndarray:
    """A picture file as uint8 (size, size, channels), cut to the square in its middle.

    Raises BadRequest with the reason.
    """
    try:
        with _one_at_a_time:
            image, _ = pictures.load(io.BytesIO(data), MOST_PIXELS)
            square = np.array(pictures.middle_square(image, size))
    except ValueError as error:
        raise BadRequest(f"{param} cannot be used as an image: {error}", param) from error
    return square if channels == 3 else pictures.to_grey(square)


def read_mask(data: bytes, size: int, param: str) -> Tensor:
    """Where a picture is to be drawn again, (1, 1, size, size): 1 there and 0 elsewhere.

    Those are the transparent places of a mask that has any, as OpenAI's API has it, and otherwise
    the white ones. Raises BadRequest with the reason.
    """
    try:
        with _one_at_a_time:
            alpha = pictures.opacity(io.BytesIO(data), MOST_PIXELS)
            shown, _ = pictures.load(io.BytesIO(data), MOST_PIXELS)
            source = shown if alpha is None else alpha.convert("RGB")
            levels = pictures.to_grey(np.array(pictures.middle_square(source, size)))
    except ValueError as error:
        raise BadRequest(f"{param} cannot be used as a mask: {error}", param) from error
    again = levels > 127 if alpha is None else levels < 128  # (size, size, 1)
    return torch.from_numpy(again).permute(2, 0, 1)[None].float()


def to_images(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, C) -> (1, C, H, W) in [-1, 1]."""
    return torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1


def to_png(image: np.ndarray) -> str:
    """uint8 (H, W, C) -> a PNG file in base64."""
    buffer = io.BytesIO()
    pictures.save(image, buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def to_pixels(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C)."""
    levels = (images.float().cpu().clamp(-1, 1) + 1) * 127.5
    return levels.round().byte().permute(0, 2, 3, 1).numpy()
