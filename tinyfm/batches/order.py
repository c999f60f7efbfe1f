"""TODO."""

import math

import numpy as np

ROUNDS = 6  # of the Feistel network; four are the least, small halves mix better with a few more


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Images of `index` (int64, values in [0, size)) under a random permutation of [0, size).

    A Feistel network, as in DES, needs O(1) memory. It writes a number as two halves (L, R); a
    round maps them to (R, L xor F(R)), which can be undone whatever F is, hence a bijection; some
    rounds with an F that mixes well, each with its key, make it look random (Luby and Rackoff,
    1988). It permutes [0, 4**half), the next power of four, not [0, size): an image outside is
    mapped again until it falls inside ("cycle walking", Black and Rogaway, 2002), which keeps the
    bijection.
    """
    half = np.uint64(max(1, math.ceil((size - 1).bit_length() / 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0xBF58476D1CE4E5B9)  # the multipliers of splitmix64
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << half) | right

    image = network(index.astype(np.uint64))
    while (outside := image >= size).any():
        image[outside] = network(image[outside])
    return image.astype(np.int64)


def shuffle(samples: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Rows, below `size`, of samples (int64) 0, 1, ...: each epoch takes all in its own order."""
    rows = np.empty_like(samples)
    for epoch in np.unique(samples // size):
        here = samples // size == epoch
        keys = np.random.SeedSequence((seed, int(epoch))).generate_state(ROUNDS, np.uint64)
        rows[here] = permute(samples[here] % size, size, keys)
    return rows


def shuffle_runs(samples: np.ndarray, size: int, seed: int, length: int) -> np.ndarray:
    """As `shuffle`, but `length` rows that follow each other stay together.

    An epoch cuts the rows, as a ring, into runs from an offset of its own; what is left over at the
    end of the ring it leaves out.
    """
    runs = size // length
    start = shuffle(samples // length, runs, seed) * length
    for epoch in np.unique(samples // length // runs):
        here = samples // length // runs == epoch
        start[here] += np.random.SeedSequence((seed, int(epoch), 1)).generate_state(1)[0] % size
    return (start + samples % length) % size
