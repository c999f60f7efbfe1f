"""Molecules as texts: 200,000 small drug-like molecules of MOSES (Polykovskiy et al. 2020).

SMILES writes a molecule as a walk from atom to atom (Weininger 1988). Hydrogen is left out:

    CCO          ethanol: C-C-O
    CC(=O)O      acetic acid: brackets hold a branch, = is a double bond
    c1ccccc1     benzene: small letters are aromatic atoms, equal digits close a ring
    c1cc[nH]c1   pyrrole: an aromatic nitrogen that carries a hydrogen

The package molsets holds the sets of MOSES, which come from ZINC:

    pip download --no-deps --only-binary :all: molsets==0.3.1 -d data/cache/packages
    python -m data.molecules

A document is a molecule. The splits are MOSES's own: test is from its test set, training and
validation are from its training set. A hash draws a sample of each that trains in minutes; the
whole has 1,584,664 and 176,075 molecules. Its second test set, of unseen scaffolds, is left out.

`fault` says whether a text is a molecule at all: its rings and brackets close, no atom has more
bonds than its valence, and the aromatic rings have a Kekulé structure, in which each atom that
needs a double bond gets one. Only the atoms that occur in MOSES are known: there are no charges, no
isotopes and no stereochemistry. `key` is equal for two spellings of one molecule.

Licence: MIT (MOSES).
"""

import gzip
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import command, modality, wheels
from data.report import Report
from data.splits import TEST, TRAIN, VAL, Document, number_of

PACKAGE = wheels.Package(
    name="molsets",
    version="0.3.1",
    archive="molsets-0.3.1-py3-none-any.whl",
    sha256="7f4450e3ebecebe79c3a2a55950c93daddee071120daf64a163d03481e811d34",
    licence="MIT",
)
MEMBER = "moses/dataset/data/{}.csv.gz"
# A split, MOSES's set that it is a part of, and the numbers u (data/splits.py) of that part.
PARTS = (
    (TRAIN, "train", 0.0, 200 / 1585),
    (VAL, "train", 0.5, 0.5 + 3 / 1585),
    (TEST, "test", 0.0, 3 / 176),
)

TOKEN = re.compile(r"Cl|Br|\[nH\]|\[H\]|[CNOSFcnos]|[-=#()]|[1-9]")
VALENCES = {"H": 1, "F": 1, "Cl": 1, "Br": 1, "O": 2, "N": 3, "C": 4, "S": 6}  # the largest
ORDERS = {"-": 1, "=": 2, "#": 3}
AROMATIC = 0  # the order of a bond in an aromatic ring
DRAWN = 12  # molecules in a picture
NO_LETTERS = str.maketrans("", "", "()[]-=#123456789H")


class Molecule(NamedTuple):
    """A molecule as a graph."""

    atoms: list[str]  # such as "C", "Cl"
    aromatic: list[bool]
    hydrogens: list[int]  # that are written: 1 for [nH]
    bonds: dict[tuple[int, int], int]  # (atom, later atom) -> 1, 2, 3, or AROMATIC


# ---- text -> graph -------------------------------------------------------------------------------


def cut(text: str) -> Iterator[str]:
    """The signs of a SMILES. Raises ValueError for one that MOSES does not have."""
    place = 0
    while place < len(text):
        found = TOKEN.match(text, place)
        if found is None:
            raise ValueError(f"{text[place]!r} at place {place + 1} is no sign of MOSES's SMILES")
        yield found[0]
        place = found.end()


