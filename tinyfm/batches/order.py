"""The order in which training reads its samples: a pure function of (seed, step), never stored.

Row r of the global batch of step s is sample i = s * batch_size + r. With M rows to train on, it
belongs to epoch e and has place j in it:

    e, j = divmod(i, M);    row = permutation(e)[j]

An epoch reads each row once, in a new random order. A loader would shuffle a list of M indices and
save its position. Here the permutation is a formula, computed for the requested j alone. So there
is no loader state to save, each rank computes its own rows, a resumed run reads the same samples,
and a trillion tokens need no index in memory.

    permute        the formula: a random permutation of [0, size), given its keys
    shuffle        sample -> row, epoch by epoch
    shuffle_runs   the same for runs of neighbouring rows, which stay together
    fixed_order    one order that never changes, for validation

The other random choice in this room is which examples are held out for validation. It must not
depend on the order of the rows in a file. So it follows a hash of each example's content:

    hash_order     examples sorted by the SHA-256 of their content
    held_out_count the number of examples to hold out, from --data.val-fraction

Legend: e epoch, i sample, j place in an epoch, M number of rows.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

ROUNDS = 6  # of the Feistel network: 4 is the minimum, and more mix short halves better


# ---- the order of training -----------------------------------------------------------------------


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Images of `index` (int64, values in [0, size)) under a random permutation of [0, size).

    keys: uint64 (ROUNDS,), which choose the permutation.

    A Feistel network, as in DES, needs O(1) memory. It writes a number as two halves (L, R). A
    round maps them to (R, L xor F(R)). This can be undone whatever F is, so it is a bijection. A
    few rounds, whose F mixes well and has a key for each round, look random (Luby and Rackoff,
    1988). The network permutes [0, 4**half), the next power of four, rather than [0, size). An
    image outside [0, size) is mapped again until it falls inside ("cycle walking", Black and
    Rogaway, 2002), which keeps the bijection. Raises ValueError for an index outside: its images
    might never fall inside.
    """
    outside = index[(index < 0) | (index >= size)]
    if outside.size:
        raise ValueError(f"index {outside[0]} is outside 0 to {size - 1}: take it modulo {size}")
    half = np.uint64(max(1, math.ceil((size - 1).bit_length() / 2)))  # bits
    mask = (np.uint64(1) << half) - np.uint64(1)

    def network(x: np.ndarray) -> np.ndarray:
        left = x >> half
        right = x & mask
        for key in keys:
            # F: the first half of splitmix64, with its multipliers.
            mixed = (right + key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << half) | right

    image = network(index.astype(np.uint64))
    outside = image >= size
    while outside.any():
        image[outside] = network(image[outside])
        outside = image >= size
    return image.astype(np.int64)


def shuffle(samples: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Rows, int64 in [0, size), of `samples`, int64: each epoch takes all rows in a new order.

    Sample i has place i % size in epoch i // size. Its row is the image of that place under
    `permute`, with ROUNDS keys (uint64) that np.random.SeedSequence((seed, epoch)) generates.
    """
    rows = np.empty_like(samples)
    for epoch in np.unique(samples // size):
        here = samples // size == epoch
        keys = np.random.SeedSequence((seed, int(epoch))).generate_state(ROUNDS, np.uint64)
        rows[here] = permute(samples[here] % size, size, keys)
    return rows


def shuffle_runs(samples: np.ndarray, size: int, seed: int, length: int) -> np.ndarray:
    """Like `shuffle`, but each `length` neighbouring rows stay together.

    Each epoch sees the rows as a ring, draws where to start, and cuts the ring into runs. It
    leaves out the rows at the end of the ring that do not fill a run.
    """
    runs = size // length
    start = shuffle(samples // length, runs, seed) * length
    epochs = samples // length // runs
    for epoch in np.unique(epochs):
        random = np.random.SeedSequence((seed, int(epoch), 1)).generate_state(1)
        start[epochs == epoch] += random[0] % size
    return (start + samples % length) % size


def fixed_order(size: int) -> np.ndarray:
    """Rows 0 to `size` - 1 in a random order that is always the same, whatever a run's seed."""
    return shuffle(np.arange(size), size, seed=0)


# ---- which examples are held out -----------------------------------------------------------------


def hash_order(contents: Sequence[bytes]) -> list[int]:
    """Indices of `contents`, sorted by the SHA-256 of each: a random order that depends on the
    contents, and not on where they stand."""
    digests = [hashlib.sha256(content).digest() for content in contents]
    return sorted(range(len(digests)), key=digests.__getitem__)


def check_val_fraction(fraction: float) -> None:
    """Raise ValueError if this is no fraction to hold out."""
    if not 0 < fraction < 1:
        raise ValueError(f"--data.val-fraction {fraction}: it must be between 0 and 1")


def held_out_count(count: int, fraction: float) -> int:
    """How many of `count` examples to hold out: that fraction, but at least one, and not all."""
    return min(max(1, round(fraction * count)), count - 1)
