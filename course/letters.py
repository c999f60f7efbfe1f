"""Small pictures of letters, drawn from matplotlib's own fonts: data of the lessons on pictures.

They need no download, and a model of a few seconds' training tells them from one another.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.glyphs import FILES, HELD_OUT_STYLE, SIZE, draw

PLAIN = string.ascii_uppercase + string.ascii_lowercase + string.digits  # 62 characters
SIDE = 16  # rows and columns of a picture


@dataclass(frozen=True)
class Letters:
    """Pictures (N, 1, SIDE, SIDE) in [-1, 1], ink 1 on paper -1, and what each shows."""

    images: Tensor
    characters: list[str]
    styles: list[str]  # "serif bold", say

    def __len__(self) -> int:
        return len(self.images)

    def only(self, keep: list[bool]) -> Letters:
        """The pictures for which keep is True."""
        rows = [i for i, kept in enumerate(keep) if kept]
        characters = [self.characters[i] for i in rows]
        return Letters(self.images[rows], characters, [self.styles[i] for i in rows])


def draw_letters(characters: str = PLAIN) -> Letters:
    """Each character in each font that has it, at half the size of the project's glyphs."""
    images = []
    drawn = []
    styles = []
    for style, file in FILES.items():
        for character in characters:
            picture = draw(character, file)
            if picture is None:
                continue
            images.append(picture[:, :, 0])
            drawn.append(character)
            styles.append(style)
    pixels = torch.from_numpy(np.stack(images)).float()  # (N, SIZE, SIZE), ink 0 on paper 255
    k = SIZE // SIDE
    pixels = pixels.view(-1, SIDE, k, SIDE, k).mean((2, 4))
    return Letters((1 - pixels / 127.5)[:, None], drawn, styles)


def split_letters(letters: Letters) -> tuple[Letters, Letters]:
    """(training, test): the test has the fonts in bold italic, which training never sees."""
    held_out = [style.endswith(HELD_OUT_STYLE) for style in letters.styles]
    return letters.only([not out for out in held_out]), letters.only(held_out)