def parse(text: str, whole: bool = True) -> Molecule:
    """The graph of a SMILES. Raises ValueError, with what is wrong, if it has none.

    whole: False for a start, which may leave rings and brackets open.
    """
    atoms: list[str] = []
    parents: list[int | None] = []  # the atom before, on the walk
    written: dict[tuple[int, int], str] = {}  # bonds, with their sign
    closures = []
    open_rings: dict[str, tuple[int, str]] = {}
    branches: list[int] = []
    last = None
    sign = ""
    previous = ""
    for token in cut(text):
        if token in ORDERS:
            if last is None or sign:
                raise ValueError(f"the bond {token} has no atom before it")
            sign = token
        elif token == "(":
            if last is None or sign or previous == "(":
                raise ValueError("a branch has no atom before it")
            branches.append(last)
        elif token == ")":
            if not branches or sign or previous == "(":
                raise ValueError("a bracket closes that none opened, or around nothing")
            last = branches.pop()
        elif token.isdigit():
            if last is None or previous == "(":
                raise ValueError(f"the ring number {token} has no atom before it")
            if token in open_rings:
                other, other_sign = open_rings.pop(token)
                pair = (other, last)
                if other == last or pair in written or pair[::-1] in written:
                    raise ValueError(f"ring {token} joins an atom with itself or a neighbour")
                if sign and other_sign and sign != other_sign:
                    raise ValueError(f"ring {token} has two kinds of bond")
                pair = (min(pair), max(pair))
                written[pair] = sign or other_sign
                closures.append(pair)
            else:
                open_rings[token] = (last, sign)
            sign = ""
        else:
            atoms.append(token)
            parents.append(last)
            if last is not None:
                written[last, len(atoms) - 1] = sign
            last = len(atoms) - 1
            sign = ""
        previous = token
    if not atoms:
        raise ValueError("there is no atom")
    if whole and (sign or branches or open_rings):
        what = f"ring {min(open_rings)}" if open_rings else "a bracket or a bond"
        raise ValueError(f"{what} is not closed at the end")

    # The bonds of rings: those between the two ends of a closure, on the walk, and the closure.
    in_ring = set(closures)
    for low, high in closures:
        while low != high:
            low, high = min(low, high), max(low, high)
            in_ring.add((parents[high], high))
            high = parents[high]
    names = [atom.strip("[]") for atom in atoms]
    aromatic = [name[0].islower() for name in names]
    bonds = {}
    for pair, own in written.items():
        if not own and all(aromatic[i] for i in pair) and pair in in_ring:
            bonds[pair] = AROMATIC
        else:
            bonds[pair] = ORDERS.get(own, 1)
    rings = {i for pair in in_ring for i in pair}
    if whole and any(flag and i not in rings for i, flag in enumerate(aromatic)):
        raise ValueError("an aromatic atom is in no ring")
    hydrogens = [int(name == "nH") for name in names]
    elements = [name.removesuffix("H").capitalize() or "H" for name in names]
    return Molecule(elements, aromatic, hydrogens, bonds)


# ---- is it a molecule? ---------------------------------------------------------------------------


def pair_up(waiting: dict[int, set[int]]) -> bool:
    """Whether all atoms can be paired with a neighbour: {atom: its neighbours that wait too}."""
    if not waiting:
        return True
    atom = min(waiting, key=lambda i: len(waiting[i]))  # one with few choices first
    for other in waiting[atom]:
        left = {i: own - {atom, other} for i, own in waiting.items() if i not in (atom, other)}
        if pair_up(left):
            return True
    return False


def check(molecule: Molecule) -> None:
    """Raise ValueError for more bonds than a valence, or without a Kekulé structure."""
    atoms, aromatic, hydrogens, bonds = molecule
    used = list(hydrogens)  # an aromatic bond counts 1 here, and the double bonds of rings below
    for (i, j), order in bonds.items():
        used[i] += order or 1
        used[j] += order or 1

    # Aromatic carbon needs a double bond, unless it has one outside of the ring; nitrogen does if
    # nothing else is bound to it. Oxygen and sulphur give a pair of electrons.
    needs = set()
    for i, name in enumerate(atoms):
        if aromatic[i] and used[i] < VALENCES[name] and name in ("C", "N"):
            needs.add(i)
            used[i] += 1
    waiting = {i: set() for i in needs}
    for (i, j), order in bonds.items():
        if order == AROMATIC and i in needs and j in needs:
            waiting[i].add(j)
            waiting[j].add(i)
    for i, name in enumerate(atoms):
        if used[i] > VALENCES[name]:
            raise ValueError(f"atom {i + 1}, {name}, has {used[i]} bonds, at most {VALENCES[name]}")
    if not pair_up(waiting):
        raise ValueError("the double bonds of an aromatic ring cannot be placed")


def fault(text: str) -> str:
    """What keeps a text from being a molecule; "" if it is one."""
    try:
        check(parse(text))
    except ValueError as error:
        return str(error)
    return ""


