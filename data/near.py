"""Pictures that are nearly equal: found before a split, so that no test picture is a copy.

Fonts repeat drawings: an arrow of DejaVu Sans is also in DejaVu Sans Mono, with other edges. People
keep a picture in two files. If one of the two trains a model and the other tests it, the test
measures memory. The distance of two pictures of one size is

    d(a, b) = mean over pixels and channels of |a - b|,    black to white is 2

in the units of the models' pixels, from -1 to 1. Pictures of one label that are nearer than NEAR
count as the same. A generated picture that is as near to a training picture counts as its copy
(tinyfm/evaluate/generated.py).

d(a, b) is at least the distance of the means of a and b, and at least that of a and b averaged over
blocks of pixels. So pictures with another mean need no comparison, and averages may replace pixels
where there are too many to be kept in memory.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

NEAR = 0.02  # pictures of one label that are nearer count as the same
LEVELS = NEAR * 127.5  # the same distance where black to white is 255
SIDE = 16  # rows and columns of a summary, at most


def is_near(image: np.ndarray, others: Sequence[np.ndarray]) -> bool:
    """Whether a picture, uint8, is near to one of `others`, uint8 and of the same shape.

    Two pictures are near if their mean absolute difference is below LEVELS, where black to white is
    255.
    """
    for other in others:
        # The larger of two bytes less the smaller one cannot overflow.
        differences = np.maximum(image, other) - np.minimum(image, other)
        if differences.sum() < LEVELS * image.size:
            return True
    return False


def count_near(
    images: np.ndarray,
    labels: Sequence[str],
    train_images: np.ndarray,
    train_labels: Sequence[str],
) -> int:
    """How many of images (B, C, H, W) are near to a training picture of the same label.

    All are uint8 and of one shape. train_images (M, C, H, W) may be mapped from a file.
    """
    rows = defaultdict(list)  # label -> training pictures
    for row, label in enumerate(train_labels):
        rows[label].append(row)
    means = train_images.mean((1, 2, 3))  # (M,)
    count = 0
    for image, label in zip(images, labels):
        own = np.array(rows[label], dtype=np.int64)
        own = own[np.abs(means[own] - image.mean()) < LEVELS]
        count += is_near(image, train_images[own])
    return count


# ---- pictures that come one by one ---------------------------------------------------------------


def summary(image: np.ndarray) -> np.ndarray:
    """Averages over blocks of uint8 (H, W, C), at most SIDE x SIDE blocks: uint8, flat."""
    height, width, _ = image.shape
    rows = np.linspace(0, height, min(height, SIDE) + 1).astype(int)
    columns = np.linspace(0, width, min(width, SIDE) + 1).astype(int)
    sums = np.add.reduceat(image.astype(np.float32), rows[:-1], axis=0)
    sums = np.add.reduceat(sums, columns[:-1], axis=1)
    sizes = np.outer(np.diff(rows), np.diff(columns))
    return (sums / sizes[:, :, None]).round().astype(np.uint8).ravel()


class Rows:
    """Summaries of one length, in an array that grows."""

    def __init__(self):
        self.count = 0
        self.rows = np.empty((0, 0), np.uint8)
        self.means = np.empty(0, np.float32)

    def append(self, row: np.ndarray) -> None:
        if self.count == len(self.rows):
            room = 2 * self.count + 4
            self.rows = np.concatenate(
                (self.rows.reshape(-1, len(row)), np.empty((room, len(row)), np.uint8))
            )
            self.means = np.concatenate((self.means, np.empty(room, np.float32)))
        self.rows[self.count] = row
        self.means[self.count] = row.mean()
        self.count += 1

    def has_near(self, row: np.ndarray) -> bool:
        """Whether a summary is near to `row`. Rounding may have moved both by half a level."""
        limit = LEVELS + 1
        close = np.abs(self.means[: self.count] - row.mean()) < limit
        differences = np.abs(self.rows[: self.count][close].astype(np.int16) - row)
        return bool((differences.mean(1) < limit).any())


class Seen:
    """The pictures so far, to find the splits of those that are near to the next one.

    Equal pictures are found whatever their labels are, near ones among those of the same label.
    """

    def __init__(self):
        self.equal: dict[bytes, set[str]] = defaultdict(set)  # hash of a picture -> splits
        self.near: dict[str, dict[str, Rows]] = defaultdict(dict)  # label -> split -> summaries

    def splits_near(self, image: np.ndarray, label: str) -> set[str]:
        """The splits with pictures near to this one, uint8 (H, W, C)."""
        own = summary(image)
        near = {split for split, rows in self.near[label].items() if rows.has_near(own)}
        return near | self.equal[hashlib.sha256(image.tobytes()).digest()]

    def add(self, image: np.ndarray, label: str, split: str) -> None:
        self.equal[hashlib.sha256(image.tobytes()).digest()].add(split)
        self.near[label].setdefault(split, Rows()).append(summary(image))
