"""Levels of a platform game as texts: pieces of the 200 levels of SuperTux, drawn by its players.

A piece is 24 columns wide and 16 rows high. Each line of its text is a column, from the ground up,
so that neighbours in a column are neighbours in the text:

    X  solid         =  platform: solid from above      ?  block to be hit
    ^  it hurts      ~  water                           o  coin
    e  enemy         -  nothing

Debian's package supertux-data holds the levels; on other systems the same file is at
https://snapshot.debian.org/package/supertux/0.6.3-2/.

    mkdir -p data/cache/packages && (cd data/cache/packages && apt-get download \\
        supertux-data=0.6.3-2)
    python -m data.levels

Of each part of a level every tenth column starts a piece. Its rows are those 16 in which there are
the most places to stand, so it need not be the way of the level. A level is in one split as a
whole.

`fault` asks for a path: from a place to stand in the first three columns to one in the last three,
for somebody who walks, falls, and jumps 4 rows high and 4 columns far before falling. What moves,
such as enemies and platforms, does not count. Pieces without a path are left out and counted: they
are 55% of those that have places to stand at both sides. So a model learns from pieces with a path
alone.

Licence: GPL 2 or later, or CC BY-SA 3.0 (the SuperTux team).
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import command, modality, wheels
from data.report import Report, counted
from data.splits import Document, split_of

PACKAGE = wheels.Package(
    name="supertux-data",
    version="0.6.3-2",
    archive="supertux-data_0.6.3-2_all.deb",
    sha256="a6ad8865972f1dbb5e7b49f4e1b381dd16a68f3028a3502cfeaca2400285d27f",
    licence="GPL-2.0-or-later or CC BY-SA 3.0",
)
TILES = "./usr/share/games/supertux2/images/tiles.strf"
LEVELS = re.compile(r"\./usr/share/games/supertux2/(?:levels/.+\.stl|images/tiles\.strf)")
HELD_OUT = 0.2  # share of the levels, half for validation and half for test
COLUMNS = 24
ROWS = 16
STRIDE = 10  # columns from piece to piece
EDGE = 3  # columns of a side
JUMP = 4  # rows
COPY = 8  # columns in a row that are also in training make a copy
PIXELS = 32  # of a tile, in the coordinates of objects

EMPTY, SOLID, PLATFORM, BLOCK, HURTS, WATER, COIN, ENEMY = "-X=?^~oe"
LETTERS = frozenset("-X=?^~oe")
STANDS = {SOLID, PLATFORM, BLOCK}
WALLS = {SOLID, BLOCK}
# The bits of a tile's attributes (SuperTux, src/supertux/tile.hpp), the first that applies counts.
ATTRIBUTES = ((1024, HURTS), (2048, HURTS), (512, WATER), (2, PLATFORM), (1, SOLID))
OBJECTS = {
    **dict.fromkeys(("coin", "heavycoin"), COIN),
    **dict.fromkeys(("bonusblock", "brick", "weak_block"), BLOCK),
    **dict.fromkeys(("stalactite", "spikeblock", "lavafire"), HURTS),
    **dict.fromkeys(
        ("snowball", "bouncingsnowball", "flyingsnowball", "captainsnowball", "smartball", "spiky",
         "sspiky", "mrbomb", "mriceblock", "jumpy", "walkingleaf", "poisonivy", "short_fuse",
         "haywire", "snail", "crystallo", "fish", "snowman", "smartblock", "mrtree", "igel",
         "flame", "iceflame", "walking_candle", "zeekling", "toad", "mole", "ghoul"), ENEMY),
}  # fmt: skip

# The files are nested lists in brackets; the numbers of a tilemap are one token.
TOKEN = re.compile(r'\(tiles[\d\s]*\)|[()]|"(?:\\.|[^"\\])*"|;[^\n]*|[^\s()"]+')


# ---- a level -> pieces ---------------------------------------------------------------------------


def read_lists(text: str) -> list:
    """The lists of a file: `(a (b 1))` -> [["a", ["b", "1"]]]. Raises ValueError for a bracket."""
    stack: list[list] = [[]]
    for token in TOKEN.findall(text):
        if token == "(":
            stack.append([])
        elif token == ")" and len(stack) > 1:
            done = stack.pop()
            stack[-1].append(done)
        elif token == ")":
            raise ValueError("a bracket closes that none opened")
        elif token.startswith("(tiles"):
            stack[-1].append(["tiles", *token[6:-1].split()])
        elif not token.startswith(";"):
            stack[-1].append(token)
    if len(stack) > 1:
        raise ValueError("a bracket is not closed")
    return stack[0]


def members(of: list, name: str) -> list[list]:
    """The lists in a list that start with a name."""
    return [own for own in of if isinstance(own, list) and own[:1] == [name]]


def value_of(of: list, name: str) -> str:
    """`1` of a list with `(name 1)`; "" if it has none."""
    found = members(of, name)
    return found[0][1] if found and len(found[0]) > 1 else ""


def read_tiles(text: str) -> dict[int, str]:
    """{number of a tile: its letter} of tiles.strf; others are empty."""
    found = {}
    for block in members(read_lists(text)[0], "tiles"):
        for numbers, attributes in zip(members(block, "ids"), members(block, "attributes")):
            for tile, bits in zip(numbers[1:], attributes[1:]):
                for bit, letter in ATTRIBUTES:
                    if int(bits) & bit:
                        found[int(tile)] = letter
                        break
    found.pop(0, None)
    return found


def read_solid(tilemap: list, tiles: dict[int, str]) -> np.ndarray | None:
    """The letters of a tilemap, (rows, columns); None if it is no ground, moves, or is damaged."""
    rows, columns = value_of(tilemap, "height"), value_of(tilemap, "width")
    numbers = members(tilemap, "tiles")
    if value_of(tilemap, "solid") != "#t" or members(tilemap, "path") or not numbers:
        return None
    letters = np.array([tiles.get(int(number), EMPTY) for number in numbers[0][1:]])
    if not rows.isdigit() or not columns.isdigit() or letters.size != int(rows) * int(columns):
        return None
    return letters.reshape(int(rows), int(columns))


def read_level(text: str, tiles: dict[int, str]) -> Iterator[np.ndarray]:
    """The largest ground of each sector of a level, with its objects: letters (rows, columns).

    The highest row is the first. Raises ValueError for a damaged file.
    """
    for level in members(read_lists(text), "supertux-level"):
        for sector in members(level, "sector"):
            grids = [read_solid(own, tiles) for own in members(sector, "tilemap")]
            grid = max((own for own in grids if own is not None), key=np.size, default=None)
            if grid is None:
                continue
            for item in sector[1:]:
                letter = OBJECTS.get(item[0]) if isinstance(item, list) and item else None
                if letter:
                    row = int(float(value_of(item, "y") or -1)) // PIXELS
                    column = int(float(value_of(item, "x") or -1)) // PIXELS
                    inside = 0 <= row < grid.shape[0] and 0 <= column < grid.shape[1]
                    if inside and grid[row, column] == EMPTY:
                        grid[row, column] = letter
            yield grid


def places_to_stand(grid: np.ndarray) -> np.ndarray:
    """Where there is room above something to stand on: bool (rows, columns)."""
    firm = np.isin(grid, list(STANDS))
    room = ~np.isin(grid, [SOLID, BLOCK, HURTS])
    found = np.zeros(grid.shape, dtype=bool)
    found[:-1] = room[:-1] & firm[1:]
    return found


def pieces_of(grid: np.ndarray) -> Iterator[str]:
    """The texts of the pieces of a level."""
    stands = places_to_stand(grid)
    for first in range(0, grid.shape[1] - COLUMNS + 1, STRIDE):
        own = stands[:, first : first + COLUMNS]
        sums = np.concatenate(([0], own.sum(1).cumsum()))
        tops = np.arange(max(0, len(own) - ROWS) + 1)
        top = int((sums[np.minimum(tops + ROWS, len(own))] - sums[tops]).argmax())
        part = grid[top : top + ROWS, first : first + COLUMNS]
        there = own[top : top + ROWS]
        if len(part) < ROWS or not there[:, :EDGE].any() or not there[:, -EDGE:].any():
            continue
        yield "\n".join("".join(column) for column in part[::-1].T)


# ---- is there a path? ----------------------------------------------------------------------------


class Place(NamedTuple):
    """Where somebody is, and how many rows the jump still rises."""

    column: int
    row: int  # 0 is the lowest
    rise: int


def read_columns(text: str) -> list[str]:
    """The columns of a piece. Raises ValueError if it is none."""
    columns = text.strip().split("\n")
    if len(columns) != COLUMNS:
        raise ValueError(f"{counted(len(columns), 'columns')}, not {COLUMNS}")
    for number, column in enumerate(columns, 1):
        wrong = set(column) - LETTERS
        if wrong:
            raise ValueError(f"{min(wrong)!r} in column {number} is no tile")
        if len(column) != ROWS:
            raise ValueError(f"column {number} has {counted(len(column), 'rows')}, not {ROWS}")
    return columns


def find_path(columns: Sequence[str]) -> list[Place]:
    """The places of a shortest way from the first to the last columns; [] if there is none."""

    def is_free(column: int, row: int) -> bool:
        if not 0 <= column < COLUMNS or row < 0:
            return False
        return row >= ROWS or columns[column][row] not in (SOLID, BLOCK, HURTS)

    def stands(column: int, row: int) -> bool:
        return 0 < row <= ROWS and columns[column][row - 1] in STANDS

    waiting = []
    for column in range(EDGE):
        for row in range(1, ROWS):
            if stands(column, row) and is_free(column, row):
                waiting.append(Place(column, row, JUMP))
    before: dict[Place, Place | None] = dict.fromkeys(waiting)
    for place in waiting:  # it grows
        column, row, rise = place
        firm = stands(column, row)
        if firm and column >= COLUMNS - EDGE:
            way = []
            while place is not None:
                way.append(place)
                place = before[place]
            return way[::-1]
        steps = []
        for side in (-1, 0, 1):
            if firm and side:
                steps.append((column + side, row, 0))
            if rise and is_free(column, row + 1):
                steps.append((column + side, row + 1, rise - 1))
            if not firm and is_free(column + side, row):
                steps.append((column + side, row - 1, 0))
        for other, height, left in steps:
            if height > ROWS or not is_free(other, height):
                continue
            rise_there = JUMP if stands(other, height) else left
            new = Place(other, height, rise_there)
            if new not in before:
                before[new] = place
                waiting.append(new)
    return []


def fault(text: str) -> str:
    """What keeps a text from being a piece of a level with a path; "" if it is one."""
    try:
        columns = read_columns(text)
    except ValueError as error:
        return str(error)
    return "" if find_path(columns) else "there is no path from the left to the right"


def copied(texts: Sequence[str], training: Iterable[str]) -> list[bool]:
    """Whether training has COPY neighbouring columns of each of these pieces."""
    own = [tuple(text.strip().split("\n")) for text in texts]
    return modality.share_runs(own, (tuple(text.split("\n")) for text in training), COPY)


def read_prompt(prompt: str) -> str:
    """The first columns of a piece, in which \\n is a line end. Raises ValueError for others."""
    text = prompt.replace("\\n", "\n")
    *whole, last = text.split("\n")
    too_long = len(whole) >= COLUMNS or len(last) > ROWS
    if too_long or set("".join(whole) + last) - LETTERS or {*map(len, whole)} - {ROWS}:
        raise ValueError(
            f"--prompt {prompt[:40]!r} starts no level: a line is a column of {ROWS} tiles, from "
            f"{' '.join(sorted(LETTERS))}, and there are {COLUMNS} lines"
        )
    return text


COLOURS = {
    EMPTY: (200, 225, 255), SOLID: (110, 80, 60), PLATFORM: (170, 130, 90), BLOCK: (240, 190, 60),
    HURTS: (200, 40, 40), WATER: (90, 140, 230), COIN: (250, 220, 80), ENEMY: (150, 60, 170),
}  # fmt: skip
TILE = 12  # pixels of a drawn tile
DRAWN = 16  # pieces in a picture


def draw(texts: Sequence[str], path: Path) -> None:
    """Draw up to DRAWN pieces, one below the other, with dots where the shortest path goes."""
    from data import pictures  # loads Pillow, which texts do not need

    panels = []
    for text in texts[:DRAWN]:
        columns = read_columns(text)
        image = np.array([[COLOURS[letter] for letter in column] for column in columns])
        image = image.transpose(1, 0, 2)[::-1].repeat(TILE, 0).repeat(TILE, 1).astype(np.uint8)
        for column, row, _ in find_path(columns):
            if row < ROWS:
                x, y = column * TILE + TILE // 2, (ROWS - 1 - row) * TILE + TILE // 2
                image[y - 1 : y + 2, x - 1 : x + 2] = 0
        panels += [image, np.full((TILE, *image.shape[1:]), 255, dtype=np.uint8)]
    pictures.save(np.concatenate(panels[:-1]), path.with_suffix(".png"))


MODALITY = modality.Modality(
    about="pieces of levels of SuperTux",
    unit="levels",
    meaning="a path leads from the first to the last columns",
    fault=fault,
    longest=COLUMNS * (ROWS + 1),
    copied=copied,
    read_prompt=read_prompt,
    draw=draw,
    endings=(".png",),
)


# ---- the source ----------------------------------------------------------------------------------


def version() -> str:
    """A name for the exact documents: it changes if they do."""
    return f"levels-1 {PACKAGE.sha256}"


def documents(report: Report | None = None) -> Iterator[Document]:
    """Yield the pieces of all levels. Raises ValueError, with a command, without the package."""
    if report is None:
        report = Report()
    report.note(f"licence: {PACKAGE.licence}")
    found = dict(wheels.read_matching(PACKAGE, LEVELS))
    tiles = read_tiles(found.pop(TILES).decode("utf-8", "replace"))
    for member, content in found.items():
        name = "/".join(Path(member).parts[-2:])
        try:
            grids = list(read_level(content.decode("utf-8", "replace"), tiles))
        except ValueError as error:
            report.skip(str(error), name)
            continue
        pieces = (piece for grid in grids for piece in pieces_of(grid))
        for number, piece in enumerate(pieces, 1):
            title = f"{name}, piece {number}"
            report.found += 1
            problem = fault(piece)
            if problem:
                report.skip(problem, title)
                continue
            report.used += 1
            yield Document(piece, split_of(name, HELD_OUT), title)


def look() -> None:
    """Print the size of the data set, a piece, and how many held-out ones are valid."""
    modality.look(sys.modules[__name__])


if __name__ == "__main__":
    command.run("levels", __doc__, look)
