"""Molecules as pictures: where the atoms of a graph lie on paper, and the lines between them.

Bonds have one length, and neighbours stand at angles of 120 degrees, where they can. So two atoms
of a chain that are k bonds apart should be as far from each other as the ends of a zigzag, and two
atoms of a ring as the corners of a regular polygon. The places come as near to these distances as
they can (least squares, by the steps of de Leeuw 1977, SMACOF). Nothing keeps bonds of a crowded
molecule from crossing.

Letters: n atoms. The graphs are those of molecules.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.pictures import FONTS

SIDE = 240  # pixels of a picture
BOND = 32.0  # pixels of a bond, at most
MARGIN = 18
STEPS = 100
STARTS = 16
NEAR = 20.0  # weight of a bond and of a ring, over that of atoms far apart
INK = (0, 0, 0)
COLOURS = {"N": (48, 80, 248), "O": (216, 12, 12), "S": (160, 128, 0), "F": (0, 130, 0),
           "Cl": (0, 130, 0), "Br": (150, 40, 30)}  # fmt: skip
HYDROGENS = {"N": 3, "O": 2}  # bonds of atoms whose hydrogen is written


# ---- places --------------------------------------------------------------------------------------


def steps_between(n: int, bonds: Iterable[tuple[int, int]]) -> np.ndarray:
    """The number of bonds on the shortest way from atom to atom, (n, n); inf if there is none."""
    ways = np.full((n, n), np.inf)
    np.fill_diagonal(ways, 0)
    for i, j in bonds:
        ways[i, j] = ways[j, i] = 1
    for k in range(n):
        ways = np.minimum(ways, ways[:, k, None] + ways[None, k])
    return ways


def rings(n: int, bonds: Iterable[tuple[int, int]]) -> list[list[int]]:
    """For each bond in a ring, the smallest such ring, its atoms in order; each ring once."""
    bonds = list(bonds)
    found: dict[frozenset[int], list[int]] = {}
    for i, j in bonds:
        others = [bond for bond in bonds if bond != (i, j)]
        ways = steps_between(n, others)[j]
        if not np.isfinite(ways[i]):
            continue
        ring = [i]  # from i, each time an atom that is one bond nearer to j
        while ring[-1] != j:
            at = ring[-1]
            around = [a + b - at for a, b in others if at in (a, b)]
            ring.append(min(around, key=lambda atom: (ways[atom], atom)))
        found.setdefault(frozenset(ring), ring)
    return list(found.values())


def wanted_distances(n: int, bonds: Iterable[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(distances of the atoms, weights), (n, n) both, in bond lengths."""
    bonds = list(bonds)
    ways = steps_between(n, bonds)
    ways[~np.isfinite(ways)] = n  # parts without a bond between them
    distances = np.sqrt(0.75 * ways**2 + 0.25 * (ways % 2))  # of a zigzag
    weights = 1 / np.maximum(ways, 1) ** 2
    weights[ways == 1] = NEAR
    for ring in rings(n, bonds):
        m = len(ring)
        for a in range(m):
            for b in range(a):
                i, j = ring[a], ring[b]
                if ways[i, j] > 1:
                    distance = math.sin(math.pi * (a - b) / m) / math.sin(math.pi / m)
                    distances[i, j] = distances[j, i] = distance
                    weights[i, j] = weights[j, i] = NEAR
    np.fill_diagonal(weights, 0)
    return distances, weights


def place(n: int, bonds: Iterable[tuple[int, int]]) -> np.ndarray:
    """Places of the atoms, (n, 2), in bond lengths: the middle at 0, the longest side level."""
    if n == 1:
        return np.zeros((1, 2))
    distances, weights = wanted_distances(n, bonds)

    # The plane that fits all distances best, as they are (Torgerson 1952).
    centre = np.eye(n) - 1 / n
    values, vectors = np.linalg.eigh(-0.5 * centre @ distances**2 @ centre)
    plane = vectors[:, -2:] * np.sqrt(np.maximum(values[-2:], 1e-3))

    # From there, and from places around, of which some leave no ring twisted. Each step minimises
    # a parabola that lies above the sum of squared errors.
    inverse = np.linalg.pinv(np.diag(weights.sum(1)) - weights)
    random = np.random.default_rng(0)
    found = []
    for start in range(STARTS):
        x = plane + (0.01 + start / STARTS) * random.standard_normal(plane.shape)
        for _ in range(STEPS):
            apart = np.linalg.norm(x[:, None] - x[None], axis=2)
            pull = -weights * distances / np.maximum(apart, 1e-9)
            np.fill_diagonal(pull, 0)
            np.fill_diagonal(pull, -pull.sum(1))
            x = inverse @ pull @ x
        apart = np.linalg.norm(x[:, None] - x[None], axis=2)
        found.append((float((weights * (apart - distances) ** 2).sum()), x))
    x = min(found, key=lambda pair: pair[0])[1]
    x = x - x.mean(0)
    _, _, axes = np.linalg.svd(x, full_matrices=False)
    return x @ axes.T


# ---- lines ---------------------------------------------------------------------------------------


def label(atom: str, aromatic: bool, hydrogens: int, orders: Sequence[int]) -> str:
    """What is written at an atom, "" for carbon: O, NH2. orders: of its bonds."""
    element = atom.strip("[]").removesuffix("H") or "H"
    element = element[0].upper() + element[1:]
    if element in HYDROGENS and not aromatic:
        hydrogens = max(hydrogens, HYDROGENS[element] - sum(orders))
    if element == "C" and orders:
        return ""
    return element + ("H" if hydrogens else "") + (str(hydrogens) if hydrogens > 1 else "")


def draw(
    atoms: Sequence[str],
    aromatic: Sequence[bool],
    hydrogens: Sequence[int],
    bonds: dict[tuple[int, int], int],
) -> np.ndarray:
    """A picture of a molecule, uint8 (SIDE, SIDE, 3). A circle stands in an aromatic ring.

    The arguments are the fields of a Molecule.
    """
    n = len(atoms)
    x = place(n, bonds)
    room = SIDE - 2 * MARGIN
    scale = min(BOND, *(room / max(size, 1e-9) for size in np.ptp(x, axis=0)))
    at = (x - (x.max(0) + x.min(0)) / 2) * scale + SIDE / 2
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(image)
    for (i, j), order in bonds.items():
        along = (at[j] - at[i]) / max(1e-9, float(np.linalg.norm(at[j] - at[i])))
        across = np.array([-along[1], along[0]])
        for k in range(max(1, order)):
            shift = across * (k - (max(1, order) - 1) / 2) * 4
            pen.line([*(at[i] + shift), *(at[j] + shift)], fill=INK, width=2)
    for ring in rings(n, bonds):
        if all(aromatic[atom] for atom in ring):
            middle = at[ring].mean(0)
            radius = 0.55 * np.linalg.norm(at[ring] - middle, axis=1).mean()
            pen.ellipse([*(middle - radius), *(middle + radius)], outline=INK)
    font = ImageFont.truetype(FONTS / "DejaVuSans.ttf", 13)
    for atom in range(n):
        orders = [order for pair, order in bonds.items() if atom in pair]
        if text := label(atoms[atom], aromatic[atom], hydrogens[atom], orders):
            box = pen.textbbox(tuple(at[atom]), text, font=font, anchor="mm")
            pen.rectangle([box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1], fill="white")
            colour = COLOURS.get(text.partition("H")[0], INK)
            pen.text(tuple(at[atom]), text, font=font, fill=colour, anchor="mm")
    return np.array(image)
