"""Random streams that do not depend on how a batch is cut.

Every row of every step has its own generator, seeded by (seed, step, row). So the row draws the
same numbers in any micro-batch, on any rank, and in a resumed run.
"""

import torch


def mix(seed: int, step: int, row: int) -> int:
    """One seed from three numbers, in [0, 2^63); neighbours in any of the three are far apart.

    The multipliers are odd constants whose bits look random (from SplitMix64).
    """
    odd = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
    return sum(m * n for m, n in zip(odd, (seed + 1, step, row))) % 2**63


def row_generators(seed: int, step: int, rows: range) -> list[torch.Generator]:
    """A CPU generator for each row of a batch, in the order of `rows`."""
    return [torch.Generator().manual_seed(mix(seed, step, row)) for row in rows]
