"""TODO."""

import torch


def mix(seed: int, step: int, place: int) -> int:
    """A seed for one place in one step of one run: far apart for neighbours in any of the three."""
    odd = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
    return sum(m * n for m, n in zip(odd, (seed + 1, step, place))) % 2**63


def row_generators(seed: int, step: int, rows: range) -> list[torch.Generator]:
    """A random stream for each row of a batch, whichever rank or micro-batch has the row."""
    return [torch.Generator().manual_seed(mix(seed, step, row)) for row in rows]