def read_prompt(prompt: str) -> str:
    """The prompt itself. Raises ValueError if it starts no SMILES."""
    try:
        parse(prompt, whole=False)
    except ValueError as error:
        raise ValueError(f"--prompt {prompt!r} starts no SMILES: {error}") from error
    return prompt


# ---- the same molecule? --------------------------------------------------------------------------


def key(text: str) -> tuple[int, ...]:
    """A number for each atom, in order; equal, in one process, for spellings of one molecule.

    A number stands for an atom and its neighbours as far as they differ: at first for the element,
    then, again and again, for the numbers of the neighbours too (Weisfeiler and Lehman 1968).
    Hydrogen that is written as an atom, [H], is left out, as most spellings leave it out. A few
    pairs of molecules are not distinguished, such as decalin and bicyclopentyl, and those with a
    ring in small letters or with written double bonds are.

    Raises ValueError if the text is no graph.
    """
    atoms, aromatic, hydrogens, bonds = parse(text)
    neighbours: list[list[tuple[int, int]]] = [[] for _ in atoms]
    for (i, j), order in bonds.items():
        if "H" not in (atoms[i], atoms[j]):
            neighbours[i].append((order, j))
            neighbours[j].append((order, i))
    numbers = [hash(own) for own in zip(atoms, aromatic, hydrogens)]
    kinds = 0
    while len(set(numbers)) > kinds:
        kinds = len(set(numbers))
        numbers = [
            hash((numbers[i], *sorted((order, numbers[j]) for order, j in own)))
            for i, own in enumerate(neighbours)
        ]
    return tuple(sorted(number for number, atom in zip(numbers, atoms) if atom != "H"))


def formula(text: str) -> str:
    """The atoms of a text in order, without hydrogen: the same for all spellings of a molecule."""
    return "".join(sorted(text.translate(NO_LETTERS).upper()))


def copied(texts: Sequence[str], training: Iterable[str]) -> list[bool]:
    """Whether training has each of these molecules, however it is spelled."""
    formulas = {formula(text) for text in texts}
    keys = {key(text) for text in training if formula(text) in formulas}
    return [key(text) in keys for text in texts]


def draw(texts: Sequence[str], path: Path) -> None:
    """Draw up to DRAWN molecules as a PNG file."""
    from data import pictures, sketch  # load Pillow, which texts do not need

    shown = texts[:DRAWN]
    images = np.stack([sketch.draw(*parse(text)) for text in shown])
    pictures.save_grid(images, path.with_suffix(".png"), min(4, len(shown)), shown)


MODALITY = modality.Modality(
    about="small drug-like molecules of MOSES, as SMILES",
    unit="molecules",
    meaning="rings and brackets close, valences hold, aromatic rings have a Kekulé structure",
    fault=fault,
    longest=100,  # MOSES's longest has 57
    key=key,
    copied=copied,
    read_prompt=read_prompt,
    draw=draw,
    endings=(".png",),
)


# ---- the source ----------------------------------------------------------------------------------


def version() -> str:
    """A name for the exact documents: it changes if they do."""
    return f"molecules-1 {PACKAGE.sha256}"


def documents(report: Report | None = None) -> Iterator[Document]:
    """Yield the molecules of each split.

    Raises ValueError, with a command, if the package is not there.
    """
    if report is None:
        report = Report()
    report.note(f"licence: {PACKAGE.licence}")
    for name in ("train", "test"):
        content = gzip.decompress(wheels.read(PACKAGE, MEMBER.format(name)))
        for text in content.decode("ascii").split("\n")[1:]:  # after the line SMILES
            text = text.partition(",")[0].strip()  # the test set has a second column
            if not text:
                continue
            report.found += 1
            u = number_of(text)
            for split, own, low, high in PARTS:
                if own == name and low <= u < high:
                    report.used += 1
                    yield Document(text, split)
    report.note("the others are not in the sample")


def look() -> None:
    """Print the size of the data set, a molecule, and how many held-out ones are valid."""
    modality.look(sys.modules[__name__])


if __name__ == "__main__":
    command.run("molecules", __doc__, look)
